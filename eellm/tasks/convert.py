"""`task=convert`: a model of `transformers` becomes a run, a run one with other exits or a model of `transformers`. No ranks."""

from __future__ import annotations

from eellm.config.conversion import is_run
from eellm.config.paths import expanded
from eellm.convert.editing import edit_model
from eellm.convert.exporting import export_model
from eellm.convert.importing import import_model
from eellm.convert.sources import open_source
from eellm.data.cache import cache_root
from eellm.report.converting import shown_conversion
from eellm.tasks.context import TaskContext


def run(context: TaskContext) -> dict[str, float]:
    config, convert = context.config, context.config.convert
    assert convert.source is not None, "checked with the config"
    assert convert.target is not None, "checked with the config"
    target = expanded(convert.target)
    with shown_conversion(convert.source, target, convert.format) as show:
        if convert.format == "huggingface":
            show(export_model(convert.source, target, config))
            return {}
        overrides = context.run.overrides.read_text(encoding="utf-8").splitlines()
        if is_run(convert.source):
            show(edit_model(convert.source, target, config, overrides))
        else:
            show(import_model(open_source(convert.source, cache_root(config.data)), target, config, overrides))
    return {}
