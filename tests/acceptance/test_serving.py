"""``mlflow models serve``, as in docs/answering.md, answers requests with paths and with bytes of NIfTI files."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from umbrella.conversations.schema import Conversation
from umbrella.inference.model import Umbrella
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.model_registry import log_model
from umbrella.tracking.store import open_experiment

pytestmark = pytest.mark.acceptance
QUESTION = "Is this subject male or female?"


class Served:
    """A running server, and the model that it serves."""

    def __init__(self, address: str, model: Umbrella) -> None:
        self.address, self.model = address, model

    def post(self, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Send a request; return the status and the answer."""
        body, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        try:
            with urlopen(Request(f"{self.address}/invocations", body, headers), timeout=120) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def served(
    mlflow_store: Callable[[Path], str], learnt: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The server that the documented command starts, in an MLflow store of its own."""
    storage = tmp_path_factory.mktemp("served")
    uri = mlflow_store(storage)
    run = MlflowLogger.start(uri, open_experiment(uri, "x", storage), "best", folder=storage / "best")
    log_model(uri, run.run_id, learnt, register="brains")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "--model-uri", "models:/brains/1", "--env-manager", "local", "--port", str(port)]
    # In a session of its own, which is ended as a whole: MLflow starts the server as another process.
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words],
        # MLflow looks uvicorn up in PATH, as it is in an activated environment.
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=storage,
        stdout=(storage / "log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while not is_healthy(address):
            assert process.poll() is None, (storage / "log").read_text()
            time.sleep(0.2)
        yield Served(address, Umbrella.from_checkpoint(learnt, device="cpu"))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def is_healthy(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_path_and_the_bytes_of_the_same_file_have_the_answer_of_the_checkpoint(
    served: Served, cohort: dict[str, Conversation]
) -> None:
    scans = {volume.modality: volume.image_path for volume in cohort["three"].volumes}
    for modality, path in scans.items():
        expected = served.model.ask(path, QUESTION, modality)
        encoded = base64.b64encode(Path(path).read_bytes()).decode()
        for given in ({"volumes": path}, {"volumes": [path]}, {"nifti": encoded}, {"nifti": [encoded]}):
            records = [{"question": QUESTION, "modality": modality, **given}]
            assert served.post({"dataframe_records": records}) == (200, {"predictions": [expected]})


def test_records_with_paths_bytes_and_no_volume_are_answered_together(
    served: Served, cohort: dict[str, Conversation]
) -> None:
    path = cohort["three"].volumes[0].image_path
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    records = [
        {"question": QUESTION, "volumes": path, "modality": "sMRI"},
        {"question": "Who are you?"},
        {"question": "Which of them is older?", "volumes": [path], "nifti": [encoded], "modality": ["sMRI", "sMRI"]},
    ]
    model = served.model
    volumes: list[list[str]] = [[path], [], [path, path]]
    questions = [
        model.question(of_one, str(record["question"]), "sMRI") for of_one, record in zip(volumes, records, strict=True)
    ]
    expected = model.answer(questions, max_new_tokens=6)
    for form in ("dataframe_records", "inputs"):  # MLflow writes the logged example as "inputs"
        answer = served.post({form: records, "params": {"max_new_tokens": 6}})
        assert answer == (200, {"predictions": expected})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"volumes": "/nowhere/scan.nii.gz"}, "/nowhere/scan.nii.gz"),
        ({"nifti": base64.b64encode(b"not a scan").decode()}, "record_0_nifti_0.nii: "),
        ({"nifti": "?"}, "record_0_nifti_0.nii: "),
        ({"nifti": ["abc"]}, "record_0: nifti: give the Base64 text of a file"),
        ({"volumes": [5]}, "record_0: volumes=[5]: give a path"),
        ({"volumes": [], "modality": ["sMRI"]}, "1 names for 0 volumes"),
    ],
)
def test_a_request_that_cannot_be_answered_has_status_400_and_a_reason(
    served: Served, record: dict[str, Any], reason: str
) -> None:
    status, answer = served.post({"dataframe_records": [{"question": QUESTION, "modality": "sMRI", **record}]})
    assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert reason in answer["message"].splitlines()[-1]
    assert "Traceback" not in answer["message"]
    assert served.post({"dataframe_records": [{"question": "Who are you?"}]})[0] == 200, "the server still answers"
