"""Exports, read by the tools that they are for."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from tests.unit.tiered.fake_shard import Shard, assert_same, shard_of, step_of
from tiered import whole_step
from tiered.boxes import Box
from tiered.errors import ConfigError, StateError
from tiered.export import (
    check_target,
    write_safetensors,
    write_shards,
    write_torch,
)
from tiered.export_dcp import write_dcp
from tiered.whole_step import WholeStep

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(autouse=True)
def window(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every tensor comes in several."""
    monkeypatch.setattr("tiered.whole_step.WINDOW_BYTES", 600)
    monkeypatch.setattr("tiered.export_dcp.WINDOW_BYTES", 600)


def make_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(30, 17, generator=generator)
    model = {
        "embedding.weight": embedding,
        "head.weight": embedding,  # tied
        "half": torch.randn(5, 7, 11, generator=generator).to(torch.bfloat16),
        "mask": torch.rand(50, generator=generator) > 0.5,
        "scale": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }
    optimizer = {
        "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(30, 17)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
    }
    return {"model": model, "optimizer": optimizer, "epoch": 3, "seen": Counter(a=2), "note": "x"}


def whole_of(state: dict[str, Any], key: str | None = None) -> WholeStep:
    return WholeStep(step_of([Shard(state)]), key)


def sharded(chunk_bytes: int = 512) -> tuple[dict[str, Any], list[Shard]]:
    """A tensor in uneven rows on two ranks, one in columns, and one that both have."""
    values = {
        "rows": torch.arange(77.0).reshape(11, 7),
        "columns": torch.arange(120.0).reshape(6, 20),
        "both": torch.arange(400.0),
    }
    boxes = [
        {"rows": Box((0, 0), (6, 7)), "columns": Box((0, 0), (6, 13))},
        {"rows": Box((6, 0), (5, 7)), "columns": Box((0, 13), (6, 7))},
    ]
    return values, [shard_of(values, box, chunk_bytes=chunk_bytes) for box in boxes]


def test_a_consolidated_model_is_read_by_safetensors(tmp_path: Path) -> None:
    state = make_state()
    paths = write_safetensors(whole_of(state, "model"), tmp_path / "out")
    assert paths == [tmp_path / "out" / "model.safetensors"]
    assert_same(dict(sorted(load_file(paths[0]).items())), dict(sorted(state["model"].items())))


def test_a_large_model_is_several_files_with_an_index(tmp_path: Path) -> None:
    state = make_state()["model"]
    *files, index = write_safetensors(whole_of(state), tmp_path / "out", max_file_bytes=2500)
    assert [p.name for p in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 1
    assert index.name == "model.safetensors.index.json"
    found = json.loads(index.read_text())
    sizes = [t.numel() * t.element_size() for t in state.values()]
    assert found["metadata"] == {"total_size": sum(sizes)}
    loaded = {}
    for name, file in found["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            loaded[name] = opened.get_tensor(name)
    assert_same(loaded, {name: state[name] for name in loaded})
    assert loaded.keys() == state.keys()


def test_sharded_tensors_are_put_together(tmp_path: Path) -> None:
    values, shards = sharded()
    (path,) = write_safetensors(WholeStep(step_of(shards)), tmp_path / "out")
    loaded = load_file(path)
    assert_same({name: loaded[name] for name in values}, values)


def test_torch_load_reads_the_whole_state_with_weights_only(tmp_path: Path) -> None:
    state = make_state() | {"array": np.arange(300).reshape(3, 100), "number": np.float32(1.5)}
    (path,) = write_torch(whole_of(state), tmp_path / "model.pt")
    expected = state | {"array": torch.from_numpy(state["array"]), "number": 1.5}
    loaded = torch.load(path, weights_only=True)
    assert_same(loaded, expected)
    pointers = [loaded["model"][n].data_ptr() for n in ("embedding.weight", "head.weight")]
    assert pointers[0] == pointers[1]
    assert_same(torch.load(path, weights_only=True, mmap=True), expected)
    values, shards = sharded()
    (path,) = write_torch(WholeStep(step_of(shards)), tmp_path / "model.pt")
    loaded = torch.load(path, weights_only=True)
    assert_same({name: loaded[name] for name in values}, values)


def test_stock_dcp_load_reads_the_directory(tmp_path: Path) -> None:
    state = make_state() | {"array": np.arange(300).reshape(3, 100)}
    write_dcp(whole_of(state), tmp_path / "out")
    target = make_state()
    target["optimizer"]["param_groups"][0]["lr"] = 0.0
    for tensor in target["model"].values():
        tensor.zero_()
    target |= {"array": None, "epoch": 0}
    dcp.load(target, checkpoint_id=tmp_path / "out")
    state["optimizer"]["state"][0]["exp_avg"] = target["optimizer"]["state"][0]["exp_avg"]
    assert_same(target, state | {"optimizer": target["optimizer"]})
    assert target["optimizer"]["param_groups"] == make_state()["optimizer"]["param_groups"]


def test_stock_dcp_load_reads_sharded_tensors(tmp_path: Path) -> None:
    values, shards = sharded()
    write_dcp(WholeStep(step_of(shards)), tmp_path / "out")
    target = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    dcp.load(target, checkpoint_id=tmp_path / "out")
    assert_same(target, values)


def test_shards_are_the_images_as_they_are(tmp_path: Path) -> None:
    _, shards = sharded()
    paths = write_shards(step_of(shards), tmp_path / "out")
    assert [p.read_bytes() for p in paths] == [s.image for s in shards]


def test_no_more_than_a_window_is_in_memory_and_each_chunk_is_read_about_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = Shard({f"w{n}": torch.arange(1000.0) + n for n in range(8)}, chunk_bytes=400)
    step = step_of([shard])
    tier: Any = step.readers[0].tiers[0]
    monkeypatch.setattr(whole_step, "WINDOW_BYTES", 4000)
    whole = WholeStep(step)
    sizes = []
    for _, _, values in whole.windows(whole.in_image_order()):
        sizes.append(values.numel() * values.element_size())
    assert max(sizes) <= 4000
    assert sum(sizes) == 8 * 4000
    assert len(tier.asked) == len(shard.chunks)


@pytest.mark.parametrize("write", [write_safetensors, write_dcp, write_shards, write_torch])
def test_nothing_appears_when_a_chunk_is_lost(tmp_path: Path, write: Any) -> None:
    step = step_of([Shard(make_state()["model"], chunk_bytes=512)])
    source = step if write is write_shards else WholeStep(step)
    tier: Any = step.readers[0].tiers[0]
    tier.corrupt = {3}
    with pytest.raises(Exception, match="cannot be restored"):
        write(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_has_no_room_for_is_named(tmp_path: Path) -> None:
    odd = {"weight": torch.zeros(3), "phase": torch.zeros(3, dtype=torch.complex64)}
    with pytest.raises(StateError, match=r"'phase'.*complex64.*'dcp'"):
        write_safetensors(whole_of(odd), tmp_path / "out")
    with pytest.raises(StateError, match="another key"):
        write_safetensors(whole_of({"a": 1}), tmp_path / "out")
    with pytest.raises(StateError, match=r"'modle'.*it has model, optimizer"):
        whole_of(make_state(), "modle")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("shards", "safetensors", "dcp"):
        check_target(tmp_path / "new", name)
        for taken in (tmp_path, tmp_path / "file"):
            with pytest.raises(ConfigError, match="new or an empty directory"):
                check_target(taken, name)
    with pytest.raises(ConfigError, match="writes one file"):
        check_target(tmp_path, "torch")
    with pytest.raises(
        ConfigError, match=r"must be one of 'shards', 'safetensors', 'dcp', 'torch'"
    ):
        check_target(tmp_path, "numpy")
