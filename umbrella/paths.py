"""Layout of the storage folder, ``resources.storage``.

trainings/<name>/               one training
  begun_with.json code.json       settings, data and version at its start
  evaluations.jsonl               one line per evaluation
  samples_<rank>.jsonl            order of samples, with data.log_samples
  mlflow/                         events of its run, see ``tracking.mlflow_logger``
  predictions.jsonl               of a baseline
  stop, workers                   see ``training.stop_signal``
  ray/                            files of Ray Train
  step_0000100/                   a checkpoint: weights and training state
    settings.yaml code.json progress.json metrics.json state.pt
    files.json                      completion marker: the sizes of all files
sweeps/<name>/                  one sweep
  settings.yaml given.json data.json code.json    settings, names set on the command line, fingerprint of the data
  trials/<hash>/                  one trial: a training, with point.json (its settings) and end.json (how it ended)
  report.html ranking.csv best.yaml *.png
evaluations/<name>/             one evaluation: report.html, metrics.json, predictions.csv, ...
volumes/                        prepared volumes, see ``volumes.store``
phantom-<hash>/                 a phantom cohort
quarantine-<hash>.jsonl         samples that were left out
predictions-<hash>.jsonl        answers of predict.py
report/                         the report of prepare.py
inspect/                        pictures of inspect_data.py
mlflow.db, artifacts/           MLflow's database and artifacts
subjects.salt                   salt of tracking.hash_subjects
"""

from pathlib import Path

TRAININGS, SWEEPS, EVALUATIONS = "trainings", "sweeps", "evaluations"
BEGUN, HISTORY, PREDICTIONS = "begun_with.json", "evaluations.jsonl", "predictions.jsonl"
"""Files of a training."""
SETTINGS, CODE, PROGRESS, METRICS, STATE = "settings.yaml", "code.json", "progress.json", "metrics.json", "state.pt"
"""Files of a checkpoint; a sweep and an exported model have settings.yaml, too."""
SIZES = "files.json"
"""The completion marker of a checkpoint."""
GIVEN, FINGERPRINT, BEST, RANKING, REPORT = "given.json", "data.json", "best.yaml", "ranking.csv", "report.html"
"""Files of a sweep; an evaluation has report.html, too."""
POINT, END = "point.json", "end.json"
"""Files of a trial."""
TRIALS = "trials"
STOP, WORKERS = "stop", "workers"
"""Files with which a script and the workers of a training communicate, see ``training.stop_signal``."""
RAY = "ray"
"""Subfolder of a training with the files of Ray Train."""
CHECKPOINT = "step_"
"""Prefix of the names of checkpoints."""


def training_folder(storage: str | Path, name: str) -> Path:
    """The folder of a training."""
    return Path(storage).absolute() / TRAININGS / name


def sweep_folder(storage: str | Path, name: str) -> Path:
    """The folder of a sweep."""
    return Path(storage).absolute() / SWEEPS / name


def samples_file(training: str | Path, rank: int) -> Path:
    """The file that lists the samples of a rank in their order."""
    return Path(training) / f"samples_{rank}.jsonl"


def lock_file(folder: Path) -> Path:
    """The file that a script locks while it runs a training or sweep. It lies beside the folder."""
    return folder.with_name(f".{folder.name}.lock")


def evaluation_folder(storage: str | Path, name: str) -> Path:
    """The folder of an evaluation; that of a training or sweep has the same name."""
    return Path(storage).absolute() / EVALUATIONS / name


def storage_of(folder: Path) -> Path:
    """The storage folder of a training or sweep."""
    return folder.parent.parent


def marker_of(folder: Path) -> Path:
    """The file that every folder of a training or sweep has."""
    return folder / {TRAININGS: BEGUN, SWEEPS: SETTINGS}[folder.parent.name]


def checkpoint_folder(training: str | Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return Path(training) / f"{CHECKPOINT}{step:07d}"


def checkpoints_in(training: str | Path) -> list[Path]:
    """The checkpoints of a training by step, including incomplete ones."""
    return sorted(Path(training).glob(f"{CHECKPOINT}*"))


def all_checkpoints(storage: str | Path) -> list[Path]:
    """The checkpoints of all trainings and trials."""
    trainings = [*Path(storage).glob(f"{TRAININGS}/*/"), *Path(storage).glob(f"{SWEEPS}/*/{TRIALS}/*/")]
    return [checkpoint for training in trainings for checkpoint in checkpoints_in(training)]


def volumes_folder(storage: str | Path) -> Path:
    """The default folder of the volume store, see ``resources.store``."""
    return Path(storage).absolute() / "volumes"


def phantom_folder(storage: str | Path, key: str) -> Path:
    """The folder of a phantom cohort."""
    return Path(storage).absolute() / f"phantom-{key}"


def quarantine_file(storage: str | Path, key: str) -> Path:
    """The file that lists the samples that were left out."""
    return Path(storage).absolute() / f"quarantine-{key}.jsonl"


def cohort_report_folder(storage: str | Path) -> Path:
    """The folder of the report of prepare.py."""
    return Path(storage).absolute() / "report"


def picture_file(storage: str | Path, name: str) -> Path:
    """A picture of inspect_data.py."""
    return Path(storage).absolute() / "inspect" / f"{name}.png"


def salt_file(storage: str | Path) -> Path:
    """The salt of hashed subject ids."""
    return Path(storage).absolute() / "subjects.salt"


def mlflow_database(storage: str | Path) -> Path:
    """The default database of MLflow, see ``tracking.uri``."""
    return Path(storage).absolute() / "mlflow.db"


def artifacts_folder(storage: str | Path) -> Path:
    """The artifacts of the runs in ``mlflow_database``."""
    return Path(storage).absolute() / "artifacts"


def predictions_file(storage: str | Path, key: str) -> Path:
    """The answers of predict.py."""
    return Path(storage).absolute() / f"predictions-{key}.jsonl"
