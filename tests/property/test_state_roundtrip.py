"""Any state, saved and restored, is the same bits; any damaged front is an error of ours."""

import random
import string
from collections import OrderedDict
from typing import Any

import hypothesis.strategies as st
import numpy as np
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings

from replication.records import ShardPlan
from tests.unit.tiered.fake_shard import Shard, assert_same, raw, read_state, restore_into
from tiered.errors import StateError
from tiered.image import read_front
from tiered.state import capture
from tiered.tree import ARRAY_DTYPES, TREE_NAME, read_tree, tensor_refs

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
CHUNK_BYTES = st.sampled_from([1, 7, 64, 1000, 1 << 20])

# --- states -------------------------------------------------------------------------------------


def dense(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of any bits at all: NaNs with payloads, denormals, negative zeros."""
    size = int(np.prod(shape)) * dtype.itemsize
    data = bytearray(random.Random(seed).randbytes(size))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    tensor = dense(dtype, draw(SHAPES), draw(st.integers(0, 1000)))
    for view in draw(st.lists(st.sampled_from("tsecnpr"), max_size=3)):
        if view == "t" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif view == "s" and tensor.dim():
            tensor = tensor[..., :: draw(st.integers(1, 3))]
        elif view == "e":
            tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
        elif view == "c" and tensor.is_complex():
            tensor = tensor.conj()
        elif view == "n" and tensor.is_complex():
            tensor = tensor.conj().imag
        elif view == "p" and tensor.is_floating_point() and dtype.itemsize > 1:
            tensor = torch.nn.Parameter(tensor)
        elif view == "r" and tensor.dim() and tensor.shape[0]:
            tensor = tensor[draw(st.integers(0, tensor.shape[0] - 1)) :]
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    dtype = np.dtype(draw(st.sampled_from(sorted(ARRAY_DTYPES))))
    shape = draw(SHAPES)
    data = random.Random(draw(st.integers(0, 1000))).randbytes(int(np.prod(shape)) * dtype.itemsize)
    if dtype == np.bool_:
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    if array.size and draw(st.booleans()):
        return array.reshape(-1)[draw(st.integers(0, array.size - 1))]
    return array.T if draw(st.booleans()) else array


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(),
    st.text(max_size=8), st.binary(max_size=8), st.complex_numbers(),
    st.sampled_from([torch.float32, torch.Size([1, 2]), torch.device("cpu"), -0.0, 2**64]),
    st.sets(st.integers() | st.text(max_size=3), max_size=3),
)  # fmt: skip
# no dots in the keys: two paths must not make one name here
KEYS = st.text(string.ascii_letters + "_é", min_size=1, max_size=6) | st.integers(-(2**70), 2**70)


@st.composite
def states(draw: st.DrawFn) -> dict[Any, Any]:
    """Trees over a pool of tensors, so that some are tied and some share a part of their memory."""
    pool = draw(st.lists(tensors(), max_size=3))
    shared = dense(torch.float32, (12,), 5)
    pool += [shared, shared[2:8], shared.view(3, 4).t(), shared.view(torch.int32)]
    leaves = st.one_of(SCALARS, tensors(), arrays(), st.sampled_from(pool))

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts = st.dictionaries(KEYS.filter(lambda k: not isinstance(k, int)), inner, max_size=4)
        numbered = st.dictionaries(st.integers(-(2**70), 2**70), inner, max_size=3)
        lists = st.lists(inner, max_size=4)
        return dicts | numbered | lists | lists.map(tuple) | dicts.map(OrderedDict)

    names = st.text(string.ascii_letters, min_size=1, max_size=4)
    return draw(st.dictionaries(names, st.recursive(leaves, containers, max_leaves=8), max_size=5))


def blank(value: Any) -> Any:
    """The same structure with other values, as a fresh process would make it; nothing is tied."""
    if isinstance(value, torch.Tensor):
        empty = torch.empty_like(value, requires_grad=False)
        target = torch.zeros_like(empty)
        return torch.nn.Parameter(target) if isinstance(value, torch.nn.Parameter) else target
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(blank(inner) for inner in value)
    return None


def leaves_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if type(value) in (list, tuple):
        return [leaf for inner in value for leaf in leaves_of(inner)]
    return [value]


# --- round trips --------------------------------------------------------------------------------


@SETTINGS
@given(states(), CHUNK_BYTES)
def test_a_state_is_read_back_bit_for_bit(state: dict[Any, Any], chunk_bytes: int) -> None:
    assert_same(state, read_state(Shard(state, chunk_bytes).reader()))


@SETTINGS
@given(states(), CHUNK_BYTES)
def test_a_blank_state_is_filled_bit_for_bit_in_place(
    state: dict[Any, Any], chunk_bytes: int
) -> None:
    target = blank(state)
    tensors_before = [leaf for leaf in leaves_of(target) if isinstance(leaf, torch.Tensor)]
    addresses = [tensor.data_ptr() for tensor in tensors_before]
    restore_into(target, Shard(state, chunk_bytes).reader())
    assert_same(state, target)
    tensors_after = [leaf for leaf in leaves_of(target) if isinstance(leaf, torch.Tensor)]
    for before, after in zip(tensors_before, tensors_after, strict=True):
        assert after is before
    assert [tensor.data_ptr() for tensor in tensors_after] == addresses


@SETTINGS
@given(states())
def test_a_state_restored_into_itself_is_itself(state: dict[Any, Any]) -> None:
    """Tied weights stay tied, and reading into memory that is shared does no harm."""
    shard = Shard(state)
    expected = read_state(shard.reader())
    if any(
        isinstance(leaf, torch.Tensor) and 0 in leaf.stride() and leaf.numel() > 1
        for leaf in leaves_of(state)
    ):
        return  # expanded tensors cannot be filled, and are refused
    restore_into(state, shard.reader())
    assert_same(expected, state)


@SETTINGS
@given(states(), CHUNK_BYTES)
def test_any_safetensors_reader_sees_the_same_tensors(
    state: dict[Any, Any], chunk_bytes: int
) -> None:
    shard = Shard(state, chunk_bytes)
    assert shard.image == Shard(state, 1 << 20).image
    seen = safetensors.torch.load(shard.image)
    captured = capture(state)
    assert seen.keys() - {TREE_NAME} == captured.tensors.keys()
    for name, tensor in captured.tensors.items():
        assert raw(seen[name]) == raw(tensor)
    refs = {ref.name: ref for ref in tensor_refs(read_tree(captured.tree))}
    assert refs.keys() == captured.tensors.keys()
    for name, ref in refs.items():
        assert ref.torch_dtype == captured.tensors[name].dtype
        assert ref.shape == captured.tensors[name].shape


# --- hostile input ------------------------------------------------------------------------------

GOOD = Shard(
    {
        "w": torch.arange(6.0).reshape(2, 3).t(),
        "list": [1, (2, {3}), 2**70, 1j, np.float32(2), np.ones(2), torch.Size([1])],
        "other": {"dtype": torch.float16, 5: torch.device("cpu"), "text": "é", "raw": b"\0"},
    }
)
FRONT = GOOD.chunks[0][0].tobytes()
TREE = read_front(FRONT, GOOD.record.plan).tree
HOSTILE = settings(deadline=None, max_examples=300)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["set", "cut", "insert", "repeat"])):
            case "set" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 20))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "repeat":
                data[at:at] = data[at : at + 30]
            case _:
                pass
        data = data or bytearray(b"\0")
    return bytes(data)


@HOSTILE
@given(damaged(FRONT[: FRONT.index(TREE) + len(TREE)]), st.booleans())
def test_a_damaged_front_is_a_front_or_a_state_error(data: bytes, is_padded: bool) -> None:
    if is_padded:
        data = data[: len(FRONT)].ljust(len(FRONT), b"\0")
    plan = ShardPlan(1, (len(data), *GOOD.record.plan.chunk_sizes[1:]))
    try:
        front = read_front(data, plan)
    except StateError:
        return
    assert len(front.tree) <= len(data)
    assert all(0 <= s.start <= s.stop <= sum(plan.chunk_sizes[1:]) for s in front.spans)


@HOSTILE
@given(st.one_of(damaged(TREE), st.binary(max_size=60), damaged(TREE[:40])))
def test_a_damaged_tree_is_a_tree_or_a_state_error(data: bytes) -> None:
    try:
        tree = read_tree(data)
    except StateError:
        return
    for ref in tensor_refs(tree):
        assert all(type(n) is int and n >= 0 for n in ref.shape)


@HOSTILE
@given(damaged(TREE))
def test_a_shard_whose_tree_lies_is_read_or_refused(data: bytes) -> None:
    """Its checksums are right, so only what the tree says can be doubted."""
    captured = capture({"w": torch.arange(6.0).reshape(2, 3).t(), "list": {"5": np.ones(2)}})
    captured.tree = data
    shard = Shard(captured)
    try:
        read_state(shard.reader())
    except StateError:
        return
