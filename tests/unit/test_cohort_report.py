"""The report of a cohort: planes the right way up, outliers by name, labels counted, nothing taken as HTML."""

import csv
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from umbrella.cohort_report.cohort_statistics import (
    VolumeRow,
    count_labels,
    count_splits,
    find_duplicates,
    flag_outliers,
    robust_z_scores,
    shared_subjects,
)
from umbrella.cohort_report.report import write_report
from umbrella.conversations.reading import Problem
from umbrella.conversations.schema import Conversation
from umbrella.data.splits import Splits
from umbrella.html import number
from umbrella.modality import Modality
from umbrella.volumes.slices import THUMBNAIL_SIZE, orthogonal_slices, save_thumbnail, voxel_spacing
from umbrella.volumes.store import VolumeInfo, VolumeStore

CUBE = Modality(grid=(10, 10, 10), patch=(5, 5, 5))
FACTS = VolumeInfo((10, 20, 30), (1.0, 1.0, 1.0), "RAS", "int16", 0, 100, 10, 5, 0.3)
Talk = Callable[..., Conversation]


def quiet(things: Any, what: str) -> Any:
    return things


def taken(**splits: list[Conversation]) -> Splits:
    places = {(name, c.task_id): f"{name}.json:{i}" for name, cs in splits.items() for i, c in enumerate(cs)}
    return Splits(splits=splits, locations=places)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def test_a_corner_that_is_right_front_and_top_is_there_in_every_plane(tmp_path: Path) -> None:
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[14:18, 12:16, 10:14] = 9  # RAS+: to the right, a little to the front, just above the middle
    turned = save(
        tmp_path / "v.nii",
        voxels[::-1].transpose(2, 0, 1),
        np.array([[0, -1, 0, 19], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]),
    )
    store = VolumeStore(tmp_path / "store", {"sMRI": CUBE}, 10_000)
    planes = orthogonal_slices(store.get(turned, "sMRI"), CUBE, store.info(turned, "sMRI"))
    where = {}
    for plane in planes:
        rows, columns = np.nonzero(plane.grey > 128)
        where[plane.name] = (set(rows.tolist()), set(columns.tolist()))
    # Rows count downwards from the front or the top, columns from the left or the back; a voxel of the grid is two.
    assert where == {"axial": ({2, 3}, {7, 8}), "coronal": ({3, 4}, {7, 8}), "sagittal": ({3, 4}, {6, 7})}
    save_thumbnail(planes, tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as picture:
        bright = np.asarray(picture) > 128
    assert bright.shape == (THUMBNAIL_SIZE, 3 * THUMBNAIL_SIZE)
    middles = [np.argwhere(tile).mean(axis=0) / THUMBNAIL_SIZE for tile in np.split(bright, 3, axis=1)]
    np.testing.assert_allclose(middles, [(0.3, 0.8), (0.4, 0.8), (0.4, 0.7)], atol=0.02)


def test_a_field_of_view_that_is_no_cube_keeps_its_form(tmp_path: Path) -> None:
    # Along the axes of the file: 30 mm in Z, 10 mm in X, 20 mm in Y.
    facts = replace(FACTS, shape=(15, 10, 10), spacing=(2.0, 1.0, 2.0), orientation="SRP")
    assert voxel_spacing(CUBE, facts) == (1, 2, 3)
    isotropic = Modality(grid=(9, 9, 9), patch=(3, 3, 3), fit="spacing", spacing=1.5)
    assert voxel_spacing(isotropic, facts) == (1.5, 1.5, 1.5)
    array = np.random.default_rng(0).normal(size=CUBE.grid)
    save_thumbnail(orthogonal_slices(array, CUBE, facts), tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as picture:
        filled = np.asarray(picture) > 0
    heights = [filled[:, i * THUMBNAIL_SIZE : (i + 1) * THUMBNAIL_SIZE].any(axis=1).sum() for i in range(3)]
    widths = [filled[:, i * THUMBNAIL_SIZE : (i + 1) * THUMBNAIL_SIZE].any(axis=0).sum() for i in range(3)]
    np.testing.assert_allclose(heights, [THUMBNAIL_SIZE * 2 / 3, THUMBNAIL_SIZE, THUMBNAIL_SIZE], atol=2)
    np.testing.assert_allclose(widths, [THUMBNAIL_SIZE / 3, THUMBNAIL_SIZE / 3, THUMBNAIL_SIZE * 2 / 3], atol=2)


def test_a_series_shows_the_mean_of_its_middle_window() -> None:
    series = Modality(grid=(4, 4, 4, 2), patch=(4, 4, 4, 2))
    frames = np.random.default_rng(0).normal(size=(6, 4, 4, 4)).astype(np.float16)
    shown = orthogonal_slices(frames, series, None)
    still = orthogonal_slices(frames[2:4].mean(axis=0, dtype=np.float32), CUBE, None)
    assert all((a.grey == b.grey).all() for a, b in zip(shown, still, strict=True))


def rows_of(*facts: VolumeInfo | None) -> list[VolumeRow]:
    return [VolumeRow(f"/d/{i}", str(i), "sMRI", str(i), 1, ("train",), ("a",), f) for i, f in enumerate(facts)]


def test_what_is_unlike_the_others_is_flagged_by_name() -> None:
    usual = [replace(FACTS, mean=10 + 0.1 * i, spacing=(1 + 0.0005 * i, 1, 1)) for i in range(9)]
    odd = [
        replace(FACTS, mean=30),
        replace(FACTS, shape=(10, 20, 31), orientation="LAS"),
        replace(FACTS, spacing=(1.5, 1, 1)),
        replace(FACTS, foreground=0.9, deviation=50),
    ]
    flags = [row.flags for row in flag_outliers(rows_of(*usual, *odd, None))]
    assert flags[:9] == [()] * 9
    assert [tuple(name.split()[0] for name in names) for names in flags[9:]] == [
        ("mean",),
        ("shape", "orientation"),
        ("spacing",),
        ("deviation", "foreground"),
        (),
    ]
    assert flags[9][0].endswith("σ")
    assert "+" in flags[9][0]


def test_the_robust_z_is_blind_to_the_outlier_itself() -> None:
    z = robust_z_scores([1.0, 2, 3, 4, 1000])
    assert z[2] == 0
    assert z[4] == pytest.approx(997 / 1.4826)
    assert robust_z_scores([5.0] * 3).tolist() == [0, 0, 0]
    assert abs(robust_z_scores([1.0] * 11 + [0.2])[-1]) > 5  # most are alike: their median deviation is 0


def test_labels_are_counted_by_target_and_split_and_rare_classes_marked(talk: Talk) -> None:
    def some(*labels: Any, target: str) -> list[Conversation]:
        turns = ("user", "?"), ("assistant", "!")
        return [
            talk(*turns, task_id=f"{target}{i}", metadata={"subject_label": x, "target": target})
            for i, x in enumerate(labels)
        ]

    splits = {
        "train": some(*["f"] * 19, "m", None, target="sex") + some(20, 40.0, target="age"),
        "test": some("f", "m", target="sex") + some(60, target="age"),
    }
    age, sex = count_labels(splits)
    assert (age.name, sex.name, age.classes, sex.numbers) == ("age", "sex", {}, {})
    assert {name: classes.counts for name, classes in sex.classes.items()} == {
        "train": {"f": 19, "m": 1},
        "test": {"f": 1, "m": 1},
    }
    assert [sex.classes[name].is_rare("m") for name in splits] == [True, False]
    train = age.numbers["train"]
    assert (train.n, train.mean, train.deviation, train.minimum, train.maximum) == (2, 30, 10, 20, 40)
    assert [i for i, n in enumerate(train.histogram) if n] == [0, 10]  # bins from 20 to 60, for every split
    assert [split.labelled for split in count_splits(splits)] == [22, 3]


@pytest.mark.parametrize(
    ("labels", "mean", "deviation", "places"),
    [
        ([1e308, 1e308], 1e308, 0, [10]),
        ([-1.7e308, 1.7e308], 0, 1.7e308, [0, 19]),
        ([1, 1 + 2**-51], 1 + 2**-52, 2**-52, [0, 19]),
        ([5e-324, 5e-324], 5e-324, 0, [10]),
        ([float("nan"), float("inf"), 10**400, 7], 7, 0, [10]),  # what is no finite number is no label
    ],
)
def test_labels_may_be_any_numbers(
    talk: Talk, labels: list, mean: float, deviation: float, places: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    one = talk(("user", "?"), ("assistant", "!"))
    [target] = count_labels({"train": [one.model_copy(update={"metadata": {"subject_label": x}}) for x in labels]})
    found = target.numbers["train"]
    assert (found.mean, found.deviation) == pytest.approx((mean, deviation), rel=1e-15, abs=0)
    assert [i for i, n in enumerate(found.histogram) if n] == places
    assert not recwarn.list


def test_subjects_in_two_splits_are_named_by_the_part_that_they_play(talk: Talk) -> None:
    def about(task: str, subject: str, *shown: str) -> Conversation:
        turns = ("user", "?"), ("assistant", "!")
        return talk(*turns, task_id=task, metadata={"subject_id": subject}, subject_ids=list(shown))

    splits = count_splits({"train": [about("1", "a", "b"), about("2", "c")], "test": [about("3", "c", "b")], "x": []})
    found = {(s.splits, s.role): s.subjects for s in shared_subjects(splits) if s.subjects}
    assert found == {
        (("train", "test"), "subject of an answer"): ("c",),
        (("train", "test"), "anywhere in a conversation"): ("b", "c"),
    }


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.pictures += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """Four real files; two of them of the same bytes."""
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    voxels = draw.normal(size=(3, 6, 5, 4)).astype(np.float32)
    names = {"one": 0, "twin": 0, "two": 1, "<b>bad&": 2}
    return {name: save(tmp_path / "data" / f"{name}.nii", voxels[i]) for name, i in names.items()}


@pytest.fixture
def store_here(tmp_path: Path) -> VolumeStore:
    return VolumeStore(tmp_path / "store", {"sMRI": CUBE}, 10_000)


def filled(store: VolumeStore, raw: Splits) -> Splits:
    for conversations in raw.splits.values():
        for c in conversations:
            for v in c.volumes:
                store.get(v.image_path, v.modality)
    return raw


def ask(talk: Talk, task: str, *paths: Path, **metadata: Any) -> Conversation:
    turns = ("user", [*(("sMRI", path) for path in paths), "?"]), ("assistant", "!")
    return talk(*turns, task_id=task, metadata=metadata)


def test_names_from_files_are_never_taken_as_html(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path
) -> None:
    def page_of(name: str, path: Path) -> Page:
        c = ask(talk, name, path, volumes["one"], subject_id=name, subject_label=name, target=name)
        raw = filled(store_here, taken(train=[c], **{name: [c]}))
        raw.problems.append(Problem(name, name, name, {"a": name}))
        raw.notices.append(name)
        return Page(write_report(tmp_path / "report", raw, store_here, quiet).read_text())

    evil = "<script>alert('1')</script>"
    tame, page = page_of("x", volumes["two"]), page_of(evil, volumes["<b>bad&"])
    assert page.tags == tame.tags
    assert page.text.count(evil) > 8
    assert "<b>bad&.nii" in page.text


def test_formulas_and_escape_sequences_of_samples_reach_neither_page_nor_tables(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path
) -> None:
    evil = "=cmd\x1b[2J"
    c = ask(talk, "=a", volumes["two"], subject_id="=b", subject_label=evil, target=evil)
    raw = filled(store_here, taken(train=[c]))
    raw.problems.append(Problem(evil, evil, evil, {"a": evil}))
    page = write_report(tmp_path / "report", raw, store_here, quiet)
    files = [page, *(page.with_name(f"{name}.csv") for name in ("conversations", "problems"))]
    for file in files:
        assert "\x1b" not in file.read_text()
        assert r"=cmd\x1b[2J" in file.read_text()
    for file in files[1:]:
        with file.open(newline="") as lines:
            assert not [cell for row in csv.reader(lines) for cell in row if cell.startswith("=")]


def test_the_page_needs_nothing_but_its_folder(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path
) -> None:
    raw = filled(store_here, taken(train=[ask(talk, "a", volumes["one"], volumes["two"])], validation=[]))
    index = write_report(tmp_path / "report", raw, store_here, quiet)
    page = Page(index.read_text())
    stems = {store_here.path(volumes[name], "sMRI").stem for name in ("one", "two")}
    assert set(page.pictures) == {f"thumbnails/{stem}.png" for stem in stems}
    assert {f.stem for f in (tmp_path / "report" / "thumbnails").iterdir()} == stems
    assert "link" not in page.tags


def test_the_tables_hold_every_volume_and_conversation(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path
) -> None:
    raw = taken(
        train=[
            ask(talk, "a", volumes["one"], subject_id="s1"),
            ask(talk, "b", volumes["two"], volumes["one"], subject_id="s2", reference_id="s1"),
        ],
        test=[ask(talk, "c", volumes["two"], volumes["twin"], subject_id="s2")],
    )
    filled(store_here, raw)
    write_report(tmp_path / "report", raw, store_here, quiet)
    with (tmp_path / "report" / "volumes.csv").open(newline="") as file:
        table = {row["file"]: row for row in csv.DictReader(file)}
    uses = {name: (row["conversations"], row["splits"], row["subjects"]) for name, row in table.items()}
    assert uses == {
        "one.nii": ("2", "train", "s1"),  # of the two that are shown, the one who is always there
        "two.nii": ("2", "train; test", "s2"),
        "twin.nii": ("1", "test", "s2"),
    }
    assert table["one.nii"]["shape"] == "6; 5; 4"
    assert table["one.nii"]["content"] == table["twin.nii"]["content"]
    with (tmp_path / "report" / "conversations.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(r["split"], r["task_id"], r["place"]) for r in lines] == [
        ("train", "a", "train.json:0"),
        ("train", "b", "train.json:1"),
        ("test", "c", "test.json:0"),
    ]
    assert lines[1]["volumes"] == "two.nii; one.nii"


def test_files_of_the_same_content_are_found() -> None:
    rows = [replace(row, content="x" if row.file in "02" else row.content) for row in rows_of(*[FACTS] * 4)]
    assert find_duplicates([*rows, replace(rows[0], modality="dMRI"), replace(rows[3], content="")]) == [["0", "2"]]


def test_a_volume_that_is_gone_again_is_an_empty_row_and_no_error(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path
) -> None:
    raw = filled(store_here, taken(train=[ask(talk, "a", volumes["one"]), ask(talk, "b", volumes["two"])]))
    volumes["one"].unlink()
    store_here.path(volumes["two"], "sMRI").with_suffix(".json").unlink()
    page = Page(write_report(tmp_path / "report", raw, store_here, quiet).read_text())
    assert "one.nii" in page.text
    assert len(page.pictures) == 1
    with (tmp_path / "report" / "volumes.csv").open(newline="") as file:
        assert [row["mean"] for row in csv.DictReader(file)] == ["", ""]


def test_a_new_report_leaves_nothing_of_the_old_and_a_failed_one_leaves_all_of_it(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    first = filled(store_here, taken(train=[ask(talk, "a", volumes["one"])]))
    second = filled(store_here, taken(train=[ask(talk, "b", volumes["two"])]))
    write_report(folder, first, store_here, quiet)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    def breaks(things: Any, what: str) -> Any:
        if "thumbnails" in what:
            raise KeyboardInterrupt
        return things

    with pytest.raises(KeyboardInterrupt):
        write_report(folder, second, store_here, breaks)
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before

    def no_rename(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("disk full")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", no_rename)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder, second, store_here, quiet)
    monkeypatch.undo()
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before

    write_report(folder, second, store_here, quiet)
    [thumbnail] = (folder / "thumbnails").iterdir()
    assert thumbnail.stem == store_here.path(volumes["two"], "sMRI").stem
    assert sorted(f.name for f in tmp_path.iterdir()) == ["data", "report", "store"]


def test_the_page_shows_flagged_volumes_first_and_says_how_many_more_there_are(
    talk: Talk, volumes: dict[str, Path], store_here: VolumeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella.cohort_report.report.MAX_ROWS", 1)
    odd = save(tmp_path / "data" / "z.nii", np.random.default_rng(1).normal(size=(9, 5, 4)).astype(np.float32))
    raw = filled(store_here, taken(train=[ask(talk, "a", volumes["one"], volumes["two"], odd)]))
    page = Page(write_report(tmp_path / "report", raw, store_here, quiet).read_text())
    assert page.pictures == [f"thumbnails/{store_here.path(odd, 'sMRI').stem}.png"]
    assert "The first 1 volumes; 2 more are in volumes.csv." in page.text


def test_numbers_are_written_for_people() -> None:
    assert [number(x) for x in (0, 3, 0.07790897, 937.67, 12345.6, -2e6, 3e12)] == [
        "0", "3", "0.07791", "937.7", "12,346", "-2,000,000", "3e+12",
    ]  # fmt: skip
