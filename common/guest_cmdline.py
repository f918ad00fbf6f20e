"""The guest kernel's command line, and why each parameter is on it. Times: seconds of boot under software emulation.

And the processor that QEMU shows it.
"""

from __future__ import annotations

_PARAMETERS = (
    ("console=ttyS0", "the serial port, whose last lines the host keeps"),
    ("quiet", "each line of the console costs; errors are shown all the same"),
    ("panic=1", "a kernel or agent that fails ends the VM: with -no-reboot QEMU exits"),
    ("rdinit=/init", "the initrd is the whole system"),
    ("cryptomgr.notests", "known-answer tests of ciphers that nobody uses: 0.7"),
    ("noreplace-smp", "with one CPU the kernel would rewrite its own locks, and QEMU translate them again: 0.2"),
    ("init_on_alloc=0", "the memory of a fresh VM is zero already, and nobody else's: 0.2"),
    ("tsc=reliable", "the hypervisor's clock needs no watchdog"),
    ("no_timer_check", "nor do its timer interrupts need a test"),
)

QEMU_CPU = {"kvm": "host", "tcg": "max,la57=off,erms=off,fsrm=off"}
"""QEMU's ``-cpu``, by accelerator. Under emulation every page walk is work: la57=off saves the fifth level of page
tables. So is every turn of a repeated instruction: without erms and fsrm the kernel copies eight bytes a turn and not
one, which boots a fifteenth sooner."""


def parameters(extra: str = "") -> str:
    """Return the command line.

    Args:
        extra: parameters of the configuration, which come last and thus win.
    """
    return " ".join(filter(None, (*(parameter for parameter, _why in _PARAMETERS), extra)))
