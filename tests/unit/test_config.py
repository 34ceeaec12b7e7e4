"""Settings: defaults, files and overrides become one frozen tree; a refusal names the key and what is allowed."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from umbrella.base import UserError
from umbrella.cli import parse
from umbrella.config import Settings, describe_settings, load_settings


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_files_win_over_earlier_ones_and_overrides_over_all(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {lr: 0.5, clip: 2.0}\ntrain: {epochs: 3}\n")
    second = write(tmp_path / "b.yaml", "optim: {lr: 0.25, warmup: 7}\n")
    settings = load_settings([first, second], {"optim.warmup": 9})
    assert settings.optim.model_dump() == {
        "lr": 0.25,
        "embedder_lr": None,
        "weight_decay": 0.01,
        "warmup": 9,
        "schedule": "cosine",
        "clip": 2.0,
    }
    assert settings.train.epochs == 3


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings([write(tmp_path / "a.yaml", "# nothing yet\n")]) == load_settings()


def test_a_relative_folder_is_of_where_the_script_started_also_in_a_process_with_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = load_settings(overrides={"resources.node_store": "fast", "resources.store": "s3://bucket/volumes"})
    sent = pickle.dumps(settings)
    monkeypatch.chdir(tmp_path / "elsewhere")
    resources = pickle.loads(sent).with_values({"optim.lr": 0.5}).resources
    assert (resources.storage, resources.node_store) == (str(tmp_path / "runs"), str(tmp_path / "fast"))
    assert (resources.store, resources.upload) == ("s3://bucket/volumes", "")


def test_an_override_reaches_into_one_modality_and_leaves_the_others() -> None:
    settings = load_settings(overrides={"modalities.sMRI.grid": [48, 48, 48]})
    assert settings.modalities["sMRI"].num_tokens == 216
    assert settings.modalities["sMRI"].patch == (8, 8, 8)
    assert settings.modalities["fMRI"] == Settings().modalities["fMRI"]


def test_an_override_adds_a_modality() -> None:
    settings = load_settings(overrides={"modalities.PET": {"grid": [8, 8, 8], "patch": [4, 4, 4]}})
    assert list(settings.modalities) == ["sMRI", "dMRI", "fMRI", "PET"]


def test_the_space_is_keyed_by_dotted_names_and_null_takes_one_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "sweep.yaml",
        "tune: {space: {optim.lr: {loguniform: [0.0001, 0.01]}, mask.supervise: {grid: [all, assistant]}}}\n",
    )
    taken_out = load_settings([file], {"tune.space.optim.lr": None, "tune.space.seed": {"grid": [0, 1]}})
    assert taken_out.tune.space == {"mask.supervise": {"grid": ["all", "assistant"]}, "seed": {"grid": [0, 1]}}


@pytest.mark.parametrize("by", ["file", "override", "mapping"])
def test_a_new_range_replaces_the_one_before_it_and_does_not_mix_with_it(tmp_path: Path, by: str) -> None:
    old = write(tmp_path / "old.yaml", "tune: {space: {optim.lr: {loguniform: [0.0001, 0.01]}}}\n")
    new = write(tmp_path / "new.yaml", "tune: {space: {optim.lr: {grid: [0.5]}}}\n")
    overrides = {
        "file": {},
        "override": {"tune.space.optim.lr": {"grid": [0.5]}},
        "mapping": {"tune.space": {"optim.lr": {"grid": [0.5]}}},
    }[by]
    files = [old, new] if by == "file" else [old]
    assert load_settings(files, overrides).tune.space == {"optim.lr": {"grid": [0.5]}}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.learning_rte", "optim.learning_rte: there is no such setting"),
        ("optim.wieght_decay", "did you mean optim.weight_decay?"),
        ("cohort.sed", "did you mean cohort.seed?"),
        ("batch_size", "did you mean train.batch_size?"),
        ("optm.lr", "did you mean optim?"),
        ("optim.lr.peak", "optim.lr.peak: there is no such setting"),
        ("evaluate.length_normalised", "there is no such setting; it was removed: candidates are compared"),
        ("cohort.xyzzy", "there are cohort.subjects, cohort.seed"),
        ("modalities.sMRI.patches", "did you mean modalities.sMRI.patch?"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(overrides={name: 1})
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.augment.flip_left_right", "true", "=true: is a truth value, and a number is needed; write 1"),
        ("evaluate.bands", "[true, 40]", r".0=true: is a truth value"),
        ("mask.task_weights", "{T1: true}", ".T1=true: is a truth value"),
        ("train.epochs", "010", "=010: a number that begins with 0 can mean an octal one; write 10"),
        ("evaluate.bands", "[020, 40]", ".0=020: a number that begins with 0"),
        ("train.epochs", "0x10", "='0x10': Input should be a valid integer.*; write one number in decimal digits"),
        ("train.epochs", "1:30", "='1:30': Input should be a valid integer.*; write one number in decimal digits"),
        ("optim.clip", "1:30.5", "='1:30.5': Input should be a valid number.*; write one number in decimal digits"),
    ],
)
def test_what_may_mean_another_number_is_refused_with_how_to_write_it(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    *sections, last = name.split(".")
    in_file = "".join(f"{section}: {{" for section in sections) + f"{last}: {text}" + "}" * len(sections)
    with pytest.raises(UserError, match=f"^{name}{message}"):
        load_settings([write(tmp_path / "a.yaml", in_file)])
    with pytest.raises(UserError, match=f"^{name}{message}"):
        parse([f"{name}={text}"], "")


@pytest.mark.parametrize("value", [True, "010"])
def test_a_sweep_is_refused_such_a_number_too(value: object) -> None:
    with pytest.raises(UserError, match=r"^train\.augment\.flip_other="):
        Settings().with_values({"train.augment.flip_other": value})


@pytest.mark.parametrize("text", ["007", "on", "no", "1_0", "2024-01-01", "1e5", "0o7"])
def test_a_name_is_the_text_that_is_written(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "a.yaml", f"name: {text}\n")
    assert load_settings([file]).name == parse([f"name={text}"], "").settings.name == text
    resolved = write(tmp_path / "resolved.yaml", load_settings([file]).to_yaml())
    assert load_settings([resolved]).name == text


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("name", "7", "7"),
        ("experiment", "true", "true"),
        ("experiment", "null", "null"),
        ("name", "1.50", "1.50"),
        ("name", "'a'", "a"),
        ("data.task_filter", "T1: a: b", "T1: a: b"),
        ("seed", "7", 7),
        ("train.shard", "on", True),
        ("train.shard", "no", False),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1.50", 1.5),
        ("optim.embedder_lr", "null", None),
    ],
)
def test_a_word_on_the_command_line_is_read_as_the_setting_needs_it(name: str, text: str, value: object) -> None:
    assert parse([f"{name}={text}"], "").settings.flat()[name] == value


def test_a_number_in_a_file_where_a_text_belongs_is_refused_with_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^name=7: .*; write a text in quotes, as in '7'$"):
        load_settings([write(tmp_path / "a.yaml", "name: 7\n")])


@pytest.mark.parametrize("name", [".", "..", "...", "a" * 250, "ä" * 125])
def test_a_name_that_cannot_be_a_folder_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^name=.*; give a "):
        load_settings(overrides={"name": name})


PLACES = (
    *("checkpoint", "output", "data.train", "data.validation", "data.test", "data.input", "data.root"),
    *("data.path_map./old", "model.checkpoint", "model.chat_template"),
    *("resources.storage", "resources.upload", "resources.store", "resources.node_store"),
)


@pytest.mark.parametrize("name", PLACES)
def test_the_home_folder_is_meant_by_a_tilde(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, path in (("~", f"{tmp_path}"), ("~/a", f"{tmp_path}/a")):
        section, _, last = name.partition("./") if "./" in name else name.rpartition(".")
        inner = f"{{{'/' + last if './' in name else last}: {text}}}"
        for prefix in reversed(section.split(".") if section else []):
            inner = f"{{{prefix}: {inner}}}"
        file = write(tmp_path / "a.yaml", inner)
        for settings in (load_settings([file]), parse([f"{name}={text}"], "").settings):
            assert settings.flat()[name] in (path, [path])
    with pytest.raises(UserError, match=r"there is no home folder ~nobody-here; write \./~nobody-here/a"):
        load_settings(overrides={name: "~nobody-here/a"})


@pytest.mark.parametrize("name", [*PLACES, "resources.address"])
def test_an_address_with_a_password_is_refused_and_not_shown(name: str) -> None:
    for address in ("https://user:hidden@host/x", "ray://host:1/x?token=hidden"):
        with pytest.raises(UserError) as caught:
            load_settings(overrides={name: address})
        assert str(caught.value).startswith(name)
        assert "hidden" not in str(caught.value)


def test_a_refused_value_names_the_key_the_value_and_what_is_allowed() -> None:
    with pytest.raises(UserError) as caught:
        load_settings(overrides={"optim.lr": -1, "mask.supervise": "some", "train.epochs": "many"})
    supervise, rate, epochs = str(caught.value).split("\n")
    assert supervise.startswith("mask.supervise='some': Input should be 'assistant', 'last_assistant' or 'all'")
    assert rate == "optim.lr=-1: Input should be greater than 0"
    assert epochs.startswith("train.epochs='many': Input should be a valid integer")


def test_more_required_workers_than_workers_are_refused() -> None:
    with pytest.raises(UserError, match=r"resources: min_workers=3 is more than workers=2"):
        load_settings(overrides={"resources.workers": 2, "resources.min_workers": 3})


def test_a_bad_patch_is_named_by_its_modality() -> None:
    with pytest.raises(
        UserError, match=r"^modalities\.sMRI: patch \(7, 8, 8\) does not divide grid \(48, 48, 48\) along every axis$"
    ):
        load_settings(overrides={"modalities.sMRI": {"grid": [48, 48, 48], "patch": [7, 8, 8]}})


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- a\n", "holds list, not a mapping"), (None, "No such file")]
)
def test_a_file_that_is_no_settings_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "bad.yaml"
    if text is not None:
        write(file, text)
    with pytest.raises(UserError, match=rf"bad\.yaml: .*{message}"):
        load_settings([file])


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("optim:\n", {"optim.lr": 0.5}, "optim=None: is a group of settings"),
        ("tune: 3\n", {"tune.space.optim.lr": {"grid": [0.5]}}, "tune=3: is a group of settings"),
        ("modalities: {sMRI: 96}\n", {}, "modalities.sMRI=96: is a group of settings"),
    ],
)
def test_a_group_of_settings_that_is_given_no_group_is_named(
    tmp_path: Path, text: str, override: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_settings([write(tmp_path / "a.yaml", text)], override)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().optim.lr = 1.0


def test_the_written_settings_read_back_to_the_same(tmp_path: Path) -> None:
    changed = {"tune.space.optim.lr": {"grid": [1e-5]}, "modalities.dMRI.grid": [8, 8, 8], "data.train": "a: b"}
    settings = load_settings(overrides=changed)
    assert load_settings([write(tmp_path / "resolved.yaml", settings.to_yaml())]) == settings != Settings()


def test_new_values_make_new_settings() -> None:
    old = Settings()
    assert old.with_values({"optim.lr": 0.5}).flat()["optim.lr"] == 0.5
    assert old.flat()["optim.lr"] == 0.001


def test_every_setting_has_a_line_that_says_what_it_does() -> None:
    undocumented = [name for name, _, line in describe_settings() if not line.endswith(".")]
    assert undocumented == []
    assert {"optim.lr", "modalities", "tune.space", "resources.storage"} <= {name for name, _, _ in describe_settings()}


def test_importing_the_settings_loads_neither_torch_nor_ray() -> None:
    code = "import sys, umbrella, umbrella.config, umbrella.cli; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
