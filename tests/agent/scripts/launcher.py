"""A launcher with a zygote, driven by lines of JSON: the tests' agent, so that it can be killed, too."""

import json
import os
import sys

import torch  # noqa: F401

from autoglm_elastic.agent.process import SpawnRequest
from autoglm_elastic.agent.zygote import Zygote


def main() -> None:
    zygote = Zygote.fork(preload=sys.argv[1:])
    processes = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer = {}
        match order["op"]:
            case "ready":
                zygote.wait_ready()
                answer["zygote"] = zygote.pid
            case "spawn":
                streams = [
                    os.open(order[name], flags)
                    for name, flags in (
                        ("stdin", os.O_RDONLY),
                        ("stdout", os.O_WRONLY),
                        ("stderr", os.O_WRONLY),
                    )
                ]
                request = SpawnRequest(
                    order["command"], order["env"], order["cwd"], *streams, pass_fds=order["pass_fds"]
                )
                process = zygote.spawn(request)
                for fd in streams:
                    os.close(fd)
                processes[process.pid] = process
                answer = {"pid": process.pid, "fresh_because": process.fresh_because}
            case "wait":
                answer["returncode"] = processes.pop(order["pid"]).wait(60)
            case "respawn":
                zygote.respawn()
                answer["zygote"] = zygote.pid
        print(json.dumps(answer), flush=True)
    zygote.close()


if __name__ == "__main__":
    main()
