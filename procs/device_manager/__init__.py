"""The device manager: every device of every sandbox.

``states`` is the life of one device, a table; ``journal`` keeps the devices on disk; ``manager`` decides and acts;
``__main__`` puts it on the bus. The rules that the hypervisors taught:

- *accepted* is not *removed*: bus, id and backing directory stay taken until the hypervisor confirms;
- a call whose outcome is unknown is settled by asking the hypervisor, before anything else is tried;
- every step is on disk before it is taken, so that a successor knows what to finish or undo;
- commands of one sandbox follow one another; a guest that never answers holds no lock, only its own device.
"""
