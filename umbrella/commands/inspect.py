"""Show one conversation as the model receives it: its tokens, their weights in the loss, and a picture of its volumes.

Without arguments: the first conversation of the training split. --dry-run decodes no volume and draws no picture.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from umbrella.base import UserError, note
from umbrella.cli import Arguments, Options, make_console, progress_bar, run_command

OPTIONS: Options = {
    "--split": {
        "help": "split of the conversation",
        "default": "train",
        "choices": ("train", "validation", "test"),
    },
    "--task-id": {"help": "task_id of the conversation", "metavar": "ID"},
    "--sample": {"help": "index of the conversation in the split, from 0", "type": int, "metavar": "N"},
    "--picture": {"help": "file of the picture (default: <storage>/inspect/<task_id>.png)", "metavar": "FILE"},
}


def main(args: Arguments) -> None:
    """Print one conversation and draw its volumes."""
    from umbrella.cohort_report.conversation import draw_volumes, find_conversation, format_summary, format_turns
    from umbrella.data.masking import split_by_weight
    from umbrella.data.rendering import load_renderer
    from umbrella.data.splits import read_splits
    from umbrella.paths import PICTURES
    from umbrella.volumes.store import open_store

    settings, options, console = args.settings, args.options, make_console()
    split, task_id, sample = options["split"], options["task_id"], options["sample"]
    if task_id is not None and sample is not None:
        raise UserError("--task-id and --sample both name a conversation; leave one of them out")
    raw = read_splits(settings, progress_bar, (split,))
    if not raw.splits.get(split):
        raise UserError(f"data.{split}: holds no conversation that can be used; umbrella prepare says why")
    if raw.problems:
        note(f"{split} has {len(raw.problems)} problems; umbrella prepare lists them")
    conversation = find_conversation(raw.splits[split], split, task_id, sample or 0)
    renderer = load_renderer(settings)
    try:
        example = renderer.render(conversation)
    except UserError as error:
        raise UserError(f"{conversation.task_id}: {error}") from None

    console.print(f"{conversation.task_id} ({conversation.task_type}), {split}\n", markup=False, highlight=False)
    found = split_by_weight(example, settings.mask, renderer.tokenizer)
    console.print(format_turns(found, colours=console.color_system is not None), highlight=False, soft_wrap=True)
    console.print(format_summary(example, settings.mask), highlight=False)
    if not args.dry_run and conversation.volumes:
        name = re.sub(r"[^\w.-]+", "_", conversation.task_id)[:100]
        file = options["picture"] or Path(settings.resources.storage) / PICTURES / f"{name}.png"
        figure = draw_volumes(conversation, open_store(settings))
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
        console.print(f"{'picture:':<16}{file}", markup=False, highlight=False, soft_wrap=True)


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("inspect", argv, main, __doc__, options=OPTIONS)
