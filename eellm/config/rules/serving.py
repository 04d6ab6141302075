"""Rules on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eellm.config.paths import expanded
from eellm.config.schema import DecodingConfig, DecodingMode, ExitPolicyConfig, ParallelConfig, ServeConfig, TaskConfig
from eellm.errors import Problem

Problems = Iterator[Problem]

ON_ONE_STAGE: tuple[DecodingMode, ...] = ("full", "catch_up", "kv_recompute", "self_speculative")
OVER_STAGES: tuple[DecodingMode, ...] = ("full", "pipeline")


def possible_modes(parallel: ParallelConfig, exit_policy: ExitPolicyConfig) -> tuple[DecodingMode, ...]:
    """Modes of decoding that a layout and its exits can run."""
    if exit_policy.kind == "never":
        return ("full",)
    return ON_ONE_STAGE if parallel.pp == 1 else OVER_STAGES


def offered_modes_are_possible(
    task: TaskConfig, serve: ServeConfig, decoding: DecodingConfig, exit_policy: ExitPolicyConfig, parallel: ParallelConfig
) -> Problems:
    if task.name != "serve" or serve.decodings is None:
        return
    possible = possible_modes(parallel, exit_policy)
    wrong = [mode for mode in serve.decodings if mode not in possible]
    if wrong:
        reason = f"{wrong[0]} cannot be offered with parallel.pp={parallel.pp} and exit_policy.kind={exit_policy.kind}"
        yield Problem("serve.decodings", serve.decodings, reason, f"choose from {list(possible)}, or null for all of them")
    if decoding.mode not in serve.decodings:
        reason = f"without decoding.mode={decoding.mode}, which a request gets that names none"
        yield Problem("serve.decodings", serve.decodings, reason, f"add {decoding.mode}, or set decoding to one that is offered")


def the_default_mode_has_exits(task: TaskConfig, decoding: DecodingConfig, exit_policy: ExitPolicyConfig) -> Problems:
    if task.name == "serve" and exit_policy.kind == "never" and decoding.mode in ("catch_up", "kv_recompute", "pipeline"):
        yield Problem("decoding.mode", decoding.mode, "exit_policy.kind=never leaves full depth alone", "decoding=full")


def files_of_the_server_are_there(task: TaskConfig, serve: ServeConfig) -> Problems:
    if task.name != "serve":
        return
    for key, what in (("api_key_file", "a file with the key in its first line"), ("chat_template", "a Jinja file")):
        given = getattr(serve, key)
        if given is None:
            continue
        if not expanded(given).is_file():
            yield Problem(f"serve.{key}", given, "there is no such file", f"{what}, or null")
        elif key == "api_key_file" and not expanded(given).read_text(encoding="utf-8", errors="replace").split("\n")[0].strip():
            yield Problem(f"serve.{key}", given, "its first line is empty: there would be no key", f"{what}, or null")


def limits_of_the_server_agree(task: TaskConfig, serve: ServeConfig, decoding: DecodingConfig) -> Problems:
    if task.name != "serve":
        return
    if decoding.max_new_tokens > serve.max_new_tokens:
        reason = f"a request that does not say gets more than serve.max_new_tokens={serve.max_new_tokens}"
        yield Problem("decoding.max_new_tokens", decoding.max_new_tokens, reason, f"at most {serve.max_new_tokens}")
    if serve.max_choices > serve.max_queue + decoding.max_batch:
        most = serve.max_queue + decoding.max_batch
        reason = f"a request of so many would always be refused: {most} run and wait at most"
        yield Problem("serve.max_choices", serve.max_choices, reason, f"at most {most}, or a larger serve.max_queue")


RULES: list[Callable[..., Problems]] = [
    offered_modes_are_possible,
    the_default_mode_has_exits,
    files_of_the_server_are_there,
    limits_of_the_server_agree,
]
