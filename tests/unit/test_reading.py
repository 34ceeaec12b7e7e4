"""Reading: any stored form of a brain is the same brain, and a file that is none says so in one line."""

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
from scipy.io import netcdf_file

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.image_formats import MAX_EXTRA_BYTES
from umbrella.volumes.preprocessing import resample_to_grid
from umbrella.volumes.reading import content_hash, header_notes, read_volume
from umbrella.volumes.store import decode

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


def test_the_same_brain_reads_the_same_however_it_is_stored(stored: dict[str, Path], brain: np.ndarray) -> None:
    assert (stored["big_endian"].read_bytes()[:4], nib.load(stored["permuted"]).shape) == (b"\0\0\x01\x5c", (4, 7, 5))
    assert nib.load(stored["scaled"]).dataobj.slope == 0.5
    for name, path in stored.items():
        np.testing.assert_allclose(in_ras(path, brain.shape), brain, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "mgh", "mgz", "img", "hdr", "img.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_formats_and_types_that_nibabel_writes_are_read(tmp_path: Path, suffix: str, dtype: type) -> None:
    voxels = np.arange(60).reshape(5, 4, 3).astype(dtype)
    kind = nib.MGHImage if suffix.startswith("mg") else nib.Nifti1Pair if suffix[0] in "hi" else nib.Nifti1Image
    nib.save(kind(voxels, np.eye(4)), tmp_path / f"s.{suffix}")
    np.testing.assert_array_equal(in_ras(tmp_path / f"s.{suffix}", (5, 4, 3)), voxels)


def test_nifti_2_and_analyze_are_read(tmp_path: Path, brain: np.ndarray) -> None:
    for name, kind in {"two.nii.gz": nib.Nifti2Image, "two.nii": nib.Nifti2Image, "old.img": nib.AnalyzeImage}.items():
        # Analyze has no directions: nibabel holds its first axis for right to left.
        affine = np.diag([-1, 1, 1, 1]) if kind is nib.AnalyzeImage else np.eye(4)
        nib.save(kind(brain, affine), tmp_path / name)
        expected = brain[::-1] if kind is nib.AnalyzeImage else brain
        np.testing.assert_array_equal(in_ras(tmp_path / name, brain.shape), expected, err_msg=name)


def test_afni_is_read_with_its_factor_per_volume(tmp_path: Path) -> None:
    series = np.arange(48, dtype="<i2").reshape(4, 3, 2, 2)  # i, j, k, frame
    (tmp_path / "f+orig.BRIK").write_bytes(series.tobytes(order="F"))
    fields = {
        "DATASET_DIMENSIONS": ("integer", "4 3 2 0 0"),
        "DATASET_RANK": ("integer", "3 2 0 0 0 0 0 0"),
        "BRICK_TYPES": ("integer", "1 1"),
        "BRICK_FLOAT_FACS": ("float", "0.5 2.0"),
        "ORIENT_SPECIFIC": ("integer", "1 2 4"),  # L to R, P to A, I to S
        "ORIGIN": ("float", "0 0 0"),
        "DELTA": ("float", "2 2 2"),
        "IJK_TO_DICOM_REAL": ("float", "-2 0 0 0 0 -2 0 0 0 0 2 0"),
        "TAXIS_NUMS": ("integer", "2 0 77002"),
        "TAXIS_FLOATS": ("float", "0 2 0 0 0"),
    }
    text = "".join(
        f"\ntype = {t}-attribute\nname = {n}\ncount = {len(v.split())}\n {v}\n" for n, (t, v) in fields.items()
    )
    text += "\ntype = string-attribute\nname = BYTEORDER_STRING\ncount = 10\n'LSB_FIRST~\n"
    text += "\ntype = string-attribute\nname = TEMPLATE_SPACE\ncount = 5\n'ORIG~\n"
    text += "\ntype = integer-attribute\nname = SCENE_DATA\ncount = 8\n 0 11 1 -999 -999 -999 -999 -999\n"
    (tmp_path / "f+orig.HEAD").write_text(text)
    expected = np.moveaxis(series * np.array([0.5, 2.0]), -1, 0)
    for name in ("f+orig.HEAD", "f+orig.BRIK"):
        np.testing.assert_allclose(in_ras(tmp_path / name, (4, 3, 2, 2)), expected)


def write_minc_1(path: Path, names: tuple[str, ...], voxels: np.ndarray) -> None:
    """Dimensions of these names, slowest first; steps of 1; stored bytes 0..255 for values 0..51."""
    with netcdf_file(path, "w") as file:
        for name, size in zip(names, voxels.shape, strict=True):
            file.createDimension(name, size)
            variable = file.createVariable(name, "i", ())
            variable.step, variable.start, variable.spacing = 1.0, 0.0, b"regular__"
        image = file.createVariable("image", "b", names)
        image[:] = voxels.view(np.int8)
        image.valid_range, image.signtype = np.array([0.0, 255.0]), b"unsigned"
        for name, value in (("image-min", 0.0), ("image-max", 51.0)):
            file.createVariable(name, "d", names[:1])[:] = value


def write_minc_2(path: Path, names: tuple[str, ...], voxels: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        dimensions, info = (file.create_group(f"minc-2.0/{name}") for name in ("dimensions", "image/0"))
        for name, size in zip(names, voxels.shape, strict=True):
            dimensions.create_dataset(name, data=0).attrs.update(
                {"step": 1.0, "start": 0.0, "length": size, "spacing": np.bytes_("regular__")}
            )
        image = info.create_dataset("image", data=voxels)
        image.attrs.update({"dimorder": np.bytes_(",".join(names)), "valid_range": np.array([0.0, 255.0])})
        for name, value in (("image-min", 0.0), ("image-max", 51.0)):
            array = info.create_dataset(name, data=np.full(len(voxels), value))
            array.attrs["dimorder"] = np.bytes_(names[0])


@pytest.mark.parametrize("write", [write_minc_1, write_minc_2])
def test_minc_is_read_by_the_names_of_its_dimensions(tmp_path: Path, write: Callable) -> None:
    path, space = tmp_path / "s.mnc", ("zspace", "yspace", "xspace")
    voxels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10  # z, y, x
    write(path, space, voxels)
    np.testing.assert_allclose(in_ras(path, (4, 3, 2)), voxels.T / 5, atol=1e-5)
    assert header_notes(path) == ()
    series = np.arange(120, dtype=np.uint8).reshape(5, 2, 3, 4)  # time, z, y, x
    write(path, ("time", *space), series)
    np.testing.assert_allclose(in_ras(path, (4, 3, 2, 5)), series.transpose(0, 3, 2, 1) / 5, atol=1e-5)
    assert "time axis" in header_notes(path)[0]
    np.testing.assert_allclose(np.abs(read_volume(path, 4, LIMIT).affine[:3, :3]), np.eye(3)[::-1])
    write(path, ("vector_dimension", *space), series)
    assert refusal(path, 4).startswith("its dimensions are vector_dimension, zspace, yspace, xspace, which is not ")


@pytest.mark.parametrize("name", ["minc1_4d.mnc", "minc2_4d.mnc"])
def test_a_real_minc_series_has_its_time_last(name: str) -> None:
    path = Path(nib.__file__).with_name("tests") / "data" / name
    raw = read_volume(path, 4, LIMIT)
    assert (raw.voxels.shape, raw.orientation, raw.spacing) == ((10, 20, 20, 2), "SAR", (2, 2, 2))
    np.testing.assert_array_equal(np.moveaxis(raw.voxels, -1, 0), nib.load(path).get_fdata())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3), st.integers(1, 3))
def test_any_flip_and_permutation_of_axes_comes_back_to_ras(order: list[int], flips: tuple, frames: int) -> None:
    from umbrella.volumes.reading import RawVolume

    brain = np.arange(2 * 3 * 4 * frames, dtype=np.float32).reshape(2, 3, 4, frames)
    image = nib.Nifti1Image(brain, np.diag([1.5, 2, 3, 1]))
    turn = np.array([[order.index(axis), -1 if flips[axis] else 1] for axis in range(3)])
    turned = image.as_reoriented(turn)
    raw = RawVolume(turned.get_fdata(), 1.0, 0.0, turned.affine)
    back = resample_to_grid(raw, Modality(grid=(2, 3, 4, frames), patch=(1, 1, 1, 1)))[0]
    np.testing.assert_array_equal(back, np.moveaxis(brain, -1, 0))


def test_a_gzip_file_of_several_members_is_read_whole(tmp_path: Path, brain: np.ndarray) -> None:
    plain = save(tmp_path / "s.nii", brain).read_bytes()
    (tmp_path / "s.nii.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    np.testing.assert_array_equal(in_ras(tmp_path / "s.nii.gz", brain.shape), brain)


def test_further_axes_of_length_one_are_no_axes(tmp_path: Path, brain: np.ndarray) -> None:
    for extra in (brain[..., None], brain[..., None, None]):
        path = save(tmp_path / "one.nii.gz", extra)
        np.testing.assert_array_equal(in_ras(path, brain.shape), brain)


def test_the_wrong_number_of_axes_says_what_the_modality_wants(tmp_path: Path, brain: np.ndarray) -> None:
    assert refusal(save(tmp_path / "s.nii", brain), axes=4) == (
        "has 3 axes (7, 5, 4), one volume, and its modality is a series; correct the modality or the file"
    )
    assert refusal(save(tmp_path / "f.nii", np.stack([brain, brain], axis=-1))) == (
        "has 4 axes (7, 5, 4, 2), a series, and its modality has single volumes; correct the modality or the file"
    )
    five = np.zeros((2, 2, 2, 2, 2), np.float32)
    assert "neither a volume nor a series" in refusal(save(tmp_path / "5.nii", five))


@pytest.mark.parametrize(("size", "message"), [(32_000, "more than data.max_voxels=2147483648"), (0, "which is none")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_header_with_absurd_sizes_is_refused_before_decoding(
    tmp_path: Path, brain: np.ndarray, size: int, message: str, pack: object
) -> None:
    raw = bytearray(save(tmp_path / "s.nii", brain).read_bytes())
    raw[40:48] = struct.pack("<4h", 3, size, size, size)  # the header's dim
    path = tmp_path / ("s.nii.gz" if pack is gzip.compress else "s.nii")
    path.write_bytes(pack(bytes(raw)))
    assert refusal(path).startswith(f"the header claims ({size}, {size}, {size}) voxels, {message}; ")


def test_a_damaged_file_names_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "s.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 16)))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damaged in (whole[:9000], b"not gzip at all", bytes(flipped), b""):
        path.write_bytes(damaged)
        assert refusal(path).startswith("cannot be read as an image: ")
        assert refusal(path).endswith("copy or convert the file anew")
    path.unlink()
    assert refusal(path).startswith("cannot be read as an image: FileNotFoundError")
    plain = save(tmp_path / "s.nii", np.random.default_rng(0).normal(size=(16, 16, 16)))
    plain.write_bytes(plain.read_bytes()[:9000])
    assert refusal(plain).startswith("cannot be read as an image: ")


def test_voxels_that_mean_nothing_are_refused(tmp_path: Path, brain: np.ndarray) -> None:
    constant = save(tmp_path / "constant.nii", np.full_like(brain, 7))
    assert refusal(constant) == "every voxel is 7; there is nothing to see, leave it out"
    colours = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refusal(save(tmp_path / "rgb.nii", colours)).startswith("is a colour image, ")
    assert "complex64 voxels" in refusal(save(tmp_path / "complex.nii.gz", brain.astype(np.complex64)))
    brain[0, 0, 0], brain[1, 1, 1] = np.nan, np.inf
    assert (
        refusal(save(tmp_path / "nan.nii", brain))
        == "holds 2 voxels that are NaN or infinite; mask or repair the file, or set nan: background for its modality"
    )


def test_an_affine_without_directions_is_refused(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.Nifti1Image(brain, None)
    image.header.set_sform(np.diag([0, 2, 2, 1]), code="scanner")
    nib.save(image, tmp_path / "s.nii")
    assert "affine does not say where the axes point" in refusal(tmp_path / "s.nii")


def test_content_is_that_of_both_files_of_a_pair_and_not_of_their_names(tmp_path: Path, brain: np.ndarray) -> None:
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
def test_a_header_that_has_to_be_interpreted_is_read_and_noted(
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


def test_formats_without_directions_are_noted(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.AnalyzeImage(brain, np.diag([-1, 1, 1, 1])), tmp_path / "a.img")
    assert header_notes(tmp_path / "a.hdr") == ("orientation assumed: an Analyze header has none",)
    nib.save(nib.Spm99AnalyzeImage(brain, TWO), tmp_path / "spm.img")  # beside it there is an affine
    assert header_notes(tmp_path / "spm.img") == ()
    content = bytearray(nib.MGHImage(brain, TWO).to_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "s.mgz").write_bytes(gzip.compress(content))
    assert header_notes(tmp_path / "s.mgz") == ("orientation assumed: goodRASFlag is 0 in the header",)


def test_a_long_header_extension_is_skipped(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.Nifti1Image(brain, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", b"<AFNI_attributes/>" * 1000))
    for name in ("s.nii", "s.nii.gz"):
        nib.save(image, tmp_path / name)
        np.testing.assert_array_equal(in_ras(tmp_path / name, brain.shape), brain)


def gzipped(content: bytes) -> bytes:
    """Compressed, without the time: tests are named after it, and have one name in every process."""
    return gzip.compress(content, mtime=0)


LONG = nib.Nifti2Image(np.zeros((40_000, 1, 1), np.uint8), TWO).to_bytes()
SMALL = nib.Nifti1Image(np.arange(140, dtype=np.float32).reshape(7, 5, 4), TWO).to_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.nii", put(SMALL, (108, "f", 0.0)), "the header puts the voxels at byte 0 (vox_offset)"),
        ("s.nii.gz", gzipped(put(SMALL, (108, "f", 0.0))), "the header puts the voxels at byte 0 (vox_offset)"),
        (
            "s.nii",
            put(SMALL, (280, "f", 1001.0)),
            "the header claims voxels of 1001 x 2 x 2 mm, and edges are from 1 µm",
        ),
        ("s.nii", put(SMALL, (280, "f", 0.0009)), "the header claims voxels of 0.0009 x 2 x 2 mm"),
        ("s.nii", put(SMALL, (123, "B", 1)), "the header claims voxels of 2000 x 2000 x 2000 mm"),
        ("s.nii", put(SMALL, (284, "f", 1e38)), "its affine does not say where the axes point"),
        ("s.nii", put(SMALL, *BY_QFORM, (256, "3f", (0.0, 2.0, 0.0))), "the quaternion of its qform has length 2 "),
        ("s.nii", gzipped(SMALL), "cannot be read as an image: its content is compressed with gzip, "),
        ("s.nii.gz", SMALL, "cannot be read as an image: its name ends with .gz, and its content is not compressed"),
        (
            "s.nii",
            bytes(128) + b"DICM" + bytes(900),
            "cannot be read as an image: it is a DICOM file; convert the whole",
        ),
        ("s.dcm", bytes(900), "cannot be read as an image: it is a DICOM file; convert the whole series to NIfTI"),
        ("s.nii", LONG, "the header claims (40000, 1, 1) voxels, which no volume has"),
        ("s.dscalar.nii", b"", "cannot be read as an image: EOFError: the file is empty"),
        ("s.surf.gii", b"<?xml", "is a surface or a matrix (GIFTI, CIFTI) and not a volume; leave it out"),
    ],
)
def test_what_is_not_a_usable_volume_is_said_in_words(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(message)


def test_raw_diffusion_data_are_told_by_their_name(tmp_path: Path, brain: np.ndarray) -> None:
    series = np.stack([brain, brain], axis=-1)
    assert refusal(save(tmp_path / "sub-1_dwi.nii.gz", series)).startswith(
        "has 4 axes (7, 5, 4, 2), raw diffusion data, and its modality has single volumes: dMRI is a scalar map such as"
    )


def test_nan_and_infinity_become_the_background_where_the_modality_says_so(tmp_path: Path) -> None:
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
def test_what_a_header_claims_is_compared_with_the_file_before_memory_is_taken(
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


def test_no_more_of_a_compressed_file_is_unpacked_than_its_header_claims(tmp_path: Path, brain: np.ndarray) -> None:
    for name, pack in (("s.nii.gz", gzip.compress), ("s.nii.bz2", bz2.compress)):
        (tmp_path / name).write_bytes(pack(SMALL + bytes(4 * MAX_EXTRA_BYTES)))
        assert peak_of(lambda name=name: read_volume(tmp_path / name, 3, LIMIT)) < 2.5 * MAX_EXTRA_BYTES


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
        ("two.nii", nib.Nifti2Image),
        ("two.nii.gz", nib.Nifti2Image),
        ("s.mgz", nib.MGHImage),
        ("old.hdr", nib.AnalyzeImage),
        ("pair.hdr", nib.Nifti1Pair),
    ],
)
def test_a_damaged_file_is_read_or_refused_with_its_name_in_little_memory(
    tmp_path: Path, name: str, kind: type
) -> None:
    path, refusals = tmp_path / name, []
    nib.save(kind(np.arange(210, dtype=np.int16).reshape(5, 6, 7), np.diag([-2, 2, 2, 1])), path)
    whole = path.read_bytes()
    modality = Modality(grid=(4, 4, 4), patch=(2, 2, 2), fit="spacing", spacing=2.0)

    def read() -> None:
        try:
            decode(path, modality, LIMIT)
        except UserError as error:
            refusals.append(str(error))

    for seed in range(60):
        draw = np.random.default_rng(seed)
        inside = path.suffix in (".gz", ".mgz") and seed % 4
        path.write_bytes(gzip.compress(damaged(gzip.decompress(whole), draw), 1) if inside else damaged(whole, draw))
        assert peak_of(read) < 3 * MAX_EXTRA_BYTES
    assert 10 <= len(refusals) <= 50
    assert all(said.startswith(f"{path}: ") and "\n" not in said for said in refusals)
