"""The bus: typed calls and events between the host processes, ZeroMQ sockets with MessagePack bodies.

``wire`` is the contract (docs/wire-protocol.md), ``server`` and ``client`` its two ends, ``events`` publishing and
subscribing.
"""
