from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster is started, or joined where one runs: Ray's calls do that by themselves."""
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", False)
    yield
    assert not ray.is_initialized(), "a unit test has connected to a Ray cluster"
