"""Every deadline and period of the simulated cluster, in seconds of virtual time.

About a third of the real ones, while saves are rarer than in most jobs: a small run then meets a
deadline that passes, a repair that is tried again and a life that is given up as a matter of
course, and little of it is spent waiting.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

HEARTBEAT_TIMEOUT_S = 1.0
CALL_TIMEOUT_S = 4.0
VERIFY_TIMEOUT_S = 20.0
UPLOAD_TIMEOUT_S = 20.0
SETTLE_TIMEOUT_S = 10.0
COORDINATOR_RESTART_S = 1.5  # by then the register has served what another one had asked of it
NODE_LOST_S = 6.0  # a host that died stays in the cluster's list for so long

FETCH_TIMEOUT_S = 5.0
OFFER_TIMEOUT_S = 7.5
REPORT_TIMEOUT_S = 4.0
STAGE_TIMEOUT_S = 5.0
ADMIT_TIMEOUT_S = 2.0
PROBE_S = 3.0  # with its time-out, of a peer that is silent
HOLDER_TICK_S = 6.0
SCRUB_PERIOD_S = 10.0
READ_S = 0.005
TICKS_AFTER_S = (0.25, 1.1, 5.1)  # when an offer that failed may be due again

ASK_TIMEOUT_S = 20.0  # a rank then asks again: the coordinator may have died
BEGIN_TIMEOUT_S = 80.0
ROOM_TIMEOUT_S = 8.0
STUCK_S = 40.0  # by then a step that is whole is committed with the copies that there are
STALL_S = 25.0  # without progress a life is given up

S3_TIMEOUT_S = 5.0
S3_DELAY_S = 0.2
S3_SLOW_S = 8.0
LATE_S = (0.3, 2.0, 8.0)  # a message that is late is late by up to one of these
VERY_LATE_S = (2.0, 8.0, 25.0)  # so that an order comes when another life has begun
MINUTE_S = 20.0  # of faults: how long they last


def shrunk_cores() -> AbstractContextManager[Any]:
    """The same for the cores' own periods, while it is entered."""
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch("tiered.repair.REPAIR_BASE_S", 20.0))
    patches.enter_context(mock.patch("tiered.repair.RESTORES_FIRST_S", 10.0))
    patches.enter_context(mock.patch("tiered.admission.STUCK_S", STUCK_S))
    patches.enter_context(mock.patch("replication.membership.HOPELESS_MISSES", 10))
    return patches


FLIP = 1 << 40  # added to a chunk's content when a bit flips; never back to what it was
