"""The world as environment variables, in torchrun's words.

Reads and writes `os.environ` and nothing else.
"""

from __future__ import annotations

import os

from autoglm_elastic import wire


def read_world(generation: int) -> wire.World:
    """As stock torchrun says, or a world of one."""
    get = os.environ.get
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        rank, size = 0, 1
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return wire.World(
        generation=generation,
        parent=generation - 1,
        rank=rank,
        world_size=size,
        local_rank=int(get("LOCAL_RANK", "0")),
        local_world_size=int(get("LOCAL_WORLD_SIZE", "1")),
        group_rank=int(get("GROUP_RANK", "0")),
        group_world_size=int(get("GROUP_WORLD_SIZE", "1")),
        role_rank=int(get("ROLE_RANK", str(rank))),
        role_world_size=int(get("ROLE_WORLD_SIZE", str(size))),
        master_addr=get("MASTER_ADDR", ""),
        master_port=int(get("MASTER_PORT", "0")),
        restart_count=int(get("TORCHELASTIC_RESTART_COUNT", "0")),
        planned=False,
        reason="started without autoglm-run",
    )


def write_world(world: wire.World) -> None:
    """What torchrun's workers find in their environment, for this world."""
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.world_size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_world_size),
        "GROUP_RANK": str(world.group_rank),
        "GROUP_WORLD_SIZE": str(world.group_world_size),
        "ROLE_RANK": str(world.role_rank),
        "ROLE_WORLD_SIZE": str(world.role_world_size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(world.restart_count),
        wire.ENV_GENERATION: str(world.generation),
    }
