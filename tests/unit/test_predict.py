"""predict.py as a person starts it: a question, a conversation, a cohort, and what is said when that cannot be."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Done, write_questions
from umbrella.base import UserError
from umbrella.conversations.reading import read_conversations
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation_run.cohort_predictions import PredictionFile


def volumes(conversation: Conversation) -> list[str]:
    return [volume.image_path for volume in conversation.volumes]


def test_a_question_about_volumes_is_answered_and_candidates_have_their_probabilities(
    ask: Callable[..., Done], said: list[Conversation]
) -> None:
    s2, d, _ = volumes(said[2])
    assert ask(s2, d, "--modality", "sMRI,dMRI", "--ask", "") == (0, "Seen.\n", "")
    done = ask("--ask", "Hi", "--candidates", "Bye., Hello, you.")  # commas part answers
    assert done.stdout.splitlines()[0] == "Hello, you."
    done = ask(s2, d, "--modality", "sMRI,dMRI", "--ask", "", "--candidates", "male.,Seen.")
    answer, first, second = done.stdout.splitlines()
    assert (answer, first.split()[1], second.split()[1]) == ("Seen.", "Seen.", "male.")
    assert float(first.split()[0]) + float(second.split()[0]) == pytest.approx(1, abs=1e-4)
    assert ask("--ask", "Hi", "evaluate.max_new_tokens=2").stdout == "He\n"
    assert "would ask" in ask("--ask", "Hi", s2, "--dry-run").stdout


def test_a_conversation_goes_on_line_by_line_with_volumes_that_are_added(
    ask: Callable[..., Done], said: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    f2 = volumes(said[2])[2]

    def chat(text: str, *words: str) -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return ask("--chat", *words)

    assert chat("Hi\n") == (0, "Hello, you.\n", "")
    done = chat(f"/add '{f2}' fMRI\nHi\nAnd this?\n\nNever asked\n")
    assert (done.status, len(done.stdout.splitlines())) == (0, 2)
    assert chat("/add /none.nii\nHi\n") == (2, "", "error: /none.nii does not exist\n")
    assert chat(f"/add {f2} CT\nHi\n").stderr.startswith("error: modality='CT': this model was trained on")
    assert chat("/sub a.nii\n").stderr.startswith("error: /sub a.nii: write /add FILE")


def test_at_a_terminal_what_is_wrong_is_said_and_the_conversation_goes_on(
    ask: Callable[..., Done], said: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    f2, prompts = volumes(said[2])[2], []
    lines = iter(["/add /none.nii", f"/add {f2}", "/add", "Hi"])

    def typed(prompt: str = "") -> str:
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", typed)
    done = ask("--chat")
    assert prompts == ["> ", "> ", "[1 volume] > ", "[1 volume] > ", "> "]
    assert (done.status, len(done.stderr.splitlines())) == (0, 2)
    assert done.stderr.startswith("error: /none.nii does not exist")


def test_what_cannot_be_asked_is_one_line_and_status_2(
    ask: Callable[..., Done], run: Callable[..., Done], learnt: Path, said: list[Conversation], tmp_path: Path
) -> None:
    s2 = volumes(said[2])[0]
    storage = f"resources.storage={tmp_path}"
    none, newest = tmp_path / "none.jsonl", tmp_path / "trainings" / "a" / "step_0000003"
    cases: list[tuple[Callable[[], Done], str]] = [
        (lambda: ask("/none.nii", "--ask", "?"), "/none.nii does not exist"),
        (lambda: ask(s2, "--ask", "?"), f"{s2}: has 3 axes and may be dMRI or sMRI; name its modality: "),
        (
            lambda: ask(s2, "--ask", "?", "--modality", "CT"),
            "modality='CT': this model was trained on dMRI, fMRI, sMRI",
        ),
        (lambda: ask(s2), "there is no question; give --ask "),
        (lambda: ask("--chat", "--ask", "?"), "--ask and --chat cannot go together; give "),
        (lambda: ask(s2, f"data.input={none}"), f"{s2}: does not go with data.input"),
        (lambda: ask("--chat", "--candidates", "a,b"), "--candidates: does not go with --chat"),
        (lambda: ask("--ask", "?", "checkpoint=nowhere"), "checkpoint=nowhere: there is no such folder; name a"),
        (lambda: ask("--ask", "?", f"checkpoint={tmp_path}"), f"{tmp_path}: is no checkpoint: it has no config.json"),
        (lambda: ask(f"data.input={none}"), f"{none}: no such file or folder"),
        (lambda: run("predict.py", "--ask", "?", storage), "checkpoint is not set; name a training's step_... folder,"),
    ]
    for call, words in cases:
        done = call()
        assert done.status == 2, words
        assert done.stderr.startswith(f"error: {words}")
        assert len(done.stderr.splitlines()) == 1
    newest.mkdir(parents=True)
    assert f"as in checkpoint={newest}, the newest" in run("predict.py", "--ask", "?", storage).stderr


def test_questions_may_lack_their_answer_where_they_are_asked_and_nowhere_else(
    said: list[Conversation], tmp_path: Path
) -> None:
    file = write_questions(tmp_path / "asked.jsonl", said)
    with file.open("a", encoding="utf-8") as more:
        for name, turns in {
            "blank": [("user", "?"), ("assistant", " ")],
            "nothing": [("user", " ")],
            "who": [("user", "?"), ("doctor", "?")],
            "system": [("system", "Be brief.")],
        }.items():
            turns = [{"role": role, "content": text} for role, text in turns]
            more.write(json.dumps({"task_id": name, "task_type": "T1", "conversations": turns}) + "\n")
    reading = read_conversations(file, allow_unanswered=True)
    assert [c.task_id for c in reading.conversations] == ["two", "none", "three", "blank"]
    assert [c.answer for c in reading.conversations] == ["", "", "", " "]
    assert [c.conversations[:-1] for c in reading.conversations[:3]] == [c.conversations[:-1] for c in said]
    assert [(p.where, p.field) for p in reading.problems] == [
        (f"{file}:5", "conversations.0.content"),
        (f"{file}:6", "conversations.1.role"),
        (f"{file}:7", "conversations"),
    ]
    assert [p.where for p in read_conversations(file).problems][:4] == [f"{file}:{line}" for line in (1, 2, 3, 4)]


def row(task_id: str) -> Prediction:
    return Prediction(task_id, "T1", "s", "sex", None, "", text="é")


def test_answers_go_on_where_a_killed_process_left_half_a_line(tmp_path: Path) -> None:
    file, about = tmp_path / "a.jsonl", {"checkpoint": {"name": "runs/a", "content": "1"}, "length": 3}
    with PredictionFile(file, about).open() as out:
        out.write([row("a"), row("b")])
        with pytest.raises(UserError, match="another process is writing"), PredictionFile(file, about).open():
            pass
    whole = file.read_bytes()
    for cut in (1, 40):  # the line's end alone, and some of it
        file.write_bytes(whole[:-cut])
        moved = about | {"checkpoint": {"name": "elsewhere/a", "content": "1"}}
        again = PredictionFile(file, moved)
        assert again.predicted("abc") == {"a"}
        assert file.read_bytes() == whole[:-cut]  # looking changes nothing
        with again.open() as out:
            out.write([row("b")])
        assert file.read_bytes() == whole


def test_answers_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    file, about = tmp_path / "a.jsonl", {"checkpoint": {"name": "runs/a", "content": "1"}, "length": 3}
    with PredictionFile(file, about).open():
        pass
    with PredictionFile(file, {"length": 3}).open() as out:  # it has no answer yet, and is free
        out.write([])
    with PredictionFile(file, about).open() as out:
        out.write([row("a")])
    was = "was begun with something else: "
    for changed, words in [
        ({"checkpoint": {"name": "runs/b", "content": "2"}}, was + "checkpoint was runs/a and is runs/b; give another"),
        ({"checkpoint": {"name": "runs/a", "content": "2"}}, was + "checkpoint=runs/a has changed since; give another"),
        ({"length": 4}, was + "length was 3 and is 4; give another output"),
        ({"more": 1}, was + "more was None and is 1; give another output"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            PredictionFile(file, about | changed)
    with pytest.raises(UserError, match=r"a\.jsonl:1: a is not in data\.input; delete that line"):
        PredictionFile(file, about).predicted({"b"})
    file.write_text(f"{row('a').to_json()}\n{row('a').to_json()}\n{{}}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: a is there twice"):
        PredictionFile(file, about).predicted({"a"})
    file.write_text("{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: is no prediction"):
        PredictionFile(file, about).predicted({"a"})
    (tmp_path / "a.jsonl.about.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"about\.json: cannot be read; give another output"):
        PredictionFile(file, about)
    (tmp_path / "a.jsonl.about.json").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: is there already, and a\.jsonl\.about\.json is not"):
        PredictionFile(file, about)
    with pytest.raises(UserError, match="is a folder; name a file"):
        PredictionFile(tmp_path, about)
