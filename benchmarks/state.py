"""States to save: deterministic, different for each rank, and told apart from those of other steps.

A state of `layers` looks like a mixed-precision AdamW run: for each layer a bf16 weight, its fp32
master, two fp32 moments and a small bool mask. A state of `equal` tensors cuts the same bytes into
tensors of one size, of the same dtypes. The values come from one stream of random numbers for each
rank, so any process can make them again and compare. `stamp` then writes the step's number into
every page of a state, which is how a step differs from another one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

PAGE = 4096
STAMPS = 251  # a prime, so that no size of anything makes two steps alike

Shape = Literal["layers", "equal"]

_PARTS = (("weight", "bfloat16", 2), ("master", "float32", 4), ("exp_avg", "float32", 4),
          ("exp_avg_sq", "float32", 4), ("mask", "bool", 0))  # fmt: skip
_UNITS = sum(units for _, _, units in _PARTS)
_MASK_BYTES = 64


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: `shape` of `dtype`, as torch spells it without the `torch.`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One rank's state.

    Attributes:
        size_bytes: About; rounding to whole rows may take a few off.
        tensors: How many.
        shape: See the module.
        seed: Of the values.
    """

    size_bytes: int
    tensors: int = 60
    shape: Shape = "layers"
    seed: int = 1

    def __post_init__(self) -> None:
        if self.tensors < 1 or self.size_bytes < 16 * self.tensors:
            raise ValueError(f"{self.size_bytes} bytes do not make {self.tensors} tensors")

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors, in order."""
        layers = math.ceil(self.tensors / len(_PARTS))
        digits = len(str(layers - 1))
        parts = []
        for index in range(self.tensors):
            layer, part = divmod(index, len(_PARTS))
            name, dtype, units = _PARTS[part]
            if self.shape == "equal":
                size = self.size_bytes // self.tensors
            else:
                size = self.size_bytes * units // (_UNITS * layers) or _MASK_BYTES
            shape = _shape(size // getattr(torch, dtype).itemsize)
            parts.append(TensorSpec(f"layers.{layer:0{digits}}.{name}", dtype, shape))
        return tuple(parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "StateSpec":
        """What `as_dict` made."""
        return StateSpec(**fields)


def _shape(elements: int) -> tuple[int, ...]:
    """A matrix of about so many elements, of 256 columns if there are enough."""
    return (elements // 256, 256) if elements >= 4096 else (max(1, elements),)


def make(spec: StateSpec, rank: int) -> dict[str, torch.Tensor]:
    """Return the rank's tensors, in torch's memory that is warm, as training has them; unstamped.

    numpy's begins at other places, and how fast memory is copied depends on where it begins.
    """
    return {part.name: tensor.clone() for part, tensor in _generate(spec, rank)}


def make_other(spec: StateSpec) -> dict[str, torch.Tensor]:
    """Return tensors of the same shapes in warm memory, all ones: something to fill."""
    return {part.name: torch.ones(part.shape, dtype=part.torch_dtype) for part in spec.parts}


def stamp(tensors: Mapping[str, torch.Tensor], step: int, share: float = 1.0) -> None:
    """Make the tensors those of `step`.

    Args:
        tensors: In place.
        step: From 0.
        share: Of the tensors, from the end: the rest is frozen and keeps its bytes.
    """
    names = list(tensors)
    for name in names[len(names) - math.ceil(share * len(names)) :]:
        _stamp(tensors[name], step)


def first_difference(
    tensors: Mapping[str, torch.Tensor],
    spec: StateSpec,
    rank: int,
    step: int,
    share: float = 1.0,
    frozen_step: int = 0,
) -> str | None:
    """Compare with what `make` and `stamp` give, bit for bit; the first tensor that differs.

    Args:
        tensors: What was restored.
        spec: What it should be.
        rank: Whose.
        step: Of which step.
        share: As it was stamped.
        frozen_step: The stamp of the frozen tensors.
    """
    frozen = spec.tensors - math.ceil(share * spec.tensors)
    for index, (part, expected) in enumerate(_generate(spec, rank)):
        actual = tensors.get(part.name)
        if actual is None:
            return f"{part.name} is missing"
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            return f"{part.name} is {actual.dtype} {list(actual.shape)}"
        _stamp(expected, frozen_step if index < frozen else step)
        if not np.array_equal(raw(actual), raw(expected)):
            return f"{part.name} differs from step {step}"
    return None


def raw(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A contiguous CPU tensor's bytes, [n] uint8; a view."""
    array: npt.NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


def _stamp(tensor: torch.Tensor, step: int) -> None:
    # The lowest byte of a number is written, so no float becomes a NaN; a bool stays one.
    raw(tensor)[::PAGE] = step % 2 if tensor.dtype == torch.bool else step % STAMPS


def _generate(spec: StateSpec, rank: int) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    numbers = np.random.Generator(np.random.SFC64([spec.seed, rank]))
    for part in spec.parts:
        count = math.prod(part.shape)
        array: npt.NDArray[Any]
        if part.dtype == "float32":
            array = numbers.random(count, dtype=np.float32)
            tensor = torch.from_numpy(array)
        elif part.dtype == "bfloat16":  # bits of numbers from 0 to 1
            array = numbers.integers(0, 0x3F80, count, dtype=np.int16)
            tensor = torch.from_numpy(array).view(torch.bfloat16)
        else:
            array = numbers.integers(0, 2, count, dtype=np.uint8)
            tensor = torch.from_numpy(array).view(torch.bool)
        yield part, tensor.reshape(part.shape)
