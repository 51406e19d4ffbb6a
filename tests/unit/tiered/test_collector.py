"""Pausing the collector of garbage, in several threads at once."""

import gc
from collections.abc import Iterator

import pytest

from tiered.collector import collector_paused


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_pauses_that_overlap_end_with_the_last_one() -> None:
    one, other = collector_paused(), collector_paused()
    one.__enter__()
    other.__enter__()
    assert not gc.isenabled()
    one.__exit__(None, None, None)
    assert not gc.isenabled()
    other.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collector_paused(), collector_paused():
        pass
    assert not gc.isenabled()
