"""What is paired as one is what would have been paired one by one."""

import warnings
import weakref
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.unit.tiered.fake_shard import Shard, assert_same, shard_of
from tiered import alike, bulk, restore
from tiered.boxes import Box
from tiered.errors import StateError
from tiered.image import bytes_of
from tiered.saved_step import SavedStep
from tiered.state import PLAIN, CaptureCache, capture, capture_present, check_tensor


def weights(count: int = 3, fill: float = 0.0) -> dict[str, Any]:
    return {f"w{n}": torch.full((n + 1, 2), fill + n) for n in range(count)}


def found_in(state: dict[str, Any], shard: Shard) -> alike.Alike:
    step = SavedStep([shard.reader()])
    return alike.find_alike(capture_present(state), step.view(0))


def test_a_state_of_tensors_alone_is_one() -> None:
    found = found_in(weights(), Shard(weights(fill=5.0)))
    assert set(found.tensors) == {"w0", "w1", "w2"}


def test_dicts_within_dicts_and_lists_are_found_beside_what_is_not_alike() -> None:
    def state(step: int) -> dict[str, Any]:
        optimizers = [{"state": {0: weights(1), 1: weights(2)}, "lr": step}]
        return {"model": weights(), "optimizers": optimizers, "step": step}

    found = found_in(state(1), Shard(state(2)))
    names = {"optimizers.0.state.0.w0", "optimizers.0.state.1.w0", "optimizers.0.state.1.w1"}
    assert set(found.tensors) == {"model.w0", "model.w1", "model.w2"} | names


def test_a_dtensors_part_is_alike_where_it_is_the_same_part() -> None:
    whole = torch.arange(8.0).reshape(4, 2)
    upper, lower = Box((0, 0), (2, 2)), Box((2, 0), (2, 2))
    present = capture_present({"model": weights(1)})
    (ref,) = present.tree["model"].values()
    for saved, is_found in ((upper, True), (lower, False)):
        part = ref._replace(name="w0", shape=(2, 2), offsets=upper.offsets, global_shape=(4, 2))
        present.tree.update({"w0": part, "model": {}})
        present.tensors["w0"] = torch.zeros(2, 2)
        shard = shard_of({"w0": whole, "model": {}}, {"w0": saved})
        found = alike.find_alike(present, SavedStep([shard.reader()]).view(0))
        assert ("w0" in found.tensors) is is_found


def odd(kind: str) -> dict[str, Any]:
    state = weights()
    match kind:
        case "shape":
            state["w1"] = torch.zeros(1)
        case "dtype":
            state["w1"] = state["w1"].double()
        case "strides":
            state["w1"] = torch.zeros(2, 2).t()
        case "expanded":
            state["w1"] = torch.zeros(1, 2).expand(2, 2)
        case "missing":
            del state["w1"]
        case "more":
            state["w9"] = torch.zeros(1)
        case "number":
            state["w1"] = 7
        case "tied":
            state["w9"] = state["w1"]
    return state


KINDS = ["same", "shape", "dtype", "strides", "expanded", "missing", "more", "number", "tied"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_is_odd_in_any_way_is_left_to_be_looked_at(kind: str) -> None:
    found = found_in({"a": odd(kind), "b": weights()}, Shard({"a": weights(), "b": weights()}))
    assert set(found.tensors) == {"b.w0", "b.w1", "b.w2"}


def test_what_was_pickled_is_compared_with_nothing() -> None:
    def state(fill: float) -> dict[str, Any]:  # no truth value: as of a table of pandas
        return {"w": torch.full((2,), fill), "odd": np.array([fill, "x"], dtype=object)}

    step = SavedStep([Shard(state(5.0), allow_pickle=True).reader()], allow_pickle=True)
    target = state(0.0)
    restore.restore_into(target, step)
    assert_same(target["w"], state(5.0)["w"])
    assert target["odd"].tolist() == [5.0, "x"]


def test_a_dict_that_is_tied_to_another_is_read_once() -> None:
    def state(fill: float) -> dict[str, Any]:
        tied = weights(fill=fill)
        return {"a": tied, "b": tied, "c": {"w": tied["w1"], "lr": fill}}

    shard, target = Shard(state(5.0)), state(0.0)
    step = SavedStep([shard.reader()])
    restore.restore_into(target, step)
    assert_same(target, state(5.0))
    assert sum(step.bytes_by_label.values()) == len(shard.image)


class Keeper:
    """Its state is what it is given: a tensor, or a dict of some."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def state_dict(self) -> Any:
        return self.kept.clone() if isinstance(self.kept, torch.Tensor) else dict(self.kept)

    def load_state_dict(self, state_dict: Any) -> None:
        self.kept = state_dict


def test_an_object_whose_state_is_a_tensor_gets_it() -> None:
    keeper = Keeper(torch.zeros(2))
    restore.restore_into({"o": keeper}, SavedStep([Shard({"o": Keeper(torch.ones(2))}).reader()]))
    assert_same(keeper.kept, torch.ones(2))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("beside", [{}, {"n": 1}])
def test_what_was_tied_and_is_no_more_is_read_once_and_stays_apart(
    is_first: bool, beside: dict[str, Any]
) -> None:
    tied = weights(fill=5.0) | beside  # with a number it is looked at one by one
    saved = {"a": tied, "b": [(tied,)]} if is_first else {"a": [(tied,)], "b": tied}
    shard = Shard(saved, chunk_bytes=16)
    keeper, apart = Keeper(weights() | beside), Keeper(weights() | beside)
    step = SavedStep([shard.reader()])
    state = {"a": keeper, "b": [(apart,)]} if is_first else {"a": [(apart,)], "b": keeper}
    restore.restore_into(state, step)
    assert_same([keeper.kept, apart.kept], [tied, tied])
    assert sum(step.bytes_by_label.values()) == len(shard.image)
    both = [*keeper.kept.values(), *apart.kept.values()]
    places = [value.data_ptr() for value in both if isinstance(value, torch.Tensor)]
    assert len(set(places)) == len(places)


def test_all_that_was_overwritten_is_named_when_an_object_refuses_its_state() -> None:
    class Refuses(Keeper):
        def load_state_dict(self, state_dict: Any) -> None:
            raise ValueError("no")

    tied = {"w": torch.ones(2)}
    saved = {"a": tied, "b": tied, "o": {"x": torch.ones(1)}}
    target = {"a": {"w": torch.zeros(2)}, "b": {"w": torch.zeros(2)}}
    with pytest.raises(StateError, match=r"\['a\.w', 'b\.w', 'o\.x'\]"):
        restore.restore_into(
            {"o": Refuses({"x": torch.zeros(1)}), **target}, SavedStep([Shard(saved).reader()])
        )


def test_objects_get_tensors_without_gradients() -> None:
    def parameters() -> dict[str, Any]:
        return {"w": torch.nn.Parameter(torch.zeros(2)), "v": torch.zeros(2)}

    state, cache = {"o": Keeper(parameters())}, CaptureCache()
    capture(state, cache=cache)
    state["o"].kept["v"].requires_grad_()
    step = SavedStep([Shard({"o": Keeper(parameters())}).reader()])
    restore.restore_into(state, step, present=capture_present(state, cache=cache))
    assert {type(t) for t in state["o"].kept.values()} == {torch.Tensor}
    assert not any(t.requires_grad for t in state["o"].kept.values())


def test_a_tuple_that_looks_like_a_reference_is_a_tuple() -> None:
    ref = ("d.w", "float32", (2,), None, None, ())
    state = {"d": {"w": ref}, "x": torch.zeros(1)}
    restore.restore_into(
        state, SavedStep([Shard({"d": {"w": torch.ones(2)}, "x": torch.ones(1)}).reader()])
    )
    assert_same(state, {"d": {"w": torch.ones(2)}, "x": torch.ones(1)})


def test_memory_that_is_read_into_is_kept() -> None:
    tensors = [torch.zeros(4)]
    place = tensors[0].data_ptr()
    (view,) = bulk.memory(tensors) or ()
    released = weakref.ref(tensors.pop())
    assert released() is not None
    assert view.ctypes.data == place
    del view
    assert released() is None


def outcome(target: Any, shard: Shard, *, strict: bool) -> Any:
    """What a restore does: what it left out, or its error; and the state that it leaves."""
    step = SavedStep([shard.reader()])
    try:
        done: Any = restore.restore_into(target, step, strict=strict)
    except StateError as error:
        done = str(error)
    return done, target, step.bytes_by_label


STATES = st.fixed_dictionaries(
    {},
    optional={key: st.sampled_from(KINDS) for key in ("a", "b")}
    | {"c": st.sampled_from(["a, again", *KINDS])},
)


@given(saved=STATES, present=STATES, is_nested=st.booleans(), strict=st.booleans())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_a_restore_does_the_same_as_one_by_one(
    saved: dict[str, str], present: dict[str, str], is_nested: bool, strict: bool
) -> None:
    def state(kinds: dict[str, str], fill: float) -> dict[str, Any]:
        inner: dict[str, Any] = {k: odd(v) for k, v in kinds.items() if v in KINDS}
        every = list(inner.values())
        if kinds.get("c") == "a, again":
            inner["c"] = inner.get("a", {})
        for dicts in every:
            for value in dicts.values():
                if isinstance(value, torch.Tensor) and value.is_contiguous():
                    value.add_(fill)
        return {"step": fill, "model": inner} if is_nested else inner

    shard = Shard(state(saved, 100), chunk_bytes=16)
    together = outcome(state(present, 0), shard, strict=strict)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(restore, "find_alike", lambda present, view: alike.Alike())
        one_by_one = outcome(state(present, 0), shard, strict=strict)
    assert together[0] == one_by_one[0]
    assert_same(together[1], one_by_one[1])
    assert together[2] == one_by_one[2]


# --- bulk ---------------------------------------------------------------------------------------


def odd_tensors() -> dict[str, torch.Tensor]:
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    with warnings.catch_warnings():  # these two are on their way out of torch
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)
        quantized = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    return {
        "plain": torch.zeros(2, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "bool": torch.zeros(3, dtype=torch.bool),
        "transposed": torch.zeros(2, 3).t(),
        "conjugated": torch.zeros(2, dtype=torch.complex64).conj(),
        "negated": torch.zeros(2, dtype=torch.complex64).conj().imag,
        "meta": torch.zeros(2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "nested": nested,
        "quantized": quantized,
        "freed": freed,
    }


@pytest.mark.parametrize("kind", odd_tensors())
def test_many_are_dense_if_each_by_itself_is_accepted(kind: str) -> None:
    tensor = odd_tensors()[kind]
    assert type(tensor) in PLAIN
    try:
        check_tensor(kind, tensor)
        is_accepted = True
    except StateError:
        is_accepted = False
    others = [torch.zeros(1), torch.zeros(2)]
    assert bulk.are_dense([*others, tensor]) is is_accepted
    assert bulk.are_dense(others)


@pytest.mark.parametrize("kind", ["plain", "empty", "scalar", "parameter", "bool"])
def test_memory_is_what_bytes_of_gives(kind: str) -> None:
    tensors = [odd_tensors()[kind], torch.arange(3.0)]
    views = bulk.memory(tensors)
    assert views is not None
    for tensor, memory in zip(tensors, views, strict=True):
        assert memory.tobytes() == bytes_of(tensor).tobytes()
        memory[:] = 1
        assert bytes_of(tensor).tobytes() == bytes([1]) * tensor.nbytes


@pytest.mark.parametrize("kind", ["transposed", "conjugated", "negated", "meta"])
def test_other_memory_is_not_plain(kind: str) -> None:
    assert bulk.memory([torch.zeros(1), odd_tensors()[kind]]) is None
