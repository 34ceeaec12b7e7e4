"""Layout of the storage folder, ``resources.storage``.

trainings/<name>/               one training
  settings.yaml begun_with.json code.json    settings; those that may not change, with the data; version at its start
  evaluations.jsonl               one line per evaluation
  samples_<rank>.jsonl            order of samples, with data.log_samples
  mlflow/                         events of its run, see ``tracking.mlflow_logger``
  predictions.jsonl               of a baseline
  stop, workers                   see ``training.stop_signal``
  ray/                            files of Ray Train
  step_0000100/                   a checkpoint: weights and training state
    settings.yaml code.json progress.json metrics.json calibration.json state.pt
    files.json                      completion marker: the sizes of all files
trainings/.<name>.lock          lock of a script that runs it, see ``fileio.run_lock``; sweeps have one, too
sweeps/<name>/                  one sweep
  settings.yaml given.json data.json code.json    settings, names set on the command line, fingerprint of the data
  trials/<hash>/                  one trial: a training, with point.json (its settings) and end.json (how it ended)
  report.html ranking.csv best.yaml *.png
evaluations/<name>/             one evaluation: report.html, metrics.json, predictions.csv, ...
evaluations/<sweep>-folds/      the evaluation of all folds together
compiled/                       compiled layers of torch.compile
volumes/                        prepared volumes, see ``volumes.store``
phantom-<hash>/                 a phantom cohort
quarantine-<hash>.jsonl         samples that were left out
predictions-<hash>.jsonl        answers of umbrella predict
report/                         the report of umbrella prepare
inspect/                        pictures of umbrella inspect
mlflow.db, artifacts/           MLflow's database and artifacts
subjects.salt                   salt of tracking.hash_subjects
"""

from pathlib import Path

TRAININGS, SWEEPS, EVALUATIONS = "trainings", "sweeps", "evaluations"
"""Folders below the storage folder. An evaluation has the name of its training or sweep."""
FOLDS = "-folds"
"""Ending of the name of an evaluation of all folds."""
VOLUMES, COMPILED, COHORT_REPORT, PICTURES, ARTIFACTS = "volumes", "compiled", "report", "inspect", "artifacts"
DATABASE, SALT = "mlflow.db", "subjects.salt"
BEGUN, HISTORY, PREDICTIONS = "begun_with.json", "evaluations.jsonl", "predictions.jsonl"
"""Files of a training."""
SETTINGS, CODE, PROGRESS, METRICS, STATE = "settings.yaml", "code.json", "progress.json", "metrics.json", "state.pt"
"""Files of a checkpoint; a sweep and an exported model have settings.yaml, too."""
CALIBRATION = "calibration.json"
"""The temperatures of a checkpoint, see ``evaluation.calibration``."""
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
