"""The host processes of pykata, one package each.

::

    containerd --ttrpc--> shim --bus--> vmm-manager --QMP--> QEMU
                            |             ^
                            +----bus----> device-manager
    Prometheus --HTTP--> monitor --bus--> every service

Processes never import one another: what two of them share is in ``common``.
"""
