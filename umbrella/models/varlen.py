"""Attention by kernels for sequences of different lengths: ``model.attention=varlen``.

Rows of several samples need no mask: each segment of a row is a sequence. A segment that continues a prefix has the
keys of the prefix before its own.
"""

from typing import Any, NamedTuple

import torch
from torch.library import custom_op
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface


class Sequences(NamedTuple):
    """The S segments of a batch. Its T tokens are those of its rows, one row after the other, with padding.

    Attributes:
        query_starts: (S + 1,), int32: first token of each segment, and T.
        key_starts: (S + 1,), int32: first key of each segment, and their number K.
        max_queries, max_keys: largest number of tokens and of keys of a segment.
        keys: (K,), int64: token of each key. None without prefixes: the keys are the tokens.
        own: (T,), int64: index, among the K keys, of the key of each token in its own segment.
        prefix_tokens: (P,), int64: tokens of the prefixes.
        copies: (P, C), int64: indices, among the K keys, of the further keys of each prefix token, or -1.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    max_queries: int
    max_keys: int
    keys: torch.Tensor | None = None
    own: torch.Tensor | None = None
    prefix_tokens: torch.Tensor | None = None
    copies: torch.Tensor | None = None


def find_sequences(segments: torch.Tensor, prefix: torch.Tensor | None = None) -> Sequences:
    """Return the segments of a batch.

    Args:
        segments: (B, L), int64: ``Batch.attention_mask``. Padding is a segment, too.
        prefix: see ``Batch.prefix``.
    """
    is_start = pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True).flatten()
    starts = is_start.nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([segments.numel()]))
    query_starts, max_queries = _starts(lengths).int(), int(lengths.max())
    if prefix is None or not prefix.any():
        return Sequences(query_starts, query_starts, max_queries, max_queries)
    row, number, before = starts // segments.shape[1], segments.flatten()[starts], prefix.flatten()[starts]
    of_number = starts.new_zeros(len(segments), int(segments.max()) + 1)
    of_number[row, number] = torch.arange(len(starts), device=starts.device)
    parent = of_number[row, before]
    prefixes = torch.where(before > 0, lengths[parent], 0)
    key_starts = _starts(prefixes + lengths)
    owner = torch.repeat_interleave(prefixes + lengths)
    offset = torch.arange(len(owner), device=starts.device) - key_starts[owner]
    is_copy = offset < prefixes[owner]
    keys = torch.where(is_copy, starts[parent[owner]], starts[owner] - prefixes[owner]) + offset
    tokens, order = keys[is_copy].sort(stable=True)
    prefix_tokens, counts = tokens.unique_consecutive(return_counts=True)
    copy = torch.repeat_interleave(counts)
    copies = starts.new_full((len(prefix_tokens), int(counts.max())), -1)
    copies[copy, torch.arange(len(copy), device=starts.device) - _starts(counts)[copy]] = is_copy.nonzero()[order, 0]
    own, most = (~is_copy).nonzero()[:, 0], int((prefixes + lengths).max())
    return Sequences(query_starts, key_starts.int(), max_queries, most, keys, own, prefix_tokens, copies)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return pad(lengths.cumsum(0), (1, 0))


@custom_op("umbrella::gather_keys", mutates_args=())
def gather_keys(
    x: torch.Tensor, keys: torch.Tensor, own: torch.Tensor, prefix_tokens: torch.Tensor, copies: torch.Tensor
) -> torch.Tensor:
    """Return ``x[keys]`` (K, heads, width). In the backward pass, the gradients of copies are added up in float32.

    Args:
        x: (T, heads, width).
        keys, own, prefix_tokens, copies: see ``Sequences``; all but the keys are for the backward pass.
    """
    return x[keys]


@gather_keys.register_fake
def _(x: torch.Tensor, keys: torch.Tensor, own: Any, prefix_tokens: Any, copies: Any) -> torch.Tensor:
    return x.new_empty(keys.shape[0], *x.shape[1:])


def _save_places(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _add_copies(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    own, prefix_tokens, copies = ctx.saved_tensors
    result = grad[own]
    of_copies = torch.where((copies >= 0)[..., None, None], grad[copies], 0).float().sum(1)
    total = (result[prefix_tokens].float() + of_copies).to(grad.dtype)
    return result.index_copy(0, prefix_tokens, total), None, None, None, None


gather_keys.register_autograd(_add_copies, setup_context=_save_places)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sequences: Sequences,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers for ``sequences``, which replace the mask.

    Args:
        query: (B, heads, L, width). ``key`` and ``value`` may have fewer heads. On a GPU, in bfloat16 or float16.

    Returns:
        The output (B, L, heads, width).
    """
    rows, heads, length, width = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    if sequences.keys is not None:
        key, value = (gather_keys(x, *sequences[4:]) for x in (key, value))
    if key.shape[1] < heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # 0: causal
    output: Any = varlen_attn(query, key, value, *sequences[:4], scale=scaling, window_size=window)
    return output.view(rows, length, heads, width), None


AttentionInterface.register("varlen", varlen_attention)
