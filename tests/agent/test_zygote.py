"""A worker forked from the zygote beside the same command executed by Python: a script sees no difference."""

from __future__ import annotations

import json
import py_compile
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from zygote_harness import SCRIPTS, Ended, Launcher, python, run_fresh

ENDINGS = re.findall(r'^    "(\w+)": ', (SCRIPTS / "endings.py").read_text(), flags=re.MULTILINE)

WORKER_ENV = {"TORCHELASTIC_RUN_ID": "a run", "RANK": "3"}
"""Workers get variables that the zygote has not."""


def as_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("launcher"), before_exec=as_under_nohup) as started:
        started.ready()
        yield started


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def comparable(ended: Ended) -> tuple[int, str, str]:
    return ended.returncode, without_addresses(ended.out), without_addresses(ended.err)


def both(launcher: Launcher, command: list[str], **rest: Any) -> tuple[Ended, Ended]:
    """(forked, executed); fails when the first was not a fork."""
    worker = launcher.spawn(command, **rest)
    assert worker.fresh_because is None
    return worker.wait(), run_fresh(launcher, command, **rest)


@pytest.mark.parametrize(
    ("arguments", "cwd"),
    [
        ((str(SCRIPTS / "identity.py"), "--flag", "two words", "é"), None),
        (("./identity.py",), str(SCRIPTS)),
        (("-m", "identity", "-x"), str(SCRIPTS)),
    ],
    ids=["script", "relative", "module"],
)
def test_interpreter_state(launcher: Launcher, arguments: tuple[str, ...], cwd: str | None) -> None:
    """`__main__`, argv, path, streams, signals, environment, descriptors, session, threads, hooks, ..."""
    forked, executed = both(launcher, python(*arguments), cwd=cwd, env=WORKER_ENV, stdin="some\ninput\n")
    assert (forked.returncode, forked.err) == (0, "")
    ours = json.loads(without_addresses(forked.out))
    theirs = json.loads(without_addresses(executed.out))
    assert theirs.pop("command_line").startswith(
        ours.pop("command_line")
    )  # as far as the launcher's was long
    assert ours == theirs


@pytest.mark.parametrize("ending", ENDINGS)
def test_ending(launcher: Launcher, ending: str) -> None:
    """Exit status, traceback, output of atexit handlers, threads and finalizers."""
    forked, executed = both(launcher, python(str(SCRIPTS / "endings.py"), ending))
    assert comparable(forked) == comparable(executed)


@pytest.mark.parametrize(
    "ending", ["deep", "exit_text", "keyboard_interrupt", "broken_excepthook", "exiting_excepthook"]
)
def test_ending_of_a_module(launcher: Launcher, ending: str) -> None:
    forked, executed = both(launcher, python("-m", "endings", ending), cwd=str(SCRIPTS))
    assert comparable(forked) == comparable(executed)


SHOWS_ITSELF = """
import sys
print(__name__, __file__, __package__, __spec__, __cached__, sys.argv, sys.path[0])
number: int = 1
print(__annotations__, __builtins__ is sys.modules["builtins"])
"""

FILES = {
    "mod.py": SHOWS_ITSELF.encode(),
    "syntax.py": b"def f(:\n  pass\n",
    "latin.py": b'print("\xe9")\n',
    "cookie.py": b'# -*- coding: latin-1 -*-\nprint("\xe9")\n',
    "null.py": b"print(1)\0\n",
    "empty.py": b"",
    "importer.py": b"import mod, nosuchmodule\n",
    "folder/__main__.py": b"import helper\n" + SHOWS_ITSELF.encode(),
    "folder/helper.py": b"print(__name__)\n",
    "plain/data.txt": b"",
    "package/__init__.py": b"import sys\nprint(sys.argv)\n",
    "package/__main__.py": b"from . import part\n",
    "package/part.py": SHOWS_ITSELF.encode() + b"raise ValueError(1)\n",
    "nomain/__init__.py": b"",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with zipfile.ZipFile(folder / "app.zip", "w") as archive:
        archive.writestr("__main__.py", SHOWS_ITSELF.replace("__cached__", "0"))
    py_compile.compile(str(folder / "mod.py"), cfile=str(folder / "compiled.pyc"))
    (folder / "link").symlink_to(folder / "folder" / "__main__.py")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["mod.py"],
            ["./mod.py"],
            ["folder/../mod.py"],
            ["compiled.pyc"],
            ["link"],
            ["folder"],
            ["app.zip"],
        ),
        *(["syntax.py"], ["latin.py"], ["cookie.py"], ["null.py"], ["empty.py"], ["importer.py"]),
        *(["nosuch.py"], ["nosuch/x.py"], ["plain"], [""]),
        *(
            ["-m", "package"],
            ["-m", "package.part"],
            ["-m", "nomain"],
            ["-m", "nosuch"],
            ["-m", "package.no"],
        ),
    ],
    ids=" ".join,
)
def test_finding_the_script(launcher: Launcher, project: Path, arguments: list[str]) -> None:
    """Files, folders, archives, modules; what cannot be read or parsed gives Python's own message and status."""
    forked, executed = both(launcher, python(*arguments, "argument"), cwd=str(project))
    assert comparable(forked) == comparable(executed)


@pytest.mark.parametrize(
    "arguments", [[str(SCRIPTS / "processes.py")], ["-m", "processes"]], ids=["script", "module"]
)
def test_processes_of_its_own(launcher: Launcher, arguments: list[str]) -> None:
    """multiprocessing with fork, spawn and forkserver, pools, locks, executors, subprocess, os.fork."""
    forked, executed = both(launcher, python(*arguments, "x"), cwd=str(SCRIPTS))
    assert comparable(forked) == comparable(executed)
    assert forked.returncode == 0


def test_torch(launcher: Launcher) -> None:
    """DataLoader workers, torch.multiprocessing, threads as OMP_NUM_THREADS says, fresh random streams."""
    command = python(str(SCRIPTS / "loaders.py"))
    one = launcher.run([*command, "fork"], env={"OMP_NUM_THREADS": "1"})
    assert one.returncode == 0, one.err
    assert "fork 28\n[1.0, 2.0]\n" in one.out
    assert "threads 1 1" in one.out
    cores = len(psutil.Process().cpu_affinity() or ())
    grown = launcher.spawn(command, env={"OMP_NUM_THREADS": "2"})
    assert grown.fresh_because is None
    two = grown.wait()
    assert f"threads {min(2, cores)} 2" in two.out
    assert len({*one.err.split()[1:], *two.err.split()[1:]}) == 8  # no seed, no number occurs twice


def test_a_lost_packet_of_the_dns_delays_no_store(launcher: Launcher) -> None:
    """torch asks for the name of whom it connects to, only to log it; a worker of the zygote does not."""
    forked, executed = both(launcher, python(str(SCRIPTS / "asks.py")))
    assert "in-addr" in executed.err
    assert forked.err.splitlines()[-1] == "asked nobody"
    assert "hostname" not in forked.err


def test_output_arrives_unbuffered(launcher: Launcher, project: Path) -> None:
    """What was printed before a SIGKILL is there, from Python and from C."""
    script = project / "prints.py"
    script.write_text(
        "import ctypes, os, sys\n"
        "print('from python', end='')\n"
        "print('to stderr', end='', file=sys.stderr)\n"
        "ctypes.CDLL(None).printf(b' from C')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    forked, executed = both(launcher, python(str(script)))
    assert forked == executed == Ended(-9, "from python from C", "to stderr")


def test_a_change_of_the_script_is_seen(launcher: Launcher, project: Path) -> None:
    """Nothing of a worker stays in the zygote, so a restarted worker runs the newest source."""
    script, module = project / "changing.py", project / "changing_module.py"
    script.write_text("import changing_module\nprint(changing_module.VALUE)\n")
    for value in ("first", "second one"):
        module.write_text(f"VALUE = {value!r}\n")
        assert launcher.run(python(str(script))).out == f"{value}\n"


def test_dead_workers_are_reaped(launcher: Launcher) -> None:
    first = launcher.spawn(python(str(SCRIPTS / "endings.py"), "kill"))
    assert first.wait().returncode == -signal.SIGKILL
    launcher.run(python(str(SCRIPTS / "endings.py"), "os_exit"))
    assert not psutil.pid_exists(first.pid)


def test_what_cannot_be_forked_is_executed(launcher: Launcher, project: Path) -> None:
    """And says why; the result is the same."""
    (project / "shadowing").mkdir()
    (project / "shadowing" / "random.py").write_text("VALUE = 'own'\n")
    (project / "shadowing" / "main.py").write_text("import random\nprint(random.VALUE)\n")
    shadowed = launcher.spawn(python("main.py"), cwd=str(project / "shadowing"))
    assert shadowed.fresh_because is not None
    assert "random" in shadowed.fresh_because
    assert shadowed.wait() == Ended(0, "own\n", "")

    hashed = launcher.spawn(python("-m", "identity"), cwd=str(SCRIPTS), env={"PYTHONHASHSEED": "1"})
    assert hashed.fresh_because is not None
    assert "PYTHONHASHSEED" in hashed.fresh_because
    seen = json.loads(hashed.wait().out)
    assert seen["environment"]["PYTHONHASHSEED"] == "1"
    assert seen["session_of_its_own"] == [True, True]

    binary = launcher.spawn(["/bin/sh", "-c", "echo $0; exit 3", "argument"])
    assert binary.fresh_because is not None
    assert binary.wait() == Ended(3, "argument\n", "")


def test_without_a_locale_workers_are_forked_too(tmp_path: Path) -> None:
    """As in a container, or under cron."""
    script = tmp_path / "encodings.py"
    script.write_text(
        "import sys\n"
        "with open(__file__) as text:\n"
        "    print(sys.getfilesystemencoding(), sys.stdout.encoding, sys.stdout.errors, text.encoding.lower())\n"
    )
    with Launcher(tmp_path, env={"LANG": "", "LC_ALL": "", "LC_CTYPE": ""}) as bare:
        bare.ready()
        handed_on = {"LC_CTYPE": "C.UTF-8"}  # by Python, in the agent's environment
        forked, executed = both(bare, python(str(script)), env=handed_on)
    assert forked == executed == Ended(0, "utf-8 utf-8 surrogateescape utf-8\n", "")


@pytest.mark.gpu
def test_cuda(launcher: Launcher, project: Path) -> None:
    """The zygote has no CUDA context, so its forks can make one."""
    script = project / "cuda.py"
    script.write_text("import torch\nprint(torch.ones(2, device='cuda').sum().item())\n")
    assert launcher.run(python(str(script))) == Ended(0, "2.0\n", "")
