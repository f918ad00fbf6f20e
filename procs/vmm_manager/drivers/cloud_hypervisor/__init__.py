"""Cloud Hypervisor: direct boot, hybrid vsock, virtio's disks, directories and networks, REST, events over a FIFO.

``driver`` makes machines, where KVM works: there is no software emulation. ``machine`` is one VM, ``devices`` what is
hot-plugged into it, ``kinds`` what is special about each kind of that. Below them: ``requests`` says what Cloud
Hypervisor is started with and asked for, ``api`` asks and reads its refusals, ``events`` reads what it tells,
``versions`` knows which version can do what, ``topology`` counts the slots.

What its hotplug demands of whoever uses it (docs/hypervisors/cloud-hypervisor.md has what a real one said):

- *Accepted is not removed.* ``vm.remove-device`` answers at once; id, slot, open file and its lock stay until the guest
  ejects. The event ``device-removed`` tells that, or the absence from the device tree.
- *Removed is not closed.* Both come before the file is closed. What asks for the device manager's lock afterwards waits
  for that (:meth:`api.Api.settle`).
- *Cloud Hypervisor names devices.* No id is sent, so no name can clash with one that is on its way out; the answer has
  it.
- *A refusal leaks.* An add for which there is no slot leaves an id and a locked file behind for the VM's life, so slots
  are counted before it is asked.
"""
