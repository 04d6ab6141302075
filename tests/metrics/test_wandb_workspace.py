"""The saved view shows what runs log: every panel is held against names that exist, without a network."""

import re

import pytest

from eellm.metrics import names
from eellm.metrics.wandb_sink import SCATTERS

pytest.importorskip("wandb_workspaces")


@pytest.fixture(scope="module")
def panels():
    from experiments.wandb_workspace.workspace import workspace

    view = workspace("team", "project")._model.model_dump(by_alias=True, exclude_none=True)
    assert (view["entity"], view["project"]) == ("team", "project")
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return [(panel["viewType"], panel["config"]) for section in sections for panel in section["panels"]]


def test_heads_share_a_chart(panels):
    patterns = {config["metricRegex"] for kind, config in panels if config.get("useMetricRegex")}
    for metric in (names.VAL_LOSS, names.TRAIN_LOSS, names.TRAIN_WEIGHT):
        pattern = next(pattern for pattern in patterns if re.fullmatch(pattern, metric.format(head="final")))
        assert re.fullmatch(pattern, metric.format(head="exit_06"))
        assert re.fullmatch(pattern, metric.format(head="exit_120"))
        assert not re.fullmatch(pattern, metric.format(head="total"))


def test_metrics_exist(panels):
    used = {metric for _, config in panels for metric in config.get("metrics", [])}
    used |= {config[axis].partition(":")[2] for kind, config in panels if kind == "Scatter Plot" for axis in ("xAxis", "yAxis")}
    assert len(used) == 7
    for metric in used:
        names.describe(metric)


def test_the_charts_of_tables_are_those_that_runs_log(panels):
    keys = re.findall(r"'tableKey', 'value': '([^']*)'", str([config for kind, config in panels if kind == "Vega2"]))
    assert keys == [f"charts/{table}_table" for table in ("speed_quality", "trade_off", "exits")]
    fields = [config["fieldSettings"] for kind, config in panels if kind == "Vega2"]
    assert fields == [{"x": x, "y": y} for x, y in (SCATTERS[table] for table in ("speed_quality", "trade_off", "exits"))]
