"""The summary that a training logs at its start, and the sample of the data that it reads."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

from umbrella.conversations.schema import Conversation
from umbrella.data.masking import audit
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.training.run_summary import audit_sample, mask_audit_page, summarise_run

STOPS = "note: the chat template ends an assistant turn without a token of its own, so the model cannot learn to stop;"


def render(split: list[Conversation], renderer: Renderer) -> list[Example]:
    return [renderer.render(split[i]) for i in audit_sample(len(split))]


def test_the_summary_has_loss_mask_tokens_weights_and_volumes(
    tokenizer: Any, modalities: dict[str, Modality], talk: Callable[..., Conversation]
) -> None:
    conversation = talk(("user", [("sMRI", "s.nii"), "Sex?"]), ("assistant", "male."))
    policy = MaskPolicy(supervise="last_assistant")
    table = audit(render([conversation], Renderer(tokenizer, modalities)), policy)
    moving = {"embedder": 1234, "projector": 0, "language_model": 5}
    assert summarise_run(
        table, policy, moving, {"fMRI": modalities["fMRI"]}, has_stop_token=True, read="1 of 1 conversations"
    ).splitlines() == [
        "loss: Σ weight·nll / Σ weight over the global batch, nats per supervised token",
        "mask: supervise=last_assistant, end_of_turn=True, turn_header=False, normalize=token",
        "supervised: 7 of 33 tokens (21.2%), in 1 of 1 conversations",
        "  assistant end          2 of 2",
        "  assistant header       0 of 11",
        "  assistant text         5 of 5",
        "       user end          0 of 2",
        "       user header       0 of 6",
        "       user image        0 of 2",
        "       user text         0 of 5",
        "trained weights: embedder 1,234, language_model 5",
        "fMRI: a volume of 4x4x4x6 in patches of 4x4x4x2 is 3 tokens",
    ]


def test_the_summary_has_weights_other_than_1_and_a_note_if_the_model_cannot_learn_to_stop(
    tokenizer: Any, talk: Callable[..., Conversation]
) -> None:
    conversation = talk(("user", "Sex?"), ("assistant", "male."))
    policy = MaskPolicy(normalize="turn", task_weights={"T1": 2})
    table = audit(render([conversation], Renderer(tokenizer, {})), policy)
    lines = summarise_run(table, policy, {}, {}, has_stop_token=False, read="1 of 9 conversations").splitlines()
    assert lines[1:6] == [
        "mask: supervise=assistant, end_of_turn=True, turn_header=False, task_weights={T1: 2}, normalize=turn",
        "supervised: 7 of 30 tokens (23.3%), in 1 of 9 conversations",
        "  assistant end          2 of 2, weight 0.5714",
        "  assistant header       0 of 11",
        "  assistant text         5 of 5, weight 1.4286",
    ]
    assert lines[9:] == [f"{STOPS} model.chat_template=vicuna writes one", "trained weights: none"]


def test_the_audit_page_has_examples_of_every_task_and_the_same_note(
    tokenizer: Any, talk: Callable[..., Conversation]
) -> None:
    kinds = ["T1"] * 30 + ["T2"] + ["T1"] * 30
    split = [talk(("user", "Q"), ("assistant", "A"), task_id=f"{k}_{i}", task_type=k) for i, k in enumerate(kinds)]
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    for used, stops in ((tokenizer, True), (endless, False)):
        renderer, policy = Renderer(used, {}), MaskPolicy()
        examples = render(split, renderer)
        page = mask_audit_page(audit(examples, policy), examples, renderer, policy, "61 of 61 conversations")
        assert [f"{k}_{i}" for i, k in enumerate(kinds) if f">{k}_{i}<" in page] == [
            "T1_0", "T1_12", "T1_24", "T2_30", "T1_37", "T1_49",
        ]  # fmt: skip
        assert (STOPS.removeprefix("note: ") in page) != stops
        assert "Read from 61 of 61 conversations." in page


def test_the_sample_of_a_large_split_is_random(tokenizer: Any, talk: Callable[..., Conversation]) -> None:
    # Four questions in turn, 1000 conversations, of which 256 are read.
    split = [talk(("user", ""), ("assistant", "a"), task_id=str(i), task_type="ABCD"[i % 4]) for i in range(1000)]
    read = [example.conversation for example in render(split, Renderer(tokenizer, {}))]
    numbers = [int(conversation.task_id) for conversation in read]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 256
    assert all(45 < kind < 85 for kind in Counter(c.task_type for c in read).values())
    assert all(45 < quarter < 85 for quarter in Counter(number // 250 for number in numbers).values())
