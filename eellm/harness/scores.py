"""What every head says along given texts, from one pass over each: the harness's log-likelihoods at any threshold.

Shape legend: H heads (active exits, then the final one), n labels of a window, b windows, s inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from eellm.data.batch import Microbatch
from eellm.harness.windows import Window
from eellm.model.context import Context
from eellm.model.stage import Readout, Stage
from eellm.model.statistics import HeadStatistics, label_statistics


@dataclass(frozen=True)
class WindowScores:
    """`values` fp32 [H, 6, n] on the CPU: each head's cross-entropy of the labels, then the fields of its statistics.

    One tensor, because there are as many of these as requests; ids are exact in fp32 up to 2**24.
    """

    values: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """[H, n]"""
        return self.values[:, 0]

    @property
    def heads(self) -> list[HeadStatistics]:
        """Each head's statistics [n]."""
        return [HeadStatistics(of_head[1].long(), *of_head[2:]) for of_head in self.values]


class WindowScorer:
    """Scores windows with a stage in evaluation mode that holds the whole model.

    `active`: layers of the exits that are evaluated, ascending. A forward takes `batch_size` windows, padded to the longest,
    and logits of at most `chunk` labels exist at a time. All tensor-parallel ranks make the same calls and get the same.
    """

    def __init__(self, stage: Stage, active: Sequence[int], batch_size: int, chunk: int):
        self.stage, self.active = stage, tuple(active)
        self.batch_size, self.chunk = batch_size, chunk

    @torch.inference_mode()
    def score(self, windows: Sequence[Window]) -> list[WindowScores]:
        """In the order given. The longest go first, so that what does not fit in memory fails at once; windows that
        differ in their labels only, as the choices of a question do, share their forward."""
        same: dict[tuple[int, ...], list[int]] = {}
        for number, window in enumerate(windows):
            same.setdefault(window.inputs, []).append(number)
        texts = sorted(same, key=len, reverse=True)
        found: dict[int, WindowScores] = {}
        for begin in range(0, len(texts), self.batch_size):
            batch = texts[begin : begin + self.batch_size]
            numbers = [(row, number) for row, text in enumerate(batch) for number in same[text]]
            scores = self._score(batch, [(row, windows[number].labels) for row, number in numbers])
            found |= dict(zip([number for _, number in numbers], scores, strict=True))
        return [found[number] for number in range(len(windows))]

    def _score(self, texts: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[WindowScores]:
        """Scores of `wanted`: (row of its text, labels of the row's last places)."""
        longest = len(texts[0])
        device = next(self.stage.parameters()).device
        # behind a text, where no token of it can look
        tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
        positions = torch.arange(longest, device=device).expand_as(tokens)
        places = [
            place * len(texts) + row for row, labels in wanted for place in range(len(texts[row]) - len(labels), len(texts[row]))
        ]  # in the stage's order of tokens, [s, b] flattened
        labels = torch.tensor([label for _, own in wanted for label in own], device=device)
        visitor = _Scoring(torch.tensor(places, device=device), labels, self.active, self.chunk)
        self.stage(Microbatch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32), positions), visitor)
        values = visitor.values()
        yield from map(WindowScores, values.split([len(own) for _, own in wanted], dim=2))


class _Scoring:
    """The visitor of one forward: active exits and the final head score the labels at their places, both int64 [n]."""

    def __init__(self, places: torch.Tensor, labels: torch.Tensor, active: Sequence[int], chunk: int):
        self.places, self.labels, self.active, self.chunk = places, labels, active, chunk
        self._values: list[torch.Tensor] = []

    def values(self) -> torch.Tensor:
        """As `WindowScores.values`, of all labels."""
        return torch.stack(self._values).cpu()

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        if readout.head.layer in self.active:
            self._score(hidden, readout, context)
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        self._score(hidden, readout, context)
        return hidden.new_zeros(())

    def _score(self, hidden: torch.Tensor, readout: Readout, context: Context) -> None:
        features = readout.head.features(hidden, context).flatten(0, 1)
        chunks = []
        for places, labels in zip(self.places.split(self.chunk), self.labels.split(self.chunk), strict=True):
            loss, head = label_statistics(features[places], readout.weight, labels, readout.vocabulary, readout.head.temperature)
            chunks.append(torch.stack([loss, *(getattr(head, field.name).float() for field in fields(head))]))
        self._values.append(torch.cat(chunks, dim=1))
