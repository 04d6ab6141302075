"""Modes of decoding side by side on held-out prompts, as quickstart, evaluate and benchmark=decoding do it."""

from __future__ import annotations

from eellm.benchmark.speed_quality import speed_against_quality
from eellm.config.schema import Config
from eellm.data.corpus import Corpus
from eellm.decoding.setting import swept
from eellm.mcore.groups import Groups
from eellm.metrics import names
from eellm.metrics.tables import TableRow
from eellm.model.stage import Stage

NUM_PROMPTS, PROMPT_TOKENS = 4, 48


def compared_modes(config: Config, stage: Stage, groups: Groups, corpus: Corpus) -> list[TableRow]:
    """Rows of speed_quality.csv: full depth, and the modes that the config compares at `evaluation.speed_thresholds`.

    Called by all ranks of the layout; `stage` holds the whole model, or the mode is `pipeline` and later stages get no rows.
    """
    evaluation = config.evaluation
    modes = evaluation.compared_modes(config.decoding.mode)
    settings = swept(modes, config.decoding, config.exit_policy, evaluation.speed_thresholds, stage.spec)
    return speed_against_quality(stage, groups, held_out_prompts(corpus, NUM_PROMPTS), settings, config.decoding)


def held_out_prompts(corpus: Corpus, most: int) -> list[list[int]]:
    """Beginnings of held-out windows, spread over the held-out text; as many as there are windows at most."""
    windows = corpus.open("validation")
    count = min(most, len(windows))
    return [windows[index * len(windows) // count]["tokens"][:PROMPT_TOKENS].tolist() for index in range(count)]


def decodes_together(config: Config) -> bool:
    """Whether the run's ranks can decode as they are; else the main rank does it alone, with the whole model."""
    parallel = config.parallel
    if "pipeline" in config.evaluation.compared_modes(config.decoding.mode):
        return True  # checked with the config
    return parallel.pp == parallel.vp == parallel.dp == 1 and not parallel.sequence_parallel


def decoding_config(config: Config) -> Config:
    """The layout that decodes: the run's where its ranks can, else one rank."""
    return config if decodes_together(config) else on_one_rank(config)


def on_one_rank(config: Config) -> Config:
    single = {"tp": 1, "pp": 1, "vp": 1, "dp": 1, "sequence_parallel": False, "layers_per_stage": None}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=single)})


def best_faithful(rows: list[TableRow]) -> dict[str, float]:
    """The fastest setting that keeps at least 95 % of full depth's tokens; full depth itself is one.

    Which one that is differs between runs: means over runs are taken of speed_quality.csv, one threshold at a time.
    """
    columns = {
        names.GENERATE_TOKENS_PER_SECOND: "tokens_per_second",
        names.GENERATE_SPEEDUP: "speedup",
        names.GENERATE_AGREEMENT: "agreement",
        names.GENERATE_MEAN_LAYERS: "mean_layers",
    }
    settings = [{name: float(str(row[column])) for name, column in columns.items()} for row in rows]
    faithful = [setting for setting in settings if setting[names.GENERATE_AGREEMENT] >= 0.95]
    return max(faithful, key=lambda setting: setting[names.GENERATE_SPEEDUP])
