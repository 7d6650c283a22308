"""One way for a script to end, by name; what it prints and how it ends is compared with Python's own."""

import atexit
import os
import signal
import sys
import threading


class Resource:
    def __del__(self) -> None:
        print("resource freed")


resource = Resource()


def deep(level: int) -> None:
    if level:
        deep(level - 1)
    else:
        raise ValueError("deep inside")


def chained() -> None:
    try:
        deep(2)
    except ValueError as error:
        raise RuntimeError("outer") from error


def at_exit_order() -> None:
    atexit.register(print, "registered first")
    atexit.register(print, "registered second")
    print("leaving")


def at_exit_after_an_error() -> None:
    atexit.register(print, "still called")
    deep(1)


def thread_is_joined() -> None:
    ready = threading.Event()

    def work() -> None:
        ready.wait(10)
        threading.main_thread().join()
        print("thread done after the main thread")

    threading.Thread(target=work).start()
    atexit.register(print, "at exit after the threads")
    ready.set()


def daemon_thread_is_not_joined() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    print("leaving")


def error_in_a_thread() -> None:
    thread = threading.Thread(target=deep, args=(1,), name="worker")
    thread.start()
    thread.join()


def own_excepthook() -> None:
    sys.excepthook = lambda kind, value, _: print("hook:", kind.__name__, value, file=sys.stderr)
    deep(1)


def broken_excepthook() -> None:
    sys.excepthook = lambda *_: deep(0)
    raise KeyError("first")


def exiting_excepthook() -> None:
    sys.excepthook = lambda *_: sys.exit(17)
    raise KeyError("first")


def interrupted_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminated_with_handler() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    os.kill(os.getpid(), signal.SIGTERM)


def unraisable() -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    Broken()


def warns() -> None:
    import warnings

    warnings.warn("look here", stacklevel=1)
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)


def group() -> None:
    raise ExceptionGroup("several", [ValueError(1), TypeError(2)])


ENDINGS = {
    "return": lambda: print("done"),
    "exit_0": lambda: sys.exit(0),
    "exit_3": lambda: sys.exit(3),
    "exit_none": lambda: sys.exit(),
    "exit_negative": lambda: sys.exit(-1),
    "exit_text": lambda: sys.exit("a reason"),
    "exit_tuple": lambda: sys.exit(("a", 1)),
    "exit_big": lambda: sys.exit(1 << 40),
    "exit_bool": lambda: sys.exit(True),
    "os_exit": lambda: os._exit(4),
    "builtin_exit": lambda: exit(5),
    "deep": lambda: deep(3),
    "chained": chained,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "abort": os.abort,
    "keyboard_interrupt": interrupted_by_signal,
    "at_exit_order": at_exit_order,
    "at_exit_after_an_error": at_exit_after_an_error,
    "thread_is_joined": thread_is_joined,
    "daemon_thread_is_not_joined": daemon_thread_is_not_joined,
    "error_in_a_thread": error_in_a_thread,
    "own_excepthook": own_excepthook,
    "broken_excepthook": broken_excepthook,
    "exiting_excepthook": exiting_excepthook,
    "terminated_with_handler": terminated_with_handler,
    "unraisable": unraisable,
    "warns": warns,
    "group": group,
}

if __name__ == "__main__":
    ENDINGS[sys.argv[1]]()
