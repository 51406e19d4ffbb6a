"""A step as a pyarrow file system: its bytes, its names, and that it cannot be changed."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyarrow import fs
from ray.train import Checkpoint

from replication.records import ShardPlan, Version
from tiered.ray_train import open_checkpoint, step_files
from tiered.ray_train.step_files import ShardFile, StepFiles, checkpoint_of

CHUNKS = {0: [b"abcde", b"fg", b"hijklm"], 1: [b"0123", b"456"]}
FOLDER = "job/00000002-000000000040"


class Reader:
    """One rank's shard."""

    def __init__(self, rank: int) -> None:
        self.chunks = CHUNKS[rank]
        plan = ShardPlan(2, tuple(map(len, self.chunks)))
        self.sources = SimpleNamespace(record=SimpleNamespace(plan=plan))
        self.read: list[int] = []

    def chunk(self, index: int) -> list[Any]:
        self.read.append(index)
        data = np.frombuffer(self.chunks[index], np.uint8)
        return [data[:1], data[1:]]

    def close(self) -> None:
        self.read.append(-1)


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    found = SimpleNamespace(world_size=2, reader=Reader, step=40)
    monkeypatch.setattr(step_files, "recover", lambda job, step: found)
    return checkpoint_of("job", Version(2, 40))


def test_a_checkpoint_is_copied_to_a_directory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.to_directory(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert files == {
        "rank-00000.safetensors": b"abcdefghijklm",
        "rank-00001.safetensors": b"0123456",
    }


def test_it_has_one_folder_and_nothing_else(checkpoint: Checkpoint) -> None:
    files: Any = checkpoint.filesystem
    paths = [FOLDER, f"{FOLDER}/rank-00001.safetensors", f"{FOLDER}/rank-00002.safetensors", "job"]
    kinds = [(info.type, info.size) for info in files.get_file_info(paths)]
    assert kinds == [
        (fs.FileType.Directory, None), (fs.FileType.File, 7),
        (fs.FileType.NotFound, None), (fs.FileType.NotFound, None),
    ]  # fmt: skip
    assert files.get_file_info(fs.FileSelector("elsewhere", allow_not_found=True)) == []
    with pytest.raises(FileNotFoundError):
        files.get_file_info(fs.FileSelector("elsewhere"))
    with pytest.raises(FileNotFoundError):
        files.open_input_file(f"{FOLDER}/rank-00002.safetensors")


def test_it_is_read_at_any_place_over_the_ends_of_chunks(checkpoint: Checkpoint) -> None:
    files: Any = checkpoint.filesystem
    with files.open_input_file(f"{FOLDER}/rank-00000.safetensors") as file:
        assert file.size() == 13
        file.seek(3)
        assert file.read(6) == b"defghi"
        assert file.read() == b"jklm"
        assert file.read() == b""
        file.seek(0)
        assert file.read(1) == b"a"


def test_a_chunk_is_read_once_and_the_reader_closed_once() -> None:
    reader: Any = Reader(0)
    file = ShardFile(reader)
    assert [file.read(2) for _ in range(4)] == [b"ab", b"cd", b"e", b"fg"]
    assert file.seek(-1, io.SEEK_END) == 12
    assert file.read(5) == b"m"
    file.close()
    file.close()
    assert reader.read == [0, 1, 2, -1]


@pytest.mark.parametrize("change", ["delete_file", "create_dir", "open_output_stream"])
def test_nothing_can_be_written(checkpoint: Checkpoint, change: str) -> None:
    with pytest.raises(OSError, match="read-only"):
        getattr(checkpoint.filesystem, change)(f"{FOLDER}/rank-00000.safetensors")


def test_it_travels_as_names_and_is_opened_as_a_step(checkpoint: Checkpoint) -> None:
    there = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301 -- our own
    assert there.filesystem == checkpoint.filesystem
    assert there.path == FOLDER
    assert open_checkpoint(there).step == 40
    assert checkpoint.filesystem != checkpoint_of("job", Version(2, 50)).filesystem
    assert StepFiles("job", Version(2, 40)) != "job"
