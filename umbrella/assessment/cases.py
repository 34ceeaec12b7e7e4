"""The best and the worst answers of an evaluation, with their volumes and where the model looks."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from umbrella.conversations.schema import Conversation
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.modality import Modality
from umbrella.plots import BLUE, SOFT, VERMILION, WIDTH, new_figure, save, shorten
from umbrella.volumes.slices import Plane, draw_plane, orthogonal_slices
from umbrella.volumes.store import VolumeStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from umbrella.evaluation.answering import Umbrella

Kind = Literal["best", "worst"]
NOTHING = 1e-3
"""Nats: a map whose effects are all smaller is not drawn as if they were something."""


@dataclass(frozen=True)
class Case:
    """One answer that the report shows."""

    prediction: Prediction
    kind: Kind
    pictures: tuple[bytes, ...]
    """A PNG of three planes for each volume, in reading order."""
    mapped: bool = False
    """Whether the pictures show on which patches the true answer depends."""


def pick(predictions: Sequence[Prediction], count: int) -> list[tuple[Kind, Prediction]]:
    """The best answers and as many of the worst, of one target, no subject twice: best first, worst of all last.

    Classes: by the probability of the true label; without probabilities, by whether the label was said. Numbers: by
    the error; answers without a number are left out. Texts: by nats per token of the true answer.
    """
    rated = [(quality, p) for p in predictions if (quality := _quality(p)) is not None]
    rated.sort(key=lambda pair: pair[0])  # a stable sort: equals stay in the order of the data
    best = _distinct((p for _, p in reversed(rated)), count, set())
    worst = _distinct((p for _, p in rated), count, {p.subject_id for p in best})
    picked: list[tuple[Kind, Prediction]] = [("best", p) for p in best]
    return picked + [("worst", p) for p in reversed(worst)]


def draw_cases(
    umbrella: "Umbrella",
    conversations: Mapping[str, Conversation],
    store: VolumeStore,
    predictions: Sequence[Prediction],
    settings: EvaluateSettings,
) -> list[Case]:
    """Pick ``settings.pictures`` best and worst answers of each target and draw them; runs where the model is.

    With ``settings.attention_maps`` each case costs up to 256 passes per volume, see ``maps.occlusion``.

    Args:
        conversations: by task_id; those of the predictions at least.
        store: has the volumes, prepared with the modalities of the model.
        predictions: of the questions as asked, of any targets.

    Raises:
        UserError: a volume that cannot be used.
    """
    from umbrella.assessment.maps import occlusion

    cases = []
    for target in dict.fromkeys(p.target for p in predictions):
        for kind, prediction in pick([p for p in predictions if p.target == target], settings.pictures):
            conversation = conversations[prediction.task_id]
            mapped = settings.attention_maps and bool(conversation.volumes)
            maps = occlusion(umbrella, conversation, conversation.answer, settings.batch_size) if mapped else None
            cases.append(Case(prediction, kind, draw_volumes(conversation, store, maps), mapped))
    return cases


def draw_volumes(
    conversation: Conversation, store: VolumeStore, maps: Sequence[np.ndarray] | None = None
) -> tuple[bytes, ...]:
    """A PNG for each volume: three planes, and over them its map, through the patch of the largest effect.

    Args:
        maps: as ``maps.occlusion`` gives them; colours have one scale for all volumes. None: through the middle.
    """
    limit = max((float(np.abs(effects).max()) for effects in maps or ()), default=0.0)
    pictures = []
    for i, volume in enumerate(conversation.volumes):
        modality, effects = store.modalities[volume.modality], maps[i] if maps else None
        title = f"{volume.modality}   {shorten(Path(volume.image_path).name, 60)}"
        centre = None
        if effects is not None:
            patch = np.unravel_index(np.abs(effects).argmax(), effects.shape)
            if modality.is_series:
                first, frames = int(patch[3]) * modality.patch[3], modality.patch[3]
                title += f"   (effect of frames {first} to {first + frames - 1} of {modality.grid[3]} that are seen)"
                effects = effects[..., patch[3]]
            if limit > NOTHING:
                centre = [int(p) * edge + edge // 2 for p, edge in zip(patch[:3], modality.patch[:3], strict=True)]
        array, facts = store.get(volume.image_path, volume.modality), store.info(volume.image_path, volume.modality)
        planes = orthogonal_slices(array, modality, facts, centre)
        picture = save(io.BytesIO(), draw_planes, planes, title, modality, effects, limit)
        pictures.append(picture.getvalue())
    return tuple(pictures)


def draw_planes(
    planes: Sequence[Plane], title: str, modality: Modality, effects: np.ndarray | None, limit: float
) -> "Figure":
    """Planes side by side, to one scale; over them effects (px, py, pz) in nats: red to ``limit``, blue below 0."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    sizes = np.array([plane.size for plane in planes])
    height = (WIDTH - 1.4) * sizes[:, 1].max() / sizes[:, 0].sum()
    figure = new_figure(WIDTH, height + 0.75)
    figure.suptitle(title, fontsize=9, ha="left", x=0.01)
    panels = figure.subplots(1, len(planes), width_ratios=sizes[:, 0].tolist())
    limit = max(limit, NOTHING)
    hues = LinearSegmentedColormap.from_list("effect", [BLUE, "white", VERMILION])
    shade = ScalarMappable(Normalize(-limit, limit), hues)
    for axes, plane in zip(panels, planes, strict=True):
        draw_plane(axes, plane)
        if effects is not None:
            own = over(effects, plane, modality)
            # The hue alone, paler for less: mixed with white, small effects would lighten the air.
            colours = hues(np.where(own > 0, 1.0, 0.0))
            colours[..., 3] = 0.85 * np.abs(own) / limit
            extent = (0, plane.grey.shape[1], 0, plane.grey.shape[0])
            axes.imshow(colours, extent=extent, aspect=plane.spacing[1] / plane.spacing[0], interpolation="nearest")
    if effects is not None:
        bar = figure.colorbar(shade, ax=panels, shrink=0.85, fraction=0.05, pad=0.02)
        bar.set_label("for the true answer, nats" if limit > NOTHING else "no effect anywhere, nats", color=SOFT)
    return figure


def over(effects: np.ndarray, plane: Plane, modality: Modality) -> np.ndarray:
    """Effects (px, py, pz) where a plane cuts them, as its picture lies: rows downwards, columns to the right."""
    across = 3 - sum(plane.axes)
    return effects.take(plane.index // modality.patch[across], across).T[::-1]


def _quality(prediction: Prediction) -> float | None:
    label, said = prediction.label, prediction.said
    if isinstance(label, str):
        return prediction.probabilities.get(label, 0.0) if prediction.probabilities else float(said == label)
    if label is not None:
        return -abs(float(said) - label) if said is not None else None
    return None if prediction.nll_per_token is None else -prediction.nll_per_token


def _distinct(predictions: Iterator[Prediction], count: int, seen: set[str]) -> list[Prediction]:
    """The first ones of so many subjects that were not seen."""
    seen = set(seen)
    found: list[Prediction] = []
    for prediction in predictions:
        if len(found) < count and prediction.subject_id not in seen:
            found.append(prediction)
            seen.add(prediction.subject_id)
    return found
