"""Reading: all formats give the same voxels and axes; files that are no volume are refused with one line."""

import bz2
import gzip
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.preprocessing import resample_to_grid
from umbrella.volumes.reading import MAX_EXTRA_BYTES, RawVolume, header_notes, read_volume
from umbrella.volumes.store import decode
from umbrella.volumes.store_files import content_hash

LIMIT = 2**31


def save(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def in_ras(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The volume on a grid of its own size, which changes nothing but the axes: (X, Y, Z), or (T, X, Y, Z)."""
    modality = Modality(grid=shape, patch=(1,) * len(shape))
    return resample_to_grid(read_volume(path, len(shape), LIMIT), modality)[0]


def put(content: bytes, *fields: tuple[int, str, Any]) -> bytes:
    """Other values at bytes of a NIfTI-1 header: 40 dim, 76 pixdim, 108 vox_offset, 123 xyzt_units, 252 qform_code,
    254 sform_code, 256 quaternion, 284 the second value of the sform's first row."""
    changed = bytearray(content)
    for place, form, values in fields:
        struct.pack_into(f"<{form}", changed, place, *np.atleast_1d(values).tolist())
    return bytes(changed)


def refusal(path: Path, axes: int = 3) -> str:
    with pytest.raises(UserError) as caught:
        read_volume(path, axes, LIMIT)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_axes_scaling_and_byte_order_are_undone(stored: dict[str, Path], brain: np.ndarray) -> None:
    assert (stored["big_endian"].read_bytes()[:4], nib.load(stored["permuted"]).shape) == (b"\0\0\x01\x5c", (4, 7, 5))
    assert nib.load(stored["scaled"]).dataobj.slope == 0.5
    for name, path in stored.items():
        np.testing.assert_allclose(in_ras(path, brain.shape), brain, rtol=1e-6, err_msg=name)


LAS = np.diag([-1, 1, 1, 1])
FORMATS: dict[str, tuple[type, np.ndarray]] = {
    **dict.fromkeys(("s.nii", "s.nii.gz", "s.nii.bz2"), (nib.Nifti1Image, np.eye(4))),
    **dict.fromkeys(("two.nii", "two.nii.gz"), (nib.Nifti2Image, np.eye(4))),
    **dict.fromkeys(("s.mgh", "s.mgz"), (nib.MGHImage, np.eye(4))),
    **dict.fromkeys(("s.img", "s.hdr", "s.img.gz"), (nib.Nifti1Pair, np.eye(4))),
    # nibabel assumes that the first axis of an Analyze image runs from right to left.
    "old.img": (nib.AnalyzeImage, LAS),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_formats_and_types_that_nibabel_writes_are_read(
    tmp_path: Path, brain: np.ndarray, name: str, dtype: type
) -> None:
    kind, affine = FORMATS[name]
    voxels = brain.astype(dtype)
    nib.save(kind(voxels, affine), tmp_path / name)
    np.testing.assert_array_equal(in_ras(tmp_path / name, brain.shape), voxels[::-1] if affine is LAS else voxels)


EXAMPLES = Path(nib.__file__).with_name("tests") / "data"


@pytest.mark.parametrize("name", ["tiny.mnc", "small.mnc", "minc1_4d.mnc", "minc2_4d.mnc"])
def test_minc_volumes_have_their_time_last(name: str) -> None:
    expected, axes = nib.load(EXAMPLES / name).get_fdata(), 4 if "4d" in name else 3
    raw = read_volume(EXAMPLES / name, axes, LIMIT)
    np.testing.assert_array_equal(raw.voxels, np.moveaxis(expected, 0, -1) if axes == 4 else expected)
    assert [note.partition(" comes first")[0] for note in header_notes(EXAMPLES / name)] == ["the time axis"] * (
        axes - 3
    )
    assert axes == 3 or (raw.orientation, raw.spacing) == ("SAR", (2, 2, 2))


@pytest.mark.parametrize(
    ("name", "shape"), [("example4d+orig.HEAD", (33, 41, 25, 3)), ("scaled+tlrc.BRIK", (47, 54, 43))]
)
def test_afni_volumes_are_scaled(name: str, shape: tuple) -> None:
    image = nib.load(EXAMPLES / name.replace("BRIK", "HEAD"))
    raw = read_volume(EXAMPLES / name, len(shape), LIMIT)
    assert (raw.voxels.shape, raw.orientation) == (shape, "".join(nib.aff2axcodes(image.affine)))
    np.testing.assert_array_equal(raw.voxels, image.get_fdata().reshape(shape))


def test_minc_dimensions_other_than_space_and_time_are_refused(tmp_path: Path) -> None:
    path = Path(shutil.copy(EXAMPLES / "minc2_4d.mnc", tmp_path))
    with h5py.File(path, "r+") as file:
        file.move("minc-2.0/dimensions/time", "minc-2.0/dimensions/vector_dimension")
        names = np.bytes_("vector_dimension,zspace,yspace,xspace")
        file["minc-2.0/image/0/image"].attrs["dimorder"] = names
    assert refusal(path, 4).startswith("its dimensions are vector_dimension, zspace, yspace, xspace, which is not ")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3), st.integers(1, 3))
def test_any_flip_and_permutation_of_axes_is_reoriented_to_ras(order: list[int], flips: tuple, frames: int) -> None:
    brain = np.arange(2 * 3 * 4 * frames, dtype=np.float32).reshape(2, 3, 4, frames)
    image = nib.Nifti1Image(brain, np.diag([1.5, 2, 3, 1]))
    turn = np.array([[order.index(axis), -1 if flips[axis] else 1] for axis in range(3)])
    turned = image.as_reoriented(turn)
    raw = RawVolume(turned.get_fdata(), 1.0, 0.0, turned.affine)
    back = resample_to_grid(raw, Modality(grid=(2, 3, 4, frames), patch=(1, 1, 1, 1)))[0]
    np.testing.assert_array_equal(back, np.moveaxis(brain, -1, 0))


def test_gzip_members_header_extensions_and_trailing_axes_are_read(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.Nifti1Image(brain[..., None, None], np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", b"<AFNI_attributes/>" * 1000))
    plain, packed = tmp_path / "s.nii", tmp_path / "s.nii.gz"
    nib.save(image, plain)
    content = plain.read_bytes()
    packed.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    for path in (plain, packed):
        np.testing.assert_array_equal(in_ras(path, brain.shape), brain)


def test_content_hash_is_of_both_files_of_a_pair_and_not_of_their_names(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.Nifti1Pair(brain, np.eye(4)), tmp_path / "a.img")
    assert content_hash(tmp_path / "a.img") == content_hash(tmp_path / "a.hdr")
    for suffix in ("img", "hdr"):
        shutil.copy(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert content_hash(tmp_path / "b.img") == content_hash(tmp_path / "a.img")
    nib.save(nib.Nifti1Pair(brain, np.diag([2, 1, 1, 1])), tmp_path / "c.img")  # another header, the same voxels
    assert content_hash(tmp_path / "c.img") != content_hash(tmp_path / "a.img")


TWO = np.diag([2.0, 2, 2, 1])
LEFT = (256, "3f", (0.0, 1.0, 0.0))  # half a turn about the second axis
BY_QFORM, BY_BOTH = ((252, "2h", (1, 0)), (76, "f", 1.0)), ((252, "2h", (1, 1)), (76, "f", 1.0))


@pytest.mark.parametrize(
    ("fields", "orientation", "note"),
    [
        ([], "RAS", ""),
        ([(252, "2h", (0, 0))], "LAS", "orientation assumed: qform_code and sform_code are 0 in the header"),
        ([*BY_QFORM, LEFT], "LAI", ""),
        ([*BY_QFORM, (256, "3f", (0.0, 1.0000005, 0.0))], "LAI", "the quaternion of the qform is longer than 1"),
        ([*BY_QFORM, (256, "3f", (0.0, 1.00002, 0.0))], "LAI", "the quaternion of the qform is longer than 1"),
        ([*BY_BOTH, (256, "3f", (0.0, 1.00002, 0.0))], "RAS", "orientation assumed: qform and sform contradict"),
        ([*BY_BOTH, LEFT], "RAS", "orientation assumed: qform and sform contradict each other"),
        ([*BY_BOTH, (76, "f", -1.0)], "RAS", "orientation assumed: qform and sform contradict each other"),
        ([*BY_BOTH, (256, "3f", (0.0, 0.1, 0.0))], "RAS", ""),
        ([(123, "B", 3)], "RAS", "the unit in the header is micrometres"),
        ([(123, "B", 1)], "RAS", "the unit in the header is metres"),
        ([(123, "B", 10)], "RAS", ""),
    ],
)
def test_unusual_headers_are_read_with_a_note(
    tmp_path: Path, brain: np.ndarray, fields: list, orientation: str, note: str
) -> None:
    path = tmp_path / "s.nii"
    scale = {3: 1000.0, 1: 0.001}.get(fields[0][2], 1.0) if fields and fields[0][0] == 123 else 1.0
    affine = np.diag([2 * scale, 2 * scale, 2 * scale, 1])
    path.write_bytes(put(nib.Nifti1Image(brain, affine).to_bytes(), *fields))
    raw = read_volume(path, 3, LIMIT)
    assert raw.orientation == orientation
    np.testing.assert_allclose(raw.spacing, 2, rtol=1e-6)
    notes = header_notes(path)
    assert len(notes) == bool(note)
    assert all(found.startswith(note) for found in notes)


def test_assumed_orientations_are_noted(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.AnalyzeImage(brain, np.diag([-1, 1, 1, 1])), tmp_path / "a.img")
    assert header_notes(tmp_path / "a.hdr") == ("orientation assumed: an Analyze header has none",)
    nib.save(nib.Spm99AnalyzeImage(brain, TWO), tmp_path / "spm.img")  # beside it there is an affine
    assert header_notes(tmp_path / "spm.img") == ()
    content = bytearray(nib.MGHImage(brain, TWO).to_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "s.mgz").write_bytes(gzip.compress(content))
    assert header_notes(tmp_path / "s.mgz") == ("orientation assumed: goodRASFlag is 0 in the header",)


def gzipped(content: bytes) -> bytes:
    """Compressed, without the time: tests are named after it, and have one name in every process."""
    return gzip.compress(content, mtime=0)


LONG = nib.Nifti2Image(np.zeros((40_000, 1, 1), np.uint8), TWO).to_bytes()
SERIES = nib.Nifti1Image(np.arange(280, dtype=np.float32).reshape(7, 5, 4, 2), TWO).to_bytes()
SMALL = nib.Nifti1Image(np.arange(140, dtype=np.float32).reshape(7, 5, 4), TWO).to_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.nii", put(SMALL, (108, "f", 0.0)), "the header puts the voxels at byte 0 (vox_offset)"),
        ("s.nii", put(SMALL, (280, "f", 1001.0)), "the header claims voxels of 1001 x 2 x 2 mm, and edges are from 1"),
        ("s.nii", put(SMALL, (280, "f", 0.0009)), "the header claims voxels of 0.0009 x 2 x 2 mm"),
        ("s.nii", put(SMALL, *BY_QFORM, (256, "3f", (0.0, 2.0, 0.0))), "the quaternion of its qform has length 2 "),
        ("s.nii", gzipped(SMALL), "cannot be read as an image: its content is compressed with gzip, "),
        ("s.nii.gz", SMALL, "cannot be read as an image: its name ends with .gz, and its content is not compressed"),
        ("s.nii", bytes(128) + b"DICM" + bytes(900), "cannot be read as an image: it is a DICOM file; convert the "),
        ("s.dcm", bytes(900), "cannot be read as an image: it is a DICOM file; convert the whole series to NIfTI"),
        ("s.nii", LONG, "the header claims (40000, 1, 1) voxels, which no volume has"),
        ("s.dscalar.nii", b"", "cannot be read as an image: EOFError: the file is empty"),
        ("s.surf.gii", b"<?xml", "is a surface or a matrix (GIFTI, CIFTI) and not a volume; leave it out"),
        ("sub-1_dwi.nii", SERIES, "has 4 axes (7, 5, 4, 2), raw diffusion data, and its modality has single volumes: "),
    ],
)
def test_files_that_are_no_volume_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(message)


def test_nan_background_replaces_nan_and_infinity(tmp_path: Path) -> None:
    voxels = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    whole = save(tmp_path / "whole.nii", np.where(voxels < 2, 5, voxels))
    spoiled = save(tmp_path / "spoiled.nii", np.choose(np.minimum(voxels, 2).astype(int), (np.nan, -np.inf, voxels)))
    modality = Modality(grid=(4, 4, 4), patch=(2, 2, 2), background=5, nan="background")
    np.testing.assert_array_equal(decode(spoiled, modality, LIMIT)[3], decode(whole, modality, LIMIT)[3])
    every = save(tmp_path / "every.nii", np.full((4, 4, 4), np.nan))
    with pytest.raises(UserError, match="every voxel is 5"):
        decode(every, modality, LIMIT)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that Python and NumPy held at most while some work was done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = put(SMALL, (40, "4h", (3, 1290, 1290, 1290)))
FAR = put(SMALL, (108, "f", 4e9))
PAIR = nib.Nifti1Pair(np.ones((7, 5, 4), np.float32), TWO)
MGH = nib.MGHImage(np.ones((7, 5, 4), np.float32), TWO).to_bytes()
HUGE_MGH = MGH[:4] + struct.pack(">4i", 1290, 1290, 1290, 1) + MGH[20:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.nii", HUGE),
        ("s.nii.gz", gzipped(HUGE)),
        ("s.nii.bz2", bz2.compress(HUGE)),
        ("s.mgh", HUGE_MGH),
        ("s.mgz", gzipped(HUGE_MGH)),
        ("s.img", HUGE[:344] + b"ni1\0"),  # the header's file, with the voxels of a small image beside it
        ("s.nii", FAR),
        ("s.nii.gz", gzipped(FAR)),
    ],
)
def test_headers_are_compared_with_the_file_before_memory_is_allocated(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    if name == "s.img":
        nib.save(PAIR, path)
        path.with_suffix(".hdr").write_bytes(put(content, (108, "f", 0.0)))
    else:
        path.write_bytes(content)
    said = []
    assert peak_of(lambda: said.append(refusal(path))) < 8 * 2**20
    assert "the header claims 8586756" in said[0] or "the header puts the voxels at byte 4000000000" in said[0]


def test_compressed_files_are_unpacked_only_as_far_as_the_header_claims(tmp_path: Path) -> None:
    path = tmp_path / "s.nii.gz"
    path.write_bytes(gzip.compress(SMALL + bytes(4 * MAX_EXTRA_BYTES), 1))
    assert peak_of(lambda: read_volume(path, 3, LIMIT)) < 2.5 * MAX_EXTRA_BYTES


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """A file with some bytes of its header changed, cut short, or with bytes behind it."""
    changed, way = bytearray(content), draw.integers(5)
    if way == 3:
        del changed[draw.integers(len(changed)) :]
    elif way == 4:
        changed += draw.bytes(int(draw.integers(1, 4000)))
    for _ in range(draw.integers(1, 9) if way < 3 else 0):
        changed[draw.integers(min(len(changed), 600))] = draw.choice([0, 1, 127, 128, 255, draw.integers(256)])
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("s.nii", nib.Nifti1Image),
        ("s.nii.gz", nib.Nifti1Image),
        ("two.nii.gz", nib.Nifti2Image),
        ("s.mgz", nib.MGHImage),
        ("old.hdr", nib.AnalyzeImage),
    ],
)
def test_damaged_files_are_read_or_refused_in_little_memory(tmp_path: Path, name: str, kind: type) -> None:
    path, refusals = tmp_path / name, []
    nib.save(kind(np.arange(210, dtype=np.int16).reshape(5, 6, 7), np.diag([-2, 2, 2, 1])), path)
    whole = path.read_bytes()
    modality = Modality(grid=(4, 4, 4), patch=(2, 2, 2), fit="spacing", spacing=2.0)

    def read() -> None:
        try:
            decode(path, modality, LIMIT)
        except UserError as error:
            refusals.append(str(error))

    for seed in range(20):
        draw = np.random.default_rng(seed)
        inside = path.suffix in (".gz", ".mgz") and seed % 4
        path.write_bytes(gzip.compress(damaged(gzip.decompress(whole), draw), 1) if inside else damaged(whole, draw))
        assert peak_of(read) < 3 * MAX_EXTRA_BYTES
    assert 3 <= len(refusals) <= 17
    assert all(said.startswith(f"{path}: ") and "\n" not in said for said in refusals)
