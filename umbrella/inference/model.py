"""A trained model that is asked about volumes: everything between a file's path and an answer's text."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umbrella.base import UserError, note
from umbrella.config import Settings, load_settings
from umbrella.conversations.images import modality_by_suffix, volume_file
from umbrella.conversations.schema import Conversation, ImageItem, TextItem, Turn
from umbrella.data.batching import Batch, Collator
from umbrella.data.rendering import Renderer, load_renderer
from umbrella.evaluation.extraction import said
from umbrella.evaluation.generation import Generated, generate
from umbrella.evaluation.predictions import Prediction, cut_note
from umbrella.evaluation.scoring import Candidates, score
from umbrella.modality import Modality
from umbrella.model.build import build_model
from umbrella.model.umbrella_llava import UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella.paths import SETTINGS, checkpoints_in
from umbrella.version import check_version
from umbrella.volumes.reading import count_axes
from umbrella.volumes.store import DecodedVolumes, VolumeStore

DTYPES = ("float32", "bfloat16")
UNKNOWN_LENGTH, MOST_TOKENS = 64, 1024
"""Default limits of a generated answer in tokens: where the longest training answer is not known, and in any case."""
Paths = str | Path | Sequence[str | Path]
"""One file, or several in the order in which they are shown."""
Modalities = str | Sequence[str] | None
"""The modality of all volumes, or one name for each; None where they can be told by their names or axes."""


class Umbrella:
    """A model in evaluation mode, with the chat template, tokenizer and modalities that it was trained with.

        model = Umbrella.from_checkpoint("runs/<training>/step_0000100")
        model.ask("scan.nii.gz", "Is this subject male or female?", modality="sMRI")

    Made by ``from_checkpoint``. Threads may share one.
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
        """The model of a training's checkpoint, or of a folder that ``save_pretrained`` wrote.

        Args:
            folder: wherever it lies now. One that holds only what was trained needs its base where it was.
            device: the first GPU if there is one, else the CPU, when None.
            dtype: arithmetic, float32 or bfloat16; that of the training when None. What was trained stays float32.
            store: where prepared volumes are kept from one time to the next, a folder or a store of the model's
                modalities; in memory when None.

        Raises:
            UserError: no such checkpoint, or none of UMBRELLA; it is not whole; its base is gone; no such device.
        """
        folder = Path(folder).absolute()
        settings = load_checkpoint_settings(folder, dtype)
        renderer = load_renderer(settings)
        modalities = settings.modalities
        embedded = UmbrellaConfig.from_pretrained(folder).modalities
        model = build_model(settings.model, embedded, len(renderer.tokenizer), renderer.image_id)
        where = _on_device(model, device)
        voxels = settings.data.max_voxels
        if isinstance(store, str | Path):
            store = VolumeStore(store, modalities, voxels)
        volumes = store or DecodedVolumes(modalities, voxels)
        return cls(model, renderer, Collator(renderer, volumes, pin=where.type == "cuda"), settings)

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """The modalities that the model was trained on."""
        return self.settings.modalities

    @property
    def max_new_tokens(self) -> int:
        """Default limit of an answer: the tokens of the longest answer in the training data, at most 1024."""
        return min(self.model.config.longest_answer or UNKNOWN_LENGTH, MOST_TOKENS)

    def ask(
        self,
        volumes: Paths,
        question: str,
        modality: Modalities = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """One question about volumes, which stand before it, to the answer's text. Same as ``chat().ask``."""
        return self.chat().ask(question, volumes, modality, max_new_tokens, **options)

    def question(self, volumes: Paths, question: str, modality: Modalities = None) -> Conversation:
        """A question about volumes for ``answer``, which takes several. Raises as ``items``."""
        return as_conversation([user_turn(self.items(volumes, modality), question), assistant_turn("")])

    def chat(self, system: str = "") -> "Chat":
        """A new conversation. ``system``: what the system turn says; empty: there is none."""
        return Chat(self, system)

    def answer(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> list[str]:
        """The last assistant turn of each conversation in the model's words; what stands there is not looked at.

        The likeliest token follows the other, unless ``options`` of transformers' ``generate`` say otherwise. How many
        answers reached the limit before they ended is printed.

        Args:
            max_new_tokens: limit of an answer; ``Umbrella.max_new_tokens`` when None.
            batch_size: conversations that are answered side by side. Answers do not depend on it.

        Raises:
            UserError: a volume that cannot be used, or of an unknown modality; what cannot be rendered.
        """
        answers = self._generate(conversations, max_new_tokens or self.max_new_tokens, batch_size, **options)
        if cut := cut_note(sum(answer.cut for answer in answers), len(answers)):
            note(cut)
        return [answer.text for answer in answers]

    def _generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int, batch_size: int, **options: Any
    ) -> list[Generated]:
        prompts = []
        for conversation in conversations:
            self._check_volumes(conversation)
            prompts.append(self.renderer.prompt(conversation))
        answers: list[Generated] = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            with self._autocast():
                answers += generate(
                    self.model, part, self.renderer, self.collate, self.model.device, max_new_tokens, **options
                )
        return answers

    def score(
        self, volumes: Paths, question: str, answers: Sequence[str], modality: Modalities = None
    ) -> dict[str, float]:
        """The probability of each of these answers among them; they add up to 1.

        Evaluations in trainings, sweeps and reports use the same: see ``scoring.score``.

        Raises:
            UserError: as ``answer``; no answers.
        """
        if isinstance(answers, str) or not answers:
            raise UserError(f"answers={answers!r}: give a list of texts to choose from")
        turns = [user_turn(self.items(volumes, modality), question), assistant_turn(answers[0])]
        asked = as_conversation(turns, subject_label=answers[0], target="answer")
        (scored,) = self.predict([asked], {"answer": {answer: answer for answer in answers}})
        return dict(scored.probabilities)

    def predict(
        self,
        conversations: Sequence[Conversation],
        candidates: Candidates,
        numbers: Collection[str] = (),
        *,
        truth: bool = True,
        max_new_tokens: int | None = 0,
    ) -> list[Prediction]:
        """One batch, answered in both ways: how likely candidates are, and what the model itself says.

        Args:
            candidates: target to label to answer text, see ``scoring.score``; so is ``truth``.
            numbers: targets whose labels are numbers, which are looked for in the model's own words.
            max_new_tokens: limit of the model's own words; None: as ``answer``; 0: none are generated.

        Raises:
            UserError: as ``answer``.
        """
        for conversation in conversations:
            self._check_volumes(conversation)
        with self._autocast():
            found = score(
                self.model,
                conversations,
                self.renderer,
                self.collate,
                candidates,
                self.model.device,
                truth=truth,
            )
        if max_new_tokens == 0:
            return found
        answers = self._generate(conversations, max_new_tokens or self.max_new_tokens, batch_size=len(conversations))
        return [
            replace(
                one,
                text=answer.text,
                cut=answer.cut,
                said=said(answer.text, candidates.get(one.target, {}), one.target in numbers),
            )
            for one, answer in zip(found, answers, strict=True)
        ]

    def items(self, volumes: Paths, modality: Modalities = None) -> list[ImageItem]:
        """Volumes as items of a turn, each with its modality.

        Raises:
            UserError: a file that is not there, an unknown modality, or one that neither name nor axes of a file tell.
        """
        paths = [volumes] if isinstance(volumes, str | Path) else list(volumes)
        names = [modality] * len(paths) if modality is None or isinstance(modality, str) else list(modality)
        if len(names) != len(paths):
            raise UserError(f"modality={modality!r}: {len(names)} names for {len(paths)} volumes; give one, or as many")
        items = []
        for path, name in zip(paths, names, strict=True):
            file = volume_file(path)
            name = self._modality_of(file) if name is None else self._check_modality(name)
            items.append(ImageItem(type="image", modality=name, image_path=file))
        return items

    @torch.no_grad()
    def log_likelihoods(self, batch: Batch) -> list[float]:
        """Of the supervised tokens of each row of a batch together, in nats."""
        with self._autocast():
            nll = self.model(**batch.to(self.model.device).model_inputs()).token_nll
        return (-nll.double().sum(1)).tolist()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all of the model, with tokenizer and settings: it stands on no base, and ``from_checkpoint`` reads it.

        Weights have the dtype that they have here.
        """
        self.model.save_pretrained(folder)
        self.renderer.tokenizer.save_pretrained(folder)
        (Path(folder) / SETTINGS).write_text(self.settings.to_yaml(), encoding="utf-8")

    def _modality_of(self, path: str) -> str:
        if told := modality_by_suffix(path):
            return self._check_modality(told)
        if len(self.modalities) == 1:
            return next(iter(self.modalities))
        axes = count_axes(path)
        fitting = [name for name, modality in self.modalities.items() if len(modality.grid) == axes]
        if len(fitting) == 1:
            return fitting[0]
        known = ", ".join(f"{name} ({len(modality.grid)} axes)" for name, modality in self.modalities.items())
        what = f"may be {' or '.join(fitting)}" if fitting else "is of no modality that this model knows"
        raise UserError(f"{path}: has {axes} axes and {what}; name its modality: {known}")

    def _check_modality(self, name: str) -> str:
        if name not in self.modalities:
            raise UserError(f"modality={name!r}: this model was trained on {', '.join(self.modalities) or 'text only'}")
        return name

    def _check_volumes(self, conversation: Conversation) -> None:
        for volume in conversation.volumes:
            self._check_modality(volume.modality)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.model.dtype)
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)


def load_checkpoint_settings(folder: Path, dtype: str | None) -> Settings:
    """The settings that a checkpoint was trained with, with its model and the modalities that it was trained on.

    Raises:
        UserError: no checkpoint of UMBRELLA, or one of a version that is too old.
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


def _on_device(model: UmbrellaForConditionalGeneration, device: str | torch.device | None) -> torch.device:
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.to(where)
    except (RuntimeError, AssertionError) as error:  # no such device, no CUDA in this torch, not enough memory
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from None
    return where


class Chat:
    """A conversation that goes on: each question is asked with all that was said before."""

    def __init__(self, model: Umbrella, system: str = "") -> None:
        self.turns = [Turn(role="system", content=(TextItem(type="text", text=system),))] if system else []
        """What was said so far."""
        self._model = model

    def ask(
        self,
        question: str,
        volumes: Paths = (),
        modality: Modalities = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """The answer's text. Volumes, if any, stand before the question; a question that fails was not asked.

        Raises:
            UserError: as ``Umbrella.answer`` and ``Umbrella.items``.
        """
        turns = [*self.turns, user_turn(self._model.items(volumes, modality), question)]
        asked = as_conversation([*turns, assistant_turn("")])
        (answer,) = self._model.answer([asked], max_new_tokens, **options)
        self.turns = [*turns, assistant_turn(answer)]
        return answer


def user_turn(volumes: Sequence[ImageItem], question: str) -> Turn:
    """Volumes, and then a question about them."""
    return Turn(role="user", content=(*volumes, TextItem(type="text", text=question)))


def assistant_turn(text: str) -> Turn:
    """An answer."""
    return Turn(role="assistant", content=(TextItem(type="text", text=text),))


def as_conversation(turns: Sequence[Turn], **metadata: Any) -> Conversation:
    """Turns as a sample without a name."""
    volumes = [item for turn in turns for item in turn.content if isinstance(item, ImageItem)]
    images = tuple({"path": volume.image_path, "modality": volume.modality} for volume in volumes)
    sample = {"task_id": "question", "task_type": "question", "conversations": tuple(turns), "images": images}
    return Conversation.model_validate(sample | {"metadata": metadata})
