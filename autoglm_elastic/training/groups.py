"""The process groups of one generation: built, broken from another thread, dropped.

The only room that creates or destroys process groups. Each generation gets a c10d store with no memory of an
earlier one (the agent hosts a fresh one), so that an address of a dead peer can never be read. Breaking frees
every collective that waits, also in a group of the user's: gloo's connections are shut down (its own abort
does nothing), NCCL's communicators are aborted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from autoglm_elastic.training._sockets import BreakableSockets

STORE_CONNECT_S: Final = 60.0
"""The agent's store listens before a world is announced; only a dead agent does not answer."""

VOTES_CONNECT_S: Final = 2.0
"""Bound of one of gloo's five attempts to connect a peer to the votes' group. Whoever waits to *be* connected by a host
that is gone has no socket that could be broken, and must be free before it counts as stuck (`unwind_limit_s`)."""


def backend_name() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def watch_new_groups(sockets: BreakableSockets) -> Callable[[], None]:
    """Note the connections of every group that is made from now on, the user's own ones too: whoever waits in
    one of those must be freed like the others. Returns what ends it.

    All of torch's ways to make a group lead through one function of `distributed_c10d`; there is no public
    one to be told of them.
    """
    make = distributed_c10d._new_process_group_helper

    @functools.wraps(make)
    def noted(*args: Any, **kwargs: Any) -> Any:
        with sockets.noting():
            return make(*args, **kwargs)

    def end() -> None:
        if distributed_c10d._new_process_group_helper is noted:
            distributed_c10d._new_process_group_helper = make

    distributed_c10d._new_process_group_helper = noted
    return end


def _nothing() -> None:
    """Nothing is watched yet."""


class Groups:
    """`build`, then `store` and the default group are there; `close` undoes it.

    Args:
        generation: names the keys in the store.
        rank, world_size: ours in it.
        timeout_s: bound of building and of every collective.
    """

    def __init__(self, generation: int, rank: int, world_size: int, timeout_s: float) -> None:
        self.generation = generation
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.store: Any = None
        self._store_is_new = False
        self._sockets = BreakableSockets()
        self._ours = False
        self._votes: Any = None
        self._unwatch: Callable[[], None] = _nothing

    def connect(self, master_addr: str, master_port: int) -> None:
        """A client of the generation's store. Raises torch.distributed.DistError when it does not answer."""
        with self._sockets.noting():
            client = TCPStore(
                master_addr,
                master_port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_CONNECT_S),
            )
        client.set_timeout(timedelta(seconds=self.timeout_s))
        self.store = PrefixStore(f"autoglm/{self.generation}", client)
        self._store_is_new = True

    def build(self) -> None:
        """The default group over `store`; every rank of the generation calls it."""
        self._unwatch = watch_new_groups(self._sockets)
        dist.init_process_group(
            backend_name(),
            store=PrefixStore("groups", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout_s),
        )
        self._ours = True

    def build_alone(self) -> None:
        """A world of one without a launcher; a default group that the user made is used as it is."""
        if not dist.is_initialized():
            self.store = HashStore()
            self.build()
        else:
            self.store = HashStore()

    def build_from_environment(self) -> None:
        """Under stock torchrun: the default group as anybody makes it, or the one that the user made."""
        if not dist.is_initialized():
            dist.init_process_group(backend_name(), timeout=timedelta(seconds=self.timeout_s))
            self._ours = True
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store = PrefixStore("autoglm", dist.distributed_c10d._get_default_store())

    def votes(self) -> Any:
        """A second gloo group, for the snapshot thread only, whose every wait has a bound of its own. Built at its
        first use: all ranks call at one boundary. Raises DistError or RuntimeError when a peer is lost meanwhile."""
        if self._votes is None:
            connect_s = self.timeout_s
            if self._store_is_new:
                self._everybody("votes")
                connect_s = VOTES_CONNECT_S
            self._votes = dist.new_group(backend="gloo", timeout=timedelta(seconds=connect_s))
        return self._votes

    def _everybody(self, where: str) -> None:
        """Returns when all ranks have come here; breaking frees whoever waits."""
        if self.store.add(f"{where}/came", 1) == self.world_size:
            self.store.set(f"{where}/all", b"1")
        self.store.wait([f"{where}/all"])

    def break_(self) -> None:
        """From any thread, any number of times: whoever waits in a collective or for the store gets an
        error."""
        self._sockets.shutdown(self.timeout_s)
        if torch.cuda.is_available():
            for group in list(distributed_c10d._world.pg_map):
                with contextlib.suppress(RuntimeError, ValueError):
                    group._get_backend(torch.device("cuda")).abort()

    def close(self) -> list[Any]:
        """Drop the groups. Returns what is left of them: destroying that takes some 15 ms a group, so the
        caller lets go of it when training runs again."""
        self._unwatch()
        remains = [self._votes, dist.group.WORLD if self._ours else None, self.store]
        self._votes = self.store = None
        if self._ours and dist.is_initialized():
            self._ours = False
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group()
        if not dist.is_initialized():
            # Names of groups are counted. A build that failed has counted, and nothing undoes that: the names
            # of the next generation would differ from those of a newcomer, and all would wait for each other.
            distributed_c10d._world.group_count = 0
        return remains
