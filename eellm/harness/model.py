"""lm-evaluation-harness's view of a model under one way of decoding: its requests in, its answers and what they took out.

- Log-likelihoods: at every place of the text, the distribution of the head that the policy lets speak there, given the
  text before. That is what a decoder would use that takes the text one token at a time, the last token of the context
  first; so a threshold acts on a continuation's first token too, as it does in EE-LLM. (Generation leaves each first token to
  the final head, whose pass over the prompt has been made anyway; `exit_policy.min_new_tokens=1` scores like that.)
  `full` and `self_speculative` score with the final head, since it has the last word.
- Generation is the decoder's, with `decoding.max_batch` sequences side by side.
- A text that is longer than the model was trained for loses its beginning; `Usage.cut` counts such requests.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from eellm.config.schema import DecodingConfig
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.decoder import Decoder
from eellm.decoding.generation import generate_from_ids
from eellm.decoding.setting import Setting
from eellm.harness.kept_scores import KeptScores
from eellm.harness.speakers import scoring_policy, speakers
from eellm.harness.usage import Usage

Answer = TypeVar("Answer")
DEFAULT_NEW_TOKENS = 256
"""Where a task does not say; the harness's own models have the same."""
CONTEXTS = 4
"""Of each task, that are kept for timing."""


class HarnessModel(TemplateLM):
    """One setting. `scores` are shared with the other settings of the same model; `usage` is filled by task.

    `contexts`: the first few token ids that each task's answers follow.
    """

    def __init__(self, scores: KeptScores, setting: Setting, tokenizer: Tokenizer, decoding: DecodingConfig, seed: int):
        super().__init__()
        self.scores, self.setting, self.text_tokenizer = scores, setting, tokenizer
        self.decoding, self.seed = decoding, seed
        self.usage: dict[str, Usage] = defaultdict(Usage)
        self.contexts: dict[str, list[list[int]]] = defaultdict(list)
        self._stage = scores.scorer.stage
        self._policy = scoring_policy(setting.policy, setting.options, self._stage.spec)
        self._layers = (*scores.scorer.active, self._stage.spec.num_layers)
        self._decoder: Decoder | None = None
        self._task = ""

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eod_id

    @property
    def longest(self) -> int:
        return self.scores.longest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_ignored: Any) -> list[int]:
        """No special tokens, whatever is asked for: an eellm tokenizer adds none."""
        return self.text_tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._by_task(requests, lambda own: super(HarnessModel, self).loglikelihood(own, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        def answer(own: list[Instance]) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in own]
            return [total for total, _ in self._scored([([self.prefix_token_id], text) for text in texts])]

        return self._by_task(requests, answer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._by_task(requests, self._generate)

    @contextmanager
    def decoding_on_demand(self) -> Iterator[None]:
        """Let go of the decoder in the end: its key-value cache is large, and every setting has one."""
        try:
            yield
        finally:
            self._decoder = None

    def _by_task(self, requests: list[Instance], answer: Callable[[list[Instance]], Sequence[Answer]]) -> list[Answer]:
        """Answers in order, made task by task, so that each task's usage is its own."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[str(request.task_name)].append(place)
        found: dict[int, Answer] = {}
        for self._task, own in places.items():
            found |= dict(zip(own, answer([requests[place] for place in own]), strict=True))
        return [found[place] for place in range(len(requests))]

    def _note(self, contexts: Iterable[list[int]]) -> None:
        kept = self.contexts[self._task]
        kept += islice(contexts, CONTEXTS - len(kept))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does it: encoded as one text and cut, spaces between belonging to the continuation.

        Where that leaves nothing of the continuation, because one token spans the cut, each is encoded for itself.
        """
        before, after = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], after or self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_ignored: Any
    ) -> list[tuple[float, bool]]:
        usage = self.usage[self._task]
        usage.cut += sum(len(context) + len(text) - 1 > self.longest for _, context, text in requests)
        return self._scored([(context, text) for _, context, text in requests])

    def _scored(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding emits it) of texts behind their contexts."""
        usage, answers = self.usage[self._task], []
        self._note(context for context, _ in pairs)
        for (_, text), scored in zip(pairs, self.scores.of(self._task, pairs), strict=True):
            labels, total, greedy = torch.tensor(text), 0.0, True
            for scores in scored:
                heads = scores.heads
                speaker = speakers(heads, self._policy, self.setting.options.max_pending, self._layers)
                own, labels = labels[: len(speaker)], labels[len(speaker) :]
                total -= float(scores.loss.gather(0, speaker.unsqueeze(0)).double().sum())
                predictions = torch.stack([head.prediction for head in heads]).gather(0, speaker.unsqueeze(0))[0]
                greedy = greedy and bool((predictions == own).all())
                usage.layers += sum(self._layers[head] for head in speaker.tolist())
            usage.scored.tokens += len(text)
            answers.append((total, greedy))
        usage.scored.seconds = self.scores.seconds.get(self._task, 0.0)
        return answers

    def _generate(self, requests: list[Instance]) -> list[str]:
        """Continuations, those with equal options side by side."""
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(place)
        found: dict[int, str] = {}
        for options, places in alike.items():
            prompts = [str(requests[place].args[0]) for place in places]
            found |= dict(zip(places, self._continuations(prompts, self._options(json.loads(options))), strict=True))
        return [found[place] for place in range(len(requests))]

    def _options(self, given: dict[str, Any]) -> DecodingConfig:
        """A task's generation_kwargs as ours. New tokens take at most half of what the model reads at a time."""
        wanted = normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)
        changes = {
            "max_new_tokens": min(wanted["max_gen_toks"], max(1, self.longest // 2)),
            "temperature": wanted.get("temperature", 1.0 if wanted["do_sample"] else 0.0),
            "top_k": wanted.get("top_k") or 0,
            "top_p": wanted.get("top_p") or 1.0,
            "stop": wanted["until"],
            "stop_at_eos": True,
        }
        return self.decoding.model_copy(update=changes)

    def _continuations(self, texts: list[str], decoding: DecodingConfig) -> list[str]:
        usage, room = self.usage[self._task], self.longest + 1 - decoding.max_new_tokens
        encoded = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        usage.cut += sum(len(ids) > room for ids in encoded)
        prompts = [ids[-room:] for ids in encoded]
        self._note(prompts)
        if self._decoder is None:
            self._decoder = Decoder(
                self._stage, self.setting.policy, replace(self.setting.options, max_batch=self.decoding.max_batch)
            )
        started = time.perf_counter()
        generations = generate_from_ids(
            self._decoder, self.text_tokenizer, list(zip(texts, prompts, strict=True)), decoding, self.seed
        )
        usage.generated.seconds += time.perf_counter() - started
        usage.generated.tokens += sum(len(generation.tokens) for generation in generations)
        usage.layers += sum(token.exit_layer for generation in generations for token in generation.tokens)
        return [generation.text for generation in generations]
