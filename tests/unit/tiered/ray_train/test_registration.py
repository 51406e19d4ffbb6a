"""Which steps are registered how, and what of Ray Train's checkpoints is ours."""

from types import SimpleNamespace

import pytest
import ray.train

from replication.records import Version
from tiered.config import S3
from tiered.errors import ConfigError
from tiered.ray_train.registration import _version_of, is_direct, open_checkpoint


def storage(path: str, kind: str = "s3") -> SimpleNamespace:
    filesystem = SimpleNamespace(type_name=kind)
    return SimpleNamespace(storage_filesystem=filesystem, experiment_fs_path=path)


@pytest.mark.parametrize(
    ("uri", "path", "kind", "expected"),
    [
        ("s3://bucket/runs", "bucket/runs/job", "s3", True),
        ("s3://bucket", "bucket/job", "s3", True),
        ("s3://bucket/runs", "bucket/runs/other", "s3", False),
        ("s3://other/runs", "bucket/runs/job", "s3", False),
        ("s3://bucket/runs", "/bucket/runs/job", "local", False),
    ],
)
def test_steps_in_the_runs_own_folder_are_registered_there(
    uri: str, path: str, kind: str, expected: bool
) -> None:
    assert is_direct("job", S3(uri), storage(path, kind)) is expected


@pytest.mark.parametrize(
    ("path", "version"),
    [
        ("bucket/runs/job/data/00000003-000000000060", Version(3, 60)),
        ("/shared/job/tiered-00000003-000000000060/", Version(3, 60)),
        ("bucket/runs/job/checkpoint_000003", None),
        ("bucket/runs/job/mine-00000003-000000000060", None),
    ],
)
def test_a_checkpoints_name_tells_its_version(path: str, version: Version | None) -> None:
    assert _version_of(SimpleNamespace(path=path)) == version  # type: ignore[arg-type]
    assert _version_of(None) is None


def test_somebody_elses_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="not registered by tiered"):
        open_checkpoint(ray.train.Checkpoint("/tmp/checkpoint_000003"))
