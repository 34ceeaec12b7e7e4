"""A small good data set, and ways to break it in one place; each table of this folder is a row per way.

A row has the line that prepare.py says to it. There ``...`` stands for any text of the line, and the folder of the data
is left out. ``xfail`` says what is said instead, or what happens.
"""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

Break = Callable[[Path], Any]
BRAIN = np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4)
SERIES = np.arange(4 * 4 * 4 * 8, dtype=np.float32).reshape(4, 4, 4, 8)


def sample(name: str, path: str, modality: str = "sMRI") -> dict[str, Any]:
    image = {"type": "image", "modality": modality, "image_path": path}
    sex = "female" if name in ("a", "c") else "male"
    return {
        "task_id": f"{name}/sex",
        "task_type": "T1",
        "images": [{"path": path, "modality": modality}],
        "conversations": [
            {"role": "user", "content": [image, {"type": "text", "text": "Sex?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"{sex}."}]},
        ],
        "metadata": {"subject_id": name, "subject_label": sex, "target": "sex"},
    }


def nii(voxels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    return nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_bytes()


def pack(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def write_good(folder: Path) -> None:
    """Two samples in train.jsonl, two in validation.jsonl, a volume each: the last one is a packed series."""
    for i, name in enumerate("abc"):
        (folder / f"{name}.nii").write_bytes(nii(BRAIN + i))
    (folder / "d.nii.gz").write_bytes(pack(nii(SERIES)))
    samples = {
        "train": [sample("a", "a.nii"), sample("b", "b.nii")],
        "validation": [sample("c", "c.nii"), sample("d", "d.nii.gz", "fMRI")],
    }
    for split, of_split in samples.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, of_split)))


def file(name: str, content: str | bytes) -> Break:
    """A file with another content."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def packed(voxels: np.ndarray) -> Break:
    """Another series."""
    return file("d.nii.gz", pack(nii(voxels)))


def header(place: int, form: str, *values: float) -> Break:
    """b.nii with other values at a byte of its header: 40 dim, 70 datatype, 112 slope, 252 qform_code and
    sform_code, 284 the affine's first shear, 296 its second row."""
    content = bytearray(nii(BRAIN))
    struct.pack_into("<" + form, content, place, *values)
    return file("b.nii", bytes(content))


def line(written: Any, name: str = "train.jsonl") -> Break:
    """Another second line: a text as it is, anything else as JSON."""

    def change(folder: Path) -> None:
        first = (folder / name).read_text().split("\n")[0]
        (folder / name).write_text(first + "\n" + (written if isinstance(written, str) else json.dumps(written)))

    return change


def put(*changes: Any, name: str = "train.jsonl") -> Break:
    """Other values at places of the second sample: place, value, place, value; the value ``...`` takes it out."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / name).read_text().split("\n")[1])
        for place, value in zip(changes[::2], changes[1::2], strict=True):
            *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
            into = raw
            for key in parents:
                into = into[key]
            into[last] = value
            if value is ...:
                del into[last]
        line(raw, name)(folder)

    return change


def put_path(path: Any) -> Break:
    return put(f"{IMAGE}.image_path", path, "images.0.path", path)


def llava(text: str, *images: str, **others: Any) -> Break:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "male."}]
    return line({"id": "b/sex", "image": list(images), "conversations": turns, **others})


def gone(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def nothing(folder: Path) -> None:
    """The data are good; the words are not."""


def half_a_pair(folder: Path) -> None:
    nib.save(nib.Nifti1Pair(BRAIN, np.eye(4)), folder / "b.hdr")
    (folder / "b.img").unlink()
    put_path("b.hdr")(folder)


def a_folder(folder: Path) -> None:
    (folder / "b.nii").unlink()
    (folder / "b.nii").mkdir()


def case(name: str, change: Break, expected: str, *words: str, xfail: str = "") -> Any:
    """One row of the table; DATA in the words is the folder."""
    marks = [pytest.mark.xfail(strict=True, reason=xfail)] if xfail else []
    return pytest.param(change, expected, words, id=name, marks=marks)


def spoiled(value: float, count: int) -> np.ndarray:
    """The brain with so many voxels of another value."""
    voxels = BRAIN.copy()
    voxels.flat[:count] = value
    return voxels


TURN, IMAGE, TEXT, ANSWER = (
    f"conversations.{at}" for at in ("0.content", "0.content.0", "0.content.1.text", "1.content")
)
B, D = "train.jsonl:2: ", "validation.jsonl:2: "
"""Where the sample is that the breaks are about, and that of the series."""
HALF = "'\\ud800' is not Unicode text: half of a character is missing; write it anew"
