"""`autoglm-run`: thin. Prints what the libraries raise, as one line, and gives the exit code.

May touch: standard output and error, the exit code. Must never: decide anything about the job.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from autoglm_elastic import settings
from autoglm_elastic.agent import flags, launcher
from autoglm_elastic.errors import ElasticError, ExitCode, in_one_line

_SIGNAL_BASE = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job from the command line `argv` (default: this process's). Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = flags.parse(argv, os.environ)
        if command.args.print_config:
            _print_config(command, argv)
            return ExitCode.DONE
        code = launcher.launch(command)
    except ElasticError as error:
        _say(in_one_line(error))
        return error.exit_code
    except ChildFailedError as error:
        # As the last section of torchrun's traceback, for people and tools that look for it.
        print(f"{ChildFailedError.__module__}.{ChildFailedError.__name__}: {error}", file=sys.stderr)
        return launcher.exit_code_of(error)
    except SignalException as error:
        _say(f"stopped by {error.sigval.name}")
        return _SIGNAL_BASE + error.sigval
    except KeyboardInterrupt:
        _say("stopped by SIGINT")
        return _SIGNAL_BASE + 2
    if code == ExitCode.REQUEUE:
        _say("stopped on request, with a snapshot: the same command goes on from it")
    return code


def _say(message: str) -> None:
    print(f"autoglm-run: {message}", file=sys.stderr)


def _print_config(command: flags.Command, argv: Sequence[str]) -> None:
    print("# Settings: this is a file for --config.")
    print(settings.to_yaml(settings.explain(command.loaded)))
    print("# Flags:")
    for flag, value, source in flags.explain_flags(argv, os.environ):
        print(f"{f'# {flag} {value}':<40}  # {source}")


if __name__ == "__main__":
    sys.exit(main())
