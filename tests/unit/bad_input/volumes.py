"""Volumes that are not there, cannot be read, or cannot be used."""

import numpy as np

from tests.unit.bad_input.dataset import (
    BRAIN,
    SERIES,
    B,
    D,
    a_folder,
    case,
    file,
    gone,
    half_a_pair,
    header,
    nii,
    pack,
    packed,
    spoiled,
)

B_NII, D_NII = f"{B}image_path: b.nii: ", f"{D}image_path: d.nii.gz: "
B_UNREADABLE, D_UNREADABLE = (
    f"{start}cannot be read as an image: ...; copy or convert the file anew" for start in (B_NII, D_NII)
)
PACKED = pack(nii(SERIES))
RESCALE = ", too large or too small to compute with; rescale the file"

VOLUMES = [
    case("missing", gone("b.nii"), f"{B}image_path: b.nii does not exist; see `data.root` and `data.path_map`"),
    case("a folder", a_folder, f"{B}image_path: b.nii is a folder; name the image file"),
    case(
        "half of a pair",
        half_a_pair,
        f"{B}image_path: b.hdr: b.img: No such file or directory; see data.root and data.path_map",
    ),
    case("a text", file("b.nii", "Hello"), B_UNREADABLE),
    case("no bytes", file("b.nii", ""), B_UNREADABLE),
    case("cut short in the header", file("b.nii", nii(BRAIN)[:300]), B_UNREADABLE),
    case("cut short", file("b.nii", nii(BRAIN)[:400]), B_UNREADABLE),
    case("packed, cut short", file("d.nii.gz", PACKED[:-20]), D_UNREADABLE),
    case("packed after it was cut short", file("d.nii.gz", pack(nii(SERIES)[:500])), D_UNREADABLE),
    case("packed, a wrong checksum", file("d.nii.gz", PACKED[:-8] + bytes(4) + PACKED[-4:]), D_UNREADABLE),
    case(
        "not packed",
        file("d.nii.gz", nii(SERIES)),
        f"{D_NII}cannot be read as an image: its name ends with .gz, and its content is not compressed; take .gz ...",
    ),
    case("of an unknown type", header(70, "h", 9999), B_UNREADABLE),
    case(
        "three axes for a series",
        packed(BRAIN),
        f"{D_NII}has 3 axes (5, 4, 4), one volume, and its modality is a series; correct the modality or the file",
    ),
    case(
        "four axes for a volume",
        file("b.nii", nii(SERIES)),
        f"{B_NII}has 4 axes (4, 4, 4, 8), a series, and its modality has single volumes; correct ...",
    ),
    case(
        "five axes",
        file("b.nii", nii(SERIES.reshape(4, 4, 4, 4, 2))),
        f"{B_NII}has 5 axes (4, 4, 4, 4, 2), neither a volume nor a series; correct the modality or the file",
    ),
    case(
        "too short a series",
        packed(SERIES[..., :5]),
        f"{D_NII}has 5 frames, and a window of 6 frames at frame_stride 1 needs 6; give its modality a ...",
    ),
    case("NaN", file("b.nii", nii(spoiled(np.nan, 1))), f"{B_NII}holds 1 voxels that are NaN or infinite; mask or ..."),
    case(
        "infinite",
        file("b.nii", nii(spoiled(np.inf, 3))),
        f"{B_NII}holds 3 voxels that are NaN or infinite; mask or ...",
    ),
    case(
        "beyond float32",
        file("b.nii", nii(BRAIN.astype(np.float64) * 1e300)),
        f"{B_NII}its values are up to inf{RESCALE}",
    ),
    case("scaled beyond float32", header(112, "f", 3e38), f"{B_NII}its values are up to 2.274e+40{RESCALE}"),
    case("scaled to next to nothing", header(112, "f", 1e-40), f"{B_NII}its values are up to 7.57996e-39{RESCALE}"),
    case(
        "one value",
        file("b.nii", nii(spoiled(7, 80))),
        f"{B_NII}every voxel is 7; there is nothing to see, leave it out",
    ),
    case(
        "one value on the grid",
        file("b.nii", nii(np.pad(BRAIN, ((0, 20), (0, 0), (0, 0))))),
        f"{B_NII}every voxel is 0 on its modality's grid (4, 4, 4); check fit and spacing, or leave it out",
        "modalities.sMRI.fit=spacing",
        "modalities.sMRI.spacing=1",
    ),
    case(
        "nothing but background",
        file("b.nii", nii(np.pad(BRAIN[:1] * 0 + 1, ((2, 2), (0, 0), (0, 0))))),
        f"{B_NII}holds nothing but its background 0 and one other value; check background",
        "modalities.sMRI.intensity=zscore_foreground",
    ),
    case(
        "percentiles that meet",
        file("b.nii", nii(np.pad(BRAIN[:1], ((9, 9), (0, 0), (0, 0))))),
        f"{B_NII}percentiles (0.0, 10.0) are both 0; widen them, or leave the volume out",
        "modalities.sMRI={intensity: percentiles, percentiles: [0, 10]}",
    ),
    case(
        "complex numbers",
        file("b.nii", nii(BRAIN.astype(np.complex64))),
        f"{B_NII}holds complex64 voxels, and a volume has one real number per voxel; convert the file",
    ),
    case(
        "colours",
        file("b.nii", nii(np.zeros((5, 4, 4), [(colour, "u1") for colour in "RGB"]))),
        f"{B_NII}is a colour image, and a volume has one number per voxel; convert it to grey values",
    ),
    case(
        "absurd sizes",
        header(40, "4h", 3, 30000, 30000, 30000),
        f"{B_NII}the header claims (30000, 30000, 30000) voxels, more than data.max_voxels=2147483648; raise ...",
    ),
    case(
        "an axis of no length",
        header(40, "4h", 3, 0, 4, 4),
        f"{B_NII}the header claims (0, 4, 4) voxels, which is none; the file is damaged",
    ),
    case(
        "a singular affine",
        header(296, "4f", 0, 0, 0, 0),
        f"{B_NII}its affine does not say where the axes point; write a proper one into the header",
    ),
    case(
        "an affine with a huge shear",
        header(284, "f", 1e38),
        f"{B_NII}its affine does not say where the axes point; write a proper one into the header",
    ),
]
