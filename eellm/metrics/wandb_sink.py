"""The wandb mirror. It never asks to log in, and whatever goes wrong inside wandb, the run goes on.

wandb groups charts by the part of a name before the last slash, so the heads of one kind of loss
(`train/loss/exit_02`, .., `train/loss/final`) stand side by side; `close` adds one chart with all of them. While the run goes on,
the workspace of `experiments/wandb_workspace` shows them on one chart too.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eellm.config.commandline import parse_override
from eellm.config.request import read_values
from eellm.config.schema import Config
from eellm.metrics.names import STEP, TIME, TRAIN_LOSS, VAL_LOSS, heads_in
from eellm.metrics.rows import Row
from eellm.metrics.sink import Sink
from eellm.metrics.tables import TableRow, columns_of
from eellm.rundir import RunDirectory

logger = logging.getLogger(__name__)

INIT_TIMEOUT = 60
FINISH_TIMEOUT = 300
KEY_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
CHARTS = {"charts/train_loss": TRAIN_LOSS, "charts/val_loss": VAL_LOSS}
MOST_POINTS = 1000
"""Points of one head on a chart: wandb draws ten thousand rows of a chart's table at most."""
SCATTERS = {"speed_quality": ("agreement", "speedup"), "trade_off": ("mean_layers", "accuracy"), "exits": ("layer", "loss")}
"""Tables that are drawn too: their columns on x and y."""
UNNAMED = ("task", "study", "experiment", "name", "logger", "machine", "hydra", "resume", "checkpoint", "objective")
"""Groups whose overrides do not tell a run from its siblings, and so are not part of its name."""
LONGEST_NAME = 100


class WandbSink(Sink):
    """One wandb run, kept under `<run_dir>/wandb` and continued by its id when the directory is reopened.

    The first exception that comes out of wandb is logged as a warning; from then on the sink does nothing.
    """

    def __init__(self, config: Config, run_dir: Path, rows: Sequence[Row] = ()):
        """`rows`: what the record holds already, of a run that is continued; the charts of `close` begin with them."""
        self._run: Any = None
        self._silent = False
        self._curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {chart: {} for chart in CHARTS}
        for row in rows:
            self._remember(row)
        self._guard("start", lambda: self._open(config, run_dir))

    def log(self, row: Row) -> None:
        self._remember(row)
        self._guard("log", lambda: self._run.log({name: value for name, value in row.items() if name != TIME}))

    def table(self, name: str, rows: Sequence[TableRow]) -> None:
        self._guard("log a table", lambda: self._run.log({f"tables/{name}": _table(rows), **_scatter(name, rows)}))

    def html(self, name: str, text: str) -> None:
        self._guard("log a page", lambda: self._run.log({f"pages/{name}": _html(text)}))

    def image(self, name: str, path: Path) -> None:
        self._guard("log an image", lambda: self._run.log({f"images/{name}": _image(path)}))

    def close(self, final: dict[str, float], status: str) -> None:
        self._guard("log charts", self._log_charts)
        self._guard("write the summary", lambda: self._run.summary.update({**final, "status": status}))
        self._guard("finish", lambda: self._run.finish(exit_code=0 if status == "done" else 1))

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            action()
        except Exception as error:  # wandb is a mirror: no failure of it is worth a training run
            self._silent = True
            logger.warning("wandb failed to %s (%s: %s); the run goes on without it", what, type(error).__name__, error)

    def _open(self, config: Config, run_dir: Path) -> None:
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        mode = _usable_mode(os.environ.get("WANDB_MODE", config.logger.wandb.mode))
        try:
            self._run = _init(config, run_dir, mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("wandb cannot reach its server (%s); logging offline into %s", error, folder)
            self._run = _init(config, run_dir, "offline")
        (folder / "run_id.txt").write_text(self._run.id + "\n", encoding="utf-8")
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def _remember(self, row: Row) -> None:
        for chart, pattern in CHARTS.items():
            for head in heads_in(pattern, row):
                steps, values = self._curves[chart].setdefault(head, ([], []))
                steps.append(row[STEP])
                values.append(row[pattern.format(head=head)])

    def _log_charts(self) -> None:
        import wandb

        for chart, curves in self._curves.items():
            if curves:
                thinned = [(_thinned(steps), _thinned(values)) for steps, values in curves.values()]
                steps, values = [list(column) for column in zip(*thinned, strict=True)]
                lines = wandb.plot.line_series(xs=steps, ys=values, keys=list(curves), title=chart, xname=STEP)
                self._run.log({chart: lines})


def _init(config: Config, run_dir: Path, mode: Any) -> Any:
    import wandb

    options = config.logger.wandb
    known = run_dir / "wandb" / "run_id.txt"
    return wandb.init(
        project=options.project,
        entity=options.entity,
        group=options.group or (config.study.name if config.study else config.name),
        name=_name(config, run_dir),
        notes=_notes(run_dir),
        job_type=config.task.name,
        tags=options.tags,
        config=read_values(config),
        dir=run_dir,
        mode=mode,
        id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
        resume="allow",
        reinit="finish_previous",
        # The console stays the user's: wandb's capture of it breaks progress bars.
        settings=wandb.Settings(console="off", silent=mode != "online", init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
    )


def _name(config: Config, run_dir: Path) -> str:
    """What sets a run apart from its siblings where that is short, or else when it was started."""
    overrides = [override for override in map(parse_override, _overrides(run_dir)) if override is not None]
    own = " ".join(dict.fromkeys(override.text for override in overrides if override.group not in UNNAMED))
    return f"{config.name} {own if own and len(own) <= LONGEST_NAME else run_dir.name}"


def _notes(run_dir: Path) -> str:
    """The command, to run it again, and where the files are."""
    return f"{shlex.join(['python', 'run.py', *_overrides(run_dir)])}\n{run_dir}"


def _overrides(run_dir: Path) -> list[str]:
    file = RunDirectory(run_dir).overrides
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _usable_mode(mode: str) -> str:
    if mode == "online" and not has_credentials():
        logger.warning("wandb has no API key; logging offline. Upload later with `wandb sync`, or set WANDB_API_KEY.")
        return "offline"
    return mode


def has_credentials() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if any(os.environ.get(name) for name in KEY_VARIABLES):
        return True
    import wandb

    host = urlsplit(wandb.setup().settings.base_url).hostname or ""
    default = Path.home() / ("_netrc" if os.name == "nt" else ".netrc")
    path = Path(os.environ.get("NETRC", default)).expanduser()
    if not path.exists():
        return False
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False


def _table(rows: Sequence[TableRow]) -> Any:
    import wandb

    columns: list[Any] = columns_of(rows)
    return wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows], allow_mixed_types=True)


def _scatter(name: str, rows: Sequence[TableRow]) -> dict[str, Any]:
    """The chart of a table that has one, and points for it."""
    import wandb

    x, y = SCATTERS.get(name, ("", ""))
    points = [row for row in rows if all(isinstance(row.get(column), (int, float)) for column in (x, y))]
    return {f"charts/{name}": wandb.plot.scatter(_table(points), x, y, title=f"{name}: {y} by {x}")} if points else {}


def _thinned(values: list[float]) -> list[float]:
    """Every n-th of the values, and the last one."""
    stride = max(1, math.ceil(len(values) / MOST_POINTS))
    return values[-1::-stride][::-1]


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


def _html(text: str) -> Any:
    import wandb

    return wandb.Html(text, inject=False)
