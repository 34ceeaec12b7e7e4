"""Builders of raw samples, and a small valid data set of four volumes."""

import copy
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

BRAIN = np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4)
SERIES = np.arange(4 * 4 * 4 * 8, dtype=np.float32).reshape(4, 4, 4, 8)


def sample(name: str = "t", path: str = "a.nii", modality: str = "sMRI", **others: Any) -> dict[str, Any]:
    """A v2 sample: one question about one volume. Subjects a, c and e are female."""
    image = {"type": "image", "modality": modality, "image_path": path}
    sex = "female" if name in ("a", "c", "e") else "male"
    return {
        "task_id": f"{name}/sex",
        "task_type": "T1",
        "images": [{"path": path, "token": "<image>", "modality": modality}],
        "conversations": [
            {"role": "user", "content": [image, {"type": "text", "text": "Sex?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"{sex}."}]},
        ],
        "metadata": {"subject_id": name, "subject_label": sex, "target": "sex"},
        **others,
    }


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values at dotted places; the value ``...`` removes the key."""
    raw = copy.deepcopy(raw)
    for place, value in changes.items():
        *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        into: Any = raw
        for key in parents:
            into = into[key]
        into[last] = value
        if value is ...:
            del into[last]
    return raw


def write_lines(file: Path, *samples: Any) -> Path:
    file.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    return file


def nii(voxels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    return nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_bytes()


def write_data(folder: Path) -> None:
    """Two samples each in train.jsonl and validation.jsonl, with a volume each; the last one is a series."""
    folder.mkdir()
    for i, name in enumerate("abc"):
        (folder / f"{name}.nii").write_bytes(nii(BRAIN + i))
    nib.save(nib.Nifti1Image(SERIES, np.eye(4)), folder / "d.nii.gz")
    write_lines(folder / "train.jsonl", sample("a", "a.nii"), sample("b", "b.nii"))
    write_lines(folder / "validation.jsonl", sample("c", "c.nii"), sample("d", "d.nii.gz", "fMRI"))
