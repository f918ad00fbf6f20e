"""What more than one process needs: errors, wire formats, configuration, the bus, Linux helpers."""
