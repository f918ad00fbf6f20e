"""What Linux offers and Python lacks: mounts, cgroups. Standard library only; no policy."""
