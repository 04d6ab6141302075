"""`task=serve`: answer requests over HTTP with a trained model until asked to end."""

from __future__ import annotations

import socket
import time
from contextlib import closing

import yaml

from eellm.calibration.result import calibrated
from eellm.config.paths import expanded
from eellm.config.rules.serving import possible_modes
from eellm.config.schema import Config
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.pipeline_follower import Follower
from eellm.decoding.policy import Policy, build_policy
from eellm.errors import MissingExtra
from eellm.mcore.groups import Groups
from eellm.metrics import names
from eellm.model.stage import Stage
from eellm.preemption import deferred, requested
from eellm.rundir import locate
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.trained import load_trained, trained_tokenizer


def prepare(context: TaskContext) -> None:
    """See that the server's packages are there."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package.replace("_", "-"), "serve", "task=serve") from error


def run(context: TaskContext) -> dict[str, float]:
    from eellm.serving.server import listen

    config = context.config
    minutes = config.serve.rank_timeout / 60
    listener = listen(config.serve.host, config.serve.port) if is_main_rank() else None
    with deferred(), process_group(config, timeout_minutes=minutes) as device, recording(context) as (_, final):
        plan = Plan.of(config, trained_tokenizer(config).vocab_size)
        with groups_of(plan, device, config.seed, minutes) as groups:
            stage = load_trained(config, plan, groups).stages[0]
            serve(context, stage, groups, listener, final)
    return final


def serve(context: TaskContext, stage: Stage, groups: Groups, listener: socket.socket | None, final: dict[str, float]) -> None:
    """This rank's part, until a signal asks rank 0 to end; what the service has done is added to `final`."""
    from eellm.serving.ranks import Ranks, Replica

    config = context.config
    ranks = Ranks(groups, config.serve.rank_timeout)
    policy = build_policy(calibrated(config.exit_policy), stage.spec)
    options = {mode: options_of(config, mode, stage) for mode in decoders_of(config)}
    if groups.pp_rank > 0:
        for option in options.values():  # one: over stages all modes share a decoder
            Follower(stage, policy, option, groups).follow()
        return
    decoders = {mode: Decoder(stage, policy, option, groups) for mode, option in options.items()}
    for mode in modes_of(config):
        decoders.setdefault(mode, next(iter(decoders.values())))
    replica = Replica(decoders, groups.layout.pp)
    replica.reserve()
    if listener is None:
        ranks.follow(replica)
        return
    with closing(listener):
        _answer(context, policy, replica, ranks, listener, final)


def _answer(context: TaskContext, policy: Policy, replica, ranks, listener: socket.socket, final: dict[str, float]) -> None:
    """Rank 0: HTTP in its thread, the engine in this one."""
    from eellm.report.terminal import print_address
    from eellm.serving.access_log import AccessLog
    from eellm.serving.app import build_app
    from eellm.serving.chat import find_chat_template
    from eellm.serving.engine import Engine
    from eellm.serving.offer import Offer
    from eellm.serving.server import address_of, answering
    from eellm.serving.statistics import Statistics

    config = context.config
    tokenizer, decoder = trained_tokenizer(config), next(iter(replica.decoders.values()))
    statistics = Statistics(decoder.spec)
    engine = Engine(replica, tokenizer, ranks, config.serve.max_queue, config.serve.request_timeout, statistics)
    assert config.checkpoint is not None
    run = locate(config.checkpoint)[0]
    chat = find_chat_template(config.serve.chat_template, run.tokenizer, tokenizer)
    context_tokens = decoder.options.max_tokens
    assert context_tokens is not None
    name = str(yaml.safe_load(run.config.read_text(encoding="utf-8")).get("name", "eellm"))
    modes = tuple(modes_of(config))
    offer = Offer(
        name, decoder.spec, tokenizer, chat, policy, modes, config.decoding, config.serve, context_tokens, int(time.time())
    )
    key_file = config.serve.api_key_file
    api_key = None if key_file is None else expanded(key_file).read_text(encoding="utf-8").split("\n")[0].strip()
    log = AccessLog(context.run_dir / "access.jsonl")
    with closing(log), answering(build_app(engine, offer, log, api_key), listener):
        print_address(address_of(listener), name, context.run_dir)
        engine.serve(lambda: requested() > 0)
    final[names.SERVE_TOKENS] = statistics.total_tokens
    final[names.SERVE_MEAN_LAYERS] = statistics.total_layers / max(1, statistics.total_tokens)


def modes_of(config: Config) -> list:
    """Modes of decoding that requests may choose."""
    return list(config.serve.decodings or possible_modes(config.parallel, config.exit_policy))


def decoders_of(config: Config) -> list:
    """Modes that need a decoder: full depth is that of another mode without exits, where there is one."""
    modes = modes_of(config)
    exiting = [mode for mode in ("catch_up", "pipeline", "kv_recompute", "self_speculative") if mode in modes]
    return exiting or modes


def options_of(config: Config, mode, stage: Stage) -> DecoderOptions:
    """A server cannot know what requests will need: each sequence may fill the model's positions, unless told less."""
    decoding = config.decoding
    context = decoding.max_tokens or stage.spec.max_positions
    return DecoderOptions(mode, decoding.max_pending, decoding.draft_length, decoding.max_batch, context)
