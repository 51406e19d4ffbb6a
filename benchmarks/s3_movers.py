"""Who moves a shard to S3 and back: ours, rclone, s3torchconnector. Each runs in a process alone.

Every one is handed the same bytes in this machine's memory, and returns how long it took and the
processor time of its process and children. What a holder and a trainer do besides moving bytes is
part of ours: every byte is hashed before it is sent, and verified when it is back.
"""

import itertools
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BUCKET = "benchmarks"
MIB = 1 << 20
PART_BYTES = 16 * MIB
AT_ONCE = 8
CHUNK_BYTES = 64 * MIB


def image_of(size_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes to move, the same for each mover."""
    return np.random.default_rng(0).integers(0, 255, size_bytes, dtype=np.uint8)


class Mover:
    """What the movers have in common; see `benchmarks.worker` for how they are called."""

    def open(self, size_bytes: int, folder: str) -> None:
        """Get ready; not measured."""
        self.image = image_of(size_bytes)
        self.folder = Path(folder)
        self.back = np.zeros(size_bytes, np.uint8)

    def flush(self, key: str) -> list[float]:
        """Store the image under `key`; seconds, and processor seconds."""
        return _measured(lambda: self._flush(key))

    def fetch(self, key: str) -> list[float]:
        """Read `key` into memory that was used before, and compare it; as `flush`."""
        self.back[:] = 0
        measured = _measured(lambda: self._fetch(key))
        if not np.array_equal(self.back, self.image):
            raise ValueError(f"{key} came back different")
        return measured

    def _flush(self, key: str) -> None:
        raise NotImplementedError

    def _fetch(self, key: str) -> None:
        raise NotImplementedError


class Ours(Mover):
    """What a holder does to flush a shard, and a trainer to read it; no Ray in between."""

    def open(self, size_bytes: int, folder: str) -> None:
        """See Mover."""
        from replication.checksum import digest
        from replication.records import ShardKey, ShardPlan, ShardRecord, Version
        from tiered.config import S3
        from tiered.s3 import S3Store

        super().open(size_bytes, folder)
        cuts = [0, *range(MIB, size_bytes, CHUNK_BYTES), size_bytes]  # the first is the header
        self.chunks = [[self.image[a:b]] for a, b in itertools.pairwise(cuts)]
        plan = ShardPlan(1, tuple(chunk[0].nbytes for chunk in self.chunks))
        key = ShardKey("job", Version(1, 0), 0)
        self.record = ShardRecord(key, plan, tuple(digest(chunk) for chunk in self.chunks))
        self.store = S3Store(S3(f"s3://{BUCKET}/ours"), "job")

    def flush_unchanged(self, key: str, earlier: str) -> list[float]:
        """As `flush`, when all but the first chunk is as it was under `earlier`."""
        from replication.durable import Earlier, Run

        size_bytes = self.image.nbytes - MIB
        known = Earlier(self._key(earlier), (Run(MIB, MIB, size_bytes),))
        return _measured(lambda: self._upload(key, known))

    def _flush(self, key: str) -> None:
        self._upload(key, None)

    def _upload(self, key: str, earlier: Any) -> None:
        from replication.holder import _first_corrupt

        assert _first_corrupt(self.chunks, self.record.digests) is None
        self.store.upload(self._key(key), self.chunks, earlier)

    def _fetch(self, key: str) -> None:
        from replication.records import ShardRecord
        from tiered.fetch import DurableTier, ShardReader
        from tiered.history import ShardSources
        from tiered.pieces import Piece

        record = ShardRecord(self._shard(key), self.record.plan, self.record.digests)
        sources = ShardSources(record, (), is_durable=True)
        reader = ShardReader(sources, [DurableTier(self.store, sources)])
        self.back[:MIB] = reader.chunk(0)[0]
        reader.fill([Piece(0, self.back[MIB:])])

    def _key(self, key: str) -> str:
        from tiered import register

        return register.shard_key(self._shard(key).version, 0)

    def _shard(self, key: str) -> Any:
        from replication.records import Version

        return self.record.key._replace(version=Version(1, int(key)))


class Rclone(Mover):
    """`rclone copyto`, one process for each copy, from and to a file in shared memory."""

    def open(self, size_bytes: int, folder: str) -> None:
        """See Mover."""
        super().open(size_bytes, folder)
        self.image.tofile(self.folder / "image")
        (self.folder / "back").write_bytes(bytes(size_bytes))  # its pages are there
        self.program = os.environ["BENCH_RCLONE"]

    def fetch(self, key: str) -> list[float]:
        """See Mover."""
        measured = _measured(lambda: self._fetch(key))
        self.back = np.fromfile(self.folder / "back", np.uint8)
        if not np.array_equal(self.back, self.image):
            raise ValueError(f"{key} came back different")
        return measured

    def _flush(self, key: str) -> None:
        self._copy(str(self.folder / "image"), f"s3:{BUCKET}/rclone/{key}")

    def _fetch(self, key: str) -> None:
        self._copy(f"s3:{BUCKET}/rclone/{key}", str(self.folder / "back"))

    def _copy(self, source: str, target: str) -> None:
        environment = {
            **os.environ,
            "RCLONE_CONFIG_S3_TYPE": "s3",
            "RCLONE_CONFIG_S3_PROVIDER": "SeaweedFS",
            "RCLONE_CONFIG_S3_ENV_AUTH": "true",
            "RCLONE_CONFIG_S3_ENDPOINT": os.environ["AWS_ENDPOINT_URL"],
            "RCLONE_CONFIG": "/dev/null",
        }
        subprocess.run(
            [self.program, "copyto", source, target, "--ignore-times", "--no-check-dest",
             "--s3-no-check-bucket", "--s3-chunk-size", f"{PART_BYTES // MIB}Mi",
             "--s3-upload-concurrency", str(AT_ONCE), "--multi-thread-streams", str(AT_ONCE),
             "--multi-thread-cutoff", "16Mi", "--multi-thread-chunk-size", "8Mi", "--quiet"],
            env=environment, check=True,
        )  # fmt: skip


class Connector(Mover):
    """s3torchconnector's `S3Checkpoint`: its writer, handed views, and its reader's `readinto`."""

    def open(self, size_bytes: int, folder: str) -> None:
        """See Mover."""
        from s3torchconnector import S3Checkpoint, S3ClientConfig

        super().open(size_bytes, folder)
        config = S3ClientConfig(force_path_style=True, part_size=PART_BYTES)
        self.s3 = S3Checkpoint(
            os.environ["AWS_REGION"],
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            s3client_config=config,
        )

    def _flush(self, key: str) -> None:
        with self.s3.writer(f"s3://{BUCKET}/connector/{key}") as writer:
            for start in range(0, self.image.nbytes, PART_BYTES):
                writer.write(memoryview(self.image[start : start + PART_BYTES]))

    def _fetch(self, key: str) -> None:
        reader = self.s3.reader(f"s3://{BUCKET}/connector/{key}")
        view, done = memoryview(self.back), 0
        while count := reader.readinto(view[done:]):
            done += count


def _measured(work: Callable[[], None]) -> list[float]:
    cpu_s, began_s = _cpu_s(), time.perf_counter()
    work()
    return [time.perf_counter() - began_s, _cpu_s() - cpu_s]


def _cpu_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
