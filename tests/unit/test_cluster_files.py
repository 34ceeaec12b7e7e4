"""Files for clusters agree with the schemas of what reads them, and with each other. Nothing here starts a cluster."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from umbrella.cli import parse
from umbrella.commands import COMMANDS
from umbrella.config import find_settings_file, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "ray_configs"
KUBERAY = sorted((CONFIGS / "kuberay").glob("*.yaml"))
FILES = [CONFIGS / "cluster.yaml", CONFIGS / "runtime_env.yaml", CONFIGS / "slurm.sbatch", *KUBERAY]
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text(encoding="utf-8"))


def documents(*files: Path) -> list[dict[str, Any]]:
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def walk(document: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every value in a document; those in a list have its key."""
    yield key, document
    if isinstance(document, dict | list):
        for name, value in document.items() if isinstance(document, dict) else ((key, value) for value in document):
            yield from walk(value, name)


def pods(document: Any) -> list[dict[str, Any]]:
    """Every pod template in a document of Kubernetes."""
    return [value for key, value in walk(document) if key == "template"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_begins_with_its_command(file: Path) -> None:
    heading = " ".join(re.match(r"(#.*\n)+", file.read_text(encoding="utf-8")).group().splitlines())
    assert f"ray_configs/{file.relative_to(CONFIGS)}" in heading
    assert re.search(r"#     (kubectl|ray|sbatch) ", heading)


def test_the_cluster_file_is_valid_for_the_autoscaler() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(documents(CONFIGS / "cluster.yaml")[0]))


@pytest.mark.parametrize("file", KUBERAY, ids=lambda file: file.name)
def test_kubernetes_files_suit_their_schemas_and_mount_their_volumes(file: Path) -> None:
    import jsonschema

    for document in documents(file):
        checked = [("pod_template", pod) for pod in pods(document)]
        if document["apiVersion"] == "ray.io/v1":
            checked.append((document["kind"], document))
        for name, part in checked:
            jsonschema.validate(part, {"$ref": f"#/definitions/{name}", "definitions": SCHEMA["definitions"]})
        for pod in pods(document):
            mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_kubernetes_files_refer_to_each_other_by_name() -> None:
    named = {(document["kind"], document["metadata"]["name"]): document for document in documents(*KUBERAY)}
    cluster, job = named["RayCluster", "umbrella-ray"], named["RayJob", "umbrella-sweep"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    values = list(walk(list(named.values())))
    claims = {value for key, value in values if key == "claimName"}
    assert claims == {name for kind, name in named if kind == "PersistentVolumeClaim"}
    address = f"mlflow:{named['Service', 'mlflow']['spec']['ports'][0]['port']}"
    texts = [value for _, value in values if isinstance(value, str)]
    assert f"http://{address}" in texts
    assert any(text.startswith("--allowed-hosts") and address in text for text in texts)


def test_jobs_and_images_have_the_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.runtime_env import RuntimeEnv

    monkeypatch.chdir(REPOSITORY)
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [line for line in lines if not line.startswith("#")]
    given = documents(CONFIGS / "runtime_env.yaml")[0]
    assert (REPOSITORY / given.pop("working_dir") / "umbrella").is_dir()
    packages = [line for line in RuntimeEnv(**given)["pip"]["packages"] if not line.startswith("#")]
    assert packages == constraints
    pinned = dict(line.split("==") for line in constraints)
    assert documents(CONFIGS / "kuberay/raycluster.yaml")[0]["spec"]["rayVersion"] == pinned["ray"]
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.search(r"\ndependencies = \[(.*?)\n\]", project, re.DOTALL).group(1)
    names = {re.match(r"[\w.-]+", line).group() for line in re.findall(r'"(.+?)"', wanted)}
    assert len(names) > 10
    assert names <= pinned.keys()


def test_a_submitted_job_gets_the_code_without_tests_and_docs() -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    excluded = _get_excludes(REPOSITORY, documents(CONFIGS / "runtime_env.yaml")[0]["excludes"])
    taken = {name for name in os.listdir(REPOSITORY) if not excluded(REPOSITORY / name)}
    assert {"umbrella", "experiments", "ray_configs", "constraints.txt"} <= taken
    assert not {".git", "tests", "docs"} & taken
    assert {"/runs/", "/.venv/"} <= set((REPOSITORY / ".gitignore").read_text().split()), "which Ray leaves out, too"


def test_commands_in_the_files_use_scripts_files_and_settings_that_exist() -> None:
    known, found = set(load_settings().flat()), 0
    for file in [*FILES, *CONFIGS.glob("*.yaml")]:
        text = re.sub(r"\\?\n#? +(?=[\w./]+=|ray_configs)", " ", file.read_text(encoding="utf-8"))
        for script, command in re.findall(r"(experiments/\w+\.py|umbrella [a-z-]+)\b(.*\b(?:=|yaml).*)", text):
            words = re.findall(r"\S+\.yaml|[a-z_.]+=\S+", command)
            assert (REPOSITORY / script).exists() or script.removeprefix("umbrella ") in COMMANDS
            assert all(find_settings_file(word).is_file() for word in words if word.endswith(".yaml")), words
            assert {word.split("=")[0] for word in words if "=" in word} <= known
            found += 1
    assert found >= 10


@pytest.mark.parametrize("file", ["local", "gpu_host"])
def test_resource_files_keep_the_default_search_space(file: str) -> None:
    from umbrella.tuning.search import list_points

    settings = parse([str(CONFIGS / f"{file}.yaml")], "", str(CONFIGS / "tune.yaml")).settings
    assert len(list_points(settings)) == 4
    assert settings.resources.gpus_per_worker == (file == "gpu_host")


def test_the_image_contains_only_files_that_exist_and_runs_as_the_user_of_the_pods() -> None:
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
def test_no_file_contains_a_secret(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?i)(password|token|secret|key)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}", text)
    assert not re.search(r"kind: Secret|RAY_AUTH_TOKEN\b|://[^/\s]+:[^/\s]+@", text)
