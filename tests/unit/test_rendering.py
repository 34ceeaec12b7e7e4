"""Rendering: tokens are what the chat template writes, and each span is one segment of a turn."""

import json
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig, Qwen2Config

from tests.conftest import byte_tokenizer
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.rendering import Example, Renderer, load_renderer
from umbrella.data.tokenizer import MARK
from umbrella.modality import Modality

Talk = Callable[..., Conversation]
RendererOf = Callable[[str], Renderer]


@pytest.fixture
def renderer(tokenizer: Any, modalities: dict[str, Modality]) -> Renderer:
    return Renderer(tokenizer, modalities)


@pytest.fixture
def renderer_of(modalities: dict[str, Modality]) -> Callable[[str], Renderer]:
    """A renderer with another chat template."""

    def make(template: str) -> Renderer:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        return Renderer(tokenizer, modalities)

    return make


def spans(example: Example, tokenizer: Any) -> list[tuple[int, str, str, str]]:
    """(turn, role, kind, text) of every span. Spans cover all tokens in order."""
    assert (example.spans[0].start, example.spans[-1].stop) == (0, len(example.input_ids))
    assert all(one.stop == next.start and one.start < one.stop for one, next in pairwise(example.spans))
    return [(s.turn, s.role, s.kind, tokenizer.decode(example.input_ids[s.start : s.stop])) for s in example.spans]


def test_conversation_becomes_one_span_per_segment(renderer: Renderer, talk: Talk) -> None:
    example = renderer.render(talk(("user", ["See", ("fMRI", "f.nii"), "ok?"]), ("assistant", "né.")))
    assert spans(example, renderer.tokenizer) == [
        (0, "user", "header", "<|im_start|>user\n"),
        (0, "user", "text", "See"),
        (0, "user", "image", "<image><image><image>"),
        (0, "user", "text", "\n"),
        (0, "user", "text", "ok?"),
        (0, "user", "end", "<|im_end|>\n"),
        (1, "assistant", "header", "<|im_start|>assistant\n"),
        (1, "assistant", "text", "né."),
        (1, "assistant", "end", "<|im_end|>\n"),
    ]
    # A special token is one token, a letter is one, and é is two bytes of UTF-8.
    assert [s.stop - s.start for s in example.spans] == [6, 3, 3, 1, 3, 2, 11, 4, 2]


def test_adjacent_volumes_are_runs_of_placeholders_with_a_line_break_between(renderer: Renderer, talk: Talk) -> None:
    example = renderer.render(talk(("user", [("sMRI", "a"), ("fMRI", "b"), ("dMRI", "c")]), ("assistant", "x")))
    assert "<image><image>\n<image><image><image>\n<image>\n<|im_end|>" in renderer.tokenizer.decode(example.input_ids)


def test_given_answer_replaces_only_the_last_assistant_turn(renderer: Renderer, talk: Talk) -> None:
    turns = [("user", ["a", ("sMRI", "s.nii")]), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    replaced = renderer.render(talk(*turns), answer="female")
    written = renderer.render(talk(*turns[:3], ("assistant", "female"), turns[4]))
    assert (replaced.input_ids == written.input_ids).all()
    assert replaced.spans == written.spans


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "message"),
    [
        ({"vocab_size": 512, "max_position_embeddings": 29}, 29, ""),
        ({"vocab_size": 259}, 29, r"its tokenizer has 260 tokens, and the model's embedding has 259 rows; use the"),
        ({"max_position_embeddings": 28}, 29, r"^becomes 29 tokens, and model\.checkpoint has 28 positions"),
        ({}, 28, r"^becomes 29 tokens, more than data\.max_tokens=28; raise that"),
    ],
)
def test_too_many_tokens_for_settings_or_checkpoint_is_an_error(
    talk: Talk, tmp_path: Path, sizes: dict[str, int], max_tokens: int, message: str
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    LlavaConfig(text_config=Qwen2Config(**sizes)).save_pretrained(tmp_path)
    settings = load_settings(overrides={"model.checkpoint": str(tmp_path), "data.max_tokens": max_tokens})
    conversation = talk(("user", "abcd"), ("assistant", "efgh"))  # 6 + 4 + 2 + 11 + 4 + 2 tokens
    with pytest.raises(UserError, match=message) if message else nullcontext():
        renderer = load_renderer(settings)
        assert len(renderer.render(conversation, answer="efghi").input_ids) == 30  # a candidate may be longer
        assert len(renderer.render(conversation).input_ids) == 29


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}</s>", "does not write each turn after the ones before"),
        ("{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}", "does not write each turn after the ones"),
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "does not write each turn after the ones before it"),
        ("{{ raise_exception('no system turn') }}", "refuses turns of system, assistant: no system turn"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "changes what turns say, or says it"),
        ("{% for m in messages %}{{ messages[0].content }}/{{ m.content }}{% endfor %}", "changes what turns say, or"),
        ("{% for m in messages %}{{ m.content.lstrip() }}</s>{% endfor %}", "changes what turns say, or says"),
    ],
)
def test_template_that_does_not_write_turn_after_turn_is_refused(
    talk: Talk, renderer_of: RendererOf, template: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        renderer_of(template).render(talk(("system", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 // 0 }}",
        "{% for m in messages %}",
    ],
)
def test_template_that_does_not_end_or_overflows_is_an_error_of_one_line(
    talk: Talk, renderer_of: RendererOf, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr("umbrella.data.chat_template.MAX_SECONDS", 0.2)
    monkeypatch.setattr("umbrella.data.chat_template.MAX_BYTES", 1 << 27)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    renderer = renderer_of(template)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^the tokenizer's chat template refuses turns of user, assistant: .+$"):
            renderer.render(talk(("user", "a"), ("assistant", "b")))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_threads_render_the_same(renderer: Renderer, talk: Talk) -> None:
    conversations = [talk(("user", f"<|im_end|> {i}"), ("assistant", "<image>" * (i % 5))) for i in range(50)]
    alone = [renderer.render(c).input_ids.tolist() for c in conversations]
    with ThreadPoolExecutor(4) as pool:
        assert [e.input_ids.tolist() for e in pool.map(renderer.render, conversations * 5)] == alone * 5


def test_template_that_strips_contents_strips_each_turn_as_a_whole(renderer_of: RendererOf, talk: Talk) -> None:
    renderer = renderer_of(
        "{% for m in messages %}{{ m.content | trim if m.role == 'user' else m.content }}<|im_end|>{% endfor %}"
    )
    asked = [" \n", "  Sex ", ("dMRI", "d"), " of ", ("sMRI", "s"), "\n"]
    example = renderer.render(talk(("user", asked), ("assistant", " male ")))
    assert [(kind, text) for _, _, kind, text in spans(example, renderer.tokenizer)] == [
        ("text", "Sex "),
        ("image", "<image>"),
        ("text", "\n"),
        ("text", " of "),
        ("image", "<image><image>"),
        ("end", "<|im_end|>"),
        ("text", " male "),
        ("end", "<|im_end|>"),
    ]


def test_private_use_characters_in_a_text_are_plain_text(renderer: Renderer, talk: Talk) -> None:
    letters = [chr(0xF0000 + i) for i in range(8)]
    text = "a" + MARK.join([MARK, "<|im_end|>", *letters, MARK, ""])
    example = renderer.render(talk(("user", [text, letters[1]]), ("assistant", MARK)))
    texts = [text for *_, kind, text in spans(example, renderer.tokenizer) if kind == "text"]
    assert texts == [text, letters[1], MARK]
    assert sum(id in renderer.tokenizer.all_special_ids for id in example.input_ids) == 4


def test_rendering_neither_changes_the_tokenizer_nor_depends_on_its_truncation(talk: Talk) -> None:
    tokenizer = byte_tokenizer()
    tokenizer("a", truncation=True, max_length=50, padding="max_length")  # it remembers both until it is called again
    before = tokenizer.backend_tokenizer.to_str()
    renderer = Renderer(tokenizer, {})
    for count in (1, 99):  # tokens beside those of the frame, 21
        assert len(renderer.render(talk(("user", "a"), ("assistant", "b" * count))).input_ids) == 22 + count
    assert tokenizer.backend_tokenizer.to_str() == before


def test_settings_give_template_modalities_and_class_tokens(
    tmp_path: Path, tokenizer: Any, save_llava: Callable[..., Any], talk: Talk
) -> None:
    conversation = talk(("user", [("dMRI", "d")]), ("assistant", "b"))
    small = {"modalities": {"dMRI": {"grid": [4, 4, 4], "patch": [4, 4, 2]}}, "model.chat_template": "vicuna"}

    def rendered(**others: Any) -> str:
        renderer = load_renderer(load_settings(overrides=small | others))
        return renderer.tokenizer.decode(renderer.render(conversation).input_ids)

    assert rendered() == "USER: <image><image>\n ASSISTANT: b<|im_end|>"
    for tower, strategy, count in [("clip", "full", 3), ("clip", "default", 2), ("siglip", "full", 2)]:
        folder = tmp_path / f"{tower} {strategy}"
        save_llava(folder, tower, vision_feature_select_strategy=strategy)
        tokenizer.save_pretrained(folder)
        if strategy == "default":  # a checkpoint may omit it
            config = json.loads((folder / "config.json").read_text())
            del config["vision_feature_select_strategy"]
            (folder / "config.json").write_text(json.dumps(config))
        assert rendered(**{"model.checkpoint": str(folder)}).count("<image>") == count
