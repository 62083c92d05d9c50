"""Rotary frequencies that carry a trained model beyond its context: NTK-aware scaling and YaRN. This file knows no module."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.nn.position.rope import Rope, RotaryConfig, powers


@final
class NtkConfig(RotaryConfig):
    """NTK-aware scaling: the base grows so that the slowest pair is interpolated by `factor` and the fastest is left alone."""

    kind: ClassVar[str] = "ntk"
    source: ClassVar[str] = "bloc97 2023; Peng et al. 2023, YaRN, arXiv 2309.00071, section 3.1"

    factor: float = Field(default=8.0, ge=1)

    def frequencies(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return powers(stretched_base(self.base, self.factor, width), width, device, dtype)

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> Rope:
        wide_enough(head_width)
        return super().build(head_width=head_width, width=width, heads=heads)


@final
class YarnConfig(RotaryConfig):
    """YaRN: pairs that turn less than `slow` times over the trained context are interpolated by `factor`, those that turn more
    than `fast` times are left alone, with a ramp between; cos and sin are multiplied by `attention` (None: 0.1 ln factor + 1).

    Differs from the paper as the released code and all checkpoints do: the ramp is linear in the pair's number, not in
    its rotations, between the two whole numbers around it.
    """

    kind: ClassVar[str] = "yarn"
    source: ClassVar[str] = "Peng et al. 2023, arXiv 2309.00071"
    claims: ClassVar[tuple[str, ...]] = ("length-extrapolation",)

    factor: float = Field(default=8.0, ge=1)
    trained_length: int = Field(default=2048, gt=0)
    slow: float = Field(default=1.0, gt=0)
    fast: float = Field(default=32.0, gt=0)
    attention: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_a_ramp(self) -> "YarnConfig":
        if self.slow >= self.fast:
            raise ValueError(f"slow={self.slow}: must be below fast={self.fast}; lower it")
        if self.base <= 1:
            raise ValueError(f"base={self.base}: must be above 1, so that later pairs turn slower; raise it")
        return self

    @property
    def amplitude(self) -> float:
        return self.attention if self.attention is not None else 0.1 * math.log(self.factor) + 1.0

    def frequencies(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        frequency = powers(self.base, width, device, dtype)
        first = max(math.floor(self._pair(self.fast, width)), 0)
        last = min(math.ceil(self._pair(self.slow, width)), width - 1)
        pair = torch.arange(width // 2, device=device, dtype=dtype)
        ramp = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
        return frequency / self.factor * ramp + frequency * (1 - ramp)

    def _pair(self, turns: float, width: int) -> float:
        """The number of the pair, not a whole one, that turns so often over the trained context."""
        return width * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def stretched_base(base: float, factor: float, width: int) -> float:
    """base s^(d / (d-2)): the lowest of `width` / 2 frequencies divided by `factor`, the highest as it was."""
    return base * factor ** (width / (width - 2))


def wide_enough(head_width: int) -> None:
    """Raises ValueError for a head of one pair, whose only frequency is both the highest and the lowest."""
    if head_width < 4:
        raise ValueError(f"head_width={head_width}: scaling the base takes two pairs of channels; choose at least 4")
