"""Loading of tokenizers and chat templates; a byte tokenizer for the tiny model."""

import json
import logging
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from umbrella.base import UserError, describe_load_error
from umbrella.conversations.images import IMAGE_TOKEN

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of tokenizers that have none."""
VICUNA = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }} "
    "{% elif message.role == 'user' %}USER: {{ message.content }} "
    "{% else %}ASSISTANT: {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Chat template of the training of LLaVA 1.5. The one in its checkpoint omits the end of turns."""
TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA}


def load_tokenizer(checkpoint: str, template: str = "") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a LLaVA checkpoint, or the byte tokenizer.

    Args:
        checkpoint: folder or Hugging Face name; empty for the byte tokenizer.
        template: chat template: a key of ``TEMPLATES`` or a Jinja file. Empty: the template of the tokenizer, else of
            the processor of the checkpoint, else ChatML. It is saved with the tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded, has no ``<image>`` token or is not a fast tokenizer, or the template
            cannot be read.
    """
    tokenizer = _checkpoint_tokenizer(checkpoint) if checkpoint else byte_tokenizer()
    if template:
        tokenizer.chat_template = TEMPLATES.get(template) or _template_file(template)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(checkpoint) or CHATML
    elif isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template
        if "default" not in named:
            raise UserError(
                f"model.checkpoint={checkpoint}: its chat templates are {', '.join(sorted(named))}, none of them the"
                " default; give the file of one as model.chat_template"
            )
        tokenizer.chat_template = named["default"]
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 260 tokens: the bytes of UTF-8 and the special tokens of ChatML."""
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


def _checkpoint_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # slow import

    where = f"model.checkpoint={checkpoint}"
    # It reads the configuration too, and warns about the model type of our own models.
    log = logging.getLogger("transformers.configuration_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: its tokenizer cannot be loaded: {describe_load_error(error)}") from None
    finally:
        log.setLevel(level)
    if not tokenizer.is_fast:
        raise UserError(
            f"{where}: its {type(tokenizer).__name__} is written in Python and does not say which characters a token"
            " stands for; it needs one of the tokenizers library (tokenizer.json)"
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise UserError(f"{where}: its tokenizer has no {IMAGE_TOKEN} token; is it a LLaVA?")
    return tokenizer


def _template_file(template: str) -> str:
    try:
        return Path(template).read_text("utf-8")
    except (OSError, ValueError):  # missing, a folder, a name that is too long, or not UTF-8
        raise UserError(
            f"model.chat_template={template[:100]}: is not {' or '.join(TEMPLATES)}, and no Jinja file that can be read"
        ) from None


def _processor_template(checkpoint: str) -> str | None:
    # Tokenizers read chat_template.jinja themselves; older processors use this file.
    try:
        file = cached_file(checkpoint, "chat_template.json")
    except OSError:  # no such file
        return None
    try:
        template = json.loads(Path(file).read_text("utf-8"))["chat_template"]
        if not (template is None or isinstance(template, str)):
            raise TypeError("chat_template is not one text")
        return template
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.checkpoint={checkpoint}: its chat_template.json cannot be read: {describe_load_error(error)};"
            " set model.chat_template"
        ) from None
