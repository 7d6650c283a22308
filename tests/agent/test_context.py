"""torch's process context with workers from the zygote: logs, failures, replacement of one worker, closing."""

from __future__ import annotations

import inspect
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, SubprocessContext
from zygote_harness import SCRIPTS

from autoglm_elastic.agent.context import WorkerChannel, ZygoteContext
from autoglm_elastic.agent.process import ForkedProcess, SpawnedProcess, SpawnRequest
from autoglm_elastic.agent.zygote import Zygote, ZygoteGone

WAIT_S = 60.0
MakeContext = Callable[..., ZygoteContext]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote([], "")
    made.respawn()  # executed: the test process has threads, warnings and captured streams of its own
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeContext]:
    """Contexts of 2 workers; closed at the end."""
    made: list[ZygoteContext] = []

    def build(zygote: Zygote | None, *command: str, **rest: Any) -> ZygoteContext:
        command = command or (sys.executable, "-u", str(SCRIPTS / "reports.py"))
        envs = {
            rank: {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0", **rest.pop(f"env{rank}", {})}
            for rank in range(2)
        }
        context = ZygoteContext(
            "worker",
            command[0],
            {0: command[1:], 1: command[1:]},
            envs,
            DefaultLogsSpecs(str(tmp_path / f"logs{len(made)}"), redirects=Std.ALL),
            zygote=zygote,
            **rest,
        )
        made.append(context)
        return context

    yield build
    for context in made:
        context.close(signal.SIGKILL)


class Ends:
    """The agent's ends of the channels of two workers."""

    def __init__(self) -> None:
        self.pairs = [socket.socketpair() for _ in range(2)]
        self.channels = {
            rank: WorkerChannel({"REPORT_FD": theirs.fileno()}) for rank, (_, theirs) in enumerate(self.pairs)
        }

    def started(self) -> None:
        for ours, theirs in self.pairs:
            theirs.close()
            ours.settimeout(WAIT_S)

    def __getitem__(self, rank: int) -> socket.socket:
        return self.pairs[rank][0]


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    for pair in made.pairs:
        for end in pair:
            end.close()


def wait_dead(pidfd: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(WAIT_S * 1000)


def finish(context: ZygoteContext) -> Any:
    for pidfd in context.pidfds().values():
        wait_dead(pidfd)
    return context.wait(0)


@pytest.mark.parametrize("forked", [True, False], ids=["zygote", "popen"])
def test_workers_run_and_their_streams_are_redirected(
    make: MakeContext, zygote: Zygote, ends: Ends, forked: bool
) -> None:
    context = make(zygote if forked else None, channels=ends.channels)
    context.start()
    ends.started()
    kind = ForkedProcess if forked else SpawnedProcess
    assert all(isinstance(handler.proc, kind) for handler in context.subprocess_handlers.values())
    assert [ends[rank].recv(64) for rank in range(2)] == [b"rank 0", b"rank 1"]
    assert context.poll_exits() == {}
    assert context.wait(0) is None
    for rank in range(2):
        ends[rank].send(b"end")
    result = finish(context)
    assert not result.is_failed()
    assert context.poll_exits() == {0: 0, 1: 0}
    assert [Path(result.stdouts[rank]).read_text() for rank in range(2)] == [
        "rank 0 restart 0\n",
        "rank 1 restart 0\n",
    ]
    assert Path(result.stderrs[1]).read_text() == "error 1\n"
    assert ends[0].recv(64) == b""  # nobody else holds the worker's end


def test_the_first_failure_closes_the_others(make: MakeContext, zygote: Zygote, ends: Ends) -> None:
    """As with torch's own context."""
    context = make(zygote, channels=ends.channels)
    context.start()
    ends.started()
    ends[1].recv(64)
    ends[1].send(b"fail")
    wait_dead(context.pidfds()[1])
    result = context.wait(0)
    assert result is not None
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {0: -signal.SIGTERM, 1: 5}
    assert context.poll_exits() == {0: -signal.SIGTERM, 1: 5}


def test_one_worker_is_replaced_while_the_other_runs_on(
    make: MakeContext, zygote: Zygote, ends: Ends
) -> None:
    context = make(zygote, channels=ends.channels)
    context.start()
    ends.started()
    before = context.pids()
    assert [ends[rank].recv(64) for rank in range(2)] == [b"rank 0", b"rank 1"]
    os.kill(before[1], signal.SIGKILL)
    wait_dead(context.pidfds()[1])
    assert context.poll_exits() == {1: -signal.SIGKILL}
    Path(context.error_files[1]).write_text("{}")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        context.replace(1, {"TORCHELASTIC_RESTART_COUNT": "1"}, WorkerChannel({"REPORT_FD": theirs.fileno()}))
        theirs.close()
        ours.settimeout(WAIT_S)
        assert ours.recv(64) == b"rank 1"
        assert context.pids()[0] == before[0]
        assert context.pids()[1] != before[1]
        assert context.poll_exits() == {}
        assert not Path(context.error_files[1]).exists()
        ours.send(b"end")
        ends[0].send(b"end")
        result = finish(context)
    assert not result.is_failed()
    assert Path(result.stdouts[1]).read_text() == "rank 1 restart 0\nrank 1 restart 1\n"


def test_a_stuck_worker_is_killed(make: MakeContext, zygote: Zygote, ends: Ends) -> None:
    context = make(zygote, channels=ends.channels)
    context.start()
    ends.started()
    ends[0].recv(64)
    os.kill(context.pids()[0], signal.SIGSTOP)
    context.kill(0)
    assert context.poll_exits() == {0: -signal.SIGKILL}
    context.kill(0)


def test_a_command_that_does_not_exist_is_refused_as_torch_does(make: MakeContext, zygote: Zygote) -> None:
    for each in (zygote, None):
        with pytest.raises(FileNotFoundError) as refused:
            make(each, "/nonexistent/program").start()
        assert refused.value.filename == "/nonexistent/program"


def test_other_programs_are_executed(make: MakeContext, zygote: Zygote) -> None:
    context = make(zygote, "/bin/sh", "-c", "echo $RANK; exit $RANK")
    context.start()
    for pidfd in context.pidfds().values():
        wait_dead(pidfd)
    assert context.poll_exits() == {0: 0, 1: 1}
    assert [Path(context.stdouts[rank]).read_text() for rank in range(2)] == ["0\n", "1\n"]


def test_a_dead_zygote_is_replaced_when_workers_are_started(make: MakeContext, zygote: Zygote) -> None:
    zygote.wait_ready()
    os.kill(zygote.pid, signal.SIGKILL)
    wait_dead(zygote.pidfd)
    assert not zygote.alive
    with pytest.raises(ZygoteGone):
        zygote.spawn(SpawnRequest([sys.executable, "-u", "-m", "this"], dict(os.environ)))
    context = make(zygote)
    context.start()
    assert not finish(context).is_failed()
    assert zygote.alive


def test_it_takes_what_torch_takes() -> None:
    """A torch that adds an argument is noticed here, not by a user."""
    theirs = list(inspect.signature(SubprocessContext.__init__).parameters)
    ours = list(inspect.signature(ZygoteContext.__init__).parameters)
    assert ours == [*theirs, "zygote", "channels"]
