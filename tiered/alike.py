"""Parts of a state that a step has just as they are: paired with it, and read, as one.

Most restores are into the state that was saved, by the rank that saved it. Then whole dicts of
tensors agree, and to pair, check and look up each tensor by itself takes longer than to read a
small one. What is odd in any way is left to be looked at one by one (`tiered.restore`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from tiered import bulk
from tiered.pieces import Piece
from tiered.state import Present
from tiered.step_index import ShardView
from tiered.tree import TensorRef


@dataclass(slots=True)
class Alike:
    """What is read just as one rank saved it.

    Attributes:
        rank: Whose shard has it.
        trees: Of the saved tree the ids of the dicts whose tensors these are, all of them.
        tensors: Of the state, by name.
        pieces: Their bytes in the rank's tensor data, and their memory.
        copies: Other tensors of the state that get what one of these gets, as they were tied when
            they were saved: the name of that one, their own path, the tensor.
    """

    rank: int = 0
    trees: set[int] = field(default_factory=set)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    copies: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)


def find_alike(present: Present, view: ShardView) -> Alike:
    """Find the dicts of tensors that a state and the shard that it is filled from have alike.

    That is: the same keys lead to tensors of the same names, dtypes and shapes, of DTensors to the
    same part, and the shard has as many bytes for each.
    """
    found = Alike(view.rank)
    has_any = "cpu" in present.device_types
    waiting: list[tuple[Any, Any]] = [(present.tree, view.tree)] if has_any else []
    while waiting:
        current, saved = waiting.pop()
        if type(current) is dict and type(saved) is dict:
            if not _take(current, saved, present, view, found):
                waiting += [(current[key], saved[key]) for key in saved.keys() & current.keys()]
        elif type(current) is type(saved) and type(saved) in (list, tuple):
            waiting += zip(current, saved, strict=False)
    return found


def _take(
    current: dict[Any, Any], saved: dict[Any, Any], present: Present, view: ShardView, found: Alike
) -> bool:
    """Take all tensors of a dict, if it has nothing else and each can be read as it was saved."""
    refs = _only_refs(saved)  # before anything is compared: what was pickled may not take that
    if not refs or not _only_refs(current) or current != saved or any(ref.more for ref in refs):
        return False
    names = list(dict.fromkeys([r.name for r in refs if r.name not in found.tensors]))  # tied, once
    tensors = list(map(present.tensors.__getitem__, names))
    spans = [span for span in map(view.spans.get, names) if span is not None]
    sizes = [span.stop - span.start for span in spans]
    memory = bulk.memory(tensors)
    if memory is None or sizes != [one.nbytes for one in memory]:
        return False
    found.trees.add(id(saved))
    found.tensors.update(zip(names, tensors, strict=True))
    found.pieces += map(Piece, [span.start for span in spans], memory)
    return True


def _only_refs(tree: dict[Any, Any]) -> list[TensorRef]:
    """Every reference in a dict and the dicts in it; none if anything else is there, too."""
    refs: list[TensorRef] = []
    waiting = [tree]
    while waiting:
        values = waiting.pop().values()
        here = [value for value in values if type(value) is TensorRef]
        dicts = [value for value in values if type(value) is dict]
        if len(here) + len(dicts) < len(values):
            return []
        refs += here
        waiting += dicts
    return refs
