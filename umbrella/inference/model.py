"""The class ``Umbrella``: a trained model that answers questions about volumes."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umbrella.base import UserError, note
from umbrella.config import Settings, load_settings
from umbrella.conversations.formats import SUFFIXES, modality_by_suffix
from umbrella.conversations.schema import CONTROL, Conversation, ImageItem, TextItem, Turn
from umbrella.data.batching import Batch, Collator, left_padded
from umbrella.data.rendering import Renderer, load_renderer
from umbrella.evaluation.candidates import Candidates
from umbrella.evaluation.predictions import Prediction, cut_note, extract_answer
from umbrella.evaluation.scoring import ANSWER_ONLY, score
from umbrella.inference.export import download, write_model
from umbrella.modality import Modality
from umbrella.models.build import build_model
from umbrella.models.umbrella_llava import UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella.paths import SETTINGS, checkpoints_in
from umbrella.version import check_version
from umbrella.volumes.in_memory import Volumes, as_images, make_item
from umbrella.volumes.reading import Image, image_name, image_shape
from umbrella.volumes.store import DecodedVolumes, VolumeStore

DTYPES = ("float32", "bfloat16")
DEFAULT_NEW_TOKENS = 64
"""Limit of a generated answer, if the longest answer of the training data is not known."""
MAX_NEW_TOKENS = 1024
"""Limit of a generated answer, unless one is given."""
Modalities = str | Sequence[str] | None
"""The modality of all volumes, or one name for each; None: found from the names or axes of the files."""


class Umbrella:
    """A trained model in evaluation mode, with its chat template, tokenizer and modalities.

        model = Umbrella.from_checkpoint("runs/<training>/step_0000100")
        model.ask("scan.nii.gz", "Is this subject male or female?", modality="sMRI")

    Created by ``from_checkpoint`` or ``from_pretrained``. Threads may share one.
    """

    def __init__(
        self, model: UmbrellaForConditionalGeneration, renderer: Renderer, collate: Collator, settings: Settings
    ) -> None:
        self.model = model.eval()
        self.renderer = renderer
        self.collate = collate
        self.settings = settings

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        store: str | Path | VolumeStore | None = None,
    ) -> "Umbrella":
        """Load the model of a checkpoint.

        Args:
            folder: a step_... folder of a training; may have been moved. A checkpoint of the trained weights only needs
                its base model at the old path.
            device: None: the first GPU if there is one, otherwise the CPU.
            dtype: of the arithmetic, float32 or bfloat16; None: that of the training. Trained weights stay float32.
            store: folder or store that keeps preprocessed volumes; None: they are kept in memory.

        Raises:
            UserError: the folder is no complete checkpoint of UMBRELLA; the base model or the device does not exist.
        """
        folder = Path(folder).absolute()
        settings = load_checkpoint_settings(folder, dtype)
        renderer = load_renderer(settings)
        modalities = settings.modalities
        embedded = UmbrellaConfig.from_pretrained(folder).modalities
        model = build_model(settings.model, embedded, len(renderer.tokenizer), renderer.image_id)
        try:
            where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            model.to(where)
        except (RuntimeError, AssertionError) as error:  # no such device, torch without CUDA, not enough memory
            raise UserError(f"device={device}: {str(error).splitlines()[0]}") from None
        voxels = settings.data.max_voxels
        if isinstance(store, str | Path):
            store = VolumeStore(store, modalities, voxels)
        volumes = store or DecodedVolumes(modalities, voxels)
        return cls(model, renderer, Collator(renderer, volumes, pin=where.type == "cuda"), settings)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "Umbrella":
        """Load a model that ``save_pretrained`` or ``umbrella export`` wrote. No code from the folder is run.

        Args:
            name: the folder, or a name on the Hugging Face Hub.
            options: ``device``, ``dtype`` and ``store`` of ``from_checkpoint``.

        Raises:
            UserError: as ``from_checkpoint``; there is no such folder and no such model on the Hub.
        """
        return cls.from_checkpoint(download(name), **options)

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """The modalities that the model was trained on."""
        return self.settings.modalities

    @property
    def max_new_tokens(self) -> int:
        """Default limit of an answer: the tokens of the longest answer in the training data, at most 1024."""
        return min(self.model.config.longest_answer or DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS)

    def ask(
        self,
        volumes: Volumes,
        question: str,
        modality: Modalities = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """Answer one question about volumes, which precede the question. Same as ``chat().ask``."""
        return self.chat().ask(question, volumes, modality, max_new_tokens, **options)

    def question(
        self, volumes: Volumes, question: str, modality: Modalities = None, turns: Sequence[Turn] = ()
    ) -> Conversation:
        """Make the conversation of a question about volumes after other turns, for ``answer``. Raises as ``items``."""
        content = (*self.items(volumes, modality), TextItem(type="text", text=question))
        answer = Turn(role="assistant", content=(TextItem(type="text", text=""),))
        turns = (*turns, Turn(role="user", content=content), answer)
        return Conversation(task_id="question", task_type="question", conversations=turns)

    def chat(self, system: str = "") -> "Chat":
        """Start a chat session. ``system``: the text of the system turn; empty: no such turn."""
        return Chat(self, system)

    def answer(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> list[str]:
        """Generate the last assistant turn of each conversation; its existing text is ignored.

        The number of answers that reached the limit is printed.

        Args:
            max_new_tokens: limit of an answer; None: ``Umbrella.max_new_tokens``.
            batch_size: conversations per batch. Answers do not depend on it.
            options: of transformers' ``generate``; without them, decoding is greedy.

        Raises:
            UserError: a volume that cannot be used, or of an unknown modality; a conversation that cannot be rendered.
        """
        answers = self._generate(conversations, max_new_tokens, batch_size, **options)
        if line := cut_note(sum(cut for _, cut in answers), len(answers)):
            note(line)
        return [text for text, _ in answers]

    def score(
        self, volumes: Volumes, question: str, answers: Sequence[str], modality: Modalities = None
    ) -> dict[str, float]:
        """The probability of each answer among the given ones; the sum is 1. See ``scoring.score``.

        Raises:
            UserError: as ``answer``; no answers are given.
        """
        if isinstance(answers, str) or not answers:
            raise UserError(f"answers={answers!r}: give a list of texts to choose from")
        conversation = self.question(volumes, question, modality)
        candidates = {conversation.target: {answer: answer for answer in answers}}
        (prediction,) = self.predict([conversation], candidates, truth=False)
        return dict(prediction.probabilities)

    def predict(
        self,
        conversations: Sequence[Conversation],
        candidates: Candidates,
        numbers: Collection[str] = (),
        *,
        truth: bool = True,
        max_new_tokens: int | None = 0,
    ) -> list[Prediction]:
        """Predict one batch: score candidate answers, and generate answers.

        Args:
            candidates, truth: see ``scoring.score``.
            numbers: targets whose labels are numbers, which are extracted from generated answers.
            max_new_tokens: limit of a generated answer; None: ``Umbrella.max_new_tokens``; 0: none are generated.
                Earlier answers with a label (see ``Conversation.asked_before``) are generated first and take the place
                of the true ones. For a conversation of a control, none is generated if its answer is scored.

        Raises:
            UserError: as ``answer``.
        """
        self._check_volumes(conversations)
        model, device = self.model, self.model.device
        with self._autocast():
            predictions = score(model, conversations, self.renderer, self.collate, candidates, device, truth=truth)
        scored = [bool(p.probabilities or p.numbers) for p in predictions]
        to_generate = [i for i, c in enumerate(conversations) if not (scored[i] and CONTROL in (c.model_extra or {}))]
        if max_new_tokens == 0 or not to_generate:
            return predictions
        asked = self._with_own_answers([conversations[i] for i in to_generate], max_new_tokens)
        answers = self._generate(asked, max_new_tokens, batch_size=len(asked))
        for i, (text, cut) in zip(to_generate, answers, strict=True):
            c = conversations[i]
            answer = extract_answer(text, c.candidates or candidates.get(c.target, {}), c.target in numbers)
            predictions[i] = replace(predictions[i], text=text, cut=cut, predicted=answer)
        return predictions

    def items(self, volumes: Volumes, modality: Modalities = None) -> list[ImageItem]:
        """Make the items of a turn from volumes and their modalities.

        Raises:
            UserError: a file does not exist; an image in memory cannot be used; a modality is unknown, or does not
                follow from the name or axes of a volume.
        """
        images = as_images(volumes)
        names = [modality] * len(images) if modality is None or isinstance(modality, str) else list(modality)
        if len(names) != len(images):
            raise UserError(
                f"modality={modality!r}: {len(names)} names for {len(images)} volumes; give one, or as many"
            )
        items = []
        for image, name in zip(images, names, strict=True):
            name = self._find_modality(image) if name is None else self._check_modality(name)
            items.append(make_item(image, name, self.modalities[name], self.settings.data.max_voxels))
        return items

    @torch.no_grad()
    def log_likelihoods(self, batch: Batch) -> list[float]:
        """The log likelihood of the supervised tokens of each row of a batch, in nats."""
        with self._autocast():
            nll = self.model(**batch.to(self.model.device).model_inputs()).token_nll
        return (-nll.double().sum(1)).tolist()

    def save_pretrained(self, folder: str | Path, *, merge: bool = True, card: str = "") -> None:
        """Write model, tokenizer, settings and model card to a folder that ``from_pretrained`` loads on any machine.

        It has no subject ids and no paths. Weights keep their dtype.

        Args:
            folder: new or empty.
            merge: write all weights, after adapters were merged into them, in this model too. False: write the trained
                weights only; their base keeps its name on the Hub.
            card: content of README.md before ``export.USE``; empty: a short one.

        Raises:
            UserError: the folder is not empty; with ``merge=False``, the base is not on the Hub.
        """
        write_model(Path(folder), self.model, self.renderer.tokenizer, self.settings, merge, card)

    def _with_own_answers(
        self, conversations: Sequence[Conversation], max_new_tokens: int | None
    ) -> list[Conversation]:
        """The conversations with generated answers in the turns ``asked_before``, one such turn after another."""
        own = list(conversations)
        for number in range(max((len(c.asked_before) for c in own), default=0)):
            turns = {i: c.asked_before[number] for i, c in enumerate(own) if number < len(c.asked_before)}
            prompts = [
                own[i].model_copy(update={"conversations": own[i].conversations[: t + 1]}) for i, t in turns.items()
            ]
            answers = self._generate(prompts, max_new_tokens, batch_size=len(prompts))
            for (i, turn), (text, _) in zip(turns.items(), answers, strict=True):
                own[i] = own[i].with_answer(text, turn)
        return own

    @torch.no_grad()
    def _generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int | None, batch_size: int, **options: Any
    ) -> list[tuple[str, bool]]:
        """(text without special tokens, whether it was cut) of each answer, whatever the batch size."""
        self._check_volumes(conversations)
        prompts = [self.renderer.prompt(conversation) for conversation in conversations]
        tokenizer, stops = self.renderer.tokenizer, self.renderer.stop_ids()
        answers = []
        for start in range(0, len(prompts), batch_size):
            batch = self.collate(prompts[start : start + batch_size], ANSWER_ONLY).to(self.model.device)
            with self._autocast():
                generated = self.model.generate(
                    input_ids=left_padded(batch.input_ids, batch.attention_mask),
                    attention_mask=left_padded(batch.attention_mask, batch.attention_mask),
                    pixel_values=batch.pixel_values,
                    max_new_tokens=max_new_tokens or self.max_new_tokens,
                    eos_token_id=stops or None,
                    pad_token_id=tokenizer.pad_token_id or 0,
                    **{"do_sample": False} | options,
                )
            for new in generated[:, batch.input_ids.shape[1] :].tolist():
                end = next((i for i, token in enumerate(new) if token in stops), len(new))
                text = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers.append((text.strip(), end == len(new)))
        return answers

    def _find_modality(self, image: Image) -> str:
        if name := modality_by_suffix(image_name(image), {**SUFFIXES, **self.settings.data.suffixes}):
            return self._check_modality(name)
        if len(self.modalities) == 1:
            return next(iter(self.modalities))
        axes = len(image_shape(image))
        fitting = [name for name, modality in self.modalities.items() if len(modality.grid) == axes]
        if len(fitting) == 1:
            return fitting[0]
        known = ", ".join(f"{name} ({len(modality.grid)} axes)" for name, modality in self.modalities.items())
        what = f"may be {' or '.join(fitting)}" if fitting else "is of no modality that this model knows"
        raise UserError(f"{image_name(image)}: has {axes} axes and {what}; name its modality: {known}")

    def _check_modality(self, name: str) -> str:
        if name not in self.modalities:
            raise UserError(f"modality={name!r}: this model was trained on {', '.join(self.modalities) or 'text only'}")
        return name

    def _check_volumes(self, conversations: Iterable[Conversation]) -> None:
        for volume in (volume for conversation in conversations for volume in conversation.volumes):
            self._check_modality(volume.modality)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.model.dtype)
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)


class Chat:
    """A chat session: each question is asked with all previous turns."""

    def __init__(self, model: Umbrella, system: str = "") -> None:
        self.turns: Sequence[Turn] = ()
        """The previous turns."""
        if system:
            self.turns = (Turn(role="system", content=(TextItem(type="text", text=system),)),)
        self._model = model

    def ask(
        self,
        question: str,
        volumes: Volumes = (),
        modality: Modalities = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """Answer a question. Volumes precede the question. A question that fails is not added to the turns.

        Raises:
            UserError: as ``Umbrella.answer`` and ``Umbrella.items``.
        """
        conversation = self._model.question(volumes, question, modality, self.turns)
        (answer,) = self._model.answer([conversation], max_new_tokens, **options)
        self.turns = conversation.with_answer(answer).conversations
        return answer


def load_checkpoint_settings(folder: Path, dtype: str | None) -> Settings:
    """Load the settings that a checkpoint was trained with; model and modalities are those of the checkpoint.

    Args:
        dtype: replaces ``model.dtype``; None: that of the training.

    Raises:
        UserError: the folder is no checkpoint of UMBRELLA, or one of a version that is too old.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {' and '.join(DTYPES)} work")
    steps = [path.name for path in checkpoints_in(folder)]
    if steps:
        raise UserError(f"{folder}: is a training, not one of its checkpoints; name one, {folder / steps[-1]} say")
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{folder}: is no checkpoint: it has no config.json that can be read; name a step_... folder of a training"
        ) from None
    if kind != UmbrellaConfig.model_type:
        raise UserError(f"{folder}: is a {kind}, and no model that was trained here")
    check_version(folder)
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder}: has no tokenizer; write the one that the model was trained with beside it, with its"
            " save_pretrained"
        )
    trained = load_settings([folder / SETTINGS] if (folder / SETTINGS).is_file() else [])
    model = {"checkpoint": str(folder), "chat_template": "", "embedder_init": "random", "attention": "sdpa"}
    changes = {"model": trained.model.model_copy(update=model | ({"dtype": dtype} if dtype else {}))}
    config = UmbrellaConfig.from_pretrained(folder, trust_remote_code=False)
    return trained.model_copy(update=changes | {"modalities": config.known_modalities})
