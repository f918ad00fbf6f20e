"""What runs inside the virtual machine, and what builds its image."""
