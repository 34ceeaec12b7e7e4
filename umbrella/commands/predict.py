"""Generate answers with a trained model: to one question about volumes, in a chat, or for the conversations of a file.

  umbrella predict checkpoint=NAME volume.nii.gz --ask "Is this subject male or female?" --candidates "male.,female."
  umbrella predict checkpoint=NAME a.nii.gz b.nii.gz --modality sMRI,dMRI --ask "Is there a lesion?"
  umbrella predict checkpoint=NAME volume.nii.gz --chat
  umbrella predict checkpoint=NAME data.input=questions.jsonl output=predictions.jsonl

NAME is a training or sweep, whose best checkpoint is taken, or a step_... folder. The same command continues a
data.input that was interrupted: conversations with a prediction in the output are left out. --dry-run prints what would
be predicted.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella.base import UserError, note, pluralise, printable
from umbrella.cli import Arguments, named_checkpoint, progress_bar, run_command

if TYPE_CHECKING:
    from umbrella.conversations.schema import ImageItem
    from umbrella.inference.model import Umbrella

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
    """Predict in the way that the options and settings select."""
    checkpoint = named_checkpoint(args.settings)
    question, chat, cohort = args.options["ask"], args.options["chat"], bool(args.settings.data.input)
    modes = {"--ask": question is not None, "--chat": chat, "data.input": cohort}
    given = [mode for mode, is_set in modes.items() if is_set]
    if len(given) != 1:
        what = f"{' and '.join(given)} cannot go together" if given else "there is no question"
        raise UserError(f'{what}; give --ask "...", --chat or data.input=FILE')
    rejected = {"--ask": (), "--chat": ("candidates",), "data.input": ("modality", "candidates")}[given[0]]
    superfluous = [f"--{name}" for name in rejected if args.options[name] is not None]
    superfluous += args.paths if cohort else ()
    if superfluous:
        raise UserError(f"{', '.join(superfluous)}: does not go with {given[0]}; leave it out, or use --ask")
    if cohort:
        _predict_cohort(args, checkpoint)
    else:
        _answer_about_volumes(args, checkpoint)


def _answer_about_volumes(args: Arguments, checkpoint: Path) -> None:
    from umbrella.conversations.formats import volume_file

    question, limit = args.options["ask"], args.settings.evaluate.max_new_tokens
    volumes = [volume_file(file) for file in args.paths]  # before the model is loaded, which takes seconds
    names = args.options["modality"]
    modality = names.split(",") if names and "," in names else names
    if args.dry_run:
        what = repr(question) if question is not None else "the questions on standard input"
        print(f"would answer {what} about: {', '.join(volumes) or 'no volume'}; checkpoint: {checkpoint}")
        return
    from transformers.utils import logging

    from umbrella.inference.model import Umbrella

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = Umbrella.from_checkpoint(checkpoint, dtype=_dtype(args))
    if question is None:
        _chat(model, model.items(volumes, modality), limit)
        return
    print(printable(model.ask(volumes, question, modality, limit)), flush=True)
    if answers := args.options["candidates"]:
        scores = model.score(volumes, question, [answer.strip() for answer in answers.split(",")], modality)
        for answer, probability in sorted(scores.items(), key=lambda pair: -pair[1]):
            print(f"{probability:.4f}  {printable(answer)}")


def _chat(model: "Umbrella", volumes: "list[ImageItem]", max_new_tokens: int | None) -> None:
    """Answer the lines of standard input until an empty line or its end. ``volumes`` go with the first question.

    At a terminal, errors are printed and the session continues. With a pipe, the first error ends it.
    """
    at_terminal, session = sys.stdin.isatty(), model.chat()
    if at_terminal:
        import readline  # noqa: F401  # line editing and history

        print("One question per line. /add FILE [MODALITY] adds a volume to the next; an empty line or Ctrl-D ends.")
    while True:
        count = f"[{pluralise(len(volumes), 'volume')}] " if volumes else ""
        try:
            line = input(f"{count}> " if at_terminal else "").strip()
        except EOFError:
            print(end="\n" if at_terminal else "")
            return
        if not line:
            return
        try:
            if line.startswith("/"):
                volumes += _add_volume(model, line)
                continue
            paths, modalities = [v.image_path for v in volumes], [v.modality for v in volumes]
            volumes.clear()  # also if the question fails: a faulty volume would block all further questions
            print(printable(session.ask(line, paths, modalities, max_new_tokens)), flush=True)
        except UserError as error:
            if not at_terminal:
                raise
            message = printable(str(error))
            print(f"error: {message}; this line was ignored; correct it, and add its volumes again", file=sys.stderr)


def _add_volume(model: "Umbrella", line: str) -> "list[ImageItem]":
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line}: {str(error).lower()}") from None
    if command != "/add" or len(words) not in (1, 2):
        raise UserError(f"{line}: write /add FILE, or /add FILE MODALITY, with quotes around blanks")
    return model.items(words[0], words[1] if len(words) == 2 else None)


def _predict_cohort(args: Arguments, checkpoint: Path) -> None:
    from umbrella.evaluation_run.cohort_predictions import predict_cohort, read_cohort
    from umbrella.inference.model import load_checkpoint_settings

    cohort = read_cohort(checkpoint, args.settings, load_checkpoint_settings(checkpoint, _dtype(args)))
    conversations, left = pluralise(len(cohort.conversations), "conversation"), len(cohort.remaining())
    done, path = len(cohort.conversations) - left, cohort.file.path
    for line in cohort.splits.notices:
        note(line)
    if args.dry_run:
        print(f"would predict {left} of {conversations}; {done} have a prediction in {path}")
        return
    if done:
        print(f"{done} of {conversations} have a prediction already", flush=True)
    if left:
        predict_cohort(cohort, progress_bar)
        if bad := cohort.splits.quarantined:
            note(f"{pluralise(bad, 'conversation')} cannot be predicted, see {cohort.splits.quarantine}")
    print(f"predictions: {path}")


def _dtype(args: Arguments) -> str | None:
    """The setting ``model.dtype`` if it is given; None: that of the training."""
    return args.settings.model.dtype if "model.dtype" in args.given else None


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("predict", argv, main, __doc__, options=OPTIONS, paths="volume.nii.gz")
