"""What a checkpoint was trained with."""

import json
from pathlib import Path

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.model.umbrella_llava import UmbrellaConfig
from umbrella.paths import SETTINGS, checkpoints_in
from umbrella.version import check_version

DTYPES = ("float32", "bfloat16")


def settings_of(folder: Path, dtype: str | None) -> Settings:
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
