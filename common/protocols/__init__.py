"""Messages of the protocols that we did not invent: the guest's agent, the OCI specification, containerd's tasks."""
