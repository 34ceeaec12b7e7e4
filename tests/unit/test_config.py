"""Settings: defaults, files and overrides become one tree; an error names the setting, the value and the fix."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from umbrella.base import UserError
from umbrella.cli import parse
from umbrella.config import Loader, Settings, load_settings
from umbrella.settings_help import list_settings


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_files_override_earlier_ones_and_overrides_both(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {lr: 0.5, clip: 2.0}\ntrain: {epochs: 3}\n")
    second = write(tmp_path / "b.yaml", "optim: {lr: 0.25, warmup: 7}\n")
    empty = write(tmp_path / "c.yaml", "# nothing yet\n")
    settings = load_settings([first, second, empty], {"optim.warmup": 9})
    changed = {"lr": 0.25, "warmup": 9, "clip": 2.0}
    assert settings.optim.model_dump() == Settings().optim.model_dump() | changed
    assert settings.train.epochs == 3


def test_relative_folders_are_resolved_where_the_script_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = load_settings(overrides={"resources.node_store": "fast", "resources.store": "s3://bucket/volumes"})
    sent = pickle.dumps(settings)
    monkeypatch.chdir(tmp_path / "elsewhere")
    resources = pickle.loads(sent).with_values({"optim.lr": 0.5}).resources
    assert (resources.storage, resources.node_store) == (str(tmp_path / "runs"), str(tmp_path / "fast"))
    assert (resources.store, resources.upload) == ("s3://bucket/volumes", "")


def test_an_override_changes_or_adds_one_modality() -> None:
    pet = {"grid": [8, 8, 8], "patch": [4, 4, 4]}
    settings = load_settings(overrides={"modalities.sMRI.grid": [48, 48, 48], "modalities.PET": pet})
    assert list(settings.modalities) == ["sMRI", "dMRI", "fMRI", "PET"]
    assert (settings.modalities["sMRI"].grid, settings.modalities["sMRI"].patch) == ((48, 48, 48), (8, 8, 8))
    assert settings.modalities["fMRI"] == Settings().modalities["fMRI"]


RATE = {"grid": [0.5]}


@pytest.mark.parametrize(
    ("overrides", "space"),
    [
        ({"tune.space.optim.lr": RATE}, {"optim.lr": RATE, "seed": {"grid": [0, 1]}}),
        ({"tune.space": {"optim.lr": RATE}}, {"optim.lr": RATE, "seed": {"grid": [0, 1]}}),
        (
            {"tune.space.optim.lr": None, "tune.space.train.epochs": RATE},
            {"seed": {"grid": [0, 1]}, "train.epochs": RATE},
        ),
    ],
)
def test_an_entry_of_the_search_space_is_replaced_as_a_whole_or_removed_by_null(
    tmp_path: Path, overrides: dict, space: dict
) -> None:
    first = write(tmp_path / "a.yaml", "tune: {space: {optim.lr: {loguniform: [0.1, 0.2]}, seed: {grid: [0, 1]}}}\n")
    assert load_settings([first], overrides).tune.space == space
    second = write(tmp_path / "b.yaml", "tune: {space: {optim.lr: {grid: [0.5]}}}\n")
    assert load_settings([first, second]).tune.space["optim.lr"] == RATE


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.wieght_decay", "optim.wieght_decay: there is no such setting; did you mean optim.weight_decay?"),
        ("batch_size", "did you mean train.batch_size?"),
        ("optm.lr", "did you mean optim?"),
        ("optim.lr.peak", "optim.lr.peak: there is no such setting"),
        ("evaluate.length_normalised", "there is no such setting; it was removed: candidates are compared"),
        ("cohort.xyzzy", "there are cohort.subjects, cohort.seed"),
        ("modalities.sMRI.patches", "did you mean modalities.sMRI.patch?"),
    ],
)
def test_an_unknown_setting_is_an_error_that_suggests_known_ones(name: str, hint: str) -> None:
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
        ("optim.clip", "1:30.5", "='1:30.5': Input should be a valid number.*; write one number in decimal digits"),
    ],
)
def test_a_value_that_may_mean_another_number_is_an_error(name: str, text: str, message: str) -> None:
    for read in (
        lambda: parse([f"{name}={text}"], ""),
        lambda: Settings().with_values({name: yaml.load(text, Loader)}),
    ):
        with pytest.raises(UserError, match=f"^{name}{message}"):
            read()


@pytest.mark.parametrize("text", ["007", "on", "no", "1_0", "2024-01-01", "1e5", "0o7"])
def test_a_text_setting_is_the_text_that_is_written(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "a.yaml", f"name: {text}\n")
    assert load_settings([file]).name == parse([f"name={text}"], "").settings.name == text
    resolved = write(tmp_path / "resolved.yaml", load_settings([file]).to_yaml())
    assert load_settings([resolved]).name == text


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("name", "7", "7"),
        ("experiment", "null", "null"),
        ("name", "1.50", "1.50"),
        ("name", "'a'", "a"),
        ("data.task_filter", "T1: a: b", "T1: a: b"),
        ("seed", "7", 7),
        ("train.shard", "on", True),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.embedder_lr", "null", None),
    ],
)
def test_a_value_on_the_command_line_has_the_type_of_its_setting(name: str, text: str, value: object) -> None:
    assert parse([f"{name}={text}"], "").settings.flat()[name] == value


PATHS = (
    *("checkpoint", "output", "data.train", "data.validation", "data.test", "data.input", "data.root"),
    *("data.path_map./old", "model.checkpoint", "model.chat_template"),
    *("resources.storage", "resources.upload", "resources.store", "resources.node_store"),
)


@pytest.mark.parametrize("name", PATHS)
def test_a_tilde_is_the_home_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, path in (("~", f"{tmp_path}"), ("~/a", f"{tmp_path}/a")):
        assert parse([f"{name}={text}"], "").settings.flat()[name] in (path, [path])
    assert load_settings([write(tmp_path / "a.yaml", "output: ~\n")]).output == str(tmp_path)
    with pytest.raises(UserError, match=r"there is no home folder ~nobody-here; write \./~nobody-here/a"):
        load_settings(overrides={name: "~nobody-here/a"})


@pytest.mark.parametrize("name", [*PATHS, "resources.address"])
def test_an_address_with_credentials_is_an_error_that_hides_them(name: str) -> None:
    for address in ("https://user:hidden@host/x", "ray://host:1/x?token=hidden"):
        with pytest.raises(UserError) as caught:
            load_settings(overrides={name: address})
        assert str(caught.value).startswith(name)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"mask.supervise": "some", "optim.lr": -1, "train.epochs": "many"},
            "mask.supervise='some': Input should be 'assistant', 'last_assistant' or 'all'.*\n"
            "optim.lr=-1: Input should be greater than 0\ntrain.epochs='many': Input should be a valid integer.*",
        ),
        ({"name": 7}, "name=7: .*; write a text in quotes, as in '7'"),
        ({"name": ".."}, "name=.*; give a name with letters or digits"),
        ({"name": "ä" * 125}, "name=.*; give a shorter one"),
        (
            {"modalities.sMRI": {"grid": [48, 48, 48], "patch": [7, 8, 8]}},
            r"modalities\.sMRI: patch \(7, 8, 8\) does not divide grid \(48, 48, 48\) along every axis",
        ),
        ({"resources.workers": 2, "resources.min_workers": 3}, "resources: min_workers=3 is more than workers=2"),
        ({"optim": None}, "optim=None: is a group of settings; .*"),
        ({"modalities.sMRI": 96}, "modalities.sMRI=96: is a group of settings; .*"),
    ],
)
def test_each_invalid_value_is_a_line_with_the_setting_and_valid_values(overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        load_settings(overrides=overrides)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- a\n", "holds list, not a mapping"), (None, "No such file")]
)
def test_a_file_without_settings_is_an_error(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "bad.yaml"
    if text is not None:
        write(file, text)
    with pytest.raises(UserError, match=rf"bad\.yaml: .*{message}"):
        load_settings([file])


def test_saved_settings_are_restored(tmp_path: Path) -> None:
    changed = {"tune.space.optim.lr": {"grid": [1e-5]}, "modalities.dMRI.grid": [8, 8, 8], "data.train": "a: b"}
    settings = load_settings(overrides=changed)
    assert load_settings([write(tmp_path / "resolved.yaml", settings.to_yaml())]) == settings != Settings()


def test_every_setting_has_a_description() -> None:
    settings = list_settings(Settings())
    assert [entry.name for entry in settings if not entry.description.endswith(".")] == []
    assert {"optim.lr", "modalities.NAME.grid", "tune.space", "resources.storage"} <= {entry.name for entry in settings}


def test_importing_the_settings_loads_neither_torch_nor_ray() -> None:
    code = "import sys, umbrella, umbrella.config, umbrella.cli; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
