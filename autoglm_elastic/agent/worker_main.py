"""What runs in a process just forked from the zygote: it becomes `python -u script.py`, and ends as that would.

`become` gives the process the state of an interpreter that has just started; `run` hands it to the script,
through the same functions of CPython that its own `main` uses, and never returns. Here it matters that a
script cannot tell the difference; where it could (frames of ours below its own, modules imported already)
docs/zygote.md says so. Nothing of the agent's is touched: the process is a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import linecache
import os
import runpy
import signal
import stat
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.machinery import BuiltinImporter
from pkgutil import get_importer
from typing import Any, Final, NoReturn, TextIO, cast

from autoglm_elastic.agent import _linux
from autoglm_elastic.agent.process import PythonScript

_EXIT_NOT_RUN: Final = 2
_EXIT_UNCAUGHT: Final = 1


@dataclass(frozen=True, slots=True)
class FreshState:
    """What a process that the agent executed would have got.

    Args:
        path: `sys.path` without its first entry, which belongs to the script.
        mask: blocked signals.
        handlers: of the signals that the zygote leaves to the agent, by number.
    """

    path: tuple[str, ...]
    mask: frozenset[int]
    handlers: Mapping[int, Callable[[int, types.FrameType | None], Any] | int | None]


def become(script: PythonScript, env: Mapping[str, str], cwd: str | None, state: FreshState) -> None:
    """The interpreter's state as after its start, before the first line of `script`. Descriptors 0, 1, 2 are
    set.

    Raises OSError when `cwd` cannot be entered.
    """
    if cwd is not None:
        os.chdir(cwd)
    for number, handler in state.handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, state.mask)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    _linux.unbuffer_c_stdio()
    _open_standard_streams()
    command = [*(["-m"] if script.module else []), script.path, *script.args]
    _linux.show_as([sys.executable, "-u", *command])
    sys.orig_argv[:] = [sys.executable, "-u", *command]
    sys.argv = ["-m" if script.module else script.path, *script.args]
    sys.path[:] = state.path
    sys.modules["__main__"] = _fresh_main()
    _renew_identity()
    importlib.invalidate_caches()
    linecache.clearcache()


def run(script: PythonScript) -> NoReturn:
    """Run the script and end the process with its exit status, the interpreter finalized, as CPython does."""
    if script.module:
        _prepend(script_folder(script))
        _leave(_run_module(script.path, alter_argv=True))
    absolute = os.path.join(os.getcwd(), script.path) if script.path else os.getcwd()
    if get_importer(absolute) is not None:
        sys.path.insert(0, absolute)
        _leave(_run_module("__main__", alter_argv=False))
    _prepend(script_folder(script))
    _leave(_run_file(script.path, absolute))


def script_folder(script: PythonScript) -> str | None:
    """`sys.path[0]` as CPython computes it; None when it adds nothing."""
    if sys.flags.safe_path:
        return None
    if not script.module:
        return os.path.dirname(os.path.realpath(script.path))
    try:
        return os.getcwd()
    except OSError:
        return None


def _open_standard_streams() -> None:
    """As `create_stdio` in CPython's pylifecycle.c with `-u`: raw, write-through, descriptors not owned."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = _open_stream(fd, name, mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _open_stream(fd: int, name: str, mode: str) -> TextIO | None:
    previous = cast(TextIO | None, getattr(sys, f"__{name}__"))
    encoding = previous.encoding if previous is not None else "utf-8"
    errors = "strict" if previous is None else previous.errors
    if name == "stderr":
        errors = "backslashreplace"
    try:
        raw = io.FileIO(fd, mode, closefd=False)
    except OSError:
        return None
    raw.name = f"<{name}>"
    buffer = io.BufferedReader(raw) if mode == "r" else raw
    stream = io.TextIOWrapper(
        cast(io.BufferedReader, buffer), encoding, errors, newline="\n", write_through=True
    )
    stream.mode = mode  # type: ignore[misc]
    return stream


def _fresh_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__loader__ = BuiltinImporter
    main.__dict__.update(__annotations__={}, __builtins__=sys.modules["builtins"])
    return main


def _renew_identity() -> None:
    """What must differ from one process to the next: random streams, keys, cached ids and paths.

    `random`, `threading` and `logging` see to themselves when Python forks.
    """
    main_thread = threading.main_thread()
    if hasattr(main_thread, "_set_native_id"):
        main_thread._set_native_id()
    tempfile.tempdir = None
    modules = sys.modules
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    if "torch" in modules:
        modules["torch"].default_generator.seed()
    if "multiprocessing.process" in modules:
        process = modules["multiprocessing.process"]
        process.current_process().authkey = os.urandom(32)
        with contextlib.suppress(OSError):
            process.__dict__["ORIGINAL_DIR"] = os.getcwd()


def _prepend(folder: str | None) -> None:
    if folder is not None:
        sys.path.insert(0, folder)


def _run_file(path: str, absolute: str) -> int:
    """As `pymain_run_file_obj` in CPython's main.c."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        _say(f"{sys.executable}: can't open file {absolute!r}: [Errno {error.errno}] {error.strerror}")
        return _EXIT_NOT_RUN
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        _say(f"{sys.executable}: {absolute!r} is a directory, cannot continue")
        return _EXIT_UNCAUGHT
    fdopen = _linux.libc.fdopen
    fdopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(fdopen(fd, b"rb"))
    # Prints an uncaught exception, without our frames, and ends the process itself on SystemExit.
    failed = ctypes.pythonapi.PyRun_AnyFileExFlags(file, os.fsencode(absolute), 1, None)
    return _EXIT_UNCAUGHT if failed else 0


def _run_module(name: str, *, alter_argv: bool) -> int:
    """As `pymain_run_module` in CPython's main.c."""
    error = _caught(partial(runpy._run_module_as_main, name, alter_argv))  # type: ignore[attr-defined]
    if error is None:
        return 0
    return _exit_code(error) if isinstance(error, SystemExit) else _report_uncaught(error)


def _report_uncaught(error: BaseException) -> int:
    """As `PyErr_Print`: the user's `sys.excepthook`, its own failure included."""
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    second = _caught(partial(sys.excepthook, type(error), error, error.__traceback__))
    if isinstance(second, SystemExit):
        return _exit_code(second)
    if second is not None:
        _say("Error in sys.excepthook:")
        sys.__excepthook__(type(second), second, second.__traceback__)
        _say("\nOriginal exception was:")
        sys.__excepthook__(type(error), error, error.__traceback__)
    return _EXIT_UNCAUGHT


def _caught(function: Callable[[], object]) -> BaseException | None:
    """What `function` raised, without our frame in its traceback, and no longer being handled."""
    try:
        function()
    except BaseException as error:  # noqa: BLE001 - whatever a script raises ends here, as in the interpreter
        traceback = error.__traceback__
        return error.with_traceback(traceback.tb_next if traceback is not None else None)
    return None


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    _say(stop.code)
    return 1


def _say(what: object) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{what}\n")


def _leave(code: int) -> NoReturn:
    """Finalize the interpreter (threads, atexit, buffers, modules) and `exit`, from here: no frame of the
    launcher's, which this process is a copy of, is unwound."""
    if code and getattr(sys, "last_type", None) is KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _linux.die_at_exit(signal.SIGINT)
    ctypes.pythonapi.Py_Exit(ctypes.c_int(code & 0xFFFFFFFF))
    raise RuntimeError("Py_Exit does not return")
