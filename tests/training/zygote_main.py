"""The harness's zygote: a process without threads that has imported torch and forks workers when told to.

Talks SEQPACKET with the test process: a spawn request brings three descriptors (control, board, report);
exits of workers are told as they happen. Ends, with all workers, when the test process does.
"""

import array
import ctypes
import faulthandler
import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import traceback

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def child(request: dict, fds: list[int]) -> int:
    die_with_parent()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(all_threads=True)
    os.environ.update(request["env"])
    for name, fd in zip(request["fd_names"], fds, strict=True):
        os.environ[name] = str(fd)
    import jobs

    try:
        jobs.main(request["job"], request["args"])
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    die_with_parent()
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    import jobs  # noqa: F401

    import autoglm_elastic.training.run  # noqa: F401
    from autoglm_elastic.agent._reverse_dns import forgo_reverse_lookups

    forgo_reverse_lookups()

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    gc.collect()
    gc.freeze()
    channel.send(json.dumps({"ready": os.getpid(), "threads": len(os.listdir("/proc/self/task"))}).encode())
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is channel:
                    data, ancillary, _, _ = channel.recvmsg(65536, socket.CMSG_SPACE(4 * 4))
                    if not data:
                        return
                    numbers = array.array("i")
                    for _, _, payload in ancillary:
                        numbers.frombytes(payload)
                    request = json.loads(data)
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        channel.close()
                        code = 1
                        try:
                            code = child(request, list(numbers))
                        finally:
                            sys.stdout.flush()
                            sys.stderr.flush()
                            os._exit(code)
                    for fd in numbers:
                        os.close(fd)
                    channel.send(json.dumps({"spawned": pid}).encode())
                else:
                    os.read(woken, 4096)
                    reap(channel)


def reap(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.send(json.dumps({"exited": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


if __name__ == "__main__":
    main()
