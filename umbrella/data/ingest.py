"""Preparation of the data of a run: volumes decoded, conversations rendered, bad samples refused or quarantined."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from umbrella.base import ProgressBar, UserError, no_progress, note, pluralise
from umbrella.cluster import check_nodes
from umbrella.conversations.schema import SPLITS
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import Splits, read_splits
from umbrella.file_storage import is_remote, local_path
from umbrella.fileio import write_atomic
from umbrella.modality import DEFAULT_MODALITIES
from umbrella.volumes.reading import image_shape
from umbrella.volumes.store import decode_volumes, open_store

if TYPE_CHECKING:
    from umbrella.config import Settings


COARSE = 4.0
"""Voxels of a volume per voxel of the grid along an axis, above which a note suggests a finer grid."""


def load_splits(
    settings: "Settings",
    progress: ProgressBar = no_progress,
    trials: Sequence["Settings"] = (),
    dry_run: bool = False,
) -> Splits:
    """Load and check the data of a run: read conversations, decode every volume into the store, render every sample.

    The split of the final evaluation (``evaluate.at_end``) is included.

    Args:
        trials: settings of all trials of a sweep. A sample is used only if it is usable with all of them.
        dry_run: do not decode volumes, and write nothing.

    Raises:
        UserError: the data has problems, one line each; see ``read_splits`` and ``apply_bad_sample_policy``.
    """
    final = {settings.evaluate.split} if settings.evaluate.at_end else set()
    names = [name for name in SPLITS if name in {"train", "validation"} | final]
    splits = read_splits(settings, progress, names, dry_run=dry_run)
    check_splits(splits, settings, progress, trials, dry_run)
    for line in filter(None, [*splits.notices, splits.quarantine_note, *coarse_grids(splits, settings)]):
        note(line)
    return splits


def coarse_grids(splits: Splits, settings: "Settings") -> Iterator[str]:
    """Describe modalities whose grid is much coarser than their first volume."""
    first = {v.modality: v.image_path for c in reversed(splits.train) for v in c.volumes}
    for name, path in sorted(first.items()):
        with suppress(UserError):  # files that cannot be read are reported elsewhere
            shape, grid = image_shape(path)[:3], settings.modalities[name].grid[:3]
            if settings.modalities[name].fit == "resize" and max(map(truediv, shape, grid)) > COARSE:
                was, becomes = ("×".join(map(str, size)) for size in (shape, grid))
                known = " add grid_96.yaml to the command, which has 96×96×96 voxels, or" * (name in DEFAULT_MODALITIES)
                yield f"{name}: volumes of {was} voxels are resized to {becomes};{known} set modalities.{name}.grid"


def check_splits(
    splits: Splits,
    settings: "Settings",
    progress: ProgressBar,
    trials: Sequence["Settings"] = (),
    dry_run: bool = False,
) -> None:
    """Decode every volume, render every conversation, then apply ``data.on_bad`` to the bad samples.

    Args:
        splits: changed in place.
        trials, dry_run: see ``load_splits``.

    Raises:
        UserError: see ``apply_bad_sample_policy`` and ``check_nodes``.
    """
    # Report bad conversations before the volumes are decoded, which may take an hour.
    apply_bad_sample_policy(splits, settings, write=False)
    if not dry_run:
        check_volumes(splits, settings, progress, trials)
    check_rendering(splits, settings, progress, trials)
    apply_bad_sample_policy(splits, settings, write=not dry_run)


def check_volumes(
    splits: Splits, settings: "Settings", progress: ProgressBar, trials: Sequence["Settings"] = ()
) -> None:
    """Decode every volume into the store, and exclude conversations with a volume that cannot be decoded.

    Unusual headers become notices, one for each kind with a count. On a cluster, all nodes decode.

    Args:
        splits: changed in place.
        trials: see ``load_splits``.

    Raises:
        UserError: the store cannot be written; see also ``check_nodes``.
    """
    store, resources = open_store(settings), settings.resources
    shared = {"resources.storage": Path(resources.storage).absolute()}
    if resources.store and not is_remote(resources.store):
        shared["resources.store"] = local_path(resources.store)
    paths = [sorted({v.image_path for c in cs for v in c.volumes}) for cs in splits.splits.values()]
    samples = {Path(path).absolute() for of_split in paths for path in (*of_split[:1], *of_split[-1:])}
    check_nodes(shared, sorted(samples))
    bad: dict[tuple[str, str], str] = {}
    try:
        for shape in {str(trial.modalities): trial for trial in trials or [settings]}.values():
            bad |= decode_volumes(open_store(shape), splits.volumes, settings.data.processes, progress)
    except OSError as error:
        message = str(error.strerror or error)
        if message.startswith("resources.store="):  # see ``FileStorage``
            raise UserError(f"{message}; is it the right address, and are its credentials set?") from None
        raise UserError(f"{store.folder}: {message}; make room, or set resources.storage") from None
    reasons = {}
    for name, conversations in splits.splits.items():
        for c in conversations:
            used = [(v.image_path, v.modality) for v in c.volumes]
            if found := [("image_path", bad[volume]) for volume in used if volume in bad]:
                reasons[name, c.task_id] = found
    splits.exclude(reasons)
    paths_of: dict[str, list[str]] = {}
    for path in sorted({path for path, _ in splits.volumes}):
        for text in store.notes(path):
            paths_of.setdefault(text, []).append(path)
    splits.notices += [f"{pluralise(len(of), 'volume')}, first {of[0]}: {text}" for text, of in paths_of.items()]


def check_rendering(
    splits: Splits, settings: "Settings", progress: ProgressBar, trials: Sequence["Settings"] = ()
) -> None:
    """Render every conversation, measure its tokens, and exclude those that cannot be rendered.

    Training conversations that have no supervised token under one of the mask policies are excluded too.

    Args:
        splits: changed in place. ``lengths``, ``tokens`` and ``longest_answer`` are set, the first two for the first of
            ``trials``.
        trials: see ``load_splits``.

    Raises:
        UserError: the trials have batches by tokens, and differ in the tokens of a conversation.
    """
    from umbrella.data.masking import loss_weights
    from umbrella.data.rendering import load_renderer

    trials = trials or [settings]
    distinct = {(str(t.modalities), t.model.checkpoint, t.model.chat_template): t for t in trials}
    renderers = [load_renderer(trial) for trial in distinct.values()]
    # The other options of a policy change the weight of targets, not the set of targets.
    policies = {(mask.supervise, mask.end_of_turn, mask.turn_header): mask for mask in (t.mask for t in trials)}
    conversations = [(name, c) for name, of_split in splits.splits.items() for c in of_split]
    lengths: dict[str, list[int]] = {name: [] for name in splits.splits}
    if len(renderers) > 1 and any(trial.train.tokens_per_batch for trial in trials):
        raise UserError(
            "train.tokens_per_batch: the trials differ in modalities or tokenizers, so in the tokens of a conversation;"
            " use train.batch_size"
        )
    tokens: list[int] = []
    reasons = {}
    for name, conversation in progress(conversations, "rendering conversations"):
        try:
            # Training takes whole conversations; validation and test ask the questions of each.
            asked = [conversation] if name == "train" else conversation.questions()
            examples = [renderer.render(one) for renderer in renderers for one in asked]
        except UserError as error:
            reasons[name, conversation.task_id] = [("conversations", str(error))]
            continue
        used = policies.values() if name == "train" else ()
        if without_target := [policy for policy in used if not loss_weights(examples[0], policy).any()]:
            reasons[name, conversation.task_id] = [("conversations", _no_target(policy)) for policy in without_target]
            continue
        lengths[name] += [example.bucket_length for example in examples[: len(asked)]]
        if name == "train":
            tokens.append(len(examples[0].input_ids))
            splits.longest_answer = max(splits.longest_answer, *(example.longest_answer for example in examples))
    splits.exclude(reasons)
    splits.tokens = np.array(tokens, np.int32)
    splits.lengths = {name: np.array(of_split, np.int32) for name, of_split in lengths.items()}


def _no_target(policy: MaskPolicy) -> str:
    remedy = "choose another mask, correct the loss flags of its turns, or leave it out with data.on_bad=quarantine"
    return f"the mask policy ({policy.description}) supervises none of its tokens; {remedy}"


def apply_bad_sample_policy(splits: Splits, settings: "Settings", write: bool = True) -> None:
    """Refuse the data or quarantine the bad samples, according to ``data.on_bad``.

    Args:
        splits: the splits with their problems.
        write: write the quarantine file, ``<storage>/quarantine-<hash of its content>.jsonl``.

    Raises:
        UserError: there is a problem and ``on_bad=fail``, a problem concerns a whole file, the fraction of bad samples
            exceeds ``data.max_bad_fraction``, or a split is empty.
    """
    data, problems = settings.data, splits.problems
    if problems and (data.on_bad == "fail" or any(problem.sample is None for problem in problems)):
        raise UserError("\n".join(splits.problem_lines()))
    bad, every = splits.quarantined, splits.quarantined + sum(map(len, splits.splits.values()))
    if bad > data.max_bad_fraction * every:
        share = f"{bad} of {every} samples cannot be used, more than data.max_bad_fraction={data.max_bad_fraction:g}"
        raise UserError("\n".join([*splits.problem_lines(), f"{share}; repair them, or raise that"]))
    empty = [f"data.{name}: holds no conversation that can be used" for name, cs in splits.splits.items() if not cs]
    if empty:
        raise UserError("\n".join([*splits.problem_lines(), *empty]))
    if problems and write:
        entries: dict[str, dict] = {}
        for problem in problems:
            entry = entries.setdefault(problem.where, {"where": problem.where, "reasons": []})
            entry["reasons"].append(str(problem).removeprefix(f"{problem.where}: "))
            entry["sample"] = problem.sample
        content = "".join(json.dumps(entry) + "\n" for entry in entries.values()).encode()
        name = f"quarantine-{hashlib.sha256(content).hexdigest()[:8]}.jsonl"
        splits.quarantine = Path(settings.resources.storage).absolute() / name
        write_atomic(splits.quarantine, content)
