"""Filling a state from a step: planned and checked as a whole first, then in place.

The step may have been saved by another number of ranks, or sharded in another way: of each tensor
a rank reads the part that it holds now, from whichever shards have it. What is no part of a whole
(plain tensors, numbers, objects) a rank takes from the shard of its own rank; a rank that the step
does not have takes it from the shard of rank r mod N, but for objects that are each rank's own
(`tiered.PerRank`), which it leaves as they are.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from tiered import torch_versions, typed
from tiered.alike import Alike, find_alike
from tiered.boxes import Box, whole
from tiered.collector import collector_paused
from tiered.errors import StateError
from tiered.filling import Filling, is_same_type
from tiered.rng import is_per_rank
from tiered.saved_step import SavedStep
from tiered.state import PLAIN, Present, capture_present, is_stateful, place_of
from tiered.step_index import StepIndex, listed, merged
from tiered.tensor_reads import Wanted, read_tensors
from tiered.tree import (
    Path,
    TensorRef,
    check_makable,
    copied,
    dotted,
    leaves,
    materialise,
    replaced,
    unmakable,
    value_at,
)

if TYPE_CHECKING:  # torch_versions says why not at run time
    from torch.distributed.tensor import DTensor

_SAME_MEMORY = "is the same memory as"


@dataclass(frozen=True, slots=True)
class Filled:
    """What a restore left out; each a key in the state, joined with dots.

    Attributes:
        missing: In the state, and not saved: left as they were. Only with `strict=False`.
        unexpected: Saved, and not in the state: not read. Only with `strict=False`.
        kept: Objects of each rank's own that the step has none of for this rank: left as they were.
        is_resharded: Other shards than this rank's own were looked at.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    is_resharded: bool = False


def restore_into(
    state: MutableMapping[str, Any],
    step: SavedStep,
    rank: int = 0,
    world_size: int | None = None,
    *,
    strict: bool = True,
    present: Present | None = None,
) -> Filled:
    """Fill `state` in place from a step.

    Tensors keep their memory where name, shape and dtype agree, which is required of those that
    stand in `state` itself, in its dicts, lists and tuples, or in a module. An object with
    load_state_dict gets the saved state, whole, even where it had none yet (an optimizer before its
    first step). A numpy array that fits is filled in place; other values are replaced.

    Args:
        state: What to fill.
        step: From what.
        rank: Whose part of it.
        world_size: Ranks that restore it; None: as many as saved it.
        strict: Refuse keys that are missing or too many; else leave them out and say so.
        present: What `capture_present` says of the state, if it was asked already.

    Raises:
        StateError: Keys are missing or too many, or a tensor does not fit; says which, all of
            them, before anything is overwritten. Or an object refused its state. Or a part is
            wanted of a plain tensor that was different on each rank.
        WorldSizeError: Tensors are different on each rank, and no DTensors, so that another number
            of ranks cannot have them.
        StepNotFoundError: No tier has an intact copy of some chunk. Says which tensors in `state`
            are part old, part new: they are not to be used.
    """
    with closing(step), collector_paused():
        is_same_world = world_size in (None, step.world_size)
        target = _Target(state, capture_present(state) if present is None else present)
        donor = rank if is_same_world else rank % step.world_size
        if not is_same_world and rank >= step.world_size:
            target.keep_own()
        plan = None
        if is_same_world:
            plan = _Plan(target, step, [donor], strict=strict)
        if plan is None or (step.world_size > 1 and plan.needs_others):
            others = [r for r in range(step.world_size) if r != donor]
            plan = _Plan(target, step, [donor, *others], strict=strict)
            if is_same_world:
                plan.check_cut()
            else:
                plan.check_replicas(world_size or step.world_size)
        plan.check()
        read_tensors(step, plan.index, plan.wanted.values(), step.nearest(rank), plan.alike)
    _fill(state, target, plan)
    return Filled(
        tuple(plan.missing), tuple(plan.unexpected), tuple(target.kept.values()),
        is_resharded=len(plan.index.views) > 1,
    )  # fmt: skip


def read_state(step: SavedStep, rank: int = 0) -> dict[Any, Any]:
    """Return one rank's state in memory of its own: containers, numbers, CPU tensors.

    Of a tensor that was sharded it is the rank's part.
    """
    with closing(step):
        view = step.view(rank)
        check_makable(view.tree)
        index = StepIndex([view])
        wanted: dict[str, Wanted] = {}
        for path, ref in leaves(view.tree):
            if ref.more:
                problem = "the rank has several parts of it; state_dict() puts them together"
                raise StateError(dotted(path), problem)
            box = index.entries[dotted(path)].parts[0].box
            wanted.setdefault(ref.name, Wanted(dotted(path), box))
        read_tensors(step, index, wanted.values(), lambda r: r)
    return _put_together(view.tree, wanted)


def read_whole_state(step: SavedStep) -> dict[Any, Any]:
    """Return the whole state, every sharded tensor put together, in memory of its own.

    Of what each rank has one of, it is the lowest rank's.
    """
    with closing(step):
        views = step.views()
        index, tree = StepIndex(views), merged(views)
        check_makable(tree)
        wanted: dict[str, Wanted] = {}
        for path, ref in leaves(tree):
            entry = index.entries[dotted(path)]
            wanted.setdefault(ref.name, Wanted(entry.path, whole(entry.shape)))
        check_whole(index, wanted)
        read_tensors(step, index, wanted.values(), lambda r: r)
    return _put_together(tree, wanted)


def check_whole(index: StepIndex, wanted: Mapping[str, Wanted]) -> None:
    """Refuse a tensor of which no rank has saved some part.

    Raises:
        StateError: There is one; names them all.
    """
    gaps = {
        one.path: f"no rank has saved the part at {left[0].offsets} of shape {left[0].shape}"
        for one in wanted.values()
        if (left := index.reads(one.path, one.box, lambda r: r)[1])
    }
    if gaps:
        raise StateError(next(iter(gaps)), listed(gaps))


def _put_together(tree: Any, wanted: Mapping[str, Wanted]) -> dict[Any, Any]:
    result: dict[Any, Any] = materialise(tree, {name: one.tensor for name, one in wanted.items()})
    return result


# --- the plan -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Target:
    """The user's state, as it is.

    Attributes:
        state: It.
        present: What it was taken apart into.
        kept: By id, the paths of objects that are not to be touched.
    """

    state: MutableMapping[str, Any]
    present: Present
    kept: dict[int, str] = field(default_factory=dict)

    def keep_own(self) -> None:
        """Let objects of each rank's own be as they are."""
        for path, value in objects_in(self.state):
            if is_per_rank(value):
                self.kept[id(value)] = dotted(path)


class _Plan:
    """What a rank reads of a step, and everything that is wrong with that.

    Attributes:
        tree: What the state is to become; its references are by name in `alike` and `wanted`.
        alike: What is read as it was saved; only if one rank's shard is looked at.
        wanted: What is read beside it.
        sharded: The DTensors of the state that are filled, by the same names.
        apart: Tensors of the state that were tied to others when they were saved, and are no more,
            by the names that their references in `tree` have got.
        missing, unexpected: Keys.
        problems: By path, why a tensor cannot be filled.
    """

    def __init__(self, target: _Target, step: SavedStep, ranks: list[int], *, strict: bool) -> None:
        views = [step.view(ranks[0])] if len(ranks) == 1 else step.views(ranks[0])
        self.step, self.strict = step, strict
        self.own = views[0].tree  # what others have beside that is not unexpected
        self.tree = copied(merged(views))  # of which some is left out below
        self.alike = Alike()
        if len(views) == 1 and not target.kept:
            views = [replace(views[0], tree=self.tree)]
            self.alike = find_alike(target.present, views[0])
        self.index = StepIndex(views, self.alike.trees)
        self.wanted: dict[str, Wanted] = {}
        self.sharded: dict[str, DTensor] = {
            name: one for name, one in target.present.sharded.items() if name in self.alike.tensors
        }
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.problems: dict[str, str] = {}
        self.gaps: dict[str, str] = {}  # what other ranks may have
        self.apart: dict[str, torch.Tensor] = {}
        self._renamed: dict[Path, TensorRef] = {}
        self._owners = {name: name for name in self.alike.tensors}
        self._readers = dict(self._owners)
        self._target = target
        self._templates = templates(target.state, self.tree)
        self._match_keys()
        is_alike = id(self.tree) in self.alike.trees
        for key, value in () if is_alike else target.state.items():
            if key in self.tree:
                self._match(value, target.present.tree[key], self.tree[key], (key,), is_strict=True)
                self._want_rest(self.tree[key], (key,))
                self.problems |= {dotted(p): what for p, what in unmakable(self.tree[key], (key,))}
        for path, ref in self._renamed.items():
            self.tree = replaced(self.tree, path, ref)

    @property
    def needs_others(self) -> bool:
        """Whether other ranks' shards may have what these do not, or have something else."""
        return bool(self.missing or self.gaps or self.problems or self.index.cut(self._boxes))

    def check(self) -> None:
        """Refuse what cannot be filled.

        Raises:
            StateError: There is something; names everything.
        """
        if self.strict and (self.missing or self.unexpected):
            raise StateError(
                (self.missing or self.unexpected)[0],
                f"the state has keys that were not saved: {self.missing}; saved but not in the "
                f"state: {self.unexpected}; give a state with the keys of the saved one, or leave "
                "them out with strict=False",
            )
        if problems := self.problems | self.gaps:
            raise StateError(next(iter(problems)), listed(problems))

    def check_cut(self) -> None:
        """See `StepIndex.check_cut`."""
        self.index.check_cut(self._boxes)

    @property
    def _boxes(self) -> list[tuple[str, Box]]:
        return [(one.path, one.box) for one in self.wanted.values()]

    def check_replicas(self, world_size: int) -> None:
        """See `StepIndex.check_replicas`; what is each rank's own may differ."""
        own = [dotted(p) + "." for p, value in objects_in(self._target.state) if is_per_rank(value)]
        wanted = [one.path for one in self.wanted.values()]
        paths = [path for path in wanted if not path.startswith(tuple(own))]
        self.index.check_replicas(paths, world_size, str(self.step))

    def _match_keys(self) -> None:
        state = self._target.state
        self.missing += [str(key) for key in state if key not in self.tree]
        self.unexpected += [str(key) for key in self.own if key not in state]

    def _match(self, value: Any, current: Any, saved: Any, path: Path, *, is_strict: bool) -> None:
        """Pair the state's tensors with the saved ones; a strict one has to fit.

        Those of a module have to, too; other objects decide about their state for themselves.
        """
        if id(value) in self._target.kept or id(saved) in self.alike.trees:
            return
        if isinstance(current, TensorRef):
            problem = self._pair(current, saved, path)
            is_tied_anew = problem.startswith(_SAME_MEMORY)
            if problem and is_strict and not (is_tied_anew and value is None):
                self.problems[dotted(path)] = problem
        elif is_stateful(value):
            module = isinstance(value, torch.nn.Module)
            if module and type(current) is dict and type(saved) is dict:
                self._match_module(current, saved, path)
            self._match(None, current, saved, path, is_strict=module)
        elif type(current) is dict and type(saved) is dict:
            inner = value if isinstance(value, Mapping) else {}
            for key in current:
                if key in saved:
                    three = inner.get(key), current[key], saved[key]
                    self._match(*three, (*path, key), is_strict=is_strict)
                elif inner and any(leaves(current[key])):  # a tensor that would be dropped
                    self.missing.append(dotted((*path, key)))
        elif type(current) in (list, tuple) and type(saved) is type(current):
            items = value if isinstance(value, list | tuple) else [None] * len(current)
            for number, three in enumerate(zip(items, current, saved, strict=False)):
                self._match(*three, (*path, number), is_strict=is_strict)
        elif is_same_type(current, saved):
            for name in current.content.keys() & saved.content.keys():
                inner = typed.field_of(value, current, name)
                three = inner, current.content[name], saved.content[name]
                self._match(*three, (*path, name), is_strict=is_strict)

    def _match_module(self, current: Mapping[Any, Any], saved: dict[Any, Any], path: Path) -> None:
        self.missing += [dotted((*path, key)) for key in current if key not in saved]
        own = value_at(self.own, path)
        for key in [key for key in saved if key not in current]:
            if isinstance(own, dict) and key in own:
                self.unexpected.append(dotted((*path, key)))
            del saved[key]  # another stage's of a pipeline, or left out

    def _pair(self, current: TensorRef, saved: Any, path: Path) -> str:
        """Want a saved tensor for one of the state's; return why that cannot be."""
        if not isinstance(saved, TensorRef):
            return "is a tensor, and what was saved is not"
        if current.more:
            return "is a ShardedTensor with several local shards, which only dcp.load fills"
        entry = self.index.entries[dotted(path)]
        box, shape = whole(current.shape), current.shape
        if current.global_shape is not None:
            box, shape = Box(current.offsets or (), current.shape), current.global_shape
        if shape != entry.shape:
            return f"was saved with shape {list(entry.shape)}, and has {list(shape)}"
        if current.dtype != entry.dtype:
            return f"was saved as {entry.dtype}, and is {current.dtype}"
        tensor = self._target.present.tensors[current.name]
        if _overlaps_itself(tensor):
            return "is expanded, its elements share memory; give a contiguous() copy"
        if self._owners.setdefault(current.name, saved.name) != saved.name:
            return f"{_SAME_MEMORY} {current.name}, and was not when saved"
        whole_tensor = self._target.present.sharded.get(current.name)
        is_first = self._readers.setdefault(saved.name, current.name) == current.name
        if saved.name in self.alike.tensors and current[1:] == saved[1:]:
            if not is_first:
                self.alike.copies.append((saved.name, entry.path, tensor))
        else:
            one = self._want(saved.name, entry.path, box)
            if one.box != box:  # saved tied, sharded in two ways now
                is_first = False
                one = self._want(_apart(saved, entry.path), entry.path, box)
            one.targets.append(tensor)  # perhaps again: tied, it is one tensor
        if not is_first:
            self.apart[_apart(saved, entry.path)] = tensor if whole_tensor is None else whole_tensor
            self._renamed[path] = saved._replace(name=_apart(saved, entry.path))
        elif whole_tensor is not None:
            self.sharded.setdefault(saved.name, whole_tensor)
        return ""

    def _want(self, name: str, path: str, box: Box) -> Wanted:
        one = self.wanted.setdefault(name, Wanted(path, box))
        if left := self.index.reads(path, box, lambda rank: rank)[1]:
            self.gaps[path] = (
                f"no rank that was looked at has saved the part at {left[0].offsets} of shape "
                f"{left[0].shape}"
            )
        return one

    def _want_rest(self, tree: Any, path: Path) -> None:
        """What no tensor of the state is there for: an optimizer's state before its first step."""
        kept = set(self._target.kept.values())
        for inner, ref in leaves(tree, path, self.alike.trees):
            is_read = ref.name in self.wanted or ref.name in self.alike.tensors
            if is_read or dotted(inner) in self.problems:
                continue
            if kept and any(dotted(inner[:depth]) in kept for depth in range(1, len(inner))):
                continue
            entry = self.index.entries[dotted(inner)]
            template = self._templates.get(entry.path)
            if torch_versions.is_dtensor(template) and tuple(template.shape) == entry.shape:
                local = template.to_local()
                box = Box(place_of(template), tuple(local.shape))
                one = self._want(ref.name, entry.path, box)
                memory = torch.empty_like(local, dtype=ref.torch_dtype, requires_grad=False)
                one.targets.append(memory)
                self.sharded[ref.name] = type(template).from_local(
                    memory, template.device_mesh, template.placements, run_check=False,
                    shape=template.shape, stride=template.stride(),
                )  # fmt: skip
            elif entry.is_sharded and template is None:
                self.problems[entry.path] = (
                    "was saved as parts of a DTensor, and the state has no such DTensor to fill; "
                    "make it first (an optimizer's by a step with zero gradients)"
                )
            else:
                self._want(ref.name, entry.path, whole(entry.shape))


def objects_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every object with a state of its own in a state's containers, with its path."""
    if is_stateful(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if type(inner) not in PLAIN:  # there are thousands
                yield from objects_in(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from objects_in(inner, (*path, number))


def templates(state: Mapping[str, Any], tree: Any) -> dict[str, torch.Tensor]:
    """For each saved tensor of an optimizer's state, by path, the parameter that it belongs to.

    An optimizer makes its state in its first step. Before that only its parameters tell how the
    saved state is to be sharded.
    """
    found: dict[str, torch.Tensor] = {}
    for path, value in objects_in(state):
        saved = tree
        for key in path:
            saved = saved[key] if isinstance(saved, dict) and key in saved else None
        if not isinstance(value, torch.optim.Optimizer) or not isinstance(saved, dict):
            continue
        groups = saved.get("param_groups")
        numbers = [n for group in groups or () for n in group.get("params", ())]
        parameters = [p for group in value.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=False):
            own = saved.get("state", {}).get(number, {})
            for inner, ref in leaves(own, (*path, "state", number)):
                if tuple(parameter.shape) == (ref.global_shape or ref.shape):
                    found[dotted(inner)] = parameter
    return found


def _apart(saved: TensorRef, path: str) -> str:
    return f"{saved.name}@{path}"


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    repeated = (n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 1 and any(repeated)


# --- values -------------------------------------------------------------------------------------


def _fill(state: MutableMapping[str, Any], target: _Target, plan: _Plan) -> None:
    """Put everything in its place; what was read is in the state's tensors already."""
    read: dict[str, torch.Tensor] = {name: one.tensor for name, one in plan.wanted.items()}
    tensors = {**read, **plan.alike.tensors, **plan.sharded, **plan.apart}
    filling = Filling(tensors, set(target.kept), strict=plan.strict)
    done: list[str] = []
    for key in [key for key in state if key in plan.tree]:
        try:
            state[key] = filling.filled(state[key], target.present.tree[key], plan.tree[key])
        except Exception as error:
            paths = {one.path for one in plan.wanted.values() if one.targets}
            paths |= {path for _, path, _ in plan.alike.copies}
            changed = sorted(paths.union(done, plan.alike.tensors))
            problem = f"it did not take its state: {error}; changed already: {changed}"
            raise StateError(str(key), problem) from error
        done.append(str(key))
