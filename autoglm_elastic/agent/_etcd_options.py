"""etcd's address as torch's rendezvous parameters give it: endpoint and options apart."""

from __future__ import annotations

from torch.distributed.elastic.rendezvous import RendezvousParameters

from autoglm_elastic.agent._endpoint import ETCD
from autoglm_elastic.coordination import etcd


def endpoint_of(params: RendezvousParameters, *, is_etcd: bool) -> str:
    """The endpoint; one of etcd's (`is_etcd`, or by its scheme) as a whole address, with the options that
    `--rdzv-conf=ca=…,cert=…,key=…,server_name=…,user=…,password_file=…` gives and the address does not.

    Raises:
        UsageError: it makes no address.
    """
    endpoint = str(params.endpoint)
    if not is_etcd and not endpoint.startswith(ETCD):
        return endpoint
    etcd.require()
    address = etcd.with_options(ETCD + endpoint.removeprefix(ETCD), params.config)
    etcd.parse(address)
    return address
