"""A transformer over patches, of the blocks and mixers that language models have. This file knows no noise, no mixer by name."""

from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Causal, Context, Full
from fewstep.core.position import NoPosition
from fewstep.core.recipe import choice
from fewstep.nn.backbones.conditioning import HIGH, Conditioning
from fewstep.nn.blocks import MLP, BlockConfig, norm
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.position import POSITIONS
from fewstep.nn.position.plane import AxialRopeConfig, PlaneConfig


@final
class DiTConfig(BlockConfig):
    """`depth` blocks over patches of `patch` pixels a side. `mixers` lists the mixer of each layer and repeats over the depth.

    Where a mixer only looks back, every other layer of those reads the patches from the last to the first. The noise level is
    told in waves of up to `turns`.
    """

    kind: ClassVar[str] = "dit"
    source: ClassVar[str] = "Peebles and Xie 2023, DiT, arXiv 2212.09748"

    width: int = Field(default=128, ge=2, multiple_of=2)
    depth: int = Field(default=6, ge=1)
    query_heads: int = Field(default=4, ge=1)
    hidden: int = Field(default=344, ge=1)
    patch: int = Field(default=2, ge=1)
    mixers: tuple[choice(lambda: MIXERS, "mixers"), ...] = (AttentionConfig(),)  # type: ignore[valid-type]
    position: choice(lambda: POSITIONS, "position") = AxialRopeConfig()  # type: ignore[valid-type]
    turns: float = Field(default=HIGH, gt=0)

    def build(self, shape: tuple[int, ...], classes: int = 0, told: int = 0, outputs: int = 1) -> "DiT":
        return DiT(self, shape, Conditioning(self.width, classes, told, self.turns), outputs)


@final
class ModulatedBlock(nn.Module):
    """x + g1 mixer(norm(x) (1 + s1) + b1), then the same with the MLP; s, b and g are linear in the condition and start at 0."""

    def __init__(self, config: DiTConfig, mixer: Any, backwards: bool) -> None:
        super().__init__()
        self.mixer, self.backwards = mixer, backwards
        self.full = "bidirectional" in mixer.modes
        self.mixer_norm, self.mlp_norm = (norm(config.norm, config.width, config.eps) for _ in range(2))
        self.mlp = MLP(config.width, config.hidden, config.activation, config.mlp_bias)
        self.modulation = nn.Linear(config.width, 6 * config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, positions: Tensor, shared: dict[Any, Any]) -> Tensor:
        """x [B,T,D], condition [B,D], positions [B,T] or [B,T,2]; `shared` is the call's, one for each direction."""
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        h = self.mixer_norm(x) * (1 + scale) + shift
        if self.backwards:
            h, positions = h.flip(1), positions.flip(1)
        mixed, _ = self.mixer(h, Context(positions, mask=Full() if self.full else Causal(), shared=shared))
        x = x + gate * (mixed.flip(1) if self.backwards else mixed)
        return x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)


@final
class DiT(nn.Module):
    """For images [C,H,W] as HW/p^2 patches in rows. Cost: depth times a block of the mixer; T = HW/p^2 tokens."""

    def __init__(self, config: DiTConfig, shape: tuple[int, ...], condition: Conditioning, outputs: int) -> None:
        """Raises ValueError for a `shape` that is no image or no whole number of patches."""
        super().__init__()
        if len(shape) != 3 or any(side % config.patch for side in shape[1:]):
            raise ValueError(f"shape={shape}: expected channels, height and width, both multiples of patch={config.patch}")
        self.patch, self.channels = config.patch, shape[0]
        features = shape[0] * config.patch**2
        self.condition = condition
        self.first = nn.Linear(features, config.width)
        head_widths = {mixer.widths(config.width, config.query_heads)[1] for mixer in config.mixers}
        if len(head_widths) > 1:
            raise ValueError(
                f"mixers: head widths {sorted(head_widths)}; the layers share one position encoding, choose one width"
            )
        self._head_width, self._planar = head_widths.pop(), isinstance(config.position, PlaneConfig)
        self.position = self._encoding(config) if config.position.shared else NoPosition()
        within = self.position if self.position.parts - {"embed"} else NoPosition()
        self.blocks = nn.ModuleList()
        looking_back = 0
        for layer in range(config.depth):
            position = within if config.position.shared else self._encoding(config)
            mixer = config.mixers[layer % len(config.mixers)].build(
                width=config.width, heads=config.query_heads, position=position
            )
            causal = "bidirectional" not in mixer.modes
            self.blocks.append(ModulatedBlock(config, mixer, backwards=causal and looking_back % 2 == 1))
            looking_back += causal
        self.norm = norm(config.norm, config.width, config.eps)
        self.modulation, self.out = nn.Linear(config.width, 2 * config.width), nn.Linear(config.width, outputs * features)
        for part in (self.modulation, self.out):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None, told: Tensor | None = None) -> Tensor:
        """x [B,C,H,W], noise [B], label [B] or None, told [B,E] or None -> [B, outputs C,H,W]."""
        batch, channels, height, width = x.shape
        rows, columns, side = height // self.patch, width // self.patch, self.patch
        patches = x.view(batch, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.arange(rows * columns, device=x.device)
        if self._planar:
            places = torch.stack([places // columns, places % columns], 1)
        positions = places.expand(batch, *places.shape)
        condition = self.condition(noise, label, told)
        h = self.position.embed(self.first(patches), positions)
        shared: tuple[dict[Any, Any], dict[Any, Any]] = {}, {}
        for block in self.blocks:
            h = block(h, condition, positions, shared[block.backwards])  # type: ignore[index]
        scale, shift = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        h = self.out(self.norm(h) * (1 + scale) + shift)
        h = h.view(batch, rows, columns, -1, side, side).permute(0, 3, 1, 4, 2, 5)
        return h.reshape(batch, -1, height, width)

    def _encoding(self, config: DiTConfig) -> NoPosition:
        made: NoPosition = config.position.build(head_width=self._head_width, width=config.width, heads=config.query_heads)
        return made
