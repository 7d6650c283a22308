"""etcd's address as torch's rendezvous parameters give it: endpoint and options apart."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode

from torch.distributed.elastic.rendezvous import RendezvousParameters

from autoglm_elastic.agent._endpoint import ETCD
from autoglm_elastic.coordination import etcd

_OPTIONS: Final = ("ca", "cert", "key", "user", "password_file")


def with_endpoint(params: RendezvousParameters) -> RendezvousParameters:
    """`--rdzv-endpoint=h1:2379,h2:2379 --rdzv-conf=ca=…,cert=…,key=…,user=…,password_file=…` as one address.

    Raises:
        UsageError: it makes none.
    """
    etcd.require()
    given: dict[str, str] = {name: str(params.config[name]) for name in _OPTIONS if name in params.config}
    endpoint = ETCD + params.endpoint.removeprefix(ETCD) + (f"?{urlencode(given)}" if given else "")
    etcd.parse(endpoint)
    params.endpoint = endpoint
    return params
