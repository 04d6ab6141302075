"""`task=report`: one page of many runs, to send to somebody or to print. Writes report.html."""

from __future__ import annotations

from pathlib import Path

from eellm.data.cache import write_atomically
from eellm.tasks.context import TaskContext


def run(context: TaskContext) -> dict[str, float]:
    from rich.console import Console

    from eellm.drawing.number_text import binary_bytes
    from eellm.report.runs.page import runs_page

    options = context.config.report
    assert options.runs, "checked with the config"
    output = context.run_dir / "report.html" if options.output is None else Path(options.output).expanduser()
    page = runs_page(options.runs, output.parent)
    write_atomically(output, page)
    Console(highlight=False, markup=False).print(f"{output} ({binary_bytes(len(page.encode()))})", soft_wrap=True)
    return {}
