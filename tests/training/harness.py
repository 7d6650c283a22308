"""A miniature agent for tests of the worker's side: real processes, real control channels, real kills.

It seals generations by hand: `reform` gives the surviving workers, and new ones, their next world. Nothing
    here waits
without a bound, and nothing sleeps: it waits for what workers say.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autoglm_elastic import wire

LIMIT_S = 60.0
START_LIMIT_S = 300.0
"""Of a zygote, which imports torch: on a machine that is busy otherwise, too."""

DUMP_LIMIT_S = 5.0

KEEPER_LINGER_S = 1.0
"""No keeper outlives the tests."""


class Zygote:
    """One per test session."""

    def __init__(self) -> None:
        ours, theirs = wire.control_pair()
        main = Path(__file__).with_name("zygote_main.py")
        root = Path(__file__).parents[2]
        environ = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(main), str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environ
        )
        theirs.close()
        self.channel = ours
        ours.settimeout(START_LIMIT_S)
        ready = json.loads(ours.recv(65536))
        ours.settimeout(LIMIT_S)
        assert ready["threads"] == 1, "the zygote must not have threads"
        self.exits: dict[int, int] = {}

    def spawn(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        socket.send_fds(self.channel, [json.dumps(request).encode()], list(fds))
        while True:
            answer = self.receive()
            if "spawned" in answer:
                return int(answer["spawned"])

    def receive(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.channel.recv(65536))
        if "exited" in answer:
            self.exits[answer["exited"]] = answer["code"]
        return answer

    def close(self) -> None:
        self.channel.close()
        self._process.wait(LIMIT_S)


@dataclass
class Worker:
    pid: int
    control: socket.socket
    board: wire.Board
    report: socket.socket
    log: Path
    rank: int = -1
    said: list[dict[str, Any]] = field(default_factory=list)
    told: list[wire.ToAgent] = field(default_factory=list)


class Cluster:
    """The workers of one job. `alive` is in the order of ranks."""

    def __init__(
        self,
        zygote: Zygote,
        folder: Path,
        job: str,
        args: dict[str, Any] | None = None,
        *,
        run_dir: Path | None = None,
        settings: dict[str, Any] | None = None,
        first_generation: int = 0,
        launcher: bool = True,
        host: str = "127.0.0.1",
        environ: dict[str, str] | None = None,
    ) -> None:
        self._host = host
        self.zygote = zygote
        self.folder = folder
        self.job, self.args = job, args or {}
        self.generation = first_generation - 1
        self._launcher = launcher
        self.alive: list[Worker] = []
        self.all: list[Worker] = []
        self._stores: dict[int, Any] = {}
        self._env = {wire.ENV_RUN_ID: "test"} | (environ or {})
        limits = {"recovery": {"group_timeout_s": LIMIT_S}, "keeper": {"linger_s": KEEPER_LINGER_S}}
        self._env[wire.ENV_SETTINGS] = json.dumps(limits | (settings or {}))
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._env[wire.ENV_RUN_DIR] = str(run_dir)
        self.store_for(self.generation + 1)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:
            if worker.pid not in self.zygote.exits:
                with contextlib.suppress(ProcessLookupError):  # it has ended, and we have not read of it yet
                    os.kill(worker.pid, signal.SIGKILL)
        self.wait(lambda: all(worker.pid in self.zygote.exits for worker in self.all), "workers to end")
        for worker in self.all:
            worker.control.close()
            worker.report.close()
            worker.board.close()

    # Worlds.

    def start(self, workers: int) -> None:
        """The first generation."""
        self.reform(add=workers, reason="first")

    def start_as_torchrun(self, workers: int) -> None:
        """What stock torchrun gives its workers; with 0 what a bare interpreter has."""
        for rank in range(workers or 1):
            if workers:
                self._env |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(workers),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self.store_for(0).port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                }
            self.alive.append(self._spawn())

    def store_for(self, generation: int) -> Any:
        if generation not in self._stores:
            self._stores[generation] = dist.TCPStore(
                self._host, 0, None, True, timeout=timedelta(seconds=LIMIT_S), wait_for_workers=False
            )
        return self._stores[generation]

    def reform(
        self,
        *,
        add: int = 0,
        remove: Sequence[Worker] = (),
        planned: bool = False,
        reason: str = "test",
        newcomers_first: bool = False,
    ) -> None:
        """The next generation: who is alive keeps the order, newcomers come last, or first."""
        self.generation += 1
        store = self.store_for(self.generation)
        self.alive = [worker for worker in self.alive if worker not in remove]
        newcomers = [self._spawn() for _ in range(add)]
        self.alive = [*newcomers, *self.alive] if newcomers_first else [*self.alive, *newcomers]
        for rank, worker in enumerate(self.alive):
            self._send_world(worker, rank, len(self.alive), store.port, planned, reason)
        self.store_for(self.generation + 1)

    def kill(self, worker: Worker) -> None:
        """SIGKILL, and what an agent does when it sees the death: break the others."""
        os.kill(worker.pid, signal.SIGKILL)
        self.dead(worker)

    def dead(self, worker: Worker) -> None:
        pidfd = os.pidfd_open(worker.pid) if worker.pid not in self.zygote.exits else -1
        if pidfd >= 0:
            with selectors.DefaultSelector() as selector:
                selector.register(pidfd, selectors.EVENT_READ)
                selector.select(LIMIT_S)
            os.close(pidfd)
        self.forget(worker)

    def forget(self, worker: Worker) -> None:
        """It is no longer one of us, dead or not."""
        self.alive.remove(worker)
        for other in self.alive:
            self.send(other, wire.Break(self.generation, f"rank {worker.rank} died"))

    def send(self, worker: Worker, message: wire.ToWorker) -> None:
        with contextlib.suppress(OSError):
            worker.control.send(wire.encode(message))

    # What workers say.

    def wait(self, done: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        """Until `done()`, looking again whenever a worker said something or ended."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.zygote.channel, selectors.EVENT_READ)
            for worker in self.all:
                selector.register(worker.control, selectors.EVENT_READ, worker)
                selector.register(worker.report, selectors.EVENT_READ, worker)
            while not done():
                left = deadline - time.monotonic()
                if left <= 0:
                    self._dump_stacks()
                    raise AssertionError(f"no {what} within {limit_s} s\n{self._words()}\n{self.logs()}")
                for key, _ in selector.select(left):
                    if key.fileobj is self.zygote.channel:
                        self.zygote.receive()
                        continue
                    worker, sock = key.data, key.fileobj
                    try:
                        packet = sock.recv(1 << 20)
                    except OSError:
                        packet = b""
                    if not packet:
                        selector.unregister(sock)
                    else:
                        self._take(worker, sock, packet)

    def _take(self, worker: Worker, sock: socket.socket, packet: bytes) -> None:
        if sock is worker.report:
            worker.said.append(json.loads(packet))
        else:
            worker.told.append(wire.decode_to_agent(packet))

    def wait_said(self, worker: Worker, **expected: Any) -> dict[str, Any]:
        """The first thing a worker says that has these items."""
        found: list[dict[str, Any]] = []

        def matches() -> bool:
            found[:] = [said for said in worker.said if expected.items() <= said.items()]
            return bool(found)

        self.wait(matches, f"{expected} from pid {worker.pid}")
        return found[0]

    def say_go(self) -> None:
        """For a worker that waits for it before it goes on."""
        self.alive[0].report.send(b"go")

    def wait_exits(self, *, code: int | None = 0) -> None:
        """All living workers end, with this exit code."""
        self.wait(lambda: all(worker.pid in self.zygote.exits for worker in self.alive), "end of the workers")
        self.wait_last_words()
        for worker in self.alive:
            got = self.zygote.exits[worker.pid]
            assert code is None or got == code, f"exit code {got} of rank {worker.rank}\n{self.logs()}"

    def wait_last_words(self) -> None:
        """An end may be known before what was said ahead of it, which waits in the sockets then."""
        for worker in self.all:
            for sock in (worker.control, worker.report):
                with contextlib.suppress(OSError):
                    while packet := sock.recv(1 << 20, socket.MSG_DONTWAIT):
                        self._take(worker, sock, packet)

    def results(self) -> list[dict[str, Any]]:
        """What each living worker said last as its result, by rank."""
        return [next(s["result"] for s in reversed(w.said) if "result" in s) for w in self.alive]

    def resumed(self, generation: int) -> list[wire.Resumed]:
        return [
            message
            for worker in self.all
            for message in worker.told
            if isinstance(message, wire.Resumed) and message.generation == generation
        ]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [
            dict(message.fields)
            for worker in self.all
            for message in worker.told
            if isinstance(message, wire.Event) and message.name == name
        ]

    def _words(self) -> str:
        """Who lives in which generation, and what each said last."""
        lines = [f"generation {self.generation}"]
        for worker in self.alive:
            said = f"{worker.said[-2:]} {worker.told[-3:]}"
            lines.append(
                f"rank {worker.rank}, pid {worker.pid}, exit {self.zygote.exits.get(worker.pid)}: {said}"
            )
        return "\n".join(lines)

    def logs(self) -> str:
        return "\n".join(f"--- {w.log.name}\n{w.log.read_text()[-3000:]}" for w in self.all if w.log.exists())

    def _dump_stacks(self) -> None:
        """What everybody who is still there is doing, into their logs: SIGABRT, which their faulthandler writes at."""
        for worker in self.all:
            if worker.pid in self.zygote.exits:
                continue
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(worker.pid)
                with contextlib.closing(os.fdopen(pidfd)):
                    signal.pidfd_send_signal(pidfd, signal.SIGABRT)
                    select.select([pidfd], [], [], DUMP_LIMIT_S)

    def _spawn(self) -> Worker:
        control, control_theirs = wire.control_pair()
        report, report_theirs = wire.control_pair()
        board = wire.Board.create()
        log = self.folder / f"worker{len(self.all)}.log"
        names = (wire.ENV_CONTROL_FD, wire.ENV_BOARD_FD)
        request = {
            "job": self.job,
            "args": self.args,
            "env": self._env,
            "log": str(log),
            "fd_names": [*(names if self._launcher else ("NO_CONTROL", "NO_BOARD")), "TEST_REPORT_FD"],
        }
        pid = self.zygote.spawn(request, [control_theirs.fileno(), board.fd, report_theirs.fileno()])
        control_theirs.close()
        report_theirs.close()
        worker = Worker(pid, control, board, report, log)
        self.all.append(worker)
        return worker

    def _send_world(
        self, worker: Worker, rank: int, size: int, port: int, planned: bool, reason: str
    ) -> None:
        worker.rank = rank
        world = wire.World(
            generation=self.generation,
            parent=self.generation - 1,
            rank=rank,
            world_size=size,
            local_rank=rank,
            local_world_size=size,
            group_rank=0,
            group_world_size=1,
            role_rank=rank,
            role_world_size=size,
            master_addr=self._host,
            master_port=port,
            restart_count=0,
            planned=planned,
            reason=reason,
        )
        self.send(worker, world)
