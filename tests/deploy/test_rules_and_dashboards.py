"""The rules and dashboards as files: about metrics that exist, each alert with its test and its page, each panel in its place.

Whether Prometheus takes them and what it answers: check_prometheus.py, under `make observe-check`.
"""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.metrics import Metrics

REPOSITORY = Path(__file__).resolve().parents[2]
PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
DASHBOARDS = sorted((REPOSITORY / "deploy" / "grafana" / "dashboards").glob("*.json"))
RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text()
QUESTIONS = ["is it keeping the right things?", "is it keeping up?", "is the data changing?"]
GRID_COLUMNS = 24


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]
    ]


ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def exposed() -> set[str]:
    """The names under which a worker's samples are served."""
    return {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}


def names_in(expression: str) -> set[str]:
    """The metrics that a query names: ours and those of a process."""
    bare = re.sub(r'"[^"]*"', "", expression)
    # what stands in by (…), on (…) is a label
    bare = re.sub(r"\b(by|on|without|ignoring) *\([^)]*\)", "", bare)
    return set(re.findall(r"\b(?:job\w*:[\w:]+|tldr_\w+|process_\w+)", bare))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_metrics_that_exist(rule: dict[str, Any]) -> None:
    # no sample before the first partition
    labelled = {
        "tldr_partitions", "tldr_lag_records", "tldr_reduced_set_pairs", "tldr_drift_alarm",
    }  # fmt: skip

    names = names_in(rule["expr"])

    assert names
    assert names <= exposed() | labelled | RECORDED


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_page_with_meaning_first_look_and_remedy(rule: dict[str, Any]) -> None:
    page = RUNBOOK.split(f"\n## {rule['alert']}\n")[1].split("\n## ")[0]

    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert rule["labels"]["severity"] in ("warning", "critical")
    for part in ("**Meaning.**", "**First look", "emedy.**"):
        assert part in page


def test_every_page_of_the_runbook_is_about_an_alert() -> None:
    assert re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE) == sorted(
        re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE), key=[rule["alert"] for rule in ALERTS].index
    )


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_unit_test_in_which_it_fires_and_one_in_which_it_does_not(rule: dict[str, Any]) -> None:
    units = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    series = {name for unit in units for name in _jobs(unit, rule["alert"])}

    fires = [case for unit in units for case in unit.get("alert_rule_test", []) if case["alertname"] == rule["alert"]]

    assert any(case.get("exp_alerts") for case in fires)
    assert any(not case.get("exp_alerts") for case in fires) or len(series) > 1


def test_every_recorded_series_is_asked_for_in_a_unit_test() -> None:
    units = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    asked = [case["expr"] for unit in units for case in unit.get("promql_expr_test", [])]
    wanted = set().union(*map(names_in, [*asked, *(rule["expr"] for rule in ALERTS)]))  # each alert has its test
    behind = {rule["record"]: names_in(rule["expr"]) for rule in rules() if "record" in rule}

    reached = wanted & RECORDED
    while more := set().union(*(behind[name] for name in reached)) & RECORDED - reached:
        reached |= more

    assert reached == RECORDED


def _jobs(unit: dict[str, Any], alert: str) -> set[str]:
    """The jobs of a unit test of this alert: one that fires, and the silent ones beside it."""
    if all(case["alertname"] != alert for case in unit.get("alert_rule_test", [])):
        return set()
    return {found for one in unit["input_series"] for found in re.findall(r'(?:job|instance)="(\w+)"', one["series"])}


def test_there_is_a_dashboard_a_question() -> None:
    titles = [json.loads(file.read_text())["title"] for file in DASHBOARDS]

    assert sorted(titles) == [f"tldr-stream: {question}" for question in QUESTIONS]
    assert len({json.loads(file.read_text())["uid"] for file in DASHBOARDS}) == len(DASHBOARDS)


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_asks_any_prometheus_for_one_stream_and_for_metrics_that_exist(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    labelled = {
        "tldr_partitions", "tldr_lag_records", "tldr_reduced_set_pairs", "tldr_store_bytes", "tldr_partition_epoch",
        "tldr_drift_effect", "tldr_drift_alarm",
    }  # fmt: skip

    assert variables.keys() == {"datasource", "namespace", "job"}
    assert variables["datasource"]["type"] == "datasource"
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"].endswith((".", "%.")) and panel["targets"]
        for target in panel["targets"]:
            names = names_in(target["expr"])
            assert target["datasource"]["uid"] == "${datasource}"
            assert names and names <= exposed() | RECORDED | labelled, target["expr"]
            # each selector is bound to the chosen stream
            assert target["expr"].count('namespace=~"$namespace", job=~"$job"') == len(
                re.findall(r"(?:job\w*:[\w:]+|tldr_\w+|process_\w+)\{", target["expr"])
            )


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_lie_side_by_side(file: Path) -> None:
    panels = json.loads(file.read_text())["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    for place in (panel["gridPos"] for panel in panels):
        assert place["x"] + place["w"] <= GRID_COLUMNS
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
