"""The whole device manager but for its sockets, against a hypervisor that answers late, twice, never, or wrongly.

The machine below draws what callers want, what the VM manager answers and when, what the guest does, which timer ends,
and when we are killed. After each step no place, id or source may be in use twice, and whatever the hypervisor has must
be on our books. At the end everybody behaves, and everything has to converge.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import shards
from common.errors import (
    AlreadyExistsError,
    HypervisorError,
    InterruptedCallError,
    KataError,
    NotFoundError,
    UnavailableError,
)
from common.services import vmm
from common.services.device import Abort, Attach, DeviceRef
from common.testing.device_books import Claims, Rows
from common.workers import Workers
from procs.device_manager.commands import Command
from procs.device_manager.lives import Lives
from procs.device_manager.measures import Measures
from procs.device_manager.news import News
from procs.device_manager.service import DeviceService
from procs.device_manager.states import Action, Event
from procs.device_manager.table import Table

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    import msgspec

    from common.services.device import Device

T = TypeVar("T", bound="msgspec.Struct")

SANDBOX = "s1"
BUSES = (vmm.HotplugBus(name="scsi0", kind=vmm.BusKind.SCSI, slots=3),)
SOURCES = ("/a", "/b", "/c", "/d")
HOLDERS = ("c1", "c2")


@dataclass
class Running:
    """A call that has reached the VM manager, and who waits for it."""

    call_id: str
    request: msgspec.Struct
    waiting: list[asyncio.Future[Any]] = field(default_factory=list)


class Hypervisor:
    """The VM manager and the hypervisor behind it: what is in ``present`` is true.

    Attributes:
        is_guest_first: whether it takes devices without asking the guest.
        let_go_of: serials of devices of which somebody has said that the guest has let go.
    """

    def __init__(self) -> None:
        self.present: dict[str, vmm.AddDevice] = {}
        self.unplugging: set[str] = set()
        self.running: list[Running] = []
        self.remembered: dict[str, Any] = {}
        self.is_away = False
        self.is_guest_first = False
        self.let_go_of: set[str] = set()
        self._added = 0
        self._calls = 0

    async def call(
        self, _service: str, _verb: object, request: msgspec.Struct, *, call_id: str | None = None, **_: object
    ) -> Any:  # noqa: ANN401 - any verb's reply
        if self.is_away:
            raise UnavailableError("away")
        self._calls += 1
        call_id = call_id or f"call-{self._calls}"
        if call_id not in self.remembered:
            future = asyncio.get_running_loop().create_future()
            running = next((call for call in self.running if call.call_id == call_id), None)
            if running is None:
                running = Running(call_id, request)
                self.running.append(running)
            running.waiting.append(future)
            return await future
        return _result(self.remembered[call_id])

    def act(self, request: msgspec.Struct) -> Any:  # noqa: ANN401 - any verb's reply
        """Do what is asked, as QEMU does."""
        match request:
            case vmm.AddDevice():
                if request.serial in {other.serial for other in self.present.values()}:
                    return AlreadyExistsError("that very device is there")
                for other in self.present.values():
                    assert (other.bus, other.slot) != (request.bus, request.slot), "a place is used twice"
                    assert other.spec.source != request.spec.source, "a source is used twice"
                self._added += 1
                self.present[f"blk-{self._added}"] = request
                return vmm.AddedDevice(
                    hypervisor_id=f"blk-{self._added}", guest_path="02/00", is_guest_first=self.is_guest_first
                )
            case vmm.RemoveDevice():
                if request.hypervisor_id not in self.present:
                    return NotFoundError("no such device")
                serial = self.present[request.hypervisor_id].serial
                assert not self.is_guest_first or serial in self.let_go_of, "the guest is left with a dead device"
                self.unplugging.add(request.hypervisor_id)
                return None
            case _:
                return self._listed()

    def _listed(self) -> vmm.PresentDevices:
        return vmm.PresentDevices(
            devices=tuple(
                vmm.PresentDevice(
                    hypervisor_id=name,
                    bus=added.bus,
                    slot=added.slot,
                    serial=added.serial,
                    spec=added.spec,
                    is_guest_first=self.is_guest_first,
                )
                for name, added in self.present.items()
            )
        )

    def let_go(self, hypervisor_id: str) -> None:
        del self.present[hypervisor_id]
        self.unplugging.discard(hypervisor_id)


def _result(answer: Any) -> Any:  # noqa: ANN401 - any verb's reply
    if isinstance(answer, KataError):
        raise answer
    return answer


class Machine(RuleBasedStateMachine):
    """Draws what happens."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.rows, self.claims, self.hypervisor = Rows(), Claims(), Hypervisor()
        self.callers: list[asyncio.Task[Any]] = []
        self.start()

    def start(self) -> None:
        """Start a manager on whatever its predecessor left."""
        self.timers: list[asyncio.Future[None]] = []
        ready = self.loop.create_future()
        self.host = self.loop.create_task(self.live(ready))
        self.loop.run_until_complete(ready)
        self.compare()

    async def live(self, ready: asyncio.Future[None]) -> None:
        async with Workers() as workers:
            self.lives = Lives(
                Table(self.rows, self.claims),
                cast("Any", self.hypervisor),
                cast("Any", self),
                workers,
                look=self.look,
                sleep=self.sleep,
            )
            self.news = News(shards.FIRST, self.lives, cast("Any", self.hypervisor), workers)
            self.service = DeviceService(self.lives, cast("Any", self.rows), Measures(self.lives), ["qemu"])
            ready.set_result(None)
            await asyncio.Event().wait()

    async def sleep(self, _: float) -> None:
        timer = self.loop.create_future()
        self.timers.append(timer)
        await timer

    async def look(self, spec: vmm.DeviceSpec) -> str:
        return f"file {spec.source}"

    async def publish(self, *_: object, **_audience: str) -> None:
        """Be the publisher."""

    def run_idle(self) -> None:
        """Run until nothing more happens by itself."""
        for _ in range(30):
            self.loop.run_until_complete(asyncio.sleep(0))
        if self.host.done():
            self.host.result()

    def compare(self) -> None:
        """Do what is done when events may have been missed."""
        self.lives.doubt(self.lives.table)
        self.lives.commands.put(Command(Action.ASK, SANDBOX, "qemu"))
        self.run_idle()

    def ask(self, wish: Coroutine[Any, Any, Any]) -> None:
        self.callers.append(self.loop.create_task(wish))
        self.run_idle()

    def answer(self, running: Running, answer: Any, *, is_told: bool = True) -> None:  # noqa: ANN401 - any reply
        self.hypervisor.running.remove(running)
        self.hypervisor.remembered[running.call_id] = answer
        for future in running.waiting if is_told else ():
            if not future.done():
                future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        self.run_idle()

    @initialize(is_guest_first=st.booleans())
    def choose(self, is_guest_first: bool) -> None:
        self.hypervisor.is_guest_first = is_guest_first

    # What callers want.

    @rule(source=st.sampled_from(SOURCES), holder=st.sampled_from(HOLDERS))
    def attach(self, source: str, holder: str) -> None:
        spec = vmm.BlockSpec(source=source, driver=vmm.BlockDriver.VIRTIO_SCSI)
        wish = Attach(sandbox_id=SANDBOX, hypervisor="qemu", version="7.2", buses=BUSES, spec=spec, holder=holder)
        self.ask(self.service.attach(wish))

    @precondition(lambda self: self.rows.rows)
    @rule(data=st.data(), holder=st.sampled_from(HOLDERS), is_confirmed=st.booleans())
    def use_or_give_back(self, data: st.DataObject, holder: str, is_confirmed: bool) -> None:
        device_id = data.draw(st.sampled_from(sorted(self.rows.rows)))
        if is_confirmed:
            self.ask(self.service.confirm(DeviceRef(device_id=device_id, holder=holder)))
        else:
            self.give_back(device_id, holder)

    @precondition(lambda self: self.rows.rows)
    @rule(data=st.data(), holder=st.sampled_from(HOLDERS))
    def give_up_without_a_word(self, data: st.DataObject, holder: str) -> None:
        device_id = data.draw(st.sampled_from(sorted(self.rows.rows)))
        self.ask(self.service.abort(Abort(device_id=device_id, holder=holder)))

    def give_back(self, device_id: str, holder: str) -> None:
        self.hypervisor.let_go_of.add(device_id)
        self.ask(self.service.detach(DeviceRef(device_id=device_id, holder=holder)))

    # What the VM manager and the hypervisor do.

    @precondition(lambda self: self.hypervisor.running)
    @rule(data=st.data(), acts=st.booleans(), succeeds=st.booleans())
    def carry_out(self, data: st.DataObject, acts: bool, succeeds: bool) -> None:
        running = data.draw(st.sampled_from(self.hypervisor.running))
        answer = self.hypervisor.act(running.request) if acts or succeeds else None
        self.answer(running, answer if succeeds else HypervisorError("refused"))

    @precondition(lambda self: self.hypervisor.running)
    @rule(data=st.data())
    def let_callers_wait_too_long(self, data: st.DataObject) -> None:
        self.give_up(data.draw(st.sampled_from(self.hypervisor.running)))

    def give_up(self, running: Running) -> None:
        """Have those who wait for a call wait no longer; it goes on."""
        waiting, running.waiting = running.waiting, []
        for future in waiting:
            future.set_exception(TimeoutError())
        self.run_idle()

    @rule(acts=st.booleans())
    def restart_vm_manager(self, acts: bool) -> None:
        for running in list(self.hypervisor.running):
            if acts:
                self.hypervisor.act(running.request)
            self.answer(running, InterruptedCallError("it went away"))
        self.hypervisor.remembered.clear()
        self.hypervisor.is_away = False
        self.compare()

    @rule()
    def go_away(self) -> None:
        self.hypervisor.is_away = True

    # What the guest does, and time.

    @precondition(lambda self: self.hypervisor.present)
    @rule(data=st.data(), is_told=st.integers(0, 2), is_asked=st.booleans())
    def let_go(self, data: st.DataObject, is_told: int, is_asked: bool) -> None:
        going = sorted(
            self.hypervisor.unplugging if is_asked and self.hypervisor.unplugging else self.hypervisor.present
        )
        hypervisor_id = data.draw(st.sampled_from(going))
        self.hypervisor.let_go(hypervisor_id)
        for _ in range(is_told):
            self.news._note_removed(vmm.DeviceRemoved(sandbox_id=SANDBOX, hypervisor_id=hypervisor_id))
        self.run_idle()

    @precondition(lambda self: self.timers)
    @rule(data=st.data())
    def end_timer(self, data: st.DataObject) -> None:
        timer = self.timers.pop(data.draw(st.integers(0, len(self.timers) - 1)))
        if not timer.done():
            timer.set_result(None)
        self.run_idle()

    @rule()
    def kill_and_start(self) -> None:
        self.kill()
        for running in self.hypervisor.running:
            running.waiting = []
        self.callers.clear()
        self.start()

    def kill(self) -> None:
        """End every task: what they would do as they end, they do not get to do, since a journal is all that stays."""
        rows = dict(self.rows.rows)
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        assert self.rows.rows == rows

    @invariant()
    def nothing_is_used_twice(self) -> None:
        rows = list(self.rows.rows.values())
        assert len({(row.bus, row.slot) for row in rows}) == len(rows)
        assert len({row.backing for row in rows if row.backing}) == len([row for row in rows if row.backing])

    @invariant()
    def what_has_a_row_is_claimed_and_nothing_else(self) -> None:
        assert set(self.claims.claimed) == set(self.rows.rows)

    @invariant()
    def whatever_the_hypervisor_has_is_on_the_books(self) -> None:
        rows = {row.serial: (row.bus, row.slot) for row in self.rows.rows.values()}
        for added in self.hypervisor.present.values():
            assert rows[added.serial] == (added.bus, added.slot)

    def teardown(self) -> None:
        try:
            self.converge()
        finally:
            self.kill()
            self.loop.close()

    def converge(self) -> None:
        """Let everybody behave: all that was begun has to end, and all have to agree."""
        self.restart_vm_manager(acts=False)
        for _ in range(20):
            while self.hypervisor.running:
                running = self.hypervisor.running[0]
                self.answer(running, self.hypervisor.act(running.request))
            for hypervisor_id in sorted(self.hypervisor.unplugging):
                self.hypervisor.let_go(hypervisor_id)
                self.news._note_removed(vmm.DeviceRemoved(sandbox_id=SANDBOX, hypervisor_id=hypervisor_id))
            while self.timers:
                self.timers.pop().set_result(None)
            for row in self.rows.load() if self.hypervisor.is_guest_first else ():
                if row.state in {"quarantined", "unknown"}:
                    for holder in HOLDERS:
                        self.give_back(row.device_id, holder)
            self.run_idle()
        rows = self.rows.rows.values()
        assert {row.state for row in rows} <= {"attached"}
        assert {row.serial for row in rows} == {added.serial for added in self.hypervisor.present.values()}
        self.require_answers()

    def require_answers(self) -> None:
        """Every caller has to have an answer, if only an error of ours."""
        for task in self.callers:
            assert isinstance(task.exception(), KataError | None)


TestLives = Machine.TestCase
TestLives.settings = settings(stateful_step_count=40)


# The rules that matter most, each by itself: the machine would find them broken, but only sooner or later.


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    machine.answer(machine.hypervisor.running[0], vmm.PresentDevices(devices=()))  # what is asked at the start
    yield machine
    machine.teardown()


def asked(machine: Machine, kind: type[T]) -> Running:
    """Return the call of a kind that is running."""
    (running,) = (running for running in machine.hypervisor.running if isinstance(running.request, kind))
    return running


def carried_out(machine: Machine, kind: type[T]) -> None:
    running = asked(machine, kind)
    machine.answer(running, machine.hypervisor.act(running.request))


def plugged(machine: Machine) -> Device:
    """Have a device plugged; return it."""
    machine.attach("/a", "c1")
    carried_out(machine, vmm.AddDevice)
    (device,) = machine.rows.load()
    return device


def detaching(machine: Machine) -> Device:
    """Have a device whose removal is accepted; return it."""
    device = plugged(machine)
    machine.ask(machine.service.detach(DeviceRef(device_id=device.device_id, holder="c1")))
    carried_out(machine, vmm.RemoveDevice)
    return device


def states(machine: Machine) -> list[str]:
    return [row.state for row in machine.rows.load()]


def test_an_add_that_nobody_waits_for_any_more_is_not_over(machine: Machine) -> None:
    machine.attach("/a", "c1")
    machine.give_up(asked(machine, vmm.AddDevice))
    assert states(machine) == ["attaching"]
    carried_out(machine, vmm.AddDevice)
    assert states(machine) == ["plugged"], "the repeated call joined the first"
    assert len(machine.hypervisor.present) == 1


def test_an_add_that_was_refused_is_looked_for(machine: Machine) -> None:
    machine.attach("/a", "c1")
    add = asked(machine, vmm.AddDevice)
    machine.hypervisor.act(add.request)
    machine.answer(add, HypervisorError("refused"))
    assert states(machine) == ["attaching"]
    carried_out(machine, vmm.SandboxRef)
    assert states(machine) == ["detaching"], "it is there, and nobody is to have it"


def test_each_of_those_who_wait_gets_an_error_of_its_own(machine: Machine) -> None:
    for holder in HOLDERS[:2]:
        machine.attach("/a", holder)
    refusal = HypervisorError("refused", hint="look there", node="n1")
    machine.answer(asked(machine, vmm.AddDevice), refusal)
    carried_out(machine, vmm.SandboxRef)
    errors = [task.exception() for task in machine.callers]
    assert len({id(error) for error in (refusal, *errors)}) == 3
    assert [isinstance(error, HypervisorError) and error.to_wire() for error in errors] == [refusal.to_wire()] * 2


def test_a_removal_that_was_accepted_has_not_happened(machine: Machine) -> None:
    detaching(machine)
    assert states(machine) == ["detaching"]
    machine.attach("/b", "c1")
    places = [(row.bus, row.slot) for row in machine.rows.load()]
    assert len(set(places)) == 2


def test_a_removal_that_was_confirmed_to_nobody_is_found_at_once(machine: Machine) -> None:
    """The VM manager still knows that it was accepted, and says so again."""
    device = detaching(machine)
    machine.hypervisor.let_go(device.hypervisor_id)
    machine.kill_and_start()
    carried_out(machine, vmm.SandboxRef)
    assert states(machine) == [], "before any time is over"


def test_a_device_that_goes_before_its_add_is_answered_is_lost(machine: Machine) -> None:
    machine.attach("/a", "c1")
    add = asked(machine, vmm.AddDevice)
    added = machine.hypervisor.act(add.request)
    machine.hypervisor.let_go(added.hypervisor_id)
    machine.news._note_removed(vmm.DeviceRemoved(sandbox_id=SANDBOX, hypervisor_id=added.hypervisor_id))
    machine.answer(add, added)
    carried_out(machine, vmm.SandboxRef)
    assert states(machine) == []
    assert machine.lives.lost == 1


def test_an_answer_that_comes_when_its_device_has_gone_on_is_no_answer(machine: Machine) -> None:
    """The removal is overdue while it is asked for a second time: that it is accepted means nothing any more."""
    device = detaching(machine)
    machine.hypervisor.remembered.clear()  # the VM manager went away and came back
    machine.lives.happen(device.device_id, Event.RESUMED)
    machine.run_idle()
    machine.timers.pop().set_result(None)
    machine.run_idle()
    assert states(machine) == ["overdue"]
    carried_out(machine, vmm.RemoveDevice)
    assert states(machine) == ["overdue"]
    carried_out(machine, vmm.SandboxRef)
    assert states(machine) == ["quarantined"]


def test_books_that_are_lost_are_begun_anew_with_sources_and_claims(machine: Machine) -> None:
    machine.attach("/a", "c1")
    carried_out(machine, vmm.AddDevice)
    (before,) = machine.rows.load()
    machine.kill()
    machine.rows.rows.clear()
    machine.claims.claimed.clear()
    machine.start()
    while machine.hypervisor.running:
        carried_out(machine, vmm.SandboxRef)
    (after,) = machine.rows.load()
    assert (after.state, after.device_id, after.backing, after.spec) == (
        "unknown",
        before.device_id,
        before.backing,
        before.spec,
    )
    assert set(machine.claims.claimed) == {before.device_id}
    machine.attach("/a", "c2")
    assert "held by device" in str(machine.callers[-1].exception())
    machine.ask(machine.service.detach(DeviceRef(device_id=after.device_id, holder="c1")))  # who had it knows its id
    carried_out(machine, vmm.RemoveDevice)
    assert states(machine) == ["detaching"]


def test_a_lease_that_runs_out_is_not_the_guests_word(machine: Machine) -> None:
    machine.hypervisor.is_guest_first = True
    machine.attach("/a", "c1")
    carried_out(machine, vmm.AddDevice)
    machine.timers.pop().set_result(None)
    machine.run_idle()
    assert states(machine) == ["quarantined"]
    assert not machine.hypervisor.running
    (device,) = machine.rows.load()
    machine.ask(machine.service.abort(Abort(device_id=device.device_id, holder="c1")))
    assert machine.callers[-1].exception() is None
    assert states(machine) == ["quarantined"], "no word yet"
    machine.hypervisor.let_go_of.add(device.device_id)
    machine.ask(machine.service.abort(Abort(device_id=device.device_id, holder="c1", is_let_go=True)))
    carried_out(machine, vmm.RemoveDevice)
    assert states(machine) == ["detaching"]
    machine.news._note_removed(vmm.DeviceRemoved(sandbox_id=SANDBOX, hypervisor_id=device.hypervisor_id))
    machine.hypervisor.let_go(device.hypervisor_id)
    machine.run_idle()
    assert machine.callers[-1].exception() is None
    assert states(machine) == []


def test_the_last_of_several_brings_the_guests_word(machine: Machine) -> None:
    machine.hypervisor.is_guest_first = True
    for holder in HOLDERS[:2]:
        machine.attach("/a", holder)
    add = asked(machine, vmm.AddDevice)
    machine.hypervisor.act(add.request)
    machine.answer(add, HypervisorError("refused"))
    carried_out(machine, vmm.SandboxRef)
    assert states(machine) == ["quarantined"]
    (device,) = machine.rows.load()
    for holder, state in zip(HOLDERS[:2], ("quarantined", "detaching"), strict=True):
        machine.give_back(device.device_id, holder)
        assert states(machine) == [state]


def test_a_device_without_the_guests_word_is_gone_with_its_vm(machine: Machine) -> None:
    machine.hypervisor.is_guest_first = True
    device = plugged(machine)
    machine.ask(machine.service.abort(Abort(device_id=device.device_id, holder="c1")))
    assert states(machine) == ["quarantined"]
    machine.attach("/a", "c1")
    assert "is quarantined" in str(machine.callers[-1].exception())
    machine.hypervisor.present.clear()
    machine.lives.end(machine.lives.table.of(SANDBOX))
    assert states(machine) == []


def test_an_aborted_attach_is_removed_where_the_hypervisor_asks_the_guest(machine: Machine) -> None:
    device = plugged(machine)
    machine.ask(machine.service.abort(Abort(device_id=device.device_id, holder="c1")))
    carried_out(machine, vmm.RemoveDevice)
    assert states(machine) == ["detaching"]
