"""Checkpoints of other tools as a step: what `tiered.import_step` does.

The files are mapped into memory, not read into it, and a save copies each part once, into the
object store. A DCP directory has its tensors in pickled pieces: those are put together in a file
of the same size first. Nothing of any format is unpickled but what torch calls weights.
"""

import contextlib
import dataclasses
import io
import json
import math
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from tiered import torch_versions
from tiered.boxes import strides
from tiered.checkpointer import Checkpointer
from tiered.config import S3, Memory, check_job_name, check_step
from tiered.errors import ConfigError, StateError, StepNotFoundError
from tiered.export_dcp import calling_dcp
from tiered.handle import SaveHandle
from tiered.recovery import newest_on_s3, recover

ImportFormat = Literal["safetensors", "dcp", "torch"]
INDEX = "model.safetensors.index.json"
TIMEOUT_S = 600.0

# What a DCP directory's .metadata is made of; its pickle may name nothing else.
_METADATA_MODULES = frozenset({"torch.distributed.checkpoint.metadata"})
_METADATA_NAMES = frozenset(
    {
        ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("builtins", "set"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
    }
)  # fmt: skip


def import_step(
    job: str,
    source: str | Path,
    *,
    step: int = 0,
    format: ImportFormat | None = None,
    key: str | None = None,
    memory: Memory | None = None,
    s3: S3 | None = None,
    timeout_s: float = TIMEOUT_S,
) -> SaveHandle:
    """Commit a checkpoint of another tool as a step of a new job; return once it is.

    It is saved as by one rank, so any number of ranks can resume from it.

    Args:
        job: A name under which nothing was saved yet.
        source: A safetensors file, a directory of such files (with their index, if they are
            several), a DCP directory, or a file of `torch.save`.
        step: Which step it is to be.
        format: What `source` is; None: looked at.
        key: Put all of it under this key of the state: "model" for a file of weights that
            `restore({"model": model})` is to read.
        memory: The memory tier's policy; `keep` and `replicas` are what matters.
        s3: With it, the step is on S3 when this returns.
        timeout_s: Deadline for the step to be committed.

    Returns:
        The save's handle, at level "replicated", with `s3` at "durable".

    Raises:
        ConfigError: `source` is none of these, or the job has steps already; says what to change.
        StateError: The checkpoint holds what only unpickling could read; names the key.
        DeadlineError, SaveError: As `SaveHandle.wait`.
    """
    check_job_name(job)
    check_step(step)
    path = Path(source)
    kind = format_of(path, format)
    _check_new(job, s3)
    memory = dataclasses.replace(memory or Memory(), prepare=False)
    s3 = s3 and dataclasses.replace(s3, every_steps=1)
    with opened(path, kind) as state:
        content = {key: state} if key else state
        checkpointer = Checkpointer(job, memory, s3, rank=0, world_size=1)
        try:
            checkpointer.restore({})  # there is nothing to restore: it begins
            handle = checkpointer.save(step, content, force=True)
            assert handle is not None
            handle.wait("replicated" if s3 is None else "durable", timeout_s)
        finally:
            checkpointer.close(end_local=s3 is not None)
    return handle


def _check_new(job: str, s3: S3 | None) -> None:
    """An import begins a generation: it would fence off trainers of this name.

    Both places are asked: a cluster that never ran the job does not know what S3 has of it.

    Raises:
        ConfigError: The job has a step.
        DurableStoreError, DeadlineError: It is not known whether it has.
    """
    found: dict[str, int] = {}
    with contextlib.suppress(StepNotFoundError, ConfigError):  # no cluster with checkpoints
        found["memory"] = recover(job).step
    if s3 is not None:
        with contextlib.suppress(StepNotFoundError):
            found[s3.uri] = newest_on_s3(job, s3).step
    for where, step in found.items():
        raise ConfigError(
            f"job {job!r} has step {step} in {where} already; import under a name of its own, then "
            "resume under that"
        )


def format_of(path: Path, wanted: str | None) -> str:
    """What there is to import, by its first bytes or files.

    Raises:
        ConfigError: Nothing of what can be imported; or something else than was wanted.
    """
    if wanted is not None and wanted not in get_args(ImportFormat):
        allowed = ", ".join(map(repr, get_args(ImportFormat)))
        raise ConfigError(f"format={wanted!r} must be one of {allowed}, or None")
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if path.is_dir():
        found = "dcp" if (path / ".metadata").is_file() else "safetensors"
        if found == "safetensors" and not _safetensors_files(path):
            raise ConfigError(
                f"{path} has neither .metadata (of DCP) nor *.safetensors; name the file itself"
            )
    else:
        with path.open("rb") as file:
            head = file.read(9)
        found = "torch" if head.startswith(b"PK\x03\x04") else "safetensors"
        if head.startswith(b"\x80") and head[8:] != b"{":
            raise ConfigError(f"{path} is a pickle, as torch.save wrote before 1.6: save it anew")
    if wanted not in (None, found):
        raise ConfigError(f"format={wanted!r}, but {path} looks like {found!r}")
    return found


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[dict[Any, Any]]:
    """A checkpoint's state, whose tensors are in files that are mapped.

    Raises:
        ConfigError, StateError: It cannot be read; says why.
    """
    if kind == "safetensors":
        yield _read_safetensors(path)
    elif kind == "torch":
        yield _read_torch(path)
    else:
        with tempfile.TemporaryFile(dir=path.parent if _is_writable(path.parent) else None) as file:
            yield _read_dcp(path, Path(f"/proc/self/fd/{file.fileno()}"))


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# --- safetensors --------------------------------------------------------------------------------


def _safetensors_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX} is no index of safetensors files: {error}") from error
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ConfigError(f"{folder / INDEX} names files that are not there: {missing}")
    return sorted(folder / name for name in names)


def _read_safetensors(path: Path) -> dict[Any, Any]:
    """Name to tensor; their memory is the file's."""
    state: dict[Any, Any] = {}
    for file in _safetensors_files(path) if path.is_dir() else [path]:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    if name in state:
                        raise ConfigError(
                            f"{file} has {name!r}, as another file has; add {INDEX}, or import "
                            "one of them"
                        )
                    state[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{file} is no safetensors file: {error}") from error
    return state


# --- torch.save ---------------------------------------------------------------------------------


def _read_torch(path: Path) -> dict[Any, Any]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"{path} holds more than torch.load(weights_only=True) reads: {error}"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path} holds a {type(state).__name__}; save a dict of what is in it")
    return dict(state)


# --- torch.distributed.checkpoint ---------------------------------------------------------------


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse whatever does not belong into a .metadata file."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_known = module in _METADATA_MODULES and "." not in name
        if not (is_known or is_dtype or (module, name) in _METADATA_NAMES):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Called by `dcp.load`; as stock does it, but for what may be unpickled."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Called by `dcp.load` for what is no tensor."""
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise StateError(name, f"only unpickling could read it: {error}") from error


def _read_dcp(folder: Path, scratch: Path) -> dict[Any, Any]:
    """The state, its tensors in `scratch`, a file that is mapped."""
    reader = _Reader(folder)
    try:
        metadata = reader.read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise ConfigError(f"{folder}/.metadata is none of torch's DCP: {error}") from error
    entries = metadata.state_dict_metadata
    tensors = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    sizes = {n: math.prod(e.size) * e.properties.dtype.itemsize for n, e in tensors.items()}
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = end
        end += -(-size // 64) * 64
    memory: Any = torch.UntypedStorage.from_file(str(scratch), True, max(64, end))
    flat: dict[str, Any] = {}
    for name, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            flat[name] = None
            continue
        dtype = entry.properties.dtype
        start = places[name] // dtype.itemsize
        flat[name] = torch.empty(0, dtype=dtype).set_(
            memory, start, entry.size, strides(entry.size)
        )
    with calling_dcp(f"{folder} cannot be read"):
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        torch_versions.load_alone(flat, reader, planner)
    paths = metadata.planner_data
    return torch_versions.nested(flat, paths) if paths else flat
