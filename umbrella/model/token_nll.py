"""How likely each supervised token is, without the logits of all others."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**26
"""Logits that exist at a time, 256 MiB in float32. With 152,000 words that is 441 supervised tokens."""


def supervised(loss_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns (S,) of the positions (B, L) whose next token has a loss weight. Waits for the GPU."""
    row, column = (loss_weights[:, 1:] != 0).nonzero(as_tuple=True)
    return row, column


def token_nll(
    hidden: torch.Tensor,
    words: torch.Tensor,
    input_ids: torch.Tensor,
    loss_weights: torch.Tensor,
    max_logits: int = MAX_LOGITS,
    where: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The negative log likelihood, in nats, of each token that has a loss weight: (B, L), float32, 0 elsewhere.

    Logits are made only where the next token is supervised, a chunk at a time. They are float32, whatever autocast
    says: bfloat16 keeps three digits. With words that move, they are made again in the backward pass.

    Args:
        hidden: (B, L, d), the language model's output.
        words: (words, d), the output embedding.
        input_ids: (B, L).
        loss_weights: (B, L). That of a row's first token is not looked at: nothing stands before it.
        where: ``supervised(loss_weights)``, if it is known already.
    """
    row, column = where or supervised(loss_weights)
    states, targets = hidden[row, column], input_ids[row, column + 1]
    nll = _ChunkedNll.apply(states, words, targets, max(1, max_logits // len(words)))
    return nll.new_zeros(loss_weights.shape).index_put((row, column + 1), nll)


class _ChunkedNll(torch.autograd.Function):
    """states (S, d), words (words, d), targets (S,) to (S,), never with more than ``size`` rows of logits.

    Words that stand still have the gradient of the states made at once, up to a factor for each token. If they move,
    plain autograd over chunks would keep a gradient of all words for each of two chunks; this one adds to a single one.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
        ctx.size, ctx.at_once = size, ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        nll = torch.empty(len(states), device=states.device)
        d_states = torch.empty_like(states) if ctx.at_once else None
        with torch.autocast(states.device.type, enabled=False):
            for part in _chunks(len(states), size):
                log_likelihood, target = product(states[part], words.T).log_softmax(-1), targets[part, None]
                nll[part] = -log_likelihood.gather(1, target)[:, 0]
                if d_states is not None:
                    d_states[part] = product(_less_one(log_likelihood.exp_(), target), words)
        ctx.save_for_backward(*((d_states,) if ctx.at_once else (states, words, targets)))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        if ctx.at_once:
            (d_states,) = ctx.saved_tensors
            return (grad[:, None] * d_states).to(d_states.dtype), None, None, None
        states, words, targets = ctx.saved_tensors
        d_states = torch.empty_like(states)
        d_words = torch.zeros_like(words, dtype=torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            for part in _chunks(len(states), ctx.size):
                d_logits = _less_one(product(states[part], words.T).softmax(-1), targets[part, None])
                d_logits *= grad[part, None]
                d_states[part] = product(d_logits, words)
                d_words.addmm_(d_logits.T, states[part].float())
        return d_states, d_words.to(words.dtype), None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _less_one(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss by the logits, (S, words), in place: probabilities, less one at each target (S, 1)."""
    return probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probabilities.dtype))


def product(left: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """``left @ words``, summed up in float32 and given as float32, for words of any type.

    Words in bfloat16 are multiplied as such on a GPU, ten times as fast as in float32.
    """
    if words.is_cuda and words.dtype == torch.bfloat16:
        return torch.mm(left.bfloat16(), words, out_dtype=torch.float32)
    return left.float() @ words.float()
