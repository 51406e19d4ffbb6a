"""A clock that jumps, jumps back."""

import time

from chaos.faults.clocks import JUMP_S, set_off


def test_a_clock_is_off_by_so_much_however_often_it_jumps_and_then_right() -> None:
    true = time.time
    try:
        for seconds in (JUMP_S, -JUMP_S):
            before_s = true()
            set_off(seconds)(None)
            assert before_s + seconds <= time.time() <= true() + seconds
    finally:
        set_off(0.0)(None)
    assert time.time is true
