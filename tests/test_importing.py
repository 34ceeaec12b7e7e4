"""Python's collector does not look at imports: not while they are made, and not afterwards."""

import gc
import subprocess
import sys
import textwrap

import pytest

from umbrella.importing import importing

KEEP = """
    import gc

    gc.freeze()  # as Python 3.12 begins
    before = gc.get_freeze_count()
    from umbrella.training import job

    job._keep_imports()
    kept = gc.get_freeze_count()
    later = [[number] for number in range(1000)]
    job._keep_imports()
    print(kept > before + 10_000, gc.get_freeze_count() <= kept)
"""


def test_the_collector_rests_in_an_import_and_works_again_after_one_that_fails() -> None:
    seen = []

    def imports() -> None:
        with importing():
            seen.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        imports()
    assert [*seen, gc.isenabled()] == [False, True]


def test_a_process_keeps_its_imports_once_whatever_python_kept_before() -> None:
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(KEEP)], capture_output=True, text=True, timeout=120)
    assert said.stdout == "True True\n", said.stderr
