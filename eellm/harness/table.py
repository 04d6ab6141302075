"""The rows of lm_eval.csv: what the harness makes of one setting's answers, beside what they took.

What the columns mean:
- `decoding`, `policy`, `threshold`: the setting. `task`, `metric`, `filter`, `score`, `stderr`, `higher_is_better`, `samples`,
  `num_fewshot`, `version`: the harness's own. `stderr` is empty where it has none.
- `tokens`, `mean_layers`: tokens scored or generated for the task, and the layers behind which the heads stand that spoke.
- `generated_tokens_per_second`: new tokens over the time that the task's prompts took, their prefill included,
  `decoding.max_batch` sequences side by side. Once, and full depth first: of small tasks, a rough figure.
- `scored_tokens_per_second`: scored tokens over the time of the one pass, through all layers and heads, that serves all
  settings: the same in all of a task's rows, and no speed of early exit.
- `tokens_per_second`, `speedup`: of the setting, not of the task: a few of the tasks' contexts continued greedily, one at a time,
  prompts not counted, alternating with full depth (speed_quality.csv, written beside).
- `cut`: requests that were longer than the model was trained for and lost their beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eellm.decoding.setting import Setting, threshold_cell
from eellm.harness.usage import Usage, together
from eellm.metrics.tables import Cell, TableRow

_STDERR = "_stderr"


def table_rows(
    setting: Setting, results: Mapping[str, Any], usage: Mapping[str, Usage], members: Mapping[str, list[str]], speed: TableRow
) -> list[TableRow]:
    """One row a metric of every task and group in the harness's `results`; `speed` is the setting's row of speed_quality.csv."""
    rows: list[TableRow] = []
    for task, values in results["results"].items():
        used = together(usage[name] for name in members.get(task, [task]) if name in usage)
        for metric, filter_, score, stderr in _scores(values):
            rows.append(
                {
                    "decoding": setting.options.mode,
                    "policy": setting.policy.kind,
                    "threshold": threshold_cell(setting.policy),
                    "task": task,
                    "metric": metric,
                    "filter": filter_,
                    "score": score,
                    "stderr": stderr,
                    "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
                    "samples": _samples(results, members.get(task, [task])),
                    "num_fewshot": results.get("n-shot", {}).get(task),
                    "version": results.get("versions", {}).get(task),
                    "tokens": used.tokens,
                    "mean_layers": used.mean_layers,
                    "generated_tokens_per_second": used.generated.tokens_per_second,
                    "scored_tokens_per_second": used.scored.tokens_per_second,
                    "tokens_per_second": speed["tokens_per_second"],
                    "speedup": speed["speedup"],
                    "cut": used.cut,
                }
            )
    return rows


def _scores(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Cell, Cell]]:
    """(metric, filter, score, standard error) from the harness's keys: `acc,none`, `acc_stderr,none`."""
    for key, score in values.items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith(_STDERR) and isinstance(score, (int, float)):
            stderr = values.get(f"{metric}{_STDERR},{filter_}")
            yield metric, filter_, float(score), float(stderr) if isinstance(stderr, (int, float)) else None


def _samples(results: Mapping[str, Any], tasks: list[str]) -> int:
    return sum(results["n-samples"][task]["effective"] for task in tasks if task in results["n-samples"])
