"""Which hypervisor may be asked twice."""

from __future__ import annotations

import pytest

from common.services.device import Device
from common.services.vmm import BlockSpec
from procs.device_manager.rules import RULES, Rule, again_after_s

RULE = Rule(
    hypervisor="ch", kinds=frozenset({"block"}), since=(49, 1), before=(53,), again_after_s=(1.0, 2.0)
)  # as a rule about some versions would look


def device(version: str, *, removals: int = 1, hypervisor: str = "ch", is_known: bool = True) -> Device:
    return Device(
        device_id="d",
        sandbox_id="s",
        hypervisor=hypervisor,
        version=version,
        bus="b",
        slot=0,
        state="quarantined",
        since=0,
        spec=BlockSpec(source="/x") if is_known else None,
        removals=removals,
    )


@pytest.mark.parametrize(
    ("version", "removals", "seconds"),
    [
        ("49.1", 1, 1.0),
        ("52.9.9", 2, 2.0),
        ("52", 3, None),
        ("49.0", 1, None),
        ("53.0", 1, None),
        ("", 1, None),
        ("unknown", 1, None),
    ],
)
def test_a_rule_holds_for_its_versions_and_so_many_requests(version: str, removals: int, seconds: float | None) -> None:
    assert again_after_s(device(version, removals=removals), [RULE]) == seconds


def test_who_is_in_no_rule_is_never_asked_twice() -> None:
    assert again_after_s(device("50.0", hypervisor="other"), [RULE]) is None
    assert again_after_s(device("50.0", is_known=False), [RULE]) is None
    assert again_after_s(device("50.0"), []) is None


def test_qemu_may_be_asked_again() -> None:
    assert again_after_s(device("7.2.22", hypervisor="qemu"), RULES) == 30.0
