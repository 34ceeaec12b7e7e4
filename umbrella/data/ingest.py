"""Preparation of the data of a run: volumes decoded, conversations rendered, bad samples refused or quarantined."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
import numpy as np

from umbrella.base import ProgressBar, UserError, note, pluralise
from umbrella.cluster import alive_nodes, check_nodes, has_several_nodes
from umbrella.conversations.schema import Conversation
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import SPLITS, RawSplits, read_splits
from umbrella.file_storage import FileStorage, is_remote, local_path
from umbrella.fileio import write_atomic
from umbrella.paths import VOLUMES
from umbrella.volumes.image_formats import image_size
from umbrella.volumes.store import VolumeStore

if TYPE_CHECKING:
    from umbrella.config import Settings

MIN_PARALLEL_BYTES = 2**26
"""Size of the volumes above which decoding uses several processes."""


@dataclass(frozen=True)
class Splits:
    """The checked conversations of a run."""

    train: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation] = field(default_factory=list)
    quarantined: int = 0
    """Number of bad samples that are left out."""
    quarantine: Path | None = None
    """JSON Lines file that lists the bad samples."""
    lengths: Mapping[str, np.ndarray] = field(default_factory=dict)
    """``Example.bucket_length`` of the conversations of each split: (size,), int32."""
    longest_answer: int = 0
    """Number of tokens of the longest assistant turn in the training split."""

    @property
    def quarantine_note(self) -> str:
        """The number of bad samples and the file that lists them; "" if there are none."""
        see = f", see {self.quarantine}" if self.quarantine else ""
        return f"{pluralise(self.quarantined, 'sample')} cannot be used{see}" if self.quarantined else ""

    @property
    def fingerprint(self) -> str:
        """Hash of the training and validation data; see ``fingerprint``."""
        return fingerprint({"train": self.train, "validation": self.validation})


def fingerprint(splits: Mapping[str, Sequence[Conversation]]) -> str:
    """Return a hash of all conversations and of the file name and size, not the folder, of each volume."""
    digest = hashlib.sha256()
    for split, conversations in splits.items():
        for conversation in conversations:
            content = conversation.model_dump(mode="json") | {"split": split}
            content["images"] = [
                (os.path.basename(v.image_path), os.path.getsize(v.image_path)) for v in conversation.volumes
            ]
            for turn in content["conversations"]:
                for item in turn["content"]:
                    item.pop("image_path", None)
            digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def load_splits(
    settings: "Settings",
    progress: ProgressBar,
    masks: Sequence[MaskPolicy] | None = None,
    shapes: Sequence["Settings"] | None = None,
    dry_run: bool = False,
) -> Splits:
    """Load and check the data of a run: read conversations, decode every volume into the store, render every sample.

    The split of the final evaluation (``evaluate.at_end``) is included.

    Args:
        settings: all settings.
        progress: progress bar for slow steps.
        masks: all mask policies of the run; the policy of ``settings`` if None.
        shapes: settings with all sets of modalities and all tokenizers of the run; ``settings`` if None. A sample is
            used only if it is usable with all of them.
        dry_run: do not decode volumes, and write nothing.

    Raises:
        UserError: the data has problems, one line each; see ``read_splits`` and ``apply_bad_sample_policy``.
    """
    final = {settings.evaluate.split} if settings.evaluate.at_end else set()
    names = [name for name in SPLITS if name in {"train", "validation"} | final]
    raw = read_splits(settings, progress, names, dry_run=dry_run)
    splits = check_splits(raw, settings, progress, masks, shapes, dry_run)
    for line in raw.notices:
        note(line)
    if splits.quarantine_note:
        note(splits.quarantine_note)
    return splits


def check_splits(
    raw: RawSplits,
    settings: "Settings",
    progress: ProgressBar,
    masks: Sequence[MaskPolicy] | None = None,
    shapes: Sequence["Settings"] | None = None,
    dry_run: bool = False,
) -> Splits:
    """Decode every volume, render every conversation, then apply ``data.on_bad`` to the bad samples.

    Args:
        raw: splits; changed in place.
        settings, progress, masks, shapes, dry_run: see ``load_splits``.

    Raises:
        UserError: see ``apply_bad_sample_policy`` and ``check_nodes``.
    """
    # Report bad conversations before the volumes are decoded, which may take an hour.
    apply_bad_sample_policy(raw, settings, write=False)
    if not dry_run:
        check_volumes(raw, settings, progress, shapes)
    lengths, longest_answer = check_rendering(raw, settings, progress, masks, shapes)
    return replace(
        apply_bad_sample_policy(raw, settings, write=not dry_run), lengths=lengths, longest_answer=longest_answer
    )


def open_store(settings: "Settings") -> VolumeStore:
    """Open the volume store. With ``resources.node_store`` or an object store, a local folder caches the shared one."""
    resources = settings.resources
    default = Path(resources.storage).absolute() / VOLUMES
    # Arrays are memory-mapped, so those of an object store need local copies.
    local = resources.node_store or (str(default) if is_remote(resources.store) else "")
    shared = FileStorage(resources.store or str(default)) if local else None
    folder = Path(local).absolute() if local else local_path(resources.store) if resources.store else default
    return VolumeStore(folder, settings.modalities, settings.data.max_voxels, shared)


def shared_folders(settings: "Settings") -> dict[str, Path]:
    """Return the folders that all nodes must share, by setting."""
    resources = settings.resources
    folders = {"resources.storage": Path(resources.storage).absolute()}
    if resources.store and not is_remote(resources.store):
        folders["resources.store"] = local_path(resources.store)
    return folders


def _sample_volumes(raw: RawSplits) -> list[Path]:
    """Return the first and last volume of each split, to check that every node can read them."""
    splits = [[v.image_path for c in conversations for v in c.volumes] for conversations in raw.splits.values()]
    return [Path(path).absolute() for paths in splits for path in sorted({*paths[:1], *paths[-1:]})]


def check_volumes(
    raw: RawSplits, settings: "Settings", progress: ProgressBar, shapes: Sequence["Settings"] | None = None
) -> None:
    """Decode every volume into the store, and exclude conversations with a volume that cannot be decoded.

    Unusual headers become notices, one for each kind with a count. On a cluster, all nodes decode.

    Args:
        raw: splits; changed in place.
        settings, progress, shapes: see ``load_splits``.

    Raises:
        UserError: the store cannot be written; see also ``check_nodes``.
    """
    open_store(settings)  # creates the folder
    check_nodes(shared_folders(settings), _sample_volumes(raw))
    for shape in {str(shape.modalities): shape for shape in shapes or [settings]}.values():
        store = open_store(shape)
        _fill_store(raw, store, settings.data.processes, progress)
    paths_of: dict[str, list[str]] = {}
    for path in sorted({v.image_path for cs in raw.splits.values() for c in cs for v in c.volumes}):
        for text in store.notes(path):
            paths_of.setdefault(text, []).append(path)
    raw.notices += [f"{pluralise(len(paths), 'volume')}, first {paths[0]}: {text}" for text, paths in paths_of.items()]


def _fill_store(raw: RawSplits, store: VolumeStore, processes: int, progress: ProgressBar) -> None:
    volumes = {(v.image_path, v.modality) for cs in raw.splits.values() for c in cs for v in c.volumes}
    new = sorted(volume for volume in volumes if not _is_stored(store, *volume))
    parallel = sum(map(_size, new)) > MIN_PARALLEL_BYTES
    try:
        reasons = decode_volumes(store, new, processes if parallel else 1)
        bad = {volume: why for volume, why in zip(progress(new, "decoding volumes"), reasons, strict=True) if why}
    except OSError as error:
        message = str(error.strerror or error)
        if message.startswith("resources.store="):  # see ``FileStorage``
            raise UserError(f"{message}; is it the right address, and are its credentials set?") from None
        raise UserError(f"{store.folder}: {message}; make room, or set resources.storage") from None
    excluded = {}
    for name, conversations in raw.splits.items():
        for c in conversations:
            used = [(v.image_path, v.modality) for v in c.volumes]
            if found := [("image_path", bad[volume]) for volume in used if volume in bad]:
                excluded[name, c.task_id] = found
    raw.exclude(excluded)


def check_rendering(
    raw: RawSplits,
    settings: "Settings",
    progress: ProgressBar,
    masks: Sequence[MaskPolicy] | None = None,
    shapes: Sequence["Settings"] | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """Render every conversation, and exclude those that are too long or cannot be rendered.

    Training conversations that have no supervised token under one of the mask policies are excluded too.

    Args:
        raw: splits; changed in place.
        settings, progress, masks, shapes: see ``load_splits``.

    Returns:
        ``Splits.lengths`` for the first of ``shapes``, and ``Splits.longest_answer`` over all of them.
    """
    from umbrella.data.masking import loss_weights
    from umbrella.data.rendering import load_renderer

    distinct = {(str(s.modalities), s.model.checkpoint, s.model.chat_template): s for s in shapes or [settings]}
    renderers = [load_renderer(shape) for shape in distinct.values()]
    used = (settings.mask,) if masks is None else masks
    # The other options of a policy change the weight of targets, not the set of targets.
    policies = {"train": {(mask.supervise, mask.end_of_turn, mask.turn_header): mask for mask in used}.values()}
    conversations = [(name, c) for name, split in raw.splits.items() for c in split]
    lengths: dict[str, list[int]] = {name: [] for name in raw.splits}
    reasons = {}
    longest_answer = 0
    for name, conversation in progress(conversations, "rendering conversations"):
        try:
            examples = [renderer.render(conversation) for renderer in renderers]
        except UserError as error:
            reasons[name, conversation.task_id] = [("conversations", str(error))]
            continue
        example = examples[0]
        without_target = [policy for policy in policies.get(name, ()) if not loss_weights(example, policy).any()]
        if without_target:
            reasons[name, conversation.task_id] = [("conversations", _no_target(policy)) for policy in without_target]
        else:
            lengths[name].append(example.bucket_length)
            if name == "train":
                longest_answer = max(longest_answer, *(e.longest_answer for e in examples))
    raw.exclude(reasons)
    return {name: np.array(of_split, np.int32) for name, of_split in lengths.items()}, longest_answer


def _no_target(policy: MaskPolicy) -> str:
    remedy = "choose another mask, correct the loss flags of its turns, or leave it out with data.on_bad=quarantine"
    return f"the mask policy ({policy.description}) supervises none of its tokens; {remedy}"


def apply_bad_sample_policy(raw: RawSplits, settings: "Settings", write: bool = True) -> Splits:
    """Refuse the data or quarantine the bad samples, according to ``data.on_bad``.

    Args:
        raw: the splits with their problems.
        settings: all settings.
        write: write the quarantine file, ``<storage>/quarantine-<hash of its content>.jsonl``.

    Raises:
        UserError: there is a problem and ``on_bad=fail``, a problem concerns a whole file, the fraction of bad samples
            exceeds ``data.max_bad_fraction``, or a split is empty.
    """
    data, problems = settings.data, raw.problems
    reasons: dict[str, list[str]] = {}
    for problem in problems:
        reasons.setdefault(problem.where, []).append(str(problem).removeprefix(f"{problem.where}: "))
    usable = sum(map(len, raw.splits.values()))
    if problems and (data.on_bad == "fail" or any(problem.sample is None for problem in problems)):
        raise UserError("\n".join(raw.problem_lines()))
    if len(reasons) > data.max_bad_fraction * (len(reasons) + usable):
        share = f"{len(reasons)} of {len(reasons) + usable} samples cannot be used, more than data.max_bad_fraction"
        last = f"{share}={data.max_bad_fraction:g}; repair them, or raise that"
        raise UserError("\n".join([*raw.problem_lines(), last]))
    empty = [f"data.{name}: holds no conversation that can be used" for name, cs in raw.splits.items() if not cs]
    if empty:
        raise UserError("\n".join([*raw.problem_lines(), *empty]))
    path = None
    if problems and write:
        samples = {problem.where: problem.sample for problem in problems}
        entries = [{"where": w, "reasons": reasons[w], "sample": samples[w]} for w in reasons]
        content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        name = f"quarantine-{hashlib.sha256(content).hexdigest()[:8]}.jsonl"
        path = Path(settings.resources.storage).absolute() / name
        write_atomic(path, content)
    return Splits(
        raw.splits.get("train", []),
        raw.splits.get("validation", []),
        raw.splits.get("test", []),
        quarantined=len(reasons),
        quarantine=path,
    )


def _is_stored(store: VolumeStore, path: str, modality: str) -> bool:
    try:
        return store.contains(path, modality)
    except UserError:  # reported when it is decoded
        return False


def _size(volume: tuple[str, str]) -> int:
    try:
        return image_size(volume[0])
    except OSError:
        return 0


VOLUMES_PER_TASK = 4
"""Larger groups make the progress bar jump; smaller ones cost more communication than work."""
Volume = tuple[str, str]
"""(path, modality)."""


def decode_volumes(store: VolumeStore, volumes: Sequence[Volume], processes: int) -> Iterator[str]:
    """Decode volumes into the store in parallel.

    Args:
        store: destination.
        volumes: volumes to decode.
        processes: number of parallel processes; 0 for one per CPU of this machine, or of the Ray cluster if this
            process has joined one with several nodes.

    Returns:
        For each volume, in order, the reason why it cannot be decoded; "" if it is stored.

    Raises:
        OSError: the store cannot be written.
    """
    if processes != 1 and has_several_nodes():
        return _decode_on_nodes(store, volumes, processes)
    jobs = processes or joblib.cpu_count()
    tasks = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=VOLUMES_PER_TASK if jobs > 1 else 1)
    return tasks(joblib.delayed(decode_volume)(store, *volume) for volume in volumes)


def decode_volume(store: VolumeStore, path: str, modality: str) -> str:
    """Decode a volume into the store. Return the reason why it cannot be decoded, or "" if it is stored."""
    try:
        store.get(path, modality)
    except UserError as error:
        return str(error)
    return ""


def _decode_on_nodes(store: VolumeStore, volumes: Sequence[Volume], processes: int) -> Iterator[str]:
    import ray

    # Ray prefers nodes without GPUs for tasks that need none.
    task = ray.remote(num_cpus=1)(_decode_group)
    groups = (volumes[start : start + VOLUMES_PER_TASK] for start in range(0, len(volumes), VOLUMES_PER_TASK))
    at_once = processes or 2 * int(sum(node["Resources"].get("CPU", 0) for node in alive_nodes()))
    pending = deque(task.remote(store, group) for group in islice(groups, at_once))
    while pending:
        try:
            yield from ray.get(pending.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        pending.extend(task.remote(store, group) for group in islice(groups, 1))


def _decode_group(store: VolumeStore, volumes: Sequence[Volume]) -> list[str]:
    return [decode_volume(store, *volume) for volume in volumes]
