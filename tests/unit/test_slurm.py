"""ray_configs/slurm.sbatch, run with stand-ins for Slurm's commands, for Ray and for the script that it starts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "ray_configs"
STAND_INS = {
    # Runs the command once for each node, and ends as the worst of them.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
        worst=0
        for pid in "${pids[@]}"; do wait "$pid" || { s=$?; ((s > worst)) && worst=$s; }; done
        exit $worst""",
    "scontrol": 'echo "$@" >> "$LOG/scontrol"',
    "hostname": 'if [[ ${1:-} == -I ]]; then echo "10.0.0.7 192.168.0.7"; else echo node7; fi',
    # On the first node symmetric-run runs what follows --.
    "ray": """
        echo "${SLURM_NODEID:-} $RAY_AUTH_MODE $RAY_TMPDIR $*" >> "$LOG/ray"
        [[ $1 == symmetric-run && $SLURM_NODEID == 0 && -z ${RAY_FAILS:-} ]] || exit 0
        while [[ $1 != -- ]]; do shift; done
        shift; "$@" """,
    # A sweep: it keeps its question, says what it was started with, and works until it is finished or asked to stop.
    "python": """
        trap 'echo saved >> "$LOG/python"; exit 143' TERM
        mkdir -p "$STORAGE/sweeps/slurm-$SLURM_JOB_ID" && touch "$STORAGE/sweeps/slurm-$SLURM_JOB_ID/settings.yaml"
        echo "$*, RAY_ADDRESS=${RAY_ADDRESS:-}" >> "$LOG/python"
        until [[ -e $LOG/finish ]]; do sleep 0.02; done""",
}


class Job(NamedTuple):
    """A batch job; ``log`` is the folder in which each stand-in notes what it was called with."""

    process: subprocess.Popen
    log: Path

    def called(self, name: str) -> list[str]:
        """What a stand-in was called with, a line each time."""
        file = self.log / name
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, name: str, lines: int) -> None:
        """Wait until a stand-in has noted so many lines."""
        while len(self.called(name)) < lines:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def end(self) -> int:
        """Its exit status."""
        print(*self.process.communicate())
        return self.process.returncode

    def finish(self) -> int:
        """Let the sweep come to its end; the job's exit status."""
        (self.log / "finish").touch()
        return self.end()


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., Job]:
    """Starts the script as Slurm would start it."""
    folder = tmp_path / "repository"
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copytree(CONFIGS, folder / "ray_configs")
    for name, body in STAND_INS.items():
        (folder / ".venv/bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / ".venv/bin" / name).chmod(0o755)

    def start(job: int = 71234, nodes: int = 2, **others: str) -> Job:
        log = tmp_path / f"log-{job}"
        log.mkdir(exist_ok=True)
        slurm = {"JOB_ID": job, "NNODES": nodes, "CPUS_PER_TASK": 8, "JOB_NODELIST": "n[1-2]", "TMPDIR": tmp_path}
        environment = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
        environment |= {"LOG": str(log), "USER": "me", "STORAGE": str(tmp_path / "runs"), **others}
        script = ["bash", "ray_configs/slurm.sbatch", "experiments/tune.py", "a.yaml", "data.train=x"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return Job(subprocess.Popen(script, cwd=folder, env=environment, **pipes), log)

    return start


def ports(job: Job) -> set[int]:
    call = next(line for line in job.called("ray") if "symmetric-run" in line).split()
    given = {call[n + 1].rpartition(":")[2] for n, word in enumerate(call) if word == "--address" or "port" in word}
    return {int(port) for port in given}


def test_ray_starts_on_every_node_and_the_sweep_on_the_first(submit: Callable[..., Job], tmp_path: Path) -> None:
    job, another = submit(), submit(71235)
    for one in (job, another):
        one.wait_for("python", 1)
        assert one.finish() == 0
    started = [line for line in job.called("ray") if "symmetric-run" in line]
    assert sorted(line.split()[0] for line in started) == ["0", "1"]
    call = f"token {tmp_path}/umbrella-71234 symmetric-run --address 10.0.0.7:22340 --min-nodes 2"
    assert all(call in line for line in started)
    assert job.called("python") == [
        f"experiments/tune.py a.yaml data.train=x resources.node_store={tmp_path}/umbrella-71234/store"
        f" resources.storage={tmp_path}/runs name=slurm-71234, RAY_ADDRESS=10.0.0.7:22340"
    ]
    assert not job.called("scontrol")
    assert not (tmp_path / "umbrella-71234").exists()
    assert len(ports(job)) == len(ports(another)) == 4
    assert not ports(job) & ports(another), "jobs with consecutive numbers share a node"


@pytest.mark.parametrize(("sent", "queued"), [(signal.SIGUSR1, ["requeue 71234"]), (signal.SIGTERM, [])])
def test_a_job_saves_when_its_time_is_up_or_it_is_cancelled_and_only_the_first_is_queued_again(
    submit: Callable[..., Job], tmp_path: Path, sent: signal.Signals, queued: list[str]
) -> None:
    job = submit()
    job.wait_for("python", 1)
    job.process.send_signal(sent)
    assert job.end() == 143
    assert job.called("python")[1:] == ["saved"]
    assert job.called("scontrol") == queued
    if queued:
        again = submit()
        again.wait_for("python", 3)
        assert again.finish() == 0
        assert again.called("python")[2].startswith(
            f"experiments/tune.py --resume slurm-71234 resources.node_store={tmp_path}/umbrella-71234/store"
            f" resources.storage={tmp_path}/runs,"
        )
        assert again.called("scontrol") == queued


def test_on_one_node_the_script_starts_its_own_ray(submit: Callable[..., Job]) -> None:
    job = submit(nodes=1)
    job.wait_for("python", 1)
    assert job.finish() == 0
    assert not any("symmetric-run" in line for line in job.called("ray"))
    assert " resources.address=local " in job.called("python")[0]
    assert job.called("python")[0].endswith("RAY_ADDRESS=127.0.0.1:22340")


def test_a_ray_that_does_not_start_fails_the_job(submit: Callable[..., Job]) -> None:
    assert submit(RAY_FAILS="yes").end() == 1


@pytest.mark.parametrize("script", ["slurm.sbatch", "begin_or_resume.sh"])
def test_shellcheck_finds_no_fault(script: str) -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip("needs shellcheck, which the dev extras bring")
    done = subprocess.run([found, str(CONFIGS / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "flag"), [("uploaded", "--resume uploaded"), ("new", "name=new")])
def test_a_sweep_that_only_the_object_store_has_is_resumed(tmp_path: Path, name: str, flag: str) -> None:
    uploaded = tmp_path / "bucket" / "sweeps" / "uploaded"
    uploaded.mkdir(parents=True)
    (uploaded / "settings.yaml").touch()
    script = tmp_path / "tune.py"
    script.write_text("import sys; print(*sys.argv[1:])", encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    places = {"STORAGE": str(tmp_path / "runs"), "UPLOAD": (tmp_path / "bucket").as_uri()}
    command = [str(CONFIGS / "begin_or_resume.sh"), name, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path, **places}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert flag in done.stdout
