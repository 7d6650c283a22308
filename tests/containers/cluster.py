"""The services of docker/compose.yaml, and what can be done to them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import Failed, run

NODES = ("n1", "n2", "n3")
MEMBERS = ("e1", "e2", "e3")
PROJECT = "autoglm-test"
UP_S = 240.0
COMMAND_S = 120.0
SILENCE_S = 120.0
"""How long anything here may take on a busy machine."""

Status = dict[str, Any]


class Cluster:
    """`env`: for docker, and what compose.yaml is told, by variable."""

    def __init__(self, file: Path, env: dict[str, str]) -> None:
        self.env = env
        self._compose = ("docker", "compose", "--project-name", PROJECT, "--file", str(file))
        self._watch: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    # What a user does

    def build(self, timeout_s: float) -> None:
        self.compose("build", "--quiet", "e1", "objects", "n1", timeout_s=timeout_s)

    def sizes(self) -> str:
        tag = self.env.get("AUTOGLM_TAG", "latest")
        told = []
        for name in ("autoglm-elastic", "autoglm-etcd", "autoglm-objects"):
            nbytes = int(self.docker("image", "inspect", f"{name}:{tag}", "--format", "{{.Size}}"))
            told.append(f"{name} {nbytes / 1e6:.0f} MB")
        return ", ".join(told)

    def up(self, **env: str) -> None:
        self.env |= env
        self.compose("up", "--detach", "--no-build", "--quiet-pull", timeout_s=UP_S)

    def alone(self, *command: str, **env: str) -> str:
        """The output of a command in a container of its own that is like a node."""
        given = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        return self.compose("run", "--rm", "--no-deps", "-T", *given, "n1", *command, timeout_s=UP_S)

    def compose(self, *command: str, timeout_s: float = COMMAND_S) -> str:
        return run(*self._compose, *command, timeout_s=timeout_s, env=self.env)

    def docker(self, *command: str | os.PathLike[str], timeout_s: float = COMMAND_S) -> str:
        return run("docker", *command, timeout_s=timeout_s, env=self.env)

    # Faults

    def kill(self, service: str) -> None:
        self.docker("kill", self.container(service))

    def start(self, service: str) -> None:
        self.docker("start", self.container(service))

    def disconnect(self, service: str) -> None:
        self.docker("network", "disconnect", f"{PROJECT}_default", self.container(service))

    def connect(self, service: str) -> None:
        """With its name, which Docker takes away with the network."""
        self.docker("network", "connect", "--alias", service, f"{PROJECT}_default", self.container(service))

    def etcd_leader(self) -> str:
        flags = (
            "etcdctl --endpoints=https://127.0.0.1:2379 --cacert=/certificates/ca.pem "
            "--cert=/certificates/$HOSTNAME.pem --key=/certificates/$HOSTNAME-key.pem endpoint status -w json"
        )
        for member in MEMBERS:
            (told,) = json.loads(self.docker("exec", self.container(member), "sh", "-c", flags))
            if told["Status"]["leader"] == told["Status"]["header"]["member_id"]:
                return member
        raise Failed("no member of etcd says that it leads")

    # What can be seen

    def exit_codes(self, *services: str) -> list[int]:
        """Waits until all have ended."""
        names = [self.container(service) for service in services]
        return [int(code) for code in self.docker("wait", *names, timeout_s=SILENCE_S).split()]

    def take(self, service: str, path: str, folder: Path) -> None:
        """A copy of a folder of a service's volume, made or not running."""
        self.docker("cp", f"{self.container(service)}:{path}", folder)

    def until(self, what: str, holds: Callable[[Status], bool]) -> Status:
        """Waits for news of an `autoglm status --watch` in a container of its own; the first that is wanted."""
        deadline = time.monotonic() + SILENCE_S
        last: Status = {}
        while (left := deadline - time.monotonic()) > 0:
            for last in self._news(left):
                if holds(last):
                    return last
        raise Failed(f"not within {SILENCE_S:.0f} s: {what}; last seen {_gist(last)}\n{self.logs()}")

    def logs(self) -> str:
        return self.compose("logs", "--tail=25", *NODES, "observer", "bucket", "certificates")

    def close(self) -> None:
        if self._watch is not None:
            self._watch.kill()
            self._watch.wait(COMMAND_S)
            assert self._watch.stdout is not None
            self._watch.stdout.close()
            self._watch = None

    def remove(self) -> None:
        """Containers, networks, volumes and images."""
        self.close()
        self.compose("down", "--volumes", "--remove-orphans", "--timeout=5", "--rmi=all")
        made = [self.env[name] for name in ("BASE_IMAGE", "ETCD_IMAGE") if name in self.env]
        if made:
            self.docker("image", "rm", *made)

    def container(self, service: str) -> str:
        return f"{PROJECT}-{service}-1"

    def _news(self, timeout_s: float) -> list[Status]:
        """What was told since. Before there is a job, the watch ends at once and is begun again."""
        if self._watch is None:
            address = (
                "etcd://e1:2379,e2:2379,e3:2379?ca=/certificates/ca.pem"
                "&cert=/certificates/node.pem&key=/certificates/node-key.pem"
            )
            self._watch = subprocess.Popen(
                [
                    *(*self._compose, "run", "--rm", "--no-deps", "-T", "observer"),
                    *("autoglm", "status", address, "--rdzv-id=gpt", "--watch", "--json"),
                ],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._buffer = b""
        assert self._watch.stdout is not None
        if not select.select([self._watch.stdout], [], [], timeout_s)[0]:
            return []
        data = os.read(self._watch.stdout.fileno(), 1 << 16)
        if not data:
            self.close()
            return []
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines if line.startswith(b"{")]


def _gist(told: Status) -> Status:
    return {name: told.get(name) for name in ("state", "step", "generation", "world_size")}
