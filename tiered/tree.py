"""The tree of a state: its structure, with a reference where a tensor was; and reading it back.

One msgpack document with extension types; docs/FORMAT.md describes them. Whoever reads it believes
nothing: a tree may come from S3, and nothing in it is unpickled unless the user says so.
"""

import functools
import io
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch

from tiered import typed
from tiered.errors import StateError
from tiered.typed import Typed

Path = tuple[str | int, ...]

TREE_NAME = "__tree__"  # the tree's own name in the image
# msgpack extension types of the tree; docs/FORMAT.md describes them
EXT_TENSOR, EXT_TUPLE, EXT_BIGINT, EXT_COMPLEX, EXT_NDARRAY = 1, 2, 3, 4, 5
EXT_NUMPY_SCALAR, EXT_SET, EXT_TORCH_DTYPE, EXT_TORCH_SIZE, EXT_DEVICE, EXT_PICKLE = (
    6, 7, 8, 9, 10, 11
)  # fmt: skip
EXT_COUNTER, EXT_TYPED, EXT_BYTES_IO = 12, 13, 14

MAX_DEPTH = 64  # of containers in containers: msgpack takes 35 KB of stack for each tuple it reads

# what torch can take from numpy and give back
ARRAY_DTYPES = {
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip
_NUMPY_SCALAR = re.compile(r"[<>|=]?[biufc][0-9]{1,2}")


_INT = frozenset({int})


class TensorRef(NamedTuple):
    """A tensor in the tree; a tuple, as there are thousands and each is made several times.

    Attributes:
        name: Its key in the shard's image.
        dtype: As torch spells it without the `torch.`, such as `bfloat16`.
        shape: Of the saved (local) tensor.
        offsets: Where the local shard starts in the global tensor, or None for a plain tensor.
        global_shape: Of the DTensor it is a shard of, or None.
        more: Other parts of the same tensor that the rank has, which a ShardedTensor may.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    more: tuple["TensorRef", ...] = ()

    def pack(self, pack: Callable[[Any], Any] = msgpack.packb) -> bytes:
        """Msgpack of its fields, in order.

        Args:
            pack: A Packer's, where many are packed: to make one takes longer than to use it.
        """
        fields: list[Any] = [self.name, self.dtype, self.shape, self.offsets, self.global_shape]
        if self.more:
            fields.append([[part.name, part.shape, part.offsets] for part in self.more])
        return bytes(pack(fields))

    @staticmethod
    def unpack(data: bytes) -> "TensorRef":
        """Read what `pack` wrote; raises ValueError or TypeError on anything else."""
        name, dtype, shape, offsets, global_shape, *more = msgpack.unpackb(data, use_list=False)
        if type(name) is not str or type(dtype) is not str:
            raise TypeError(f"a tensor named {name!r} of dtype {dtype!r}")
        _check_sizes(shape)
        if offsets is not None:
            _check_sizes(offsets)
        if global_shape is not None:
            _check_sizes(global_shape)
        first = TensorRef(name, dtype, shape, offsets, global_shape)
        if not more:
            return first
        (others,) = more
        if global_shape is None or any(type(other[0]) is not str for other in others):
            raise TypeError(f"more parts {others!r} of {name!r}")
        for _, sizes, starts in others:
            _check_sizes(sizes)
            _check_sizes(starts)
        parts = (first._replace(name=n, shape=s, offsets=o) for n, s, o in others)
        return first._replace(more=tuple(parts))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        if (dtype := _dtype_of(self.dtype)) is None:
            raise StateError(self.name, f"dtype {self.dtype!r} is not known to this torch")
        return dtype


def _check_sizes(values: Any) -> None:
    is_plain = type(values) is tuple and _INT.issuperset(map(type, values))
    if not is_plain or min(values, default=0) < 0:
        raise TypeError(f"{values!r} is no list of sizes")


@functools.lru_cache(maxsize=256)
def _dtype_of(name: str) -> torch.dtype | None:
    dtype = getattr(torch, name, None)
    is_known = isinstance(dtype, torch.dtype) and not name.startswith("q")  # quantized
    return dtype if is_known else None


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dotted(path: Path) -> str:
    """The path as a tensor's name: its parts joined by dots."""
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True)
class Array:
    """A numpy array in the tree; `ref` names its bytes."""

    ref: TensorRef


def read_tree(tree: bytes, *, allow_pickle: bool = False) -> dict[Any, Any]:
    """Return the tree with a TensorRef (or an Array of one) where a tensor was.

    A value of a registered type is a Typed, whether it is registered here or not.

    Raises:
        StateError: It holds pickled values and `allow_pickle` is off, or is no tree.
    """
    depth = 0

    def unpack(data: bytes) -> Any:
        nonlocal depth
        if depth > MAX_DEPTH + 1:
            raise StateError("", f"the checkpoint's tree is more than {MAX_DEPTH} deep")
        depth += 1
        try:
            return msgpack.unpackb(
                data, ext_hook=extension, strict_map_key=False, unicode_errors="surrogatepass"
            )
        finally:
            depth -= 1

    def unpickle(data: bytes) -> Any:
        if not allow_pickle:
            raise StateError(
                "", "the checkpoint holds pickled values; pass allow_pickle=True if you trust it"
            )
        try:
            return pickle.loads(data)  # noqa: S301 - only with the user's explicit allow_pickle
        except Exception as error:
            raise StateError("", f"a pickled value cannot be read: {error!r}") from error

    readers: dict[int, Callable[[bytes], Any]] = {
        EXT_TENSOR: TensorRef.unpack,
        EXT_TUPLE: lambda data: tuple(unpack(data)),
        EXT_BIGINT: lambda data: int.from_bytes(data, "little", signed=True),
        EXT_COMPLEX: lambda data: complex(*unpack(data)),
        EXT_NDARRAY: lambda data: _array(TensorRef.unpack(data)),
        EXT_NUMPY_SCALAR: lambda data: _numpy_scalar(*unpack(data)),
        EXT_SET: lambda data: set(unpack(data)),
        EXT_TORCH_DTYPE: lambda data: TensorRef("", unpack(data), ()).torch_dtype,
        EXT_TORCH_SIZE: lambda data: torch.Size(unpack(data)),
        EXT_DEVICE: lambda data: torch.device(unpack(data)),
        EXT_PICKLE: unpickle,
        EXT_COUNTER: lambda data: Counter(dict(unpack(data))),
        EXT_TYPED: lambda data: _typed(*unpack(data)),
        EXT_BYTES_IO: io.BytesIO,
    }

    def extension(code: int, data: bytes) -> Any:
        if code not in readers:
            raise StateError("", f"unknown value type {code} in the checkpoint's tree")
        return readers[code](data)

    try:
        document = unpack(tree)
    except (
        ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, msgpack.UnpackException
    ) as error:  # fmt: skip
        raise StateError("", f"the checkpoint's tree cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise StateError("", "the checkpoint's tree is not a dict")
    _check_depth(document)
    return document


def _check_depth(document: Any) -> None:
    """Refuse what the functions that walk a tree could not walk to its end."""
    waiting = [(document, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise StateError("", f"the checkpoint's tree is more than {MAX_DEPTH} deep")
        if isinstance(value, Typed):
            waiting.append((value.content, depth))
        elif isinstance(value, dict | list | tuple) and not isinstance(value, TensorRef):
            children = value.values() if isinstance(value, dict) else value
            waiting += [(child, depth + 1) for child in children if type(child) is not TensorRef]


def _numpy_scalar(dtype: str, data: bytes) -> Any:
    if not _NUMPY_SCALAR.fullmatch(dtype):
        raise ValueError(f"a numpy scalar of dtype {dtype!r}")
    (value,) = np.frombuffer(data, dtype=np.dtype(dtype))
    return value


def _typed(name: str, content: Any) -> Typed:
    is_enum = type(content) in (str, int)
    if type(name) is not str or not (is_enum or type(content) is dict):
        raise ValueError(f"a {name!r} of {content!r}")
    return Typed(name, content)


def _array(ref: TensorRef) -> Array:
    if ref.dtype not in ARRAY_DTYPES:
        raise ValueError(f"a numpy array of dtype {ref.dtype!r}")
    return Array(ref)


def leaves(
    tree: Any, path: Path = (), skipped: Collection[int] = ()
) -> Iterator[tuple[Path, TensorRef]]:
    """Every reference in a tree with its path, in order; a tied tensor more than once.

    Of a tensor of which the rank has several parts, the one that has the others in `more`.

    Args:
        tree: It.
        path: To it.
        skipped: Ids of dicts to leave out.
    """
    if isinstance(tree, TensorRef):
        yield path, tree
    elif isinstance(tree, Array):
        yield path, tree.ref
    elif isinstance(tree, Typed):
        yield from leaves(tree.content, path, skipped)
    elif isinstance(tree, dict):
        if id(tree) not in skipped:
            for key, value in tree.items():
                yield from leaves(value, (*path, key), skipped)
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index), skipped)


def tensor_refs(tree: Any) -> Iterator[TensorRef]:
    """Every reference in a tree, in order; a tied tensor more than once."""
    for _, ref in leaves(tree):
        yield ref


_CONTAINERS = frozenset({dict, list, tuple, Typed})


def copied(tree: Any) -> Any:
    """The tree in containers of its own."""
    if type(tree) is dict:
        return {k: copied(v) if type(v) in _CONTAINERS else v for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([copied(v) if type(v) in _CONTAINERS else v for v in tree])
    return Typed(tree.name, copied(tree.content)) if isinstance(tree, Typed) else tree


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value there; its dicts and lists are changed, the rest made anew."""
    if not path:
        return value
    if isinstance(tree, Typed):
        return Typed(tree.name, replaced(tree.content, path, value))
    key, *rest = path
    items: Any = list(tree) if type(tree) is tuple else tree
    items[key] = replaced(items[key], tuple(rest), value)
    return tuple(items) if type(tree) is tuple else items


def value_at(tree: Any, path: Path) -> Any:
    """What is there, None if nothing is."""
    for key in path:
        if isinstance(tree, Typed):
            tree = tree.content
        try:
            tree = tree[key]
        except (LookupError, TypeError):
            return None
    return tree


def renamed(tree: Any, name: Callable[[str], str]) -> Any:
    """The tree with other names in its references."""
    if isinstance(tree, TensorRef):
        more = tuple(renamed(part, name) for part in tree.more)
        return tree._replace(name=name(tree.name), more=more)
    if isinstance(tree, Array):
        return Array(renamed(tree.ref, name))
    if isinstance(tree, Typed):
        return Typed(tree.name, renamed(tree.content, name))
    if type(tree) is dict:
        return {k: renamed(v, name) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(renamed(v, name) for v in tree)
    return tree


def unmakable(tree: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every value of a type that is not registered here, or another one now, with its path."""
    if isinstance(tree, Typed):
        if problem := typed.problem_of(tree):
            yield path, problem
        yield from unmakable(tree.content, path)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if type(value) is not TensorRef:
                yield from unmakable(value, (*path, key))
            yield from unmakable(key, path) if isinstance(key, Typed) else ()
    elif isinstance(tree, list | tuple | set) and not isinstance(tree, TensorRef):
        for index, value in enumerate(tree):
            yield from unmakable(value, (*path, index))


def check_makable(tree: Any) -> None:
    """Refuse a tree that `materialise` could not make values of.

    Raises:
        StateError: It holds values of types that are not registered here; names all their keys.
    """
    check_all_makable([((), tree)])


def check_all_makable(trees: Iterable[tuple[Path, Any]]) -> None:
    """The same for several parts of a tree, with the path of each; one error for all of them."""
    found = itertools.chain.from_iterable(unmakable(tree, path) for path, tree in trees)
    if problems := {dotted(where): problem for where, problem in found}:
        text = "; ".join(f"{where}: {problem}" for where, problem in problems.items())
        raise StateError(next(iter(problems)), text)


def plain(tree: Any) -> Any:
    """The tree for other tools: fields in place of the types that have them."""
    if isinstance(tree, Typed):
        return plain(tree.content)
    if type(tree) is dict:
        return {k: plain(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(plain, tree))
    return tree


def materialise(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree with its tensors in place of the references.

    The tree must be one that `check_makable` finds nothing wrong with.
    """
    if isinstance(tree, TensorRef):
        return tensors[tree.name]
    if isinstance(tree, Array):
        return tensors[tree.ref.name].numpy()
    if isinstance(tree, Typed):
        return typed.make(tree, materialise(tree.content, tensors))
    if type(tree) is set:
        return {materialise(v, tensors) for v in tree}
    if type(tree) is Counter:
        return Counter({materialise(k, tensors): v for k, v in tree.items()})
    if type(tree) is dict:
        return {k: materialise(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [materialise(v, tensors) for v in tree]
    if type(tree) is tuple:
        return tuple(materialise(v, tensors) for v in tree)
    return tree
