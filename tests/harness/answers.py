"""Runs on forked ranks: what the harness's model answers, and what a decoder says along the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.api.instance import Instance

from eellm.benchmark.speed_quality import following
from eellm.config.compose import compose
from eellm.config.schema import DecodingConfig
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.generation import Generation, generate_texts
from eellm.decoding.policy import Policy
from eellm.decoding.setting import Setting
from eellm.harness.kept_scores import KeptScores
from eellm.harness.model import HarnessModel
from eellm.harness.scores import WindowScorer, WindowScores
from eellm.harness.usage import Usage
from eellm.harness.windows import Window
from eellm.model.spec import ModelSpec
from tests.decoding.models import build

SEED = 3


class Letters(Tokenizer):
    """A token a character, from a vocabulary of the size of the tests' models."""

    suffix = ".letters"

    def __init__(self, vocab_size: int):
        self.vocab_size, self.eod_id = vocab_size, 0

    def encode(self, text: str) -> list[int]:
        return [1 + (ord(letter) - 32) % (self.vocab_size - 1) for letter in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(31 + id_) for id_ in ids if id_)

    def to_bytes(self) -> bytes:
        return b"letters"


@dataclass(frozen=True)
class Job:
    """Requests of one kind for one model under several settings."""

    spec: ModelSpec
    settings: list[Setting]
    kind: str
    requests: list[tuple]
    longest: int = 64
    batch_size: int = 3
    chunk: int = 5
    max_batch: int = 2
    tp: int = 1


def decoding(**changes) -> DecodingConfig:
    return compose(["task=generate"]).decoding.model_copy(update=changes)


def model_of(job: Job, kept: KeptScores, setting: Setting) -> HarnessModel:
    return HarnessModel(kept, setting, Letters(job.spec.vocab_size), decoding(max_batch=job.max_batch), SEED)


def scorer_of(job: Job) -> WindowScorer:
    active = next((setting.policy.active for setting in job.settings if setting.policy.active), ())
    return WindowScorer(build(job.spec, job.tp), active, job.batch_size, job.chunk)


def answers(rank: int, job: Job) -> list[tuple[list, Usage]]:
    """Of every setting: answers, and what they took."""
    kept, found = KeptScores(scorer_of(job), job.longest), []
    for setting in job.settings:
        model = model_of(job, kept, setting)
        requests = [Instance(job.kind, {}, arguments, 0, ("task", number, 1)) for number, arguments in enumerate(job.requests)]
        found.append((getattr(model, job.kind)(requests), model.usage["task"]))
    return found


def scores(rank: int, job: Job, windows: Sequence[Window]) -> list[WindowScores]:
    return scorer_of(job).score(windows)


def followed(rank: int, job: Job, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[list[Token]]]:
    """Of every setting and pair of ids: the tokens that a decoder would emit in place of each of the text's."""
    stage = build(job.spec)
    return [[_followed(Decoder(stage, own.policy, own.options), *pair) for pair in pairs] for own in job.settings]


def _followed(decoder: Decoder, context: list[int], text: list[int]) -> list[Token]:
    """The context's last token is the first that is decoded, so that what follows it may leave early."""
    whole, seen = [context[-1], *text], []
    sequence = decoder.start(context[:-1], Request(len(whole)))
    while len(seen) < len(whole):
        decoder.step()
        for place in range(len(seen), len(sequence.tokens)):
            seen.append(sequence.tokens[place])
            if seen[-1].id != whole[place]:
                sequence.replace(place, whole[place])
                break
    own = following(decoder, context[:-1], Request(len(whole)), whole)
    assert own == [token.id for token in seen], "the benchmark's own way of following"
    return seen[1:]


def generated(rank: int, job: Job, prompts: list[str], options: DecodingConfig) -> list[list[Generation]]:
    """Our own generation of every setting, one prompt at a time."""
    stage, tokenizer, found = build(job.spec), Letters(job.spec.vocab_size), []
    for setting in job.settings:
        own = []
        for number, prompt in enumerate(prompts):
            own += generate_texts(Decoder(stage, setting.policy, setting.options), tokenizer, [prompt], options, SEED + number)
        found.append(own)
    return found


def setting(policy: Policy, **options) -> Setting:
    return Setting(DecoderOptions(**options), policy)


def log_likelihood(logits: torch.Tensor, labels: Sequence[int]) -> tuple[float, bool]:
    """From the logits [n, vocabulary] in front of n labels."""
    picked = logits.log_softmax(-1).gather(1, torch.tensor(labels).unsqueeze(1))
    return float(picked.sum()), logits.argmax(-1).tolist() == list(labels)
