"""Export a trained model to a folder that umbrella ask and Umbrella.from_pretrained read on any machine.

  umbrella export checkpoint=NAME folder --push organisation/name

NAME is a training or sweep, whose best checkpoint is taken, or a step_... folder. The folder holds weights, tokenizer,
settings of the preprocessing, and a model card: that of the newest evaluation of the checkpoint, or a short one. No
file has a path or a subject id. --push needs a token in HF_TOKEN.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from umbrella.base import UserError
from umbrella.cli import Arguments, named_checkpoint, run_command

OPTIONS = {
    "--push": {"help": "upload the folder to a model of the Hub; a new one is private", "metavar": "ORGANISATION/NAME"},
    "--reference-base": {"help": "write trained weights only, and the name of their base", "action": "store_true"},
    "--license": {"help": "license in the model card, such as apache-2.0", "metavar": "NAME"},
}


def main(args: Arguments) -> None:
    """Write the folder, and upload it."""
    checkpoint = named_checkpoint(args.settings)
    if len(args.paths) != 1:
        raise UserError("name one folder to write, as in: umbrella export checkpoint=NAME folder")
    from transformers.utils import logging

    from umbrella.evaluation_run.model_card import find_model_card
    from umbrella.inference.export import CARD, LICENSE, push_to_hub
    from umbrella.inference.model import Umbrella

    folder, found = Path(args.paths[0]), find_model_card(checkpoint)
    results = f"the model card is {found}" if found else "no evaluation of it was found, so the model card is short"
    if args.dry_run:
        print(f"would export {checkpoint} to {folder}; {results}")
        return
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model, card = Umbrella.from_checkpoint(checkpoint, device="cpu"), found.read_text("utf-8") if found else ""
    model.save_pretrained(folder, merge=not args.options["reference_base"], card=card)
    if name := args.options["license"]:
        text = (folder / CARD).read_text("utf-8").replace(LICENSE, f"license: {name}")
        (folder / CARD).write_text(text, encoding="utf-8")
    print(f"exported {checkpoint} to {folder}; {results}", flush=True)
    if name := args.options["push"]:
        print(f"uploaded to {push_to_hub(folder, name)}")


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("export", argv, main, __doc__, options=OPTIONS, paths="folder")
