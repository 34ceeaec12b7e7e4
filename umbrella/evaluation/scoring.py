"""Score answers by their likelihood under the model: which of a task's candidate answers does it find most likely?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.batching import Batch
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.prediction import Prediction

ANSWER_ONLY = MaskPolicy(supervise="last_assistant", end_of_turn=True, turn_header=False)
"""The policy under which answers are scored, whatever the policy of the training: scores stay comparable."""

Candidates = Mapping[str, Mapping[str, str]]
"""Target to (label to the answer text that says it): {"sex": {"female": "female.", "male": "male."}}."""


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


def find_numbers(conversations: Iterable[Conversation]) -> set[str]:
    """The targets whose labels are numbers."""
    return {c.target for c in conversations if isinstance(c.label, int | float)}


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
    *,
    truth: bool = True,
    length_normalised: bool = False,
) -> list[Prediction]:
    """Score each conversation's last answer: the true text and, for classes, every candidate text in its place.

    A candidate's score is the log likelihood of its text and end of turn, given all before; probabilities are their
    softmax. Texts are scored in one forward pass, each as a row of its own.

    Args:
        truth: what stands in the last answer is the truth, and its label tells whether there are classes. False: it is
            not looked at, and candidates of its target are scored whether or not there is a label.
        length_normalised: a score is that log likelihood per token.
    """
    options = [_options(c, candidates, truth) for c in conversations]
    texts = [
        list(dict.fromkeys([*([c.answer] if truth else ()), *of.values()]))
        for c, of in zip(conversations, options, strict=True)
    ]
    examples = [renderer.render(c, text) for c, row in zip(conversations, texts, strict=True) for text in row]
    if not examples:
        return [Prediction.of(c, truth) for c in conversations]
    batch = collate(examples, ANSWER_ONLY).to(device)
    nll = model(**batch.model_inputs()).token_nll.sum(1).tolist()
    tokens = batch.loss_weights[:, 1:].count_nonzero(1).tolist()
    measured = iter(zip(nll, tokens, strict=True))
    scored = []
    for conversation, row, of in zip(conversations, texts, options, strict=True):
        by_text = {text: next(measured) for text in row}
        scores = [-by_text[text][0] / (by_text[text][1] if length_normalised else 1) for text in of.values()]
        likely = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0).tolist()
        found = replace(Prediction.of(conversation, truth), probabilities=dict(zip(of, likely, strict=True)))
        if truth:
            answer_nll, answer_tokens = by_text[conversation.answer]
            found = replace(found, answer_nll=answer_nll, answer_tokens=answer_tokens)
        scored.append(found)
    return scored


def _options(conversation: Conversation, candidates: Candidates, truth: bool) -> Mapping[str, str]:
    """Label to text of what a conversation chooses from."""
    label = conversation.label
    return candidates.get(conversation.target, {}) if isinstance(label, str) or (label is None and not truth) else {}
