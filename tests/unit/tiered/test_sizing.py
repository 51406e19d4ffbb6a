"""The calculator: the README's formula, and Daly's interval."""

import pytest

from replication.fleet import STORE_SHARE
from tiered import sizing
from tiered.cadence import Pace, daly_s
from tiered.config import S3, JobSettings, Memory
from tiered.retention import KeepEvery

S3_TIER = S3("s3://any-bucket")


@pytest.mark.parametrize(
    ("memory", "s3", "steps", "copies"),
    [
        (Memory(), None, 2 + 2 + 1, 2),
        (Memory(), S3_TIER, 2 + 2 + 1 + 2, 2),
        (Memory(keep=4, in_flight=1, replicas=2), S3_TIER, 4 + 1 + 1 + 2, 3),
        (Memory(replicas=0), None, 5, 1),
        (Memory(also_keep=(KeepEvery(100, at_most=3),)), None, 8, 2),
    ],
)
def test_a_host_has_room_for_each_step_in_all_copies(
    memory: Memory, s3: S3 | None, steps: int, copies: int
) -> None:
    size = sizing.size(JobSettings(memory, s3), 10**9, network_bytes_per_s=2e9)
    assert (size.steps, size.copies) == (steps, copies)
    assert size.checkpoint_bytes == steps * copies * 10**9
    assert size.store_bytes * STORE_SHARE == pytest.approx(size.checkpoint_bytes)
    assert size.replicate_s == (copies - 1) / 2


def test_the_cadence_is_what_auto_would_choose() -> None:
    pace = Pace(step_s=1.0, stall_s=0.5, replicate_s=0.0)
    settings = JobSettings(Memory())
    chosen = sizing.best_cadence(settings, pace, hosts=1, mtbf_s=3600.0)
    assert chosen.every_steps == 64
    assert 64 / 2**0.5 < daly_s(0.5, 3600.0) < 64 * 2**0.5
    rarely = [sizing.best_cadence(settings, pace, hosts).every_steps for hosts in (4, 4096)]
    assert rarely[0] > rarely[1], "more hosts fail more often"
