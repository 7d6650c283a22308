"""The coordination store: a small etcd-like port (`ports.Store`) and its adapters.

`MemoryStore` lives in one process; `StoreServer` and `StoreClient` share one over TCP. Both run the same
state machine (`_state.py`) and pass the same contract tests. This room knows nothing of training, agents or
torch.
"""

from autoglm_elastic.coordination.client import StoreClient
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.coordination.embedded import StoreServer
from autoglm_elastic.coordination.memory import MemoryStore
from autoglm_elastic.coordination.refusals import LeaseGone, StoreDenied, StoreRefused
from autoglm_elastic.coordination.tls import Credentials, TlsFiles

__all__ = [
    "Credentials",
    "LeaseGone",
    "MemoryStore",
    "StoreClient",
    "StoreDenied",
    "StoreRefused",
    "StoreServer",
    "SystemClock",
    "TlsFiles",
]
