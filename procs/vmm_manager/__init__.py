"""The VM manager: VM processes and their hypervisor's API.

``service`` answers the bus; ``registry`` owns the VMs of this host and brings them back after a restart; ``record`` is
what is known of a VM on disk; ``drivers`` knows how each hypervisor is started and spoken to.

VMs outlive this process: they run in sessions and cgroups of their own, nothing of them hangs on a pipe to it, and all
that it must know of them is in their ``vm.json``. Stopping it therefore means closing sockets and nothing else.
"""
