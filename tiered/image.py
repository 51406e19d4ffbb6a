"""A shard's image: one safetensors file, the same bytes in memory and on S3.

    8 bytes       length of the header, little endian
    header        JSON, padded with spaces so that the data starts at a multiple of 64
    data          the state's tree first (a U8 tensor named `__tree__`), then the tensors, widest
                  dtype first, then the largest, each at the offset that the header gives

Any safetensors reader opens it. The image is cut into chunks: chunk 0 is the header and the tree,
which change with every step; the others are tensor data, cut between tensors where that is
possible. So frozen tensors make the same chunks again, whatever else trains: the small tensors of
an adapter, say, lie together behind the large ones that they adapt. docs/FORMAT.md has the details.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from replication.records import Buffer, Chunk, ShardKey, ShardPlan
from tiered.collector import collector_paused
from tiered.errors import StateError
from tiered.state import Captured
from tiered.tree import TREE_NAME

ALIGNMENT = 64
_quoted = json.JSONEncoder(ensure_ascii=False).encode
_NUMBERS = re.compile(r"\d+")
TREE_PADDING = 4096  # so that a tree that grows a little does not move every tensor
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit

# dtypes as safetensors names them; what it has no name for is stored as bytes (U8, one more
# dimension), and the tree says what it really is
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Span(NamedTuple):
    """Where a tensor's bytes are, counted from the start of the image's tensor data."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes; depends on names, dtypes and shapes alone, so it is kept and reused.

    Attributes:
        signature: What it was made for.
        spans: In image order.
        data_bytes: Of all tensors.
        entries: Each tensor's header entry as JSON, up to its offsets.
        kinds: Each tensor's dtype and shape.
        texts: The entries as JSON, by the offset of the first tensor; filled as needed.
        cuts: Where the data is cut into chunks, by their size; filled as needed.
    """

    signature: tuple[Any, ...]
    spans: tuple[Span, ...]
    data_bytes: int
    entries: tuple[str, ...]
    kinds: Mapping[str, tuple[torch.dtype, torch.Size]]
    texts: dict[int, bytes] = field(default_factory=dict)
    cuts: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def stops(self, chunk_bytes: int) -> tuple[int, ...]:
        """Where each data chunk of at most `chunk_bytes` ends, counted from the data's start.

        A tensor that does not fit behind others begins a chunk; one that fits in none is cut.
        """
        if chunk_bytes not in self.cuts:
            stops, begin = [], 0
            for span in self.spans:
                if begin < span.start and span.stop - begin > chunk_bytes:
                    stops.append(begin := span.start)
                while span.stop - begin > chunk_bytes:
                    stops.append(begin := begin + chunk_bytes)
            if begin < self.data_bytes:
                stops.append(self.data_bytes)
            self.cuts[chunk_bytes] = tuple(stops)
        return self.cuts[chunk_bytes]

    def text(self, offset: int) -> bytes:
        """Every tensor's header entry as JSON, each after a comma."""
        if offset not in self.texts:
            self.texts.clear()
            entries = [
                f",{_quoted(name)}:{entry}[{offset + start},{offset + stop}]}}"
                for (name, start, stop), entry in zip(self.spans, self.entries, strict=True)
            ]
            self.texts[offset] = "".join(entries).encode()
        return self.texts[offset]


def safetensors_name(dtype: torch.dtype) -> str | None:
    """What safetensors calls a dtype; None if it does not know it."""
    return _NAMES.get(dtype)


def lay_out(captured: Captured) -> Layout:
    """Plan the image of a state."""
    with collector_paused():
        tensors = captured.tensors
        order = [(-t.element_size(), -t.nbytes, _in_order(n), n) for n, t in tensors.items()]
        names = [name for *_, name in sorted(order)]
        edges = list(itertools.accumulate([tensors[name].nbytes for name in names], initial=0))
        spans = tuple(map(Span, names, edges, edges[1:]))
        kinds = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
        texts = {kind: _entry(*kind) for kind in set(kinds.values())}
        entries = tuple(map(texts.__getitem__, kinds.values()))
        return Layout(captured.signature, spans, edges[-1], entries, kinds)


def _in_order(name: str) -> str:
    """Sorts layers.2 before layers.10: those that are frozen are mostly the first or the last."""
    return _NUMBERS.sub(_padded, name)


def _padded(number: re.Match[str]) -> str:
    return f"\0{number[0]:0>20}\0"


def _entry(dtype: torch.dtype, shape: torch.Size) -> str:
    known, sizes = _NAMES.get(dtype), [*shape]
    if known is None:
        known, sizes = "U8", [*shape, dtype.itemsize]
    return f'{{"dtype":"{known}","shape":[{",".join(map(str, sizes))}],"data_offsets":'


def chunk_sizes(layout: Layout, first_bytes: int, chunk_bytes: int) -> tuple[int, ...]:
    """Sizes of the chunks: the header and tree, then the data."""
    stops = layout.stops(chunk_bytes)
    return (first_bytes, *(stop - start for start, stop in itertools.pairwise((0, *stops))))


def front(layout: Layout, key: ShardKey, world_size: int, tree: bytes) -> bytes:
    """The image's first chunk: length, header, tree.

    Raises:
        StateError: There are more tensors than a header has room for.
    """
    padded = -(-max(1, len(tree)) // TREE_PADDING) * TREE_PADDING
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "tiered.format": "1",
            "tiered.job": key.job,
            "tiered.generation": str(key.version.generation),
            "tiered.step": str(key.version.step),
            "tiered.rank": str(key.rank),
            "tiered.world_size": str(world_size),
            "tiered.tree_bytes": str(len(tree)),
        },
        TREE_NAME: {"dtype": "U8", "shape": [padded], "data_offsets": [0, padded]},
    }
    parts = [_json(header)[:-1], layout.text(padded), b"}"]
    length = sum(map(len, parts))
    fill = -(8 + length) % ALIGNMENT
    if length + fill > MAX_HEADER_BYTES:
        raise StateError(
            "",
            f"the names of {len(layout.spans)} tensors make a header of {length + fill} bytes, and "
            f"safetensors reads {MAX_HEADER_BYTES}; save fewer tensors, or give them shorter names",
        )
    size = (length + fill).to_bytes(8, "little")
    return b"".join([size, *parts, b" " * fill, tree, bytes(padded - len(tree))])


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def bytes_of(tensor: torch.Tensor) -> Buffer:
    """A tensor's bytes, [n] uint8; a view of a contiguous CPU tensor, a copy of any other."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    dense = tensor.detach() if tensor.requires_grad else tensor
    if dense.device.type != "cpu" or not dense.is_contiguous():
        dense = dense.cpu().contiguous()
    if not dense.dim() or dense.stride(-1) != 1:  # a dimension of size 1 may have any stride
        dense = dense.as_strided((dense.numel(),), (1,))
    memory: Buffer = dense.view(torch.uint8).numpy().reshape(-1)
    return memory


def data_chunk(layout: Layout, tensors: Mapping[str, torch.Tensor], start: int, stop: int) -> Chunk:
    """The buffers that make bytes `start` to `stop` of the tensor data."""
    chunk = []
    for span in overlapping(layout.spans, start, stop):
        low, high = max(0, start - span.start), min(span.stop, stop) - span.start
        chunk.append(bytes_between(tensors[span.name], low, high))
    return chunk


def bytes_between(tensor: torch.Tensor, start: int, stop: int) -> Buffer:
    """Bytes `start` to `stop` of a tensor; of one that has to be copied, only the rows they span.

    A large tensor is in many chunks, and copying all of it for each would be quadratic.
    """
    while tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() == 0:
        return bytes_of(tensor)[start:stop]
    row = tensor.element_size() * tensor[0].numel()
    first = start // row
    return bytes_of(tensor[first : -(-stop // row)])[start - first * row : stop - first * row]


def overlapping(spans: Sequence[Span], start: int, stop: int) -> Iterator[Span]:
    """The non-empty spans that share bytes with `start` to `stop`; `spans` are in order."""
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        if spans[middle].stop <= start:
            low = middle + 1
        else:
            high = middle
    for span in spans[low:]:
        if span.start >= stop:
            return
        if span.stop > span.start:
            yield span


@dataclass(frozen=True, slots=True)
class Front:
    """What the first chunk of an image says.

    Attributes:
        tree: The state's msgpack document.
        spans: Of every tensor, in image order, counted from the start of the tensor data.
    """

    tree: bytes
    spans: tuple[Span, ...]


def read_front(data: bytes, plan: ShardPlan) -> Front:
    """Read an image's first chunk, believing nothing.

    Raises:
        StateError: It is not the front of an image of this size.
    """
    try:
        return _read_front(data, plan)
    except (
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        raise StateError("", f"not a shard's image: {error}") from error


def _read_front(data: bytes, plan: ShardPlan) -> Front:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"header of {length} bytes in a first chunk of {len(data)}")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    _, padded = header.pop(TREE_NAME)["data_offsets"]
    tree_bytes = int(metadata["tiered.tree_bytes"])
    data_bytes = plan.size_bytes - len(data)
    if type(padded) is not int or 8 + length + padded != len(data) or not 0 <= tree_bytes <= padded:
        raise ValueError("the tree does not fill the first chunk")
    spans = _spans(header, padded, data_bytes)
    tree = data[8 + length : 8 + length + tree_bytes]
    return Front(tree, spans)


def _spans(entries: Mapping[str, Any], first: int, data_bytes: int) -> tuple[Span, ...]:
    """Where each tensor's bytes are, in image order; `first` is where the tensor data starts."""
    pairs = [entry["data_offsets"] for entry in entries.values()]
    edges = list(itertools.chain.from_iterable(pairs))
    if not {2}.issuperset(map(len, pairs)) or not {int}.issuperset(map(type, edges)):
        raise ValueError("a tensor does not lie between two whole numbers")
    starts, stops = np.array(edges, dtype=np.int64).reshape(-1, 2).T - first
    if not np.all((starts >= 0) & (starts <= stops) & (stops <= data_bytes)):
        raise ValueError("a tensor lies outside of the image")
    order = np.lexsort((stops, starts))
    if np.any(stops[order][:-1] > starts[order][1:]):
        raise ValueError("tensors overlap")
    spans = list(map(Span, entries, starts.tolist(), stops.tolist()))
    return tuple(map(spans.__getitem__, order.tolist()))
