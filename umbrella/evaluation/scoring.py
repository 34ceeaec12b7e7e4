"""Score answers by their likelihood under the model: which of a task's candidates is the most likely?"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import nn

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation, usual_answers
from umbrella.data.batching import Batch
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.predictions import Prediction

ANSWER_ONLY = MaskPolicy(supervise="last_assistant", end_of_turn=True, turn_header=False)
"""The policy under which answers are scored, whatever the policy of the training: scores stay comparable."""

Candidates = Mapping[str, Mapping[str, str]]
"""Target to (label to the answer text that says it): {"sex": {"female": "female.", "male": "male."}}."""


def find_candidates(conversations: Iterable[Conversation]) -> dict[str, dict[str, str]]:
    """The candidate answers of each target whose labels are classes: each label's most frequent answer text."""
    usual = usual_answers(c for c in conversations if isinstance(c.label, str))
    return {
        target: {str(label): text for label, text in sorted(by_label.items())}
        for target, by_label in sorted(usual.items())
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


def check_labels(candidates: Candidates) -> None:
    """Check that the labels of each target can be told apart, by their spelling and by their answers.

    Raises:
        UserError: a line for each target whose labels cannot, naming them.
    """
    wrong = []
    for target, answers in candidates.items():
        spelling, said = defaultdict(list), defaultdict(list)
        for label, text in answers.items():
            spelling[" ".join(label.split()).casefold()].append(label)
            said[text.strip()].append(label)
        for alike, what in (
            (spelling, "differ by case or blanks only; write them alike"),
            (said, "have the same answer; give each label an answer of its own"),
        ):
            same = [", ".join(map(repr, labels)) for labels in alike.values() if len(labels) > 1]
            if same:
                wrong.append(f"labels of {target!r}: {' and '.join(same)} {what}")
                break
    if wrong:
        raise UserError("\n".join(wrong))


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
) -> list[Prediction]:
    """Score each conversation's last answer: the true text and, for classes, every candidate text in its place.

    Candidates are compared where they differ. Their token sequences, with the end of turn, form a tree. At each
    branching the model's next-token distribution is renormalised over the tokens that continue a candidate, and a
    candidate's probability is the product along its path. Tokens that follow the last branching of a path do not
    count, so a long answer has no disadvantage against a short one. Each text is a row of one forward pass.

    Args:
        truth: whether the last answer is the truth, and its label tells whether there are classes. If False, the last
            answer is ignored, and the candidates of the target are scored with or without a label.

    Returns:
        One prediction per conversation, in order.
    """
    options = [_options(c, candidates, truth) for c in conversations]
    row = count()
    rows = [
        {text: next(row) for text in dict.fromkeys([*([c.answer] if truth else ()), *of.values()])}
        for c, of in zip(conversations, options, strict=True)
    ]
    examples = [renderer.render(c, text) for c, of_text in zip(conversations, rows, strict=True) for text in of_text]
    if not examples:
        return [Prediction.of(c, truth) for c in conversations]
    batch = collate(examples, ANSWER_ONLY)
    answer_tokens = batch.loss_weights != 0
    choices = [[of_text[text] for text in of.values()] for of_text, of in zip(rows, options, strict=True)]
    branchings = [find_branchings({i: examples[i].input_ids.tolist() for i in choice}) for choice in choices]
    for position, branches in (branching for of_one in branchings for branching in of_one):
        # A tokenizer may join the end of the turn's header with the first letter of one candidate and not of another.
        batch.loss_weights[[branch[0] for branch in branches], position] = 1
    token_nll = model(**batch.to(device).model_inputs()).token_nll.cpu()
    nll = torch.where(answer_tokens, token_nll, 0).sum(1).tolist()
    tokens = answer_tokens[:, 1:].count_nonzero(1).tolist()
    scored = []
    for i, (conversation, of) in enumerate(zip(conversations, options, strict=True)):
        probabilities = _probabilities(choices[i], branchings[i], token_nll)
        found = replace(Prediction.of(conversation, truth), probabilities=dict(zip(of, probabilities, strict=True)))
        if truth:
            true = rows[i][conversation.answer]
            found = replace(found, answer_nll=nll[true], answer_tokens=tokens[true])
        scored.append(found)
    return scored


Branching = tuple[int, list[list[int]]]
"""A position, and the sequences that meet there, grouped by their token at it: two groups or more."""


def find_branchings(sequences: Mapping[int, Sequence[int]]) -> list[Branching]:
    """Find where token sequences branch.

    Args:
        sequences: number of each sequence to its tokens.

    Returns:
        The branchings of the tree of the sequences. A sequence that ends where others go on takes no part in that one.
    """
    found: list[Branching] = []
    open_groups = [(0, list(sequences))]
    while open_groups:
        position, members = open_groups.pop()
        branches: dict[int, list[int]] = defaultdict(list)
        for i in members:
            if position < len(sequences[i]):
                branches[sequences[i][position]].append(i)
        if len(branches) > 1:
            found.append((position, list(branches.values())))
        open_groups += [(position + 1, branch) for branch in branches.values() if len(branch) > 1]
    return found


def _probabilities(choice: Sequence[int], branchings: Sequence[Branching], token_nll: torch.Tensor) -> list[float]:
    """The probability of each row of ``choice``; ``token_nll`` (B, L) has the nats of the tokens at the branchings."""
    log_probability = dict.fromkeys(choice, 0.0)
    for position, branches in branchings:
        nats = token_nll[[branch[0] for branch in branches], position].double()
        for branch, value in zip(branches, (-nats).log_softmax(0).tolist(), strict=True):
            for i in branch:
                log_probability[i] += value
    # They add up to one already, unless two candidates are the same tokens.
    return torch.tensor([log_probability[i] for i in choice], dtype=torch.float64).softmax(0).tolist()


def _options(conversation: Conversation, candidates: Candidates, truth: bool) -> Mapping[str, str]:
    """Label to text of what a conversation chooses from."""
    label = conversation.label
    return candidates.get(conversation.target, {}) if isinstance(label, str) or (label is None and not truth) else {}
