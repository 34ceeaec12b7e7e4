"""The page of the demo, in Chromium."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import EXPERIMENTS, MODALITIES, make_conversation
from umbrella.conversations.schema import ImageItem
from umbrella.data.batching import Collator
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.demo import serve, view_volumes
from umbrella.evaluation_run.evaluate import load_evaluation_settings
from umbrella.modality import Modality
from umbrella.volumes.store import DecodedVolumes, VolumeStore

pytestmark = pytest.mark.acceptance
expect.set_options(timeout=120_000)  # in milliseconds; a busy machine is slow


def write_volume(file: Path, value: float) -> Path:
    """A head of 4 x 4 x 4 voxels with one voxel of another value."""
    voxels = np.random.default_rng([*file.name.encode()]).normal(size=(4, 4, 4)).astype(np.float32)
    voxels[1, 1, 1] = value
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
    return file


@pytest.fixture(scope="module")
def checkpoint(
    build: Callable[..., Any],
    teach: Callable[..., None],
    save_model: Callable[..., Path],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint that has learnt the sex of four subjects, with its data."""
    folder = tmp_path_factory.mktemp("demo")
    samples = []
    for i, sex in enumerate(("male", "female") * 2):
        subject = f"sub-{i + 1:02d}"
        file = write_volume(folder / f"{subject}_T1w.nii.gz", 9 if sex == "male" else -9)
        metadata = {"subject_id": subject, "subject_label": sex, "target": "sex"}
        turns = (("user", [("sMRI", file), "Sex?"]), ("assistant", f"{sex}."))
        samples.append(make_conversation(*turns, task_id=subject, metadata=metadata))
    files = {}
    for name, of_split in {"train": samples[:2], "validation": samples[:2], "test": samples[2:]}.items():
        files[f"data.{name}"] = [str(folder / f"{name}.jsonl")]
        Path(files[f"data.{name}"][0]).write_text("".join(c.model_dump_json() + "\n" for c in of_split))
    model, renderer = build(width=32), Renderer(tokenizer, MODALITIES)
    examples = [renderer.render(c) for c in samples]
    teach(model, Collator(renderer, DecodedVolumes(MODALITIES, 1000))(examples, MaskPolicy()), 100)
    return save_model(folder / "training", model, **files, **{"resources.storage": str(folder / "runs")})


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    with serve(load_evaluation_settings(checkpoint)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without root's sandbox, which containers do not allow.
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page; at the end, nothing may have been requested from another host."""
    page, requested = browser.new_page(viewport={"width": 1600, "height": 1000}), []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    expect(page.get_by_text("Research use only")).to_be_visible()
    yield page
    assert [url for url in requested if not url.startswith((address, "data:", "blob:", "about:"))] == []
    page.close()


def drop(page: Page, *files: Path) -> None:
    page.locator("input[type=file]").set_input_files(files)


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Question", exact=True).press("Enter")


def chats(page: Page) -> list[list[str]]:
    """The turns about the volumes, and about blank ones."""
    turns = [chat.locator("[data-testid=user], [data-testid=bot]") for chat in page.get_by_role("log").all()]
    return [[text.strip() for text in of_one.all_inner_texts()] for of_one in turns]


def probabilities(page: Page) -> list[tuple[str, int]]:
    """The candidates and their percentages: first about the volumes, then about blank ones."""
    terms, shares = (page.get_by_role(role).all_inner_texts() for role in ("term", "definition"))
    return [(text.strip(), int(share.strip(" %"))) for text, share in zip(terms, shares, strict=True)]


def test_volumes_are_answered_beside_blank_ones_with_probabilities(page: Page, tmp_path: Path) -> None:
    about_blank = []
    for sex, other, value in (("male.", "female.", 9), ("female.", "male.", -9)):
        drop(page, write_volume(tmp_path / f"sub-{value}_T1w.nii.gz", value))
        expect(page.get_by_text(f"sMRI, sub-{value}_T1w.nii.gz, 4 × 4 × 4 voxels")).to_be_visible()
        ask(page, "Sex?")
        expect(page.get_by_role("log").first).to_contain_text(sex)
        own, blank = chats(page)
        assert own == ["Sex?", sex]
        first, second, *others = probabilities(page)
        assert (first[0], second[0]) == (sex, other)
        assert 50 < first[1] == 100 - second[1]
        assert dict(others).keys() == {"male.", "female."}
        about_blank.append((blank, others))
        page.get_by_role("button", name="Clear").first.click()
        expect(page.locator("iframe")).to_have_count(0)
        assert chats(page) == [[], []], "other volumes begin a new conversation"
    assert about_blank[0] == about_blank[1], "it does not depend on the volumes"


def test_a_follow_up_is_asked_with_the_previous_turns(page: Page, tmp_path: Path) -> None:
    drop(page, write_volume(tmp_path / "sub-07_T1w.nii.gz", 9))
    expect(page.locator("iframe")).to_be_visible()
    for number, question in enumerate(("Sex?", "And sex?"), 1):
        ask(page, question)
        expect(page.get_by_role("log").first.get_by_test_id("bot")).to_have_count(number)
    own, blank = chats(page)
    assert own[0] == blank[0] == "Sex?"
    assert own[2] == blank[2] == "And sex?"
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_test_id("bot")).to_have_count(0)
    expect(page.locator("iframe")).to_be_visible()


def test_a_test_subject_is_picked_and_own_candidates_are_scored(page: Page) -> None:
    page.get_by_label("or a test subject").click()
    assert [re.sub(r"^\W+", "", text) for text in page.get_by_role("option").all_inner_texts()] == [
        "sub-03: sMRI",
        "sub-04: sMRI",
    ]
    page.get_by_role("option", name="sub-04").click()
    expect(page.get_by_text("sMRI, sub-04_T1w.nii.gz")).to_be_visible()
    page.get_by_label("Candidate answers").fill("male., 12, female.")
    ask(page, "Sex?")
    expect(page.get_by_role("log").first).to_contain_text("female.")
    assert {text for text, _ in probabilities(page)} == {"male.", "female.", "12"}


def test_the_overlay_has_a_legend_and_names_its_answer(page: Page, tmp_path: Path) -> None:
    drop(page, write_volume(tmp_path / "sub-07_T1w.nii.gz", 9))
    expect(page.locator("iframe")).to_be_visible()
    look = page.get_by_role("button", name="Show where the model looks")
    look.click()
    expect(page.get_by_text("ask a question first")).to_be_visible()
    ask(page, "Sex?")
    expect(page.get_by_role("log").first).to_contain_text("male.")
    look.click()
    expect(page.get_by_text("Where the model looks, for its answer “male.”")).to_be_visible()
    expect(page.get_by_text("without this patch, the answer is less likely")).to_be_visible()
    assert (hue(page) != 0).any()


def test_errors_are_messages(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    drop(page, tmp_path / "notes.txt")
    expect(page.get_by_text("notes.txt: cannot be read as an image")).to_be_visible()
    expect(page.get_by_test_id("toast-body")).not_to_contain_text("uploads")
    ask(page, "Sex?")
    expect(page.get_by_text("drop a file or pick a test subject first")).to_be_visible()
    page.get_by_role("button", name="Clear").first.click()
    drop(page, write_volume(tmp_path / "scan.nii.gz", 9))
    expect(page.get_by_text("scan.nii.gz: has 3 axes and may be dMRI or sMRI; name its modality")).to_be_visible()
    page.get_by_label("Modality of the files").click()
    page.get_by_role("option", name="fMRI").click()
    expect(page.get_by_text("scan.nii.gz: has 3 axes (4, 4, 4), one volume")).to_be_visible()
    page.get_by_label("Modality of the files").click()
    page.get_by_role("option", name="sMRI").click()
    expect(page.get_by_text("sMRI, scan.nii.gz, 4 × 4 × 4 voxels")).to_be_visible()


def hue(page: Page) -> np.ndarray:
    """Pixels of the viewer: 1 red, -1 blue, 0 grey; without the colour bar, the crosshair and the texts."""
    canvas = page.frame_locator("iframe").locator("canvas").first
    expect(canvas).to_be_visible()
    pixels = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"), int)
    red, _, blue = np.moveaxis(pixels, 2, 0)
    found = np.where(red - blue > 40, 1, np.where((blue - red > 40) & (blue - red < 200), -1, 0))
    found[: len(found) // 8] = 0
    return found


def test_the_overlay_is_where_the_patch_is(browser: Browser, tmp_path: Path) -> None:
    modality = Modality(grid=(12, 12, 12), patch=(4, 4, 4))
    voxels = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    volume = ImageItem(type="image", modality="sMRI", image_path=str(tmp_path / "a.nii"))
    effects = np.zeros((3, 3, 3))
    effects[2, 2, 0], effects[0, 2, 0] = 0.5, -0.4  # right anterior inferior, and left
    page = browser.new_page(viewport={"width": 900, "height": 500})
    page.set_content(view_volumes([volume], VolumeStore(tmp_path / "store", {"sMRI": modality}, 10_000), [effects]))
    found = hue(page)
    height, width = found.shape
    sagittal, coronal, axial = (found[:, i * width // 3 : (i + 1) * width // 3] for i in range(3))
    bottom = 0.77  # the middle of the lowest patch, above the line with the coordinates

    def centre(mask: np.ndarray) -> list[float]:
        """Of the pixels, from the left and from the top, as fractions of a plane."""
        rows, columns = np.nonzero(mask)
        return pytest.approx([columns.mean() / (width / 3), rows.mean() / height], abs=0.05)

    assert centre(sagittal == 1) == [5 / 6, bottom], "front"
    assert centre(coronal == 1) == [5 / 6, bottom], "right"
    assert centre(axial == 1) == [5 / 6, 0.2], "right and front"
    assert centre(coronal == -1) == [1 / 6, bottom], "left"
    assert not (sagittal == -1).any()


def test_the_command_prints_its_address_last_and_ends_at_ctrl_c_without_traces(
    browser: Browser, checkpoint: Path, tmp_path: Path
) -> None:
    words = [sys.executable, str(EXPERIMENTS / "demo.py"), f"checkpoint={checkpoint}", "--no-browser"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    storage = sorted(checkpoint.parents[1].rglob("*"))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        page = browser.new_page()
        page.goto(process.stdout.readline().split()[-1])
        drop(page, write_volume(tmp_path / "sub-07_T1w.nii.gz", 9))
        expect(page.locator("iframe")).to_be_visible()
        assert [*tmp_path.glob("umbrella-demo-*/uploads/*/sub-07_T1w.nii.gz")]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert rest == ""
    assert [path.name for path in tmp_path.iterdir()] == ["sub-07_T1w.nii.gz"]
    assert sorted(checkpoint.parents[1].rglob("*")) == storage
