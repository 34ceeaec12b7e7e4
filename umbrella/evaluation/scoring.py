"""Score answers by their likelihood: the probability of each candidate answer under the model."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, left_padded
from umbrella.data.masking import loss_weights
from umbrella.data.rendering import Example, Renderer, Span
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.candidates import Candidates
from umbrella.evaluation.predictions import Prediction

ANSWER_ONLY = MaskPolicy(supervise="last_assistant", end_of_turn=True, turn_header=False)
"""The mask policy of scoring. It does not depend on the policy of the training, so that scores can be compared."""

Tokens = tuple[int, ...]
Tree = dict[Tokens, dict[int, list[int]]]
"""Tokens before a branching of a tree of sequences, to next token, to the indices of the sequences that continue so."""


@dataclass
class _Question:
    """The texts whose likelihood is asked for in one conversation, as tokens after a common start."""

    example: Example
    """The common start without its last token: the prompt."""
    true: Tokens = ()
    """The true answer, after the common start."""
    first_answer_token: int = 0
    """Index in ``true`` of the first token of the answer."""
    tree: Tree = field(default_factory=dict)
    last: int = 0
    """The last token of the common start, with which each path begins."""


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
    """Score the last answer of each conversation: the true text, and every candidate text in its place.

    The token sequences of the candidates, with the end of turn, form a tree. At each branching, the next-token
    distribution of the model is renormalised over the tokens that continue a candidate. The probability of a candidate
    is the product along its path. Tokens after the last branching of a path do not count, so that long answers have no
    disadvantage. The candidates of a number form a grid, whose probabilities are the distribution of the number.

    The tokens before the answer are computed once for each conversation, in a first forward pass. A second one
    continues its cache with the paths to the last branchings side by side: each of their tokens attends to the prompt
    and to its own path.

    Args:
        model: an ``UmbrellaForConditionalGeneration`` in evaluation mode.
        collate: from Examples and a mask policy to a batch.
        candidates: those of a conversation itself take precedence; a target without either has no probabilities.
        truth: False: the true answer is not scored, and candidates are scored for conversations without a label, too.

    Returns:
        One prediction per conversation, in order.
    """
    predictions = [Prediction.from_conversation(c, truth) for c in conversations]
    tails: dict[tuple[str, ...], list[Tokens]] = {}
    options = [_options(c, candidates, truth) for c in conversations]
    asked = [i for i, of_one in enumerate(options) if of_one or truth]
    if not asked:
        return predictions
    questions = [_make_question(conversations[i], tuple(options[i].values()), renderer, truth, tails) for i in asked]
    nll = _Continuations(questions).nll(model, collate([q.example for q in questions], ANSWER_ONLY).to(device))
    for number, (i, question) in enumerate(zip(asked, questions, strict=True)):
        if truth:
            answer = range(question.first_answer_token, len(question.true))
            nats = [nll[number, question.true[:k], question.true[k]] for k in answer]
            predictions[i] = replace(predictions[i], answer_nll=float(np.sum(nats)), answer_tokens=len(nats))
        if options[i]:
            log_probability = np.zeros(len(options[i]))
            for before, branches in question.tree.items():
                logits = torch.tensor([-nll[number, before, token] for token in branches], dtype=torch.float64)
                for members, value in zip(branches.values(), logits.log_softmax(0).tolist(), strict=True):
                    log_probability[members] += value
            # The sum is 1 already, unless two candidates have the same tokens.
            probabilities = torch.tensor(log_probability).softmax(0).tolist()
            predictions[i] = _with_probabilities(predictions[i], options[i], probabilities)
    return predictions


def _options(
    conversation: Conversation, candidates: Candidates, truth: bool
) -> Mapping[str, str] | Mapping[float, str]:
    """The candidates of the kind of the label; of any kind for a conversation without a label, unless ``truth``."""
    options = conversation.candidates or candidates.get(conversation.target, {})
    label = conversation.label
    if label is None:
        return {} if truth else options
    return options if all(isinstance(option, str) == isinstance(label, str) for option in options) else {}


def _with_probabilities(
    prediction: Prediction, options: Mapping[str, str] | Mapping[float, str], probabilities: list[float]
) -> Prediction:
    if all(isinstance(label, str) for label in options):
        by_label = {str(label): p for label, p in zip(options, probabilities, strict=True)}
        return replace(prediction, probabilities=by_label)
    numbers = tuple(float(number) for number in options)
    return replace(prediction, numbers=numbers, number_probabilities=tuple(probabilities))


def _make_question(
    conversation: Conversation,
    options: Sequence[str],
    renderer: Renderer,
    truth: bool,
    tails: dict[tuple[str, ...], list[Tokens]],
) -> _Question:
    """Render the texts of a conversation. ``tails``: a cache of last turns that many conversations share."""
    turns = conversation.conversations[: conversation.last_answer + 1]
    conversation = conversation.model_copy(update={"conversations": turns})
    sequences = _render_options(conversation, options, renderer, tails)
    example = renderer.render(conversation, conversation.answer if truth else options[0])
    whole = tuple(example.input_ids.tolist())
    answer = int(np.flatnonzero(loss_weights(example, ANSWER_ONLY))[0])
    texts = [whole, *sequences]
    low, high = min(texts), max(texts)  # what these share, all share
    shared = next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    start = min(shared, answer if truth else min(map(len, sequences)) - 1)
    prompt = np.array(whole[: start - 1])
    question = _Question(Example(conversation, prompt, (Span(0, start - 1, 0, "user", "text"),)), last=whole[start - 1])
    if truth:
        question.true, question.first_answer_token = whole[start:], answer - start
    question.tree = find_branchings([tokens[start:] for tokens in sequences])
    return question


def _render_options(
    conversation: Conversation, options: Sequence[str], renderer: Renderer, tails: dict[tuple[str, ...], list[Tokens]]
) -> list[Tokens]:
    """The tokens of the conversation with each option as its answer.

    Conversations with the same options have the same last turns, unless a tokenizer joins them with what is before.
    Then their first options do not end alike.
    """
    if not options:
        return []
    example = renderer.render(conversation, options[0])
    first, known = tuple(example.input_ids.tolist()), tails.get(tuple(options))
    if known and first[-len(known[0]) :] == known[0]:
        return [(*first[: -len(known[0])], *tail) for tail in known]
    sequences = [first, *(tuple(renderer.render(conversation, text).input_ids.tolist()) for text in options[1:])]
    start = next(span.start for span in example.spans if span.turn == conversation.last_answer)
    tails[tuple(options)] = [tokens[start:] for tokens in sequences]
    return sequences


def find_branchings(sequences: Sequence[Tokens]) -> Tree:
    """Find where the tree of token sequences branches; a sequence that ends where others continue is in no branch."""
    found: Tree = {}
    open_groups: list[tuple[Tokens, list[int]]] = [((), list(range(len(sequences))))]
    while open_groups:
        before, members = open_groups.pop()
        branches: dict[int, list[int]] = defaultdict(list)
        for i in members:
            if len(before) < len(sequences[i]):
                branches[sequences[i][len(before)]].append(i)
        if len(branches) > 1:
            found[before] = dict(branches)
        open_groups += [((*before, token), branch) for token, branch in branches.items() if len(branch) > 1]
    return found


class _Continuations:
    """The rows of the second forward pass, and the tokens after their positions whose likelihood is asked for.

    The row of a question has its paths one after the other, each after the last token of the common start. A path
    serves all paths that it begins with.
    """

    def __init__(self, questions: Sequence[_Question]) -> None:
        self.tokens: list[list[int]] = [[] for _ in questions]
        self.depths: list[list[int]] = [[] for _ in questions]
        """Position of each token in its path."""
        self.paths: list[list[int]] = [[] for _ in questions]
        """Number of the path of each token."""
        self.keys: list[tuple[int, Tokens, int]] = []
        """Question, tokens after the common start, next token."""
        self.columns: list[int] = []
        """The column after which the token of each key comes."""
        for number, question in enumerate(questions):
            asked = {question.true[:k]: [question.true[k]] for k in range(len(question.true))}
            for before, branches in question.tree.items():
                asked[before] = list(dict.fromkeys([*asked.get(before, ()), *branches]))
            start_of: dict[Tokens, int] = {}
            row = self.tokens[number]
            for path in sorted(asked, key=len, reverse=True):
                if path not in start_of:
                    start_of |= {path[:k]: len(row) for k in range(len(path) + 1) if path[:k] not in start_of}
                    self.paths[number] += [len(row)] * (len(path) + 1)
                    self.depths[number] += range(len(path) + 1)
                    row += [question.last, *path]
                self.keys += [(number, path, token) for token in asked[path]]
                self.columns += [start_of[path] + len(path)] * len(asked[path])

    def nll(self, model: nn.Module, batch: Batch) -> dict[tuple[int, Tokens, int], float]:
        """The negative log likelihood of each key, in nats. ``batch``: the prompts, one per row."""
        if not self.keys:
            return {}
        device = batch.input_ids.device
        prompt_mask = left_padded(batch.attention_mask, batch.attention_mask)
        cache = model(
            input_ids=left_padded(batch.input_ids, batch.attention_mask),
            attention_mask=prompt_mask,
            position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
            pixel_values=batch.pixel_values,
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values

        def padded(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
            return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

        tokens, paths = padded(self.tokens), padded(self.paths, -1)
        # Each token attends to the prompt and to the earlier tokens of its path.
        own = (paths[:, :, None] == paths[:, None]).tril()
        visible = torch.cat([prompt_mask[:, None].bool().expand(-1, tokens.shape[1], -1), own], 2)
        nll = model(
            input_ids=tokens,
            attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None],
            position_ids=prompt_mask.sum(1, keepdim=True) + padded(self.depths),
            past_key_values=cache,
            targets=(
                torch.tensor([number for number, *_ in self.keys], device=device),
                torch.tensor(self.columns, device=device),
                torch.tensor([token for *_, token in self.keys], device=device),
            ),
        ).token_nll
        return dict(zip(self.keys, nll.tolist(), strict=True))
