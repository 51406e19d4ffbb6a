"""A training state as tensors and a tree: taken apart for a save, put together for a restore.

The tree is the state's structure with every tensor replaced by a reference to it by name, as one
msgpack document; dicts, lists, tuples, ints of any size, floats, strings, bytes, None and numpy
values keep their types, and so do enums, dataclasses and named tuples that were registered
(`tiered.typed`). Nothing is pickled unless the user allows it, and then what was pickled is marked
as such and refused by a reader that does not allow it too.

A tensor's name is its path in the state joined with dots, which is what safetensors and Hugging
Face tools expect. Tensors that are the same memory (tied weights) are saved once and referred to
twice. Of a DTensor the local shard is saved, with its place in the global tensor.
"""

import io
import itertools
import operator
import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgpack
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from tiered import bulk, torch_versions, typed
from tiered.collector import collector_paused
from tiered.errors import StateError
from tiered.tree import (
    ARRAY_DTYPES,
    EXT_BIGINT,
    EXT_BYTES_IO,
    EXT_COMPLEX,
    EXT_COUNTER,
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
    TREE_NAME,
    Path,
    TensorRef,
    dotted,
    dtype_name,
)
from tiered.typed import Typed

if TYPE_CHECKING:  # torch_versions says why not at run time
    from torch.distributed.tensor import DTensor

RESERVED_NAMES = frozenset({TREE_NAME, "__metadata__"})


@runtime_checkable
class Stateful(Protocol):
    """What has a state of its own: modules, optimizers, schedulers, data loaders."""

    def state_dict(self) -> Any:
        """The state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A value of a state: the part of a tensor that this rank has, where that is no DTensor.

    Attributes:
        tensor: The part.
        offsets: Where it starts in the whole tensor.
        global_shape: Of the whole tensor.
    """

    tensor: torch.Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorParts:
    """A value of a state: several parts of one tensor."""

    parts: tuple[TensorPart, ...]


@dataclass(slots=True)
class Captured:
    """A state taken apart.

    Attributes:
        tree: The msgpack document.
        tensors: By name, on the device where they are; not copied.
        sharded: By name, the DTensors of which `tensors` has the local shards.
        signature: Equal for states with tensors of the same names, dtypes and shapes; quick to
            compare where `capture` had a cache.
        device_types: Of the tensors, as torch calls them.
    """

    tree: bytes
    tensors: dict[str, torch.Tensor]
    sharded: "dict[str, DTensor]" = field(default_factory=dict)
    signature: tuple[Any, ...] = ()
    device_types: frozenset[str] = frozenset()


# --- what is the same as last time --------------------------------------------------------------


@dataclass(slots=True, eq=False)
class TensorDict:
    """A dict of plain tensors as it was looked at, to be known again.

    A model's state_dict() holds thousands of tensors whose memory stays where it is. Looking at
    each anew (its name, its kind, its aliases) takes longer than copying a small one.
    """

    keys: tuple[str, ...]
    looks: list[bulk.Look]
    device_types: frozenset[str]
    names: list[str]
    refs: list[TensorRef]
    pointers: frozenset[int]
    _packed: dict[Any, Any] | None = None

    def __eq__(self, other: object) -> bool:
        """Whether a layout made for one is right for the other."""
        return self is other or (isinstance(other, TensorDict) and self.refs == other.refs)

    __hash__ = None  # type: ignore[assignment]  # an equal one may be elsewhere in memory

    def refs_by_key(self) -> dict[Any, Any]:
        """What a tree has of them until it is packed."""
        return dict(zip(self.keys, self.refs, strict=True))

    def packed(self) -> dict[Any, Any]:
        """The same for msgpack; made once."""
        if self._packed is None:
            pack = msgpack.Packer().pack
            packed = [msgpack.ExtType(EXT_TENSOR, ref.pack(pack)) for ref in self.refs]
            self._packed = dict(zip(self.keys, packed, strict=True))
        return self._packed

    def is_same(self, value: Mapping[Any, Any]) -> bool:
        """Whether these are tensors of the same kind, in the same memory, under the same keys."""
        if len(value) != len(self.keys) or tuple(value) != self.keys:
            return False
        tensors = list(value.values())
        if not PLAIN.issuperset(map(type, tensors)):
            return False
        looks = map(bulk.look, bulk.blocks(tensors))
        try:
            return all(map(operator.eq, looks, self.looks))
        except RuntimeError:  # what has no such memory is another one
            return False


CaptureCache = dict[Path, TensorDict]  # what `capture` remembers between saves of one state


# --- taking apart -------------------------------------------------------------------------------

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_STR = frozenset({str})


@dataclass(slots=True)
class _Capture:
    allow_pickle: bool
    is_target: bool = False
    is_in_set: bool = False
    cache: CaptureCache | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sharded: "dict[str, DTensor]" = field(default_factory=dict)
    aliases: dict[tuple[Any, ...], TensorRef] = field(default_factory=dict)
    pointers: set[int] = field(default_factory=set)
    device_types: set[str] = field(default_factory=set)
    known: list[tuple[list[torch.Tensor], list[TensorRef]]] = field(default_factory=list)
    signature: list[Any] = field(default_factory=list)

    def encode_state(self, state: Mapping[str, Any]) -> dict[Any, Any]:
        if not isinstance(state, Mapping):
            raise StateError("", f"the state must be a dict, not a {type(state).__name__}")
        return self.encode_dict(state, ())

    def encode(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if len(path) > MAX_DEPTH:
            raise StateError(
                str(path[0]), f"is nested more than {MAX_DEPTH} deep, or contains itself"
            )
        if value is None or kind in (bool, float, str, bytes):
            return value
        if kind is int:
            if self.is_target or -(2**63) <= value < 2**64:
                return value
            size = value.bit_length() // 8 + 1
            return msgpack.ExtType(EXT_BIGINT, value.to_bytes(size, "little", signed=True))
        if kind in PLAIN and not self.is_in_set:
            return self.leaf(self.tensor(value, path))
        if self.is_in_set and isinstance(value, torch.Tensor | Stateful):
            raise StateError(
                dotted(path), f"a {kind.__name__} in a set has no name; use a list or a dict"
            )
        if torch_versions.is_sharded_tensor(value):
            return self.encode(_parts_of(value), path)
        if isinstance(value, torch.Tensor):
            return self.leaf(self.tensor(value, path))
        if kind is dict or kind is OrderedDict:
            return self.encode_dict(value, path)
        if kind is list:
            return [self.encode(v, (*path, i)) for i, v in enumerate(value)]
        if kind is tuple:
            items = [self.encode(v, (*path, i)) for i, v in enumerate(value)]
            return tuple(items) if self.is_target else self.ext(EXT_TUPLE, items)
        if kind is TensorPart:
            return self.leaf(self.part(value, path))
        if kind is TensorParts:
            return self.leaf(self.parts(value, path))
        if is_stateful(value):
            return self.encode(unwrapped(value).state_dict(), path)
        return self.encode_rare(value, path)

    def encode_dict(self, value: Mapping[Any, Any], path: Path) -> dict[Any, Any]:
        known = None if self.cache is None else self.cache.get(path)
        if known is None or not known.is_same(value):
            known = self._looked_at(value, path)
        if (
            known is None
            or not self.pointers.isdisjoint(known.pointers)
            or not self.tensors.keys().isdisjoint(known.names)
        ):
            return {self.key(k, path): self.encode(v, (*path, k)) for k, v in value.items()}
        tensors = list(value.values())
        if not all(look.are_bare for look in known.looks):
            tensors = [tensor.detach() for tensor in tensors]
        self.tensors.update(zip(known.names, tensors, strict=True))
        self.pointers |= known.pointers
        self.device_types |= known.device_types
        self.known.append((tensors, known.refs))
        self.signature.append(known)
        if self.cache is not None:
            self.cache[path] = known
        return known.refs_by_key() if self.is_target else known.packed()

    def _looked_at(self, value: Mapping[Any, Any], path: Path) -> TensorDict | None:
        """A dict of plain tensors, each with memory of its own, looked at as one; None if not.

        On the CPU or a CUDA device: there an address stands for one place on one of them. Whatever
        is odd about one of them is found, and said, when each is looked at by itself.
        """
        tensors = list(value.values())
        is_plain = PLAIN.issuperset(map(type, tensors)) and _STR.issuperset(map(type, value))
        if not is_plain or not tensors or len(path) >= MAX_DEPTH:
            return None
        prefix = dotted((*path, ""))
        names = [prefix + key for key in value]
        if not are_names(names):
            return None
        looks: list[bulk.Look] = []
        used: list[int] = []
        device_types: set[str] = set()
        for some in bulk.blocks(tensors):
            device_types |= bulk.device_types(some)
            if not device_types <= {"cpu", "cuda"} or not bulk.are_dense(some):
                return None
            looks.append(look := bulk.look(some))
            used += [place for place, one in zip(look.places, some, strict=True) if one.numel()]
        pointers = frozenset(used)
        if len(pointers) != len(used):
            return None  # tied, or parts of each other
        dtypes = itertools.chain.from_iterable(look.dtypes for look in looks)
        shapes = itertools.chain.from_iterable(look.shapes for look in looks)
        kinds = zip(names, map(dtype_name, dtypes), map(tuple, shapes), strict=True)
        refs = list(itertools.starmap(TensorRef, kinds))
        devices = frozenset(device_types)
        return TensorDict(tuple(value), looks, devices, names, refs, pointers)

    def encode_rare(self, value: Any, path: Path) -> Any:
        kind = type(value)
        name = typed.name_of(kind)
        if self.is_target:  # whatever else it is, it will be replaced
            return None if name is None else Typed(name, self.encode(typed.content_of(value), path))
        if kind is np.ndarray and value.dtype.name in ARRAY_DTYPES:
            return msgpack.ExtType(EXT_NDARRAY, self.array(value, path).pack())
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return self.ext(EXT_NUMPY_SCALAR, [value.dtype.str, value.tobytes()])
        if kind is complex:
            return self.ext(EXT_COMPLEX, [value.real, value.imag])
        if kind is set:
            return self.ext(EXT_SET, self.members(sorted(value, key=repr), path))
        if kind is Counter:
            return self.ext(EXT_COUNTER, [self.members(item, path) for item in value.items()])
        if name is not None:
            return self.ext(EXT_TYPED, [name, self.encode(typed.content_of(value), path)])
        if kind is io.BytesIO:  # what trainers of DCP put something of their own into
            return msgpack.ExtType(EXT_BYTES_IO, value.getvalue())
        if kind is torch.dtype:
            return self.ext(EXT_TORCH_DTYPE, dtype_name(value))
        if kind is torch.Size:
            return self.ext(EXT_TORCH_SIZE, list(value))
        if kind is torch.device:
            return self.ext(EXT_DEVICE, str(value))
        what = f"{kind.__module__}.{kind.__qualname__}"
        if kind is np.ndarray:
            what += f" of dtype {value.dtype}"
        if self.allow_pickle:
            try:
                return msgpack.ExtType(EXT_PICKLE, pickle.dumps(value))
            except Exception as error:
                raise StateError(dotted(path), f"a {what} cannot be pickled: {error}") from error
        advice = (
            "make it numbers, strings, lists, dicts or tensors, give its class state_dict() and "
            "load_state_dict()"
        )
        if typed.is_registrable(kind):
            advice = f"call tiered.register_type({kind.__qualname__}), where it is restored, too"
        raise StateError(
            dotted(path),
            f"a {what} can only be saved by pickling it; {advice}, or pass allow_pickle=True to "
            "Checkpointer",
        )

    def leaf(self, ref: TensorRef) -> Any:
        return ref if self.is_target else msgpack.ExtType(EXT_TENSOR, ref.pack())

    def ext(self, code: int, body: Any) -> msgpack.ExtType:
        return msgpack.ExtType(code, _pack(body))

    def members(self, values: Iterable[Any], path: Path) -> list[Any]:
        inner = _Capture(self.allow_pickle, is_in_set=True)
        return [inner.encode(v, (*path, "*")) for v in values]

    def key(self, key: Any, path: Path) -> Any:
        if key is None or type(key) in (str, int, bool, float, bytes):
            return self.encode(key, ())
        raise StateError(dotted(path), f"dict key {key!r} is neither a string nor a number")

    def array(self, value: np.ndarray[Any, Any], path: Path) -> TensorRef:
        native = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="), copy=False))
        if not native.flags.writeable:  # torch warns about views of what it could not write
            native = native.copy()
        return self.tensor(torch.from_numpy(native).reshape(value.shape), path)

    def part(self, value: TensorPart, path: Path) -> TensorRef:
        return self.tensor(value.tensor, path, value.offsets, value.global_shape)

    def parts(self, value: TensorParts, path: Path) -> TensorRef:
        paths = [path, *((*path[:-1], f"{path[-1]}#{n}") for n in range(1, len(value.parts)))]
        refs = [self.part(part, where) for part, where in zip(value.parts, paths, strict=True)]
        return refs[0]._replace(more=tuple(refs[1:]))

    def tensor(
        self,
        value: torch.Tensor,
        path: Path,
        offsets: tuple[int, ...] | None = None,
        global_shape: tuple[int, ...] | None = None,
    ) -> TensorRef:
        name = dotted(path)
        if type(value) not in PLAIN and is_lazy(value):
            raise StateError(name, "it has no shape yet; run one batch through the lazy module")
        whole: DTensor | None = None
        if type(value) not in PLAIN and torch_versions.is_dtensor(value):
            if any(placement.is_partial() for placement in value.placements):
                raise StateError(
                    name, "it is a sum that was not made yet (Partial); redistribute it"
                )
            whole = value
            offsets, global_shape = place_of(value), tuple(value.shape)
            value = local_part_of(value, name)
        if value.requires_grad or type(value) is not torch.Tensor:
            value = value.detach()
        check_tensor(name, value)
        alias = _alias(value, offsets, global_shape)
        if value.numel():
            if self.known and value.data_ptr() in self.pointers:
                for tensors, refs in self.known:
                    self.aliases.update(zip(map(_alias, tensors), refs, strict=True))
                self.known.clear()
            if known := self.aliases.get(alias):
                return known
            self.pointers.add(value.data_ptr())
        check_name(name)
        if name in self.tensors:
            raise StateError(name, "two values have this name once their paths are joined by dots")
        ref = TensorRef(name, dtype_name(value.dtype), tuple(value.shape), offsets, global_shape)
        if value.numel():
            self.aliases[alias] = ref
        self.tensors[name] = value
        self.device_types.add(value.device.type)
        self.signature.append((name, value.dtype, value.shape))
        if whole is not None:
            self.sharded[name] = whole
        return ref


def _parts_of(value: Any) -> TensorPart | TensorParts:
    local, shape = torch_versions.local_parts(value)
    parts = tuple(TensorPart(tensor, offsets, shape) for tensor, offsets in local)
    return parts[0] if len(parts) == 1 else TensorParts(parts)


def _alias(
    value: torch.Tensor,
    offsets: tuple[int, ...] | None = None,
    global_shape: tuple[int, ...] | None = None,
) -> tuple[Any, ...]:
    """What two tensors that are the same memory have in common."""
    return (
        value.device, value.data_ptr(), value.dtype, value.shape, value.stride(),
        value.is_conj(), value.is_neg(), offsets, global_shape,
    )  # fmt: skip


def check_tensor(name: str, value: torch.Tensor) -> None:
    """Refuse a tensor without plain bytes of its own.

    Raises:
        StateError: It is on the meta device, sparse, nested, quantized, freed, or an unknown
            subclass.
    """
    if type(value) not in PLAIN:
        raise StateError(name, f"tensor subclass {type(value).__name__} is not supported")
    if value.device.type == "meta":
        raise StateError(name, "it is on the meta device and has no data; materialise it first")
    if value.layout != torch.strided:
        raise StateError(name, f"layout {value.layout} is not supported; save a dense tensor")
    if value.is_nested:
        raise StateError(name, "nested tensors are not supported; save unbind() as a list")
    if value.is_quantized:
        raise StateError(name, "quantized tensors are not supported; save int_repr() and scales")
    if value.numel() and value.untyped_storage().nbytes() == 0:
        raise StateError(name, "its memory has been freed (resharded?); gather it first")


def are_names(names: list[str]) -> bool:
    """Whether `check_name` would refuse none of them."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return False
    return RESERVED_NAMES.isdisjoint(names)


def check_name(name: str) -> None:
    """Refuse what cannot be a tensor's name in an image.

    Raises:
        StateError: It is reserved, or no text that can be written down.
    """
    if name in RESERVED_NAMES:
        raise StateError(name, "this name is reserved; rename the tensor")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise StateError(name, f"this is no name for a tensor: {error}") from error


def local_part_of(value: "DTensor", name: str) -> torch.Tensor:
    """This rank's part; nothing, in as many dimensions, where it is not in the tensor's mesh.

    Raises:
        StateError: It is not, and the tensor has no dimension to have nothing of.
    """
    if value.device_mesh.get_coordinate() is not None:
        return value.to_local()
    if not value.shape:
        raise StateError(name, "it is a number on a mesh that this rank is not in; leave it out")
    return torch.empty((0, *value.shape[1:]), dtype=value.dtype)


def place_of(value: "DTensor") -> tuple[int, ...]:
    """Where the local shard starts in the whole tensor."""
    if value.device_mesh.get_coordinate() is None:
        return (0,) * len(value.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    return tuple(offsets)


def is_stateful(value: Any) -> bool:
    """Whether it is an object with a state of its own; a class is not."""
    # as isinstance(value, Stateful) says, which takes 5 us for each tensor
    has_state = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    return has_state and not isinstance(value, type)


def unwrapped(value: Any) -> Any:
    """The module itself where it is wrapped for data parallelism or compiled.

    The wrappers put `module.` and `_orig_mod.` before every name, and a step that was saved under
    one would fit no model without it.
    """
    while isinstance(value, torch.nn.Module):
        if isinstance(value, torch.nn.parallel.DistributedDataParallel):
            value = value.module
        elif type(value).__name__ == "OptimizedModule":  # importing its class takes seconds
            value = value._orig_mod
        else:
            break
    return value


def _pack(body: Any) -> bytes:
    try:  # surrogatepass: file names that are not UTF-8 reach Python as lone surrogates
        return bytes(msgpack.packb(body, unicode_errors="surrogatepass"))
    except (ValueError, OverflowError) as error:  # 4 GiB in one string, say
        raise StateError("", f"a value cannot be packed: {error}") from error


def capture(
    state: Mapping[str, Any],
    *,
    allow_pickle: bool = False,
    cache: CaptureCache | None = None,
) -> Captured:
    """Take a state apart; copies no tensor.

    Args:
        state: Names to tensors, numbers, containers, or objects with state_dict().
        allow_pickle: Pickle what is none of these, instead of refusing it.
        cache: Empty at first; the same one with each save of a state makes later ones quick.

    Raises:
        StateError: A value cannot be saved; names its key.
    """
    work = _Capture(allow_pickle, cache=cache)
    with collector_paused():
        tree = work.encode_state(state)
        signature, device_types = tuple(work.signature), frozenset(work.device_types)
        return Captured(_pack(tree), work.tensors, work.sharded, signature, device_types)


@dataclass(frozen=True, slots=True)
class Present:
    """A state that is about to be filled, taken apart.

    Attributes:
        tree: Its structure, with a TensorRef where a tensor is; None for what will be replaced.
        tensors: By name; the state's own memory.
        sharded: By name, the DTensors of which `tensors` has the local shards.
        device_types: Of the tensors, as torch calls them.
    """

    tree: dict[Any, Any]
    tensors: dict[str, torch.Tensor]
    sharded: "dict[str, DTensor]"
    device_types: frozenset[str]


def capture_present(state: Mapping[str, Any], *, cache: CaptureCache | None = None) -> Present:
    """Take apart what is to be filled.

    Args:
        state: It.
        cache: As for `capture`, for the same state.

    Raises:
        StateError: A tensor in it cannot be filled; names its key.
    """
    work = _Capture(allow_pickle=False, is_target=True, cache=cache)
    with collector_paused():
        tree = work.encode_state(state)
    return Present(tree, work.tensors, work.sharded, frozenset(work.device_types))
