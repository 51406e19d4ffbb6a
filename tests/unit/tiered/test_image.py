"""The image: what any safetensors reader sees, and what a hostile one may not do to us."""

import itertools
import json
import string
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.records import ShardPlan
from tests.case_names import name_of
from tests.unit.tiered.fake_shard import KEY, Shard, raw
from tiered import image
from tiered.errors import StateError
from tiered.image import (
    ALIGNMENT,
    TREE_PADDING,
    Span,
    bytes_of,
    chunk_sizes,
    data_chunk,
    front,
    lay_out,
    overlapping,
    read_front,
)
from tiered.state import Captured, capture
from tiered.tree import TREE_NAME

STATE = {
    "w": torch.arange(5000, dtype=torch.float32).reshape(50, 100).t(),
    "b": torch.arange(7, dtype=torch.bfloat16),
    "wide": torch.arange(3, dtype=torch.float64),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(4, dtype=torch.int64),
    "empty": torch.zeros(0, 3, dtype=torch.int16),
    "f8": torch.ones(5).to(torch.float8_e4m3fn),
    "u16": torch.arange(4).to(torch.uint16),
    "step": 12,
}
TENSORS = {name: value for name, value in STATE.items() if isinstance(value, torch.Tensor)}


# --- a stock reader -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [4096, 5000, 1 << 20])
def test_safetensors_sees_the_tensors(chunk_bytes: int) -> None:
    seen = safetensors.torch.load(Shard(STATE, chunk_bytes).image)
    assert seen.keys() - {TREE_NAME} == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (seen[name].dtype, seen[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(seen[name]) == raw(tensor)


def test_safetensors_sees_them_without_torch() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(3, dtype=torch.bool)}
    seen = safetensors.numpy.load(Shard(state).image)
    assert seen["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert seen["b"].tolist() == [True] * 3


def test_safe_open_reads_who_wrote_it(tmp_path: Any) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(Shard(STATE).image)
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        assert raw(opened.get_tensor("b")) == raw(TENSORS["b"])
    expected = {"format": "pt", "tiered.format": "1", "tiered.job": "job"}
    expected |= {"tiered.generation": "2", "tiered.step": "40", "tiered.rank": "0"}
    assert expected.items() <= metadata.items()
    assert metadata["tiered.world_size"] == "1"


@pytest.mark.parametrize(
    "state", [{}, {"n": 1}, {"": torch.ones(1)}, {"\0\n\"'é": torch.ones(2)}, {"a": torch.ones(0)}]
)
def test_odd_states_are_images_too(state: dict[str, Any]) -> None:
    seen = safetensors.torch.load(Shard(state).image)
    assert seen.keys() - {TREE_NAME} == capture(state).tensors.keys()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fnuz])
def test_what_safetensors_has_no_name_for_is_bytes_with_one_more_dimension(
    dtype: torch.dtype,
) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(torch.float32).to(dtype)
    seen = safetensors.torch.load(Shard({"t": tensor, "zero": tensor[0, 0]}).image)
    assert seen["t"].dtype == torch.uint8
    assert list(seen["t"].shape) == [2, 3, dtype.itemsize]
    assert raw(seen["t"]) == raw(tensor)
    assert list(seen["zero"].shape) == [dtype.itemsize]


def test_every_tensor_is_aligned_to_its_dtype_and_the_data_to_64() -> None:
    data = Shard(STATE).image
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % ALIGNMENT == 0
    header = json.loads(data[8 : 8 + length])
    assert header[TREE_NAME]["data_offsets"] == [0, TREE_PADDING]
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_the_data_chunks_do_not_change_when_only_numbers_do() -> None:
    one, other = Shard(STATE), Shard({**STATE, "step": 10**30})
    assert one.record.digests[0] != other.record.digests[0]
    assert one.record.digests[1:] == other.record.digests[1:]
    assert len(one.record.digests) > 2


# --- layout and chunks --------------------------------------------------------------------------


def test_a_layout_serves_every_state_of_its_signature() -> None:
    captured = capture(STATE)
    later = capture({**STATE, "b": TENSORS["b"] + 1, "step": 13})
    assert captured.signature == later.signature
    assert lay_out(captured) == lay_out(later)
    for changed in (TENSORS["b"].float(), TENSORS["b"][:-1]):
        assert capture({**STATE, "b": changed}).signature != captured.signature


@pytest.mark.parametrize("chunk_bytes", [1, 3, 64, 4096, 20101, 1 << 30])
def test_any_cut_gives_the_same_bytes(chunk_bytes: int) -> None:
    state = {**STATE, "w": TENSORS["w"][:3, :5]}
    captured = capture(state)
    layout = lay_out(captured)
    whole = b"".join(raw(captured.tensors[span.name]) for span in layout.spans)
    sizes = chunk_sizes(layout, 10, chunk_bytes)
    assert sizes[0] == 10
    assert all(0 < n <= chunk_bytes for n in sizes[1:])
    pieces, start = [], 0
    for size in sizes[1:]:
        chunk = data_chunk(layout, captured.tensors, start, start + size)
        assert all(b.dtype == np.uint8 and b.ndim == 1 for b in chunk)
        pieces.append(b"".join(b.tobytes() for b in chunk))
        start += size
    assert [len(piece) for piece in pieces] == list(sizes[1:])
    assert b"".join(pieces) == whole


def test_a_chunk_ends_between_tensors_but_for_those_that_fit_in_none() -> None:
    kib = {"a": 10, "b": 25, "c.10": 4, "c.2": 4, "d": 4, "e": 1}
    state = {name: torch.zeros(n << 10, dtype=torch.uint8) for name, n in kib.items()}
    layout = lay_out(capture(state))
    assert [span.name for span in layout.spans] == ["b", "a", "c.2", "c.10", "d", "e"]
    sizes = chunk_sizes(layout, 10, 10 << 10)
    assert [n >> 10 for n in sizes[1:]] == [10, 10, 5, 10, 8, 5]


def test_what_is_frozen_makes_the_same_chunks_whatever_trains_beside_it() -> None:
    def chunks(step: int) -> list[bytes]:
        state: dict[str, torch.Tensor] = {}
        for layer in range(12):
            state[f"layers.{layer}.base"] = torch.full((1000,), layer)
            state[f"layers.{layer}.adapter"] = torch.full((40,), 100 * step + layer)
        captured = capture(state)
        layout = lay_out(captured)
        stops = (0, *layout.stops(16_000))
        cut = [data_chunk(layout, captured.tensors, a, b) for a, b in itertools.pairwise(stops)]
        return [b"".join(buffer.tobytes() for buffer in chunk) for chunk in cut]

    same = [one == other for one, other in zip(chunks(1), chunks(2), strict=True)]
    assert same == [True] * 6 + [False]


def test_a_contiguous_tensor_is_not_copied() -> None:
    weight = torch.ones(64, 64)
    assert bytes_of(weight).ctypes.data == weight.data_ptr()
    captured = capture({"w": weight})
    (buffer,) = data_chunk(lay_out(captured), captured.tensors, 4096, 8192)
    assert buffer.ctypes.data == weight.data_ptr() + 4096


@pytest.mark.parametrize("leading", [(), (1, 1)])
def test_of_a_tensor_that_must_be_copied_a_chunk_copies_its_rows_only(
    leading: tuple[int, ...],
) -> None:
    weight = torch.arange(1 << 16, dtype=torch.int32).reshape(64, 1024).t()
    captured = capture({"w": weight.reshape(*leading, *weight.shape)})
    layout = lay_out(captured)
    (buffer,) = data_chunk(layout, captured.tensors, 1000, 3000)
    owner = buffer
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert owner.nbytes < 4096
    assert buffer.tobytes() == raw(weight)[1000:3000]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, 4)[:, 0],  # contiguous, with a stride that is not 1
        torch.ones(4, 4)[1:2, 2:3],
        torch.tensor(1 + 2j).conj(),
        torch.tensor([1 + 2j, 3j]).conj().imag,
        torch.ones(3).expand(2, 3),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(0, 4).t(),
        torch.nn.Parameter(torch.ones(2)).detach(),
    ],
    ids=lambda t: f"{list(t.shape)}{t.stride()}",
)
def test_bytes_are_those_of_the_tensor_in_row_major_order(tensor: torch.Tensor) -> None:
    assert bytes_of(tensor).tobytes() == tensor.clone().numpy().tobytes() == raw(tensor)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(-1, 40), st.integers(1, 40))
def test_overlapping_is_what_a_scan_finds(sizes: list[int], start: int, length: int) -> None:
    stop = start + length
    spans, at = [], 0
    for letter, size in zip(string.ascii_letters, sizes, strict=False):
        spans.append(Span(letter, at, at + size))
        at += size
    wanted = set(range(start, stop))
    expected = [s for s in spans if wanted & set(range(s.start, s.stop))]
    assert list(overlapping(spans, start, stop)) == expected


def test_a_header_that_safetensors_would_refuse_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = capture({f"name{n}": torch.ones(1) for n in range(50)})
    monkeypatch.setattr(image, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(StateError, match="50 tensors make a header"):
        front(lay_out(captured), KEY, 1, captured.tree)


def test_a_tree_of_any_length_fills_its_padding() -> None:
    for size in (0, 1, TREE_PADDING - 1, TREE_PADDING, TREE_PADDING + 1):
        captured = Captured(bytes(size), {"a": torch.ones(2)})
        layout = lay_out(captured)
        first = front(layout, KEY, 1, captured.tree)
        plan = ShardPlan(1, chunk_sizes(layout, len(first), 4096))
        assert read_front(first, plan).tree == captured.tree
        assert len(first) % ALIGNMENT == 0


# --- reading, believing nothing -----------------------------------------------------------------


def test_read_front_finds_what_front_wrote() -> None:
    captured = capture(STATE)
    layout = lay_out(captured)
    first = front(layout, KEY, 1, captured.tree)
    found = read_front(first, ShardPlan(1, chunk_sizes(layout, len(first), 4096)))
    assert found.tree == captured.tree
    assert found.spans == layout.spans


def hostile(**changes: Any) -> tuple[bytes, ShardPlan]:
    """A front over 100 bytes of tensors `a` and `b`, changed."""
    header: dict[str, Any] = {
        "__metadata__": {"tiered.tree_bytes": "3"},
        TREE_NAME: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "a": {"dtype": "U8", "shape": [60], "data_offsets": [8, 68]},
        "b": {"dtype": "U8", "shape": [40], "data_offsets": [68, 108]},
    }
    text = json.dumps({**header, **changes}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    return data, ShardPlan(1, (len(data), 100))


def test_the_hostile_front_is_a_good_one_when_nothing_is_changed() -> None:
    assert read_front(*hostile()).spans == (Span("a", 0, 60), Span("b", 60, 100))


def offsets(*values: Any) -> dict[str, Any]:
    return {"data_offsets": list(values)}


@pytest.mark.parametrize(
    "changes",
    [
        {"b": offsets(68, 109)},
        {"b": offsets(67, 108)},
        {"b": offsets(108, 68)},
        {"b": offsets(0, 8)},
        {"b": offsets(8, 68)},
        {"b": offsets(-1, 5)},
        {"b": offsets(68, 10**30)},
        {"b": offsets(68, float("inf"))},
        {"b": offsets(float("nan"), 108)},
        {"b": offsets(68.0, 108.0)},
        {"b": offsets("68", "108")},
        {"b": offsets(68)},
        {"b": offsets(68, 108, 1)},
        {"b": {}},
        {"b": None},
        {"b": []},
        {"__metadata__": None},
        {"__metadata__": {}},
        {"__metadata__": {"tiered.tree_bytes": "9"}},
        {"__metadata__": {"tiered.tree_bytes": "-1"}},
        {"__metadata__": {"tiered.tree_bytes": "x"}},
        {"__metadata__": {"tiered.tree_bytes": float("inf")}},
        {TREE_NAME: offsets(0, 7)},
        {TREE_NAME: offsets(0, 9)},
        {TREE_NAME: offsets(0, "8")},
        {TREE_NAME: None},
    ],
    ids=name_of,
)
def test_a_hostile_header_is_a_state_error(changes: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="not a shard's image"):
        read_front(*hostile(**changes))


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", b"\xff\xff", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 5000],
    ids=lambda text: text[:8],
)
def test_a_header_that_is_none_is_a_state_error(text: bytes) -> None:
    data = len(text).to_bytes(8, "little") + text
    with pytest.raises(StateError, match="not a shard's image"):
        read_front(data, ShardPlan(1, (len(data),)))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_a_state_error(length: int) -> None:
    data, plan = hostile()
    with pytest.raises(StateError, match="header of"):
        read_front(length.to_bytes(8, "little") + data[8:], plan)


def test_a_front_cut_anywhere_is_a_state_error() -> None:
    data, plan = hostile()
    for stop in range(len(data)):
        with pytest.raises(StateError, match="not a shard's image"):
            read_front(data[:stop], plan)
