"""Rows of a batch: several samples side by side, and prefixes that they share."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from umbrella.data.rendering import Example

SAMPLES_PER_ROW = 8
"""Maximum length of a row in a batch with shared prefixes, in lengths of the longest sample, if ``pack`` is 0."""
VolumeKey = tuple[str, str | int, tuple[int, ...] | None]
"""Modality of a volume, its path or the id of its voxels, and of a series the seed of its window."""
Group = tuple[list[int], int, int]
"""Samples, and the numbers of tokens and volumes of the prefix that they share."""


class Segment(NamedTuple):
    """Tokens of a row and their volumes, which are the same in each of its samples."""

    samples: list[int]
    tokens: slice
    volumes: slice
    prefix: int = 0
    """Number of the segment that the tokens also attend to; 0: none."""


def pack_rows(groups: Sequence[Group], lengths: Sequence[int], pack: int) -> list[list[Segment]]:
    """Return the segments of rows of at most ``pack`` tokens, in order. A longer sample gets its own row.

    Args:
        groups: a group that continues in the next row has its prefix there again.
        lengths: tokens of each sample.
        pack: with shared prefixes, 0 means ``SAMPLES_PER_ROW`` times the longest sample.
    """
    if not any(tokens for _, tokens, _ in groups):
        return _fill_rows(groups, lengths, pack)
    limit, longest = pack or SAMPLES_PER_ROW * max(lengths), max(lengths)
    # Of all limits with this number of rows, the smallest leaves the least padding.
    count = len(_fill_rows(groups, lengths, limit))
    limit = bisect_left(range(limit), -count, min(longest, limit), key=lambda n: -len(_fill_rows(groups, lengths, n)))
    return _fill_rows(groups, lengths, limit)


def _fill_rows(groups: Sequence[Group], lengths: Sequence[int], limit: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    free = -1
    for samples, tokens, volumes in groups:
        sharing: list[int] = []
        number = 0
        for i in samples:
            if lengths[i] - (tokens if sharing else 0) > free:
                rows.append([])
                free, sharing = limit, []
            if tokens and not sharing:
                rows[-1].append(Segment(sharing, slice(tokens), slice(volumes)))
                number = len(rows[-1])
                free -= tokens
            sharing.append(i)
            rows[-1].append(Segment([i], slice(tokens, None), slice(volumes, None), number))
            free -= lengths[i] - tokens
    return rows


def share_prefixes(
    examples: Sequence[Example], weights: Sequence[np.ndarray], volumes: Sequence[Sequence[VolumeKey]]
) -> list[Group]:
    """Group the samples that begin with the same turns, up to one with a volume, in order of their first samples.

    The prefix is all turns that the samples of a group have in common, but not the last turn of any.

    Args:
        examples: rendered conversations.
        weights: loss weights of their tokens.
        volumes: keys of their volumes.
    """
    prefixes: list[dict[Any, tuple[int, int]]] = [{} for _ in examples]
    alike: dict[Any, list[int]] = {}
    for i, example in enumerate(examples):
        ends = {span.turn: span.stop for span in example.spans}
        for stop in list(ends.values())[:-1]:
            count = sum(span.kind == "image" and span.stop <= stop for span in example.spans)
            if count and not weights[i][stop]:  # in a row, the token before ``stop`` may be one of another sample
                prefixes[i][example.input_ids[:stop].tobytes(), *volumes[i][:count]] = stop, count
        alike.setdefault(next(iter(prefixes[i]), i), []).append(i)
    groups: list[Group] = []
    for first, *others in alike.values():
        common = [size for key, size in prefixes[first].items() if all(key in prefixes[i] for i in others)]
        groups.append(([first, *others], *common[-1]) if others else ([first], 0, 0))
    return groups
