"""A step in the formats of other tools, written as it is read: a window of it in memory at a time.

    shards         rank-00000.safetensors, ...: each rank's image as it is
    safetensors    one model as Hugging Face has it: model.safetensors, or several files with
                   model.safetensors.index.json; tensors only
    dcp            a directory for torch.distributed.checkpoint.load (`tiered.export_dcp`)
    torch          one file for torch.load(weights_only=True)

All but `shards` have the state unsharded; of what each rank has one of, the lowest rank's.
"""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from tiered.boxes import Box
from tiered.errors import ConfigError, StateError
from tiered.image import ALIGNMENT, bytes_of, safetensors_name
from tiered.saved_step import SavedStep
from tiered.tree import Array, TensorRef, dotted
from tiered.whole_step import WholeStep, WholeTensor

Format = Literal["shards", "safetensors", "dcp", "torch"]
MAX_FILE_BYTES = 5 * 10**9  # of a safetensors file


def check_target(path: Path, export_format: str) -> None:
    """Refuse what cannot be written, before anything is read.

    Raises:
        ConfigError: The format is unknown, or something is in the way; says what to change.
    """
    if export_format not in get_args(Format):
        allowed = ", ".join(map(repr, get_args(Format)))
        raise ConfigError(f"format={export_format!r} must be one of {allowed}")
    if export_format == "torch":
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; format='torch' writes one file: name it")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there already; export into a new or an empty directory")


def write_shards(step: SavedStep, folder: Path) -> list[Path]:
    """Write every rank's image."""
    with new_folder(folder) as partial:
        names = [f"rank-{rank:05d}.safetensors" for rank in range(step.world_size)]
        for name, reader in zip(names, step.readers, strict=True):
            with (partial / name).open("wb") as out:
                for chunk in reader.chunks():
                    for buffer in chunk:
                        out.write(buffer.data)
                _sync(out)
    return [folder / name for name in names]


# --- safetensors --------------------------------------------------------------------------------


def write_safetensors(
    step: WholeStep, folder: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Write one model, in files of at most `max_file_bytes`, or of one tensor larger than that.

    Raises:
        StateError: Safetensors has no name for some dtype, or there are no tensors.
    """
    tensors = step.in_image_order()
    if strange := sorted(t.name for t in tensors if safetensors_name(t.dtype) is None):
        raise StateError(
            strange[0],
            f"safetensors has no dtype {step.tensors[strange[0]].entry.dtype} (in all "
            f"{len(strange)} tensors of such dtypes); export as 'torch' or 'dcp', or another key",
        )
    if not tensors:
        raise StateError("", "no tensors to export; give another key")
    files: list[list[WholeTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.size_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.size_bytes
    names = ["model.safetensors"]
    if len(files) > 1:
        numbers = range(1, len(files) + 1)
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in numbers]
    with new_folder(folder) as partial:
        for name, content in zip(names, files, strict=True):
            with (partial / name).open("wb") as out:
                out.write(_header(content))
                for _, _, values in step.windows(content):
                    out.write(bytes_of(values).data)
                _sync(out)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(t.size_bytes for t in tensors)},
                "weight_map": {
                    t.name: name
                    for name, content in zip(names, files, strict=True)
                    for t in content
                },
            }
            names.append("model.safetensors.index.json")
            (partial / names[-1]).write_text(json.dumps(index, indent=2))
    return [folder / name for name in names]


def _header(tensors: Sequence[WholeTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": safetensors_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.size_bytes],
        }
        start += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# --- torch.save ---------------------------------------------------------------------------------


def write_torch(step: WholeStep, path: Path) -> list[Path]:
    """Write what `torch.load(path, weights_only=True)` reads.

    Numpy's arrays become tensors and its scalars numbers, since that reads no others. The file is
    written without the tensors' bytes first (`torch.serialization.skip_data`), then these are put
    where it has room for them. So its zip checksums are not those of the bytes; torch has none.

    Raises:
        StateError: Something can be read by unpickling it only; names its key.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        made: dict[str, torch.Tensor] = {}  # by memory, in the order in which torch meets them

        def leaf(value: Any, name: str) -> Any:
            if isinstance(value, TensorRef | Array):
                tensor = step.tensors[name]
                if tensor.memory not in made:
                    made[tensor.memory] = torch.empty(tensor.shape, dtype=tensor.dtype)
                return made[tensor.memory]
            return value.item() if isinstance(value, np.generic) else value

        with FakeTensorMode():  # they have no memory
            state = mapped(step.tree, leaf)
        with skip_data(materialize_fake_tensors=True):
            torch.save(state, partial)
        try:
            with FakeTensorMode():
                torch.load(partial, weights_only=True)
        except Exception as error:
            raise StateError(
                "", f"torch.load(weights_only=True) cannot read it: {error}"
            ) from error
        starts = _storages(partial)
        first_named = {t.memory: t for t in reversed(step.tensors.values())}
        filled = [t for t in first_named.values() if t.size_bytes]
        places = dict(zip(made, starts, strict=True))
        with partial.open("r+b") as out:
            for tensor, box, values in step.windows(sorted(filled, key=lambda t: t.name)):
                out.seek(places[tensor.memory] + _offset(box, tensor))
                out.write(bytes_of(values).data)
            _sync(out)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return [path]


def mapped(tree: Any, leaf: Callable[[Any, str], Any], path: tuple[Any, ...] = ()) -> Any:
    """The tree with what `leaf` makes of each value and its name."""
    if type(tree) is dict:
        return {key: mapped(value, leaf, (*path, key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(mapped(value, leaf, (*path, i)) for i, value in enumerate(tree))
    return leaf(tree, dotted(path))


def _storages(path: Path) -> list[int]:
    """Where each storage's bytes begin in a file of torch.save, in the order of their keys."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = [(i.filename.split("/data/"), i.header_offset) for i in archive.infolist()]
        offsets = {int(name[1]): offset for name, offset in records if len(name) == 2}
        starts = []
        for key in sorted(offsets):
            file.seek(offsets[key] + 26)  # of the local header, whose names follow at 30
            lengths = np.frombuffer(file.read(4), dtype="<u2")
            starts.append(offsets[key] + 30 + int(lengths.sum()))
    return starts


def _offset(box: Box, tensor: WholeTensor) -> int:
    step = tensor.dtype.itemsize
    offset = 0
    for size, start in zip(reversed(tensor.shape), reversed(box.offsets), strict=True):
        offset += start * step
        step *= size
    return offset


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes its name once all is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)  # which does not exist, or is empty
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(file: BufferedIOBase) -> None:
    """Have it on the disk before it takes its name."""
    file.flush()
    os.fsync(file.fileno())
