"""Score answers by their likelihood: the probability of each candidate answer under the model."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation, most_frequent_answers, questions_of
from umbrella.data.batching import Batch
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.predictions import Prediction

ANSWER_ONLY = MaskPolicy(supervise="last_assistant", end_of_turn=True, turn_header=False)
"""The mask policy of scoring. It does not depend on the policy of the training, so that scores can be compared."""

Branchings = list[tuple[int, list[list[int]]]]
"""Positions at which sequences branch, each with the sequences there in groups of equal tokens: two or more groups."""
Candidates = Mapping[str, Mapping[str, str]]
"""Target to label to answer text: {"sex": {"female": "female.", "male": "male."}}."""


def find_candidates(conversations: Iterable[Conversation]) -> dict[str, dict[str, str]]:
    """The candidates of each target whose labels are classes: the most frequent answer text of each label.

    Conversations with candidates of their own are left out.
    """
    usual = most_frequent_answers(
        c for c in questions_of(conversations) if isinstance(c.label, str) and not c.candidates
    )
    return {
        target: {str(label): text for label, text in sorted(by_label.items())}
        for target, by_label in sorted(usual.items())
        if len(by_label) > 1
    }


def find_numbers(conversations: Iterable[Conversation]) -> set[str]:
    """The targets whose labels are numbers."""
    return {c.target for c in questions_of(conversations) if isinstance(c.label, int | float)}


def check_candidates(conversations: Iterable[Conversation], candidates: Candidates) -> None:
    """Check that every class label has a candidate answer.

    Raises:
        UserError: naming the first conversation whose label has none.
    """
    for conversation in questions_of(conversations):
        known = conversation.candidates or candidates.get(conversation.target, {})
        if isinstance(conversation.label, str) and conversation.label not in known:
            raise UserError(
                f"{conversation.task_id}: its label {conversation.label!r} of {conversation.target!r} does not occur in"
                f" the training data ({', '.join(known) or 'no classes'}), so it has no candidate answer"
            )


def check_labels(candidates: Candidates) -> None:
    """Check that the labels of each target differ in their spelling and in their answers.

    Raises:
        UserError: with a line for each target that has equal labels.
    """
    errors = []
    for target, answers in candidates.items():
        spelling, texts = defaultdict(list), defaultdict(list)
        for label, text in answers.items():
            spelling[" ".join(label.split()).casefold()].append(label)
            texts[text.strip()].append(label)
        for groups, problem in (
            (spelling, "differ by case or blanks only; write them alike"),
            (texts, "have the same answer; give each label an answer of its own"),
        ):
            equal = [", ".join(map(repr, labels)) for labels in groups.values() if len(labels) > 1]
            if equal:
                errors.append(f"labels of {target!r}: {' and '.join(equal)} {problem}")
                break
    if errors:
        raise UserError("\n".join(errors))


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
    """Score the last answer of each conversation: the true text and, for classes, every candidate text in its place.

    The token sequences of the candidates, with the end of turn, form a tree. At each branching, the next-token
    distribution of the model is renormalised over the tokens that continue a candidate. The probability of a candidate
    is the product along its path. Tokens after the last branching of a path do not count, so that long answers have no
    disadvantage. Each text is one row of a single forward pass.

    Args:
        model: an ``UmbrellaForConditionalGeneration`` in evaluation mode.
        collate: from Examples and a mask policy to a batch.
        candidates: those of a conversation itself take precedence; a target without either has no probabilities.
        truth: False: the true answer is not scored, and candidates are scored for conversations without a label, too.

    Returns:
        One prediction per conversation, in order.
    """
    predictions = [Prediction.from_conversation(c, truth) for c in conversations]
    options, rows = [], []
    texts: list[tuple[Conversation, str]] = []
    for c in conversations:
        has_options = isinstance(c.label, str) or (c.label is None and not truth)
        options.append(c.candidates or candidates.get(c.target, {}) if has_options else {})
        distinct = dict.fromkeys([*([c.answer] if truth else ()), *options[-1].values()])
        rows.append({text: len(texts) + i for i, text in enumerate(distinct)})
        texts += [(c, text) for text in distinct]
    if not texts:
        return predictions
    examples = [renderer.render(*text) for text in texts]
    batch = collate(examples, ANSWER_ONLY)
    answer_tokens = batch.loss_weights != 0
    candidate_rows = [[row[text] for text in of.values()] for row, of in zip(rows, options, strict=True)]
    branchings = [find_branchings({i: examples[i].input_ids.tolist() for i in of_one}) for of_one in candidate_rows]
    for position, branches in chain(*branchings):
        # A tokenizer may merge the end of the turn header with the first letter of one candidate only.
        batch.loss_weights[[branch[0] for branch in branches], position] = 1
    token_nll = model(**batch.to(device).model_inputs()).token_nll.cpu()
    nll = torch.where(answer_tokens, token_nll, 0).sum(1).tolist()
    tokens = answer_tokens[:, 1:].count_nonzero(1).tolist()
    for i, conversation in enumerate(conversations):
        probabilities = _probabilities(candidate_rows[i], branchings[i], token_nll)
        predictions[i] = replace(predictions[i], probabilities=dict(zip(options[i], probabilities, strict=True)))
        if truth:
            row = rows[i][conversation.answer]
            predictions[i] = replace(predictions[i], answer_nll=nll[row], answer_tokens=tokens[row])
    return predictions


def find_branchings(sequences: Mapping[int, Sequence[int]]) -> Branchings:
    """Find where the tree of token sequences branches; a sequence that ends where others continue is in no group.

    Args:
        sequences: number of each sequence to its tokens.
    """
    found = []
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


def _probabilities(rows: Sequence[int], branchings: Branchings, token_nll: torch.Tensor) -> list[float]:
    """The probability of each candidate row; ``token_nll``: (B, L), in nats."""
    log_probability = dict.fromkeys(rows, 0.0)
    for position, branches in branchings:
        nats = token_nll[[branch[0] for branch in branches], position].double()
        for branch, value in zip(branches, (-nats).log_softmax(0).tolist(), strict=True):
            for i in branch:
                log_probability[i] += value
    # The sum is 1 already, unless two candidates have the same tokens.
    return torch.tensor([log_probability[i] for i in rows], dtype=torch.float64).softmax(0).tolist()
