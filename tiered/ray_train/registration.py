"""Steps on S3 as `ray.train.Checkpoint`s: registered with Ray Train, and opened again.

Ray Train takes what lies under the run's own folder (`RunConfig(storage_path)/name`), on the same
file system. Two cases:

    direct   The durable tier is that folder (`S3("s3://bucket/prefix")` is the storage path and the
             job has the run's name, as both are by default): a step's shards are registered where
             they are, without a copy. Ray Train then owns them: `CheckpointConfig(num_to_keep)`
             deletes, `S3.keep` is taken as None. Two owners would delete what the other lists.
    pointer  Otherwise: a folder with one small file, `tiered.json`, that says which step of which
             job is where. Ray Train owns the pointers, `S3.keep` the steps.

`ray.train.report` is a barrier, so all ranks report the same steps at the same point of their
loops: at a save that is due for S3, and at the end. Rank 0 says which; it has learned so in the
background, so that no rank waits for S3 there.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray.train
import ray.train.collective
from pyarrow.fs import PyFileSystem

from replication.records import Version
from tiered import register, retention
from tiered.config import S3
from tiered.errors import CheckpointError, ConfigError
from tiered.ray_train.step_files import StepFiles, checkpoint_of
from tiered.recovered import Recovered
from tiered.recovery import recover
from tiered.s3 import S3Store

logger = logging.getLogger(__name__)

POINTER = "tiered.json"
REFRESH_TIMEOUT_S = 20.0

_NAME = re.compile(r"(?:tiered-)?([0-9]{8,18})-([0-9]{12,18})")


class Registrar:
    """Registers a job's durable steps; one on each rank. Not thread-safe."""

    def __init__(self, job: str, s3: S3, rank: int) -> None:
        context = ray.train.get_context()
        self._storage: Any = context.get_storage()
        self._job, self._s3, self._rank = job, s3, rank
        self.is_direct = is_direct(job, s3, self._storage)
        self._last = _version_of(_registered())
        self._durable: list[Version] = []
        self._refresher: threading.Thread | None = None
        self.refresh()

    def refresh(self) -> None:
        """Have rank 0 look, in the background, which steps are durable."""
        if self._rank == 0 and (self._refresher is None or not self._refresher.is_alive()):
            self._refresher = threading.Thread(
                target=self._look, name="tiered-durable", daemon=True
            )
            self._refresher.start()

    def settle(self) -> None:
        """Wait until the last `refresh` is over."""
        if self._refresher is not None:
            self._refresher.join(REFRESH_TIMEOUT_S)

    def report(self, metrics_of: Callable[[Version], Mapping[str, Any]]) -> None:
        """Register the durable steps that are not yet; a collective of all ranks."""
        new: dict[Version, ray.train.Checkpoint] = {}
        if self._rank == 0:
            durable = [v for v in self._durable if self._last is None or v > self._last]
            try:  # now: once ranks have begun to report, all have to
                new = {version: self._checkpoint(version) for version in durable}
            except OSError as error:
                logger.warning("[%s] not registered with Ray Train yet: %s", self._job, error)
        for version in ray.train.collective.broadcast_from_rank_zero(sorted(new)):
            ray.train.report(
                {"step": version.step, "generation": version.generation, **metrics_of(version)},
                checkpoint=new.get(version),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            )
            self._last = version

    def _look(self) -> None:
        store = S3Store(self._s3, self._job)
        try:
            store.check()
            self._durable = list(register.read_listing(store.keys("index/")).versions)
        except CheckpointError as error:
            logger.warning("[%s] durable steps not listed for Ray Train: %s", self._job, error)
        finally:
            store.close()

    def _checkpoint(self, version: Version) -> ray.train.Checkpoint:
        folder, files = self._storage.experiment_fs_path, self._storage.storage_filesystem
        if self.is_direct:
            path = f"{folder}/{register.data_prefix(version).rstrip('/')}"
        else:
            path = f"{folder}/tiered-{version.generation:08d}-{version.step:012d}"
            tier = {**asdict(self._s3), "also_keep": retention.pack(self._s3.also_keep)}
            pointer = {"job": self._job, "step": version.step, "s3": tier}
            files.create_dir(path, recursive=True)
            with files.open_output_stream(f"{path}/{POINTER}") as out:
                out.write(json.dumps(pointer).encode())
        return ray.train.Checkpoint(path, filesystem=files)


_given: ray.train.Checkpoint | None = None  # in place of what Ray Train has registered,
_instead_of: ray.train.Checkpoint | None = None  # which is this


def give_checkpoint(job: str, version: Version) -> None:
    """Have this worker's `ray.train.get_checkpoint()` give a step of `job`, wherever it is.

    Not where the script has registered checkpoints of its own: those it expects. Ray Train has no
    public way to do it: the controller gives its workers what was reported, by an argument that two
    callbacks cannot both set. So the worker's context is changed, before the train function runs.
    """
    global _given, _instead_of
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context()
    registered = context.checkpoint
    if registered is None or _version_of(registered) is not None:
        _given, _instead_of = checkpoint_of(job, version), registered
        context.checkpoint = _given


def _registered() -> ray.train.Checkpoint | None:
    """The newest checkpoint that Ray Train has registered, as this worker knows."""
    newest = ray.train.get_checkpoint()
    return _instead_of if newest is not None and newest is _given else newest


def is_direct(job: str, s3: S3, storage: Any) -> bool:
    """Whether the job's objects on S3 are in the folder of the run itself."""
    if getattr(storage.storage_filesystem, "type_name", "") != "s3":
        return False
    where = "/".join(part for part in (s3.bucket, s3.prefix, job) if part)
    return where == str(storage.experiment_fs_path).strip("/")


def open_checkpoint(checkpoint: ray.train.Checkpoint, s3: S3 | None = None) -> Recovered:
    """Return the step behind a checkpoint that was registered here, as `tiered.recover` does.

    Args:
        checkpoint: `Result.checkpoint`, one of `Result.best_checkpoints`, or `get_checkpoint()`.
        s3: How to reach S3, where that takes more than boto3's own environment says.

    Raises:
        ConfigError: It is not one of ours.
        StepNotFoundError: Its step was deleted since.
    """
    files, path = checkpoint.filesystem, checkpoint.path.rstrip("/")
    if isinstance(files, PyFileSystem) and isinstance(files.handler, StepFiles):
        return files.handler.found
    if (version := _version_of(checkpoint)) is None:
        raise ConfigError(f"{checkpoint} was not registered by tiered")
    parent, _, name = path.rpartition("/")
    if name.startswith("tiered-"):
        assert files is not None
        with files.open_input_stream(f"{path}/{POINTER}") as file:
            pointer = json.loads(file.read())
        tier = pointer["s3"]
        found = S3(**{**tier, "also_keep": retention.unpack(tier["also_keep"])})
        return recover(pointer["job"], s3=s3 or found, step=pointer["step"])
    where, _, job = parent.removesuffix("/data").rpartition("/")
    return recover(job, s3=s3 or S3(f"s3://{where}"), step=version.step)


def _version_of(checkpoint: ray.train.Checkpoint | None) -> Version | None:
    """The version that a checkpoint of ours is of; None for any other."""
    if checkpoint is None:
        return None
    match = _NAME.fullmatch(checkpoint.path.rstrip("/").rpartition("/")[2])
    return Version(int(match[1]), int(match[2])) if match else None
