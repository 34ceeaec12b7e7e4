"""Exported models: folders that ``Umbrella.from_pretrained`` loads on any machine, and the Hugging Face Hub."""

import json
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import HfApi, snapshot_download
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError, describe_load_error
from umbrella.config import Settings, load_settings
from umbrella.models.build import merge_adapters
from umbrella.models.partial_checkpoint import ADAPTER_WEIGHTS, TRAINED_WEIGHTS, is_partial, read_base
from umbrella.models.umbrella_llava import ADAPTER, BASE, UmbrellaForConditionalGeneration
from umbrella.paths import CALIBRATION, SETTINGS
from umbrella.version import __version__, write_version

CARD = "README.md"
LICENSE = "# license: to be written by the authors"
"""Line of a model card that a license replaces."""
SHORT_CARD = """# Model card
## Intended use
Research only: no medical device, not for diagnosis or treatment. Data and evaluation: to be written by the authors
"""
USE = """
## Use
`pip install umbrella-mri`, then `umbrella ask MODEL scan.nii.gz "Is this subject male or female?"`, or in Python
`umbrella.Umbrella.from_pretrained("MODEL")`. MODEL is this folder or its name on the Hugging Face Hub. The modalities
and their preprocessing are in settings.yaml.
"""
"""Last section of each model card."""
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.yaml", "*.model", "*.txt"]
"""Files of a model on the Hub that are read: no pickles and no code."""
DATA_SETTINGS = {"max_tokens", "max_voxels", "suffixes"}
"""Settings of ``data`` that answering needs. The others have paths of the cohort."""


def write_model(
    folder: Path,
    model: UmbrellaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    merge: bool,
    card: str,
) -> None:
    """Write an exported model, see ``Umbrella.save_pretrained``."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder")
    checkpoint = Path(settings.model.checkpoint)
    base = base_name(checkpoint)
    if not merge and not (is_partial(checkpoint) and base):
        raise UserError(f"{checkpoint}: has no base on the Hub that could stand for weights; export all weights")
    parts = [part for part in settings.model.train.split("+") if part != "lora" or not merge]
    own = settings.model.model_copy(update={"checkpoint": base, "train": "+".join(parts) or "embedder"})
    folder.mkdir(parents=True, exist_ok=True)
    if merge:
        merge_adapters(model)
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        _copy_partial(checkpoint, folder, base)
    tokenizer.save_pretrained(folder)
    kept = settings.model_dump(mode="json", include={"modalities": True, "data": DATA_SETTINGS})
    text = yaml.safe_dump({"model": own.model_dump(mode="json"), **kept}, sort_keys=False, default_flow_style=None)
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    if (checkpoint / CALIBRATION).is_file():
        shutil.copy(checkpoint / CALIBRATION, folder)
    if not card:
        card = f"---\n{LICENSE}\n{yaml.safe_dump(card_metadata(base), sort_keys=False)}---\n\n{SHORT_CARD}"
    (folder / CARD).write_text(card + USE, encoding="utf-8")


def _copy_partial(checkpoint: Path, folder: Path, base: str) -> None:
    """Copy trained weights and adapters, whose base becomes the one of this name."""
    write_version(folder)
    (folder / BASE).write_text(json.dumps(read_base(checkpoint) | {"checkpoint": base}, indent=1), encoding="utf-8")
    shutil.copy(checkpoint / TRAINED_WEIGHTS, folder)
    if (checkpoint / ADAPTER).is_dir():
        (folder / ADAPTER).mkdir()
        shutil.copy(checkpoint / ADAPTER_WEIGHTS, folder / ADAPTER)
        config = json.loads((checkpoint / ADAPTER / "adapter_config.json").read_text("utf-8"))
        text = json.dumps(config | {"base_model_name_or_path": base}, indent=1)
        (folder / ADAPTER / "adapter_config.json").write_text(text, encoding="utf-8")


def base_name(checkpoint: Path) -> str:
    """Return the name on the Hub of the model that a checkpoint was trained from; empty if it has none."""
    if is_partial(checkpoint):
        return hub_name(read_base(checkpoint)["checkpoint"])
    file = checkpoint / SETTINGS
    return hub_name(load_settings([file]).model.checkpoint) if file.is_file() else ""


def hub_name(checkpoint: str) -> str:
    """Return the name on the Hub of a model, also of a folder of the Hub's cache; empty for another folder."""
    if found := re.search(r"models--(.+?)--(.+?)/", checkpoint):
        return f"{found[1]}/{found[2]}"
    return "" if Path(checkpoint).is_absolute() or Path(checkpoint).is_dir() else checkpoint


def card_metadata(base: str) -> dict[str, object]:
    """Return the metadata of a model card on the Hub."""
    return {
        "library_name": "umbrella-mri",
        "pipeline_tag": "image-text-to-text",
        "tags": ["umbrella-mri", "brain-mri", "medical", "llava", "research-only"],
        **({"base_model": base} if base else {}),
    }


def download(name: str | Path) -> Path:
    """Return the folder of a model. One on the Hub is downloaded first; UserError if there is none."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: is no folder, and cannot be had from the Hub: {describe_load_error(error)}") from None


def push_to_hub(folder: Path, name: str) -> str:
    """Upload an exported model to the Hub, with the token in ``HF_TOKEN``, and return its address.

    Args:
        name: "organisation/model". A new one is private. The files of an existing one are replaced.

    Raises:
        UserError: the Hub refuses it or cannot be reached.
    """
    try:
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        message = f"Export of umbrella {__version__}"
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns="*")
    except Exception as error:  # errors of the network are of many types
        reason = describe_load_error(error)
        raise UserError(f"--push {name}: {reason}; is HF_TOKEN set, and may it write there?") from None
    return str(address)
