"""The tokenizer: bytes, made in code, for the tiny model; a checkpoint's own otherwise."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from umbrella.base import UserError

IMAGE_TOKEN = "<image>"
"""The placeholder that stands, once per patch, where a volume goes."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template for a tokenizer that has none."""


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a LLaVA checkpoint (folder or Hugging Face name), or the byte tokenizer for an empty name.

    Raises:
        UserError: no tokenizer there, or one without the ``<image>`` token.
    """
    if not checkpoint:
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.checkpoint={checkpoint}: its tokenizer cannot be loaded: {reason}") from None
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise UserError(f"model.checkpoint={checkpoint}: its tokenizer has no {IMAGE_TOKEN} token; is it a LLaVA?")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and ChatML's special tokens. 260 tokens; any text survives a round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN],
    )
    fast.chat_template = CHATML
    return fast
