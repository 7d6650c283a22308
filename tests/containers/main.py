"""The cluster of docker/compose.yaml, for real: built, brought up, disturbed, compared, removed. See docker/test."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
from checks import check, compare
from cluster import Cluster
from daemon import FREE_BYTES_MIN, daemon
from images import BUILD_S, context, ingredients
from plugin import compose_env
from story import Story, measure, table
from tools import Failed, Skip, say

STOPS = (signal.SIGINT, signal.SIGTERM)
SKIPPED = 77
"""Exit code where the caller wants to know: a machine of our own that cannot run it (AUTOGLM_TEST_EXCLUSIVE)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="requirement, as pip takes it")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for run directory and results, when it is over"
    )
    args = parser.parse_args()
    for number in STOPS:
        signal.signal(number, _leave)
    try:
        with _folder() as folder:
            play(folder, args.torch, args.keep)
    except Skip as reason:
        say(f"skipped: {reason}")
        return SKIPPED if os.environ.get("AUTOGLM_TEST_EXCLUSIVE") else 0
    except Failed as error:
        say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped; everything is removed")
        return 128 + signal.SIGINT
    say("passed")
    return 0


def play(folder: Path, torch: str, keep: Path | None) -> None:
    """`folder`: for everything, and removed by the caller."""
    for name in ("docker", "context", "client", "taken"):
        (folder / name).mkdir()
    with daemon(folder / "docker") as here:
        here.env.update(compose_env(folder / "client"))
        file = context(folder / "context")
        given = ingredients(here, folder, file.parent / "wheels", f"test-{os.getpid()}", torch)
        cluster = Cluster(file, {**here.env, **given})
        try:
            cluster.build(BUILD_S)
            say("built the images: " + cluster.sizes())
            story = Story(cluster, folder / "taken")
            story.play()
            run_dir = check(story)
            compare(story, run_dir)
            measure(story.rows, run_dir)
            print(f"\n{table(story.rows)}\n", flush=True)
            if keep is not None:
                shutil.copytree(folder / "taken", keep)
        finally:
            if here.is_ours:
                cluster.close()  # all else ends with the daemon
            else:
                cluster.remove()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """On a disk that can hold layers of images, with room for them; removed afterwards."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path(__file__).resolve().parents[2]]
    for place in places:
        if _kind(place) not in {"overlay", "tmpfs"} and shutil.disk_usage(place).free >= FREE_BYTES_MIN:
            folder = Path(tempfile.mkdtemp(prefix="autoglm-docker-", dir=place))
            try:
                yield folder
            finally:
                shutil.rmtree(folder)
            return
    raise Skip(f"no disk that can hold layers of images, with {FREE_BYTES_MIN >> 30} GB free")


def _kind(path: Path) -> str:
    """Of the file system that it is on."""
    mounted = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounted, key=lambda part: len(part.mountpoint)).fstype if mounted else ""


def _leave(number: int, frame: FrameType | None) -> None:
    """What is waited for ends, too: a terminal interrupts it by itself, `kill` and `timeout` do not."""
    for again in STOPS:
        signal.signal(again, signal.SIG_IGN)
    for child in psutil.Process().children():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(child.pid) == os.getsid(0):
                child.kill()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
