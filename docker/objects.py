"""An S3 server to try things with, and to test with: `python docker/objects.py HOST PORT`. It keeps all in memory.

It is moto's, with one change: moto checks the condition of a write and writes in two steps, between which another
request may come; S3 does not.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import moto.server

_run = moto.server.run_simple
_lock = threading.Lock()


def run_simple(host: str, port: int, application: Any, **options: Any) -> None:
    def one_condition_at_a_time(environ: dict[str, Any], start_response: Any) -> Any:
        if "HTTP_IF_NONE_MATCH" not in environ and "HTTP_IF_MATCH" not in environ:
            return application(environ, start_response)
        with _lock:
            return list(application(environ, start_response))

    _run(host, port, one_condition_at_a_time, **options)


if __name__ == "__main__":
    moto.server.run_simple = run_simple
    moto.server.main(["-H", sys.argv[1], "-p", sys.argv[2]])
