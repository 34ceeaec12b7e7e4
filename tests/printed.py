"""Lines that scripts print."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

KNOWN = [
    r"\d\d:\d\d(:\d\d)?  \S.*",  # state of a training or trial
    r"step \d+/\d+  epoch .*",
    r"(samples|volumes|loss|mask|supervised|trained weights|best checkpoint|checkpoints|runs in MLflow): .*",
    r" +(system|user|assistant) (header|text|image|end) +\d+ of \d+",
    r"\w+: a volume of [\dx]+ in patches of [\dx]+ is \d+ tokens",
    r"(making the synthetic cohort|decoding volumes|rendering conversations|answering conversations) ━+ \d+/\d+ [\d:]+",
    r"stopped by the keyboard",
    r"Ray dashboard, while this runs: http://[\w.:]+( \(token: ray get-auth-token\))?",
]


def unknown_lines(text: str) -> list[str]:
    """The lines of a text that match no known pattern."""
    return [line for line in text.splitlines() if line and not re.fullmatch("|".join(KNOWN), line.rstrip())]


@contextmanager
def printed_to(file: Path) -> Iterator[None]:
    """Append the output of this process, also that of libraries in C++, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with file.open("a", buffering=1, encoding="utf-8") as into, redirect_stdout(into), redirect_stderr(into):
        os.dup2(into.fileno(), 1)
        os.dup2(into.fileno(), 2)
        try:
            yield
        finally:
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)
