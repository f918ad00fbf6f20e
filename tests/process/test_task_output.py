"""Output that goes elsewhere than into a FIFO: files, and programs that log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import KataError, NotFoundError, UsageError
from common.testing.shim_client import started
from common.testing.shim_stand import NAMESPACE, stand_test

if TYPE_CHECKING:
    from common.testing.shim_stand import ShimStand

LOGGER = """#!/bin/sh
echo "$@" $CONTAINER_ID $CONTAINER_NAMESPACE > {root}/arguments
{ready}
exec 5>&-
cat <&3 > {root}/stdout &
cat <&4 > {root}/stderr &
wait
echo done > {root}/done
"""


def logger(stand: ShimStand, script: str = LOGGER, ready: str = "") -> str:
    """Write a logger; return its path."""
    path = stand.root / "logger"
    path.write_text(script.format(root=stand.root, ready=ready))
    path.chmod(0o755)
    return str(path)


@stand_test
async def test_both_streams_are_appended_to_a_file(stand: ShimStand) -> None:
    shim = await started(stand)
    path = stand.root / "logs" / "deep" / "log"
    name = f"file://{path}"
    await shim.create("sh", "-c", "echo out; echo err >&2", stdout=name, stderr=name)
    await shim.start()
    await shim.wait()
    assert sorted(path.read_text().splitlines()) == ["err", "out"]
    assert path.stat().st_mode & 0o777 == 0o640
    assert (await shim.state()).stdout == name


@stand_test
async def test_execs_append_to_the_same_file(stand: ShimStand) -> None:
    shim = await started(stand)
    (stand.root / "log").write_text("before\n")
    name = f"file://{stand.root}/log"
    await shim.create("sleep", "1000")
    await shim.start()
    for exec_id in ("e1", "e2"):
        await shim.exec(exec_id, "echo", exec_id, stdout=name)
        await shim.start(exec_id)
        assert await shim.wait(exec_id) == 0
    assert (stand.root / "log").read_text() == "before\ne1\ne2\n"


@stand_test
async def test_a_file_that_cannot_be_is_an_error_and_costs_no_port(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    for number in range(6):
        await shim.exec(f"e{number}", "true", stdout=f"file://{stand.bundle}")
        with pytest.raises(UsageError, match="cannot open standard output"):
            await shim.start(f"e{number}")


@stand_test
async def test_a_disk_that_is_full_does_not_stop_the_container(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sh", "-c", "head -c 1000000 /dev/zero; exit 4", stdout="file:///dev/full")
    await shim.start()
    assert await shim.wait() == 4
    assert "output dropped, it cannot be written" in stand.log()


@pytest.mark.parametrize(("scheme", "ready"), [("binary", ""), ("binary-v2", "printf x >&5")])
def test_a_logger_gets_both_streams_and_its_arguments(scheme: str, ready: str) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        shim = await started(stand)
        name = f"{scheme}://{logger(stand, ready=ready)}?colour=red&size=big%20one&empty="
        await shim.create("sh", "-c", "echo out; echo err >&2", stdout=name, stderr=name)
        await shim.start()
        await shim.wait()
        await shim.delete()  # which waits for the logger
        assert (stand.root / "arguments").read_text().split() == [
            "colour", "red", "size", "big", "one", "empty", stand.id, NAMESPACE
        ]  # fmt: skip
        assert [(stand.root / stream).read_text() for stream in ("stdout", "stderr", "done")] == [
            "out\n",
            "err\n",
            "done\n",
        ]

    test()


@stand_test
async def test_the_logger_of_an_exec_is_told_which(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    name = f"binary://{logger(stand)}"
    await shim.exec("e1", "echo", "hello", stdout=name)
    await shim.start("e1")
    await shim.wait("e1")
    await shim.delete("e1")
    assert (stand.root / "arguments").read_text().split() == ["e1", NAMESPACE]
    assert (stand.root / "stdout").read_text() == "hello\n"


@stand_test
async def test_a_logger_that_dies_does_not_stop_the_container(stand: ShimStand) -> None:
    shim = await started(stand)
    name = f"binary://{logger(stand, '#!/bin/sh')}"
    await shim.create("sh", "-c", "head -c 1000000 /dev/zero; exit 4", stdout=name)
    await shim.start()
    assert await shim.wait() == 4


@stand_test
async def test_a_logger_that_hangs_is_killed_with_the_shim(stand: ShimStand) -> None:
    """Its killer is `delete` here: that a test leaves no process is checked for each."""
    shim = await started(stand)
    name = f"binary://{logger(stand, '#!/bin/sh' + chr(10) + 'exec 5>&-; exec sleep 1000')}"
    await shim.create("true", stdout=name)
    await shim.start()
    await shim.wait()


@pytest.mark.parametrize(
    ("script", "said"),
    [("#!/bin/sh", "before it was ready"), ("#!/no/such/interpreter", "cannot open standard output binary-v2://")],
)
def test_a_logger_that_does_not_get_ready_is_an_error(script: str, said: str) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        shim = await started(stand)
        with pytest.raises(KataError, match=said):
            await shim.create("true", stdout=f"binary-v2://{logger(stand, script)}")
        with pytest.raises(NotFoundError, match=f"container {stand.id}"):
            await shim.state()

    test()
