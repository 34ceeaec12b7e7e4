"""Files for clusters agree with the schemas of what reads them, and with each other. Nothing here starts a cluster."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from umbrella.cli import parse
from umbrella.config import load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "ray_configs"
KUBERAY = sorted((CONFIGS / "kuberay").glob("*.yaml"))
FILES = [CONFIGS / "cluster.yaml", CONFIGS / "runtime_env.yaml", CONFIGS / "slurm.sbatch", *KUBERAY]
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text(encoding="utf-8"))


def documents(*files: Path) -> list[dict[str, Any]]:
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def pods(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a document of Kubernetes."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "template":
                yield value
            else:
                yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def strings(document: Any) -> Iterator[str]:
    """Every text in a document."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield from (str(key), *strings(value))
    elif isinstance(document, list):
        for value in document:
            yield from strings(value)
    else:
        yield str(document)


def check(document: Any, definition: str) -> None:
    import jsonschema

    jsonschema.validate(document, {"$ref": f"#/definitions/{definition}", "definitions": SCHEMA["definitions"]})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_opens_with_its_one_command_and_what_to_change(file: Path) -> None:
    heading = " ".join(re.match(r"(#.*\n)+", file.read_text(encoding="utf-8")).group().splitlines())
    assert f"ray_configs/{file.relative_to(CONFIGS)}" in heading
    assert re.search(r"#     (kubectl|ray|sbatch) ", heading)


def test_the_cluster_of_rented_machines_is_one_of_rays() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(documents(CONFIGS / "cluster.yaml")[0])
    validate_config(config)


@pytest.mark.parametrize("file", KUBERAY, ids=lambda file: file.name)
def test_kubernetes_files_have_the_fields_of_their_kinds_and_pods_that_are_not_root(file: Path) -> None:
    for document in documents(file):
        if document["apiVersion"] == "ray.io/v1":
            check(document, document["kind"])
        for pod in pods(document):
            check(pod, "pod_template")
            mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_kubernetes_files_name_each_other() -> None:
    named = {(document["kind"], document["metadata"]["name"]): document for document in documents(*KUBERAY)}
    cluster, job = named["RayCluster", "umbrella-ray"], named["RayJob", "umbrella-sweep"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    everything = [text for document in named.values() for text in strings(document)]
    claims = {
        pod_volume["persistentVolumeClaim"]["claimName"]
        for d in named.values()
        for p in pods(d)
        for pod_volume in p["spec"]["volumes"]
        if "persistentVolumeClaim" in pod_volume
    }
    assert claims == {name for kind, name in named if kind == "PersistentVolumeClaim"}
    port = named["Service", "mlflow"]["spec"]["ports"][0]["port"]
    assert f"http://mlflow:{port}" in everything
    assert any(text.startswith("--allowed-hosts") and f"mlflow:{port}" in text for text in everything)


def test_the_versions_of_ray_are_the_one_that_is_installed() -> None:
    pinned = dict(line.split("==") for line in constraints())
    assert documents(CONFIGS / "kuberay/raycluster.yaml")[0]["spec"]["rayVersion"] == pinned["ray"]


def constraints() -> list[str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_a_submitted_job_has_the_packages_of_pyproject_in_the_versions_of_constraints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.runtime_env import RuntimeEnv

    monkeypatch.chdir(REPOSITORY)
    given = documents(CONFIGS / "runtime_env.yaml")[0]
    working_dir = given.pop("working_dir")  # a folder becomes an address only when it is submitted
    environment = RuntimeEnv(**given)
    assert (REPOSITORY / working_dir / "umbrella").is_dir()
    packages = [line for line in environment["pip"]["packages"] if not line.startswith("#")]
    assert packages == constraints()
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.search(r"\ndependencies = \[(.*?)\n\]", project, re.DOTALL).group(1)
    names = {re.match(r"[\w.-]+", line).group() for line in re.findall(r'"(.+?)"', wanted)}
    assert len(names) > 10
    assert names <= {line.split("==")[0] for line in packages}


def test_a_submitted_folder_is_small_and_whole() -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    excluded = _get_excludes(REPOSITORY, documents(CONFIGS / "runtime_env.yaml")[0]["excludes"])
    taken = [name for name in os.listdir(REPOSITORY) if not excluded(REPOSITORY / name)]
    assert {"umbrella", "experiments", "ray_configs", "constraints.txt"} <= set(taken)
    assert not {".git", "tests", "docs"} & set(taken)
    assert {"/runs/", "/.venv/"} <= set((REPOSITORY / ".gitignore").read_text().split()), "which Ray leaves out, too"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each script of ours that a file in ray_configs/ starts, and the words after it."""
    for file in [*FILES, *CONFIGS.glob("*.yaml")]:
        text = re.sub(r"\\?\n#? +(?=[\w./]+=|ray_configs)", " ", file.read_text(encoding="utf-8"))
        for line in re.findall(r"experiments/(\w+\.py\b.*)", text):
            words = re.findall(r"\S+\.py|\S+\.yaml|[a-z_.]+=\S+", line)
            yield words[0], words[1:]


def test_the_commands_in_the_files_are_of_scripts_files_and_settings_that_there_are() -> None:
    known = set(load_settings().flat())
    found = list(commands())
    assert len(found) >= 10
    for script, words in found:
        assert (REPOSITORY / "experiments" / script).exists()
        files = [word for word in words if word.endswith(".yaml")]
        assert all((REPOSITORY / file).exists() for file in files), files
        assert {word.split("=")[0] for word in words if "=" in word} <= known


@pytest.mark.parametrize(("file", "trials"), [("local", 6), ("gpu_host", 6)])
def test_files_of_resources_leave_the_default_question(file: str, trials: int) -> None:
    from umbrella.tuning.search import list_points

    settings = parse([str(CONFIGS / f"{file}.yaml")], "", str(CONFIGS / "tune.yaml")).settings
    assert len(list_points(settings)) == trials
    assert settings.resources.gpus_per_worker == (file == "gpu_host")


def test_the_image_copies_what_is_there_and_the_builder_gets_nothing_else() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((REPOSITORY / name).exists() for name in copied)
    allowed = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert allowed[1] == "*"
    assert sorted(line[1:] for line in allowed if line.startswith("!")) == sorted(copied)
    cluster = documents(CONFIGS / "kuberay/raycluster.yaml")[0]
    user = cluster["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}" in lines


@pytest.mark.parametrize("file", [*FILES, REPOSITORY / "Dockerfile"], ids=lambda file: file.name)
def test_no_file_holds_a_secret(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?i)(password|token|secret|key)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}", text)
    assert not re.search(r"kind: Secret|RAY_AUTH_TOKEN\b|://[^/\s]+:[^/\s]+@", text)
