"""The schema of KubeRay's RayJob as `kuberay.json` has it: without descriptions, nothing twice.

    python -m tests.unit.documents.kuberay RELEASE ray.io_rayjobs.yaml > kuberay.json

The file is helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of
https://github.com/ray-project/kuberay (Apache-2.0). A subtree that occurs several times, as the
template of a pod does, is written once.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SHARED_BYTES = 200  # smaller subtrees are repeated


def strict(node: Any) -> Any:
    """Without descriptions; unknown fields are refused where the schema names the known ones."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: strict(value)
        for key, value in node.items()
        if not (key == "description" and isinstance(value, str))
    }
    is_open = "additionalProperties" in kept or kept.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object" and not is_open:
        kept["additionalProperties"] = False
    return kept


def share(node: Any, definitions: dict[str, tuple[str, Any]]) -> Any:
    """Put each large subtree into `definitions`, by its text; returns what refers to it."""
    if isinstance(node, list):
        return [share(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    small = {key: share(value, definitions) for key, value in node.items()}
    text = json.dumps(small, sort_keys=True)
    if "type" not in small or len(text) < SHARED_BYTES:
        return small
    name, _ = definitions.setdefault(text, (f"d{len(definitions)}", small))
    return {"$ref": f"#/$defs/{name}"}


def extract(text: str, release: str) -> dict[str, Any]:
    """The schema of version v1 in a CRD."""
    versions = yaml.safe_load(text)["spec"]["versions"]
    (found,) = [version for version in versions if version["name"] == "v1"]
    definitions: dict[str, tuple[str, Any]] = {}
    schema = share(strict(found["schema"]["openAPIV3Schema"]), definitions)
    return {
        "$comment": f"ray.io_rayjobs.yaml of KubeRay {release}, Apache-2.0; see kuberay.py",
        "$defs": dict(definitions.values()),
        **schema,
    }


if __name__ == "__main__":
    json.dump(extract(Path(sys.argv[2]).read_text(), sys.argv[1]), sys.stdout, indent=0)
    sys.stdout.write("\n")
