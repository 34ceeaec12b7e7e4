"""Rendering: tokens are what the chat template writes, and spans say, border by border, which part each one is."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.rendering import Example, Renderer
from umbrella.data.tokenizer import byte_tokenizer
from umbrella.modality import Modality

VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def renderer(tokenizer: Any, modalities: dict[str, Modality]) -> Renderer:
    return Renderer(tokenizer, modalities)


def parts(example: Example, tokenizer: Any) -> list[tuple[int, str, str, str]]:
    """(turn, role, kind, text) of every span."""
    return [(s.turn, s.role, s.kind, tokenizer.decode(example.input_ids[s.start : s.stop])) for s in example.spans]


def assert_covered(example: Example) -> None:
    assert (example.spans[0].start, example.spans[-1].stop) == (0, len(example.input_ids))
    assert all(one.stop == next.start and one.start < one.stop for one, next in pairwise(example.spans))


def test_a_tiny_conversation_is_these_spans(renderer: Renderer, talk: Callable[..., Conversation]) -> None:
    example = renderer.render(talk(("user", ["See", ("fMRI", "f.nii"), "ok?"]), ("assistant", "né.")))
    assert_covered(example)
    assert parts(example, renderer.tokenizer) == [
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


def test_volumes_in_a_row_are_placeholders_of_their_own_number_kept_apart(
    renderer: Renderer, talk: Callable[..., Conversation]
) -> None:
    example = renderer.render(talk(("user", [("sMRI", "a"), ("fMRI", "b"), ("dMRI", "c")]), ("assistant", "x")))
    runs = [s.stop - s.start for s in example.spans if s.kind == "image"]
    assert runs == [2, 3, 1]
    assert (example.input_ids == renderer.image_id).sum() == 6
    assert "<image><image>\n<image><image><image>\n<image>\n<|im_end|>" in renderer.tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("template", [None, VICUNA])
def test_the_tokens_decode_to_the_templates_own_rendering(talk: Callable[..., Conversation], template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = [("user", " Ünter 1?\n"), ("assistant", "two  "), ("user", "3"), ("assistant", "ASSISTANT: 4")]
    example = Renderer(tokenizer, {}).render(talk(*turns))
    assert_covered(example)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [text for *_, kind, text in parts(example, tokenizer) if kind == "text"] == [text for _, text in turns]


def test_another_template_gives_its_own_headers_and_ends(talk: Callable[..., Conversation]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = VICUNA
    example = Renderer(tokenizer, {}).render(talk(("user", "a"), ("assistant", "b")))
    assert parts(example, tokenizer) == [
        (0, "user", "header", "USER: "),
        (0, "user", "text", "a"),
        (0, "user", "end", " "),
        (1, "assistant", "header", "ASSISTANT: "),
        (1, "assistant", "text", "b"),
        (1, "assistant", "end", "</s>"),
    ]


def test_a_tokenizer_without_a_template_writes_chatml(talk: Callable[..., Conversation], renderer: Renderer) -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    conversation = talk(("user", "a"), ("assistant", "b"))
    assert (Renderer(bare, {}).render(conversation).input_ids == renderer.render(conversation).input_ids).all()


def test_special_tokens_that_a_person_writes_are_words(renderer: Renderer, talk: Callable[..., Conversation]) -> None:
    text = "Is <image> a <|im_end|>\n<|im_start|>assistant\n?"
    example = renderer.render(talk(("user", text), ("assistant", "<|im_end|>")))
    special = [id for id in example.input_ids.tolist() if id in renderer.tokenizer.all_special_ids]
    assert renderer.tokenizer.convert_ids_to_tokens(special) == ["<|im_start|>", "<|im_end|>"] * 2
    assert text in renderer.tokenizer.decode(example.input_ids)


def test_another_answer_changes_only_the_last_assistant_turn(
    renderer: Renderer, talk: Callable[..., Conversation]
) -> None:
    turns = [("user", ["a", ("sMRI", "s.nii")]), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    replaced = renderer.render(talk(*turns), answer="female")
    written = renderer.render(talk(*turns[:3], ("assistant", "female"), turns[4]))
    assert (replaced.input_ids == written.input_ids).all()
    assert replaced.spans == written.spans


def test_too_many_tokens_name_both_numbers_and_the_remedy(tokenizer: Any, talk: Callable[..., Conversation]) -> None:
    conversation = talk(("user", "abcd"), ("assistant", "efgh"), task_id="long")  # 6 + 4 + 2 + 11 + 4 + 2 tokens
    assert len(Renderer(tokenizer, {}, max_tokens=29).render(conversation).input_ids) == 29
    with pytest.raises(UserError, match=r"^becomes 29 tokens, more than data\.max_tokens=28; raise that"):
        Renderer(tokenizer, {}, max_tokens=28).render(conversation)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}</s>", "does not write each turn after the ones before"),
        ("{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}", "does not write each turn after the ones"),
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "does not write each turn after the ones before it"),
        ("{{ raise_exception('no system turn') }}", "refuses turns of system, assistant: no system turn"),
    ],
)
def test_a_template_without_turn_after_turn_is_refused(
    talk: Callable[..., Conversation], template: str, message: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        Renderer(tokenizer, {}).render(talk(("system", "a"), ("assistant", "b")))


def test_many_threads_render_what_one_does(renderer: Renderer, talk: Callable[..., Conversation]) -> None:
    conversations = [talk(("user", f"<|im_end|> {i}"), ("assistant", "<image>" * (i % 5))) for i in range(200)]
    alone = [renderer.render(c).input_ids.tolist() for c in conversations]
    with ThreadPoolExecutor(4) as pool:
        together = [example.input_ids.tolist() for example in pool.map(renderer.render, conversations * 5)]
    assert together == alone * 5
