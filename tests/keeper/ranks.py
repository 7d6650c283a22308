"""A rank as a process of its own, told what to do line by line; killed at the test's will."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.keeper import Keeper, Segment
from autoglm_elastic.settings import Keeper as KeeperSettings
from tests.keeper.state import Share

ANSWER_S = 60.0


class Rank:
    """The test's end."""

    def __init__(self, run_dir: Path, node: str, rank: int, world_size: int, linger_s: float) -> None:
        arguments = [str(run_dir), node, str(rank), str(world_size), str(linger_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.keeper.ranks", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.keeper_pid = int(self._answer())

    def ask(self, *words: Any) -> str:
        """One command, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_S)
        assert ready, "the rank does not answer"
        line = self.process.stdout.readline()
        assert line, "the rank has ended"
        return str(json.loads(line))

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait(ANSWER_S)


def say(word: Any) -> None:
    print(json.dumps(str(word)), flush=True)


def fork_a_reader() -> int:
    """A child as a DataLoader's worker is: forked, not executed; lives until it is killed."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.pause()
    os._exit(0)


def main(url: str, node: str, rank: str, world_size: str, linger_s: str) -> None:
    """Commands: stage STEP · write STEP · wait STEP · decide STEP VERDICT · child 0 · bye."""
    keeper = Keeper.ensure(
        url,
        node=node,
        rank=int(rank),
        world_size=int(world_size),
        generation=1,
        settings=KeeperSettings(linger_s=float(linger_s)),
    )
    share = Share(rank=int(rank), world_size=int(world_size))
    staged: dict[int, Segment] = {}
    pending = {}
    say(keeper.pid)
    for line in sys.stdin:
        command, *rest = json.loads(line)
        snapshot = Snapshot(int(rest[0]), 1) if rest else Snapshot(0, 1)
        try:
            match command:
                case "stage":
                    staged[snapshot.step] = keeper.segment(share.nbytes)
                    share.fill(staged[snapshot.step], snapshot.step)
                    say("staged")
                case "write":
                    job = share.job(snapshot, staged.pop(snapshot.step))
                    pending[snapshot.step] = keeper.write(job)
                    say("writing")
                case "wait":
                    say(f"{len(pending[snapshot.step].wait(ANSWER_S))} packs")
                case "decide":
                    keeper.settled(snapshot, Verdict(rest[1]))
                    say("decided")
                case "child":
                    say(fork_a_reader())
                case "bye":
                    keeper.close()
                    say("closed")
                    return
        except Exception as error:
            say(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
