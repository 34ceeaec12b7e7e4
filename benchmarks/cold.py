"""Decode conformed 256^3 uint8 .nii.gz files to 96^3 fp16 arrays: volumes per second on one core, compared with MONAI.

    .venv/bin/python -m pip install monai==1.6.1 && .venv/bin/python benchmarks/cold.py

Both read the same files from the page cache, alternately, in one process with one thread.
"""

import os

# numpy reads them at import.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from umbrella.modality import Modality  # noqa: E402
from umbrella.volumes.store import decode  # noqa: E402

SIZE, SLICES, GRID, FILES, ROUNDS = 256, 176, 96, 4, 8


def make_scan(path: Path, seed: int, stripped: bool) -> None:
    """Write the MNI152 head as a conformed scan of 176 slices: 256^3 at 1 mm, uint8, LIA, zero outside.

    Args:
        stripped: keep only the brain; otherwise the air around it has noise.
    """
    from nibabel.processing import conform
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=1)
    image = nib.Nifti1Image(200 * template.get_fdata() / template.get_fdata().max(), template.affine)
    head = conform(image, (SIZE,) * 3, (1, 1, 1), orientation="LIA")
    noise = np.random.default_rng(seed).normal(0, 4, (SIZE,) * 3)
    brain = head.get_fdata()
    scan = np.where(brain > 1, brain + noise, 0 if stripped else np.abs(noise))
    scan[: (SIZE - SLICES) // 2] = scan[(SIZE + SLICES) // 2 :] = 0
    nib.save(nib.Nifti1Image(np.clip(scan, 0, 255).astype(np.uint8), head.affine), path)


def seconds(work: Callable[[Path], object], files: list[Path]) -> float:
    """Seconds per volume."""
    start = time.perf_counter()
    for file in files:
        work(file)
    return (time.perf_counter() - start) / len(files)


def main() -> None:
    """Measure and print."""
    warnings.filterwarnings("ignore")
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, NormalizeIntensity, Orientation, Resize

    torch.set_num_threads(1)
    grid = (GRID,) * 3
    modality = Modality(grid=grid, patch=(16, 16, 16))
    load, channel, resize, normalise = (
        LoadImage(image_only=True),
        EnsureChannelFirst(),
        Resize(grid),
        NormalizeIntensity(),
    )
    theirs = Compose([load, channel, resize, normalise])
    turned = Compose([load, channel, Orientation("RAS", labels=None), resize, normalise])

    def ours(file: Path) -> np.ndarray:
        return decode(file, modality, 2**31)[3]

    with tempfile.TemporaryDirectory() as folder:
        for stripped in (True, False):
            files = [Path(folder) / f"{stripped}{seed}.nii.gz" for seed in range(FILES)]
            for seed, file in enumerate(files):
                make_scan(file, seed, stripped)
            pairs = zip(ours(files[0]).ravel(), np.asarray(turned(files[0])).ravel(), strict=True)
            correlation = np.corrcoef(np.array(list(pairs), np.float64).T)[0, 1]
            seconds(theirs, files[:1])
            times = [(seconds(ours, files), seconds(theirs, files)) for _ in range(ROUNDS)]
            mine, other = (statistics.median(of_one) for of_one in zip(*times, strict=True))
            print(
                f"{'brain only' if stripped else 'with noise in the air'}, {files[0].stat().st_size / 1e6:.1f} MB:"
                f" {1 / mine:.1f} volumes/s, MONAI {1 / other:.1f} volumes/s, ratio {other / mine:.2f}"
                f" (of the {ROUNDS} rounds {min(b / a for a, b in times):.2f} to {max(b / a for a, b in times):.2f}),"
                f" correlation {correlation:.4f}"
            )


if __name__ == "__main__":
    main()
