"""Peak memory of all processes of a training, by number of 96^3 volumes and of epochs.

    .venv/bin/python benchmarks/memory.py

The measure is the proportional set size, in which shared memory counts once. Each training runs experiments/train.py
with an empty volume store; the files are small, so that one process decodes them.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil

RUNS = ((200, 1), (2000, 1), (200, 10), (200, 40))
"""(volumes, epochs); the others are compared with the first."""
TRAIN = Path(__file__).resolve().parent.parent / "experiments" / "train.py"


def make_cohort(folder: Path, size: int) -> None:
    """Write conversations about ``size`` training and 40 validation volumes. Files have 8^3 voxels, arrays 96^3."""
    for split, numbers in (("train", range(size)), ("validation", range(size, size + 40))):
        lines = []
        for number in numbers:
            voxels = np.random.default_rng(number).normal(size=(8, 8, 8)).astype(np.float32)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"{number}.nii")
            image = {"type": "image", "modality": "sMRI", "image_path": f"{number}.nii"}
            label = ("male", "female")[number % 2]
            sample = {
                "task_id": str(number),
                "task_type": "T1",
                "conversations": [
                    {"role": "user", "content": [image, {"type": "text", "text": "What is the sex of this subject?"}]},
                    {"role": "assistant", "content": f"{label}."},
                ],
                "metadata": {"subject_id": str(number), "subject_label": label},
            }
            lines.append(json.dumps(sample))
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def memory_of_tree(process: psutil.Process) -> int:
    """Memory in bytes of a process and its descendants."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # the process has ended
            continue
    return total


def peak(size: int, epochs: int) -> int:
    """Peak memory of a training in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cohort(folder, size)
        settings = [
            f"data.train={folder}/train.jsonl",
            f"data.validation={folder}/validation.jsonl",
            "modalities.sMRI={grid: [96, 96, 96], patch: [32, 32, 32]}",
            f"resources.storage={folder}/runs",
            f"train.epochs={epochs}",
        ]
        with (folder / "log").open("w") as log:
            command = [sys.executable, str(TRAIN), *settings]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
            highest = 0
            while process.poll() is None:
                highest = max(highest, memory_of_tree(psutil.Process(process.pid)))
                time.sleep(0.5)
        if process.returncode:
            raise SystemExit((folder / "log").read_text(encoding="utf-8")[-2000:])
    return highest


def main() -> None:
    """Measure and print."""
    first = 0
    for size, epochs in RUNS:
        start = time.perf_counter()
        found = peak(size, epochs)
        first = first or found
        took = f"{time.perf_counter() - start:.0f} s"
        peaks = f"peak {found / 2**20:.0f} MiB, ratio {found / first:.3f}"
        print(f"{size:>5} volumes, {epochs:>2} epochs: {peaks} ({took})", flush=True)


if __name__ == "__main__":
    main()
