"""The shim: one process per sandbox, driven by containerd.

===============  ======================================================================================================
``cli``          what containerd executes: flags, ``start``, ``delete``, ``-v``, ``-info``
``launch``       ``start``: take the sandbox's name, listen, have the server forked, print the address
``cleanup``      ``delete``: leave nothing behind, with no help from anybody
``names``        ids and socket paths
``record``       who serves a sandbox: the lock on its directory, ``shim.json``
---------------  ------------------------------------------------------------------------------------------------------
``host``         the process that forks shims which have imported everything, if it runs
``host_caller``  what such a shim has of its caller
``order``        the request for the VM, before all else is imported
``server``       the process: boot task, Task API, events, the end
``sandbox``      the VM: boot, agent, share; its death and its destruction
``agent``        the connection to the guest's agent
``service``      the Task API's verbs
``container``    the container of a sandbox: its own process and its execs
``tasks``        states of tasks and execs; pure
``process``      one process of the guest: start, streams, exit
``streams``      stream ports and the pumps between them and FIFOs
``fifos``        the host's end of standard streams
``spec``         what of the OCI configuration goes to the guest; pure
``share``        the mounts that virtiofsd exports
``rootfs``       a root file system that the guest mounts from disks; ``layers``: one of several mounts
``disk``         disks of the guest for a container
``events``       the ordered sender of events to containerd
===============  ======================================================================================================

What stands above the line runs before anything is imported that costs time: it uses the standard library, and few
modules of that (tests/unit/shim/test_light_imports.py).
"""
