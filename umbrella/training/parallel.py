"""What the workers of one training have to say to each other."""

from typing import Any

from torch import distributed


def gathered(own: Any) -> list[Any]:
    """Every worker's, by rank, on each of them."""
    if not distributed.is_initialized():
        return [own]
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones
