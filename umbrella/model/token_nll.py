"""How likely each supervised token is, without the logits of all others."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

LOGITS_AT_ONCE = 2**26
"""Logits that exist at a time, 256 MiB in float32. With 152,000 words that is 441 supervised tokens."""


def token_nll(
    hidden: torch.Tensor,
    words: torch.Tensor,
    input_ids: torch.Tensor,
    loss_weights: torch.Tensor,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """The negative log likelihood, in nats, of each token that has a loss weight: (B, L), float32, 0 elsewhere.

    Logits are made only where the next token is supervised, a chunk at a time, and made again in the backward pass.
    They are float32 products, whatever autocast says: bfloat16 keeps three digits.

    Args:
        hidden: (B, L, d), the language model's output.
        words: (words, d), the output embedding.
        input_ids: (B, L).
        loss_weights: (B, L). That of a row's first token is not looked at: nothing stands before it.
    """
    row, column = (loss_weights[:, 1:] != 0).nonzero(as_tuple=True)
    states, targets = hidden[row, column], input_ids[row, column + 1]
    nll = _ChunkedNll.apply(states, words, targets, max(1, logits_at_once // len(words)))
    return nll.new_zeros(loss_weights.shape).index_put((row, column + 1), nll)


class _ChunkedNll(torch.autograd.Function):
    """states (S, d), words (words, d), targets (S,) to (S,), never with more than ``size`` rows of logits.

    Plain autograd over chunks would keep a gradient of all words for each of two chunks; this one adds to a single one.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(states, words, targets)
        ctx.size = size
        with torch.autocast(states.device.type, enabled=False):
            exact = words.float()
            chunks = [
                functional.cross_entropy(functional.linear(state.float(), exact), target, reduction="none")
                for state, target in zip(states.split(size), targets.split(size), strict=True)
            ]
        return torch.cat(chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        states, words, targets = ctx.saved_tensors
        d_states = torch.empty_like(states, dtype=torch.float32)
        d_words = torch.zeros_like(words, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(states.device.type, enabled=False):
            exact = words.float()
            for start in range(0, len(targets), ctx.size):
                part = slice(start, start + ctx.size)
                state, target = states[part].float(), targets[part, None]
                d_logits = functional.linear(state, exact).softmax(-1)
                d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                d_logits *= grad[part, None]
                torch.mm(d_logits, exact, out=d_states[part])
                if d_words is not None:
                    d_words.addmm_(d_logits.T, state)
        return d_states.to(states.dtype), None if d_words is None else d_words.to(words.dtype), None, None
