import itertools

from hypothesis import given
from hypothesis import strategies as st

from tiered.breaker import (
    FAILURES,
    HANG_S,
    MAX_PAUSE_S,
    PAUSE_S,
    PROBE_S,
    REFUND,
    RETRIES,
    Breaker,
    RetryBudget,
)


def opened(now_s: float = 0.0, spread: float = 0.0) -> Breaker:
    breaker = Breaker(spread)
    for _ in range(FAILURES):
        assert breaker.admit(now_s) == "go"
        breaker.failed(now_s, "gone")
    assert breaker.is_open
    return breaker


def test_failures_in_a_row_open_it_and_an_answer_between_them_does_not() -> None:
    breaker = Breaker()
    for _ in range(10):
        for _ in range(FAILURES - 1):
            breaker.failed(0.0, "gone")
        breaker.answered(0.0)
    assert breaker.admit(0.0) == "go"
    assert opened().problem == "gone"


def test_while_it_is_open_one_call_at_a_time_finds_out() -> None:
    breaker = opened(100.0)
    assert breaker.admit(100.0 + PAUSE_S - 0.1) == "wait"
    assert breaker.wait_s(100.0) == PAUSE_S
    assert breaker.admit(100.0 + PAUSE_S) == "probe"
    assert breaker.admit(100.0 + PAUSE_S) == "wait"
    breaker.answered(105.0)
    assert not breaker.is_open
    assert breaker.admit(105.0) == "go"
    assert breaker.wait_s(105.0) == 0.0


def test_failed_probes_come_more_and_more_seldom() -> None:
    breaker, now_s, probes = opened(), 0.0, []
    while now_s < 3600:
        now_s += 0.5
        if breaker.admit(now_s) == "probe":
            probes.append(now_s)
            breaker.failed(now_s, "still gone", was_probe=True)
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert gaps[:4] == [2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S, MAX_PAUSE_S]
    assert set(gaps[4:]) == {MAX_PAUSE_S}
    assert breaker.problem == "still gone"  # it may be another reason by now
    assert breaker.since_s == 0.0
    breaker.answered(now_s)
    for _ in range(FAILURES):
        breaker.failed(now_s, "again")
    assert breaker.wait_s(now_s) == PAUSE_S, "an answer forgets the pauses"


def test_what_is_urgent_is_a_probe_of_its_own() -> None:
    breaker = opened()
    assert breaker.admit(0.1) == "wait"
    assert breaker.admit(0.1, is_urgent=True) == "probe"
    breaker.answered(0.2)
    assert breaker.admit(0.2, is_urgent=True) == "go"


def test_a_lost_probe_is_followed_by_another() -> None:
    breaker = opened()
    assert breaker.admit(PAUSE_S) == "probe"
    assert breaker.admit(PAUSE_S + PROBE_S - 0.1) == "wait"
    assert breaker.admit(PAUSE_S + PROBE_S) == "probe"


def test_failures_of_calls_from_before_do_not_put_the_probe_off() -> None:
    breaker = opened()
    breaker.failed(PAUSE_S / 2, "gone")
    assert breaker.admit(PAUSE_S) == "probe"


def test_hosts_do_not_all_probe_at_once() -> None:
    assert opened(spread=0.5).wait_s(0.0) == 1.5 * PAUSE_S


def test_a_small_call_that_hangs_opens_it() -> None:
    breaker = Breaker()
    ticket = breaker.watch(0.0)
    assert breaker.admit(HANG_S - 0.1) == "go"
    assert breaker.admit(HANG_S) == "wait"
    assert breaker.is_open
    assert "no answer for 10 s" in breaker.problem
    breaker.unwatch(ticket)
    assert breaker.admit(HANG_S + PAUSE_S) == "probe"


def test_a_small_call_that_hangs_while_others_are_answered_does_not() -> None:
    breaker = Breaker()
    breaker.watch(0.0)
    breaker.answered(1.0)
    assert breaker.admit(HANG_S) == "go"
    ended = breaker.watch(HANG_S)
    breaker.unwatch(ended)
    breaker.unwatch(ended)
    assert breaker.admit(3 * HANG_S) == "go"


@given(st.lists(st.sampled_from(["admit", "fail", "answer", "later", "hang", "end"])))
def test_it_is_never_open_for_good(events: list[str]) -> None:
    breaker, now_s, tickets, probes = Breaker(0.9), 0.0, [0], 0
    for event in events:
        match event:
            case "admit":
                is_probe = breaker.admit(now_s) == "probe"
                probes += is_probe
                if is_probe:
                    breaker.failed(now_s, "gone", was_probe=True)
            case "fail":
                breaker.failed(now_s, "gone")
            case "answer":
                breaker.answered(now_s)
                assert not breaker.is_open
            case "later":
                now_s += 7.0
            case "hang":
                tickets.append(breaker.watch(now_s))
            case _:
                breaker.unwatch(tickets.pop() if len(tickets) > 1 else 0)
        assert breaker.wait_s(now_s) <= 2 * MAX_PAUSE_S
    assert breaker.admit(now_s + 2 * MAX_PAUSE_S + PROBE_S) in ("go", "probe", "wait")
    if breaker.is_open:
        assert breaker.admit(now_s + 4 * MAX_PAUSE_S + 2 * PROBE_S) == "probe"


def test_retries_are_a_burst_and_then_a_share_of_what_is_answered() -> None:
    budget = RetryBudget()
    assert sum(budget.spend() for _ in range(1000)) == RETRIES
    for _ in range(100):
        budget.refund()
    assert sum(budget.spend() for _ in range(1000)) == 100 * REFUND
