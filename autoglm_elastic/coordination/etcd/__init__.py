"""The coordination store on etcd v3: `EtcdStore`, and `parse` for its address.

Needs the packages of the extra `etcd`; importing this package without them raises `UsageError` with the command to run.
It starts threads (grpc's and its own) when a store is opened, so not before the zygote is forked.
"""

from autoglm_elastic.coordination.etcd.store import EtcdStore
from autoglm_elastic.coordination.etcd.target import SCHEME, EtcdTarget, parse

__all__ = ["SCHEME", "EtcdStore", "EtcdTarget", "parse"]
