"""The decoder-only language model: embedding, blocks, norm, unembedding, and the extra heads of its checkpoint.

It fulfils `core.model.Target` for the token loops and offers a parallel `forward` to the objectives. This file knows mixers,
position encodings and heads through their registries only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.core.mixer import Aux, Blocks, Causal, Context, Dense, Doubled, Mask, Prefix, Tree
from fewstep.core.model import Output
from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config, choice, parse
from fewstep.nn.ahead import Begins
from fewstep.nn.blocks import Block, BlockConfig, norm
from fewstep.nn.heads import HEADS
from fewstep.nn.masks import allowed, places
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.noise import NoiseEmbedding
from fewstep.nn.packed import PackedCall, packed_call
from fewstep.nn.position import POSITIONS, RopeConfig
from fewstep.nn.stack import Stack, StackState


@final
class DecoderConfig(BlockConfig):
    """A decoder. `mixers` lists the mixer of each layer and repeats over the depth; `heads` are trained beside the trunk.

    `mask_token`: the id below `vocab` that stands for a token to be found, where the model is trained to (None: it is not); no
    text has it. What a call's mask lets a token see is the call's affair, so that one checkpoint runs left to right, block by
    block and all at once: a given token predicts the one after it, a masked one itself. `shifted`: a masked one too is predicted
    by the output of the token before it, so that what was learnt left to right goes on to hold. `noisy`: the model is told the
    share of its input that is corrupted, which masked diffusion does not need.
    """

    kind: ClassVar[str] = "decoder"
    source: ClassVar[str] = "Touvron et al. 2023, arXiv 2302.13971 (pre-norm, SwiGLU, RoPE)"

    vocab: int = Field(default=2048, ge=2)
    width: int = Field(default=256, ge=1)
    depth: int = Field(default=8, ge=1)
    query_heads: int = Field(default=4, ge=1)
    mixers: tuple[choice(lambda: MIXERS, "mixers"), ...] = (AttentionConfig(),)  # type: ignore[valid-type]
    position: choice(lambda: POSITIONS, "position") = RopeConfig()  # type: ignore[valid-type]
    heads: tuple[choice(lambda: HEADS, "heads"), ...] = ()  # type: ignore[valid-type]
    tied: bool = True
    max_positions: int | None = Field(default=2048, ge=1)
    init_std: float = Field(default=0.02, gt=0)
    embed_std: float | None = Field(default=None, gt=0)  # None: init_std
    mask_token: int | None = Field(default=None, ge=0)
    shifted: bool = False
    noisy: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> "DecoderConfig":
        if not self.mixers:
            raise ValueError("mixers=(): empty; name at least one mixer, e.g. ['attention']")
        if self.tied and self.embed_std is not None:
            raise ValueError(
                f"embed_std={self.embed_std}: a tied embedding starts as an output layer does; set tied=false or leave it out"
            )
        if self.mask_token is not None and self.mask_token >= self.vocab:
            raise ValueError(f"mask_token={self.mask_token}: outside 0..{self.vocab - 1}; raise vocab, or choose an unused id")
        drafters = [head.drafter for head in self.heads]
        twice = next((name for name in drafters if drafters.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"heads={[head.kind for head in self.heads]}: two serve the drafter {twice!r}; keep one of them")
        return self

    def carrying(self, *heads: Config) -> "DecoderConfig":
        """This decoder with `heads` in place of those that serve the same drafters. Raises ValueError for two that serve one."""
        drafters = {cast(Any, head).drafter for head in heads}
        kept = [head for head in self.heads if head.drafter not in drafters]
        return parse(DecoderConfig, {**dict(self), "heads": [*kept, *heads]})

    def build(self) -> "Decoder":
        return Decoder(self)


@final
@dataclass(frozen=True, slots=True)
class Encoded:
    """A parallel pass: `final` [B,T,D] after the last norm, tapped activations by name, and the mixers' losses and counts."""

    final: Tensor
    hidden: Mapping[str, Tensor]
    context: Context
    aux: Aux


@final
class Decoder(nn.Module):
    """A `Target`. Cost of a call: about 2 parameters per token; the state is what its mixers keep per token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab, self.width, self.depth = config.vocab, config.width, config.depth
        self.max_positions = config.max_positions
        self.mask_token, self.shifted, self.noisy = config.mask_token, config.shifted, config.noisy
        self.recompute = False  # activation checkpointing of each block in `forward`
        head_widths = {mixer.widths(config.width, config.query_heads)[1] for mixer in config.mixers}
        if len(head_widths) > 1:
            raise ValueError(
                f"mixers: head widths {sorted(head_widths)}; the layers share one position encoding, choose one width"
            )
        self._head_width = head_widths.pop()
        self.position = self._encoding() if config.position.shared else NoPosition()
        self._within = (self.position if self.position.parts - {"embed"} else NoPosition(),)  # in a tuple: its owner is another
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = Stack(self._block(i) for i in range(config.depth))
        self.norm = norm(config.norm, config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.noise = NoiseEmbedding(config.width) if config.noisy else None
        self.extra = nn.ModuleDict({head.drafter: self._heads(head) for head in config.heads})
        self._call: PackedCall | None = None  # made at the first call after packing
        self._initialise(self)
        self._begin(self.extra)

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        return dict(self.extra.items())

    def attach(self, *heads: Config) -> None:
        """Set freshly drawn `heads` (configs of `HEADS`) beside the trunk, in place of those that serve the same drafters.

        Raises ValueError for two that serve one drafter, or heads this trunk cannot carry; then nothing has changed.
        """
        config = self.config.carrying(*heads)
        made = nn.ModuleDict({cast(Any, head).drafter: self._heads(head) for head in heads})
        self._initialise(made)
        self._begin(made.to(self.embedding.weight))
        self.extra.update(dict(made.items()))
        self.config = config

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        return self.embedding, self.head

    def embed(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor:
        """`noise` [B,N]: the share corrupted of what each token belongs to; None: all of it is clean."""
        x = torch.embedding(self.embedding.weight, tokens)
        return x if self.noise is None or noise is None else x + self.noise(noise)

    def unembed(self, h: Tensor, ids: Tensor | None = None) -> Tensor:
        return self.head(h) if ids is None else nn.functional.linear(h, self.head.weight[ids])

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> StackState:
        return self.blocks.init_state(batch, capacity, device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        taps: tuple[str, ...] = (),
        noise: Tensor | None = None,
    ) -> Encoded:
        """The parallel form over tokens [B,T]; positions restart with each segment unless given; `noise` as `embed` takes it.

        Raises ValueError for a mask that a mixer takes neither as it is nor written out.
        """
        if positions is None:
            positions = places(torch.zeros_like(tokens) if segments is None else segments)
        ctx = Context(positions, segments=segments, mask=self._taken(mask or Causal(), tokens, segments))
        x = self.position.embed(self.embed(tokens, noise), positions)
        hidden = {"embed": x} if "embed" in taps else {}
        aux: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x, layer_aux = checkpoint(block, x, ctx, use_reentrant=False) if self.recompute else block(x, ctx)
            aux.update({f"layer.{i}.{name}": value for name, value in layer_aux.items()})
            if f"layer.{i}" in taps:
                hidden[f"layer.{i}"] = x
        final_hidden = self.norm(x)
        hidden |= {name: value for name, value in (("hidden", x), ("final", final_hidden)) if name in taps}
        return Encoded(final_hidden, self._checked(hidden, taps), ctx, aux)

    def extend(
        self,
        tree: Tree,
        state: Any,
        *,
        taps: tuple[str, ...] = (),
        need: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        inputs: Tensor | None = None,
        layers: range | None = None,
    ) -> Output:
        stack = cast(StackState, state)
        slots = stack.slots.extend(tree.parent, tree.size)
        if self.max_positions is not None and slots.end > self.max_positions:
            longest = int(slots.index[:, -tree.size :].where(tree.valid, -1).max()) + 1  # slots also count padding
            if longest > self.max_positions:
                raise ValueError(f"max_positions={self.max_positions}: {longest} asked for; shorten the prompt or the tree")
        if inputs is None and layers is None and need is None and (output := self._at_once(tree, stack, taps, mask, positions)):
            return output
        x = self.embed(tree.tokens) if inputs is None else inputs
        resumed = inputs is not None and layers is not None and layers.start > 0
        if resumed and not stack.slotted:
            raise ValueError(f"layers={layers}: a block before them cannot take up dropped nodes; run them all (reuse=false)")
        if "embed" in self.position.parts and not resumed:
            if not self.position.pointwise:
                kind = self.position.kind
                raise ValueError(
                    f"position={kind!r}: reads neighbours, which a cached call does not hold; choose another to decode"
                )
            positions = slots.index[:, -tree.size :] if positions is None else positions
            x = self.position.embed(x, positions)
        ctx = Context(positions, parent=tree.parent, mask=mask or Causal())
        hidden = {"embed": x} if "embed" in taps else {}
        x, tapped, stack = self.blocks.extend(x, ctx, stack, range(self.depth) if layers is None else layers, taps)
        hidden |= {name: tapped[name] for name in taps if name in tapped}
        if "hidden" in taps:
            hidden["hidden"] = x
        wanted = None if need is None else need.unsqueeze(-1).expand(-1, -1, self.width)
        if "final" in taps:
            hidden["final"] = x = self.norm(x)
            logits = self.head(x if wanted is None else x.gather(1, wanted))
        else:
            logits = self.head(self.norm(x if wanted is None else x.gather(1, wanted)))
        if "logits" in taps:
            hidden["logits"] = logits
        return Output(logits, self._checked(hidden, taps), stack)

    def _at_once(
        self, tree: Tree, stack: StackState, taps: tuple[str, ...], mask: Mask | None, positions: Tensor | None
    ) -> Output | None:
        """`extend` as one call of a kernel; None where there is none for it."""
        if "embed" in self.position.parts or any(name not in ("hidden", "final", "logits") for name in taps):
            return None
        call, ctx = self._call, Context(positions, parent=tree.parent, mask=mask or Causal())
        if call is None or call.ends.table.data_ptr() != self.embedding.weight.data_ptr():
            call = self._call = packed_call(self.blocks.packed, self.embedding, self.norm, self.head)
        if call is None or not call.takes(tree.size, ctx, stack.caches):
            return None
        slots = stack.slots.extend(ctx.parent, tree.size)
        x, normed, logits = call(tree.tokens, ctx, stack.caches, slots)
        hidden = {"hidden": x, "final": normed, "logits": logits}
        return Output(logits, {name: hidden[name] for name in taps}, stack.extended(slots))

    def _taken(self, mask: Mask, tokens: Tensor, segments: Tensor | None) -> Mask:
        """`mask` as all mixers take it: as it is, else written out once for all layers."""
        lacking = [block.mixer.masks for block in self.blocks if type(mask) not in block.mixer.masks]
        if not lacking or not all(Dense in masks for masks in lacking) or not isinstance(mask, Blocks | Doubled | Prefix):
            return mask  # a mixer that does not take it says so
        return Dense(allowed(mask, tokens.shape[1], segments, tokens.device)[:, 0])

    def _encoding(self) -> NoPosition:
        config = self.config
        made: NoPosition = config.position.build(head_width=self._head_width, width=config.width, heads=config.query_heads)
        if made.length is not None and (config.max_positions is None or config.max_positions > made.length):
            raise ValueError(
                f"max_positions={config.max_positions}: {made.kind} positions end at length={made.length}; lower it or raise that"
            )
        return made

    def _block(self, layer: int) -> Block:
        mixers = self.config.mixers
        position = self._within[0] if self.config.position.shared else self._encoding()
        mixer = mixers[layer % len(mixers)].build(width=self.width, heads=self.config.query_heads, position=position)
        return Block(self.config, self.width, mixer)

    def _heads(self, head: Any) -> nn.Module:
        made: nn.Module = head.build(
            width=self.width,
            vocab=self.vocab,
            trunk_depth=self.depth,
            eps=self.config.eps,
            make_block=lambda: self._block(self.depth - 1),
        )
        return made

    def _begin(self, heads: nn.Module) -> None:
        for part in heads.children():
            if isinstance(part, Begins):
                part.begin(self.head.weight)

    def _checked(self, hidden: dict[str, Tensor], taps: tuple[str, ...]) -> dict[str, Tensor]:
        for name in taps:
            if name not in hidden:
                known = f"embed, layer.0 .. layer.{self.depth - 1}, hidden, final, logits"
                raise ValueError(f"taps={name!r}: this model has no such activation; choose from {known}")
        return hidden

    def _initialise(self, part: nn.Module) -> None:
        """Normal weights, residual outputs shrunk by sqrt(2 depth) so that the residual keeps its scale (GPT-2)."""
        std, shrink = self.config.init_std, math.sqrt(2 * self.depth)
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std / shrink if name.endswith((".out", ".down")) else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.embed_std or std)
