"""The data of a run: conversations of both splits, read and checked, and every volume brought into the store."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella.base import UserError
from umbrella.conversation import Conversation, read_conversations
from umbrella.volumes.store import VolumeStore

if TYPE_CHECKING:
    from umbrella.config import Settings

Progress = Callable[[Sequence, str], Iterable]
"""(things, what is done with them) to the same things, drawing a bar as they are taken."""


@dataclass(frozen=True)
class Splits:
    """Conversations to train on, and conversations that choose the best trial."""

    train: list[Conversation]
    validation: list[Conversation]

    @property
    def fingerprint(self) -> str:
        """Names the data: a hash of every conversation and of each volume's file name and size, not of its folder."""
        digest = hashlib.sha256()
        for split, conversations in (("train", self.train), ("validation", self.validation)):
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


def load_splits(settings: "Settings", progress: Progress) -> Splits:
    """Read both splits; without ``data.train``, the phantom cohort's, which is made when it is not there yet.

    Raises:
        UserError: every problem of the files; a subject in both splits; a split with nothing left after the filters.
    """
    data = settings.data
    if not data.train:
        from umbrella.cohort.phantom import make_cohort

        folder = phantom_folder(settings)
        make_cohort(folder, settings.cohort, lambda subjects: progress(list(subjects), "making the phantom cohort"))
        train, validation = (folder / "conversations" / f"{name}.jsonl" for name in ("train", "validation"))
        root: Path | None = folder
    elif not data.validation:
        raise UserError("data.validation is not set: name the conversations that choose the best trial")
    else:
        train, validation, root = Path(data.train), Path(data.validation), Path(data.root) if data.root else None
    splits = Splits(
        *(
            _keep(read_conversations(path, root, settings.modalities), settings, str(path))
            for path in (train, validation)
        )
    )
    shared = {c.subject_id for c in splits.train} & {c.subject_id for c in splits.validation}
    if shared:
        raise UserError(
            f"{len(shared)} subjects are in both data.train and data.validation, {sorted(shared)[0]} among them:"
            " split by subject, or the validation score means nothing"
        )
    return splits


def count_samples(settings: "Settings") -> dict[str, int]:
    """How many conversations each split has. Nothing is made: a phantom cohort that is not there is only drawn."""
    if settings.data.train or (phantom_folder(settings) / "cohort.json").exists():
        splits = load_splits(settings, lambda things, what: things)
        return {"train": len(splits.train), "validation": len(splits.validation)}
    from umbrella.cohort.questions import draw_subjects, split_conversations

    subjects = draw_subjects(settings.cohort)
    counts = {}
    for name in ("train", "validation"):
        drawn = split_conversations([s for s in subjects if s.split == name], settings.cohort.seed)
        everything = [Conversation.model_validate(sample) for sample in drawn]
        counts[name] = len(_keep(everything, settings, f"the phantom cohort's {name} split"))
    return counts


def phantom_folder(settings: "Settings") -> Path:
    """Where the phantom cohort lies: a folder per cohort settings, so that another cohort never meets this one."""
    key = hashlib.sha256(settings.cohort.model_dump_json().encode()).hexdigest()[:8]
    return Path(settings.resources.storage).absolute() / f"phantom-{key}"


def open_store(settings: "Settings") -> VolumeStore:
    """The volume store of the storage folder."""
    folder = Path(settings.resources.storage).absolute() / "volumes"
    return VolumeStore(folder, settings.modalities, settings.data.max_voxels)


def fill_store(splits: Splits, store: VolumeStore, progress: Progress) -> int:
    """Decode every volume that is not in the store yet; returns the number of distinct volumes.

    Raises:
        UserError: naming every volume that cannot be used.
    """
    volumes = sorted({(v.image_path, v.modality) for c in [*splits.train, *splits.validation] for v in c.volumes})
    problems = []
    for path, modality in progress(volumes, "reading volumes"):
        try:
            store.get(path, modality)
        except UserError as error:  # noqa: PERF203
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return len(volumes)


def _keep(everything: Sequence[Conversation], settings: "Settings", where: str) -> list[Conversation]:
    """What the filters of ``data`` leave of a split."""
    data = settings.data
    kept = [
        c
        for c in everything
        if (not data.modality or all(v.modality == data.modality for v in c.volumes))
        and (not data.task_filter or c.task_type == data.task_filter or data.task_filter in c.task_id)
    ]
    if not kept:
        filters = f"data.modality={data.modality!r} and data.task_filter={data.task_filter!r}"
        raise UserError(f"{where}: none of its {len(everything)} conversations is left after {filters}")
    return kept
