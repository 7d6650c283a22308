"""Starts processes of its own in every way that Python offers, and says what came of them."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import threading

VALUE = 20


def double(number: int) -> tuple[int, str, str]:
    return 2 * number + VALUE, __name__, multiprocessing.current_process().name.partition("-")[0]


def put(queue: multiprocessing.Queue) -> None:
    queue.put((os.getppid() == multiprocessing.parent_process().pid, sys.argv[1:], sys.path[0]))


def fails() -> None:
    raise SystemExit(11)


def main() -> None:
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=put, args=(queue,))
        process.start()
        print(method, queue.get(timeout=30))
        process.join(30)
        failing = context.Process(target=fails)
        failing.start()
        failing.join(30)
        print(process.exitcode, failing.exitcode)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(sorted(pool.map(double, range(3))))
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        print(sorted(pool.map(double, range(3))))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        print(list(pool.map(abs, (-1, -2))), threading.active_count() > 1)
    lock = multiprocessing.Lock()
    with lock:
        print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout)
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(multiprocessing.active_children()))


if __name__ == "__main__":
    main()
