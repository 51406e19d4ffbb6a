"""What holds for every test."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tiered import s3_link

# No example is timed: other tests, and other programs, run beside.
settings.register_profile(
    "shared", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def every_link_is_given_back() -> Iterator[None]:
    """A store that stays open keeps threads and sockets, and some later test is blamed for them."""
    before = {key: users for key, (_, users) in s3_link._links.items()}
    yield
    left = {key: users for key, (_, users) in s3_link._links.items()}
    assert all(users <= before.get(key, 0) for key, users in left.items()), "an S3Store is open"
