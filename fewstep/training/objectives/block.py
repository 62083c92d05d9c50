"""Block diffusion: masked diffusion within blocks that see earlier ones clean, in one pass over the noisy and the clean text."""

from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Doubled
from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.models.decoder import Decoder
from fewstep.nn.masks import places
from fewstep.training.objectives.masking import MaskingConfig, mask_token_of, masked, predicting, scored, surprise

_WIDTHS = tuple(0.5 + 0.1 * i for i in range(5))
_STRIDE = 0.05


@final
class BlockConfig(MaskingConfig):
    """Blocks of `size` tokens, counted from the start of each segment, with a noise level each.

    `clip`: training draws its times from the part of the window in which the loss of a block varied least at the last validation;
    bounds are always taken over the whole `window`.
    """

    kind: ClassVar[str] = "block"
    source: ClassVar[str] = "Arriola et al. 2025, arXiv 2503.09573, equation 8, sections 3.1 and 5"
    claims: ClassVar[tuple[str, ...]] = ("diffusion-order", "block-cache", "conversion")

    size: int = Field(default=4, ge=1)
    clip: bool = False

    def build(self) -> "BlockDiffusion":
        return BlockDiffusion(self)


@final
class BlockDiffusion:
    """Raises ValueError for a length that `size` does not divide, a model without a mask token, or mixers without the mask.

    Cost: one pass over twice the tokens. State: the window that training draws from, if it is clipped.
    Source: arXiv 2503.09573, sections 3.1 (the doubled pass), 5.3 (windows of widths 0.5 to 0.9, 0.05 apart).
    """

    def __init__(self, config: BlockConfig) -> None:
        self.config = config
        self._window = config.window
        self._seen: list[Tensor] = []  # [2,N] times and losses of the blocks of this validation

    def nats(self, model: nn.Module, batch: Batch, rng: Rng) -> Tensor:
        """[B,T]: what each token adds to the bound of its row's -ln p, in nats."""
        return self._nats(model, batch, rng, self.config.window)[0]

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        units = int(scored(batch).sum())
        found, cells, noise = self._nats(model, batch, rng, self._window if model.training else self.config.window)
        if self.config.clip and not model.training:
            self._seen.append(_by_cell(found, cells, noise))
        value = found.sum() / max(units, 1)
        return Loss(value, units, {"bound": value.detach()})

    def after_step(self, model: nn.Module) -> None:
        """Nothing to do."""

    def validated(self, metrics: Mapping[str, float]) -> None:
        if self._seen:
            self._window = _calmest(torch.cat(self._seen, 1), self.config.window)
            self._seen = []

    def state_dict(self) -> dict[str, Any]:
        return {"low": self._window[0], "high": self._window[1]} if self.config.clip else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            kept = sorted(self.state_dict()) or "none"
            raise ValueError(f"objective state {sorted(state)}: block keeps {kept}; the checkpoint belongs to another objective")
        if state:
            self._window = (float(state["low"]), float(state["high"]))

    def _nats(self, model: nn.Module, batch: Batch, rng: Rng, window: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
        decoder, size = cast(Decoder, model), self.config.size
        if batch.tokens.shape[1] % size:
            raise ValueError(
                f"size={size}: does not divide the length {batch.tokens.shape[1]}; choose a divisor, or another run.length"
            )
        mask = mask_token_of(decoder, batch, self.config.kind)
        segments = torch.zeros_like(batch.tokens) if batch.segments is None else batch.segments
        place = places(segments)
        cells = _cells(place, segments, size, scored(batch))
        noisy = masked(batch, cells, mask, self.config, window, rng)
        encoded = decoder(
            torch.cat([noisy.tokens, batch.tokens], 1),
            None if batch.segments is None else torch.cat([segments, segments], 1),
            positions=torch.cat([place, place], 1),
            mask=Doubled(size),
            noise=torch.cat([noisy.noise, torch.zeros_like(noisy.noise)], 1) if decoder.noisy else None,
        )
        inside, clean = encoded.final.chunk(2, 1)
        ends = ((place + 1) % size == 0).unsqueeze(-1)  # of blocks, which the next one sees clean
        output = predicting(decoder, inside, batch, torch.where(ends, clean, inside))
        found = surprise(decoder, output, batch.tokens, noisy.hidden)
        return found * noisy.weight.to(found.dtype), cells, noisy.noise


def _cells(place: Tensor, segments: Tensor, size: int, real: Tensor) -> Tensor:
    """[B,T] the number of each token's block along its row, -1 outside of any."""
    begins = place % size == 0
    return torch.where(real & (segments >= 0), begins.cumsum(1) - 1, -1)


def _by_cell(nats: Tensor, cells: Tensor, noise: Tensor) -> Tensor:
    """[2,N]: the noise and the loss of every block."""
    count = int(cells.max()) + 1
    zeros = torch.zeros(len(cells), max(count, 1), dtype=torch.float64, device=cells.device)
    cell, inside = cells.clamp(min=0), cells >= 0
    sizes = zeros.scatter_add(1, cell, inside.double())
    loss = zeros.scatter_add(1, cell, nats.detach().double() * inside)
    level = zeros.scatter_reduce(1, cell, noise * inside, "amax")
    real = sizes > 0
    return torch.stack([level[real], loss[real] / sizes[real]])


def _calmest(seen: Tensor, whole: tuple[float, float]) -> tuple[float, float]:
    """The window inside `whole` in which the losses `seen` vary least; `whole` where no window has two blocks."""
    best, found = torch.inf, whole
    for width, start in product(_WIDTHS, range(round(0.5 / _STRIDE) + 1)):
        low, high = start * _STRIDE, start * _STRIDE + width
        if high > 1 + 1e-9:
            continue
        losses = seen[1, (seen[0] >= low) & (seen[0] <= high)]
        if len(losses) > 1 and float(losses.var()) < best:
            best, found = float(losses.var()), (max(low, whole[0]), min(high, whole[1]))
    return found
