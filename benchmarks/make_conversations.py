"""Time and memory of make_conversations.py on raw BIDS trees of empty files: one T1w each, sex and age.

python benchmarks/make_conversations.py 10000 40000
"""

import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "make_conversations.py"


def make_tree(folder: Path, subjects: int) -> None:
    """Make the tree, with half of the subjects of each sex."""
    rng, rows = random.Random(0), ["participant_id\tsex\tage"]
    for number in range(subjects):
        name = f"sub-{number:06d}"
        (folder / name / "anat").mkdir(parents=True)
        (folder / name / "anat" / f"{name}_T1w.nii.gz").touch()
        rows.append(f"{name}\t{'MF'[number % 2]}\t{rng.randint(20, 80)}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")


for size in map(int, sys.argv[1:]):
    with tempfile.TemporaryDirectory() as temporary:
        make_tree(tree := Path(temporary) / "ds", size)
        begun = time.monotonic()
        words = [str(tree), "--targets", "sex,age", "--output", f"{temporary}/conversations"]
        subprocess.run([sys.executable, str(SCRIPT), *words], check=True, stdout=subprocess.DEVNULL)
        seconds, peak = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"{size} subjects: {seconds:.0f} s, peak memory {peak:.0f} MiB", flush=True)
