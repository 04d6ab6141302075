"""What was trained, on what layout: the model and the stages behind a run's config, and how much there is of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from eellm.config.schema import Config
from eellm.data.ramp_up import BatchSizes
from eellm.layout import ParallelLayout
from eellm.metrics.names import TRAIN_LOSS, heads_in
from eellm.model.spec import (
    ExitSpec,
    ModelSpec,
    StageSpec,
    build_layout,
    build_spec,
    head_parameters,
    layer_parameters,
    parameters,
)
from eellm.plan.times import stages_of
from eellm.report.run_record import RunRecord


@dataclass(frozen=True)
class Setup:
    """A run's config, resolved."""

    config: Config
    spec: ModelSpec
    layout: ParallelLayout
    stages: list[StageSpec]

    @property
    def parameters(self) -> int:
        return parameters(self.spec)

    @property
    def asked_exits(self) -> list[ExitSpec]:
        """Exits that the exit policy looks at."""
        active = self.config.exit_policy.active
        return [exit_ for exit_ in self.spec.exits if active is None or exit_.layer in active]

    @property
    def exit_cost_in_layers(self) -> float:
        """Weights that a token reads when all asked exits are asked, in units of one decoder layer's."""
        return sum(head_parameters(self.spec, exit_) for exit_ in self.asked_exits) / layer_parameters(self.spec)

    def tokens_after(self, steps: int) -> int:
        """Tokens read in the first `steps` optimizer steps."""
        return BatchSizes.of(self.config.data).step(steps)[0] * self.config.data.sequence_length


def read_setup(record: RunRecord) -> Setup | None:
    """The setup of a run, or None where its config is missing or not of this version."""
    try:
        config = Config.model_validate(record.config)
    except ValidationError:
        return None
    vocab_size = config.model.vocab_size or corpus_vocabulary(record.run_dir / "corpus.json") or config.tokenizer.vocab_size
    if vocab_size is None:
        return None
    spec, layout = build_spec(config, vocab_size), build_layout(config)
    return Setup(config, spec, layout, stages_of(config, spec, layout, config.parallel.layers_per_stage))


def corpus_vocabulary(path: Path) -> int | None:
    """Entries of the tokenizer that made the run's corpus; None where there is no corpus.json."""
    return json.loads(path.read_text(encoding="utf-8"))["vocab_size"] if path.exists() else None


def trained_steps(record: RunRecord) -> int:
    """Last optimizer step with a training loss; 0 for a run that did not train."""
    return int(max((row["step"] for row in record.rows if heads_in(TRAIN_LOSS, row)), default=0))
