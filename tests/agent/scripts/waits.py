"""Has a child of its own, says so, and then waits to be killed."""

import multiprocessing
import sys
import threading


def wait() -> None:
    threading.Event().wait()


if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=wait)
    child.start()
    print("waiting", child.pid, *sys.argv[1:])
    wait()
