"""A step as files, wherever it is: what `ray.train.get_checkpoint()` gives where a callback is.

A `ray.train.Checkpoint` is a path on a pyarrow file system, and pyarrow takes file systems that are
written in Python. This one has one folder, a step's, with what the step's folder on S3 has:
`rank-00000.safetensors` and so on. Its bytes are read when they are asked for, chunk by chunk,
verified, from a holder's memory or, where no holder has them, from S3. Nothing can be written.
"""

import bisect
import io
import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray.train
from pyarrow import fs

from replication.records import Version
from tiered import register
from tiered.fetch import ShardReader
from tiered.recovered import Recovered
from tiered.recovery import recover


class ShardFile(io.RawIOBase):
    """A shard's image, read-only; holds one chunk at a time. Not thread-safe."""

    def __init__(self, reader: ShardReader) -> None:
        super().__init__()
        self._reader = reader
        self._stops = list(itertools.accumulate(reader.sources.record.plan.chunk_sizes))
        self._at = 0
        self._index, self._chunk = -1, memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go there; returns where that is, in bytes from the start."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stops[-1]}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, into: Any) -> int:
        """Fill a buffer up to the end of a chunk; returns how many bytes, 0 at the end.

        Raises:
            StepNotFoundError: No tier has an intact copy of the chunk.
        """
        index = bisect.bisect_right(self._stops, self._at)
        if index == len(self._stops):
            return 0
        if index != self._index:
            self._chunk = memoryview(b"".join(part.data for part in self._reader.chunk(index)))
            self._index = index
        start = self._at - (self._stops[index] - len(self._chunk))
        target = memoryview(into).cast("B")
        count = min(len(target), len(self._chunk) - start)
        target[:count] = self._chunk[start : start + count]
        self._at += count
        return count

    def close(self) -> None:
        """Let go of the chunk and of connections."""
        if not self.closed:
            self._chunk = memoryview(b"")
            self._reader.close()
        super().close()


class StepFiles(fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """The handler of such a file system. It pickles as the names of job and step."""

    def __init__(self, job: str, version: Version) -> None:
        self.job, self.version = job, version
        self._found: Recovered | None = None

    def __reduce__(self) -> Any:
        return StepFiles, (self.job, self.version)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepFiles):
            return NotImplemented
        return (self.job, self.version) == (other.job, other.version)

    def __hash__(self) -> int:
        return hash((self.job, self.version))

    @property
    def folder(self) -> str:
        """The step's only folder."""
        name = register.data_prefix(self.version).rstrip("/").rpartition("/")[2]
        return f"{self.job}/{name}"

    @property
    def found(self) -> Recovered:
        """The step; looked for when it is first needed.

        Raises:
            StepNotFoundError: It is gone.
        """
        if self._found is None:
            self._found = recover(self.job, step=self.version.step)
        return self._found

    def get_type_name(self) -> str:
        """Pyarrow's word for what it is."""
        return "tiered"

    def normalize_path(self, path: str) -> str:
        """Without slashes at the ends."""
        return path.strip("/")

    def get_file_info(self, paths: Sequence[str]) -> list[Any]:
        """What each of these paths is."""
        return [self._info(path.strip("/")) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        """What the step's folder has."""
        if selector.base_dir.strip("/") == self.folder:
            return [self._info(f"{self.folder}/{name}") for name in self._names()]
        if selector.allow_not_found:
            return []
        raise FileNotFoundError(selector.base_dir)

    def open_input_stream(self, path: str) -> Any:
        """A shard, from its beginning."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        """A shard."""
        folder, _, name = path.strip("/").rpartition("/")
        if folder != self.folder or name not in self._names():
            raise FileNotFoundError(path)
        raw = ShardFile(self.found.reader(self._names()[name]))
        return pa.PythonFile(io.BufferedReader(raw), mode="r")  # whole reads, over chunks' ends

    def _names(self) -> dict[str, int]:
        """File names to ranks."""
        keys = ((register.shard_key(self.version, r), r) for r in range(self.found.world_size))
        return {key.rpartition("/")[2]: rank for key, rank in keys}

    def _info(self, path: str) -> Any:
        if path == self.folder:
            return fs.FileInfo(path, type=fs.FileType.Directory)
        folder, _, name = path.rpartition("/")
        if folder != self.folder or name not in self._names():
            return fs.FileInfo(path, type=fs.FileType.NotFound)
        plan = self.found.reader(self._names()[name]).sources.record.plan
        return fs.FileInfo(path, type=fs.FileType.File, size=plan.size_bytes)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError(f"step {self.version.step} of {self.job!r} is read-only")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refuse
    delete_file = move = copy_file = open_output_stream = open_append_stream = _refuse


def checkpoint_of(job: str, version: Version) -> ray.train.Checkpoint:
    """A step of a job as Ray Train's scripts read one."""
    files = StepFiles(job, version)
    return ray.train.Checkpoint(files.folder, filesystem=fs.PyFileSystem(files))
