"""What other tools have written, read without unpickling, its tensors mapped."""

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from tests.unit.tiered.fake_shard import assert_same
from tests.unit.tiered.test_export import make_state, whole_of
from tiered.errors import ConfigError, StateError
from tiered.export import write_safetensors
from tiered.export_dcp import write_dcp
from tiered.imports import format_of, import_step, opened

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def read(path: Path) -> dict[Any, Any]:
    with opened(path, format_of(path, None)) as state:
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def test_a_safetensors_file_and_a_directory_of_them(tmp_path: Path) -> None:
    model = {"a.weight": torch.randn(30, 7), "half": torch.randn(9).to(torch.bfloat16)}
    save_file(model, tmp_path / "one.safetensors")
    assert_same(read(tmp_path / "one.safetensors"), model)
    paths = write_safetensors(whole_of(model), tmp_path / "several", max_file_bytes=700)
    assert len(paths) == 3
    found = read(tmp_path / "several")
    assert_same({name: found[name] for name in model}, model)
    (tmp_path / "several" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"not there.*model-00001"):
        read(tmp_path / "several")


def test_a_file_of_torch_save(tmp_path: Path) -> None:
    state = make_state()
    torch.save(state, tmp_path / "model.pt")
    assert_same(read(tmp_path / "model.pt"), state)


def test_a_dcp_directory_of_stock_dcp_and_of_our_export(tmp_path: Path) -> None:
    state = make_state()
    dcp.save(state, checkpoint_id=tmp_path / "stock")
    write_dcp(whole_of(state), tmp_path / "ours")
    for name in ("stock", "ours"):
        found = read(tmp_path / name)
        assert found["model"].keys() == state["model"].keys()
        assert_same({n: found["model"][n] for n in state["model"]}, state["model"])
        assert found["epoch"] == 3
        assert found["optimizer"]["param_groups"][0]["lr"] == 0.1


def test_the_same_with_a_torch_whose_save_and_load_know_no_no_dist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collective(*_: Any, **__: Any) -> None:
        raise AssertionError("would wait for other ranks")

    monkeypatch.setattr(state_dict_saver, "save", collective)
    monkeypatch.setattr(state_dict_loader, "load", collective)
    write_dcp(whole_of(make_state()), tmp_path / "ours")
    found, expected = read(tmp_path / "ours")["model"], make_state()["model"]
    assert_same({name: found[name] for name in expected}, expected)


def test_nothing_is_unpickled_but_weights(tmp_path: Path) -> None:
    torch.save({"args": Namespace(lr=1)}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="holds more than"):
        read(tmp_path / "model.pt")
    dcp.save({"w": torch.ones(3), "args": Namespace(lr=1)}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(StateError, match=r"'args'.*unpickling"):
        read(tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Namespace(lr=1)))
    with pytest.raises(ConfigError, match=r"names argparse\.Namespace"):
        read(tmp_path / "dcp")


def test_what_cannot_be_imported_is_said_before_anything_is_asked_of_a_cluster(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        import_step("job", tmp_path / "no")
    with pytest.raises(ConfigError, match=r"neither \.metadata"):
        import_step("job", tmp_path)
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    with pytest.raises(ConfigError, match="looks like 'safetensors'"):
        import_step("job", tmp_path / "text", format="torch")
    with pytest.raises(ConfigError, match="no safetensors file"):
        read(tmp_path / "text")
    (tmp_path / "old").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match="save it anew"):
        import_step("job", tmp_path / "old")
    with pytest.raises(ConfigError, match="must be one of"):
        import_step("job", tmp_path / "text", format="zip")  # type: ignore[arg-type]
