"""The report of a cohort: orientation of the planes, outliers, counts of labels, escaping of names."""

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


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def test_a_bright_corner_is_at_its_place_in_every_plane(tmp_path: Path) -> None:
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


def test_a_field_of_view_keeps_its_proportions(tmp_path: Path) -> None:
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


def test_volumes_that_differ_from_the_others_are_flagged() -> None:
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


def clean_cohort(seed: int, sizes: dict[str, int]) -> list[VolumeRow]:
    """Volumes of sites that differ in geometry and by factors in intensity; of each site, a fifth is stored as LAS."""
    draws, rows = np.random.default_rng(seed), []
    for number_of_site, (site, size) in enumerate(sizes.items()):
        for i, (mean, deviation) in enumerate(np.exp(draws.normal(size=(size, 2)) * 0.5) * 10 ** (number_of_site + 1)):
            orientation, foreground = "LAS" if i % 5 == 0 else "RAS", draws.normal(0.3, 0.02)
            shape = (10 + number_of_site, 20, 30)
            facts = VolumeInfo(shape, (1.0, 1.0, 1.0), orientation, "int16", 0, 100, mean, deviation, foreground)
            rows.append(VolumeRow(f"/d/{site}{i}", "", "sMRI", "", 1, ("train",), ("a",), facts, (), site))
    return rows


@pytest.mark.parametrize("sizes", [{"": 120}, {"a": 60, "b": 40, "c": 20}, {"": 4}, {"a": 12}])
def test_volumes_of_clean_cohorts_are_not_flagged(sizes: dict[str, int]) -> None:
    flagged = [row for seed in range(20) for row in flag_outliers(clean_cohort(seed, sizes)) if row.flags]
    assert len(flagged) <= 1 + 0.003 * 20 * sum(sizes.values())


@pytest.mark.parametrize("site", ["", "b"])
@pytest.mark.parametrize("odd", [{"mean": 0.0}, {"deviation": 9000.0}, {"foreground": 0.9}, {"shape": (9, 9, 9)}])
def test_a_bad_volume_is_flagged_at_its_site_and_in_the_whole_cohort(site: str, odd: dict[str, Any]) -> None:
    rows = clean_cohort(0, {site: 30, "c": 60} if site else {"": 90})
    assert rows[7].info
    rows[7] = replace(rows[7], info=replace(rows[7].info, **odd))
    assert [(row.path, row.flags[0].split()[0]) for row in flag_outliers(rows) if row.flags] == [(rows[7].path, *odd)]


def test_the_robust_z_score_does_not_depend_on_the_outlier() -> None:
    z = robust_z_scores([1.0, 2, 3, 4, 1000])
    assert z[2] == 0
    assert z[4] == pytest.approx(997 / 1.4826)
    assert robust_z_scores([5.0] * 3).tolist() == [0, 0, 0]
    assert abs(robust_z_scores([1.0] * 11 + [0.2])[-1]) > 5  # most are alike: their median deviation is 0


def labelled(talk: Talk, *labels: Any, target: str = "T1") -> list[Conversation]:
    turns = ("user", "?"), ("assistant", "!")
    return [
        talk(*turns, task_id=f"{target}{i}", metadata={"subject_label": x, "target": target})
        for i, x in enumerate(labels)
    ]


def test_labels_are_counted_by_target_and_split(talk: Talk) -> None:
    splits = {
        "train": labelled(talk, *["f"] * 19, "m", None, target="sex") + labelled(talk, 20, 40.0, target="age"),
        "test": labelled(talk, "f", target="sex") + labelled(talk, 60, target="age"),
    }
    age, sex = count_labels(splits)
    assert (age["name"], sex["name"], age["classes"], sex["numbers"]) == ("age", "sex", {}, {})
    assert sex["classes"] == {"train": {"f": 19, "m": 1}, "test": {"f": 1, "m": 0}}
    train = age["numbers"]["train"]
    # The bins are from 20 to 60 in every split.
    assert [i for i, n in enumerate(train.pop("histogram")) if n] == [0, 10]
    assert train == {"n": 2, "mean": 30, "deviation": 10, "minimum": 20, "maximum": 40}
    assert [split["labelled"] for split in count_splits(splits)] == [22, 2]


@pytest.mark.parametrize(
    ("labels", "mean", "deviation", "places"),
    [
        ([1e308, 1e308], 1e308, 0, [10]),
        ([-1.7e308, 1.7e308], 0, 1.7e308, [0, 19]),
        ([5e-324, 5e-324], 5e-324, 0, [10]),
    ],
)
def test_labels_may_be_any_finite_numbers(
    talk: Talk, labels: list, mean: float, deviation: float, places: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    [target] = count_labels({"train": labelled(talk, *labels)})
    found = target["numbers"]["train"]
    assert (found["mean"], found["deviation"]) == pytest.approx((mean, deviation), rel=1e-15, abs=0)
    assert [i for i, n in enumerate(found["histogram"]) if n] == places
    assert not recwarn.list


def test_subjects_in_two_splits_are_listed_with_their_role(talk: Talk) -> None:
    def about(task: str, subject: str, *shown: str) -> Conversation:
        turns = ("user", "?"), ("assistant", "!")
        return talk(*turns, task_id=task, metadata={"subject_id": subject}, subject_ids=list(shown))

    splits = count_splits({"train": [about("1", "a", "b"), about("2", "c")], "test": [about("3", "c", "b")], "x": []})
    assert [row for row in shared_subjects(splits) if row[2]] == [
        ("train and test", "subject of an answer", ["c"]),
        ("train and test", "anywhere in a conversation", ["b", "c"]),
    ]


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
        self.pictures += [value for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """Four files; two of them have the same content."""
    (tmp_path / "data").mkdir()
    voxels = np.random.default_rng(0).normal(size=(3, 6, 5, 4)).astype(np.float32)
    names = {"one": 0, "twin": 0, "two": 1, "<b>bad&": 2}
    return {name: save(tmp_path / "data" / f"{name}.nii", voxels[i]) for name, i in names.items()}


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., Page]:
    """Decodes the volumes of the splits, writes their report, and returns its page."""
    store = VolumeStore(tmp_path / "store", {"sMRI": CUBE}, 10_000)

    def write(raw: Splits | None = None, progress: Any = lambda things, what: things, **splits: Any) -> Page:
        places = {(name, c.task_id): f"{name}.json:{i}" for name, cs in splits.items() for i, c in enumerate(cs)}
        raw = raw or Splits()
        raw.splits, raw.locations = splits, places
        for v in (v for cs in splits.values() for c in cs for v in c.volumes):
            if Path(v.image_path).exists():
                store.get(v.image_path, v.modality)
        return Page(write_report(tmp_path / "report", raw, store, progress).read_text())

    return write


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def ask(talk: Talk, task: str, *paths: Path, **metadata: Any) -> Conversation:
    turns = ("user", [*(("sMRI", path) for path in paths), "?"]), ("assistant", "!")
    return talk(*turns, task_id=task, metadata=metadata)


def test_names_from_files_are_never_html(talk: Talk, volumes: dict[str, Path], report: Callable[..., Page]) -> None:
    def page_of(name: str, path: Path) -> Page:
        c = ask(talk, name, path, volumes["one"], subject_id=name, subject_label=name, target=name)
        raw = Splits(problems=[Problem(name, name, name, {"a": name})], notices=[name])
        return report(raw, train=[c], **{name: [c]})

    evil = "<script>alert('1')</script>"
    tame, page = page_of("x", volumes["two"]), page_of(evil, volumes["<b>bad&"])
    assert page.tags == tame.tags
    assert page.text.count(evil) > 8
    assert "<b>bad&.nii" in page.text


def test_formulas_and_escape_sequences_reach_neither_page_nor_tables(
    talk: Talk, volumes: dict[str, Path], report: Callable[..., Page], tmp_path: Path
) -> None:
    evil = "=cmd\x1b[2J"
    c = ask(talk, "=a", volumes["two"], subject_id="=b", subject_label=evil, target=evil)
    report(Splits(problems=[Problem(evil, evil, evil, {"a": evil})]), train=[c])
    tables = [tmp_path / "report" / f"{name}.csv" for name in ("conversations", "problems")]
    for file in [tmp_path / "report/index.html", *tables]:
        assert "\x1b" not in file.read_text()
        assert r"=cmd\x1b[2J" in file.read_text()
    assert not [cell for file in tables for row in table(file) for cell in row.values() if cell.startswith("=")]


def test_the_tables_hold_every_volume_and_conversation_and_the_page_only_needs_its_folder(
    talk: Talk, volumes: dict[str, Path], report: Callable[..., Page], tmp_path: Path
) -> None:
    page = report(
        train=[
            ask(talk, "a", volumes["one"], subject_id="s1", subject_label="m"),
            ask(talk, "b", volumes["two"], volumes["one"], subject_id="s2", reference_id="s1"),
        ],
        test=[ask(talk, "c", volumes["two"], volumes["twin"], subject_id="s2")],
    )
    rows = {row["file"]: row for row in table(tmp_path / "report/volumes.csv")}
    uses = {name: (row["conversations"], row["splits"], row["subjects"]) for name, row in rows.items()}
    assert uses == {
        "one.nii": ("2", "train", "s1"),  # of the two subjects, the one in all conversations with this volume
        "two.nii": ("2", "train; test", "s2"),
        "twin.nii": ("1", "test", "s2"),
    }
    assert rows["one.nii"]["shape"] == "6; 5; 4"
    assert rows["one.nii"]["content"] == rows["twin.nii"]["content"]
    assert "one.nii = twin.nii" in page.text
    lines = table(tmp_path / "report/conversations.csv")
    assert [(r["split"], r["task_id"], r["label"], r["volumes"], r["place"]) for r in lines] == [
        ("train", "a", "m", "one.nii", "train.json:0"),
        ("train", "b", "", "two.nii; one.nii", "train.json:1"),
        ("test", "c", "", "two.nii; twin.nii", "test.json:0"),
    ]
    pictures = {f"thumbnails/{file.name}" for file in (tmp_path / "report/thumbnails").iterdir()}
    assert set(page.pictures) == pictures == {f"thumbnails/{row['content']}.png" for row in rows.values()}
    assert "link" not in page.tags


def test_a_volume_that_was_removed_meanwhile_is_an_empty_row(
    talk: Talk, volumes: dict[str, Path], report: Callable[..., Page], tmp_path: Path
) -> None:
    splits = {"train": [ask(talk, "a", volumes["one"]), ask(talk, "b", volumes["two"])]}
    report(**splits)
    volumes["one"].unlink()
    page = report(**splits)
    assert "one.nii" in page.text
    assert len(page.pictures) == 1
    assert [bool(row["mean"]) for row in table(tmp_path / "report/volumes.csv")] == [False, True]


def test_a_new_report_replaces_the_old_one_only_when_it_is_complete(
    talk: Talk, volumes: dict[str, Path], report: Callable[..., Page], tmp_path: Path
) -> None:
    def interrupt(things: Any, what: str) -> Any:
        if "thumbnails" in what:
            raise KeyboardInterrupt
        return things

    [old] = report(train=[ask(talk, "a", volumes["one"])]).pictures
    splits = {"train": [ask(talk, "b", volumes["two"])]}
    with pytest.raises(KeyboardInterrupt):
        report(progress=interrupt, **splits)
    assert (tmp_path / "report" / old).exists()
    [new] = report(**splits).pictures
    assert [f"thumbnails/{file.name}" for file in (tmp_path / "report/thumbnails").iterdir()] == [new] != [old]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["data", "report", "store"]


def test_the_page_shows_flagged_volumes_first_and_says_how_many_more_there_are(
    talk: Talk, volumes: dict[str, Path], report: Callable[..., Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella.cohort_report.report.MAX_ROWS", 1)
    monkeypatch.setattr("umbrella.cohort_report.cohort_statistics.SMALL", 3)
    odd = save(tmp_path / "data" / "z.nii", np.random.default_rng(1).normal(size=(9, 5, 4)).astype(np.float32))
    page = report(train=[ask(talk, "a", volumes["one"], volumes["two"], odd)])
    assert page.pictures == [f"thumbnails/{table(tmp_path / 'report/volumes.csv')[0]['content']}.png"]
    assert "The first 1 volumes; 2 more are in volumes.csv." in page.text


def test_numbers_have_four_significant_digits() -> None:
    assert [number(x) for x in (0, 3, 0.07790897, 937.67, 12345.6, -2e6, 3e12)] == [
        "0", "3", "0.07791", "937.7", "12,346", "-2,000,000", "3e+12",
    ]  # fmt: skip
