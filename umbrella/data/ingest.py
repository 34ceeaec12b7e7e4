"""From what was read to what is used: every volume tried, bad samples refused or quarantined, the data named."""

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
from umbrella.conversations.schema import Conversation
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import SPLITS, RawSplits, read_splits
from umbrella.file_storage import FileStorage, is_remote, local_path
from umbrella.nodes import alive_nodes, check_nodes, has_several_nodes
from umbrella.paths import quarantine_file, volumes_folder
from umbrella.volumes.image_formats import image_size
from umbrella.volumes.store import VolumeStore
from umbrella.volumes.store_files import write_atomic

if TYPE_CHECKING:
    from umbrella.config import Settings

WORTH_PROCESSES = 2**26
"""Bytes of volumes to decode from which on it pays to start processes for them."""


@dataclass(frozen=True)
class Splits:
    """Conversations to train on, conversations that choose the best trial, and those kept for the end."""

    train: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation] = field(default_factory=list)
    quarantined: int = 0
    """Samples that were left out because they cannot be used."""
    quarantine: Path | None = None
    """The JSON Lines file that lists them."""
    lengths: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Split to its conversations' ``Example.bucket_length``, (size,) each."""
    longest_answer: int = 0
    """Tokens of the longest assistant turn of the training split, see ``Example.longest_answer``."""

    @property
    def left_out(self) -> str:
        """How many samples cannot be used, and where they are listed; empty if all can."""
        see = f", see {self.quarantine}" if self.quarantine else ""
        return f"{pluralise(self.quarantined, 'sample')} cannot be used{see}" if self.quarantined else ""

    @property
    def fingerprint(self) -> str:
        """Names the data: a hash of every conversation and of each volume's file name and size, not of its folder."""
        return fingerprint({"train": self.train, "validation": self.validation})


def fingerprint(splits: Mapping[str, Sequence[Conversation]]) -> str:
    """As ``Splits.fingerprint``, of any splits."""
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
    """The data of a run, all of it checked: conversations read, every volume decoded into the store.

    What a training asks at its end (``evaluate.at_end``) is checked before its start.

    Args:
        masks: every mask policy that the run trains with; the settings' own when None.
        shapes: settings with every set of modalities, and every tokenizer, that the run trains with; the settings
            themselves when None. A sample that cannot be used with one of them is used with none.
        dry_run: check everything but the volumes, and write nothing.

    Raises:
        UserError: every problem found, one line each; see ``read_splits`` and ``apply_bad_sample_policy``.
    """
    asked = {settings.evaluate.split} if settings.evaluate.at_end else set()
    names = [name for name in SPLITS if name in {"train", "validation"} | asked]
    raw = read_splits(settings, progress, names, dry_run=dry_run)
    splits = check_splits(raw, settings, progress, masks, shapes, dry_run)
    for line in raw.notices:
        note(line)
    if splits.left_out:
        note(splits.left_out)
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
        masks, shapes, dry_run: as in ``load_splits``.

    Raises:
        UserError: as ``apply_bad_sample_policy`` and ``check_nodes``.
    """
    # With bad conversations and on_bad=fail the run is over: better said now than after an hour of decoding.
    apply_bad_sample_policy(raw, settings, write=False)
    if not dry_run:
        check_volumes(raw, settings, progress, shapes)
    lengths, longest_answer = check_rendering(raw, settings, progress, masks, shapes)
    return replace(
        apply_bad_sample_policy(raw, settings, write=not dry_run), lengths=lengths, longest_answer=longest_answer
    )


def open_store(settings: "Settings") -> VolumeStore:
    """The volume store of the settings; with a folder of this node's in front of it, where there is to be one."""
    resources = settings.resources
    own = volumes_folder(resources.storage)
    # Arrays are read as they lie: of an object store there have to be copies.
    front = resources.node_store or (str(own) if is_remote(resources.store) else "")
    behind = FileStorage(resources.store or str(own)) if front else None
    folder = Path(front).absolute() if front else local_path(resources.store) if resources.store else own
    return VolumeStore(folder, settings.modalities, settings.data.max_voxels, behind)


def shared_folders(settings: "Settings") -> dict[str, Path]:
    """The folders that every node must see, by their settings."""
    resources = settings.resources
    folders = {"resources.storage": Path(resources.storage).absolute()}
    if resources.store and not is_remote(resources.store):
        folders["resources.store"] = local_path(resources.store)
    return folders


def _some_volumes(raw: RawSplits) -> list[Path]:
    """The first and the last volume of each split: enough to see whether a node has what they lie on."""
    splits = [[v.image_path for c in conversations for v in c.volumes] for conversations in raw.splits.values()]
    return [Path(path).absolute() for paths in splits for path in sorted({*paths[:1], *paths[-1:]})]


def check_volumes(
    raw: RawSplits, settings: "Settings", progress: ProgressBar, shapes: Sequence["Settings"] | None = None
) -> None:
    """Bring every volume into the store; conversations about a volume that cannot be used are set aside.

    What is unusual in the headers of the others becomes a notice of the raw, one for each kind with a count.
    The nodes of a cluster that this process has joined do so, after each was asked whether it sees what it needs.

    Args:
        shapes: as in ``load_splits``.

    Raises:
        UserError: as ``check_nodes``; the store cannot be written.
    """
    open_store(settings)  # it makes its folder
    check_nodes(shared_folders(settings), _some_volumes(raw))
    for shape in {str(shape.modalities): shape for shape in shapes or [settings]}.values():
        store = open_store(shape)
        _fill_store(raw, store, settings.data.processes, progress)
    noted: dict[str, list[str]] = {}
    for path in sorted({v.image_path for cs in raw.splits.values() for c in cs for v in c.volumes}):
        for words in store.notes(path):
            noted.setdefault(words, []).append(path)
    raw.notices += [f"{pluralise(len(paths), 'volume')}, first {paths[0]}: {words}" for words, paths in noted.items()]


def _fill_store(raw: RawSplits, store: VolumeStore, processes: int, progress: ProgressBar) -> None:
    everything = {(v.image_path, v.modality) for cs in raw.splits.values() for c in cs for v in c.volumes}
    new = sorted(volume for volume in everything if not _is_ready(store, *volume))
    many = sum(map(_size, new)) > WORTH_PROCESSES
    try:
        done = zip(progress(new, "decoding volumes"), decode_volumes(store, new, processes if many else 1), strict=True)
        bad = {volume: reason for volume, reason in done if reason}
    except OSError as error:
        said = str(error.strerror or error)
        if said.startswith("resources.store="):  # see ``FileStorage``
            raise UserError(f"{said}; is it the right address, and are its credentials set?") from None
        raise UserError(f"{store.folder}: {said}; make room, or set resources.storage") from None
    raw.exclude(
        {
            (name, c.task_id): reasons
            for name, conversations in raw.splits.items()
            for c in conversations
            if (
                reasons := [
                    ("image_path", bad[v.image_path, v.modality])
                    for v in c.volumes
                    if (v.image_path, v.modality) in bad
                ]
            )
        }
    )


def check_rendering(
    raw: RawSplits,
    settings: "Settings",
    progress: ProgressBar,
    masks: Sequence[MaskPolicy] | None = None,
    shapes: Sequence["Settings"] | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """Render every conversation, and set aside what cannot be used.

    Set aside is what is too long or cannot be rendered, and in the training split what one of the masks, as in
    ``load_splits``, leaves without a target: it would cost a place in every epoch and teach nothing.

    Returns:
        ``Splits.lengths``, of the first shape, and ``Splits.longest_answer``, over all shapes.
    """
    from umbrella.data.masking import loss_weights
    from umbrella.data.rendering import load_renderer

    written = {(str(s.modalities), s.model.checkpoint, s.model.chat_template): s for s in shapes or [settings]}
    renderers = [load_renderer(shape) for shape in written.values()]
    used = (settings.mask,) if masks is None else masks
    # What else a policy says makes targets heavier or lighter, and no target of what is none.
    policies = {"train": {(mask.supervise, mask.end_of_turn, mask.turn_header): mask for mask in used}.values()}
    everything = [(name, c) for name, conversations in raw.splits.items() for c in conversations]
    lengths: dict[str, list[int]] = {name: [] for name in raw.splits}
    reasons = {}
    longest_answer = 0
    for name, conversation in progress(everything, "rendering conversations"):
        try:
            examples = [renderer.render(conversation) for renderer in renderers]
        except UserError as error:
            reasons[name, conversation.task_id] = [("conversations", str(error))]
            continue
        example = examples[0]
        blind = [policy for policy in policies.get(name, ()) if not loss_weights(example, policy).any()]
        if blind:
            reasons[name, conversation.task_id] = [("conversations", _no_target(policy)) for policy in blind]
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
    """Refuse the data, or go on without the bad samples, as ``data.on_bad`` says.

    Args:
        write: write the quarantine file, ``<storage>/quarantine-<hash of its content>.jsonl``.

    Raises:
        UserError: a problem with ``on_bad=fail``; one that is not of single samples; more bad samples than
            ``data.max_bad_fraction``; an empty split.
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
        path = quarantine_file(settings.resources.storage, hashlib.sha256(content).hexdigest()[:8])
        write_atomic(path, content)
    return Splits(
        raw.splits.get("train", []),
        raw.splits.get("validation", []),
        raw.splits.get("test", []),
        quarantined=len(reasons),
        quarantine=path,
    )


def _is_ready(store: VolumeStore, path: str, modality: str) -> bool:
    try:
        return store.contains(path, modality)
    except UserError:  # trying to decode it says what is wrong
        return False


def _size(volume: tuple[str, str]) -> int:
    try:
        return image_size(volume[0])
    except OSError:
        return 0


VOLUMES_PER_TASK = 4
"""Volumes to a task. Larger groups would make the bar jump, smaller ones cost more in talk than they do in work."""
Volume = tuple[str, str]
"""A path, and its modality."""


def decode_volumes(store: VolumeStore, volumes: Sequence[Volume], processes: int) -> Iterator[str]:
    """Bring volumes into the store; of each, in order, why it cannot be used. Empty where it can, and is there now.

    Args:
        processes: as many at once; 0: one per CPU, of this machine or of the cluster that this process has joined.

    Raises:
        OSError: the store cannot be written.
    """
    if processes != 1 and has_several_nodes():
        return _decode_on_nodes(store, volumes, processes)
    jobs = processes or joblib.cpu_count()
    tasks = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=VOLUMES_PER_TASK if jobs > 1 else 1)
    return tasks(joblib.delayed(decode_volume)(store, *volume) for volume in volumes)


def decode_volume(store: VolumeStore, path: str, modality: str) -> str:
    """Why a volume cannot be used; empty where it can, and is in the store now."""
    try:
        store.get(path, modality)
    except UserError as error:
        return str(error)
    return ""


def _decode_on_nodes(store: VolumeStore, volumes: Sequence[Volume], processes: int) -> Iterator[str]:
    import ray

    # Ray itself gives what asks for no GPU to nodes without one, as long as they have a CPU free.
    task = ray.remote(num_cpus=1)(_decode_group)
    groups = (volumes[start : start + VOLUMES_PER_TASK] for start in range(0, len(volumes), VOLUMES_PER_TASK))
    at_once = processes or 2 * int(sum(node["Resources"].get("CPU", 0) for node in alive_nodes()))
    asked = deque(task.remote(store, group) for group in islice(groups, at_once))
    while asked:
        try:
            yield from ray.get(asked.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        asked.extend(task.remote(store, group) for group in islice(groups, 1))


def _decode_group(store: VolumeStore, volumes: Sequence[Volume]) -> list[str]:
    return [decode_volume(store, *volume) for volume in volumes]
