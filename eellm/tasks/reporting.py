"""What a run shows of itself at its end: its page, the page's mirrors, and tables on the terminal."""

from __future__ import annotations

from eellm.metrics.recorder import Recorder
from eellm.tasks.context import TaskContext


def report(context: TaskContext, recorder: Recorder) -> None:
    """Write report.html, hand it and the coloured samples to the mirrors, print the tables. On the main rank, while the record
    is open."""
    from eellm.report import page_sample
    from eellm.report.html import build_report
    from eellm.report.run_record import load_run
    from eellm.report.terminal import print_report

    page = build_report(context.run_dir)
    recorder.html("report", page.read_text(encoding="utf-8"))
    record = load_run(context.run_dir)
    if record.generations:
        recorder.html("samples", page_sample.page(record))
    print_report(context.run_dir)
