"""Score answers by their likelihood under the model: which of a task's candidate answers does it find most likely?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.batching import Batch
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy

ANSWER_ONLY = MaskPolicy(supervise="last_assistant", end_of_turn=True, turn_header=False)
"""The policy under which answers are scored, whatever the policy of the training: scores stay comparable."""

Candidates = Mapping[str, Mapping[str, str]]
"""Target to (label to the answer text that says it): {"sex": {"female": "female.", "male": "male."}}."""


@dataclass(frozen=True)
class Scored:
    """One scored conversation.

    probabilities: label to probability, over the target's candidates; empty where the target has none (numbers).
    answer_nll: the negative log likelihood of the true last answer, in nats, summed over its answer_tokens tokens.
    """

    task_id: str
    task_type: str
    subject_id: str
    target: str
    label: str | float | None
    probabilities: dict[str, float]
    answer_nll: float
    answer_tokens: int


def find_candidates(conversations: Iterable[Conversation]) -> dict[str, dict[str, str]]:
    """The candidate answers of each target whose labels are classes: each label's most frequent answer text."""
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for conversation in conversations:
        if isinstance(conversation.label, str):
            answers[conversation.target][conversation.label][conversation.answer] += 1
    return {
        target: {label: texts.most_common(1)[0][0] for label, texts in sorted(by_label.items())}
        for target, by_label in sorted(answers.items())
        if len(by_label) > 1
    }


def check_candidates(conversations: Iterable[Conversation], candidates: Candidates) -> None:
    """Every class label must be one that the training data have an answer for.

    Raises:
        UserError: naming the first such task and its label.
    """
    for conversation in conversations:
        known = candidates.get(conversation.target, {})
        if isinstance(conversation.label, str) and conversation.label not in known:
            raise UserError(
                f"{conversation.task_id}: its label {conversation.label!r} of {conversation.target!r} does not occur in"
                f" the training data ({', '.join(known) or 'no classes'}), so it has no candidate answer"
            )


@torch.no_grad()
def score(
    model: nn.Module,
    conversations: Sequence[Conversation],
    renderer: Renderer,
    collate: Callable[[Sequence[Example], MaskPolicy], Batch],
    candidates: Candidates,
    device: torch.device | str = "cpu",
) -> list[Scored]:
    """Score each conversation's last answer: the true text and, for classes, every candidate text in its place.

    A candidate's score is the log likelihood of its text and end of turn, given all before; probabilities are their
    softmax. Texts are scored in one forward pass, each as a row of its own.
    """
    texts = [
        list(dict.fromkeys([c.answer, *candidates.get(c.target, {}).values()]))
        if isinstance(c.label, str)
        else [c.answer]
        for c in conversations
    ]
    examples = [renderer.render(c, text) for c, row in zip(conversations, texts, strict=True) for text in row]
    batch = collate(examples, ANSWER_ONLY).to(device)
    nll = model(**batch.model_inputs()).token_nll.sum(1).tolist()
    tokens = batch.loss_weights[:, 1:].count_nonzero(1).tolist()
    scored = []
    first = 0
    for conversation, row in zip(conversations, texts, strict=True):
        by_text = dict(zip(row, nll[first : first + len(row)], strict=True))
        options = candidates.get(conversation.target, {}) if isinstance(conversation.label, str) else {}
        scores = torch.tensor([-by_text[text] for text in options.values()], dtype=torch.float64)
        scored.append(
            Scored(
                task_id=conversation.task_id,
                task_type=conversation.task_type,
                subject_id=conversation.subject_id,
                target=conversation.target,
                label=conversation.label,
                probabilities=dict(zip(options, torch.softmax(scores, 0).tolist(), strict=True)),
                answer_nll=by_text[conversation.answer],
                answer_tokens=tokens[first],
            )
        )
        first += len(row)
    return scored
