"""The host processes of pykata, one package each.

::

    containerd --ttrpc--> shim --bus--> vmm-manager --QMP or REST--> QEMU, Cloud Hypervisor, Firecracker
                            |             ^
                            +----bus----> device-manager
    Prometheus --HTTP--> monitor --bus--> every service

Processes never import one another: what two of them share is in ``common``.
"""
