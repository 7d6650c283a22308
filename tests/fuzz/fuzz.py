"""The fuzzer: `python -m tests.fuzz.fuzz TARGET SECONDS`, from the repository's root. Needs atheris."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main(name: str, seconds: str) -> None:
    try:
        import atheris
    except ImportError:
        print("skipped: atheris is not installed (pip install 'autoglm-elastic[fuzz]')")
        return
    with atheris.instrument_imports(include=["autoglm_elastic"]):
        from tests.fuzz.targets import TARGETS, check, framed, resealed
    target = TARGETS[name]
    taken = 0

    def one(data: bytes) -> None:
        nonlocal taken
        taken += check(target, data)
        again = framed(data) if name == "header" else resealed(data)
        if again is not None:
            taken += check(target, again)

    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "valid").write_bytes(target.valid)
        options = [f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=2048", "-timeout=10"]
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
