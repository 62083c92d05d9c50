"""Rotary positions over whole heads, whatever their frequencies. This file knows no mixer: what to do with the rotated keys is
theirs."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.position import NoPosition, Shared
from fewstep.nn.position.encoding import EncodingConfig, one_axis


class RotaryConfig(EncodingConfig):
    """Rotary positions: one frequency for each pair of channels, from 1 down to about 1 / `base`."""

    base: float = Field(default=10000.0, gt=0)

    @abstractmethod
    def frequencies(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per position."""

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by; scores grow with its square."""
        return 1.0

    @property
    def length(self) -> int | None:
        """Positions end before it, where the frequencies hold no longer; None: anywhere."""
        return None

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Rope":
        if head_width % 2:
            raise ValueError(f"head_width={head_width}: rope turns pairs of channels; choose an even width")
        return Rope(self, head_width)


def powers(base: float, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[width / 2]: base^(-2i / width)."""
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.int64).to(dtype) / width
    return 1.0 / (base**exponent)


@final
class RopeConfig(RotaryConfig):
    """Rotary position embedding; `scaling` stretches the context of a trained model by `factor`.

    `linear` is position interpolation: every position is divided by the factor. `dynamic` stretches nothing before
    `trained_length`, and what is beyond is refused: there the keys of a text depend on its length (see `dynamic_ntk`).
    """

    kind: ClassVar[str] = "rope"
    source: ClassVar[str] = "Su et al. 2021, arXiv 2104.09864; position interpolation arXiv 2306.15595"
    claims: ClassVar[tuple[str, ...]] = ("length-extrapolation",)

    scaling: Literal["none", "linear", "llama3", "dynamic"] = "none"
    factor: float = Field(default=1.0, ge=1)
    low_frequency: float = Field(default=1.0, gt=0)
    high_frequency: float = Field(default=4.0, gt=0)
    trained_length: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _is_a_ramp(self) -> "RopeConfig":
        if self.low_frequency >= self.high_frequency:
            raise ValueError(f"low_frequency={self.low_frequency}: must be below high_frequency={self.high_frequency}; lower it")
        return self

    @property
    def length(self) -> int | None:
        return self.trained_length if self.scaling == "dynamic" else None

    def frequencies(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        frequency = powers(self.base, width, device, dtype)
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "llama3":
            turns = self.trained_length * frequency / (2 * math.pi)  # rotations over the trained context
            smooth = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
            smooth = smooth.clamp(0, 1)
            return (1 - smooth) * frequency / self.factor + smooth * frequency
        return frequency


@final
class Rope(NoPosition):
    """Rotates channel pairs (i, i + E/2) of queries and keys by position x frequency (the half-split layout of Llama).

    Cost: two fused multiply-adds per channel. Source: arXiv 2104.09864 eq. 34; `linear` scaling arXiv 2306.15595; `llama3`
    the wavelength ramp of Llama 3.1. Differs: the angles are computed in float32 (float64 inputs: in float64).
    """

    parts = frozenset({"rotate"})

    def __init__(self, config: RotaryConfig, head_width: int) -> None:
        super().__init__()
        self.kind, self.length = config.kind, config.length
        self.config = config
        self.head_width = head_width
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[E/2] radians per position; made once per device and dtype."""
        if (device, dtype) not in self._made:
            self._made[device, dtype] = self.config.frequencies(self.head_width, device, dtype)
        return self._made[device, dtype]

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B,1,T,E] of `positions` [B,T], the half table repeated; sin carries the sign of the rotation."""
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        places = one_axis(positions, self.kind).to(precision)[:, None, :, None]
        return tables(places * self.frequencies(positions.device, precision), dtype, self.config.amplitude)

    def rows(self, count: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [R,E] of the positions 0 .. R-1, at least `count` of them; kept, and doubled when they are too few."""
        rows = self._rows.get((device, dtype))
        if rows is None or rows[0].shape[0] < count:
            size = 1 << max(8, (count - 1).bit_length())
            cos, sin = self.table(torch.arange(size, device=device).unsqueeze(0), dtype)
            rows = self._rows[device, dtype] = cos[0, 0], sin[0, 0]
        return rows

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        if k_pos is not q_pos:
            return turn(q, *self.table(self._held(q_pos), q.dtype)), turn(k, *self.table(self._held(k_pos), k.dtype))
        key = ("rope", self.config, self.head_width)
        if key not in shared:
            shared[key] = self.table(self._held(q_pos), q.dtype)
        table: tuple[Tensor, Tensor] = shared[key]
        return turn(q, *table), turn(k, *table)

    def _held(self, positions: Tensor) -> Tensor:
        """`positions`. Raises ValueError if one is not before `length`."""
        if self.length is not None and (last := int(positions.max())) >= self.length:
            found = f"positions: {last} is beyond trained_length={self.length}, where dynamic scaling sets in"
            raise ValueError(f"{found}; shorten the text or choose dynamic_ntk")
        return positions


def tables(angles: Tensor, dtype: torch.dtype, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [...,E] of `angles` [...,E/2] times `amplitude`, as `turn` takes them."""
    cos, sin = angles.cos(), angles.sin()
    if amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [...,T,E], channels i and i + E/2 a pair, rotated by a table of `tables`."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin
