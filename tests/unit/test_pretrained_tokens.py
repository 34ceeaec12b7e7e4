"""Rendering with tokenizers of the kinds of published LLaVAs gives the tokens of their pretraining."""

import copy
import json
import re
from collections.abc import Callable
from itertools import pairwise
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Collator
from umbrella.data.rendering import Example, Renderer
from umbrella.data.tokenizer import CHATML, MARK, TEMPLATES, load_tokenizer
from umbrella.evaluation.scoring import score

# Processors of LLaVAs want lists of items: images are written first, then texts.
WITH_ITEMS = {
    "llava 1.5": "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    "{% for item in m.content if item.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for item in m.content if item.type == 'text' %}{% generation %}{{ item.text }} {% endgeneration %}{% endfor %}"
    "{% endfor %}",
    "interleave": "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% for item in m.content if item.type == 'image' %}<image>{% endfor %}"
    "{% for item in m.content if item.type == 'text' %}{{ '\n' ~ item.text }}{% endfor %}<|im_end|>{% endfor %}",
    "in order": "{% for m in messages %}{{ m.role }}: {% for item in m.content %}{% if item.type == 'image' %}<image>"
    "{% else %}{{ item.text | trim }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}",
    "trimmed items": "{% for m in messages %}{{ m.role }}: {{ m.content[0]['text'] | trim }}"
    "{{ '\n' if m.role == 'user' else eos_token }}{% endfor %}",
}
WITH_TEXT = {
    "qwen": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML,
    "llama 3": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}"
    "{{ eos_token }}{% endfor %}",
    **TEMPLATES,
}
REAL = WITH_TEXT | WITH_ITEMS
KINDS = ["qwen", "llama", "older llama"]
Talk = Callable[..., Conversation]
Renderers = dict[tuple[str, str], Renderer]
Real = Callable[..., Any]
SPEECH = [
    "USER: Is this person male or female? ASSISTANT: male. USER: And how old? ASSISTANT: 63.5 years",
    "user\nIs this the brain of a male person, or female?\nassistant\n\nmale.\n",
    "system You see volumes. She is  (female)\n\n (male), né 1961 in Zürich",
]


def trained(pre_tokenizer: Any, texts: list[str], special: list[str], **options: Any) -> tuple[dict, list]:
    """Vocabulary and merges of a small byte pair encoding."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    letters = [] if special else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(texts * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A tokenizer of that kind, trained small, saved and loaded as a checkpoint's is, with that template."""
    vocabulary, merges = trained(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer, SPEECH, [])
    chatml = ["<|im_start|>", "<|im_end|>", "<image>"]
    qwen = Qwen2Tokenizer(vocabulary, merges, eos_token="<|im_end|>", additional_special_tokens=chatml)

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    words = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    lines = [line for text in SPEECH for line in text.split("\n")]  # Llama's vocabulary has no line breaks
    vocabulary, merges = trained(words, lines, special, **options)
    names = {"additional_special_tokens": ["<image>"], "pad_token": "<pad>", "add_bos_token": True}
    llama = LlamaTokenizer(vocabulary, merges, **names)
    # As older files have it: after every special token it begins anew, with a blank.
    backend = Tokenizer(models.BPE(vocabulary, merges, **options))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = llama.backend_tokenizer.decoder
    older = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names)

    loaded = {}
    for kind, tokenizer in zip(KINDS, (qwen, llama, older), strict=True):
        folder: Path = tmp_path_factory.mktemp(kind)
        tokenizer.save_pretrained(folder)
        loaded[kind] = load_tokenizer(str(folder))
        assert type(loaded[kind]) is type(tokenizer)

    def get(kind: str, template: str = "chatml") -> Any:
        tokenizer = copy.deepcopy(loaded[kind])  # what a test sets must not reach the next one
        tokenizer.chat_template = REAL[template]
        return tokenizer

    return get


@pytest.fixture(scope="module")
def renderers(real: Real, modalities: Any) -> dict[tuple[str, str], Renderer]:
    """One of every kind and template; volumes have a class token."""
    return {(k, t): Renderer(real(k, t), modalities, class_tokens=1) for k in KINDS for t in REAL}


def keeps_order(template: str, items: Any) -> bool:
    """Whether this template of items writes such a turn's in their order, as one can read in it."""
    types = [item.type for item in items]
    return {
        WITH_ITEMS["in order"]: True,
        WITH_ITEMS["trimmed items"]: types == ["text"],
    }.get(template, types == sorted(types))  # else images come first


def rendering(tokenizer: Any, conversation: Conversation) -> str:
    """The text of the template, with "<image>" for each volume."""
    template = tokenizer.chat_template
    messages: list[dict[str, Any]] = []
    for turn in conversation.conversations:
        if template in WITH_ITEMS.values() and keeps_order(template, turn.content):
            items = [{"type": "text", "text": x.text} if x.type == "text" else {"type": "image"} for x in turn.content]
            messages.append({"role": turn.role, "content": items})
        else:
            text = "".join(item.text if item.type == "text" else "<image>\n" for item in turn.content)
            content = [{"type": "text", "text": text}] if template in WITH_ITEMS.values() else text
            messages.append({"role": turn.role, "content": content})
    return tokenizer.apply_chat_template(messages, tokenize=False)


def expected(renderer: Renderer, conversation: Conversation) -> list[int]:
    """What transformers' LLaVA processor makes of it: placeholders repeated in the text, bos where it has none.

    Unlike there, a line break keeps two volumes apart where there is nothing.
    """
    tokenizer = renderer.tokenizer
    text = re.sub("(?<=<image>)(?=<image>)", "\n", rendering(tokenizer, conversation))
    counts = iter(renderer.modalities[volume.modality].num_tokens + 1 for volume in conversation.volumes)
    text = re.sub("<image>", lambda found: found[0] * next(counts), text)
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not begun).input_ids


def assert_covered(example: Example) -> None:
    assert (example.spans[0].start, example.spans[-1].stop) == (0, len(example.input_ids))
    assert all(one.stop == next.start and one.start < one.stop for one, next in pairwise(example.spans))


def tokens_of(example: Example, tokenizer: Any) -> list[tuple[str, str, str]]:
    """(role, kind, tokens) of every span; placeholders once."""
    ids = [example.input_ids[s.start : s.stop].tolist() for s in example.spans]
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    texts = ["<image>" if s.kind == "image" else " ".join(t) for s, t in zip(example.spans, tokens, strict=True)]
    return [(s.role, s.kind, text) for s, text in zip(example.spans, texts, strict=True)]


TALKS = [
    [("user", [("sMRI", "a"), "Is this person male or female?"]), ("assistant", "male")],
    [("system", " You see\n"), ("user", ["\n", ("fMRI", "b"), ("sMRI", "a")]), ("assistant", "  né 1961 \n")],
    [
        ("user", ["First ", ("dMRI", "d"), "then", ("sMRI", "a")]),
        ("assistant", "\n\nmale"),
        ("user", ["Zürich?", " "]),
        ("assistant", "e\u0301, 🧠"),
        ("user", [" ", "\n"]),
        ("assistant", ""),
    ],
]


@pytest.mark.parametrize("template", REAL)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_the_llava_processor(renderers: Renderers, talk: Talk, kind: str, template: str) -> None:
    renderer = renderers[kind, template]
    for turns in TALKS:
        conversation = talk(*turns)
        example = renderer.render(conversation)
        assert_covered(example)
        assert example.input_ids.tolist() == expected(renderer, conversation)
        runs = [s.stop - s.start for s in example.spans if s.kind == "image"]
        assert runs == [renderer.modalities[v.modality].num_tokens + 1 for v in conversation.volumes]


VOLUME = ("dMRI", "d")


@pytest.mark.parametrize(
    ("template", "asked", "written"),
    [
        ("interleave", [VOLUME, "Sex?"], "<|im_start|>user <image>\nSex?<|im_end|>"),
        ("interleave", ["See", VOLUME, "ok?"], "<|im_start|>user \nSee<image>\nok?<|im_end|>"),  # it would reorder
        ("llava 1.5", [VOLUME, "Sex?"], "USER: <image>\nSex? "),
        ("llava 1.5", [VOLUME, VOLUME], "USER: <image>\n<image>\n"),
        ("in order", [" See ", VOLUME, "\n", VOLUME, " ok? "], "user: See<image>\n<image>ok?<|im_end|>"),
        ("trimmed items", [VOLUME, "Sex?"], "user: <image>\nSex?\n"),  # it would drop the second item
    ],
)
def test_template_of_items_gets_the_items_of_a_turn_unless_it_changes_their_order(
    real: Real, modalities: Any, talk: Talk, template: str, asked: list, written: str
) -> None:
    renderer = Renderer(real("qwen", template), modalities)
    before = [("user", "x"), ("assistant", "x")]
    example = renderer.render(talk(*before, ("user", asked)))
    assert_covered(example)
    through = renderer.tokenizer.decode(renderer.render(talk(*before)).input_ids)
    assert renderer.tokenizer.decode(example.input_ids) == through + written


def test_text_of_the_template_between_items_is_text_of_the_turn(real: Real, modalities: Any, talk: Talk) -> None:
    renderer = Renderer(real("qwen", "interleave"), modalities)
    example = renderer.render(talk(("user", [VOLUME, "(male)"]), ("assistant", "x")))
    kinds = [(kind, text) for _, kind, text in tokens_of(example, renderer.tokenizer)]
    assert kinds[1:5] == [("image", "<image>"), ("text", "Ċ"), ("text", "( male )"), ("end", "<|im_end|>")]


@pytest.mark.parametrize(
    ("template", "turns", "written"),
    [
        (  # the template writes images as something else: they are part of the text
            WITH_ITEMS["in order"].replace("<image>", "<|vision|>"),
            [("user", [VOLUME, "a"]), ("assistant", " b"), ("user", [" c ", "d"]), ("assistant", "")],
            "user: <image>\na<|im_end|>assistant: b<|im_end|>user: cd<|im_end|>assistant: <|im_end|>",
        ),
        (  # nothing between two turns: a line break separates their volumes
            "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
            [("user", [VOLUME]), ("user", [VOLUME]), ("assistant", "x")],
            "<image>\n<image>x",
        ),
    ],
)
def test_volumes_have_a_place_whatever_the_template_does_with_images(
    real: Real, modalities: Any, talk: Talk, template: str, turns: list, written: str
) -> None:
    tokenizer = real("qwen")
    tokenizer.chat_template = template
    assert tokenizer.decode(Renderer(tokenizer, modalities).render(talk(*turns)).input_ids) == written


def test_word_is_in_the_span_of_its_turn_with_the_blank_before_it(renderers: Renderers, talk: Talk) -> None:
    asked = [("system", "You see volumes"), ("user", [("fMRI", "f"), "Is this person male?"]), ("assistant", "male")]
    again = [("user", "And how old?"), ("assistant", "63.5 years")]
    renderer = renderers["llama", "vicuna"]
    assert tokens_of(renderer.render(talk(*asked, *again)), renderer.tokenizer) == [
        ("system", "header", "<s>"),
        ("system", "text", "▁You ▁see ▁volumes"),
        ("user", "header", "▁USER : ▁"),  # and the blank that ends the system's turn is the word's
        ("user", "image", "<image>"),
        ("user", "text", "<0x0A>"),
        ("user", "text", "Is ▁this ▁person ▁male ?"),
        ("assistant", "header", "▁ASSISTANT :"),
        ("assistant", "text", "▁male"),
        ("assistant", "end", "</s>"),
        ("user", "header", "USER :"),
        ("user", "text", "▁And ▁how ▁old ?"),
        ("assistant", "header", "▁ASSISTANT :"),
        ("assistant", "text", "▁63 . 5 ▁years"),
        ("assistant", "end", "</s>"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_text_of_a_turn_are_plain_text(renderers: Renderers, talk: Talk, kind: str) -> None:
    renderer = renderers[kind, "chatml"]
    special = renderer.tokenizer.all_special_tokens
    text = "Is " + " a ".join(special) + " and " + "".join(special)
    plain = talk(("user", [("sMRI", "a"), "x"]), ("assistant", "x"))
    typed = talk(("user", [("sMRI", "a"), text, "<ima", "ge>"]), ("assistant", special[0] + MARK))  # and in two halves
    shown = renderer.render(typed)
    kept = [id for id in shown.input_ids.tolist() if id in renderer.tokenizer.all_special_ids]
    assert kept == [id for id in renderer.render(plain).input_ids.tolist() if id in renderer.tokenizer.all_special_ids]
    decoded = renderer.tokenizer.decode(shown.input_ids)
    assert text + "<image>" in decoded
    assert f"{special[0]}{MARK}<|im_end|>" in decoded.replace(" ", "")
    if kind == "qwen":
        span = [s for s in shown.spans if s.kind == "text"][1]
        words = copy.deepcopy(renderer.tokenizer)(text, split_special_tokens=True).input_ids
        assert shown.input_ids[span.start : span.stop].tolist() == words


def test_bos_is_added_once_if_the_tokenizer_adds_one_and_eos_never(
    real: Real, renderers: Renderers, talk: Talk
) -> None:
    conversation = talk(("user", "<s>"), ("assistant", "a"))
    for template in ("vicuna", "llama 3", "llava 1.5"):
        ids = renderers["llama", template].render(conversation).input_ids.tolist()
        assert ids[0] == 1
        assert ids.count(1) == 1
    ended = copy.deepcopy(real("llama", "llava 1.5"))
    ended.add_bos_token = ended.add_eos_token = True
    assert ended("").input_ids == [1, 2]
    assert Renderer(ended, {}).render(conversation).input_ids.tolist() == ids
    ended.add_bos_token = False
    assert 1 not in Renderer(ended, {}).render(conversation).input_ids


@pytest.mark.parametrize("template", REAL)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_has_the_tokens_before_any_answer(renderers: Renderers, talk: Talk, kind: str, template: str) -> None:
    renderer = renderers[kind, template]
    said = [("user", [("sMRI", "a"), "Male?"]), ("assistant", "male"), ("user", ["How old?", ("fMRI", "f")])]
    prompt = renderer.prompt(talk(*said, ("assistant", "nobody looks at this"), ("user", "Thanks")))
    assert_covered(prompt)
    assert len(prompt.conversation.volumes) == 2
    for answer in ("male", "Zürich", "63.5"):
        example = renderer.render(talk(*said, ("assistant", answer)))
        first = next(span.start for span in example.spans if (span.turn, span.kind) == (3, "text"))
        length = len(prompt.input_ids)
        assert example.input_ids[:length].tolist() == prompt.input_ids.tolist()
        blank = renderer.tokenizer.convert_ids_to_tokens(example.input_ids[length:first].tolist())
        assert blank in ([], ["▁"], ["Ġ"]) if answer == "63.5" else not blank


def test_candidates_that_differ_in_the_token_before_the_answer_are_compared_there(
    renderers: Renderers, talk: Talk, store: Any
) -> None:
    renderer = renderers["llama", "llava 1.5"]  # "▁male" is one token; "▁" before "4" belongs to the header
    label = {"subject_label": "male", "target": "answer"}
    asked = talk(("user", "Sex or age?"), ("assistant", "male"), metadata=label)

    class ByToken(torch.nn.Module):
        def forward(self, targets: Any = None, **others: Any) -> Any:
            if targets:
                return SimpleNamespace(token_nll=nats[targets[2]])
            return SimpleNamespace(past_key_values=SimpleNamespace(batch_select_indices=lambda indices: None))

    nats = torch.full((len(renderer.tokenizer),), 9.0)
    nats[renderer.tokenizer.convert_tokens_to_ids(["▁male", "▁"])] = torch.tensor([0.1, 2.0])
    collator = Collator(renderer, store)
    [scored] = score(ByToken(), [asked], renderer, collator, {"answer": {"male": "male", "4": "4"}})
    assert scored.probabilities == pytest.approx({"male": 1 / (1 + exp(-1.9)), "4": 1 / (1 + exp(1.9))}, abs=1e-5)
    (male,) = (span for span in renderer.render(asked).spans if (span.turn, span.kind) == (1, "text"))
    assert scored.answer_tokens >= male.stop - male.start, "the header is no part of the answer's loss"


def test_special_tokens_at_the_end_of_a_turn_and_eos_end_an_answer(renderers: Renderers, real: Real) -> None:
    def tokens(kind: str, template: str) -> list[str]:
        return renderers[kind, template].tokenizer.convert_ids_to_tokens(renderers[kind, template].stop_ids())

    assert tokens("llama", "vicuna") == tokens("llama", "llava 1.5") == ["</s>"]
    assert tokens("qwen", "chatml") == tokens("qwen", "interleave") == ["<|im_end|>"]
    other = real("qwen")
    other.eos_token = "<|im_start|>"
    both = other.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert Renderer(other, {}).stop_ids() == sorted(both)
    stopping = [template for template in REAL if renderers["llama", template].has_stop_token]
    assert stopping == ["llama 3", "vicuna", "in order", "trimmed items"]
    assert [t for t in REAL if not renderers["qwen", t].has_stop_token] == ["llava 1.5"]


def spelled() -> Any:
    """A tokenizer of a few letters, which merges those of "</s>" to the very token."""
    letters = ["<", "/", "s", ">", "</", "s>", "</s>", "<image>", "a", "Ġ", "aĠ", "Ċ", "<unk>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "Ġ")]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    return tokenizer


def test_text_is_plain_if_the_placeholder_is_no_special_token_and_refused_if_merged_to_a_special_token(
    talk: Talk, modalities: Any
) -> None:
    tokenizer = spelled()
    tokenizer.add_tokens("<image>")
    assert tokenizer("<image>").input_ids == [7]
    renderer = Renderer(tokenizer, modalities)
    example = renderer.render(talk(("user", [VOLUME, "<image>"]), ("assistant", "a")))
    assert example.input_ids.tolist() == [7, 11, 0, 12, 12, 8, 12, 12, 3, 6, 8, 6]  # 12: a letter without a token
    with pytest.raises(UserError, match=r"^says </s> in words, and the tokenizer makes a special token of them; ch"):
        renderer.render(talk(("assistant", "a</s>")))


def test_special_tokens_that_include_blanks_or_begin_like_others_are_in_their_segment(
    talk: Talk, modalities: Any
) -> None:
    tokenizer = spelled()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<image>", lstrip=True, rstrip=True), "</s>s"]}
    )
    tokenizer.chat_template = "{% for m in messages %}</s>{{ m.content }}</s>s{% endfor %}"
    conversation = talk(("user", ["a ", ("sMRI", "s"), "\n a", " ", ("dMRI", "d")]), ("assistant", " a"))
    assert tokens_of(Renderer(tokenizer, modalities).render(conversation), tokenizer) == [
        ("user", "header", "</s>"),
        ("user", "text", "a"),
        ("user", "image", "<image>"),
        ("user", "text", "a"),
        ("user", "image", "<image>"),
        ("user", "end", "</s>s"),
        ("assistant", "header", "</s>"),
        ("assistant", "text", "Ġ a"),
        ("assistant", "end", "</s>s"),
    ]


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_adjacent_volumes_that_the_tokenizer_merges_are_refused(talk: Talk, modalities: Any, side: str) -> None:
    tokenizer = spelled()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", **{side: True})]})
    renderer = Renderer(tokenizer, modalities)
    assert renderer.render(talk(("user", [VOLUME, "a", VOLUME]), ("assistant", "a"))).input_ids.tolist().count(7) == 2
    with pytest.raises(UserError, match=r"^has 2 volumes but, as tokens, <image> in 1 place\(s\): .*lstrip or rstrip"):
        renderer.render(talk(("user", [VOLUME, " ", VOLUME]), ("assistant", "a")))


def test_final_blank_belongs_to_its_token_even_if_the_tokenizer_trims_offsets(talk: Talk) -> None:
    tokenizer = spelled()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer("aa ", return_offsets_mapping=True).offset_mapping == [(0, 1), (1, 2)]
    example = Renderer(tokenizer, {}).render(talk(("assistant", "aa")))
    assert tokens_of(example, tokenizer) == [("assistant", "text", "a"), ("assistant", "end", "aĠ")]


TEXTS = st.lists(
    st.sampled_from(["male", "USER:", " ", "\n", "  ", "<", "</s>", "<s>", "<|im_end|>", "<image>", "e\u0301", "🧠"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK), max_size=4),
    max_size=8,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from(sorted(REAL)), st.lists(TEXTS | st.just(("dMRI", "d")), min_size=1), TEXTS
)
def test_any_text_is_covered_by_spans_and_tokenized_as_by_the_tokenizer(
    renderers: Renderers, talk: Talk, kind: str, template: str, asked: list, answer: str
) -> None:
    renderer = renderers[kind, template]
    special = renderer.tokenizer.all_special_tokens
    conversation = talk(("user", asked), ("assistant", answer))
    example = renderer.render(conversation)
    assert_covered(example)
    ids = renderer.tokenizer.all_special_ids
    bare = renderer.render(talk(("user", [x if isinstance(x, tuple) else "x" for x in asked]), ("assistant", "x")))
    assert [i for i in example.input_ids if i in ids] == [i for i in bare.input_ids if i in ids]
    said = ["".join(x if isinstance(x, str) else "\n" for x in asked), answer]
    if not any(token in text for token in special for text in said):
        assert example.input_ids.tolist() == expected(renderer, conversation)
