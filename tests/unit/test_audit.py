"""The audit: tokens by role and kind counted by hand, and a page on which nothing is taken as HTML."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.data.mask_audit import (
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
        ({"end_of_turn": False}, {"assistant text": 4}, {}),
        ({"supervise": "last_assistant"}, {"assistant end": 2, "assistant text": 2}, {}),
        (
            {"preset": "upstream"},
            {"assistant end": 4, "assistant header": 22, "assistant text": 4},
            {},
        ),
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
def test_the_audit_counts_tokens_targets_and_weights_by_role_and_kind(
    example: Example, policy: dict, supervised: dict[str, int], weight: dict[str, float]
) -> None:
    rows = audit([example, example], MaskPolicy(**policy))
    assert [f"{row['role']} {row['kind']}" for row in rows] == sorted(TOKENS)
    for row in rows:
        name = f"{row['role']} {row['kind']}"
        assert (row["tokens"], row["supervised"]) == (2 * TOKENS[name], 2 * supervised.get(name, 0))
        assert row["weight"] == round(2 * (weight or supervised).get(name, 0), 6)
    assert is_weighted(rows) == bool(weight)


def test_a_policy_that_supervises_nothing_is_refused(tokenizer: Any, talk: Talk) -> None:
    silent = Renderer(tokenizer, {}).render(talk(("user", "Q"), ("assistant", "")))
    message = r"\(supervise=assistant, end_of_turn=False, .*\) supervises none of the 22 tokens: .* choose another mask"
    with pytest.raises(UserError, match=message):
        audit([silent], MaskPolicy(end_of_turn=False))


def test_a_piece_ends_where_the_weight_changes(example: Example, tokenizer: Any) -> None:
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


def test_the_texts_of_the_pieces_are_those_of_the_tokens_wherever_they_stand(tokenizer: Any, talk: Talk) -> None:
    texts = [f"é{i} 👩‍⚕️" for i in range(20)]
    long = Renderer(tokenizer, {}).render(talk(*(("user" if i % 2 else "assistant", t) for i, t in enumerate(texts))))
    found = split_by_weight(long, MaskPolicy(), tokenizer)
    assert [piece.text for piece in found if piece.kind == "text"] == texts
    assert "".join(piece.text for piece in found) == tokenizer.decode(long.input_ids)


def test_the_samples_of_the_page_are_of_every_task_and_evenly_drawn(tokenizer: Any, talk: Talk) -> None:
    render = Renderer(tokenizer, {}).render

    def split(*kinds: str) -> list[Example]:
        return [render(talk(("user", ""), ("assistant", ""), task_id=str(i), task_type=k)) for i, k in enumerate(kinds)]

    def picked(*kinds: str, count: int = 6) -> list[int]:
        return [int(example.conversation.task_id) for example in select_examples(split(*kinds), count)]

    assert picked(*["T1"] * 12) == [0, 2, 4, 6, 8, 10]
    assert picked(*["T1"] * 8, "T3", "T2") == [0, 2, 4, 6, 9, 8]
    assert picked("T2", "T1", "T2") == [1, 0, 2]
    assert picked(*["T1"] * 9, "T2", count=2) == [0, 9]
    assert picked("T3", "T2", "T1", count=2) == [2, 1]


class Reading(HTMLParser):
    """What a browser takes from the page: its tags, and the (class, title, text) of each part of a conversation."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.parts: list[list[str]] = []
        self.addresses: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [str(found[name]) for name in ("src", "href") if name in found]
        self._inside = "title" in found
        if self._inside:
            self.parts.append([str(found["class"]), str(found["title"]), ""])

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.parts[-1][2] += data


@pytest.fixture
def hostile(tokenizer: Any, modalities: dict[str, Modality], talk: Talk) -> Example:
    """A conversation that would be a page of its own, about a file whose name is no UTF-8."""
    return Renderer(tokenizer, modalities).render(
        talk(
            ("user", [("sMRI", "/secret/place/a\udce9<b>.nii"), "<script>alert(1)</script>\u200b"]),
            ("assistant", "</span>no"),
            task_id="<script>id</script>",
            task_type="<i>T1",
        )
    )


def test_the_page_shows_every_part_with_its_kind_weight_and_text(hostile: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(normalize="turn", task_weights={"<i>T1": 3})
    page = audit_html(audit([hostile], policy), [hostile], policy, tokenizer)
    assert Reading(page).parts == [
        ["header", "user header, 6 tokens, no target", "<|im_start|>user↵\n"],
        ["image", "user image, 2 tokens, no target", "<image: 2 tokens, sMRI, a\\udce9<b>.nii>"],
        ["text", "user text, 1 token, no target", "↵\n"],
        ["text", "user text, 28 tokens, no target", "<script>alert(1)</script>\\u200b"],
        ["end", "user end, 2 tokens, no target", "<|im_end|>↵\n"],
        ["header", "assistant header, 11 tokens, no target", "<|im_start|>assistant↵\n"],
        ["text target", "assistant text, 9 tokens, weight 0.2727 each", "</span>no"],
        ["end target", "assistant end, 2 tokens, weight 0.2727 each", "<|im_end|>↵\n"],
    ]


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": False}], ids=str)
def test_the_page_shows_a_turn_that_is_out_of_the_loss_and_counts_none_of_its_tokens(
    example: Example, tokenizer: Any, modalities: dict[str, Modality], flag: dict
) -> None:
    raw = example.conversation.model_dump(mode="json")
    raw["conversations"][1] |= flag
    flagged = Renderer(tokenizer, modalities).render(Conversation.model_validate(raw))
    rows = audit([flagged], MaskPolicy())
    assert sum(row["supervised"] for row in rows) == 4  # the second answer and its end
    page = audit_html(rows, [flagged], MaskPolicy(), tokenizer)
    assert re.findall(r'<div class="role">(.*?)</div>', page) == ["user", "assistant, loss: false", "user", "assistant"]
    assert ["text", "assistant text, 2 tokens, no target", "A1"] in Reading(page).parts


def test_what_is_hidden_of_a_conversation_leaves_the_pages_own_words_and_numbers(
    hostile: Example, tokenizer: Any
) -> None:
    policy = MaskPolicy()
    page = audit_html(
        audit([hostile], policy),
        [hostile],
        policy,
        tokenizer,
        redact=lambda text, subjects: re.sub("[a-z0-9]", "*", text),
    )
    plain = audit_html(audit([hostile], policy), [hostile], policy, tokenizer)
    assert page.split("<h2>Samples")[0] == plain.split("<h2>Samples")[0]
    assert [about for _, about, _ in Reading(page).parts] == [about for _, about, _ in Reading(plain).parts]
    assert Reading(page).parts[1][2].startswith("<image: 2 tokens, sMRI, *")
    assert not re.search("script|alert|nii", page.split("</p>")[-1])


def test_nothing_of_a_conversation_is_taken_as_html_and_the_page_needs_no_other_file(
    hostile: Example, tokenizer: Any
) -> None:
    policy = MaskPolicy(task_weights={"<i>T1": 3})
    page = audit_html(audit([hostile], policy), [hostile], policy, tokenizer, ["a <note> of ours"])
    read = Reading(page)
    assert not {"script", "i", "note", "link", "img"} & set(read.tags)
    assert read.addresses == []
    assert "@import" not in page
    assert "url(" not in page
    assert "/secret/place" not in page
    assert "&lt;script&gt;id&lt;/script&gt;" in page
    assert "a &lt;note&gt; of ours" in page
    page.encode("utf-8")


@pytest.mark.parametrize(
    ("policy", "sentences"),
    [
        (
            {},
            [
                "the texts of every assistant turn; placeholders and padding never are.",
                "The end of such a turn is a target too, for the model to learn to stop.",
                "Its header is no target.",
                "Every target token counts alike: each weighs 1.",
            ],
        ),
        (
            {"supervise": "last_assistant", "end_of_turn": False, "turn_header": True, "normalize": "sample"},
            [
                "the texts of the last assistant turn;",
                "The end of such a turn is no target: the model does not learn to stop.",
                "Its header is a target too, for the model to learn whose turn it is.",
                "Every conversation counts alike: its weights sum to 1.",
            ],
        ),
        (
            {"supervise": "all", "normalize": "turn", "task_weights": {"T3": 2, "T1": 0.5}},
            [
                "the texts of every turn;",
                "its weights sum to 1, times the weight of its task: T1 0.5, T3 2, any other 1.",
            ],
        ),
    ],
    ids=["plain", "last", "weighted"],
)
def test_the_page_says_the_policy_description(
    example: Example, tokenizer: Any, policy: dict, sentences: list[str]
) -> None:
    mask = MaskPolicy(**policy)
    page = audit_html(audit([example], mask), [], mask, tokenizer)
    said = " ".join(re.sub("<[^>]+>", "", page).split())
    assert [sentence for sentence in sentences if sentence not in said] == []
    assert f"mask: {mask.description} " in said


def test_the_table_of_the_page_has_weights_only_where_they_are_not_1(example: Example, tokenizer: Any) -> None:
    def cells(policy: MaskPolicy, row: str) -> list[str]:
        page = audit_html(audit([example], policy), [], policy, tokenizer)
        rows = re.findall("<tr.*?</tr>", page, re.DOTALL)
        texts = [re.sub("<[^>]+>", "", cell).strip() for r in rows for cell in re.findall(r"<t[dh].*?</t[dh]>", r)]
        start = texts.index(row)
        return texts[start : start + (7 if "sum of weights" in texts else 6)]

    assert cells(MaskPolicy(), "role") == ["role", "kind", "tokens", "targets", "share of the weights", ""]
    assert cells(MaskPolicy(), "assistant") == ["assistant", "end", "4", "4", "50.0 %", ""]
    assert cells(MaskPolicy(), "all") == ["all", "", "53", "8", "", ""]
    weighted = MaskPolicy(normalize="sample", end_of_turn=False, turn_header=True)  # 22 + 4 targets
    assert cells(weighted, "assistant") == ["assistant", "end", "4", "0", "0", "0.0 %", ""]
    assert cells(weighted, "all") == ["all", "", "53", "26", "1", "", ""]


def test_invisible_characters_and_numbers_as_they_are_shown() -> None:
    assert show_invisible("a\tb\nc\u00a0\ud800é") == "a\\tb↵\nc\\xa0\\ud800é"
    assert [format_number(n) for n in (0, 3, 1 / 3, 2 / 3 + 1 / 3, 1234567, 12.50001)] == [
        "0", "3", "0.3333", "1", "1234567", "12.5",
    ]  # fmt: skip
