"""A saved view of a wandb project that shows eellm's runs side by side; made once per project.

    python experiments/wandb_workspace/workspace.py --project eellm --entity my_team

Needs the extra `workspace` and `wandb login`. `--print` writes the definition as JSON instead, without a network.
"""

from __future__ import annotations

import argparse
import json

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from eellm.metrics import names
from eellm.metrics.wandb_sink import SCATTERS

COLUMNS = (names.VAL_LOSS.format(head=names.FINAL), names.GENERATE_SPEEDUP, names.GENERATE_AGREEMENT, names.TOKENS_PER_SECOND)
"""Final values that stand beside a run's name."""


def workspace(entity: str, project: str, name: str = "eellm") -> workspaces.Workspace:
    """The definition; nothing is sent before its `save`."""
    sections = {
        "Heads": [of_heads("Validation loss", names.VAL_LOSS), of_heads("Training loss", names.TRAIN_LOSS)],
        "Speed against quality": [
            of_table("speed_quality"),
            reports.ScatterPlot(
                title="Best setting of each run",
                x=reports.SummaryMetric(names.GENERATE_AGREEMENT),
                y=reports.SummaryMetric(names.GENERATE_SPEEDUP),
            ),
            of_table("trade_off"),
        ],
        "Exits on held-out text": [of_table("exits"), of_heads("Weight in the loss", names.TRAIN_WEIGHT)],
        "What they write": [reports.MediaBrowser(title="Tokens by the exit that emitted them", media_keys=["pages/samples"])],
        "What differs": [reports.RunComparer(diff_only=True)],
        "Training": [
            reports.LinePlot(title=names.describe(metric).description, x=names.STEP, y=[metric])
            for metric in (names.TRAIN_LOSS_TOTAL, names.TOKENS_PER_SECOND, names.STEP_TIME, names.GRAD_NORM, names.LEARNING_RATE)
        ],
        "Timelines": [reports.MediaBrowser(title="Passes on each rank", media_keys=["images/timeline", "images/gantt"])],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[workspaces.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()],
        settings=workspaces.WorkspaceSettings(x_axis=names.STEP),
        runset_settings=workspaces.RunsetSettings(pinned_columns=[f"summary:{name}" for name in COLUMNS]),
    )


def of_heads(title: str, pattern: str) -> reports.LinePlot:
    """All heads of a metric on one chart, however many there are. (`eval/loss/final` matches `val/loss` too, but is only ever a
    final value, of which there is no line.)"""
    return reports.LinePlot(title=title, x=names.STEP, metric_regex=pattern.format(head=f"({names.HEAD_PATTERN})"))


def of_table(table: str) -> reports.CustomChart:
    """The scatter plot that every run logs with a table, all runs' points on one chart."""
    x, y = SCATTERS[table]
    return reports.CustomChart(
        query={"summaryTable": {"tableKey": f"charts/{table}_table"}},
        chart_name="wandb/scatter/v0",
        chart_fields={"x": x, "y": y},
        chart_strings={"title": f"{table}: {y} by {x}"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", help="user or team that owns the project; the default is yours")
    parser.add_argument("--project", default="eellm")
    parser.add_argument("--name", default="eellm", help="what the view is called")
    parser.add_argument("--print", action="store_true", help="write the definition as JSON and send nothing")
    given = parser.parse_args()
    if given.print:
        definition = workspace(given.entity or "entity", given.project, given.name)
        print(json.dumps(definition._model.model_dump(by_alias=True, exclude_none=True), indent=2))
        return
    import wandb

    workspace(given.entity or wandb.Api().default_entity, given.project, given.name).save()


if __name__ == "__main__":
    main()
