"""A Firecracker without a guest, as a process: it answers as versions 1.12 to 1.16 do and misbehaves on demand.

``machine`` is what it has and when it refuses, in Firecracker's own words; ``guest`` what a guest sees of its drives;
``server`` speaks HTTP and carries the demands; ``__main__`` is started with Firecracker's command line, by the VM
manager or by ``jailer``, which stands in for the real one: it makes the same directories and checks the same arguments,
but leaves the process where it is.

A second socket ``control`` in the jail's root takes the demands, as JSON, one a line, each with one answer:

=============  ========================================================================================================
misbehave      ``what`` (for example ``PUT /drives``), ``how`` (:class:`common.testing.demands.How`), ``times``
release        let answers go that were held back
rescan         the guest looks for PCI devices
remove         ``slot``: the guest lets the PCI device there go
panic          the guest panics, which ends the process
guest          what the guest sees: PCI slots or placeholder drives, each with the file behind it
has            the disks that are in, by their names in the jail, and the host's files behind them
transcript     everything that was said on the API so far
=============  ========================================================================================================
"""
