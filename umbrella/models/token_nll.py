"""Negative log likelihood of supervised tokens, without materializing the logits of all tokens."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**26
"""Maximum number of logits in memory: 256 MiB in float32, or 441 tokens with a vocabulary of 152,000."""


def supervised_positions(loss_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns, (S,) each, of the positions before supervised tokens. Synchronizes with the GPU."""
    row, column = (loss_weights[:, 1:] != 0).nonzero(as_tuple=True)
    return row, column


def token_nll(
    hidden: torch.Tensor,
    output_embedding: torch.Tensor,
    input_ids: torch.Tensor,
    loss_weights: torch.Tensor,
    max_logits: int = MAX_LOGITS,
    positions: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the negative log likelihood of each supervised token, that is, each token with a nonzero loss weight.

    Logits are computed in chunks, only at positions before supervised tokens, and in float32 even under autocast.

    Args:
        hidden: (B, L, d), the output of the language model.
        output_embedding: (vocabulary, d).
        input_ids: (B, L).
        loss_weights: (B, L). The weight of the first token of a row is ignored: no position precedes it.
        max_logits: maximum number of logits in memory.
        positions: ``supervised_positions(loss_weights)``, if already computed.

    Returns:
        (B, L), float32, in nats; 0 at tokens that are not supervised.
    """
    row, column = positions or supervised_positions(loss_weights)
    nll = target_nll(hidden, output_embedding, row, column, input_ids[row, column + 1], max_logits)
    return nll.new_zeros(loss_weights.shape).index_put((row, column + 1), nll)


def target_nll(
    hidden: torch.Tensor,
    output_embedding: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    target: torch.Tensor,
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """Compute the negative log likelihood, (Q,), float32, in nats, of tokens as the next one after positions.

    Args:
        hidden, output_embedding, max_logits: see ``token_nll``.
        row, column: (Q,), the positions in ``hidden``. One may occur several times.
        target: (Q,), token ids.
    """
    chunk = max(1, max_logits // len(output_embedding))
    return _ChunkedNll.apply(hidden[row, column], output_embedding, target, chunk)


class _ChunkedNll(torch.autograd.Function):
    """Negative log likelihood (S,) of states (S, d), an embedding (vocabulary, d) and targets (S,), chunk by chunk.

    If the embedding is frozen, the forward pass also computes the gradient of the states, up to a factor per token.
    Otherwise the backward pass accumulates the gradient of the embedding in one tensor; plain autograd over chunks
    would allocate one per chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, chunk_size: int
    ) -> torch.Tensor:
        ctx.chunk_size = chunk_size
        ctx.has_state_gradient = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        nll = torch.empty(len(states), device=states.device)
        d_states = torch.empty_like(states) if ctx.has_state_gradient else None
        with torch.autocast(states.device.type, enabled=False):
            for chunk in _chunks(len(states), chunk_size):
                target = targets[chunk, None]
                log_likelihood = matmul_float32(states[chunk], embedding.T).log_softmax(-1)
                nll[chunk] = -log_likelihood.gather(1, target)[:, 0]
                if d_states is not None:
                    d_states[chunk] = matmul_float32(_subtract_one_hot(log_likelihood.exp_(), target), embedding)
        ctx.save_for_backward(*((d_states,) if ctx.has_state_gradient else (states, embedding, targets)))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        if ctx.has_state_gradient:
            (d_states,) = ctx.saved_tensors
            return (grad[:, None] * d_states).to(d_states.dtype), None, None, None
        states, embedding, targets = ctx.saved_tensors
        d_states = torch.empty_like(states)
        d_embedding = torch.zeros_like(embedding, dtype=torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            for chunk in _chunks(len(states), ctx.chunk_size):
                probabilities = matmul_float32(states[chunk], embedding.T).softmax(-1)
                d_logits = _subtract_one_hot(probabilities, targets[chunk, None]).mul_(grad[chunk, None])
                d_states[chunk] = matmul_float32(d_logits, embedding)
                d_embedding.addmm_(d_logits.T, states[chunk].float())
        return d_states, d_embedding.to(embedding.dtype), None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _subtract_one_hot(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Turn probabilities (S, vocabulary) into the gradient of the logits for targets (S, 1), in place."""
    return probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probabilities.dtype))


def matmul_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left @ right`` in float32, accumulated in float32, for ``right`` of any dtype.

    On a GPU, a bfloat16 ``right`` is multiplied in bfloat16, ten times as fast as in float32.
    """
    if right.is_cuda and right.dtype == torch.bfloat16:
        return torch.mm(left.bfloat16(), right, out_dtype=torch.float32)
    return left.float() @ right.float()
