"""Taking a state apart: what keeps its type, what is refused and how it is named."""

import io
import pickle
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
from torch.distributed.tensor import Shard as PlacedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.case_names import name_of
from tests.unit.tiered.fake_shard import Shard, assert_same, read_state, step_of
from tiered import restore
from tiered.errors import StateError
from tiered.restore import read_whole_state
from tiered.state import TensorPart, TensorParts, capture, capture_present
from tiered.tree import (
    EXT_DEVICE,
    EXT_NDARRAY,
    EXT_NUMPY_SCALAR,
    EXT_PICKLE,
    EXT_SET,
    EXT_TENSOR,
    EXT_TORCH_DTYPE,
    EXT_TORCH_SIZE,
    EXT_TUPLE,
    EXT_TYPED,
    MAX_DEPTH,
    Array,
    TensorRef,
    read_tree,
    tensor_refs,
)


class Point(NamedTuple):
    x: int
    y: int


class Colour(Enum):
    RED = 1


class Small(IntEnum):
    ONE = 1


@dataclass
class Settings:
    lr: float


class Custom:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not me")


class Bomb:
    """Pickles well, and fails where it is read."""

    def __reduce__(self) -> Any:
        return explode, ()


def explode() -> None:
    raise RuntimeError("boom")


class Subclass(torch.Tensor):
    pass


class Half:
    """Has a state_dict and no way back."""

    def state_dict(self) -> dict[str, int]:
        return {}


class Loader:
    """A data loader with a state of its own."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def through(state: dict[Any, Any], **options: Any) -> dict[Any, Any]:
    return read_state(Shard(state, **options).reader())


# --- what keeps its type ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**400,
        -(10**400), 0.0, -0.0, float("inf"), float("nan"), 5e-324, "", "naïve \0 \U0001f600",
        "lone \ud800 surrogate", b"", bytes(range(256)), complex(-0.0, float("nan")),
        [], (), {}, [[]], ((),), ([], {}), (None,), {1, 2, (3, "x")}, set(),
        Counter({3: 2, "a": 1}), torch.bfloat16, torch.Size([2, 3]), torch.device("cpu"),
        torch.device("cuda:1"), np.float64(0.1), np.bool_(True), np.int8(-1), np.uint64(2**64 - 1),
        np.float16(1.5), np.complex64(1 + 2j), np.longdouble(1) / 3,
    ],
    ids=name_of,
)  # fmt: skip
def test_a_value_keeps_its_type_and_bits(value: Any) -> None:
    assert_same({"k": value, "n": [(value,)]}, through({"k": value, "n": [(value,)]}))


def test_the_bits_of_a_nan_survive() -> None:
    odd = np.frombuffer(bytes.fromhex("010000000000f8ff"))[0].item()
    assert_same({"nan": odd}, through({"nan": odd}))


def test_bytes_in_a_file_of_memory_are_read_from_the_beginning() -> None:
    file = io.BytesIO(b"\x00all of it\xff")
    file.seek(4)
    back = through({"f": [file]})["f"][0]
    assert type(back) is io.BytesIO
    assert (back.tell(), back.read()) == (0, b"\x00all of it\xff")


def test_keys_keep_their_types() -> None:
    keys = ["a", "", 0, -1, 2**70, -(2**70), 0.5, None, b"a", "0"]
    state = {"d": {key: index for index, key in enumerate(keys)}, 7: {True: 1, False: 2}}
    assert_same(state, through(state))


def test_an_ordered_dict_comes_back_as_a_dict_in_its_order() -> None:
    back = through({"d": OrderedDict([("z", 1), ("a", 2)])})
    assert type(back["d"]) is dict
    assert list(back["d"].items()) == [("z", 1), ("a", 2)]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.arange(6)[::-2],
        np.float32(3).reshape(()),
        np.zeros((0, 3), dtype=np.uint16),
        np.array([True, False]),
        np.array([1 + 2j], dtype=np.complex64),
        np.broadcast_to(np.int16(4), (3, 2)),
        np.frombuffer(b"readonly", dtype=np.uint8),
    ],
    ids=name_of,
)
def test_an_array_keeps_its_type_shape_and_bits(array: np.ndarray[Any, Any]) -> None:
    assert_same({"a": array}, through({"a": array}))


def test_a_foreign_byte_order_becomes_the_native_one() -> None:
    back = through({"a": np.array([1, 2], dtype=">i4")})["a"]
    assert back.dtype == np.dtype(np.int32)
    assert back.tolist() == [1, 2]


def test_objects_with_a_state_are_saved_by_it() -> None:
    back = through({"loader": Loader(7), "nested": [Loader(8), {"x": Loader(9)}]})
    assert back == {"loader": {"position": 7}, "nested": [{"position": 8}, {"x": {"position": 9}}]}


# --- names and aliases --------------------------------------------------------------------------


def test_a_tensor_is_named_by_its_path() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    names = capture({"model": model, "x": [torch.ones(1), {3: torch.ones(2)}]}).tensors
    assert list(names) == ["model.0.weight", "model.0.bias", "x.0", "x.1.3"]


def test_tied_tensors_are_saved_once_and_come_back_tied() -> None:
    weight = torch.ones(4)
    state = {"a": weight, "b": torch.nn.Parameter(weight), "c": weight.numpy(), "d": weight + 0}
    assert list(capture(state).tensors) == ["a", "d"]
    back = through(state)
    back["a"][0] = 9
    assert back["b"][0] == 9
    assert back["c"][0] == 9
    assert back["d"][0] == 1


def test_what_is_tied_across_dicts_is_saved_once_whichever_comes_first() -> None:
    shared, own, empty = torch.ones(4), torch.zeros(4), torch.zeros(0)
    dicts = {"w": shared, "v": own}, {"w": own + 2, "u": shared, "e": empty}
    for first, second in (dicts, dicts[::-1]):
        for cache in (None, {}):
            state = {"first": first, "second": {"in": second}, "last": [shared, own]}
            names = list(capture(state, cache=cache).tensors)
            assert names == list(capture(state, cache=cache).tensors)
            assert len(names) == 4  # shared, own, own + 2, empty
            back = through(state)
            assert back["last"][0] is back["first"]["u" if "u" in first else "w"]
            assert back["last"][0] is back["second"]["in"]["u" if "u" in second else "w"]


@pytest.mark.parametrize(
    "views",
    [
        lambda: (z := torch.tensor([1 + 2j, 3 - 4j]), z.conj()),
        lambda: (z := torch.tensor([1 + 2j]), z.conj().imag, z.imag),
        lambda: (x := torch.arange(6.0), x[:3]),
        lambda: (x := torch.arange(6.0), x[1:], x[:5]),
        lambda: (x := torch.arange(4.0).reshape(2, 2), x.t()),
        lambda: (x := torch.arange(2, dtype=torch.int32), x.view(torch.float32)),
        lambda: (x := torch.arange(4), x.reshape(2, 2)),
        lambda: (torch.zeros(0), torch.zeros(0, 3), torch.zeros(0)),
    ],
)
def test_other_views_of_one_memory_are_not_taken_for_each_other(
    views: Callable[[], tuple[torch.Tensor, ...]],
) -> None:
    state = {str(index): view for index, view in enumerate(views())}
    assert len(capture(state).tensors) == len(state)
    assert_same(state, through(state))


def test_temporaries_do_not_alias_although_their_memory_is_reused() -> None:
    class Fresh(Loader):
        def state_dict(self) -> dict[str, Any]:
            return {"t": torch.full((1000,), float(self.position))}

    back = through({"objects": [Fresh(n) for n in range(20)]})
    assert [d["t"][0].item() for d in back["objects"]] == list(range(20))


def test_nothing_is_copied() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    taken = capture({"w": weight}).tensors["w"]
    assert taken.data_ptr() == weight.data_ptr()
    assert not taken.requires_grad


def test_several_parts_of_one_tensor_on_one_rank_are_parts_of_the_whole() -> None:
    whole = torch.arange(15.0).reshape(5, 3)

    def parts(*cuts: tuple[int, int]) -> TensorParts:
        return TensorParts(tuple(TensorPart(whole[a:b], (a, 0), (5, 3)) for a, b in cuts))

    shards = [Shard({"w": parts((0, 1), (4, 5)), "v": parts((0, 5))}), Shard({"w": parts((1, 4))})]
    assert list(capture({"w": parts((0, 1), (4, 5))}).tensors) == ["w", "w#1"]
    assert torch.equal(read_whole_state(step_of(shards))["w"], whole)
    state = {"w": torch.zeros(5, 3), "v": torch.zeros(5, 3)}
    restore.restore_into(state, step_of(shards), world_size=1)
    assert torch.equal(state["w"], whole)
    assert torch.equal(state["v"], whole)
    with pytest.raises(StateError, match=r"several parts of it; state_dict\(\)"):
        read_state(shards[0].reader())
    with pytest.raises(StateError, match=r"which only dcp\.load fills"):
        restore.restore_into({"w": parts((0, 2), (3, 5)), "v": None}, step_of(shards), world_size=1)
    only_one = [shards[0]]
    with pytest.raises(StateError, match=r"w: no rank has saved the part at \(1, 0\)"):
        read_whole_state(step_of(only_one))


@pytest.fixture
def rank_1_of_4() -> Iterator[None]:
    """This process, under torch's fake process group, in which ranks talk to nobody."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("rank_1_of_4")
def test_a_rank_has_nothing_of_a_tensor_on_a_mesh_that_it_is_not_in() -> None:
    elsewhere = DeviceMesh("cpu", [0, 2])
    tensor = DTensor.from_local(torch.ones(2, 3), elsewhere, [PlacedShard(0)], run_check=False)
    tree = read_tree(capture({"w": tensor}).tree)
    assert tree["w"] == TensorRef("w", "float32", (0, 3), (0, 0), (4, 3))
    number = DTensor.from_local(torch.ones(()), elsewhere, [Replicate()], run_check=False)
    with pytest.raises(StateError, match="on a mesh that this rank is not in"):
        capture({"n": number})


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Point(1, 2), "test_state.Point"),
        (Colour.RED, "test_state.Colour"),
        (Small.ONE, "test_state.Small"),
        (Settings(0.1), "test_state.Settings"),
        (Custom(1), "test_state.Custom"),
        (Half(), "test_state.Half"),
        (Loader, "builtins.type"),
        (defaultdict(int), "collections.defaultdict"),
        (bytearray(b"x"), "builtins.bytearray"),
        (frozenset({1}), "builtins.frozenset"),
        (range(3), "builtins.range"),
        (np.array([object()]), "numpy.ndarray of dtype object"),
        (np.array(["a"]), "numpy.ndarray of dtype <U1"),
        (np.zeros(2, dtype=np.longdouble), "numpy.ndarray of dtype "),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "numpy.ndarray of dtype"),
        (np.datetime64("2026-01-01"), "numpy.datetime64"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_only_pickle_can_hold_is_refused_by_name_with_the_option(
    value: Any, kind: str
) -> None:
    with pytest.raises(StateError) as caught:
        capture({"ok": 1, "a": {"b": [0, value]}})
    assert caught.value.key == "a.b.1"
    assert kind in caught.value.problem
    assert "allow_pickle=True" in caught.value.problem


@pytest.mark.parametrize(
    "value", [Point(1, 2), Colour.RED, Settings(0.1), Custom(1), {Point(1, 2)}], ids=name_of
)
def test_pickle_round_trips_only_where_both_sides_allow_it(value: Any) -> None:
    shard = Shard({"a": [value]}, allow_pickle=True)
    back = read_state(shard.reader(), allow_pickle=True)["a"][0]
    assert back == value
    assert type(back) is type(value)
    with pytest.raises(StateError, match="allow_pickle=True if you trust it"):
        read_state(shard.reader())


def test_what_pickle_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(StateError, match="not me") as caught:
        capture({"a": {"b": Unpicklable()}}, allow_pickle=True)
    assert caught.value.key == "a.b"


def test_a_pickle_that_fails_when_read_is_a_state_error() -> None:
    tree = capture({"a": Bomb()}, allow_pickle=True).tree
    with pytest.raises(StateError, match="boom"):
        read_tree(tree, allow_pickle=True)


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def _sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(2).to_sparse_csr()


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [torch.ones(1), torch.ones(2)]
        return torch.nested.nested_tensor(parts, layout=torch.strided)


def _freed() -> torch.Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: torch.ones(2, device="meta"), "meta device"),
        (lambda: torch.nn.Parameter(torch.ones(2, device="meta")), "meta device"),
        (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
        (_sparse_csr, "sparse_csr"),
        (_quantized, "quantized"),
        (_nested, "nested"),
        (_freed, "freed"),
        (lambda: torch.ones(2).as_subclass(Subclass), "Subclass"),
        (lambda: torch.nn.UninitializedParameter(), "lazy"),
        (lambda: torch.nn.UninitializedBuffer(), "lazy"),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_tensor_without_plain_bytes_is_refused_by_name(
    make: Callable[[], torch.Tensor], problem: str, allow_pickle: bool
) -> None:
    for holder in ([make()], {"0": make(), "other": torch.ones(1)}):
        with pytest.raises(StateError, match=problem) as caught:
            capture({"a": holder}, allow_pickle=allow_pickle)
        assert caught.value.key == "a.0"


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)},
        {"a.b": torch.ones(0), "a": {"b": torch.ones(0)}},
        {"a": {1: torch.ones(1), "1": torch.zeros(1)}, "a.b": 0},
    ],
)
def test_two_tensors_of_one_dotted_name_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="joined by dots"):
        capture(state)


def test_two_values_of_one_dotted_name_are_no_conflict() -> None:
    weight = torch.ones(1)
    for value in (1, weight):  # a number has no name, a tied tensor only one
        state = {"a.b": value, "a": {"b": value}}
        assert_same(state, through(state))


@pytest.mark.parametrize("name", ["__tree__", "__metadata__"])
def test_the_names_of_the_image_itself_are_refused(name: str) -> None:
    with pytest.raises(StateError, match="reserved") as caught:
        capture({name: torch.ones(1)})
    assert caught.value.key == name
    assert through({name: 1}) == {name: 1}


def test_a_name_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(StateError, match="no name for a tensor") as caught:
        capture({"\ud800": torch.ones(1)})
    assert caught.value.key == "\ud800"


@pytest.mark.parametrize("state", [[], None, torch.nn.Linear(1, 1), Loader(), "abc", torch.ones(1)])
def test_a_state_that_is_no_dict_is_refused(state: Any) -> None:
    with pytest.raises(StateError, match=f"not a {type(state).__name__}"):
        capture(state)


@pytest.mark.parametrize(
    "key", [(1, 2), Colour.RED, Small.ONE, np.int64(1), frozenset()], ids=name_of
)
def test_a_key_that_would_change_its_type_is_refused(key: Any) -> None:
    for state in ({"a": {"b": {key: 1}}}, {key: 1}):
        with pytest.raises(StateError, match="neither a string nor a number"):
            capture(state)


@pytest.mark.parametrize(
    "value", [{torch.ones(1)}, {(1, torch.ones(1))}, {Loader()}, Counter({"a": torch.ones(1)})]
)
def test_what_needs_a_name_is_refused_in_a_set(value: Any) -> None:
    with pytest.raises(StateError, match="in a set has no name"):
        capture({"a": value}, allow_pickle=True)


def test_a_container_in_itself_is_refused() -> None:
    loop: list[Any] = [1]
    loop.append({"again": (loop,)})
    counts: Counter[str] = Counter()
    counts["a"] = counts  # type: ignore[assignment]
    for value in (loop, counts):
        with pytest.raises(StateError, match="contains itself") as caught:
            capture({"a": value})
        assert caught.value.key == "a"


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"k": x}])
def test_everything_that_can_be_saved_is_shallow_enough_to_be_read(
    wrap: Callable[[Any], Any],
) -> None:
    value: Any = {(1, 2j)}
    for _ in range(MAX_DEPTH - 3):
        value = wrap(value)
    assert_same({"a": value}, through({"a": value}))
    with pytest.raises(StateError, match=f"more than {MAX_DEPTH} deep"):
        capture({"a": wrap(value)})


def test_tensors_are_as_shallow_as_all_else() -> None:
    value: Any = {"x": torch.ones(1)}
    for _ in range(MAX_DEPTH - 2):
        value = {"k": value}
    assert_same({"a": value}, through({"a": value}))
    with pytest.raises(StateError, match=f"more than {MAX_DEPTH} deep"):
        capture({"a": {"k": value}})


def test_a_target_is_captured_whatever_it_holds() -> None:
    loop = Custom(1)
    rare = {Point(1, 2), 3}, np.ones(2), 2**80
    present = capture_present({"a": loop, "b": [Point(1, 2), torch.ones(1)], "c": (*rare, "d")})
    ref = TensorRef("b.1", "float32", (1,))
    assert present.tree["a"] is None
    assert present.tree["b"] == [None, ref]
    assert type(present.tree["c"]) is tuple
    assert len(present.tree["c"]) == 4
    assert list(present.tensors) == ["b.1"]


# --- hostile trees ------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


def tree_of(code: int, body: bytes) -> bytes:
    return pack({"a": msgpack.ExtType(code, body)})


def ref(*fields: Any) -> bytes:
    return pack(list(fields))


@pytest.mark.parametrize(
    "tree",
    [
        b"",
        b"\xc1",
        pack([1]),
        pack(1),
        pack({"a": 1}) + b"x",
        pack({"a": "long string"})[:-1],
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x90\x01",  # a list as a key
        tree_of(99, b""),
        tree_of(EXT_TENSOR, b""),
        tree_of(EXT_TENSOR, ref("a", "float32", [1])),
        tree_of(EXT_TENSOR, ref(1, "float32", [1], None, None)),
        tree_of(EXT_TENSOR, ref("a", 1, [1], None, None)),
        tree_of(EXT_TENSOR, ref("a", "float32", [-1], None, None)),
        tree_of(EXT_TENSOR, ref("a", "float32", ["1"], None, None)),
        tree_of(EXT_TENSOR, ref("a", "float32", [1.0], None, None)),
        tree_of(EXT_TENSOR, ref("a", "float32", "12", None, None)),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], 7, None)),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], None, {})),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], [0], [2], 7)),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], [0], [2], [["b", [1]]])),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], [0], [2], [[1, [1], [1]]])),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], [0], [2], [["b", [1], [-1]]])),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], [0], [2], [["b", [1], [1]]], 1)),
        tree_of(EXT_TENSOR, ref("a", "float32", [1], None, None, [["b", [1], [1]]])),
        tree_of(EXT_NDARRAY, ref("a", "bfloat16", [1], None, None)),
        tree_of(EXT_NUMPY_SCALAR, pack(["<f8", b""])),
        tree_of(EXT_NUMPY_SCALAR, pack(["<f8", bytes(16)])),
        tree_of(EXT_NUMPY_SCALAR, pack(["O", bytes(8)])),
        tree_of(EXT_NUMPY_SCALAR, pack(["V8", bytes(8)])),
        tree_of(EXT_NUMPY_SCALAR, pack(["<f3", bytes(3)])),
        tree_of(EXT_NUMPY_SCALAR, pack([None, bytes(8)])),
        tree_of(EXT_SET, pack([[]])),
        tree_of(EXT_SET, pack([{}])),
        tree_of(EXT_TORCH_DTYPE, pack("nothing")),
        tree_of(EXT_TORCH_DTYPE, pack("load")),
        tree_of(EXT_TORCH_DTYPE, pack(3)),
        tree_of(EXT_TORCH_SIZE, pack(["x"])),
        tree_of(EXT_TORCH_SIZE, pack(5)),
        tree_of(EXT_DEVICE, pack("nowhere")),
        tree_of(EXT_DEVICE, pack([])),
        tree_of(12, pack([[[], 1]])),
        tree_of(12, pack(5)),
        tree_of(EXT_TYPED, pack(5)),
        tree_of(EXT_TYPED, pack(["a.B"])),
        tree_of(EXT_TYPED, pack([1, {}])),
        tree_of(EXT_TYPED, pack(["a.B", [1]])),
    ],
)
def test_a_hostile_tree_is_a_state_error(tree: bytes) -> None:
    with pytest.raises(StateError):
        read_tree(tree)


def test_a_pickle_is_not_looked_at_unless_allowed() -> None:
    tree = tree_of(EXT_PICKLE, pickle.dumps(Bomb()))
    with pytest.raises(StateError, match="pickled values"):
        read_tree(tree)


def test_nesting_without_end_is_refused_before_the_stack_is() -> None:
    body = pack(1)
    for _ in range(3000):
        body = pack(msgpack.ExtType(EXT_TUPLE, body))
    with pytest.raises(StateError, match="deep"):
        read_tree(tree_of(EXT_TUPLE, body))
    with pytest.raises(StateError, match="deep"):
        read_tree(b"\x81\xa1a" + b"\x91" * 500 + b"\x01")
    with pytest.raises(StateError):
        read_tree(b"\x81\xa1a" + b"\x91" * 100_000 + b"\x01")


@pytest.mark.parametrize("dtype", ["qint8", "quint8", "nothing", "Tensor", ""])
def test_a_reference_to_an_unknown_dtype_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(StateError, match="not known") as caught:
        _ = TensorRef("w", dtype, (1,)).torch_dtype
    assert caught.value.key == "w"


def test_references_are_found_everywhere_a_tied_one_twice() -> None:
    weight = torch.ones(1)
    state = {"a": [weight, (np.ones(2),)], "b": {"c": weight}, "d": 1}
    tree = read_tree(capture(state).tree)
    assert isinstance(tree["a"][1][0], Array)
    assert [ref.name for ref in tensor_refs(tree)] == ["a.0", "a.1.0", "a.0"]


def test_the_same_state_makes_the_same_tree_bytes() -> None:
    words = {f"word{n}" for n in range(50)}
    rebuilt: set[str] = set()
    for word in sorted(words, reverse=True):
        rebuilt.add(word)
    assert capture({"s": words}).tree == capture({"s": rebuilt}).tree


def test_the_stack_of_a_thread_is_enough_for_the_deepest_tree() -> None:
    assert MAX_DEPTH * 40_000 < 4 << 20
    assert sys.getrecursionlimit() > 6 * MAX_DEPTH
