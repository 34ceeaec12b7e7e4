"""README, notebook and community files."""

import json
import re
from pathlib import Path

import pytest
import yaml

from umbrella.version import __version__

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_at_most_900_words_and_the_commands_of_a_checkout() -> None:
    assert len(README.split()) <= 900
    for command in ("make setup", "make test", "make tune"):
        assert command in README


def test_readme_and_citation_name_the_version() -> None:
    assert f"umbrella_mri-{__version__}-" in README
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md"])
def test_links_of_the_pages_outside_docs_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_notebook_is_small_and_names_no_absolute_path() -> None:
    text = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    assert len(text) < 200_000
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    parts = [part for output in outputs for part in (output, output.get("data", {}))]
    lines = [line for part in parts for kind in ("text", "text/plain", "text/html") for line in part.get(kind, [])]
    assert lines
    assert [line for line in lines if re.search(r"(^|[\s\"'(])/\w+/", line)] == []
