"""The zygote that the workers of these tests are forked from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()
