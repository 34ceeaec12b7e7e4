"""The tokenizer of a checkpoint: where its chat template comes from, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from umbrella.base import UserError
from umbrella.data.tokenizer import CHATML, VICUNA, byte_tokenizer, load_tokenizer

OWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """A checkpoint's folder, in which the tokenizer has that chat template, and the processor that other one."""

    def save(own: Any = None, processor: str | None = None, folder: Path = tmp_path / "checkpoint") -> str:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = own
        tokenizer.save_pretrained(folder)
        if processor is not None:
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor}))
        return str(folder)

    return save


def test_the_template_is_the_tokenizers_then_the_processors_then_chatml(saved: Callable[..., str]) -> None:
    assert load_tokenizer("").chat_template == CHATML
    assert load_tokenizer(saved()).chat_template == CHATML
    assert load_tokenizer(saved(processor="é {{ messages }}")).chat_template == "é {{ messages }}"
    assert load_tokenizer(saved(OWN, processor="not this")).chat_template == OWN


def test_a_processors_jinja_file_is_the_tokenizers_own(saved: Callable[..., str]) -> None:
    folder = saved(processor="not this")
    (Path(folder) / "chat_template.jinja").write_text(OWN)
    assert load_tokenizer(folder).chat_template == OWN


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_template_that_is_asked_for_goes_before_all_others(
    saved: Callable[..., str], tmp_path: Path, checkpoint: bool
) -> None:
    folder = saved(OWN, processor="nor this") if checkpoint else ""
    file = tmp_path / "mine.jinja"
    file.write_text("é{{ messages }}\n", "utf-8")
    assert load_tokenizer(folder, "chatml").chat_template == CHATML
    assert load_tokenizer(folder, "vicuna").chat_template == VICUNA
    assert load_tokenizer(folder, str(file)).chat_template == "é{{ messages }}\n"


def test_a_saved_tokenizer_keeps_its_template(saved: Callable[..., str], tmp_path: Path) -> None:
    load_tokenizer(saved(OWN), "vicuna").save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).chat_template == VICUNA


def test_of_several_templates_the_default_is_taken(saved: Callable[..., str], tmp_path: Path) -> None:
    assert load_tokenizer(saved({"default": OWN, "tools": "~"})).chat_template == OWN
    folder = saved({"rag": OWN, "tools": "x"}, folder=tmp_path / "none")
    with pytest.raises(
        UserError, match=r"^model\.checkpoint=.*: its chat templates are rag, tools, none of them the d"
    ):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "chatml").chat_template == CHATML


def test_vicuna_writes_turns_in_a_line_and_ends_answers() -> None:
    tokenizer = load_tokenizer("", "vicuna")
    messages = [
        {"role": role, "content": text}
        for role, text in [("system", "S."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == "S. USER: a ASSISTANT: b<|im_end|>USER: c ASSISTANT:"
    )


@pytest.mark.parametrize("template", ["Vicuna", "no/such.jinja", ".", "latin.jinja", OWN * 99])
def test_what_is_no_template_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"^model\.chat_template=.{1,100}: is not chatml or vicuna, and no Jinja file that"
    ):
        load_tokenizer("", template)


@pytest.mark.parametrize("written", ["{", '"text"', "{}", '{"chat_template": ["a"]}'])
def test_a_broken_template_of_the_processor_is_an_error_with_the_remedy(
    saved: Callable[..., str], written: str
) -> None:
    folder = saved()
    (Path(folder) / "chat_template.json").write_text(written)
    with pytest.raises(
        UserError, match=r"^model\.checkpoint=.*: its chat_template\.json .*; set model\.chat_template$"
    ):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "chatml").chat_template == CHATML


def test_a_tokenizer_written_in_python_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"^model\.checkpoint=.*: its ByT5Tokenizer is written in Python and does not say"
    ):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_or_without_a_placeholder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*: its tokenizer cannot be loaded: [^\n]*$"):
        load_tokenizer(str(tmp_path))
    byte_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<image>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*: its tokenizer has no <image> token; is it a LLaVA\?$"):
        load_tokenizer(str(tmp_path))
