"""Privacy: no passwords in settings, messages or MLflow, and hashed subject ids where tracking.hash_subjects asks."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.evaluation.predictions import Prediction
from umbrella.file_storage import FileStorage
from umbrella.tracking.provenance import hash_subject, read_salt, redact_subjects
from umbrella.tracking.store import describe_error, tracking_uri
from umbrella.training.reporting import predictions_json


def test_the_password_of_a_server_moves_to_the_variables_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://anna:p%40ss@mlflow.example:8443/x")
    assert tracking_uri("runs") == "https://mlflow.example:8443/x"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("anna", "p@ss")


SECRETS = [
    "https://anna:s3cr3t@host:5000",
    "https://s3cr3t@host",
    "postgresql://db/mlflow?user=anna&password=s3cr3t",
    "mysql://db/mlflow?sslpassword=s3cr3t",
    "s3://KEY:s3cr3t@bucket/runs",
    "s3://KEY:s3/cr3t+s3cr3t@bucket/runs",
    "s3://bucket/runs?region=x&secret_key=s3cr3t",
    "s3://bucket/runs?Secret=s3cr3t&key=s3cr3t",
    "abfss://runs:s3cr3t@account.dfs.core.windows.net",
    "abfss://runs@account.dfs.core.windows.net?account_key=s3cr3t",
    "https://host/x?sv=1&sig=s3cr3t",
    "gs://bucket?access_token=s3cr3t",
    "s3://bucket/x?X-Amz-Signature=s3cr3t",
    "az://bucket?sas=s3cr3t",
]
PLAIN = [
    "http://host:5000",
    "http://host:5000/x@y",
    "postgresql://anna@db/mlflow?sslkey=/keys/mine&ssl_key=/keys/mine",
    "s3://bucket/keys?region=x&scheme=http&endpoint_override=127.0.0.1:9000",
    "gs://anonymous@bucket/runs",
    "abfss://runs@account.dfs.core.windows.net/x",
    "/disk/key=1/a:b@c",
    "s3://bucket/key=1/x",
    "file:///disk/token",
    "/disk/run,seed=0,max_tokens=5",
    "sqlite:////disk/a key=3.db",
]


@pytest.mark.parametrize("address", SECRETS)
def test_no_setting_accepts_an_address_with_credentials(address: str) -> None:
    remedies = {
        "tracking.uri": "MLFLOW_TRACKING_PASSWORD",
        "resources.upload": "AWS_SECRET_ACCESS_KEY",
        "resources.store": "~/.aws/credentials",
        "resources.node_store": "AWS_SECRET_ACCESS_KEY",
    }
    for name, remedy in remedies.items():
        with pytest.raises(UserError) as error:
            load_settings(overrides={name: address})
        message = str(error.value)
        assert message.startswith(f"{name}='{address.split('://')[0]}://")
        assert "so they hold no password, token or key; leave it out and " in message
        assert remedy in message
        assert "\n" not in message
        assert "cr3t" not in message
    masked = describe_error(ValueError(f"no answer from {address} (twice)"))
    assert masked.startswith("no answer from ")
    assert "cr3t" not in masked
    assert "cr3t" not in str(FileStorage(address))
    with pytest.raises(UserError, match="storage is a folder") as error:
        load_settings(overrides={"resources.storage": address})
    assert "cr3t" not in str(error.value)


@pytest.mark.parametrize("address", [*PLAIN, ""])
def test_an_address_without_a_secret_is_a_setting(address: str) -> None:
    settings = load_settings(overrides={"tracking.uri": address, "resources.upload": address})
    assert (settings.tracking.uri, settings.resources.upload) == (address, address)


def test_the_salt_of_a_storage_is_created_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    salt = read_salt(tmp_path)
    assert (len(salt), read_salt(tmp_path)) == (64, salt)
    assert [path.name for path in tmp_path.iterdir()] == ["subjects.salt"]
    assert stat.S_IMODE((tmp_path / "subjects.salt").stat().st_mode) == 0o600
    (tmp_path / "other").mkdir()
    assert hash_subject("sub-1", read_salt(tmp_path / "other")) != hash_subject("sub-1", salt)


def test_subject_ids_are_redacted_as_whole_words() -> None:
    text = "sub-1_T1w.nii.gz, 12 tokens of sub-1 and sub-12, subject 1, xsub-1"
    one, twelve = hash_subject("sub-1", "salt"), hash_subject("sub-12", "salt")
    expected = f"{one}_T1w.nii.gz, 12 tokens of {one} and {twelve}, subject 1, xsub-1"
    assert redact_subjects(text, ["sub-1", "sub-12"], "salt") == expected
    assert redact_subjects(text, [], "salt") == text


def scored(task: str, probabilities: dict[str, float], label: str | float, subject: str = "sub-7") -> Prediction:
    found = {"probabilities": probabilities, "answer_nll": 6.0, "answer_tokens": 3, "subjects": (subject,)}
    return Prediction(task, "T1", subject, "sex", label, str(label), **found)


def keep(text: str, subjects: Any) -> str:
    return text


def test_the_table_of_predictions_has_the_most_likely_answer_and_all_probabilities() -> None:
    rows = [
        scored("b", {"female": 0.25, "male": 0.75}, "male"),
        scored("a", {"female": 0.25, "male": 0.75}, "female"),
        scored("d", {"female": 0.5, "male": 0.5}, "male"),
        scored("c", {}, 63.5),
    ]
    table = json.loads(predictions_json(rows, 10, keep))
    found = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [tuple(row[name] for name in ("task_id", "chosen", "right", "truth")) for row in found] == [
        ("a", "male", False, "female"),
        ("b", "male", True, "male"),
        ("c", None, None, 63.5),
        ("d", None, False, "male"),
    ]
    assert found[0]["probabilities"] == {"female": 0.25, "male": 0.75}
    assert {row["nll_per_token"] for row in found} == {2.0}


def test_the_table_of_predictions_has_the_same_sample_in_every_run_and_redacts_subjects() -> None:
    rows = [scored(f"sub-{i}_sex", {"female": 0.1, "male": 0.9}, "male", f"sub-{i}") for i in range(50)]
    rows.append(replace(scored("sub-1_vs_sub-2", {}, "male", "sub-1"), subjects=("sub-1", "sub-2")))
    table = predictions_json(rows, 8, keep)
    assert predictions_json(rows[::-1], 8, keep) == table
    assert len(json.loads(table)["data"]) == 8
    redacted = predictions_json(rows, 51, lambda text, subjects: redact_subjects(text, subjects, "salt"))
    assert "sub-" not in redacted
    assert len({row[3] for row in json.loads(redacted)["data"]}) == 50
