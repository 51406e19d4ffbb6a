"""Thousands of tensors asked at once, by `map` with what torch has in C.

A state may have tens of thousands of small tensors. A loop over them in Python takes several times
as long as this, and longer than copying them.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from replication.records import Buffer

BLOCK = 256  # what torch knows of so many stays in the processor's cache

Tensors = list[torch.Tensor]


def _property(name: str) -> Callable[[torch.Tensor], Any]:
    getter: Callable[[torch.Tensor], Any] = getattr(torch.Tensor, name).__get__
    return getter


_dtype, _shape, _device = _property("dtype"), _property("shape"), _property("device")
_layout, _size_bytes = _property("layout"), _property("nbytes")
_is_nested, _is_quantized = _property("is_nested"), _property("is_quantized")
_requires_grad = _property("requires_grad")
_is_contiguous, _is_conj = torch.Tensor.is_contiguous, torch.Tensor.is_conj


class Look(NamedTuple):
    """What a few tensors are, to be compared with what they are later.

    Attributes:
        places: The address of each one's first element.
        dtypes: Of each.
        shapes: Of each.
        strides: Of each, in elements; None if all are contiguous, so that shapes say it.
        devices: Of all.
        are_bare: None is a Parameter or requires a gradient.
    """

    places: list[int]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]] | None
    devices: list[torch.device]
    are_bare: bool


def blocks(tensors: Tensors) -> Iterator[Tensors]:
    """All of them, `BLOCK` at a time: the second question to these finds a warm cache."""
    return (tensors[start : start + BLOCK] for start in range(0, len(tensors), BLOCK))


def look(tensors: Tensors) -> Look:
    """Look at some.

    Raises:
        RuntimeError: One has no such memory: it is nested, or sparse.
    """
    return Look(
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(_dtype, tensors)),
        list(map(_shape, tensors)),
        None if all(map(_is_contiguous, tensors)) else list(map(torch.Tensor.stride, tensors)),
        devices(tensors),
        set(map(type, tensors)) == {torch.Tensor} and not any(map(_requires_grad, tensors)),
    )


def devices(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """Each one once, in order."""
    return list(dict.fromkeys(map(_device, tensors)))


def device_types(tensors: Iterable[torch.Tensor]) -> set[str]:
    """The types of their devices."""
    return {device.type for device in devices(tensors)}


def are_dense(tensors: Tensors) -> bool:
    """Whether `tiered.state.check_tensor` would refuse none of them.

    Args:
        tensors: Of the types in `tiered.state.PLAIN`.
    """
    return (
        set(map(_layout, tensors)) <= {torch.strided}
        and "meta" not in device_types(tensors)
        and not any(map(_is_nested, tensors))
        and not any(map(_is_quantized, tensors))
        and all(_storage_sizes(filter(torch.Tensor.numel, tensors)))
    )


def sizes(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    """The bytes of each."""
    return map(_size_bytes, tensors)


def memory(tensors: Tensors) -> list[Buffer] | None:
    """The memory of each, [n] uint8; it keeps the tensor alive, as others may be writing there.

    None if that of one is not its elements, one after the other, for the processor;
    `tiered.image.bytes_of` has those of any kind.
    """
    found: list[Buffer] = []
    for some in blocks(tensors):
        if not _are_plain(some):
            return None
        sizes = list(map(_size_bytes, some))
        kinds = {size: ctypes.c_uint8 * size for size in set(sizes)}
        for tensor, size in zip(some, sizes, strict=True):
            place = tensor.data_ptr()
            if size and not place:
                return None
            held: Any = kinds[size].from_address(place)
            held.tensor = tensor
            found.append(np.frombuffer(held, dtype=np.uint8))
    return found


def _are_plain(tensors: Tensors) -> bool:
    return (
        device_types(tensors) <= {"cpu"}
        and all(map(_is_contiguous, tensors))
        and not any(map(_is_conj, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
    )


def _storage_sizes(tensors: Iterable[torch.Tensor]) -> Iterable[int]:
    return map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, tensors))
