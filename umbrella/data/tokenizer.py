"""Tokenizers and chat templates of checkpoints and the tiny model, and joint tokenization of consecutive segments."""

import copy
import json
import logging
import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

from pydantic import TypeAdapter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from umbrella import cohorts
from umbrella.base import UserError, describe_load_error
from umbrella.conversations.schema import IMAGE_TOKEN

# AutoTokenizer reads the configuration, too, and warns about the model type of our own models.
logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)

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
MARK = "\ue000"
"""Private-use character that starts the substitute of a special token."""
FIRST_SUBSTITUTE = 0xF0000
"""First of 65,534 private-use characters that distinguish substitutes."""


def load_tokenizer(checkpoint: str, template: str = "") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a LLaVA checkpoint, or that of the tiny model.

    Args:
        checkpoint: folder or Hugging Face name; empty for that of the tiny model.
        template: chat template: a key of ``TEMPLATES`` or a Jinja file. Empty: the template of the tokenizer, else of
            the processor of the checkpoint, else ChatML. It is saved with the tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded, has no ``<image>`` token or is not a fast tokenizer, or the template
            cannot be read.
    """
    tokenizer = _checkpoint_tokenizer(checkpoint) if checkpoint else tiny_tokenizer()
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


@cache
def _trained_tokenizer() -> Tokenizer:
    """Train byte-pair encoding on the words of the built-in templates, with a token for each number up to 99."""
    texts = (Path(cohorts.__file__).parent / "templates.yaml").read_text("utf-8")
    words = f"{texts} user assistant system\nmale\nfemale\na male or a female\n"
    numbers = "".join(f"{number}\n{number:02d}\n" for number in range(100))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]{1,2}| ?[A-Za-z]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([words, numbers], trainer)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the tiny model: the bytes of UTF-8, the words of the built-in templates, and ChatML.

    Numbers are split into tokens of up to two digits. A text with other words is a longer sequence.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_trained_tokenizer()),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN],
    )
    fast.chat_template = CHATML
    return fast


def number_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that consist of digits: id to digits."""
    named = ((token, id) for token, id in tokenizer.get_vocab().items() if re.search("[0-9]", token))
    texts = {id: tokenizer.decode([id]) for _, id in named}  # decoding a whole vocabulary takes seconds
    return {id: text for id, text in texts.items() if text.isascii() and text.isdecimal()}


def _checkpoint_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # slow import

    where = f"model.checkpoint={checkpoint}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        exists = Path(checkpoint).is_dir()
        if not exists and (checkpoint.startswith((".", "/")) or checkpoint.count("/") > 1):  # no name of the Hub
            raise UserError(f"{where}: there is no such folder") from None
        place = "" if exists else "is no folder here, and as a name of the Hugging Face Hub: "
        raise UserError(f"{where}: {place}its tokenizer cannot be loaded: {describe_load_error(error)}") from None
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
        content = json.loads(Path(file).read_text("utf-8"))
        return TypeAdapter(str | None).validate_python(content["chat_template"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.checkpoint={checkpoint}: its chat_template.json cannot be read: {describe_load_error(error)};"
            " set model.chat_template"
        ) from None


class SegmentTokenizer:
    """Tokenizes consecutive segments of a text together. Thread-safe.

    Only the template can produce special tokens; "<image>" or "<|im_end|>" in the text of a turn is plain text.
    Therefore a copy of the tokenizer treats special tokens as plain text, and has a substitute for each of them
    (``MARK`` and a private-use character), which is used in the template's segments. ``MARK`` in the text of a turn
    has a substitute too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        # In some checkpoints it is not a special token.
        special.setdefault(IMAGE_TOKEN, AddedToken(IMAGE_TOKEN, special=True, normalized=False))
        substitutes = {text: MARK + chr(FIRST_SUBSTITUTE + i) for i, text in enumerate([*special, MARK])}
        self._substitutes = substitutes
        self._pattern = re.compile("|".join(re.escape(text) for text in sorted(substitutes, key=len, reverse=True)))

        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # the original may omit blanks
        backend.add_special_tokens([special[IMAGE_TOKEN]])
        backend.encode_special_tokens = True
        backend.add_tokens(
            [
                AddedToken(substitutes[text], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for text, token in special.items()
            ]
        )
        backend.add_tokens([AddedToken(substitutes[MARK], normalized=False)])
        self._backend = backend

        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in special}
        self._special_ids = {backend.token_to_id(substitutes[text]): [id] for text, id in ids.items()}
        substitute, *mark = backend.encode(substitutes[MARK] + MARK, add_special_tokens=False).ids
        self._special_ids[substitute] = mark
        self._special = {id: text for text, id in ids.items() if id != tokenizer.unk_token_id}
        bos = tokenizer.bos_token
        adds_bos = bos is not None and tokenizer("").input_ids[:1] == [ids[bos]]
        self._bos = (substitutes[bos], ids[bos]) if adds_bos else None

    def template_text(self, text: str) -> str:
        """Replace special tokens by their substitutes."""
        return self._pattern.sub(lambda match: self._substitutes[match[0]], text)

    def plain_text(self, text: str) -> str:
        """Escape ``MARK`` in a text whose special tokens are plain text."""
        return text.replace(MARK, self._substitutes[MARK])

    def encode(self, segments: Sequence[str]) -> list[list[int]]:
        """Tokenize segments. A token belongs to the segment that contains its last character.

        If the tokenizer adds a bos token to every text and this text has none, it is added to the first segment.

        Returns:
            The token ids of each segment.

        Raises:
            UserError: the tokenizer makes a special token of plain text.
        """
        text = "".join(segments)
        encoding = self._backend.encode(text, add_special_tokens=False)
        unexpected = sorted(self._special[id] for id in self._special.keys() & set(encoding.ids))
        if unexpected:
            raise UserError(
                f"says {unexpected[0]} in words, and the tokenizer makes a special token of them; change them"
            )
        ids: list[list[int]] = [[] for _ in segments]
        if self._bos and not text.startswith(self._bos[0]):
            ids[0].append(self._bos[1])
        ends = list(accumulate(map(len, segments)))
        segment = 0
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            special = self._special_ids.get(id)
            if special:
                stop = text.index(MARK, start) + 1  # a special token may include adjacent blanks
            while ends[segment] < stop:
                segment += 1
            ids[segment] += special or [id]
        return ids
