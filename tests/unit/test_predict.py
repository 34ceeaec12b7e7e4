"""predict.py: one question, a chat, a file of conversations, and its errors."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Done, make_conversation, make_prediction
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.evaluation_run.cohort_predictions import PredictionFile
from umbrella.evaluation_run.evaluate import load_evaluation_settings
from umbrella.evaluation_run.prediction_workers import WINDOW, make_batches
from umbrella.modality import Modality


def paths(conversation: Conversation) -> list[str]:
    return [volume.image_path for volume in conversation.volumes]


def test_a_question_is_answered_and_candidates_get_probabilities(
    ask: Callable[..., Done], said: list[Conversation]
) -> None:
    s2, d, _ = paths(said[2])
    assert ask("--ask", "Hi", "evaluate.max_new_tokens=2").stdout == "He\n"
    done = ask(s2, d, "--modality", "sMRI,dMRI", "--ask", "", "--candidates", "male.,Seen.")
    answer, first, second = done.stdout.splitlines()
    assert (answer, first.split()[1], second.split()[1]) == ("Seen.", "Seen.", "male.")
    assert float(first.split()[0]) + float(second.split()[0]) == pytest.approx(1, abs=1e-4)
    assert "would answer 'Hi' about:" in ask("--ask", "Hi", s2, "--dry-run").stdout


def test_a_chat_reads_questions_and_volumes_line_by_line(
    ask: Callable[..., Done], said: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    f2 = paths(said[2])[2]

    def chat(text: str) -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return ask("--chat", "evaluate.max_new_tokens=12")

    done = chat(f"Hi\n/add '{f2}' fMRI\nAnd this?\n\nNever asked\n")
    assert (done.status, done.stdout.splitlines()[0], len(done.stdout.splitlines())) == (0, "Hello, you.", 2)
    assert chat("/add /none.nii\nHi\n") == (2, "", "error: /none.nii does not exist\n")
    assert chat("/sub a.nii\n").stderr.startswith("error: /sub a.nii: write /add FILE")


def test_a_chat_at_a_terminal_continues_after_an_error(
    ask: Callable[..., Done], said: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    f2, prompts = paths(said[2])[2], []
    lines = iter(["/add /none.nii", f"/add {f2}", "/add", "Hi"])

    def typed(prompt: str = "") -> str:
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", typed)
    done = ask("--chat", "evaluate.max_new_tokens=12")
    assert prompts == ["> ", "> ", "[1 volume] > ", "[1 volume] > ", "> "]
    assert (done.status, len(done.stderr.splitlines())) == (0, 2)
    assert done.stderr.startswith("error: /none.nii does not exist")


def test_user_errors_are_one_line_and_status_2(
    ask: Callable[..., Done], run: Callable[..., Done], said: list[Conversation], tmp_path: Path
) -> None:
    s2, none = paths(said[2])[0], tmp_path / "none.jsonl"
    cases = {
        "/none.nii does not exist": ("/none.nii", "--ask", "?"),
        "there is no question; give --ask ": (s2,),
        "--ask and --chat cannot go together; give ": ("--chat", "--ask", "?"),
        f"{s2}: does not go with data.input": (s2, f"data.input={none}"),
        "--candidates: does not go with --chat": ("--chat", "--candidates", "a,b"),
        "checkpoint=nowhere: there is no such folder or run; name a": ("--ask", "?", "checkpoint=nowhere"),
        f"{none}: no such file or folder": (f"data.input={none}",),
        "evaluate.calibrated: ": (f"data.input={none}", "evaluate.calibrated=true"),
    }
    for message, words in cases.items():
        done = ask(*words)
        assert (done.status, len(done.stderr.splitlines())) == (2, 1)
        assert done.stderr.startswith(f"error: {message}")
    done = run("predict.py", "--ask", "?", f"resources.storage={tmp_path}")
    assert done.stderr.startswith("error: checkpoint is not set; name a training, a sweep or a step_... folder; ")


def test_a_filter_by_modality_leaves_out_modalities_that_the_model_does_not_know(learnt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_0000001"
    shutil.copytree(learnt, folder)
    (folder / "settings.yaml").write_text(load_settings().to_yaml(), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"trained_modalities": ["sMRI"]}), encoding="utf-8")

    def known(modality: str) -> set[str]:
        return set(load_evaluation_settings(folder, overrides={"data.modality": modality}).modalities)

    assert known("") == known("dMRI") == {"sMRI"}, "others are refused"
    assert known("sMRI") == {"sMRI", "dMRI", "fMRI"}, "others are read, and left out"


ABOUT = {"checkpoint": {"name": "runs/a", "content": "1"}, "length": 3}


def test_a_prediction_file_continues_after_an_incomplete_line(tmp_path: Path) -> None:
    file, rows = tmp_path / "a.jsonl", [make_prediction(task_id=name, text="é") for name in "ab"]
    with PredictionFile(file, ABOUT).open() as append:
        append(rows)
        with pytest.raises(UserError, match="another process is writing"), PredictionFile(file, ABOUT).open():
            pass
    whole = file.read_bytes()
    for cut in (1, 40):  # the end of the line alone, and a part of it
        file.write_bytes(whole[:-cut])
        again = PredictionFile(file, ABOUT | {"checkpoint": {"name": "elsewhere/a", "content": "1"}})
        assert again.predicted("abc") == {"a"}
        assert file.read_bytes() == whole[:-cut], "reading changes nothing"
        with again.open() as append:
            append(rows[1:])
        assert file.read_bytes() == whole


def test_a_prediction_file_with_other_metadata_or_contents_is_refused(tmp_path: Path) -> None:
    file, line = tmp_path / "a.jsonl", make_prediction(task_id="a").to_json() + "\n"
    for metadata in ({"length": 3}, ABOUT):  # an empty file may get other metadata
        with PredictionFile(file, metadata).open():
            pass
    file.write_text(line)
    was = "was begun with something else: "
    for changed, words in [
        ({"checkpoint": {"name": "runs/b", "content": "2"}}, was + "checkpoint was runs/a and is runs/b; give another"),
        ({"checkpoint": {"name": "runs/a", "content": "2"}}, was + "checkpoint=runs/a has changed since; give another"),
        ({"length": 4}, was + "length was 3 and is 4; give another output"),
        ({"more": 1}, was + "more was None and is 1; give another output"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            PredictionFile(file, ABOUT | changed)
    for content, known, words in [
        (line, {"b"}, "a.jsonl:1: a is not in data.input; delete that line"),
        (line * 2, {"a"}, "a.jsonl:2: a is there twice"),
        ("{}\n", {"a"}, "a.jsonl:1: is no prediction"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=re.escape(words)):
            PredictionFile(file, ABOUT).predicted(known)
    about = tmp_path / "a.jsonl.about.json"
    about.write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"about\.json: cannot be read; give another output"):
        PredictionFile(file, ABOUT)
    about.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: is there already, and a\.jsonl\.about\.json is not"):
        PredictionFile(file, ABOUT)
    with pytest.raises(UserError, match="is a folder; name a file"):
        PredictionFile(tmp_path, ABOUT)


def test_batches_contain_each_conversation_once_sorted_by_length_within_a_window(
    modalities: dict[str, Modality],
) -> None:
    sizes = [(7 * i) % 31 for i in range(100)]
    conversations = [make_conversation(("user", "x" * n), ("assistant", "y")) for n in sizes]
    batches = make_batches(conversations, modalities, 4)
    assert [len(batch) for batch in batches] == [4] * 25
    for start in range(0, len(batches), WINDOW):
        window = [i for batch in batches[start : start + WINDOW] for i in batch]
        assert sorted(window) == list(range(4 * start, 4 * start + len(window)))
        assert [sizes[i] for i in window] == sorted(sizes[i] for i in window)
    volume = make_conversation(("user", [("fMRI", "/f.nii")]), ("assistant", "y"))  # 3 tokens
    assert make_batches([conversations[sizes.index(4)], volume, conversations[sizes.index(2)]], modalities, 3) == [
        [2, 1, 0]
    ]
