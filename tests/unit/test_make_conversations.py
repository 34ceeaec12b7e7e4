"""make_conversations.py on trees after the layouts of public datasets. Images are empty files."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Done

Make = Callable[..., Done]
SEXES = ("M", "F")


def subjects(number: int = 24) -> list[str]:
    return [f"sub-{i:02d}" for i in range(number)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def table(file: Path, header: str, rows: Iterable[Iterable[Any]], start: str = "", separator: str = "\t") -> None:
    lines = [header.replace(" ", separator), *(separator.join(map(str, row)) for row in rows)]
    file.write_text(start + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def ds(tmp_path: Path) -> Path:
    """24 subjects with a T1w each; sex alternates, and the ages are 20, 21, ..."""
    folder = tmp_path / "ds"
    for name in subjects():
        touch(folder, f"{name}/anat/{name}_T1w.nii.gz")
    people(folder)
    return folder


def people(folder: Path, header: str = "participant_id sex age", **others: Any) -> None:
    rows = [(name, SEXES[i % 2], 20 + i) for i, name in enumerate(subjects())]
    table(folder / "participants.tsv", header, rows, **others)


@pytest.fixture
def make(run: Callable[..., Done], tmp_path: Path) -> Make:
    """Runs the script with more words; the output is ``out``."""

    def call(dataset: Path, *words: str, targets: str = "sex,age") -> Done:
        return run("make_conversations.py", str(dataset), "--targets", targets, "--output", f"{tmp_path}/out", *words)

    return call


@pytest.fixture
def made(make: Make, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the script and returns its conversations."""

    def call(dataset: Path, *words: str, targets: str = "sex,age") -> list[dict[str, Any]]:
        done = make(dataset, *words, targets=targets)
        assert done.status == 0, done.stderr
        return read(tmp_path / "out")

    return call


def read(folder: Path, names: Iterable[str] = ("train", "validation", "test", "external")) -> list[dict[str, Any]]:
    files = [folder / f"{name}.jsonl" for name in names]
    return [json.loads(line) | {"split": f.stem} for f in files if f.exists() for line in f.read_text().splitlines()]


def labels(samples: Iterable[dict[str, Any]], target: str) -> dict[str, Any]:
    """Subject, or subject and session, to its label."""
    found = [s["metadata"] for s in samples if s["metadata"]["target"] == target]
    return {" ".join(filter(None, (m["subject_id"], m.get("session")))): m["subject_label"] for m in found}


def images(samples: Iterable[dict[str, Any]]) -> set[str]:
    return {image["path"] for sample in samples for image in sample["images"]}


# Layouts of public datasets


def test_raw_bids_becomes_conversations_that_the_reader_accepts(made: Any, ds: Path, tmp_path: Path) -> None:
    from umbrella.conversations.reading import read_conversations

    samples = made(ds)
    assert labels(samples, "sex")["sub-00"] == "male"
    assert labels(samples, "age")["sub-03"] == 23
    assert images(samples) == {f"{name}/anat/{name}_T1w.nii.gz" for name in subjects()}
    reading = read_conversations(tmp_path / "out/train.jsonl", root=ds)
    assert not reading.problems
    assert not reading.notices
    assert len(reading.conversations) == sum(sample["split"] == "train" for sample in samples)


def test_without_a_participants_table_a_table_is_asked_for(make: Make, ds: Path, tmp_path: Path) -> None:
    (ds / "participants.tsv").rename(tmp_path / "elsewhere.tsv")
    assert "no participants.tsv" in make(ds).stderr
    assert "--table FILE" in make(ds).stderr
    assert make(ds, "--table", f"{tmp_path}/elsewhere.tsv").status == 0


@pytest.mark.parametrize(
    ("header", "missing"), [("participant_id handedness age", "sex"), ("participant_id sex iq", "age")]
)
def test_a_missing_target_names_the_columns_that_are_there(make: Make, ds: Path, header: str, missing: str) -> None:
    people(ds, header)
    done = make(ds)
    assert done.status == 2
    assert f"no column for {missing}: participants.tsv has {header.replace(' ', ', ')}" in done.stderr
    assert f"--columns {missing}=NAME" in done.stderr


def test_the_age_of_a_session_wins_over_that_of_the_subject(made: Any, ds: Path) -> None:
    for i, name in enumerate(subjects()):
        touch(ds, *(f"{name}/ses-{ses}/anat/{name}_ses-{ses}_T1w.nii" for ses in ("pre", "post")))
        (ds / f"{name}/anat/{name}_T1w.nii.gz").unlink()
        rows = [("ses-pre", 40 + i), ("ses-post", "n/a" if i == 5 else 41 + i)]
        table(ds / f"{name}/{name}_sessions.tsv", "session_id age_at_scan", rows)
    found = labels(samples := made(ds), "age")
    assert (found["sub-03 pre"], found["sub-03 post"]) == (43, 44)
    assert "sub-05 post" not in found  # no age is better than that of another session
    both = [sample for sample in samples if sample["task_id"] == "sub-03_sessions_T1w_age"]
    assert [Path(image["path"]).parts[1] for image in both[0]["images"]] == ["ses-pre", "ses-post"]
    assert both[0]["metadata"]["subject_label"] == 44


def test_sessions_and_runs_are_scans_of_their_own(made: Any, ds: Path) -> None:
    touch(ds, *(f"sub-00/ses-{s}/anat/sub-00_ses-{s}_run-{r}_T1w.nii" for s in ("test", "retest") for r in (1, 2)))
    (ds / "sub-00/anat/sub-00_T1w.nii.gz").unlink()
    samples = [s for s in made(ds, "--tasks", "T1") if s["metadata"]["subject_id"] == "sub-00"]
    assert len(samples) == 8
    assert {(s["metadata"]["session"], s["metadata"]["run"]) for s in samples} == {
        (session, run) for session in ("test", "retest") for run in "12"
    }
    assert len({s["split"] for s in samples}) == 1


@pytest.mark.parametrize("codes", [("m", "f"), ("Male", "FEMALE"), ("1", "2"), ("1.0", "2.0")])
def test_sex_is_understood_in_any_spelling(make: Make, ds: Path, codes: tuple[str, str], tmp_path: Path) -> None:
    rows = [(name.removeprefix("sub-"), codes[i % 2], 20 + i) for i, name in enumerate(subjects())]
    table(ds / "participants.tsv", "Participant_ID,Gender,AGE", rows, start="\ufeff", separator=",")
    done = make(ds)
    assert Counter(labels(read(tmp_path / "out"), "sex").values()) == {"male": 12, "female": 12}
    assert "column gender of participants.tsv" in done.stdout
    assert f"{codes[0]} = male" in done.stdout
    assert "guessed; --columns sex=NAME decides" in done.stdout


@pytest.mark.parametrize(
    "levels", [{"0": "Female", "1": "male"}, {"0": {"Description": "female subject"}, "1": {"Description": "male"}}]
)
def test_levels_of_the_sidecar_explain_codes(made: Any, ds: Path, levels: dict) -> None:
    table(ds / "participants.tsv", "participant_id sex age", [(n, i % 2, i) for i, n in enumerate(subjects())])
    (ds / "participants.json").write_text(json.dumps({"Sex": {"Levels": levels}, "age": {"Units": "years"}}))
    assert labels(made(ds), "sex")["sub-01"] == "male"
    assert labels(made(ds), "sex")["sub-02"] == "female"


def test_unknown_codes_ask_for_their_meaning(make: Make, ds: Path) -> None:
    table(ds / "participants.tsv", "participant_id sex age", [(n, i % 2, 20) for i, n in enumerate(subjects())])
    done = make(ds, targets="sex")
    assert done.status == 2
    assert "unknown code '0' (12)" in done.stderr
    assert make(ds, "--values", "sex=0:female,1:male", targets="sex").status == 0


def test_fmriprep_variants_are_listed_with_the_option_that_selects_one(make: Make, ds: Path, tmp_path: Path) -> None:
    for name in subjects():
        stem = f"derivatives/fmriprep/{name}/anat/{name}"
        touch(ds, f"{stem}_desc-preproc_T1w.nii.gz", f"{stem}_desc-brain_mask.nii.gz")
        touch(ds, f"{stem}_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz")
        touch(ds, f"{stem}_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz")
    make(ds)
    assert not any("derivatives" in path for path in images(read(tmp_path / "out")))  # not searched unless named
    done = make(ds, "--derivatives", "fmriprep")
    assert done.status == 2
    assert "T1w: several files match 24 of 24 scans" in done.stderr
    assert "--select space=MNI152NLin2009cAsym,res=2  for derivatives/fmriprep/sub-00" in done.stderr
    assert "--select space=none,res=none" in done.stderr
    assert make(ds, "--derivatives", "fmriprep", "--select", "space=MNI152NLin2009cAsym,res=2", "--masks").status == 0
    samples = read(tmp_path / "out")
    assert all("space-MNI152" in path for path in images(samples))
    assert samples[0]["metadata"]["brain_mask"].endswith("space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz")
    several = make(ds, "--derivatives", "raw,fmriprep", "--select", "space=none")
    assert "--select derivative=fmriprep  for derivatives/fmriprep/sub-00/anat" in several.stderr
    wrong = make(ds, "--derivatives", "fmriprep", "--select", "space=MNI6")
    assert "matches no image; there are space=" in wrong.stderr


def test_freesurfer_subjects_give_the_skull_stripped_volume(made: Any, make: Make, ds: Path) -> None:
    folder = ds / "derivatives/freesurfer"
    touch(folder, *(f"{name}/mri/{file}.mgz" for name in subjects() for file in ("brain", "T1", "norm", "orig")))
    touch(folder, "fsaverage/mri/brain.mgz", "sub-00/surf/lh.white")
    assert "left out: 48 variants of T1w beside desc-brain, which --select desc=NAME takes" in make(folder).stdout
    assert images(made(folder)) == {f"{name}/mri/brain.mgz" for name in subjects()}  # with the tables of the raw data
    assert images(made(ds, "--derivatives", "freesurfer", "--select", "desc=norm")) == {
        f"derivatives/freesurfer/{name}/mri/norm.mgz" for name in subjects()
    }


def test_diffusion_maps_are_found_in_any_naming_and_raw_series_are_explained(
    make: Make, ds: Path, tmp_path: Path
) -> None:
    touch(ds, "sub-00/dwi/sub-00_dwi.nii.gz", "sub-01/dwi/sub-01_FA.nii.gz", "sub-02/dwi/dtifit__FA.nii.gz")
    touch(ds, "sub-03/dwi/sub-03_space-T1w_model-tensor_param-fa_dwimap.nii.gz", "sub-03/dwi/sub-03_MD.nii.gz")
    done = make(ds)
    shown = {image["modality"]: [] for image in ()} | Counter(
        i["modality"] for s in read(tmp_path / "out") if s["task_type"] == "T1" for i in s["images"]
    )
    assert shown == {"sMRI": 48, "dMRI": 6}
    assert "1 raw diffusion series (_dwi)" in done.stdout
    assert "--suffixes T1w,FA,bold,MD" in done.stdout
    assert make(ds, "--suffixes", "T1w,dwi").status == 0
    modalities = yaml.safe_load((tmp_path / "out/data.yaml").read_text())["modalities"]
    assert len(modalities["dMRI"]["grid"]) == 4
    assert "3D and 4D images of dMRI" in make(ds, "--suffixes", "FA,dwi").stderr
    assert make(ds, "--suffixes", "T1w,FA,dwi=DWI").status == 0
    settings = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert settings["data"]["suffixes"] == {"dwi": "DWI"}  # for the files that predict.py is asked about


def test_a_table_with_paths_needs_no_bids(made: Any, tmp_path: Path) -> None:
    rows = [(i, "fm"[i % 2], f"scans/a{i}.nii.gz", f"scans/b{i}.nii" if i % 3 else "") for i in range(24)]
    touch(tmp_path, *(path for row in rows for path in row[2:] if path))
    table(tmp_path / "list.csv", "ID,sex,T1w_path,fmri", rows, separator=",")
    samples = made(tmp_path / "list.csv", targets="sex")
    assert images(samples) == {path for row in rows for path in row[2:] if path}
    assert {i["modality"] for s in samples for i in s["images"]} == {"sMRI", "fMRI"}
    assert labels(samples, "sex")["0"] == "female"


def test_dicom_folders_are_told_about_dcm2niix(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "IM0001").write_bytes(bytes(128) + b"DICM")
    done = make(folder)
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "dcm2niix" in done.stderr


def test_links_to_nothing_are_left_out_and_counted(make: Make, ds: Path) -> None:
    (ds / "sub-00/anat/sub-00_T1w.nii.gz").unlink()
    (ds / "sub-00/anat/sub-00_T1w.nii.gz").symlink_to("../../.git/annex/objects/x")
    assert "1 files that are links to nothing (with DataLad: datalad get)" in make(ds).stdout


def test_whole_heads_are_recognised_and_a_derivative_is_named(make: Make, ds: Path) -> None:
    import nibabel as nib
    import numpy as np

    def save(litres: float) -> None:
        head = np.zeros((50, 50, 50), np.float32)
        head.ravel()[: round(litres * 1e6 / 4**3)] = 1
        for name in subjects():
            nib.save(nib.Nifti1Image(head, np.diag([4, 4, 4, 1.0])), ds / f"{name}/anat/{name}_T1w.nii.gz")

    save(1.4)
    assert "whole heads" not in make(ds).stdout
    save(3.5)
    assert "look like whole heads (3.5 litres" in make(ds).stdout
    touch(ds, "derivatives/freesurfer-7/sub-00/mri/brain.mgz")
    assert "use --derivatives freesurfer-7" in make(ds).stdout


# Values and what is left out


def test_values_that_are_none_leave_out_their_question_only_and_are_counted(
    make: Make, ds: Path, tmp_path: Path
) -> None:
    ages = ["n/a", "NA", "nan", "", "35-40", "89+", "about 30", "-5", *range(30, 46)]
    table(ds / "participants.tsv", "participant_id sex age", zip(subjects(), "MF" * 12, ages, strict=True))
    done = make(ds)
    samples = read(tmp_path / "out")
    assert (len(labels(samples, "sex")), len(labels(samples, "age"))) == (24, 16)
    for reason in ("n/a: 4 (", "a range: 2 (", "not a number: 'about 30': 1 (", "not an age in years: '-5': 1 ("):
        assert f"left out: age, {reason}" in done.stdout
    assert (tmp_path / "out/left_out.tsv").read_text().count("\tage\t") == 8


def test_subjects_in_the_table_or_on_disk_only_are_counted_and_listed(make: Make, ds: Path) -> None:
    touch(ds, "sub-99/anat/sub-99_T1w.nii.gz")
    with (ds / "participants.tsv").open("a") as file:
        file.write("sub-77\tM\t30\n")
    out = make(ds).stdout
    assert "24 on disk and in the tables, 1 on disk only, 1 in the tables only" in out
    assert "on disk, not in the tables: 1 (sub-99)" in out
    assert "in the tables, not on disk: 1 (77)" in out


def test_columns_decide_where_a_guess_is_ambiguous(make: Make, ds: Path, tmp_path: Path) -> None:
    rows = [(name, SEXES[i % 2], 20 + i, 60 + i) for i, name in enumerate(subjects())]
    table(ds / "participants.tsv", "participant_id sex age_at_onset age_at_scan", rows)
    assert "age may be age_at_onset, age_at_scan; --columns age=age_at_onset decides" in make(ds).stderr
    assert make(ds, "--columns", "age=age_at_scan").status == 0
    assert labels(read(tmp_path / "out"), "age")["sub-01"] == 61


def test_any_column_of_any_table_can_be_a_target_and_kept(made: Any, ds: Path) -> None:
    (ds / "phenotype").mkdir()
    rows = [(name, f"{100 + i}.5", "xy"[i % 2]) for i, name in enumerate(subjects())]
    table(ds / "phenotype/tests.tsv", "Code IQ hand", rows)
    samples = made(ds, "--keep", "hand,age", "--columns", "participant_id=code", targets="iq")
    assert samples[0]["metadata"]["subject_label"] == float(samples[0]["metadata"]["iq"])
    assert samples[0]["metadata"]["hand"] in "xy"
    assert "iq" in samples[0]["conversations"][0]["content"][-1]["text"]


# Conversations


def rich(ds: Path) -> None:
    """Adds series, follow-ups, sites and families."""
    for i, name in enumerate(subjects()):
        if i % 3 == 0:
            touch(ds, f"{name}/func/{name}_task-rest_bold.nii.gz")
    rows = [(n, SEXES[i % 2], 20 + i, f"f{i // 3 if i < 9 else i}", "AB"[i % 4 == 0]) for i, n in enumerate(subjects())]
    table(ds / "participants.tsv", "participant_id sex age family_id site", rows)


def test_comparisons_are_balanced_and_references_come_from_the_split(made: Any, ds: Path) -> None:
    samples = made(ds, "--references", "2", targets="sex")
    splits = {s["metadata"]["subject_id"]: s["split"] for s in samples}
    kinds: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in [s for s in samples if s["task_type"] == "T3"]:
        data = sample["metadata"]
        assert splits[data["reference_id"]] == sample["split"]
        assert data["reference_id"] != data["subject_id"]
        assert (data["reference_label"] == data["subject_label"]) == (data["comparison_type"] == "same")
        kinds[sample["split"], data["subject_label"]][data["comparison_type"]] += 1
    assert kinds["train", "male"].total() >= 14
    assert all(abs(kind["same"] - kind["different"]) <= 1 for kind in kinds.values())


def test_comparisons_can_be_limited_to_some_targets(make: Make, made: Any, ds: Path) -> None:
    rich(ds)
    samples = made(ds, "--compare", "Sex")
    targets = {
        kind: {s["metadata"]["target"] for s in samples if s["task_type"] == kind} for kind in ("T1", "T2", "T3")
    }
    assert targets == {"T1": {"sex", "age"}, "T2": {"sex", "age"}, "T3": {"sex"}}
    assert "--compare site: not in --targets" in make(ds, "--compare", "site").stderr


def test_numbers_are_compared_in_bins(made: Any, ds: Path) -> None:
    samples = [s["metadata"] for s in made(ds, "--bins", "2", targets="age") if s["task_type"] == "T3"]
    assert len(samples) >= 20
    for data in samples:
        same = (data["subject_label"] < 31.5) == (data["reference_label"] < 31.5)
        assert data["comparison_type"] == ("same" if same else "different")


def test_anchors_are_shown_to_all_and_never_asked_about(made: Any, ds: Path, tmp_path: Path) -> None:
    rich(ds)
    samples = made(ds, "--anchors", "2")
    compared = [s for s in samples if "reference_id" in s["metadata"]]
    anchors = {s["metadata"]["reference_id"] for s in compared}
    assert len(anchors) == 2
    assert {
        labels[0]
        for labels in (
            [
                s["metadata"]["reference_label"]
                for s in compared
                if s["metadata"]["target"] == "sex" and s["metadata"]["reference_id"] == a
            ]
            for a in anchors
        )
    } == {"male", "female"}
    assert not anchors & {s["metadata"]["subject_id"] for s in samples}
    assert {s["split"] for s in compared} == {"train", "validation", "test"}
    assert made(ds, "--anchors", "2") == samples == made(ds)  # they stand in splits.tsv


def test_the_family_of_an_anchor_is_not_asked_about(make: Make, ds: Path, tmp_path: Path) -> None:
    rich(ds)  # sub-00, sub-01 and sub-02 are one family
    done = make(ds, "--anchors", "sub-00")
    assert "in the family of an anchor: 2 (sub-01, sub-02)" in done.stdout
    shown = {name for s in read(tmp_path / "out") for name in s["subject_ids"]}
    assert "sub-00" in shown
    assert not {"sub-01", "sub-02"} & shown
    assert "only 15 subjects have no relatives" in make(ds, "--anchors", "16", "--output", f"{tmp_path}/new").stderr


def test_the_reference_pool_is_disjoint_from_the_compared_subjects(made: Any, ds: Path) -> None:
    compared = [s["metadata"] for s in made(ds, "--reference-pool", "0.4", targets="sex") if s["task_type"] == "T3"]
    assert compared
    assert not {m["reference_id"] for m in compared} & {m["subject_id"] for m in compared}


def test_several_scans_of_a_subject_are_one_conversation(made: Any, ds: Path) -> None:
    rich(ds)
    samples = {s["task_id"]: s for s in made(ds)}
    several = samples["sub-03_modalities_sex"]
    assert (several["task_type"], several["modalities"]) == ("T2", ["sMRI", "fMRI"])
    itself = samples["sub-03_task-rest_bold_vs_sub-03_T1w_sex"]
    assert itself["metadata"]["comparison_type"] == "same_subject"
    assert itself["subject_ids"] == ["sub-03"]
    assert len(itself["conversations"]) == 4
    assert not any("male" in item.get("text", "") for item in itself["conversations"][0]["content"])
    assert len(samples) == sum(1 for _ in made(ds))  # task_ids are unique


def test_a_conversation_about_all_targets_lists_their_labels(made: Any, ds: Path) -> None:
    sample = made(ds, "--together", "--tasks", "T1")[0]
    data = sample["metadata"]
    assert data["labels"] == [
        {"turn": 1, "target": "sex", "label": data["sex"]},
        {"turn": 3, "target": "age", "label": data["age"]},
    ]
    assert (data["target"], data["subject_label"]) == ("age", data["age"])
    assert [turn["role"] for turn in sample["conversations"]] == ["user", "assistant"] * 2
    assert sample["conversations"][3]["content"][0]["text"] == f"{data['age']} years."


def test_templates_can_be_replaced_and_are_written_with_the_data(
    made: Any, make: Make, ds: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    sex = {"questions": ["Sex?"], "answer": "It is {value}.", "description": "{value}"}
    file.write_text(yaml.safe_dump({"targets": {"sex": sex}}))
    samples = made(ds, "--templates", str(file), "--tasks", "T1")
    texts = {turn["content"][-1]["text"] for s in samples for turn in s["conversations"]}
    assert {"Sex?", "It is male.", "20 years."} <= texts
    written = yaml.safe_load((tmp_path / "out/templates.yaml").read_text())
    assert written["targets"]["sex"]["questions"] == ["Sex?"]
    questions = [turn["content"][-1] for s in samples for turn in s["conversations"] if turn["role"] == "user"]
    wordings = {frozenset((question["text"], question.get("paraphrase", ""))) for question in questions}
    assert wordings == {frozenset(written["targets"]["age"]["questions"]), frozenset(("Sex?", ""))}
    assert "site" not in (Path(__file__).parents[2] / "umbrella/cohorts/templates.yaml").read_text()
    file.write_text(yaml.safe_dump({"targets": {"sex": sex | {"answer": "{value:.0f}"}}}))
    assert "cannot be formatted with the value 'male'" in make(ds, "--templates", str(file)).stderr


# Output


def test_the_output_is_described_and_the_next_commands_are_printed(make: Make, ds: Path, tmp_path: Path) -> None:
    rich(ds)
    done = make(ds)
    report = (tmp_path / "out/cohort.md").read_text()
    assert all(line in done.stdout for line in report.splitlines()[2:])
    assert "| split | subjects | families | scans | sex | age, mean ± SD | site |" in report
    assert f"umbrella tune {tmp_path}/out/data.yaml" in done.stdout
    settings = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert settings["data"]["root"] == str(ds)
    assert set(settings["modalities"]) == {"sMRI", "fMRI"}
    assert settings["tune"] == {"metric": "eval/sex/balanced_accuracy", "mode": "max"}


def test_a_dry_run_prints_the_report_and_writes_nothing(make: Make, ds: Path, tmp_path: Path) -> None:
    done = make(ds, "--dry-run")
    assert "| train |" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_sweep_accepts_the_output_unchanged(run: Callable[..., Done], make: Make, ds: Path, tmp_path: Path) -> None:
    rich(ds)
    for i, file in enumerate(sorted(ds.glob("sub-*/*/*.nii.gz"))):
        file.write_bytes(bytes(i + 1))
    make(ds)
    done = run("tune.py", f"{tmp_path}/out/data.yaml", "--dry-run", f"resources.storage={tmp_path}/runs")
    assert done.status == 0, done.stderr
    assert "best trial: largest eval/sex/balanced_accuracy" in done.stdout


@pytest.mark.parametrize("word", ["{}", "{}/participants.tsv", "data.train={}"])
def test_prepare_says_what_to_do_with_a_dataset(run: Callable[..., Done], ds: Path, word: str) -> None:
    done = run("prepare.py", word.format(ds), *(["data.validation=x"] if "=" in word else []))
    assert done.status == 2
    assert f"umbrella make-conversations {ds} --targets sex,age" in done.stderr


def test_tables_of_spreadsheets_are_read(made: Any, ds: Path) -> None:
    text = "Subject;Sex;Age;Center\r\n" + "".join(
        f"{i};{SEXES[i % 2]};{20 + i}.0;Zürich\r\n" for i, _ in enumerate(subjects())
    )
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        (ds / "participants.tsv").write_bytes(text.encode(encoding))
        samples = made(ds)  # the subjects have lost their leading zeros
        assert {s["metadata"]["site"] for s in samples} == {"Zürich"}
        assert labels(samples, "age")["sub-07"] == 27


def test_rows_that_differ_leave_out_the_question(make: Make, ds: Path, tmp_path: Path) -> None:
    with (ds / "participants.tsv").open("a") as file:
        file.write("sub-03\tF\t99\n")  # sub-03 is F and 23
    assert "age, several rows that differ: 1 (sub-03)" in make(ds).stdout
    assert labels(read(tmp_path / "out"), "sex")["sub-03"] == "female"


def test_sessions_and_versions_of_freesurfer_folders_are_told_apart(make: Make, ds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "derivatives/fs"
    for name in subjects():
        endings = ("_ses-1", "_ses-1.long.x", ".base")
        touch(folder, *(f"{name}{end}/mri/brain.mgz" for end in endings))
    people(tmp_path)
    done = make(folder)
    assert "--select long=long  for sub-00_ses-1.long.x/mri/brain.mgz" in done.stderr
    assert make(folder, "--select", "long=none", "--tasks", "T1").status == 0
    assert images(read(tmp_path / "out")) == {f"{name}_ses-1/mri/brain.mgz" for name in subjects()}
