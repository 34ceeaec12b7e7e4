"""Ask a trained model: one question about volumes, a chat in the terminal, or all conversations of a file.

  predict.py checkpoint=STEP volume.nii.gz --ask "Is this subject male or female?" --candidates "male.,female."
  predict.py checkpoint=STEP a.nii.gz b.nii.gz --modality sMRI,dMRI --ask "Is there a lesion?"
  predict.py checkpoint=STEP volume.nii.gz --chat
  predict.py checkpoint=STEP data.input=questions.jsonl output=predictions.jsonl

STEP is a step_... folder of a training. The same command continues a data.input that was interrupted: conversations
with a prediction in the output are not asked again. --dry-run prints what would be asked.
"""

import sys
from pathlib import Path

from umbrella.base import UserError, note, printable
from umbrella.cli import Arguments, named_checkpoint, progress_bar, run_script

OPTIONS = {
    "--ask": {"help": "a question about the volumes", "metavar": "QUESTION"},
    "--chat": {
        "help": "read questions from standard input, one per line, in one conversation",
        "action": "store_true",
    },
    "--modality": {
        "help": "modality of all volumes, or one for each, separated by commas"
        " (default: from their names, else their axes)",
        "metavar": "VALUE",
    },
    "--candidates": {
        "help": "candidate answers, separated by commas, whose probabilities are printed, too",
        "metavar": "ANSWERS",
    },
}


def main(args: Arguments) -> None:
    """Ask in the way that the options and settings select."""
    checkpoint = named_checkpoint(args.settings)
    modes = {
        "--ask": args.options["ask"] is not None,
        "--chat": args.options["chat"],
        "data.input": bool(args.settings.data.input),
    }
    asked = [mode for mode, is_set in modes.items() if is_set]
    if len(asked) != 1:
        what = f"{' and '.join(asked)} cannot go together" if asked else "there is no question"
        raise UserError(f'{what}; give --ask "...", --chat or data.input=FILE')
    if asked == ["data.input"]:
        _reject(args, "data.input", "modality", "candidates", paths=True)
        _ask_cohort(args, checkpoint)
    else:
        if asked == ["--chat"]:
            _reject(args, "--chat", "candidates")
        _ask_about_volumes(args, checkpoint)


def _ask_about_volumes(args: Arguments, checkpoint: Path) -> None:
    from umbrella.conversations.formats import volume_file

    settings, question = args.settings, args.options["ask"]
    volumes = [volume_file(file) for file in args.paths]  # before the model is loaded, which takes seconds
    names = args.options["modality"]
    modality = names.split(",") if names and "," in names else names
    if args.dry_run:
        what = repr(question) if question is not None else "what standard input says"
        print(f"would ask {checkpoint} {what} about: {', '.join(volumes) or 'no volume'}")
        return
    from transformers.utils import logging

    from umbrella.inference.model import Umbrella

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = Umbrella.from_checkpoint(checkpoint, dtype=_dtype(args))
    shown = model.items(volumes, modality)
    limit = settings.evaluate.max_new_tokens
    if question is None:
        from umbrella.inference.chat import run_chat

        run_chat(model, shown, limit)
        return
    print(printable(model.ask(volumes, question, modality, limit)), flush=True)
    if answers := args.options["candidates"]:
        scores = model.score(volumes, question, [answer.strip() for answer in answers.split(",")], modality)
        for answer, probability in sorted(scores.items(), key=lambda pair: -pair[1]):
            print(f"{probability:.4f}  {printable(answer)}")


def _ask_cohort(args: Arguments, checkpoint: Path) -> None:
    from umbrella.base import pluralise
    from umbrella.evaluation_run.cohort_predictions import predict_cohort, read_cohort
    from umbrella.inference.model import load_checkpoint_settings

    cohort = read_cohort(checkpoint, args.settings, load_checkpoint_settings(checkpoint, _dtype(args)))
    number, left, path = len(cohort.conversations), len(cohort.remaining()), cohort.file.path
    for line in cohort.raw.notices:
        note(line)
    if args.dry_run:
        print(f"would ask {left} of {pluralise(number, 'conversation')}; {number - left} are answered in {path}")
        return
    if left < number:
        print(f"{number - left} of {pluralise(number, 'conversation')} are answered already", flush=True)
    if left:
        splits = predict_cohort(cohort, progress_bar)
        if splits.quarantined:
            left_out = pluralise(splits.quarantined, "conversation")
            note(f"{left_out} cannot be asked, see {splits.quarantine}")
    print(f"answers: {path}")


def _dtype(args: Arguments) -> str | None:
    """The setting ``model.dtype`` if it is given; None: that of the training."""
    return args.settings.model.dtype if "model.dtype" in args.given else None


def _reject(args: Arguments, mode: str, *options: str, paths: bool = False) -> None:
    given = [f"--{name}" for name in options if args.options[name] is not None]
    given += args.paths if paths else ()
    if given:
        raise UserError(f"{', '.join(given)}: does not go with {mode}; leave it out, or use --ask")


if __name__ == "__main__":
    run_script(main, __doc__, options=OPTIONS, paths="volume.nii.gz")
