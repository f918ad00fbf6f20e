"""The shim: one process per sandbox, driven by containerd."""
