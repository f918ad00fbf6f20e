"""A Cloud Hypervisor without a guest, as a process: it answers as version 53.0 does and misbehaves on demand.

``machine`` is what the VM has and when it refuses, in Cloud Hypervisor's own words, ``totals`` its processors and
memory; ``server`` speaks HTTP and carries
the demands; ``__main__`` is started with Cloud Hypervisor's command line, by the VM manager if the configuration's
``path`` says so. What a real one answered is in docs/hypervisors/cloud-hypervisor.md.

A second socket ``control`` in the working directory takes the demands, one JSON object a line, each answered by one:

==============  =======================================================================================================
misbehave       ``what`` (endpoint or event), ``how`` (:class:`common.testing.demands.How`), ``times``: the next so many
release         let answers go that were held back
guest           ``lets_go``: whether the guest lets devices go by itself
let_go          ``name``: the guest lets a device go now, asked or not
tell            ``source``, ``name``: write an event about the VM
print           ``text``: what the guest prints on its serial port
garble          write half a record on the event stream, as a stream that was full does
transcript      everything that was asked, answered and told so far
has             the devices' ids, and the files that are open
memory          what a restored guest had in its memory, and how that comes
totals          how many processors there are, and how much memory, in bytes
==============  =======================================================================================================
"""
