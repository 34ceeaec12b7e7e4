"""The tokenizer: bytes, made in code, for the tiny model; a checkpoint's own otherwise. And its chat template."""

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
"""The chat template for a tokenizer that has none."""
VICUNA = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }} "
    "{% elif message.role == 'user' %}USER: {{ message.content }} "
    "{% else %}ASSISTANT: {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""What LLaVA 1.5 was trained with. The template in its checkpoint writes the same without the end of a turn."""
TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA}


def load_tokenizer(checkpoint: str, template: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a LLaVA checkpoint (folder or Hugging Face name), or the byte tokenizer for an empty name.

    Args:
        template: the chat template: a name of ``TEMPLATES`` or a Jinja file. Empty: the tokenizer's own, else that of
            the checkpoint's processor, else ChatML. The tokenizer carries it, so saving the one saves the other.

    Raises:
        UserError: no tokenizer there, one without the ``<image>`` token or not of the tokenizers library; no template.
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


def _checkpoint_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # brings all models with it: seconds that scripts without one do not need

    where = f"model.checkpoint={checkpoint}"
    # It reads the configuration too, and warns of the kind of our own models, which lies in a room unknown to this one.
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
    except (OSError, ValueError):  # no such file, a folder, a name too long to be one; not UTF-8
        raise UserError(
            f"model.chat_template={template[:100]}: is not {' or '.join(TEMPLATES)}, and no Jinja file that can be read"
        ) from None


def _processor_template(checkpoint: str) -> str | None:
    # Tokenizers read chat_template.jinja themselves. This is the file in which older processors keep theirs.
    try:
        file = cached_file(checkpoint, "chat_template.json")
    except OSError:  # it has none
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
