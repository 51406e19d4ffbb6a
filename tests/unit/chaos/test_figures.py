"""Numbers of forged histories, and the picture and summary made of them."""

import json
from pathlib import Path

import pytest

from chaos import figures, picture, report
from chaos.checker import check
from chaos.moments import Moments
from tests.unit.chaos.histories import Forger, right


def test_recovery_lasts_until_a_later_save_is_replicated() -> None:
    forger = Forger()
    forger.begin(1, None)
    forger.save(1, 1)
    forger.fault("trainer-kill")
    forger.wait(10.0)
    forger.save(1, 2, level=None)
    forger.fault("holder-kill", lost=["host-a"])
    forger.wait(5.0)
    forger.save(1, 3)
    by_name = {one.mechanism: one for one in figures.recoveries(forger.finish(1, 4))}
    assert by_name["trainer-kill"].seconds == pytest.approx((15.0,), abs=0.3)
    assert by_name["holder-kill"].seconds == pytest.approx((5.0,), abs=0.3)
    assert by_name["holder-kill"].quantile(90) == by_name["holder-kill"].seconds[0]


def test_faults_that_could_not_be_done_are_not_counted() -> None:
    forger = Forger()
    forger.begin(1, None)
    name = forger.add("fault", "invoke", mechanism="flip", lost=["host-a"])
    forger.add("fault", "fail", name)
    forger.fault("flip", lost=["host-b"])
    told = report.summary(forger.finish(1, 1), check(right()), {"flip": 1})
    assert told["faults_by_mechanism"] == {"flip": 1}
    assert told["left_out"] == {"flip": 1}
    json.dumps(told)


def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    path = picture.draw(right(), check(right()), tmp_path / "timeline.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "moment", ["begin", "restore", "first save", "stage", "replicate", "commit"]
)
def test_moments_are_seen_in_the_history_once_they_are_waited_for(moment: str) -> None:
    moments = Moments()
    moments.wait_for(moment)
    assert not moments.is_here()
    moments.see(right())
    assert moments.is_here()
    moments.wait_for("repair")
    moments.see(right())
    assert not moments.is_here()
