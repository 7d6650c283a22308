"""The zygote that the workers of these tests are forked from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Zygote

from autoglm_elastic.agent._reverse_dns import forgo_reverse_lookups


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    forgo_reverse_lookups()  # this process hosts the stores
    zygote = Zygote()
    yield zygote
    zygote.close()
