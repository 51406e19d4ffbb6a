"""Filling a state in place: what keeps its memory, what is refused, and that training goes on."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ShardOf
from torch.optim import lr_scheduler

from tests.case_names import name_of
from tests.unit.tiered.fake_shard import (
    MemoryTier,
    Shard,
    assert_same,
    raw,
    read_state,
    restore_into,
    step_of,
)
from tiered import restore
from tiered.errors import StateError, StepNotFoundError
from tiered.state import Captured, capture
from tiered.tree import EXT_TENSOR, TensorRef


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.sum().backward()
    torch.optim.SGD([parameter]).step()  # the first step of a process imports a second's worth
    yield
    torch.set_num_threads(threads)


def fill(state: Any, saved: Any, **options: Any) -> Any:
    restore_into(state, Shard(saved, **options).reader(), **options)
    return state


# --- in place -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4096])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(60, 70),
        lambda: torch.zeros(70, 60).t(),
        lambda: torch.zeros(60, 140)[:, ::2],
        lambda: torch.zeros(61, 71)[1:, 1:],
        lambda: torch.zeros(4200).as_strided((60, 70), (1, 60)),
        lambda: torch.nn.Parameter(torch.zeros(60, 70)),
        lambda: torch.zeros(70, 60).requires_grad_().detach().t().requires_grad_(),
        lambda: torch.zeros(60, 70, requires_grad=True) * 1,  # not a leaf
    ],
)
def test_a_tensor_is_filled_in_the_memory_it_has(
    make: Callable[[], torch.Tensor], chunk_bytes: int
) -> None:
    saved = torch.randn(60, 70)
    target = make()
    state = {"x": target, "in": {"dict": [target.detach() * 0, (make(),)]}}
    before = (target.data_ptr(), target.stride(), target.requires_grad, target.is_leaf)
    nested = state["in"]["dict"][0]  # type: ignore[index]
    wanted = {"x": saved, "in": {"dict": [saved + 1, (saved + 2,)]}}
    restore_into(state, Shard(wanted, chunk_bytes).reader())
    assert state["x"] is target
    assert state["in"]["dict"][0] is nested  # type: ignore[index]
    assert (target.data_ptr(), target.stride(), target.requires_grad, target.is_leaf) == before
    assert_same(wanted, state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, dtype=torch.complex64).conj(),
        lambda: torch.zeros(3, 2, dtype=torch.complex64).t().conj()[0],
        lambda: torch.zeros(1, 5, dtype=torch.complex64)[:, 2].expand(1),
    ],
)
def test_a_mirrored_or_oddly_strided_target_gets_the_right_values(
    make: Callable[[], torch.Tensor],
) -> None:
    target = make()
    saved = torch.tensor([1 + 2j, 3 - 4j, -5j])[: target.numel()].to(torch.complex64)
    assert raw(fill({"z": target}, {"z": saved})["z"]) == raw(saved)
    assert target.resolve_conj().tolist() == saved.tolist()


def test_a_parameter_in_the_state_still_trains() -> None:
    saved = torch.tensor([1.0, 2.0])
    for parameter in (
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(4)[::2]),
    ):
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        state = fill({"p": parameter, "list": [parameter]}, {"p": saved, "list": [saved]})
        assert state["list"][0] is parameter
        (parameter**2).sum().backward()
        optimizer.step()
        assert parameter.tolist() == [0.0, 0.0]
        assert parameter.is_leaf


def test_containers_keep_their_identity_and_take_the_saved_order() -> None:
    inner, items, ordered = {"b": 1, "old": 2}, [0, 0, 0], OrderedDict(z=0)
    state = {"d": inner, "l": items, "o": ordered, "t": (1, [2])}
    saved = {"d": {"new": [None], "b": 5}, "l": [1], "o": {"a": 1, "z": 2}, "t": (3, [4, 5])}
    fill(state, saved)
    assert state["d"] is inner
    assert state["l"] is items
    assert state["o"] is ordered
    assert list(inner.items()) == [("new", [None]), ("b", 5)]
    assert list(ordered.items()) == [("a", 1), ("z", 2)]
    assert items == [1]
    assert state["t"] == (3, [4, 5])


@pytest.mark.parametrize(
    ("present", "saved"),
    [
        (0, 10**30),
        (None, {"a": [1]}),
        ({"a": 1}, None),
        ([1, 2], {"a": 1}),
        ({"a": 1}, [1, 2]),
        ([1], (1,)),
        ((1, 2), [1]),
        (defaultdict(list, x=[torch.zeros(1)]), {"x": [torch.ones(1)]}),
        (Counter("a"), Counter("bb")),
        (lambda: 0, 3),
        (object(), {"x": torch.ones(2)}),
        (1.0, torch.ones(2)),
        ({1}, {2, 3}),
        (np.zeros(1), 3),
        ([], [torch.ones(1), np.ones(2)]),
    ],
    ids=name_of,
)
def test_other_values_are_replaced(present: Any, saved: Any) -> None:
    state = fill({"k": present, "in": [present]}, {"k": saved, "in": [saved]})
    assert_same({"k": saved, "in": [saved]}, state)


def test_an_array_that_fits_is_filled_in_place() -> None:
    for make in (lambda: np.zeros((2, 3), dtype=np.int32), lambda: np.zeros((3, 2), dtype="<i4").T):
        array, swapped = make(), make().astype(">i4")
        saved = np.arange(6, dtype=np.int32).reshape(2, 3)
        state = fill({"a": array, "s": [swapped]}, {"a": saved, "s": [saved]})
        assert state["a"] is array
        assert state["s"][0] is swapped
        assert array.tolist() == swapped.tolist() == saved.tolist()


@pytest.mark.parametrize(
    "present",
    [
        np.zeros(5),
        np.zeros((2, 3)),
        np.zeros(3, dtype=np.float32),
        np.zeros(3, dtype=np.int64),
        np.frombuffer(bytes(24)),
        np.array([None] * 3),
    ],
    ids=name_of,
)
def test_an_array_that_does_not_fit_is_replaced_never_cast_or_broadcast(present: Any) -> None:
    saved = np.array([0.1, 0.2, 0.3])
    assert_same({"a": saved}, fill({"a": present}, {"a": saved}))
    one = np.array([7.5])
    assert_same({"a": one}, fill({"a": present}, {"a": one}))


def test_what_was_tied_fills_both_where_it_is_not_any_more() -> None:
    weight = torch.arange(3.0)
    state = {"a": torch.zeros(3), "b": torch.zeros(6)[::2], "c": torch.zeros(3, 2).t()[0]}
    fill(state, {"a": weight, "b": weight, "c": weight})
    assert [t.tolist() for t in state.values()] == [weight.tolist()] * 3


def test_a_tied_array_and_a_strided_parameter_are_both_filled() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4)[::2])
    saved = torch.tensor([1.0, 2.0])
    state = {"p": parameter, "a": np.zeros(2, dtype=np.float32)}
    fill(state, {"p": saved, "a": saved.numpy()})
    assert parameter.tolist() == state["a"].tolist() == [1.0, 2.0]  # type: ignore[union-attr]


def test_what_was_not_tied_is_refused_where_it_now_is() -> None:
    one = torch.zeros(2)
    with pytest.raises(StateError, match=r"'b'.*same memory as a"):
        fill({"a": one, "b": one}, {"a": torch.ones(2), "b": torch.zeros(2)})
    assert one.tolist() == [0, 0]
    empty = torch.zeros(0)
    fill({"a": empty, "b": empty}, {"a": torch.zeros(0), "b": torch.zeros(0)})


def test_an_empty_tensor_is_filled_whatever_its_strides() -> None:
    state = {"a": torch.zeros(2, 3)[:, :0], "b": torch.zeros(1, 0).expand(4, 0)}
    fill(state, {"a": torch.zeros(2, 0), "b": torch.zeros(4, 0)})


def test_views_that_share_a_part_are_restored_together() -> None:
    def views(base: torch.Tensor) -> dict[str, Any]:
        return {"whole": base, "head": base[:4], "tail": base[2:]}

    state = fill(views(torch.zeros(6)), views(torch.arange(6.0)))
    assert_same(views(torch.arange(6.0)), state)


# --- refusals, before anything is overwritten ---------------------------------------------------


def refusal(state: dict[Any, Any], saved: dict[Any, Any]) -> StateError:
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(StateError) as caught:
        fill(state, saved)
    for key, tensor in tensors.items():
        assert raw(tensor) == raw(state[key])
    return caught.value


def test_all_missing_and_unexpected_keys_are_named_at_once() -> None:
    error = refusal(
        {"ok": torch.zeros(2), "m1": 1, "m2": 2}, {"ok": torch.ones(2), "u1": 1, 3: 2, None: 0}
    )
    for key in ("m1", "m2", "u1", "3", "None"):
        assert f"'{key}'" in str(error)
    assert "'ok'" not in str(error)
    assert error.key == "m1"
    assert refusal({"ok": torch.zeros(2)}, {"ok": torch.ones(2), "u": 1}).key == "u"


def test_all_tensors_that_do_not_fit_are_named_at_once() -> None:
    def tensors(make: Callable[..., torch.Tensor]) -> dict[str, Any]:
        return {"ok": make(2), "n": {"ok": make(1)}}

    state = {
        **tensors(torch.zeros),
        "shape": torch.zeros(2),
        "dtype": torch.zeros(2),
        "kind": torch.zeros(2),
        "array": torch.zeros(2),
        "expanded": torch.zeros(1).expand(2),
        "deep": {"list": [1, (torch.zeros(3, 1),)]},
    }
    saved = {
        **tensors(torch.ones),
        "shape": torch.ones(3),
        "dtype": torch.ones(2).half(),
        "kind": 7,
        "array": np.ones(2, dtype=np.float32),
        "expanded": torch.ones(2),
        "deep": {"list": [1, (torch.ones(1, 3),)]},
    }
    text = str(refusal(state, saved))
    assert "shape: was saved with shape [3], and has [2]" in text
    assert "dtype: was saved as float16, and is float32" in text
    assert "kind: is a tensor, and what was saved is not" in text
    assert "array: is a tensor, and what was saved is not" in text
    assert "expanded: is expanded" in text
    assert "deep.list.1.0: was saved with shape [1, 3], and has [3, 1]" in text
    assert "ok" not in text
    assert state["n"]["ok"].item() == 0  # type: ignore[index]


def test_a_pickle_in_the_checkpoint_is_refused_before_anything_is_overwritten() -> None:
    shard = Shard({"x": torch.ones(2), "y": frozenset({1})}, allow_pickle=True)
    state = {"x": torch.zeros(2), "y": None}
    with pytest.raises(StateError, match="allow_pickle=True"):
        restore_into(state, shard.reader())
    assert state["x"].tolist() == [0, 0]  # type: ignore[union-attr]
    restore_into(state, shard.reader(), allow_pickle=True)
    assert_same({"x": torch.ones(2), "y": frozenset({1})}, state)


def test_a_target_without_memory_is_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"'m.weight'.*meta device"):
        fill({"m": torch.nn.Linear(1, 1, device="meta")}, {"m": torch.nn.Linear(1, 1)})


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 4), (3,), (2, 0)])
def test_a_tree_that_lies_about_a_shape_is_refused_without_allocating(
    shape: tuple[int, ...],
) -> None:
    lie = msgpack.ExtType(EXT_TENSOR, TensorRef("x", "float32", shape).pack())
    shard = Shard(Captured(msgpack.packb({"x": lie}), {"x": torch.ones(2)}))
    with pytest.raises(StateError, match="8 bytes saved") as caught:
        read_state(shard.reader())
    assert caught.value.key == "x"


def test_a_tree_that_names_what_the_image_has_not_is_refused() -> None:
    tree = capture({"x": torch.ones(2), "y": torch.ones(2)}).tree
    with pytest.raises(StateError, match="its image does not have it") as caught:
        read_state(Shard(Captured(tree, {"x": torch.ones(2)})).reader())
    assert caught.value.key == "y"


def test_a_tensor_that_the_tree_does_not_name_is_passed_over() -> None:
    tree = capture({"x": torch.ones(2)}).tree
    tensors = {"x": torch.ones(2), "a": torch.zeros(2000), "z": torch.zeros(2000)}
    assert_same({"x": torch.ones(2)}, read_state(Shard(Captured(tree, tensors)).reader()))


def test_a_chunk_that_is_lost_on_the_way_is_named() -> None:
    shard = Shard({"x": torch.ones(5000)})
    tier = MemoryTier(shard.chunks)
    tier.corrupt = {2}
    with pytest.raises(StepNotFoundError, match=r"chunk 2 of .* is corrupt"):
        restore_into({"x": torch.zeros(5000)}, shard.reader(tier))


# --- objects with a state of their own ----------------------------------------------------------


class Net(torch.nn.Module):
    """Tied weights, buffers, an odd layout and a scalar."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.inp = torch.nn.Linear(4, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.out = torch.nn.Linear(6, 6)
        self.out.weight = torch.nn.Parameter(torch.randn(6, 6).t())
        self.head = torch.nn.Linear(6, 6)
        self.head.weight = self.out.weight
        self.scale = torch.nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.inp(x)).relu()
        return self.head(self.out(hidden)) * self.scale


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adam with a tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
}


class Training:
    """A small run; everything it is made of is in `state`."""

    def __init__(self, seed: int, optimizer: str) -> None:
        self.net = Net(seed)
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.schedulers = [
            lr_scheduler.MultiStepLR(self.optimizer, [2, 4], gamma=0.5),
            lr_scheduler.StepLR(self.optimizer, 3),
        ]
        self.state: dict[str, Any] = {
            "net": self.net,
            "optimizer": self.optimizer,
            "schedulers": self.schedulers,
        }

    def run(self, first: int, stop: int) -> list[bytes]:
        for step in range(first, stop):
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            self.net(torch.randn(8, 4)).square().mean().backward()
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
        return [raw(t) for t in self.net.state_dict().values()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm_steps", [0, 2], ids=["fresh", "warm"])
def test_training_goes_on_bit_for_bit(name: str, warm_steps: int) -> None:
    original = Training(1, name)
    original.run(0, 3)
    shard = Shard(original.state)
    expected = original.run(3, 6)

    resumed = Training(2, name)
    resumed.run(0, warm_steps)
    memory = [p.data_ptr() for p in resumed.net.parameters()]
    identities = [id(p) for p in resumed.net.parameters()]
    restore_into(resumed.state, shard.reader())
    assert resumed.run(3, 6) == expected
    assert [p.data_ptr() for p in resumed.net.parameters()] == memory
    assert [id(p) for p in resumed.net.parameters()] == identities
    assert resumed.net.head.weight is resumed.net.out.weight
    assert resumed.state["schedulers"] == resumed.schedulers
    assert original.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("key", [-(2**63) - 1, 2**63, 2**64, -1])
def test_a_dict_with_keys_of_any_size_is_filled(key: int) -> None:
    target = torch.zeros(2)
    state = fill({"a": {key: target, "x": {key: 1}}}, {"a": {key: torch.ones(2), "x": {key: 2}}})
    assert state["a"][key] is target
    assert target.tolist() == [1, 1]
    assert state["a"]["x"] == {key: 2}


def test_an_optimizer_keeps_its_int_keys() -> None:
    training = Training(1, "sgd")
    training.run(0, 1)
    back = read_state(Shard(training.state).reader())["optimizer"]
    assert list(back["state"]) == [0, 1, 2, 3, 4, 5, 6, 7][: len(back["state"])]
    assert back["param_groups"][0]["params"] == list(range(len(back["state"])))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 3]),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_where_it_was(name: str) -> None:
    def run() -> tuple[dict[str, Any], Callable[[int], list[float]]]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)

        def rates(count: int) -> list[float]:
            seen = []
            for _ in range(count):
                optimizer.step()
                scheduler.step()
                seen.append(optimizer.param_groups[0]["lr"])
            return seen

        return {"optimizer": optimizer, "scheduler": scheduler}, rates

    state, rates = run()
    rates(2)
    shard = Shard(state)
    resumed, resumed_rates = run()
    restore_into(resumed, shard.reader())
    assert resumed_rates(4) == rates(4)


def test_objects_in_lists_tuples_and_dicts_are_filled_not_replaced() -> None:
    def nets(value: float) -> list[torch.nn.Linear]:
        made = [torch.nn.Linear(2, 2) for _ in range(3)]
        for net in made:
            torch.nn.init.constant_(net.weight, value)
        return made

    mine, theirs = nets(0.0), nets(1.0)

    def arrange(n: list[torch.nn.Linear]) -> dict[str, Any]:
        return {"l": [n[0]], "t": (n[1],), "d": {"x": n[2]}}

    state = fill(arrange(mine), arrange(theirs))
    assert state["l"] == [mine[0]]
    assert state["t"] == (mine[1],)
    assert state["d"] == {"x": mine[2]}
    assert all(net.weight.min() == 1 for net in mine)


def test_what_does_not_fit_a_module_is_named_before_anything_is_overwritten() -> None:
    net = torch.nn.Linear(2, 3)
    before = raw(net.weight)
    with pytest.raises(StateError, match=r"net.weight: .*\[2, 2\].*net.bias: .*\[2\]"):
        fill({"net": net}, {"net": torch.nn.Linear(2, 2)})
    with pytest.raises(StateError, match=r"not saved: \['net.bias'\]"):
        fill({"net": net}, {"net": torch.nn.Linear(2, 3, bias=False)})
    with pytest.raises(StateError, match="was saved as bfloat16, and is float32"):
        fill({"net": net}, {"net": torch.nn.Linear(2, 3, dtype=torch.bfloat16)})
    assert raw(net.weight) == before


def test_an_object_that_refuses_its_state_is_named_with_what_has_changed() -> None:
    class Refuses(torch.nn.Module):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("not today")

    state = {"a": torch.zeros(1), "b": Refuses()}
    with pytest.raises(StateError, match=r"not today; changed already: \['a'\]") as caught:
        fill(state, {"a": torch.ones(1), "b": {}})
    assert caught.value.key == "b"


def test_a_model_that_became_tied_decides_for_itself() -> None:
    class Two(torch.nn.Module):
        def __init__(self, *, tied: bool) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.full((2,), 1.0))
            self.b = self.a if tied else torch.nn.Parameter(torch.full((2,), 2.0))

    net, plain = Two(tied=True), Two(tied=True)
    fill({"net": net}, {"net": Two(tied=False)})
    plain.load_state_dict(Two(tied=False).state_dict())
    assert net.a.tolist() == plain.a.tolist() == [2.0, 2.0]


def test_an_object_gets_memory_of_its_own_for_what_it_has_not() -> None:
    shard = Shard({"net": torch.nn.Linear(2, 2, bias=False)})
    tier = MemoryTier(shard.chunks)
    state = read_state(shard.reader(tier))
    state["net"]["weight"].fill_(9)
    assert_same(read_state(shard.reader(tier)), read_state(shard.reader()))


def test_tied_tensors_are_read_back_tied_into_memory_of_their_own() -> None:
    weight = torch.ones(3)
    back = read_state(Shard({"a": weight, "b": [weight], "c": weight.numpy()}).reader())
    assert back["a"].data_ptr() == back["b"][0].data_ptr() == back["c"].ctypes.data
    assert back["a"].data_ptr() != weight.data_ptr()


# --- parts of a DTensor -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_run(mesh: DeviceMesh, seed: int) -> tuple[dict[str, Any], Callable[[], list[bytes]]]:
    torch.manual_seed(seed)
    net = torch.nn.Linear(4, 2, bias=False)
    net.weight = torch.nn.Parameter(distribute_tensor(net.weight.data, mesh, [ShardOf(0)]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, foreach=False)

    def step() -> list[bytes]:
        optimizer.zero_grad()
        net.weight.square().sum().backward()
        optimizer.step()
        weight = net.weight
        assert isinstance(weight, DTensor)
        return [raw(weight.to_local())]

    return {"net": net, "optimizer": optimizer}, step


def test_a_sharded_model_goes_on_bit_for_bit(mesh: DeviceMesh) -> None:
    state, step = sharded_run(mesh, 1)
    step()
    shard = Shard(state)
    expected = step()
    resumed, resumed_step = sharded_run(mesh, 2)
    resumed_step()
    restore_into(resumed, shard.reader())
    assert resumed_step() == expected


def test_an_optimizer_before_its_first_step_is_filled_as_its_parameters_are_sharded(
    mesh: DeviceMesh,
) -> None:
    state, step = sharded_run(mesh, 1)
    step()
    shard = Shard(state)
    expected = step()
    resumed, resumed_step = sharded_run(mesh, 2)
    restore_into(resumed, shard.reader())
    (weight,) = resumed["optimizer"].state.values()
    assert isinstance(weight["exp_avg"], DTensor)
    assert resumed_step() == expected


def test_a_part_is_refused_where_nothing_says_how_to_cut_it(mesh: DeviceMesh) -> None:
    class Averages:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: Any) -> None:
            raise AssertionError

    part = distribute_tensor(torch.ones(4), mesh, [ShardOf(0)])
    with pytest.raises(StateError, match=r"averages\.w: .*make it first"):
        fill({"averages": Averages()}, {"averages": {"w": part}})


def test_a_part_becomes_a_whole_and_a_whole_a_part(mesh: DeviceMesh) -> None:
    part = distribute_tensor(torch.ones(4), mesh, [ShardOf(0)])
    state = fill({"w": distribute_tensor(torch.zeros(4), mesh, [ShardOf(0)])}, {"w": part})
    assert isinstance(state["w"], DTensor)
    assert state["w"].to_local().tolist() == [1.0] * 4
    assert fill({"w": torch.zeros(4)}, {"w": part})["w"].tolist() == [1.0] * 4
    target = distribute_tensor(torch.zeros(4), mesh, [ShardOf(0)])
    assert fill({"w": target}, {"w": torch.ones(4)})["w"].to_local().tolist() == [1.0] * 4
    with pytest.raises(StateError, match=r"shape \[4\], and has \[5\]"):
        fill({"w": distribute_tensor(torch.zeros(5), mesh, [ShardOf(0)])}, {"w": part})


@pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
@pytest.mark.parametrize("part_first", [True, False])
def test_of_two_that_were_tied_one_may_be_a_part_now(mesh: DeviceMesh, part_first: bool) -> None:
    class Net(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

    plain = Net(torch.zeros(4))
    part = Net(distribute_tensor(torch.zeros(4), mesh, [ShardOf(0)]))
    names = ("b", "a") if part_first else ("a", "b")
    tied = Net(torch.arange(4.0))
    fill(dict(sorted(zip(names, (plain, part), strict=True))), {"a": tied, "b": tied})
    assert raw(plain.weight) == raw(tied.weight)
    assert isinstance(part.weight, DTensor)
    assert raw(part.weight.to_local()) == raw(tied.weight)
    assert plain.weight.data_ptr() != part.weight.to_local().data_ptr()


def test_a_sharded_tensor_is_saved_as_the_part_that_it_is(mesh: DeviceMesh) -> None:
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards

    local = LocalShard.from_tensor_and_offsets(torch.arange(6.0).reshape(3, 2), [0, 0], 0)
    whole = init_from_local_shards([local], 3, 2)
    assert fill({"w": torch.zeros(3, 2)}, {"w": whole})["w"].tolist() == [[0, 1], [2, 3], [4, 5]]
    target = distribute_tensor(torch.zeros(3, 2), mesh, [ShardOf(0)])
    assert fill({"w": target}, {"w": whole})["w"].to_local().sum() == 15


class Holder(torch.nn.Module):
    """A module with buffers of these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.zeros(1))


def test_what_a_module_has_no_more_is_named_after_other_ranks_were_looked_at() -> None:
    ranks = [Shard({"m": Holder("a", "old")}) for _ in range(2)]
    target = {"m": Holder("a", "new")}
    filled = restore.restore_into(target, step_of(ranks), 0, 2, strict=False)
    assert (filled.missing, filled.unexpected) == (("m.new",), ("m.old",))


@pytest.mark.parametrize("wrap", [lambda m: [m], lambda m: (1, [m]), lambda m: {"k": m}])
def test_what_a_module_in_any_container_has_no_more_is_refused(wrap: Callable[[Any], Any]) -> None:
    error = refusal({"c": wrap(Holder("a"))}, {"c": wrap(Holder("a", "old"))})
    assert "saved but not in the state: ['c." in str(error)
    assert ".old']" in str(error)
