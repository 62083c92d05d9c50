"""The drafter that proposes nothing: plain decoding, one token per call."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load


@final
class SilentConfig(DrafterConfig):
    """Plain decoding."""

    kind: ClassVar[str] = "silent"
    source: ClassVar[str] = "none: one call per token, the baseline"

    def build(self, target: Target, load: Load) -> "Silent":
        return Silent()


@final
class Nothing:
    """The state of a drafter that remembers nothing."""

    def fork(self, rows: Tensor) -> "Nothing":
        return self

    def join(self, other: "Nothing") -> "Nothing":
        return self

    def nbytes(self) -> int:
        return 0


@final
class Silent:
    """A tree that is its root. Cost: none."""

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Nothing:
        return Nothing()

    def propose(self, root: Tensor, state: Nothing, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Nothing]:
        tokens = root.unsqueeze(1)
        return Tree(tokens, torch.full_like(tokens, -1)), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Nothing) -> Nothing:
        return state
