"""One decoder over all pipeline stages of a layout: the first stage's decodes, the later ones follow it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.pipeline.follower import Follower
from eellm.decoding.policy import Policy
from eellm.mcore.groups import Groups
from eellm.model.stage import Stage

Made = TypeVar("Made")


class StagedDecoder:
    """Made and used by all ranks alike. Where one stage holds the whole model there is just its `Decoder`."""

    def __init__(self, stage: Stage, policy: Policy, options: DecoderOptions, groups: Groups):
        first = groups.pp_rank == 0
        self.device = groups.device
        self.decoder = Decoder(stage, policy, options, groups) if first else None
        self._follower = None if first else Follower(stage, policy, options, groups)

    def lead(self, work: Callable[[Decoder], Made]) -> Made | None:
        """What `work` makes of the first stage's decoder, None on later stages; all of them are idle afterwards."""
        if self._follower is not None:
            self._follower.follow()
            return None
        assert self.decoder is not None
        made = work(self.decoder)
        self.decoder.close()
        return made
