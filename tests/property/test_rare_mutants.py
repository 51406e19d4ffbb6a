"""Broken cores that few seeds of the simulator catch, if any: each fails a directed test.

The simulator needs several faults at once to reach them. What it once found is kept as the events
that showed it; here those tests are run on the broken core, and have to fail.
"""

from collections.abc import Callable
from unittest import mock

import pytest

from tests.sim.mutants import MUTANTS
from tests.unit.replication import test_inventory_regressions as of_holder
from tests.unit.tiered import test_job as of_policies
from tests.unit.tiered import test_job_regressions as of_job
from tests.unit.tiered import test_repair as of_repair

CAUGHT_BY: dict[str, Callable[[], None]] = {
    "waits_for_lost_uploads": of_job.test_an_upload_on_a_lost_holder_is_not_waited_for,
    "never_reminds": of_job.test_orders_are_repeated_because_one_may_have_been_lost,
    "repairs_from_the_first": of_job.test_a_repair_that_failed_is_tried_from_another_copy,
    "keeps_surplus": (
        of_repair.test_a_copy_more_than_the_policy_asks_for_is_let_go_of_and_the_writers_stays
    ),
    "releases_any": lambda: (
        of_repair.test_two_coordinators_with_different_views_leave_as_many_as_the_policy_asks_for(1)
    ),
    "collected_comes_back": of_job.test_what_was_collected_is_not_committed_again,
    "forgets_overtaken": lambda: of_job.test_a_late_rank_of_an_overtaken_life_does_not_take_over(
        is_claimed=False
    ),
    "claims_once": of_job.test_a_generation_claimed_while_s3_was_silent_is_claimed_anew,
    "answers_without_sources": (
        of_job.test_a_late_rank_is_told_where_to_read_although_the_coordinator_died
    ),
    "believes_unread": of_job.test_a_copy_that_came_back_while_others_were_read_is_read_too,
    "forgets_lost_publication": of_job.test_a_publication_without_an_answer_is_looked_for_on_s3,
    "counts_its_own": of_job.test_what_was_inherited_counts_among_what_is_kept,
    "keeps_abandoned": (
        of_job.test_what_a_crash_left_half_saved_goes_as_soon_as_the_next_generation_starts
    ),
    "never_scrubs": of_holder.test_what_is_pinned_is_read_again_and_a_flipped_bit_found,
    "corrupt_untold": (
        of_holder.test_a_corrupt_copy_is_told_of_and_told_of_again_until_it_is_replaced
    ),
    "corrupt_told_once": (
        of_holder.test_a_corrupt_copy_is_told_of_and_told_of_again_until_it_is_replaced
    ),
    "spoils_one": of_holder.test_rot_in_bytes_that_two_steps_share_spoils_both,
    "keeps_quarantined": of_holder.test_a_corrupt_copy_is_replaced_by_a_verified_one,
}
# Broken around the cores, in the simulator's own shells.
SHELLS = {"unread_is_bad", "silence_is_final", "shares_unread"}


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_rare_mutant_fails_its_directed_test(name: str) -> None:
    directed, cores = CAUGHT_BY[name], MUTANTS[name].cores
    directed()
    with (
        mock.patch.object(of_job, "Job", cores.job),
        mock.patch.object(of_policies, "Job", cores.job),
        mock.patch.object(of_job, "FlushQueue", return_value=cores.job("job").flushes),
        mock.patch.object(of_holder, "Inventory", cores.inventory),
        pytest.raises((AssertionError, pytest.fail.Exception)),
    ):
        directed()


def test_every_mutant_is_caught_by_seeds_or_by_a_directed_test() -> None:
    rare = {name for name, mutant in MUTANTS.items() if mutant.within is None}
    assert rare == CAUGHT_BY.keys() | SHELLS
