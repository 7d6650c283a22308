"""etcd's address as torch's rendezvous parameters give it: endpoint and options apart."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode

from torch.distributed.elastic.rendezvous import RendezvousParameters

from autoglm_elastic.agent._endpoint import ETCD
from autoglm_elastic.coordination import etcd

_OPTIONS: Final[tuple[str, ...]] = ("ca", "cert", "key", "user", "password_file")


def endpoint_of(params: RendezvousParameters, *, is_etcd: bool) -> str:
    """The endpoint; one of etcd's (`is_etcd`, or by its scheme) as a whole address, with the options that
    `--rdzv-conf=ca=…,cert=…,key=…,user=…,password_file=…` gives.

    Raises:
        UsageError: it makes no address.
    """
    endpoint = str(params.endpoint)
    if not is_etcd and not endpoint.startswith(ETCD):
        return endpoint
    etcd.require()
    given = {name: str(params.config[name]) for name in _OPTIONS if name in params.config}
    address = ETCD + endpoint.removeprefix(ETCD)
    if given:
        address += ("&" if "?" in address else "?") + urlencode(given)
    etcd.parse(address)
    return address
