"""The mask audit: counts by role and kind, and a page on which no text is interpreted as HTML."""

import re
from collections.abc import Callable
from html import unescape
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.data.masking import (
    audit,
    audit_html,
    format_number,
    is_weighted,
    select_examples,
    show_invisible,
    split_by_weight,
)
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality

Talk = Callable[..., Conversation]


@pytest.fixture
def example(tokenizer: Any, modalities: dict[str, Modality], talk: Talk) -> Example:
    """Headers of 6 and 11 tokens, ends of 2, texts of 3 (with a line break), 2, 2 and 2, and a volume of 2."""
    turns = [("user", [("sMRI", "s.nii"), "Q1"]), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    return Renderer(tokenizer, modalities).render(talk(*turns))


TOKENS = {
    "assistant end": 4,
    "assistant header": 22,
    "assistant text": 4,
    "user end": 4,
    "user header": 12,
    "user image": 2,
    "user text": 5,
}


@pytest.mark.parametrize(
    ("policy", "supervised", "weight"),
    [
        ({}, {"assistant end": 4, "assistant text": 4}, {}),
        (
            {"supervise": "all", "turn_header": True},  # all but placeholders, and the first token
            {name: n for name, n in TOKENS.items() if name != "user image"} | {"user header": 11},
            {},
        ),
        # Two turns of four targets.
        ({"normalize": "turn"}, {"assistant end": 4, "assistant text": 4}, {"assistant end": 1, "assistant text": 1}),
        (
            {"normalize": "sample", "supervise": "all"},
            {"assistant end": 4, "assistant text": 4, "user end": 4, "user text": 5},
            {"assistant end": 4 / 17, "assistant text": 4 / 17, "user end": 4 / 17, "user text": 5 / 17},
        ),
        (
            {"task_weights": {"T1": 2.5}},
            {"assistant end": 4, "assistant text": 4},
            {"assistant end": 10, "assistant text": 10},
        ),
    ],
    ids=str,
)
def test_audit_counts_tokens_targets_and_weights_by_role_and_kind(
    example: Example, policy: dict, supervised: dict[str, int], weight: dict[str, float]
) -> None:
    rows = audit([example, example], MaskPolicy(**policy))
    assert [f"{row['role']} {row['kind']}" for row in rows] == sorted(TOKENS)
    for row in rows:
        name = f"{row['role']} {row['kind']}"
        assert (row["tokens"], row["supervised"]) == (2 * TOKENS[name], 2 * supervised.get(name, 0))
        assert row["weight"] == round(2 * (weight or supervised).get(name, 0), 6)
    assert is_weighted(rows) == bool(weight)


def test_policy_that_supervises_no_token_is_refused(tokenizer: Any, talk: Talk) -> None:
    silent = Renderer(tokenizer, {}).render(talk(("user", "Q"), ("assistant", "")))
    message = r"\(supervise=assistant, end_of_turn=False, .*\) supervises none of the 22 tokens: .* choose another mask"
    with pytest.raises(UserError, match=message):
        audit([silent], MaskPolicy(end_of_turn=False))


def test_example_is_split_where_its_weight_changes(example: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(supervise="all", turn_header=True, end_of_turn=False, normalize="turn")
    first = [(p.text, p.tokens, round(p.weight, 4)) for p in split_by_weight(example, policy, tokenizer) if p.turn == 0]
    assert first == [
        ("<|im_start|>", 1, 0),
        ("user\n", 5, 0.125),
        ("<image: 2 tokens, sMRI, s.nii>", 2, 0),
        ("\n", 1, 0.125),
        ("Q1", 2, 0.125),
        ("<|im_end|>\n", 2, 0),
    ]


def test_split_texts_are_those_of_the_tokens_at_any_position(tokenizer: Any, talk: Talk) -> None:
    texts = [f"é{i} 👩‍⚕️" for i in range(20)]
    long = Renderer(tokenizer, {}).render(talk(*(("user" if i % 2 else "assistant", t) for i, t in enumerate(texts))))
    found = split_by_weight(long, MaskPolicy(), tokenizer)
    assert [piece.text for piece in found if piece.kind == "text"] == texts
    assert "".join(piece.text for piece in found) == tokenizer.decode(long.input_ids)


@pytest.mark.parametrize(
    ("task_types", "count", "selected"),
    [
        (["T1"] * 12, 6, [0, 2, 4, 6, 8, 10]),
        ([*["T1"] * 8, "T3", "T2"], 6, [0, 2, 4, 6, 9, 8]),
        (["T2", "T1", "T2"], 6, [1, 0, 2]),
        ([*["T1"] * 9, "T2"], 2, [0, 9]),
        (["T3", "T2", "T1"], 2, [2, 1]),
    ],
)
def test_examples_of_the_page_are_of_every_task_type_and_evenly_spaced(
    tokenizer: Any, talk: Talk, task_types: list[str], count: int, selected: list[int]
) -> None:
    render = Renderer(tokenizer, {}).render
    examples = [
        render(talk(("user", ""), ("assistant", ""), task_id=str(i), task_type=kind))
        for i, kind in enumerate(task_types)
    ]
    assert [int(example.conversation.task_id) for example in select_examples(examples, count)] == selected


class Page:
    """The page of one example: its tags, its text, and the (class, title, text) of each part of the conversation."""

    def __init__(self, example: Example, policy: MaskPolicy, tokenizer: Any, **options: Any) -> None:
        options = {"notes": [], "redact": lambda text, subjects: text} | options
        self.html = audit_html(audit([example], policy), [example], policy, tokenizer, **options)
        self.tags = set(re.findall(r"<(\w+)", self.html))
        self.text = " ".join(re.sub("<[^>]+>", " ", self.html).split())
        part = r'<span class="([^"]*)"(?: style="[^"]*")?\s+title="([^"]*)">(.*?)</span>'
        self.parts = [list(map(unescape, found)) for found in re.findall(part, self.html, re.DOTALL)]


@pytest.fixture
def hostile(tokenizer: Any, modalities: dict[str, Modality], talk: Talk) -> Example:
    """A conversation whose texts, names and ids look like HTML, or cannot be shown."""
    turns = [
        ("user", [("sMRI", "/secret/place/a\udce9<b>.nii"), "<script>alert(1)</script>\u200b"]),
        ("assistant", "</span>no"),
    ]
    conversation = talk(*turns, task_id="<script>id</script>", task_type="<i>T1")
    return Renderer(tokenizer, modalities).render(conversation)


def test_page_shows_each_part_with_its_kind_weight_and_text_and_nothing_as_html(
    hostile: Example, tokenizer: Any
) -> None:
    policy = MaskPolicy(normalize="turn", task_weights={"<i>T1": 3})
    page = Page(hostile, policy, tokenizer, notes=["a <note> of ours"])
    assert page.parts == [
        ["header", "user header, 6 tokens, no target", "<|im_start|>user↵\n"],
        ["image", "user image, 2 tokens, no target", "<image: 2 tokens, sMRI, a\\udce9<b>.nii>"],
        ["text", "user text, 1 token, no target", "↵\n"],
        ["text", "user text, 28 tokens, no target", "<script>alert(1)</script>\\u200b"],
        ["end", "user end, 2 tokens, no target", "<|im_end|>↵\n"],
        ["header", "assistant header, 11 tokens, no target", "<|im_start|>assistant↵\n"],
        ["text target", "assistant text, 9 tokens, weight 0.2727 each", "</span>no"],
        ["end target", "assistant end, 2 tokens, weight 0.2727 each", "<|im_end|>↵\n"],
    ]
    assert not {"script", "i", "note", "link", "img"} & page.tags
    assert "&lt;script&gt;id&lt;/script&gt;" in page.html
    assert "a &lt;note&gt; of ours" in page.html
    assert not [word for word in ("@import", "url(", "src=", "href=", "/secret/place") if word in page.html]
    page.html.encode("utf-8")


def test_page_shows_a_turn_that_is_out_of_the_loss_and_counts_none_of_its_tokens(
    example: Example, tokenizer: Any, modalities: dict[str, Modality]
) -> None:
    raw = example.conversation.model_dump(mode="json")
    raw["conversations"][1]["loss"] = False
    flagged = Renderer(tokenizer, modalities).render(Conversation.model_validate(raw))
    page = Page(flagged, MaskPolicy(), tokenizer)
    assert "4 of 53 tokens are targets" in page.text  # the second answer and its end
    assert re.findall(r'<div class="role">(.*?)</div>', page.html)[1] == "assistant, loss: false"
    assert ["text", "assistant text, 2 tokens, no target", "A1"] in page.parts


def test_redaction_changes_texts_of_conversations_only(hostile: Example, tokenizer: Any) -> None:
    plain = Page(hostile, MaskPolicy(), tokenizer)
    page = Page(hostile, MaskPolicy(), tokenizer, redact=lambda text, subjects: re.sub("[a-z0-9]", "*", text))
    assert page.html.split("<h2>Samples")[0] == plain.html.split("<h2>Samples")[0]
    assert [about for _, about, _ in page.parts] == [about for _, about, _ in plain.parts]
    assert page.parts[1][2].startswith("<image: 2 tokens, sMRI, *")
    assert not re.search("script|alert|nii", page.html.split("</p>")[-1])


@pytest.mark.parametrize(
    ("policy", "sentences", "row"),
    [
        (
            {},
            [
                "the texts of every assistant turn ; placeholders and padding never are.",
                "The end of such a turn is a target too, for the model to learn to stop .",
                "Its header is no target .",
                "Every target token counts alike: each weighs 1 .",
            ],
            "assistant end 4 4 50.0 %",
        ),
        (
            {"supervise": "last_assistant", "end_of_turn": False, "turn_header": True, "normalize": "sample"},
            [
                "the texts of the last assistant turn ;",
                "The end of such a turn is no target: the model does not learn to stop .",
                "Its header is a target too, for the model to learn whose turn it is .",
                "Every conversation counts alike: its weights sum to 1 .",
            ],
            "assistant end 4 0 0 0.0 %",
        ),
        (
            {"supervise": "all", "normalize": "turn", "task_weights": {"T3": 2, "T1": 0.5}},
            [
                "the texts of every turn ;",
                "its weights sum to 1 , times the weight of its task: T1 0.5 , T3 2 , any other 1.",
            ],
            "assistant end 4 4 0.5 25.0 %",
        ),
    ],
    ids=["plain", "last", "weighted"],
)
def test_page_describes_the_policy_and_has_weights_unless_all_are_1(
    example: Example, tokenizer: Any, policy: dict, sentences: list[str], row: str
) -> None:
    mask = MaskPolicy(**policy)
    page = Page(example, mask, tokenizer)
    assert [sentence for sentence in [*sentences, row, f"mask: {mask.description} "] if sentence not in page.text] == []
    assert ("sum of weights" in page.text) == bool(policy)


def test_invisible_characters_and_numbers_are_formatted() -> None:
    assert show_invisible("a\tb\nc\u00a0\ud800é") == "a\\tb↵\nc\\xa0\\ud800é"
    assert [format_number(n) for n in (0, 3, 1 / 3, 2 / 3 + 1 / 3, 1234567)] == ["0", "3", "0.3333", "1", "1234567"]
