"""The tokenizer of a checkpoint: the source of its chat template, and the errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from tests.conftest import byte_tokenizer
from umbrella.base import UserError
from umbrella.data.tokenizer import CHATML, VICUNA, load_tokenizer

OWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """A checkpoint's folder with the chat template of its tokenizer, and the text of chat_template.json."""

    def save(own: Any = None, processor: str | None = None) -> str:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = own
        tokenizer.save_pretrained(tmp_path)
        if processor is not None:
            (tmp_path / "chat_template.json").write_text(processor)
        return str(tmp_path)

    return save


def test_template_is_the_tokenizers_else_the_processors_else_chatml(saved: Callable[..., str]) -> None:
    assert load_tokenizer("").chat_template == CHATML
    assert load_tokenizer(saved()).chat_template == CHATML
    assert load_tokenizer(saved(processor='{"chat_template": "é {{ messages }}"}')).chat_template == "é {{ messages }}"
    assert load_tokenizer(saved(OWN)).chat_template == OWN


@pytest.mark.parametrize("checkpoint", [True, False])
def test_template_of_the_settings_has_priority_and_is_saved(
    saved: Callable[..., str], tmp_path: Path, checkpoint: bool
) -> None:
    folder = saved(OWN) if checkpoint else ""
    file = tmp_path / "mine.jinja"
    file.write_text("é{{ messages }}\n", "utf-8")
    assert load_tokenizer(folder, "chatml").chat_template == CHATML
    assert load_tokenizer(folder, str(file)).chat_template == "é{{ messages }}\n"
    load_tokenizer(folder, "vicuna").save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).chat_template == VICUNA


def test_of_several_templates_the_default_is_taken(saved: Callable[..., str]) -> None:
    assert load_tokenizer(saved({"default": OWN, "tools": "~"})).chat_template == OWN


def test_vicuna_writes_turns_in_a_line_and_ends_answers() -> None:
    turns = [("system", "S."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    text = load_tokenizer("", "vicuna").apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False, add_generation_prompt=True
    )
    assert text == "S. USER: a ASSISTANT: b<|im_end|>USER: c ASSISTANT:"


@pytest.mark.parametrize("template", ["Vicuna", ".", "latin.jinja", OWN * 99])
def test_unreadable_template_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"^model\.chat_template=.{1,100}: is not chatml or vicuna, and no Jinja file "):
        load_tokenizer("", template)


@pytest.mark.parametrize(
    ("own", "processor", "message"),
    [
        *((None, text, r"its chat_template\.json .*; set model\.chat_template$") for text in ("{", '"text"', "{}")),
        (None, '{"chat_template": ["a"]}', r"its chat_template\.json .*; set model\.chat_template$"),
        ({"rag": OWN, "tools": "x"}, None, "its chat templates are rag, tools, none of them the default; give the"),
    ],
)
def test_checkpoint_without_a_usable_template_is_an_error_and_the_setting_helps(
    saved: Callable[..., str], own: Any, processor: str | None, message: str
) -> None:
    folder = saved(own, processor)
    with pytest.raises(UserError, match=f"^model.checkpoint={folder}: {message}"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "chatml").chat_template == CHATML


def test_unusable_tokenizer_is_an_error_that_names_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*: its tokenizer cannot be loaded: [^\n]*$"):
        load_tokenizer(str(tmp_path))
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "slow")
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*: its ByT5Tokenizer is written in Python and does not"):
        load_tokenizer(str(tmp_path / "slow"))
    byte_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<image>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*: its tokenizer has no <image> token; is it a LLaVA\?$"):
        load_tokenizer(str(tmp_path))
