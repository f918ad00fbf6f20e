"""The device manager: every device of every sandbox."""
