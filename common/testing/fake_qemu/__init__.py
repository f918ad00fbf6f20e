"""A QEMU without a guest, as a process: it answers QMP as QEMU 7.2 does and misbehaves on demand.

``machine`` is what it has and when it refuses, in QEMU's own words; ``monitor`` speaks QMP and carries the demands;
``__main__`` is started with QEMU's command line, by the VM manager if the configuration's ``path`` says so. A test in
``tests/vm`` has both answer the same commands.

A second socket ``control`` in the working directory takes the demands, as QMP commands whose names begin with ``x-``:

=================  ====================================================================================================
x-misbehave        ``what`` (command or event), ``how`` (:class:`common.testing.demands.How`), ``times``
x-release          let answers go that were held back
x-guest            ``lets-go``: whether the guest lets devices go by itself
x-let-go           ``id``: the guest lets a device go now, asked or not
x-transcript       everything that was said on the monitor so far
=================  ====================================================================================================
"""
