"""The agent: PID 1 of the guest, which does what the shim asks over Kata's agent protocol.

One thread and one ``epoll``; nothing blocks, nothing polls. Who owns what::

    main        the order in which a guest comes up
    reactor     file descriptors, timers, "soon"
    connection  the agent port: hello, ttrpc frames          rpc       which method answers a call, and with which error
    service     the verbs of grpc.AgentService               sandbox   containers by id, the storages of each
    storage     what the host plugs: mounted, given back     block     disks by place and serial; modules: drivers
    container   a container and its processes                crun      the OCI runtime: arguments, bundle, its errors
    streams     bytes between a process and its port         ports     virtio ports by name
    reaper      children, ours and orphans                   kernel    system calls that Python does not wrap

Modules import C modules (``posix``, ``_socket``, ``_signal``) where the Python ones over them would cost a tenth of a
second of every boot (docs/adr/0007-agent-imports-nothing.md).
"""
