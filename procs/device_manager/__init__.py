"""The device manager: every device of every sandbox. It may run as several shards (``common.shards``).

::

    service   verbs: wishes become steps, callers wait for their outcome
      `-> lives     takes each step and begins what it calls for          <-- news: what the VM managers publish
            |-> states    the life of one device: (state, event) -> (state, actions)         pure
            |-> table     all devices; places (topology) and sources are nobody else's       pure, but for the journal
            |     |-> journal   the same on disk, with each device's history
            |     `-> claims    what no two sandboxes may have, whichever shards they are in
            `-> commands  one queue a sandbox to its VM manager; an answer is the next event

The rules that the hypervisors taught:

- *accepted* is not *removed*: bus, slot, id and source stay taken until the hypervisor confirms;
- a call whose outcome is unknown is settled by asking the hypervisor, before anything else is tried;
- every step is on disk before it is taken, so that a successor knows what to finish or undo;
- commands of one sandbox follow one another; a guest that never answers holds no lock, only its own device.
"""
