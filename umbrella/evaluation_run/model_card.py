"""The model card of an evaluated checkpoint, and drafts of the reporting checklists that journals ask for."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from os.path import getmtime
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import yaml

from umbrella.config import Settings, load_settings
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.controls import AS_ASKED, CONDITION_NAMES
from umbrella.evaluation.group_metrics import MAIN_METRIC, MAIN_REFERENCE, main_metrics
from umbrella.evaluation.report import EvaluationResult
from umbrella.evaluation.verdict import format_estimate, format_value, metric_name
from umbrella.fileio import write_atomic
from umbrella.html import render
from umbrella.inference.export import LICENSE, card_metadata, hub_name
from umbrella.paths import CODE, EVALUATIONS, HISTORY, PROGRESS, SETTINGS, TRIALS, storage_of
from umbrella.training.checkpoint_files import read_history, read_training_state

MODEL_CARD = "model_card.md"
AUTHORS = "to be written by the authors"
SUBJECT_KEYS = ("sex", "age", "site")


def write_model_card(
    folder: Path,
    result: EvaluationResult,
    splits: Mapping[str, Sequence[Conversation]],
    left_out: Mapping[str, int],
) -> None:
    """Write ``model_card.md`` and ``checklists.md``. They hold no subject ids.

    Args:
        splits: conversations with one label each.
        left_out: field with a problem to the number of samples that were left out because of it.
    """
    settings, checkpoint = result.settings, Path(result.model)
    trained = load_settings([checkpoint / SETTINGS] if (checkpoint / SETTINGS).is_file() else [])
    base = hub_name(trained.model.checkpoint) or Path(trained.model.checkpoint).name
    data = Path(settings.data.train[0]).absolute().parent.name if settings.data.train else "umbrella-phantom"
    name = _name(checkpoint)
    wholes = [group for group in result.groups[AS_ASKED] if group.by == "all"]
    code = json.loads((checkpoint / CODE).read_text("utf-8")) if (checkpoint / CODE).is_file() else {}
    card = render(
        Path(__file__).with_name(MODEL_CARD),
        {
            "cell": lambda text: " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split()),
            "shown": lambda of_one: ", ".join(f"{key} {value}" for key, value in of_one.items() if value != 0),
            "estimate": format_estimate,
            "value": format_value,
            "named": metric_name,
            "main_metrics": main_metrics,
            "main_metric": lambda group: metric_name(MAIN_METRIC[group.kind]),
        },
        escape=False,
        authors=AUTHORS,
        keys=SUBJECT_KEYS,
        condition_names=CONDITION_NAMES,
        references=MAIN_REFERENCE,
        name=name,
        result=result,
        trained=trained,
        base=base,
        code=code,
        left_out=left_out,
        wholes=wholes,
        data=_describe_data(settings),
        subjects=[_describe_subjects(split, conversations) for split, conversations in splits.items()],
        compute=_describe_compute(settings, checkpoint),
    )
    card = re.sub(r"\n+(?=## )", "\n\n", card)
    results = [
        {
            "task": {"type": "image-text-to-text", "name": group.target},
            "dataset": {"name": data, "type": data, "split": result.split},
            "metrics": [
                {"type": MAIN_METRIC[group.kind], "name": metric, "value": round(group.metrics[metric].value, 4)}
                for metric in main_metrics(group)
                if isfinite(group.metrics[metric].value)
            ],
        }
        for group in wholes
    ]
    metadata = {
        **card_metadata(base),
        "datasets": [data],
        "metrics": sorted({MAIN_METRIC[group.kind] for group in wholes}),
        "model-index": [{"name": name, "results": results}],
    }
    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    write_atomic(folder / MODEL_CARD, f"---\n{LICENSE}\n{block}---\n\n{card}\n")
    write_atomic(folder / "checklists.md", _fill_checklists(card))


def find_model_card(checkpoint: Path) -> Path | None:
    """Return the model card of the newest evaluation of a checkpoint in its storage folder, or None."""
    run = checkpoint.parent.parent.parent if checkpoint.parent.parent.name == TRIALS else checkpoint.parent
    cards = (storage_of(run) / EVALUATIONS).glob(f"*/{MODEL_CARD}")
    title = f"\n# Model card of {_name(checkpoint)}\n"
    return max((card for card in cards if title in card.read_text("utf-8")), key=getmtime, default=None)


def _name(checkpoint: Path) -> str:
    return "-".join(checkpoint.parts[-2:])


def _fill_checklists(card: str) -> str:
    """The checklists, whose items quote the sections of the card, or name those with a table."""
    sections = dict(re.findall(r"^## (.+)\n((?:.|\n)+?)\n*(?=^## |\Z)", card, re.MULTILINE))
    lines = ["# Drafts of reporting checklists", "", "The items are in own words; submit the forms of the journals."]
    for name, checklist in yaml.safe_load(Path(__file__).with_name("checklists.yaml").read_text("utf-8")).items():
        lines += ["", f"## {name}", "", "| item | about | answer |", "|---|---|---|"]
        for number, about in checklist["items"].items():
            title = checklist["filled"].get(number)
            text = sections[title] if title else AUTHORS
            lines.append(f"| {number} | {about} | {f'model_card.md, “{title}”' if '| ' in text else text} |")
    return "\n".join(lines) + "\n"


def _describe_data(settings: Settings) -> str:
    if not settings.data.train:
        return "The synthetic phantom cohort, which has no patients"
    paths = {split: getattr(settings.data, split) for split in ("train", "validation", "test")}
    return "; ".join(
        f"{split}: {', '.join(Path(path).name for path in files)}" for split, files in paths.items() if files
    )


def _describe_subjects(split: str, conversations: Sequence[Conversation]) -> list[Any]:
    """The split, the numbers of conversations and subjects, and the distribution of each of ``SUBJECT_KEYS``."""
    row: list[Any] = [
        split,
        *(len({getattr(c, key) for c in conversations}) for key in ("conversation_id", "subject_id")),
    ]
    for key in SUBJECT_KEYS:
        values = {c.subject_id: c.label for c in conversations if c.target == key}
        values |= {c.subject_id: c.metadata[key] for c in conversations if key in c.metadata}
        row.append(_describe_values(value for value in values.values() if value is not None))
    return row


def _describe_values(values: Iterable[Any]) -> str:
    known = list(values)
    if known and all(isinstance(value, int | float) for value in known):
        return f"mean {fmean(known):.1f}, SD {pstdev(known):.1f}, {min(known):g} to {max(known):g}"
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(map(str, known)).items())) or "unknown"


def _describe_compute(settings: Settings, checkpoint: Path) -> str:
    training, resources = checkpoint.parent, settings.resources
    trainings = list(training.parent.iterdir()) if training.parent.name == TRIALS else [training]
    ends = {path: read_history(path)[-1] for path in trainings if (path / HISTORY).is_file() and read_history(path)}
    seconds = {path: end["time"] - end["begun"] for path, end in ends.items()}
    devices = f"{resources.cpus_per_worker:g} CPUs, {resources.gpus_per_worker:g} GPUs"
    step = f"{read_training_state(checkpoint).step} steps" if (checkpoint / PROGRESS).is_file() else "training"
    sweep = f"; the {len(seconds)} trials of the sweep {sum(seconds.values()):.0f} s" if len(seconds) > 1 else ""
    time = f"{seconds[training]:.0f} s" if training in seconds else "unknown time"
    return f"{step}: {time} on {resources.workers} x ({devices}){sweep}"
