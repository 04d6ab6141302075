"""Runs as pandas frames: what a folder of run directories or a wandb project says about exits. Needs no torch."""

from eellm.analysis.comparison import pareto_front, spread, within_noise
from eellm.analysis.exits import exit_shares, exit_table, reliability
from eellm.analysis.runs import load_runs, metric_history, run_table, settings_of, speed_quality
from eellm.analysis.tokens import token_table

__all__ = [
    "exit_shares",
    "exit_table",
    "load_runs",
    "metric_history",
    "pareto_front",
    "reliability",
    "run_table",
    "settings_of",
    "speed_quality",
    "spread",
    "token_table",
    "within_noise",
]
