"""A small U-Net for images: convolutions at falling and rising resolutions, joined across. This file knows no noise."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from fewstep.core.recipe import Config
from fewstep.nn.backbones.conditioning import HIGH, Conditioning


@final
class UNetConfig(Config):
    """`multiples` of `width` channels, one a resolution, each half the one before; `blocks` residual blocks at each.

    Self-attention at resolutions of at most `attention` pixels a side. The noise level is told in waves of up to `turns`.
    """

    kind: ClassVar[str] = "unet"
    source: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239; scale and shift: Dhariwal and Nichol 2021, arXiv 2105.05233"

    width: int = Field(default=32, ge=8, multiple_of=8)
    multiples: tuple[int, ...] = (1, 2)
    blocks: int = Field(default=1, ge=1)
    attention: int = Field(default=4, ge=0)
    turns: float = Field(default=HIGH, gt=0)

    def build(self, shape: tuple[int, ...], classes: int = 0, told: int = 0, outputs: int = 1) -> "UNet":
        return UNet(self, shape, Conditioning(4 * self.width, classes, told, self.turns), outputs)


@final
class ResidualBlock(nn.Module):
    """Two convolutions of 3x3, the second behind a norm that the condition scales and shifts; then attention, if asked for."""

    def __init__(self, inputs: int, outputs: int, condition: int, attends: bool) -> None:
        super().__init__()
        self.first_norm, self.first = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.second_norm, self.second = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attend = PixelAttention(outputs) if attends else nn.Identity()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.first(silu(self.first_norm(x)))
        h = self.second(silu(self.second_norm(h) * (1 + scale) + shift))
        attended: Tensor = self.attend(self.skip(x) + h)
        return attended


@final
class PixelAttention(nn.Module):
    """Every pixel sees every pixel, in one head, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, channels),
            nn.Conv2d(channels, 3 * channels, 1),
            nn.Conv2d(channels, channels, 1),
        )
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, -1)
        mixed = scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x.shape)
        return x + self.out(mixed)


@final
class UNet(nn.Module):
    """For images [C,H,W]. Cost: dominated by the convolutions, 9 inputs x outputs a pixel each."""

    def __init__(self, config: UNetConfig, shape: tuple[int, ...], conditioning: Conditioning, outputs: int) -> None:
        """Raises ValueError for a `shape` that is no image, or whose sides cannot be halved as often as asked for."""
        super().__init__()
        halvings = len(config.multiples) - 1
        if len(shape) != 3 or any(side % 2**halvings for side in shape[1:]):
            raise ValueError(
                f"shape={shape}: expected channels, height and width, both multiples of {2**halvings}; "
                "pad the images or give fewer multiples"
            )
        channels, side = shape[0], max(shape[1:])
        condition = 4 * config.width
        self.condition = conditioning
        self.first = nn.Conv2d(channels, config.width, 3, padding=1)
        widths = [multiple * config.width for multiple in config.multiples]
        kept, now = [config.width], config.width  # channels of what is carried across, and of the stream
        self.falling, self.rising = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            attends = side // 2**level <= config.attention
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(ResidualBlock(now, width, condition, attends))
                now = width
                kept.append(now)
            self.falling.append(blocks)
        self.middle = ResidualBlock(now, now, condition, True)
        for level, width in reversed(list(enumerate(widths))):
            attends = side // 2**level <= config.attention
            blocks = nn.ModuleList()
            for _ in range(config.blocks + (level == 0)):
                blocks.append(ResidualBlock(now + kept.pop(), width, condition, attends))
                now = width
            self.rising.append(blocks)
        self.norm, self.out = nn.GroupNorm(8, now), nn.Conv2d(now, outputs * channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None, told: Tensor | None = None) -> Tensor:
        """x [B,C,H,W], noise [B], label [B] or None, told [B,E] or None -> [B, outputs C,H,W]."""
        condition = self.condition(noise, label, told)
        h = self.first(x)
        kept = [h]
        for level, blocks in enumerate(self.falling):
            if level:
                h = avg_pool2d(h, 2)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, condition)
                kept.append(h)
        h = self.middle(h, condition)
        for level, blocks in enumerate(self.rising):
            if level:
                h = interpolate(h, scale_factor=2.0)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(torch.cat([h, kept.pop()], 1), condition)
        denoised: Tensor = self.out(silu(self.norm(h)))
        return denoised
