"""Ask a trained model one question about volumes; umbrella predict takes several questions.

  umbrella ask MODEL volume.nii.gz "Is this subject male or female?" --candidates "male.,female."

MODEL is an exported folder, a training, sweep or step_... folder as in checkpoint=, or a name on the Hugging Face Hub.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umbrella.base import UserError
from umbrella.cli import Arguments, run_command
from umbrella.commands import predict

OPTIONS = {flag: predict.OPTIONS[flag] for flag in ("--modality", "--candidates")}


def main(args: Arguments) -> None:
    """Answer as ``umbrella predict --ask`` does."""
    if len(args.paths) < 2:
        raise UserError('name a model, volumes and a question, as in: umbrella ask MODEL volume.nii.gz "How old?"')
    model, *volumes, question = args.paths
    if "/" in model and not Path(model).exists():
        from umbrella.inference.export import download

        model = str(download(model))
    settings = args.settings.model_copy(update={"checkpoint": model})
    options = {**args.options, "ask": question, "chat": False}
    predict.main(replace(args, settings=settings, options=options, paths=tuple(volumes)))


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("ask", argv, main, __doc__, options=OPTIONS, paths="volume.nii.gz")
