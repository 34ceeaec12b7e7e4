"""Draw the best and the worst predictions of an evaluation: volumes with occlusion maps.

An occlusion map shows how much less likely an answer becomes when a patch of a volume is hidden (M. D. Zeiler and
R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2).
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from umbrella.conversations.schema import Conversation
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import Case
from umbrella.evaluation.scoring import ANSWER_ONLY
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.inference.model import Umbrella
from umbrella.modality import Modality
from umbrella.plots import ORANGE, SKY, SOFT, WIDTH, new_figure, save_png, truncate
from umbrella.volumes.slices import Plane, draw_plane, orthogonal_slices
from umbrella.volumes.store import VolumeStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_EFFECT = 1e-3
"""Nats: the smallest end of the colour scale, so that rounding errors do not look like an effect."""
MAX_BLOCKS = 256
"""Blocks that are hidden per volume, one after another."""

Block = tuple[slice, ...]
"""Patches along each axis."""


def draw_cases(
    umbrella: Umbrella,
    conversations: Mapping[str, Conversation],
    store: VolumeStore,
    predictions: Sequence[Prediction],
    settings: EvaluateSettings,
) -> list[Case]:
    """Draw the best and the worst ``settings.pictures`` predictions of each target.

    Args:
        conversations: task_id to conversation, for all predictions.
        store: with the preprocessed volumes of the model's modalities.
        predictions: under the condition "as_asked", of any targets.
        settings: with ``attention_maps``, each case costs up to 256 forward passes per volume.

    Raises:
        UserError: a volume that cannot be used.
    """
    cases = []
    for target in dict.fromkeys(p.target for p in predictions):
        for kind, prediction in select_cases([p for p in predictions if p.target == target], settings.pictures):
            conversation = conversations[prediction.task_id]
            mapped = settings.attention_maps and bool(conversation.volumes)
            maps = occlusion(umbrella, conversation, conversation.answer, settings.batch_size) if mapped else None
            cases.append(Case(prediction, kind, draw_volumes(conversation, store, maps), mapped))
    return cases


def select_cases(predictions: Sequence[Prediction], count: int) -> list[tuple[str, Prediction]]:
    """Select the best and the worst predictions of one target, each of another subject.

    Classes are ranked by the probability of the true label or, without probabilities, by whether the generated label
    is right; numbers by their error (predictions without a number are left out); texts by the nats per token of the
    true answer.

    Returns:
        (kind, prediction) from the best to the worst.
    """
    ranked = [(quality, p) for p in predictions if (quality := _quality(p)) is not None]
    ranked.sort(key=lambda pair: pair[0])  # a stable sort: equals stay in the order of the data
    best = _first_of_subjects((p for _, p in reversed(ranked)), count, set())
    worst = _first_of_subjects((p for _, p in ranked), count, {p.subject_id for p in best})
    return [*(("best", p) for p in best), *(("worst", p) for p in reversed(worst))]


def occlusion(umbrella: Umbrella, conversation: Conversation, answer: str, batch_size: int = 16) -> list[np.ndarray]:
    """Compute the effect of each patch of each volume on the log likelihood of an answer.

    A hidden patch is filled with the mean of its volume, as in the source; after a z-score that is 0. Filling it with
    the background value would look like a hole in the head. In the air around the head, the mean is brighter than what
    it replaces. If a volume has more than 256 patches, blocks of neighbouring patches are hidden together, and each
    patch gets the effect of its block. Information that two patches share shows in the effect of neither.

    Args:
        answer: replaces the last assistant turn.
        batch_size: rows of a forward pass, each with another block hidden.

    Returns:
        For each volume, in reading order, float64 over its patches (px, py, pz), or (px, py, pz, pt) of the middle
        window: the log likelihood in nats, minus that without the patch. Positive: the patch makes the answer more
        likely.

    Raises:
        UserError: as ``Umbrella.answer``.
    """
    example = umbrella.renderer.render(conversation, answer)
    (complete,) = umbrella.log_likelihoods(umbrella.collate([example], ANSWER_ONLY))
    maps = []
    for number, shown in enumerate(conversation.volumes):
        modality = umbrella.modalities[shown.modality]
        effects = np.zeros(modality.patch_grid)
        blocks = list(make_blocks(modality.patch_grid))
        for start in range(0, len(blocks), batch_size):
            part = blocks[start : start + batch_size]
            batch = umbrella.collate([example] * len(part), ANSWER_ONLY)
            group = batch.pixel_values[shown.modality].separate()
            batch.pixel_values[shown.modality] = group
            runs = group.run.tolist()
            for row, block in enumerate(part):
                volume = group.voxels[runs.index(number + row * len(conversation.volumes))]
                where = tuple(slice(b.start * p, b.stop * p) for b, p in zip(block, modality.patch, strict=True))
                volume[where] = volume.float().mean().half()
            for block, hidden in zip(part, umbrella.log_likelihoods(batch), strict=True):
                effects[block] = complete - hidden
        maps.append(effects)
    return maps


def make_blocks(patch_grid: tuple[int, ...], max_blocks: int = MAX_BLOCKS) -> Iterator[Block]:
    """Cut a grid of patches into at most ``max_blocks`` blocks of about equal edges; single patches if they are few."""
    edges = [1] * len(patch_grid)
    while prod(map(ceil, np.divide(patch_grid, edges))) > max_blocks:
        # Blocks become longer along the axis with the most blocks.
        longest = int(np.argmax([ceil(size / edge) for size, edge in zip(patch_grid, edges, strict=True)]))
        edges[longest] += 1
    starts = [range(0, size, edge) for size, edge in zip(patch_grid, edges, strict=True)]
    for corner in product(*starts):
        yield tuple(slice(start, start + edge) for start, edge in zip(corner, edges, strict=True))


def draw_volumes(
    conversation: Conversation, store: VolumeStore, maps: Sequence[np.ndarray] | None = None
) -> tuple[bytes, ...]:
    """Draw three planes of each volume, with its occlusion map, through the patch with the largest effect.

    Args:
        maps: see ``occlusion``; all volumes share one colour scale. None: no maps, planes through the middle.

    Returns:
        A PNG for each volume.
    """
    limit = max((float(np.abs(effects).max()) for effects in maps or ()), default=0.0)
    pictures = []
    for i, volume in enumerate(conversation.volumes):
        modality, effects = store.modalities[volume.modality], maps[i] if maps else None
        title = f"{volume.modality}   {truncate(Path(volume.image_path).name, 60)}"
        centre = None
        if effects is not None:
            patch = np.unravel_index(np.abs(effects).argmax(), effects.shape)
            if modality.is_series:
                first, frames = int(patch[3]) * modality.patch[3], modality.patch[3]
                title += f"   (effect of frames {first} to {first + frames - 1} of {modality.grid[3]} in the window)"
                effects = effects[..., patch[3]]
            if limit > MIN_EFFECT:
                centre = [int(p) * edge + edge // 2 for p, edge in zip(patch[:3], modality.patch[:3], strict=True)]
        array, info = store.get(volume.image_path, volume.modality), store.info(volume.image_path, volume.modality)
        planes = orthogonal_slices(array, modality, info, centre)
        picture = save_png(io.BytesIO(), draw_planes, planes, title, modality, effects, limit)
        pictures.append(picture.getvalue())
    return tuple(pictures)


def draw_planes(
    planes: Sequence[Plane], title: str, modality: Modality, effects: np.ndarray | None, limit: float
) -> "Figure":
    """Draw planes side by side on one scale, and over them the effects (px, py, pz) in nats: orange up to ``limit``."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    sizes = np.array([plane.size for plane in planes])
    height = (WIDTH - 1.4) * sizes[:, 1].max() / sizes[:, 0].sum()
    figure = new_figure(WIDTH, height + 0.75)
    figure.suptitle(title, fontsize=9, ha="left", x=0.01)
    panels = figure.subplots(1, len(planes), width_ratios=sizes[:, 0].tolist())
    limit = max(limit, MIN_EFFECT)
    colour_map = LinearSegmentedColormap.from_list("effect", [SKY, "white", ORANGE])
    for axes, plane in zip(panels, planes, strict=True):
        draw_plane(axes, plane)
        if effects is not None:
            own = effects_on_plane(effects, plane, modality)
            # Full hue, and less opacity for smaller effects: a colour mixed with white would brighten the air.
            colours = colour_map(np.where(own > 0, 1.0, 0.0))
            colours[..., 3] = 0.85 * np.abs(own) / limit
            extent = (0, plane.grey.shape[1], 0, plane.grey.shape[0])
            axes.imshow(colours, extent=extent, aspect=plane.spacing[1] / plane.spacing[0], interpolation="nearest")
    if effects is not None:
        scale = ScalarMappable(Normalize(-limit, limit), colour_map)
        bar = figure.colorbar(scale, ax=panels, shrink=0.85, fraction=0.05, pad=0.02)
        bar.set_label("for the true answer, nats" if limit > MIN_EFFECT else "no effect anywhere, nats", color=SOFT)
    return figure


def effects_on_plane(effects: np.ndarray, plane: Plane, modality: Modality) -> np.ndarray:
    """The effects (px, py, pz) that a plane cuts, in the orientation of its picture (rows, columns)."""
    across = 3 - sum(plane.axes)
    return effects.take(plane.index // modality.patch[across], across).T[::-1]


def _quality(prediction: Prediction) -> float | None:
    label, answer = prediction.label, prediction.answer
    if isinstance(label, str):
        return prediction.probabilities.get(label, 0.0) if prediction.probabilities else float(answer == label)
    if label is not None:
        return -abs(float(answer) - label) if answer is not None else None
    return None if prediction.nll_per_token is None else -prediction.nll_per_token


def _first_of_subjects(predictions: Iterable[Prediction], count: int, excluded: set[str]) -> list[Prediction]:
    """The first prediction of each of ``count`` subjects that are not excluded."""
    first: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.subject_id not in excluded:
            first.setdefault(prediction.subject_id, prediction)
    return list(first.values())[:count]
