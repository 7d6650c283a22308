"""Real etcd members on loopback, or on hosts of a test's own: started, killed, stopped, and started again on the same
data."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 30.0
QUICK = ("--heartbeat-interval=50", "--election-timeout=500")
"""Half of etcd's own times: leases of a second are possible, elections take a second at most."""

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd on PATH")


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """`options`: more arguments for every member. `scheme`: of the client's side; "https" needs certificates in
    `options`. `places`: (address, command that becomes the one after it there) of each member; `ask`
    must be able to reach them."""

    def __init__(
        self,
        folder: Path,
        members: int = 1,
        *,
        options: Sequence[str] = (),
        scheme: str = "http",
        timing: Sequence[str] = QUICK,
        places: Sequence[tuple[str, Sequence[str]]] = (),
    ) -> None:
        self._places = places or [("127.0.0.1", ())] * members
        self._folder = folder
        self._options = (*timing, *options)
        self._scheme = scheme
        self.token = ""
        ports = _free_ports(2 * members)
        self.clients, self._peers = ports[:members], ports[members:]
        self.processes: list[subprocess.Popen[str] | None] = [None] * members
        self._ready = [threading.Event() for _ in range(members)]
        self._drains: list[threading.Thread] = []
        self.logs: list[list[str]] = [[] for _ in range(members)]
        self.start(*range(members))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill(*range(len(self.processes)))
        for drain in self._drains:
            drain.join(WAIT_S)

    @property
    def address(self) -> str:
        pairs = zip(self._places, self.clients, strict=True)
        return "etcd://" + ",".join(f"{address}:{port}" for (address, _), port in pairs)

    def start(self, *members: int) -> None:
        for member in members:
            self._ready[member].clear()
            self._launch(member)
        for member in members:
            assert self._ready[member].wait(WAIT_S), "\n".join(self.logs[member][-20:])

    def begin(self, *members: int) -> None:
        """As `start`, without waiting until they serve."""
        for member in members:
            self._launch(member)

    def kill(self, *members: int) -> None:
        for member in members:
            process = self.processes[member]
            if process is not None:
                process.kill()
                process.wait()
                self.processes[member] = None

    def stop(self, member: int) -> None:
        self._signal(member, signal.SIGSTOP)

    def cont(self, member: int) -> None:
        self._signal(member, signal.SIGCONT)

    def leader(self) -> int:
        for member, process in enumerate(self.processes):
            if process is not None:
                status = self.ask(member, "maintenance/status", {})
                if status.get("leader") == status["header"]["member_id"]:
                    return member
        raise AssertionError("no leader")

    def ask(self, member: int, path: str, body: dict[str, Any]) -> Any:
        """Over etcd's JSON gateway: what is asked does not go through the code under test."""
        request = urllib.request.Request(
            f"http://{self._places[member][0]}:{self.clients[member]}/v3/{path}", json.dumps(body).encode()
        )
        if self.token:
            request.add_header("Authorization", self.token)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            refusal.close()
            raise

    def _signal(self, member: int, number: signal.Signals) -> None:
        process = self.processes[member]
        assert process is not None
        process.send_signal(number)

    def _launch(self, member: int) -> None:
        addresses = [address for address, _ in self._places]
        peers = [f"http://{address}:{port}" for address, port in zip(addresses, self._peers, strict=True)]
        client = f"{self._scheme}://{addresses[member]}:{self.clients[member]}"
        process = subprocess.Popen(
            [
                *self._places[member][1], "etcd", f"--name=m{member}", f"--data-dir={self._folder / f'm{member}'}",
                f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peers[member]}", f"--initial-advertise-peer-urls={peers[member]}",
                "--initial-cluster=" + ",".join(f"m{index}={url}" for index, url in enumerate(peers)),
                "--logger=zap", "--log-outputs=stderr", *self._options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.processes[member] = process
        drain = threading.Thread(target=self._drain, args=(member, process), daemon=True)
        drain.start()
        self._drains.append(drain)

    def _drain(self, member: int, process: subprocess.Popen[str]) -> None:
        """Reads the log: it says when the member serves."""
        assert process.stderr is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        with process.stderr as log, (self._folder / f"m{member}.log").open("a", buffering=1) as kept:
            for line in log:
                self.logs[member].append(line)
                kept.write(line)
                if "ready to serve client requests" in line or "serving client traffic" in line:
                    self._ready[member].set()
