"""The monitor: metrics of the services and of the running sandboxes, for Prometheus.

It owns nothing and only reads, at scrape: each service's health over the bus, the kernel's account of each process.
``observation`` looks, ``collector`` turns what was seen into metric families, ``http`` serves them.
"""
