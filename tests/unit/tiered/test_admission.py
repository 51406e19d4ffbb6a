from tiered.admission import OVERTAKEN_S, REMEMBERED, STUCK_S, Admissions


def ask(
    admissions: Admissions,
    step: int,
    policy: str = "skip",
    *,
    committed: tuple[int, ...] = (),
    begun: tuple[int, ...] = (),
    whole: tuple[int, ...] = (),
    now_s: float = 0.0,
):
    for done in committed:
        admissions.settle(done)
    return admissions.ask(step, policy, 2, committed, begun, whole, now_s)  # type: ignore[arg-type]


def test_saves_are_admitted_while_there_is_room_and_then_skipped() -> None:
    admissions = Admissions()
    assert ask(admissions, 10).is_admitted
    assert ask(admissions, 20).is_admitted
    refused = ask(admissions, 30)
    assert not refused.is_admitted
    assert "steps 10, 20 are still being replicated" in refused.reason
    assert ask(admissions, 40, committed=(10,)).is_admitted


def test_every_rank_gets_the_first_rank_s_answer() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    assert not ask(admissions, 30).is_admitted
    assert not ask(admissions, 30, committed=(10, 20)).is_admitted
    assert ask(admissions, 20, committed=(10,)).is_admitted


def test_a_step_that_a_newer_one_overtook_takes_no_room() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    assert admissions.on_their_way((20,), 1.0) == []
    assert ask(admissions, 30, committed=(20,)).is_admitted


def test_steps_that_never_commit_stop_nobody_for_ever() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    assert not ask(admissions, 30, now_s=STUCK_S - 1).is_admitted
    answer = ask(admissions, 40, now_s=STUCK_S)
    assert (answer.is_admitted, answer.instead_of) == (True, (10, 20))


def test_waiting_is_no_answer_until_there_is_room() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    assert ask(admissions, 30, "wait") is None
    assert ask(admissions, 30, "wait", committed=(10,)).is_admitted


def test_replacing_takes_the_newest_of_which_no_replica_has_come() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    answer = ask(admissions, 30, "replace", begun=(10,))
    assert (answer.is_admitted, answer.instead_of) == (True, (20,))
    assert admissions.replaced == {20: 30}
    assert admissions.on_their_way((), 0.0) == [10, 30]
    assert not ask(admissions, 40, "replace", begun=(10, 30)).is_admitted


def test_a_refusal_is_remembered_too() -> None:
    admissions = Admissions()
    assert not admissions.refuse(10, "too few hosts", 0.0).is_admitted
    assert not ask(admissions, 10).is_admitted
    assert admissions.admit(20, 0.0).is_admitted


def test_of_stuck_steps_the_newest_that_could_be_restored_stays() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    answer = ask(admissions, 30, whole=(10, 20), now_s=STUCK_S)
    assert answer.instead_of == (10,)


def test_a_step_that_was_overtaken_is_let_go_of_and_a_committed_one_is_not() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    assert ask(admissions, 30, committed=(20,), now_s=OVERTAKEN_S - 1).instead_of == ()
    assert ask(admissions, 40, committed=(30,), now_s=OVERTAKEN_S).instead_of == (10,)
    assert ask(admissions, 50, committed=(40,), now_s=9 * STUCK_S).instead_of == ()


def test_half_steps_that_a_restarted_coordinator_found_go_but_for_the_newest() -> None:
    admissions = Admissions()
    for step in (10, 20, 30, 40):
        admissions.find(step, 0.0)
    admissions.settle(20)  # it became whole, and was committed
    assert ask(admissions, 50, committed=(20,), whole=(20, 30), now_s=STUCK_S - 1).instead_of == ()
    answer = ask(admissions, 60, committed=(20, 50), whole=(20, 30), now_s=STUCK_S)
    assert answer.instead_of == (10, 40)  # a newer one was committed since
    admissions = Admissions()
    for step in (10, 20):
        admissions.find(step, 0.0)
    assert ask(admissions, 30, now_s=STUCK_S).instead_of == (10,)


def test_a_step_that_a_rank_could_not_save_frees_its_place_at_once() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    admissions.give_up(10, "rank 1 could not save it", 1.0)
    assert admissions.on_their_way((), 1.0) == [20]
    late = ask(admissions, 10, now_s=1.0)
    assert (late.is_admitted, late.reason) == (False, "rank 1 could not save it")
    answer = ask(admissions, 30, now_s=1.0)
    assert (answer.is_admitted, answer.instead_of) == (True, (10,))
    assert not ask(admissions, 40, now_s=1.0).is_admitted


def test_giving_up_takes_nothing_from_a_step_that_was_committed_or_is_whole() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    admissions.settle(10)
    for step in (10, 20):
        admissions.give_up(step, "lost", 1.0)
    answer = ask(admissions, 30, committed=(10,), whole=(10, 20), now_s=1.0)
    assert (answer.is_admitted, answer.instead_of) == (True, ())


def test_no_rank_gives_up_at_once_what_a_restarted_coordinator_only_found() -> None:
    admissions = Admissions()
    for step in (10, 20, 30):
        admissions.find(step, 0.0)
        admissions.give_up(step, "lost", 1.0)
    assert ask(admissions, 40, now_s=STUCK_S - 1).instead_of == ()
    assert ask(admissions, 50, now_s=STUCK_S).instead_of == (10, 20)


def test_steps_0_and_1_are_on_their_way_like_any_other() -> None:
    admissions = Admissions()
    for step in (0, 1):
        ask(admissions, step)
    assert admissions.on_their_way((), 1.0) == [0, 1]
    assert not ask(admissions, 2, now_s=OVERTAKEN_S).is_admitted
    admissions = Admissions()
    ask(admissions, 0)
    assert ask(admissions, 1, now_s=OVERTAKEN_S).instead_of == ()


def test_the_newest_of_several_commits_has_overtaken_what_is_older() -> None:
    admissions = Admissions()
    ask(admissions, 20)
    assert admissions.on_their_way((10, 30), 1.0) == []
    assert admissions.on_their_way((5, 10), 1.0) == [20]


def test_an_overtaken_step_goes_although_every_shard_of_it_is_there() -> None:
    admissions = Admissions()
    for step in (10, 20):
        ask(admissions, step)
    answer = ask(admissions, 30, committed=(20,), whole=(10, 20), now_s=OVERTAKEN_S)
    assert answer.instead_of == (10,)


def test_who_gives_way_goes_beside_the_half_steps_that_nobody_waits_for() -> None:
    admissions = Admissions()
    for step in (1, 2):
        admissions.find(step, 0.0)
    for step in (10, 20):
        ask(admissions, step, now_s=100.0)
    assert ask(admissions, 30, "replace", now_s=STUCK_S).instead_of == (1, 20)


def test_a_half_step_is_let_go_of_once_and_only_when_it_is_old() -> None:
    admissions = Admissions()
    for step in (10, 20):
        admissions.find(step, 100.0)
    assert ask(admissions, 10, now_s=100.0).instead_of == ()  # some rank asks for it still
    assert ask(admissions, 30, now_s=130.0).instead_of == ()
    assert ask(admissions, 40, now_s=100.0 + STUCK_S).instead_of == (10,)
    assert ask(admissions, 50, committed=(30, 40), now_s=101.0 + STUCK_S).instead_of == (20,)


def test_a_found_step_that_is_committed_is_let_go_of_by_nobody() -> None:
    admissions = Admissions()
    for step in (10, 20):
        admissions.find(step, 0.0)
    admissions.settle(10)
    assert ask(admissions, 30, now_s=STUCK_S).instead_of == ()


def test_a_half_step_that_went_is_not_let_go_of_again() -> None:
    admissions = Admissions()
    for step in (10, 20):
        admissions.find(step, 0.0)
    assert ask(admissions, 30, now_s=STUCK_S).instead_of == (10,)
    assert ask(admissions, 40, now_s=STUCK_S).instead_of == ()


def test_what_was_refused_stays_refused_although_shards_of_it_came() -> None:
    admissions = Admissions()
    admissions.refuse(10, "too few hosts", 0.0)
    assert not admissions.admit(10, 1.0).is_admitted


def test_only_so_many_answers_are_remembered() -> None:
    admissions = Admissions()
    for step in range(REMEMBERED):
        admissions.refuse(step, "no", 0.0)
    assert admissions.is_answered(0)
    admissions.refuse(REMEMBERED, "no", 0.0)
    assert [admissions.is_answered(step) for step in (0, 1)] == [False, True]


def test_one_step_that_is_waited_for_is_named_in_the_singular() -> None:
    admissions = Admissions()
    admissions.ask(10, "skip", 1, (), (), (), 0.0)
    refused = admissions.ask(20, "skip", 1, (), (), (), 0.0)
    assert refused is not None
    assert "skipped: step 10 is still being replicated" in refused.reason
