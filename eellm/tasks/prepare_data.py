"""`task=prepare_data`: tokenise text into .bin/.idx files that `data=megatron` reads. One process and its workers, no ranks."""

from __future__ import annotations

from eellm.data.preparation import Preparation
from eellm.report.preparing import shown_progress
from eellm.tasks.context import TaskContext


def run(context: TaskContext) -> dict[str, float]:
    preparation = Preparation.of(context.config)
    if preparation.is_done():
        with shown_progress(0) as show:
            show.finish(preparation.output, "is there already, made of the same text and tokenizer")
        return {}
    with shown_progress(preparation.characters) as show:
        how = preparation.write(show.shard)
        show.finish(preparation.output, f"{how['documents']:,} documents, {how['tokens']:,} tokens")
    return {}
