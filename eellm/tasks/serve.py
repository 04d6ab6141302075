"""`task=serve`: answer requests over HTTP with a trained model until asked to end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from eellm.calibration.result import calibrated
from eellm.config.paths import expanded
from eellm.config.rules.serving import possible_modes
from eellm.config.saved_run import saved_values
from eellm.config.schema import Config, DecodingMode
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.pipeline.follower import Follower
from eellm.decoding.policy import Policy, build_policy
from eellm.mcore.groups import Groups
from eellm.metrics import names
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage
from eellm.preemption import deferred, requested
from eellm.rundir import locate
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.source import trained_tokenizer
from eellm.tasks.trained import load_trained

if TYPE_CHECKING:
    from eellm.serving.engine import Engine
    from eellm.serving.offer import Offer

_DECODERS: tuple[DecodingMode, ...] = ("catch_up", "pipeline", "kv_recompute", "self_speculative")


def run(context: TaskContext) -> dict[str, float]:
    from eellm.serving.server import listen

    config = context.config
    minutes = config.serve.rank_timeout / 60
    listener = listen(config.serve.host, config.serve.port) if is_main_rank() else None
    with deferred(), process_group(config, timeout_minutes=minutes) as device, recording(context) as (_, final):
        plan = Plan.of(config, trained_tokenizer(config).vocab_size)
        with groups_of(plan, device, config.seed, minutes) as groups:
            stage = load_trained(config, plan, groups).stages[0]
            final |= serve(context, stage, groups, listener, lambda: requested() > 0)
    return final


def serve(
    context: TaskContext, stage: Stage, groups: Groups, listener: socket.socket | None, asked_to_end: Callable[[], bool]
) -> dict[str, float]:
    """This rank's part, until rank 0, which has the listener, is asked to end; returns metrics of what was done."""
    from eellm.serving.engine import Engine
    from eellm.serving.ranks import Ranks, Replica
    from eellm.serving.statistics import Statistics

    config = context.config
    ranks = Ranks(groups, config.serve.rank_timeout)
    policy = build_policy(calibrated(config.exit_policy), stage.spec)
    common = DecoderOptions.of(config.decoding)
    common = replace(common, max_tokens=context_of(config, stage.spec), prefill_chunk=config.serve.prefill_chunk)
    options = {mode: replace(common, mode=mode) for mode in decoders_of(config)}
    if groups.pp_rank > 0:
        for option in options.values():  # one: over stages all modes share a decoder
            Follower(stage, policy, option, groups).follow()
        return {}
    decoders = {mode: Decoder(stage, policy, option, groups) for mode, option in options.items()}
    for mode in modes_of(config):
        decoders.setdefault(mode, next(iter(decoders.values())))
    replica = Replica(decoders, groups.layout.pp)
    replica.reserve()
    if listener is None:
        ranks.follow(replica)
        return {}
    with closing(listener):
        offer, serve_ = offer_of(config, stage.spec, policy), config.serve
        statistics = Statistics(stage.spec)
        engine = Engine(replica, offer.tokenizer, ranks, serve_.max_queue, serve_.request_timeout, statistics)
        return _answer(context, offer, engine, listener, asked_to_end)


def _answer(
    context: TaskContext, offer: Offer, engine: Engine, listener: socket.socket, asked_to_end: Callable[[], bool]
) -> dict[str, float]:
    """Rank 0: HTTP in a thread of its own, the engine in this one."""
    from eellm.report.terminal import print_address
    from eellm.serving.access_log import AccessLog
    from eellm.serving.app import build_app
    from eellm.serving.server import address_of, answering

    key_file = context.config.serve.api_key_file
    api_key = None if key_file is None else expanded(key_file).read_text(encoding="utf-8").split("\n")[0].strip()
    log = AccessLog(context.run_dir / "access.jsonl")
    app = build_app(engine, offer, log, api_key)
    with closing(log), answering(app, listener, context.config.serve.max_connections):
        print_address(address_of(listener), offer.name, context.run_dir)
        engine.serve(asked_to_end)
    tokens = engine.statistics.total_tokens
    return {names.SERVE_TOKENS: tokens, names.SERVE_MEAN_LAYERS: engine.statistics.total_layers / max(1, tokens)}


def offer_of(config: Config, spec: ModelSpec, policy: Policy) -> Offer:
    """What clients may ask for. The model is called as its run was."""
    from eellm.serving.chat import find_chat_template
    from eellm.serving.offer import Offer

    assert config.checkpoint is not None
    run, tokenizer = locate(config.checkpoint)[0], trained_tokenizer(config)
    return Offer(
        name=saved_values(config.checkpoint)["name"],
        spec=spec,
        tokenizer=tokenizer,
        chat=find_chat_template(config.serve.chat_template, run.tokenizer, tokenizer),
        policy=policy,
        modes=tuple(modes_of(config)),
        decoding=config.decoding,
        limits=config.serve,
        context=context_of(config, spec),
        created=int(time.time()),
    )


def modes_of(config: Config) -> list[DecodingMode]:
    """Modes of decoding that requests may choose."""
    return list(config.serve.decodings or possible_modes(config.parallel, config.exit_policy))


def decoders_of(config: Config) -> list[DecodingMode]:
    """Modes that need a decoder: full depth is that of another mode without exits, where there is one."""
    modes = modes_of(config)
    return [mode for mode in _DECODERS if mode in modes] or modes


def context_of(config: Config, spec: ModelSpec) -> int:
    """Tokens of a sequence. What requests will need cannot be known: each may fill the model's positions, unless told less."""
    return config.decoding.max_tokens or spec.max_positions
