"""The VM manager: VM processes and their hypervisor's API."""
