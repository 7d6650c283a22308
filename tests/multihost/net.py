"""Hosts of a test's own: network namespaces with an address, a hostname and a link to one switch.

The switch is a bridge in a namespace of its own, so nothing of the machine's network is touched. A host has its own
identity of a machine, too (boot id), so that nobody reads a neighbour's memory as if both were one host; the file
system is shared, as a cluster's is. Names begin with `PREFIX` and the pid of the test's process: what a killed process
left behind is cleared away by the next one.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import psutil
import pytest
from wire import Wire, tap

PREFIX: Final = "agmh"
NETNS: Final = Path("/run/netns")
ETC: Final = Path("/etc/netns")
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_IP, _NFT = shutil.which("ip", path=_PATH), shutil.which("nft", path=_PATH)
_TC: Final = shutil.which("tc", path=_PATH)
_COMMAND_S_MAX: Final = 20.0
_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")

BECOME: Final = 'hostname "$1"; mount --bind "$2" /proc/sys/kernel/random/boot_id; shift 2; exec "$@"'


def why_not() -> str:
    """Why there can be no hosts here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if _IP is None or _NFT is None:
        return "no ip and nft on this machine (Debian: iproute2, nftables)"
    name = f"{PREFIX}-{os.getpid()}-try"
    tried = subprocess.run(
        [_IP, "netns", "add", name], capture_output=True, text=True, timeout=_COMMAND_S_MAX
    )
    if tried.returncode:
        return f"no network namespaces: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Host:
    """`address`: on the switch. `prefix`: a command that becomes the one after it, on this host."""

    def __init__(self, network: str, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.address = f"10.231.0.{number}"
        self.namespace = f"{network}-{name}"
        self.port = f"port{number}"
        self._boot = folder / f"boot-{name}"
        self._boot.write_text(f"{uuid.uuid4()}\n")
        self.prefix: tuple[str, ...] = (
            str(_IP), "netns", "exec", self.namespace,
            "unshare", "-u", "sh", "-c", BECOME, "host", name, str(self._boot),
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        found = subprocess.run(
            [str(_IP), "netns", "pids", self.namespace],
            capture_output=True,
            text=True,
            timeout=_COMMAND_S_MAX,
        )
        processes = []
        for pid in found.stdout.split():
            try:
                process = psutil.Process(int(pid))
                if process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
            except psutil.NoSuchProcess:
                continue
        return processes

    def kill(self) -> None:
        """SIGKILL everything here, also what is being forked meanwhile."""
        self._all(signal.SIGKILL, lambda process: True)

    def stop(self) -> None:
        """SIGSTOP everything here."""
        self._all(signal.SIGSTOP, lambda process: process.status() != psutil.STATUS_STOPPED)

    def cont(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGCONT)

    def ask(self, question: Callable[[], _T]) -> _T:
        """Run `question` in a thread that uses this host's network."""
        return _ask(self.namespace, question)

    def _all(self, number: signal.Signals, due: Callable[[psutil.Process], bool]) -> None:
        deadline = time.monotonic() + _COMMAND_S_MAX
        while left := [process for process in self.processes() if _is(process, due)]:
            assert time.monotonic() < deadline, f"{self.name}: {left} after {number.name}"
            for process in left:
                _signal_and_watch(process.pid, number)


def _ask(namespace: str, question: Callable[[], _T]) -> _T:
    answer: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with open(NETNS / namespace) as place:
                if _libc.setns(place.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            answer.append(question())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_COMMAND_S_MAX + 20.0)
    if failure:
        raise failure[0]
    assert answer, f"no answer from the network of {namespace}"
    return answer[0]


def _signal_and_watch(pid: int, number: signal.Signals) -> None:
    """The exit code is left to whoever started it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
        if number == signal.SIGKILL:
            select.select([pidfd], [], [], _COMMAND_S_MAX)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _is(process: psutil.Process, due: Callable[[psutil.Process], bool]) -> bool:
    try:
        return due(process)
    except psutil.NoSuchProcess:
        return False


class Network:
    """A context: makes the hosts, and ends and removes them whatever happened. `wired`: hosts whose link to the switch
    is a wire of `wires`, whose quality can be chosen."""

    def __init__(self, folder: Path, *names: str, wired: Sequence[str] = ()) -> None:
        self.wires: dict[str, Wire] = {}
        self._wired = wired
        self._name = f"{PREFIX}-{os.getpid()}"
        self._switch = f"{self._name}-switch"
        self.hosts = {name: Host(self._name, name, number, folder) for number, name in enumerate(names, 1)}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Network:
        sweep()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove()

    # What can happen to the links

    def cut(self, ones: Sequence[str], others: Sequence[str]) -> None:
        """Nothing goes between `ones` and `others`, in either direction; nobody is told."""
        self._drop([*self._pairs(ones, others), *self._pairs(others, ones)])

    def cut_one_way(self, senders: Sequence[str], receivers: Sequence[str]) -> None:
        """Nothing goes from `senders` to `receivers`; the other way stays open."""
        self._drop(list(self._pairs(senders, receivers)))

    def isolate(self, name: str) -> None:
        """Cut from everybody else."""
        self.cut([name], [other for other in self.hosts if other != name])

    def unplug(self, name: str) -> None:
        """The switch's port goes down."""
        _ip("-n", self._switch, "link", "set", self[name].port, "down")

    def plug(self, name: str) -> None:
        _ip("-n", self._switch, "link", "set", self[name].port, "up")

    def lose(self, name: str) -> None:
        """The host is gone at once: no packet of its death gets out."""
        self.unplug(name)
        self[name].kill()

    def narrow(self, name: str, mbit_s: int) -> None:
        """No more than that goes through the link of a host, in either direction; skips where the kernel has no tbf."""
        for namespace, device in ((self[name].namespace, "eth0"), (self._switch, self[name].port)):
            queue = ("root", "tbf", "rate", f"{mbit_s}mbit", "burst", "16kb", "latency", "100ms")
            done = subprocess.run(
                [str(_IP), "netns", "exec", namespace, str(_TC), "qdisc", "replace", "dev", device, *queue],
                capture_output=True, text=True, timeout=_COMMAND_S_MAX,
            )  # fmt: skip
            if done.returncode:
                pytest.skip(f"tc has no tbf here: {done.stderr.strip()}")

    def heal(self) -> None:
        """All cuts are mended. What was unplugged stays so."""
        self._nft("flush chain bridge cuts forward")

    def _pairs(self, senders: Sequence[str], receivers: Sequence[str]) -> Iterator[tuple[str, str]]:
        for sender in senders:
            for receiver in receivers:
                yield self[sender].port, self[receiver].port

    def _drop(self, pairs: list[tuple[str, str]]) -> None:
        """All at once: one transaction of the kernel's."""
        self._nft(
            "\n".join(
                f"add rule bridge cuts forward iifname {one} oifname {other} drop" for one, other in pairs
            )
        )

    def _nft(self, rules: str) -> None:
        subprocess.run(
            [str(_IP), "netns", "exec", self._switch, str(_NFT), "-f", "-"],
            input=rules + "\n", text=True, check=True, timeout=_COMMAND_S_MAX,
        )  # fmt: skip

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge0", "up")
        self._nft(
            "add table bridge cuts\nadd chain bridge cuts forward { type filter hook forward priority 0 ; }"
        )
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        for host in self.hosts.values():
            here = host.namespace
            _ip("netns", "add", here)
            self._link(host)
            _ip("-n", self._switch, "link", "set", host.port, "master", "bridge0", "up")
            _ip("-n", here, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", here, "link", "set", "eth0", "up")
            _ip("-n", here, "link", "set", "lo", "up")
            (ETC / here).mkdir(parents=True)
            (ETC / here / "hosts").write_text(f"127.0.0.1 localhost\n{names}")

    def _link(self, host: Host) -> None:
        """`eth0` on the host, its port in the switch, and what is between them."""
        if host.name in self._wired:
            ends = _ask(host.namespace, lambda: tap("eth0")), _ask(self._switch, lambda: tap(host.port))
            self.wires[host.name] = Wire(*ends)
            return
        peer = ("peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", self._switch, "link", "add", host.port, "type", "veth", *peer)

    def _remove(self) -> None:
        for host in self.hosts.values():
            host.kill()
        for wire in self.wires.values():
            wire.__exit__()
        _clear(self._name)


def sweep() -> None:
    """Clear away what test processes that are dead have left behind; nothing of anybody else's."""
    for path in NETNS.glob(f"{PREFIX}-*") if NETNS.is_dir() else ():
        pid = path.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _clear(f"{PREFIX}-{pid}")


def _clear(network: str) -> None:
    for path in NETNS.glob(f"{network}-*"):
        _ip("netns", "del", path.name)
    for path in ETC.glob(f"{network}-*"):
        shutil.rmtree(path)
    if ETC.is_dir() and not any(ETC.iterdir()):
        ETC.rmdir()


def _ip(*arguments: str) -> None:
    done = subprocess.run([str(_IP), *arguments], capture_output=True, text=True, timeout=_COMMAND_S_MAX)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


needs_hosts = pytest.mark.skipif(bool(_why := why_not()), reason=_why or "hosts can be made")
