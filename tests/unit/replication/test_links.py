"""Which peers a holder cannot reach: its core, and its shell with peers that hang."""

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from replication import probes
from replication.links import MISSES, Links
from replication.probes import Probes
from replication.records import HolderId

A, B, C = (HolderId(name, "1") for name in "abc")


def test_one_is_cut_off_after_several_misses_in_a_row_and_one_answer_ends_it() -> None:
    links = Links()
    for _ in range(MISSES - 1):
        links.missed(A)
    links.answered(A)
    for _ in range(MISSES - 1):
        links.missed(A)
    assert links.cut_off == frozenset()
    links.missed(A)
    links.missed(B)
    assert links.cut_off == {A}
    links.answered(A)
    assert links.cut_off == frozenset()


def test_who_is_cut_off_is_asked_on_although_no_shards_go_there_any_more() -> None:
    links = Links()
    for peer in (A, B):
        for _ in range(MISSES):
            links.missed(peer)
    assert links.to_probe({C}, live={A, C}) == {A, C}  # B is gone
    assert links.cut_off == {A}
    links.answered(A)
    assert links.to_probe({C}, live={A, C}) == {C}


def test_misses_are_forgotten_with_the_buddy() -> None:
    links = Links()
    for _ in range(MISSES - 1):
        links.missed(A)
    links.to_probe({B}, live={A, B})
    links.missed(A)
    assert links.cut_off == frozenset()


async def _cut_off(asked: Probes, expected: set[HolderId]) -> None:
    async with asyncio.timeout(10.0):
        while asked.cut_off != expected:  # noqa: ASYNC110 - nothing else tells of it
            await asyncio.sleep(0.001)


def test_a_peer_that_hangs_is_cut_off_and_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "PROBE_S", 0.001)
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_S", 0.01)
    answers = {A: 0, B: 0}
    is_mended = asyncio.Event()

    async def hello(peer: HolderId) -> None:
        if peer == A:
            await is_mended.wait()
        answers[peer] += 1

    async def find(peer: HolderId) -> Any:
        if peer == C:
            raise ValueError("nobody has that name")
        return SimpleNamespace(hello=SimpleNamespace(remote=partial(hello, peer)))

    async def run() -> None:
        asked = Probes(find, lambda: ({A, B, C}, {A, B, C}))
        running = asyncio.create_task(asked.run())
        await _cut_off(asked, {A})
        assert answers[A] == 0
        assert answers[B] > MISSES
        is_mended.set()
        await _cut_off(asked, set())
        running.cancel()

    asyncio.run(run())
