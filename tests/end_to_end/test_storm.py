"""A storm of a minute, and what makes it repeatable. `make soak` has the long ones."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.checker import NO_ANOMALY
from tests.end_to_end.storm import FAULTS, Storm, Weather, plan_of


def test_a_storm_leaves_no_anomaly(tmp_path: Path) -> None:
    # given: each kind of fault, the broker's last: it takes some ten seconds to be back
    weather = Weather(seed=5, seconds=45, records=3500, rate=200, gap_s=3.0)

    # when
    report = Storm(weather, tmp_path).run()

    # then
    assert report.anomalies == NO_ANOMALY, "\n".join(report.lines())
    assert report.faults.keys() == FAULTS.keys()
    assert report.records == 3500


def test_a_seed_repeats_its_faults() -> None:
    assert plan_of(5, 600, 4.0) == plan_of(5, 600, 4.0) != plan_of(6, 600, 4.0)
