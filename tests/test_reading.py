"""Reading: any stored form of a brain is the same brain, and a file that is none says so in one line."""

import gzip
import shutil
import struct
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import netcdf_file

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.preparing import on_grid
from umbrella.volumes.reading import content_id, read_volume

LIMIT = 2**31


def save(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def in_ras(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The volume on a grid of its own size, which changes nothing but the axes: (X, Y, Z), or (T, X, Y, Z)."""
    modality = Modality(grid=shape, patch=(1,) * len(shape))
    return on_grid(read_volume(path, len(shape), LIMIT), modality)[0]


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


def minc(group: object, voxels: np.ndarray) -> None:
    """The dimensions of a MINC file, z slowest, 1 mm, stored bytes 0..255 for values 0..51."""
    for axis, size in zip(("zspace", "yspace", "xspace"), voxels.shape, strict=True):
        group.createDimension(axis, size)
        variable = group.createVariable(axis, "i", ())
        variable.step, variable.start, variable.spacing = 1.0, 0.0, b"regular__"
    image = group.createVariable("image", "b", ("zspace", "yspace", "xspace"))
    image[:] = voxels.view(np.int8)
    image.valid_range, image.signtype = np.array([0.0, 255.0]), b"unsigned"
    for name, value in (("image-min", 0.0), ("image-max", 51.0)):
        group.createVariable(name, "d", ("zspace",))[:] = value


def test_minc_1_and_2_are_read(tmp_path: Path) -> None:
    voxels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10  # z, y, x
    with netcdf_file(tmp_path / "one.mnc", "w") as file:
        minc(file, voxels)
    with h5py.File(tmp_path / "two.mnc", "w") as file:
        dimensions, info = (file.create_group(f"minc-2.0/{name}") for name in ("dimensions", "image/0"))
        for axis, size in zip(("zspace", "yspace", "xspace"), voxels.shape, strict=True):
            dimensions.create_dataset(axis, data=0).attrs.update(
                {"step": 1.0, "start": 0.0, "length": size, "spacing": np.bytes_("regular__")}
            )
        image = info.create_dataset("image", data=voxels)
        image.attrs.update({"dimorder": np.bytes_("zspace,yspace,xspace"), "valid_range": np.array([0.0, 255.0])})
        for name, value in (("image-min", 0.0), ("image-max", 51.0)):
            info.create_dataset(name, data=np.full(2, value)).attrs["dimorder"] = np.bytes_("zspace")
    for name in ("one.mnc", "two.mnc"):
        np.testing.assert_allclose(in_ras(tmp_path / name, (4, 3, 2)), voxels.T / 5, atol=1e-5, err_msg=name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3), st.integers(1, 3))
def test_any_flip_and_permutation_of_axes_comes_back_to_ras(order: list[int], flips: tuple, frames: int) -> None:
    from umbrella.volumes.reading import RawVolume

    brain = np.arange(2 * 3 * 4 * frames, dtype=np.float32).reshape(2, 3, 4, frames)
    image = nib.Nifti1Image(brain, np.diag([1.5, 2, 3, 1]))
    turn = np.array([[order.index(axis), -1 if flips[axis] else 1] for axis in range(3)])
    turned = image.as_reoriented(turn)
    raw = RawVolume(turned.get_fdata(), 1.0, 0.0, turned.affine)
    back = on_grid(raw, Modality(grid=(2, 3, 4, frames), patch=(1, 1, 1, 1)))[0]
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
        assert refusal(path).endswith("; copy or convert the file anew")
    path.unlink()
    assert refusal(path).startswith("cannot be read as an image: FileNotFoundError")
    plain = save(tmp_path / "s.nii", np.random.default_rng(0).normal(size=(16, 16, 16)))
    plain.write_bytes(plain.read_bytes()[:9000])
    assert refusal(plain).startswith("cannot be read as an image: ")


def test_voxels_that_mean_nothing_are_refused(tmp_path: Path, brain: np.ndarray) -> None:
    constant = save(tmp_path / "constant.nii", np.full_like(brain, 7))
    assert refusal(constant) == "every voxel is 7; there is nothing to see, leave it out"
    colours = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refusal(save(tmp_path / "rgb.nii", colours)).endswith("one real number per voxel; convert the file")
    assert "complex64 voxels" in refusal(save(tmp_path / "complex.nii.gz", brain.astype(np.complex64)))
    brain[0, 0, 0], brain[1, 1, 1] = np.nan, np.inf
    assert (
        refusal(save(tmp_path / "nan.nii", brain)) == "holds 2 voxels that are NaN or infinite; mask or repair the file"
    )


def test_an_affine_without_directions_is_refused(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.Nifti1Image(brain, None)
    image.header.set_sform(np.diag([0, 2, 2, 1]), code="scanner")
    nib.save(image, tmp_path / "s.nii")
    assert "affine does not say where the axes point" in refusal(tmp_path / "s.nii")


def test_content_is_that_of_both_files_of_a_pair_and_not_of_their_names(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.Nifti1Pair(brain, np.eye(4)), tmp_path / "a.img")
    assert content_id(tmp_path / "a.img") == content_id(tmp_path / "a.hdr")
    for suffix in ("img", "hdr"):
        shutil.copy(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert content_id(tmp_path / "b.img") == content_id(tmp_path / "a.img")
    nib.save(nib.Nifti1Pair(brain, np.diag([2, 1, 1, 1])), tmp_path / "c.img")  # another header, the same voxels
    assert content_id(tmp_path / "c.img") != content_id(tmp_path / "a.img")
