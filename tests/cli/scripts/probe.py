"""A worker that notes what it finds itself in, and then behaves as $PROBE says. Needs nothing but Python.

$PROBE_OUT is a folder; each attempt of each rank writes `<restart>-<rank>.json` there.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time

STATUS = ("SigBlk", "SigIgn", "SigCgt", "Threads")
GLIBC_SIGNALS = 0b11 << 31
"""Signals 32 and 33 belong to the C library: caught as soon as a process has had a second thread."""


def note() -> None:
    with open("/proc/self/status") as status:
        process = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
    umask = os.umask(0)
    os.umask(umask)
    seen = {
        "environment": dict(os.environ),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "path": sys.path,
        "name": __name__,
        "file": os.path.abspath(__file__),
        "spec": None if __spec__ is None else __spec__.name,
        "main": sys.modules["__main__"].__file__,
        "executable": sys.executable,
        "faulthandler": faulthandler.is_enabled(),
        "write_through": [sys.stdout.write_through, sys.stderr.write_through],
        "stdin": os.readlink("/proc/self/fd/0"),
        "umask": umask,
        "nice": os.nice(0),
        "threads": threading.active_count(),
        "process": {key: int(process[key], 16) & ~GLIBC_SIGNALS for key in STATUS},
    }
    attempt = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}"
    name = os.path.join(os.environ["PROBE_OUT"], attempt)
    with open(name + ".tmp", "w") as file:
        json.dump(seen, file)
    os.rename(name + ".tmp", name + ".json")


def wait_for_signal() -> None:
    while True:
        signal.pause()


def on_term(number: int, frame: object) -> None:
    with open(os.path.join(os.environ["PROBE_OUT"], f"term-{os.environ['RANK']}"), "w") as file:
        file.write(signal.Signals(number).name)


def wait_for_file(name: str) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists(os.path.join(os.environ["PROBE_OUT"], name)):
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.02)


def fail() -> None:
    raise RuntimeError("the disk is on fire")


def main() -> None:
    behaviour = os.environ.get("PROBE", "")
    rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, on_term)
    note()
    print(f"apple of rank {rank}")
    print(f"pear of rank {rank}", file=sys.stderr)
    print(f"orange of rank {rank}")
    print(f"plum of rank {rank}")
    last = int(os.environ["WORLD_SIZE"]) - 1
    if behaviour in ("", "fails_once") and not (behaviour and restart == 0):
        return
    if behaviour == "stubborn" or rank != last:
        wait_for_signal()
    for other in range(last):
        wait_for_file(f"{restart}-{other}.json")
    if behaviour == "recorded":
        from torch.distributed.elastic.multiprocessing.errors import record

        record(fail)()
    elif behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif behaviour.startswith("exit"):
        sys.exit(int(behaviour.removeprefix("exit")))
    else:
        fail()


if __name__ == "__main__":
    main()
