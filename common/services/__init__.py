"""What each host service answers on the bus: its verbs and their typed messages, one module per service.

A verb is a :class:`common.bus.wire.Verb`: a name, the type of the request and the type of the reply. Servers register
a handler per verb, clients call with it, and both sides validate against the same type.
"""
