"""`task=plan`: what a layout costs before a GPU is rented. Writes plan.json, plan.html, gantt.png and the program as CSV."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eellm.config.schema import Config
from eellm.data.tokenizer_files import configured_vocab_size
from eellm.errors import writing
from eellm.metrics.recorder import open_recorder
from eellm.plan.outcome import plan
from eellm.schedule.csv_file import read_csv, write_csv
from eellm.schedule.invariants import checked
from eellm.schedule.program import Program
from eellm.tasks.context import TaskContext


def run(context: TaskContext) -> dict[str, float]:
    from rich.console import Console

    from eellm.report.gantt import save_png
    from eellm.report.plan_page import charts_of, plan_page
    from eellm.report.plan_table import print_plan
    from eellm.report.terminal import location_line

    config = context.config
    vocab_size = config.model.vocab_size or configured_vocab_size(config.tokenizer)
    outcome = plan(config, vocab_size, own_program(config))
    charts = charts_of(outcome)
    page = plan_page(outcome, charts)
    for name, text in {"plan.json": json.dumps(outcome.json(), indent=1), "plan.html": page}.items():
        with writing(context.run_dir / name):
            (context.run_dir / name).write_text(text, encoding="utf-8")
    write_csv(outcome.chosen.timeline.program, context.run_dir / "program.csv")
    save_png(charts, context.run_dir / "gantt.png")
    recorder = open_recorder(config, context.run_dir, is_main_rank=True)
    recorder.html("plan", page)
    recorder.image("gantt", context.run_dir / "gantt.png")
    recorder.close(outcome.metrics(), "done")
    console = Console(width=None if sys.stdout.isatty() else 100)
    print_plan(outcome, console)
    console.print(location_line(context.run_dir), soft_wrap=True)
    return outcome.metrics()


def own_program(config: Config) -> Program | None:
    """The program of schedule=csv; its invariants were checked with the config."""
    if config.schedule.name != "csv" or config.schedule.path is None:
        return None
    return checked(read_csv(Path(config.schedule.path).expanduser()))
