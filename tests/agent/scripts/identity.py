"""Prints as JSON whatever a script can see of the interpreter it was started in."""

import faulthandler
import gc
import json
import locale
import logging
import multiprocessing.process
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path


def stream(value):
    names = ("name", "mode", "encoding", "errors", "line_buffering", "write_through", "newlines")
    shown = {name: repr(getattr(value, name)) for name in names}
    return shown | {"buffer": type(value.buffer).__name__, "raw": repr(getattr(value.buffer, "mode", None))}


main = sys.modules["__main__"]
seen = {
    "main": {name: repr(value) for name, value in vars(main).items() if name.startswith("__")},
    "main_is_ours": vars(main) is globals(),
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "executable": sys.executable,
    "path": sys.path,
    "flags": list(sys.flags),
    "warnoptions": sys.warnoptions,
    "xoptions": sys._xoptions,
    "streams": {name: stream(getattr(sys, name)) for name in ("stdin", "stdout", "stderr")},
    "same_streams": [
        getattr(sys, name) is getattr(sys, f"__{name}__") for name in ("stdin", "stdout", "stderr")
    ],
    "signals": {str(number): repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "environment": dict(os.environ),
    "environment_order": list(os.environ),
    "cwd": os.getcwd(),
    "descriptors": sorted(
        name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
    ),
    "session_of_its_own": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
    "main_thread": [
        threading.current_thread() is threading.main_thread(),
        threading.main_thread().ident == threading.get_ident(),
        threading.main_thread().native_id == os.getpid(),
        threading.active_count(),
    ],
    "threads": len(os.listdir("/proc/self/task")),
    "umask": os.umask(0o22),
    "hooks": [
        sys.excepthook is sys.__excepthook__,
        sys.displayhook is sys.__displayhook__,
        threading.excepthook is threading.__excepthook__,
        sys.gettrace() is None,
    ],
    "faulthandler": faulthandler.is_enabled(),
    "logging": [repr(logging.root.handlers), logging.root.level],
    "gc": [gc.isenabled(), gc.get_threshold()],
    "recursion_limit": sys.getrecursionlimit(),
    "temporary": tempfile.gettempdir(),
    "locale": locale.setlocale(locale.LC_ALL),
    "multiprocessing": [multiprocessing.process.ORIGINAL_DIR, multiprocessing.process.current_process().name],
    "name": Path("/proc/self/comm").read_text(),
    "command_line": Path("/proc/self/cmdline").read_text().rstrip("\0"),
    "exception": repr(sys.exc_info()),
    "last": hasattr(sys, "last_type"),
    "stdin_says": sys.stdin.read(),
}
json.dump(seen, sys.stdout, indent=1)
