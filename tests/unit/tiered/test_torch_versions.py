"""What a job pays before its first step: the imports, and classes that are looked up late."""

import subprocess
import sys
import types

import pytest

from tiered import torch_versions

SLOW = ["torch.distributed.tensor", "torch.distributed.checkpoint", "sympy", "ray.train"]
SCRIPT = """
tiered.Checkpointer, tiered.recover, tiered.Memory, tiered.S3
import tiered.recovered, tiered.state, torch
tiered.state.capture({"x": torch.zeros(3), "model": torch.nn.Linear(2, 2)})
"""


@pytest.mark.parametrize(
    ("code", "slow"),
    [
        pytest.param(SCRIPT, SLOW, id="script"),
        pytest.param("import tiered.cli.app", ["torch", "ray.train"], id="commands"),
        pytest.param("import tiered.coordinator", ["torch", "ray.train"], id="coordinator"),
        pytest.param("import replication.holder", ["torch", "boto3", "ray.train"], id="holder"),
    ],
)
def test_what_takes_seconds_to_import_is_imported_by_who_needs_it(
    code: str, slow: list[str]
) -> None:
    code = f"import sys, tiered\n{code}\nprint([name for name in {slow} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_where_nobody_imported_the_class_nothing_is_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.distributed.tensor")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert not torch_versions.is_dtensor(3)  # while it is imported
    module.DTensor = int  # type: ignore[attr-defined]
    assert torch_versions.is_dtensor(3)
    assert not torch_versions.is_sharded_tensor(3)
    monkeypatch.delitem(sys.modules, module.__name__)
    assert not torch_versions.is_dtensor(3)
