"""Who dies with whom, what is noticed, and what the zygote is made of. Real processes, real kills."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from zygote_harness import REPOSITORY, RUN_S, SCRIPTS, Launcher, python


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with Launcher(tmp_path) as started:
        started.ready()
        yield started


class Pipe:
    """A named pipe as a worker's stdout. Its end is the death of whoever could still write to it: the worker and all
    of its children."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> str:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        assert poller.poll(RUN_S * 1000), f"nothing written to {self.path}, and it is still open"
        return os.read(self._fd, 1 << 16).decode()

    def read_line(self) -> str:
        text = self.read()
        while not text.endswith("\n"):
            more = self.read()
            assert more, f"ended after {text!r}"
            text += more
        return text

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    made = Pipe(tmp_path / "pipe")
    yield made
    made.close()


def ended(pid: int) -> bool:
    """Wait for the end of any process; False when it does not come."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        dead = bool(poller.poll(RUN_S * 1000))
        os.close(pidfd)
        return dead
    return True


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "executed"])
def test_no_orphan_when_the_agent_is_killed(launcher: Launcher, pipe: Pipe, forked: bool) -> None:
    """The worker, a child of the worker, and the zygote end with the agent."""
    zygote = launcher.ready()
    command = python(str(SCRIPTS / "waits.py"))
    worker = launcher.spawn(command, stdout=pipe.path, env={} if forked else {"PYTHONHASHSEED": "3"})
    assert (worker.fresh_because is None) == forked
    assert pipe.read_line().startswith("waiting")
    launcher.process.kill()
    assert pipe.read() == ""
    assert ended(worker.pid)
    assert ended(zygote)


@pytest.mark.long
def test_no_orphan_when_the_agent_is_killed_while_the_zygote_imports(tmp_path: Path, pipe: Pipe) -> None:
    # The zygote closes what it inherits; a path is what it can still open.
    (tmp_path / "endless_import.py").write_text(
        f"import threading\nopened = open({str(pipe.path)!r}, 'w')\nprint('importing', file=opened, flush=True)\n"
        "threading.Event().wait()\n"
    )
    with Launcher(tmp_path, "endless_import", env={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}) as launcher:
        assert pipe.read_line() == "importing\n"
        launcher.process.kill()
        assert pipe.read() == ""


def test_workers_end_with_a_killed_zygote_and_a_new_one_takes_its_place(
    launcher: Launcher, pipe: Pipe
) -> None:
    """The agent sees both, the worker's status is that of a kill, and the zygote it executes forks as well."""
    zygote = launcher.ready()
    worker = launcher.spawn(python(str(SCRIPTS / "waits.py")), stdout=pipe.path)
    child = int(pipe.read_line().split()[1])
    os.kill(zygote, signal.SIGKILL)
    assert launcher.tell(op="wait", pid=worker.pid)["returncode"] == -signal.SIGKILL
    os.kill(child, signal.SIGKILL)  # a kill of the zygote alone does not reach what a worker has started
    assert launcher.tell(op="respawn")["zygote"] != zygote
    again = launcher.spawn(python(str(SCRIPTS / "endings.py"), "exit_3"))
    assert again.fresh_because is None
    assert again.wait().returncode == 3


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR2, marks=pytest.mark.long),
    ],
)
def test_signals_to_every_process_of_a_job_are_the_agents(
    launcher: Launcher, pipe: Pipe, number: signal.Signals
) -> None:
    """The zygote, and with it the workers, survives them; a worker does what a fresh interpreter would."""
    zygote = launcher.ready()
    os.kill(zygote, number)
    assert launcher.run(python(str(SCRIPTS / "endings.py"), "exit_3")).returncode == 3
    worker = launcher.spawn(python(str(SCRIPTS / "waits.py")), stdout=pipe.path)
    child = int(pipe.read_line().split()[1])
    os.kill(worker.pid, number)
    assert launcher.tell(op="wait", pid=worker.pid)["returncode"] == -number
    os.kill(child, signal.SIGKILL)
    assert launcher.ready() == zygote


def test_what_the_zygote_is(launcher: Launcher, pipe: Pipe) -> None:
    """One thread, nothing of the agent's but stdout and stderr, and most of its memory shared with its workers."""
    process = psutil.Process(launcher.ready())
    worker = launcher.spawn(python(str(SCRIPTS / "waits.py")), stdout=pipe.path, env={"OMP_NUM_THREADS": "2"})
    pipe.read_line()
    assert process.num_threads() == 1
    kinds = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
    own = ("socket:", "anon_inode:[pidfd]", "pipe:", "/dev/null", str(launcher.folder))
    assert [kind for kind in kinds if not kind.startswith(own)] == []
    assert os.getsid(process.pid) == process.pid
    memory = psutil.Process(worker.pid).memory_full_info()
    assert memory.uss < memory.rss / 2
    psutil.Process(worker.pid).children()[0].kill()
    psutil.Process(worker.pid).kill()
    assert launcher.tell(op="wait", pid=worker.pid)["returncode"] == -signal.SIGKILL


def test_a_module_that_cannot_be_preloaded_is_named(tmp_path: Path) -> None:
    with Launcher(tmp_path, "nosuchmodule") as launcher, pytest.raises(AssertionError, match="nosuchmodule"):
        launcher.ready()
    assert "--preload nosuchmodule: ModuleNotFoundError" in (tmp_path / "launcher.err").read_text()
