"""The monitor: metrics of the services and the running sandboxes, for Prometheus."""
