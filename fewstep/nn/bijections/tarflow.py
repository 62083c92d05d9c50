"""TarFlow: autoregression over patches by causal transformers, in alternating order; samples come from cached decoding.

The blocks and mixers are those of the language models: a recurrent TarFlow is one line of a recipe.
"""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Context
from fewstep.core.random import Rng
from fewstep.core.recipe import choice
from fewstep.nn.bijections.layer import BijectionConfig, Chain, Layer, Shape, size_of, vector_or_image
from fewstep.nn.bijections.linear import Permute
from fewstep.nn.bijections.networks import zeroed
from fewstep.nn.blocks import Block, BlockConfig, norm
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.stack import Stack


@final
class TarFlowConfig(BijectionConfig):
    """`flows` causal transformers of `depth` blocks over patches of `patch` x `patch` pixels (of a vector: `patch` elements).

    `log_bound`: the largest |alpha|, softly. Differs: a start token, to which c is added too, tells of the first patch.
    Train it on data with Gaussian noise (`noise` of the flow) and sample with the last denoising, as the paper does.
    """

    kind: ClassVar[str] = "tarflow"
    source: ClassVar[str] = "Zhai et al. 2024, arXiv 2412.06329"

    flows: int = Field(default=4, ge=1)
    depth: int = Field(default=2, ge=1)
    patch: int = Field(default=1, ge=1)
    width: int = Field(default=64, ge=1)
    heads: int = Field(default=4, ge=1)
    mixer: choice(lambda: MIXERS, "mixer") = AttentionConfig()  # type: ignore[valid-type]
    log_bound: float = Field(default=5.0, gt=0)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        order = patches(shape, self.patch)
        count = len(order)
        flip = Permute(torch.arange(order.numel()).view_as(order).flip(0).flatten())
        parts: list[Layer] = [Permute(order.flatten())]
        for i in range(self.flows):
            parts += [flip] if i else []
            parts.append(PatchAutoregression(self, count, order.shape[1], context))
        return Chain(parts)


def patches(shape: Shape, patch: int) -> Tensor:
    """[T,P] int64: which elements make each patch, row by row. Raises ValueError for a size the patches do not fill."""
    image, size = vector_or_image(shape), size_of(shape)
    sides = shape if image is None else shape[1:]
    if any(side % patch for side in sides):
        raise ValueError(f"patch={patch}: does not divide the sides {tuple(sides)}; choose a divisor of them")
    if image is None:
        return torch.arange(size).view(-1, patch)
    channels, height, width = image
    index = torch.arange(size).view(channels, height // patch, patch, width // patch, patch)
    return index.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)


@final
class PatchAutoregression(Layer):
    """z_i = (x_i - mu_i) e^(-alpha_i), where mu_i and alpha_i follow from c and the patches before i.

    Cost: one pass of the transformer forwards; backwards T cached calls of one patch, as a language model decodes.
    """

    def __init__(self, config: TarFlowConfig, count: int, patch: int, context: int) -> None:
        super().__init__(count * patch, context)
        self.shape, self.bound = (count, patch), config.log_bound
        self.project = nn.Linear(patch, config.width)
        self.start = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        self.place = nn.Parameter(torch.empty(count, config.width).normal_(std=0.02))
        self.condition = nn.Linear(context, config.width) if context else None
        block = BlockConfig(norm="layer", activation="gelu", hidden=4 * config.width, mlp_bias=True)
        mixers = [config.mixer.build(width=config.width, heads=config.heads) for _ in range(config.depth)]
        self.blocks = Stack(Block(block, config.width, mixer) for mixer in mixers)
        self.norm = norm("layer", config.width, block.eps)
        self.out = zeroed(nn.Linear(config.width, 2 * patch))

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        tokens = x.view(-1, *self.shape)
        mu, alpha = self.moves(tokens, c)
        return ((tokens - mu) * (-alpha).exp()).flatten(1), -alpha.sum((1, 2))

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        tokens, count, given = z.view(-1, *self.shape), self.shape[0], self._given(c)
        state = self.blocks.init_state(len(z), count, device=z.device, dtype=z.dtype)
        path = torch.zeros(len(z), 1, dtype=torch.int64, device=z.device)
        h, found, total = self.start.expand(len(z), 1, -1), list[Tensor](), z.new_zeros(len(z))
        for i in range(count):
            h, _, state = self.blocks.extend(h + self.place[i] + given, Context(), state, range(len(self.blocks)))
            state = state.commit(path, path[:, 0] + 1)
            mu, alpha = self._read(h)
            x = tokens[:, i : i + 1] * alpha.exp() + mu
            h = self.project(x)
            found.append(x)
            total = total + alpha.sum((1, 2))
        return torch.cat(found, 1).flatten(1), total

    def moves(self, tokens: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu and alpha [B,T,P] of all patches at once, from those before each."""
        begin = self.start.expand(len(tokens), 1, -1)
        h = torch.cat([begin, self.project(tokens[:, :-1])], 1) + self.place + self._given(c)
        ctx = Context(torch.arange(self.shape[0], device=tokens.device).expand(len(tokens), -1))
        for block in self.blocks:
            h, _ = block(h, ctx)
        return self._read(h)

    def _given(self, c: Tensor | None) -> Tensor | float:
        return 0.0 if self.condition is None else self.condition(c).unsqueeze(1)

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = self.out(self.norm(h)).chunk(2, -1)
        return mu, raw / (1 + raw.abs() / self.bound)
