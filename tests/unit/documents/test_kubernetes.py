"""examples/kubernetes against the schema of KubeRay's own CRD, and against what the pages say."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from replication.fleet import DOMAIN_LABELS
from tests.unit.documents import kuberay
from tiered.config import S3, JobSettings, Memory
from tiered.sizing import size

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "kubernetes"
SCHEMA = json.loads(Path(__file__).with_name("kuberay.json").read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    return copy.deepcopy(loaded)  # anchors of YAML are one object in two places


def problems(job: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)]


def test_the_run_is_what_kuberay_takes(job: dict[str, Any]) -> None:
    assert problems(job) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tocken"),
        (("spec", "rayClusterSpec", "workerGroups"), []),
        (("spec", "ttlSecondsAfterFinished"), "600"),
    ],
)
def test_a_mistake_in_it_would_be_found(
    path: tuple[str, ...], value: object, job: dict[str, Any]
) -> None:
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (problem,) = problems(job)
    assert path[-1] in problem


def test_its_hosts_are_machines_of_their_own_with_room_for_what_the_page_says(
    job: dict[str, Any],
) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    need = size(JobSettings(Memory(), S3("s3://any-bucket")), round(8.1e9), 1e9).store_bytes
    domains = []
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]
        (term,) = pod["spec"]["affinity"]["podAntiAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert int(group["rayStartParams"]["object-store-memory"]) >= need
        domains.append(group["labels"][DOMAIN_LABELS[0]])
    assert len(set(domains)) == len(domains)


def test_the_monitor_asks_a_port_that_every_pod_has(job: dict[str, Any]) -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            assert endpoint["port"] in [port["name"] for port in container["ports"]]


def test_the_extract_keeps_what_a_crd_says_and_refuses_the_rest() -> None:
    fields = {"n": {"type": "integer"}} | {f"text{i}": {"type": "string"} for i in range(20)}
    leaf = {"type": "object", "description": "what it is for", "properties": fields}
    spec = {"type": "object", "properties": {"one": leaf, "other": leaf}}
    crd = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": spec}}]}}
    schema = kuberay.extract(yaml.safe_dump(crd), "v0")
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"one": {"n": 1}, "other": {"n": 2}})
    assert not validator.is_valid({"one": {"n": "1"}})
    assert not validator.is_valid({"one": {"m": 1}})
    assert schema["properties"]["one"] == schema["properties"]["other"] == {"$ref": "#/$defs/d0"}
    assert "what it is for" not in json.dumps(schema)
