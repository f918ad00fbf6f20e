"""Builds the guest: a kernel and an initial RAM file system, both from Debian packages.

::

    apt ──packages──> cache/root-<hash>/   unpacked, never installed on the host
                        ├──kernel──> vmlinux       uncompressed, for PVH boot: no decompressor, no firmware
                        └─contents─> initrd.img    modules, Python as far as the agent imports it, crun, the agent

The guest has no other disk: the initrd is its whole system, and each of its megabytes costs boot time and memory. What
goes in is therefore found, not listed: shared libraries by what the executables need, Python modules by what the agent
imported when Debian's own interpreter was asked, kernel modules by what they name as dependencies.

The same packages and sources give the same bytes: entries are sorted, belong to root and have no time.
``manifest.json`` says what an image was made of and is written last; as long as it is true, there is nothing to build.
"""

from guest.image.build import Image, build

__all__ = ["Image", "build"]
