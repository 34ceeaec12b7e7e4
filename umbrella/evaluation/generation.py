"""Generate answers: a batch of prompts, each continued up to its end of turn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from umbrella.data.batching import Batch
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.scoring import ANSWER_ONLY


class Generated(NamedTuple):
    """A generated answer."""

    text: str
    """Without special tokens and surrounding blanks."""
    cut: bool
    """Whether it reached the limit of tokens before it ended."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Example],
    renderer: Renderer,
    collate: Callable[[Sequence[Example], MaskPolicy], Batch],
    device: torch.device | str = "cpu",
    max_new_tokens: int = 64,
    **options: Any,
) -> list[Generated]:
    """Generate the answers of a batch of prompts, by greedy decoding unless ``options`` change it.

    Args:
        model: an ``UmbrellaForConditionalGeneration`` in evaluation mode; mixed precision is run under autocast.
        prompts: from ``Renderer.prompt``. An answer does not depend on the other prompts.
        max_new_tokens: longer answers are cut.
        options: of transformers' ``generate``, such as ``do_sample=True, temperature=0.7``.
    """
    batch = collate(prompts, ANSWER_ONLY).to(device)
    length, stops = batch.input_ids.shape[1], renderer.stop_ids()
    new = model.generate(
        input_ids=left_padded(batch.input_ids, batch.attention_mask),
        attention_mask=left_padded(batch.attention_mask, batch.attention_mask),
        pixel_values=batch.pixel_values,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=renderer.tokenizer.pad_token_id or 0,
        **{"do_sample": False} | options,
    )[:, length:].tolist()
    return [_decode(row, set(stops), renderer) for row in new]


def left_padded(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move the padding of rows (B, L) from the right to the left, so that generation continues the last token."""
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device) + attention_mask.sum(1, keepdim=True)
    return tokens.gather(1, places % length)


def _decode(new: list[int], stops: set[int], renderer: Renderer) -> Generated:
    end = next((i for i, token in enumerate(new) if token in stops), len(new))
    text = renderer.tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generated(text.strip(), cut=end == len(new))
