"""Many copies with one call: thousands of small tensors, without the interpreter between them."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from replication.records import Buffer
from replication.sink import copy_each
from tiered.image import bytes_of, is_plain

FEW = 4  # that copies one by one are as fast for
PARALLEL_ELEMENTS = 32768  # torch copies more than that with its own threads, if it has several


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target: one call for all, where this torch has it.

    If torch has several threads, they would wait for each other after every large tensor: those
    are copied by this thread alone.
    """
    with torch.no_grad():
        pairs = list(zip(targets, sources, strict=True))
        if torch.get_num_threads() > 1:
            for target, source in filter(_is_shared_by_threads, pairs):
                np.copyto(bytes_of(target), bytes_of(source))
            pairs = [pair for pair in pairs if not _is_shared_by_threads(pair)]
        if not hasattr(torch, "_foreach_copy_"):
            for target, source in pairs:
                target.copy_(source)
        elif pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _is_shared_by_threads(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return pair[0].numel() > PARALLEL_ELEMENTS and is_plain(pair[1])


def scatter(source: Buffer, targets: Sequence[memoryview]) -> None:
    """Copy bytes, [n] uint8, to one buffer after the other, which have room for all of them.

    Between two small copies the interpreter's lock would be asked for, and another thread that
    does the same have it.
    """
    if len(targets) < FEW:
        copy_each(source, targets)
        return
    memory: Any = (ctypes.c_uint8 * source.nbytes).from_address(source.ctypes.data)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # of what may be read-only, without a fuss
    parts = torch.split_with_sizes(whole, [target.nbytes for target in targets])
    copy_all([torch.frombuffer(target, dtype=torch.uint8) for target in targets], list(parts))
