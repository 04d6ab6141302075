"""What is done once on a machine before the ranks of a task start.

The process that starts ranks imports this and not the tasks: with torch's and megatron-core's modules, which it has no use for,
ranks would wait for seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eellm.config.schema import Config
from eellm.data.corpus import prepare_corpus
from eellm.errors import MissingExtra
from eellm.rundir import locate
from eellm.tasks.context import TaskContext
from eellm.tasks.source import with_tokenizer_of, with_trained_tokenizer

WITHOUT_RANKS = ("convert", "plan", "prepare_data", "report")
"""Tasks that need no devices: the process that was asked for them does them itself."""


def prepare(context: TaskContext) -> None:
    """For the context's task; nothing where it needs nothing."""
    PREPARATIONS.get(context.config.task.name, lambda _: None)(context)


def _text_to_train_on(context: TaskContext) -> None:
    """Tokenise the corpus, or find it in the cache; ranks open it by what is written here."""
    corpus = prepare_corpus(_with_own_tokenizer(context))
    corpus.save(context.run.corpus)
    context.run.keep_tokenizer(Path(corpus.tokenizer))


def _with_own_tokenizer(context: TaskContext) -> Config:
    """The config with the tokenizer that the weights were trained with: the run's own copy when it goes on, else the
    checkpoint's, else as configured."""
    config = context.config
    if config.resume is not None and context.run.tokenizer.is_file():
        return with_tokenizer_of(context.run, config)
    return config if config.checkpoint is None else with_trained_tokenizer(config)


def _text_to_tune_on(context: TaskContext) -> None:
    _text_to_train_on(context)
    assert context.config.checkpoint is not None, "checked with the config"
    context.run.keep_chat_template(locate(context.config.checkpoint)[0])


def _held_out_text(context: TaskContext) -> None:
    prepare_corpus(with_trained_tokenizer(context.config)).save(context.run.corpus)


def _what_is_evaluated(context: TaskContext) -> None:
    """Held-out text, or lm-eval's tasks: they are found and their data fetched."""
    if context.config.evaluation.name == "lm_eval":
        from eellm.harness.catalogue import load_catalogue

        load_catalogue(context.config.evaluation)
    else:
        _held_out_text(context)


def _text_to_calibrate_on(context: TaskContext) -> None:
    """Raises CheckpointError where the checkpoint's run does not say which model it holds: no use of it could be checked."""
    from eellm.calibration.result import trained_model

    assert context.config.checkpoint is not None, "checked with the config"
    trained_model(context.config.checkpoint, context.config.precision.dtype)
    _held_out_text(context)


def _text_of_a_trained_model(context: TaskContext) -> None:
    """For random weights, tokens are random and no corpus is needed."""
    if context.config.checkpoint is not None:
        _held_out_text(context)


def _servers_packages(_context: TaskContext) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package.replace("_", "-"), "serve", "task=serve") from error


PREPARATIONS: dict[str, Callable[[TaskContext], None]] = {
    "quickstart": _text_to_train_on,
    "train": _text_to_train_on,
    "tune": _text_to_tune_on,
    "evaluate": _what_is_evaluated,
    "calibrate": _text_to_calibrate_on,
    "benchmark": _text_of_a_trained_model,
    "serve": _servers_packages,
}
