"""Rendering: tokens are what the chat template writes, and spans say, border by border, which part each one is."""

import json
import pickle
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.rendering import Example, Renderer, load_renderer
from umbrella.data.segments import MARK
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
    ("sizes", "message"),
    [
        ({"vocab_size": 259}, r"its tokenizer has 260 tokens, and the model's embedding has 259 rows; use the"),
        ({"max_position_embeddings": 28}, r"^becomes 29 tokens, and model\.checkpoint has 28 positions"),
        ({"vocab_size": 512, "max_position_embeddings": 29}, ""),
    ],
)
def test_a_checkpoint_without_a_place_for_each_token_is_an_error(
    talk: Callable[..., Conversation], tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    from transformers import LlavaConfig, Qwen2Config

    byte_tokenizer().save_pretrained(tmp_path)
    LlavaConfig(text_config=Qwen2Config(**sizes)).save_pretrained(tmp_path)
    settings = load_settings(overrides={"model.checkpoint": str(tmp_path)})
    conversation = talk(("user", "abcd"), ("assistant", "efgh"))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        assert len(load_renderer(settings).render(conversation).input_ids) == 29


def test_a_candidate_may_be_longer_than_the_limit_for_what_was_answered(
    tokenizer: Any, talk: Callable[..., Conversation]
) -> None:
    conversation = talk(("user", "abcd"), ("assistant", "efgh"))
    renderer = Renderer(tokenizer, {}, max_tokens=29)
    assert len(renderer.render(conversation, answer="efghi").input_ids) == 30


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}</s>", "does not write each turn after the ones before"),
        ("{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}", "does not write each turn after the ones"),
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "does not write each turn after the ones before it"),
        ("{{ raise_exception('no system turn') }}", "refuses turns of system, assistant: no system turn"),
        (
            "{% for m in messages %}{{ m.content }} {{ m.content | trim }}{% endfor %}",
            "changes what turns say, or says it twice; ",
        ),
        ("{% for m in messages %}{{ m.content.lstrip() }}</s>{% endfor %}", "changes what turns say, or says"),
    ],
)
def test_a_template_without_turn_after_turn_is_refused(
    talk: Callable[..., Conversation], template: str, message: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        Renderer(tokenizer, {}).render(talk(("system", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**12) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{{ '%10000000000d' % 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 // 0 }}",
        "{{ messages[10] + 1 }}",
        "{% for m in messages %}",
    ],
)
def test_a_template_that_does_not_end_or_overflows_is_one_line(
    talk: Callable[..., Conversation], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr("umbrella.data.chat_template.MAX_SECONDS", 0.2)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, {})
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"^the tokenizer's chat template refuses turns of user, assistant: [^\n]+$"
        ):
            renderer.render(talk(("user", "a"), ("assistant", "b")))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_many_threads_render_what_one_does(renderer: Renderer, talk: Callable[..., Conversation]) -> None:
    conversations = [talk(("user", f"<|im_end|> {i}"), ("assistant", "<image>" * (i % 5))) for i in range(200)]
    alone = [renderer.render(c).input_ids.tolist() for c in conversations]
    with ThreadPoolExecutor(4) as pool:
        together = [example.input_ids.tolist() for example in pool.map(renderer.render, conversations * 5)]
    assert together == alone * 5


def test_a_template_that_strips_contents_strips_each_turn_as_a_whole(
    modalities: dict[str, Modality], talk: Callable[..., Conversation]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | trim if m.role == 'user' else m.content }}<|im_end|>{% endfor %}"
    )
    asked = [" \n", "  Sex ", ("dMRI", "d"), " of ", ("sMRI", "s"), "\n"]
    example = Renderer(tokenizer, modalities).render(talk(("user", asked), ("assistant", " male ")))
    assert_covered(example)
    assert [(kind, text) for _, _, kind, text in parts(example, tokenizer)] == [
        ("text", "Sex "),
        ("image", "<image>"),
        ("text", "\n"),
        ("text", " of "),
        ("image", "<image><image>"),
        ("end", "<|im_end|>"),
        ("text", " male "),
        ("end", "<|im_end|>"),
    ]


def test_a_template_may_take_lists_of_items(talk: Callable[..., Conversation], renderer: Renderer) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for item in m.content | selectattr('type', 'equalto', 'text') %}{{ item.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    )
    conversation = talk(("user", ["See", ("fMRI", "f.nii"), "ok?"]), ("assistant", "né."))
    example = Renderer(tokenizer, renderer.modalities).render(conversation)
    assert example.input_ids.tolist() == renderer.render(conversation).input_ids.tolist()
    assert example.spans == renderer.render(conversation).spans


ITEMS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for item in m.content %}"
    "{% if item.type == 'image' %}<image>{% else %}{{ item.text | trim }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
IMAGES_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for item in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for item in m.content | selectattr('type', 'equalto', 'text') %}{{ item.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("template", [None, VICUNA, ITEMS, IMAGES_FIRST], ids=["chatml", "vicuna", "items", "first"])
def test_a_long_conversation_has_the_tokens_of_one_rendered_turn_by_turn_with_work_in_proportion_to_its_length(
    talk: Callable[..., Conversation], modalities: dict[str, Modality], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[Any] = [" Sex? ", [("sMRI", "a"), "Sex?"], ["Sex?", ("dMRI", "b")], ["Sex?", ("sMRI", "a"), "Age?"]]
    turns = [("system", "Be brief."), *(t for i in range(40) for t in (("user", kinds[i % 4]), ("assistant", f" {i}")))]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    write, written = tokenizer.apply_chat_template, []
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **how: written.append(len(m)) or write(m, **how))
    example = Renderer(tokenizer, modalities).render(talk(*turns))
    work = sum(written)
    assert_covered(example)
    monkeypatch.setattr("umbrella.data.chat_template.MAX_EXACT_TURNS", 1000)
    exact = Renderer(tokenizer, modalities).render(talk(*turns))
    assert example.input_ids.tolist() == exact.input_ids.tolist()
    assert example.spans == exact.spans
    assert work < 40 * len(turns) < sum(written) - work


def test_characters_for_private_use_are_words_too(renderer: Renderer, talk: Callable[..., Conversation]) -> None:
    letters = [chr(0xF0000 + i) for i in range(8)]
    text = "a" + MARK.join([MARK, "<|im_end|>", *letters, MARK, ""])
    example = renderer.render(talk(("user", [text, letters[1]]), ("assistant", MARK)))
    said = [text for *_, kind, text in parts(example, renderer.tokenizer) if kind == "text"]
    assert said == [text, letters[1], MARK]
    assert [i for i in example.input_ids if i in renderer.tokenizer.all_special_ids] == [
        renderer.tokenizer.convert_tokens_to_ids(token) for token in ["<|im_start|>", "<|im_end|>"] * 2
    ]


def test_a_renderer_that_was_sent_to_another_process_renders_the_same(
    renderer: Renderer, talk: Callable[..., Conversation]
) -> None:
    conversation = talk(("user", ["<|im_end|>", ("dMRI", "d")]), ("assistant", "<image>"))
    sent = pickle.loads(pickle.dumps(renderer))
    assert sent.render(conversation).input_ids.tolist() == renderer.render(conversation).input_ids.tolist()


def test_rendering_leaves_the_tokenizer_as_it_is(talk: Callable[..., Conversation]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer("a", truncation=True, max_length=50, padding="max_length")  # it remembers both until it is called again
    before = tokenizer.backend_tokenizer.to_str()
    renderer = Renderer(tokenizer, {})
    for count in (1, 99):  # tokens beside those of the frame, 21
        assert len(renderer.render(talk(("user", "a"), ("assistant", "b" * count))).input_ids) == 22 + count
    assert tokenizer.backend_tokenizer.to_str() == before


def test_settings_say_template_modalities_limit_and_class_tokens(
    tmp_path: Path, tokenizer: Any, save_llava: Callable[..., Any], talk: Callable[..., Conversation]
) -> None:
    conversation = talk(("user", [("dMRI", "d")]), ("assistant", "b"))
    small = {"modalities": {"dMRI": {"grid": [4, 4, 4], "patch": [4, 4, 2]}}, "model.chat_template": "vicuna"}

    def rendered(**others: Any) -> str:
        renderer = load_renderer(load_settings(overrides=small | others))
        return tokenizer.decode(renderer.render(conversation).input_ids)

    assert rendered() == "USER: <image><image>\n ASSISTANT: b<|im_end|>"
    for tower, strategy, count in [("clip", "full", 3), ("clip", "default", 2), ("siglip", "full", 2)]:
        folder = tmp_path / f"{tower} {strategy}"
        save_llava(folder, tower, vision_feature_select_strategy=strategy)
        tokenizer.save_pretrained(folder)
        if strategy == "default":  # as a checkpoint may leave it unsaid
            config = json.loads((folder / "config.json").read_text())
            del config["vision_feature_select_strategy"]
            (folder / "config.json").write_text(json.dumps(config))
        assert rendered(**{"model.checkpoint": str(folder)}).count("<image>") == count
    with pytest.raises(UserError, match=r"more than data\.max_tokens=19; raise that"):
        rendered(**{"data.max_tokens": 19})
