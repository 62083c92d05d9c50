"""EAGLE's drafting networks: one block that carries the trunk's features on, from one of them (EAGLE-1, 2) or three (EAGLE-3).

Position i of a network reads the trunk's features at i and the embedding of token i+1; its output stands for the features at
i+1, predicts token i+2, and is what position i+1 reads where the trunk's own are not known yet. This file knows neither the trunk
nor how drafts are grown or verified.
"""

from abc import abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import ClassVar, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.core.mixer import Causal, Context, State, Window
from fewstep.core.position import NoPosition
from fewstep.nn.ahead import Embed, HeadsConfig, MakeBlock
from fewstep.nn.blocks import Block
from fewstep.nn.masks import allowed
from fewstep.nn.mixers.attention import Attention, AttentionState
from fewstep.nn.position.encoding import per_head

Unembed = Callable[[Tensor], Tensor]


@final
class EagleHeadsConfig(HeadsConfig):
    """EAGLE-1's network, which EAGLE-2 shares. `bias` of the fusing layer and no `first_norm` in the block, as released."""

    kind: ClassVar[str] = "eagle"
    source: ClassVar[str] = "Li et al. 2024, EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858"
    drafter: ClassVar[str] = "eagle"

    bias: bool = True
    first_norm: bool = False

    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> "EagleHeads":
        return EagleHeads(self, width, vocab, make_block())


@final
class Eagle3HeadsConfig(HeadsConfig):
    """EAGLE-3's network: the inputs of three trunk `layers` fused, and a vocabulary of its own.

    `layers` count from 0, and the trunk's depth stands for the output of its last block; None: 2, depth // 2 and depth - 3.
    `draft_vocab`: tokens that can be drafted; None, or more than the trunk has: all of them. `norm_before_residual`: what
    attention adds to is the normed input, as some trainers have it.
    """

    kind: ClassVar[str] = "eagle3"
    source: ClassVar[str] = "Li et al. 2025, EAGLE-3, arXiv 2503.01840"
    drafter: ClassVar[str] = "eagle3"

    layers: tuple[int, int, int] | None = None
    draft_vocab: int | None = Field(default=None, ge=2)
    norm_before_residual: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> "Eagle3HeadsConfig":
        if self.layers is not None and sorted(self.layers) != list(self.layers):
            raise ValueError(f"layers={self.layers}: not in rising order; name the lowest first")
        return self

    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> "Eagle3Heads":
        layers = self.layers or (2, trunk_depth // 2, trunk_depth - 3)
        if not all(0 <= layer <= trunk_depth for layer in layers):
            raise ValueError(f"layers={layers}: the trunk has the layers 0 .. {trunk_depth}; name three of those")
        taps = tuple("embed" if layer == 0 else f"layer.{layer - 1}" for layer in layers)
        heads = Eagle3Heads(taps, width, vocab, min(vocab, self.draft_vocab or vocab), make_block())
        heads.norm_before_residual = self.norm_before_residual
        return heads


class EagleNetwork(nn.Module):
    """What drafter and objectives need of either network, for a trunk of `width` and `vocab` whose `taps` it reads."""

    def __init__(self, taps: tuple[str, ...], width: int, vocab: int, block: Block) -> None:
        """Raises ValueError for a `block` without softmax attention."""
        super().__init__()
        self.taps, self.width, self.vocab, self.block = taps, width, vocab, block
        if not isinstance(block.mixer, Attention):
            found = type(block.mixer).__name__
            raise ValueError(f"heads: EAGLE drafts through softmax attention, the trunk's last mixer is {found}; use other heads")

    @property
    def attention(self) -> Attention:
        """The block's mixer."""
        return cast(Attention, self.block.mixer)

    @property
    def ids(self) -> Tensor | None:
        """[V_d] int64: the tokens that `logits` are of; None: all."""
        return None

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The tapped activations side by side [...,F] -> what a position reads [...,D]."""

    @abstractmethod
    def opened(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """What positions read, and the embeddings of the tokens after them [B,T,D] -> the residual, and the mixer's input."""

    @abstractmethod
    def logits(self, h: Tensor, unembed: Unembed) -> Tensor:
        """Outputs [...,D] -> logits [...,V_d]; `unembed` is the trunk's."""

    def closed(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The residual and the mixer's output -> the position's output [B,T,D]."""
        x = residual + mixed
        return self.block.feed_forward(x)

    def extend(self, hidden: Tensor, embedded: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        """Pending positions that read `hidden` [B,T,D] and the embeddings `embedded` [B,T,D] of the tokens after them."""
        residual, x = self.opened(hidden, embedded)
        mixed, state = self.attention.extend(x, ctx, cast(AttentionState, state))
        return self.closed(residual, mixed), state

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """An empty cache for at most `capacity` positions a row, pending ones included."""
        return self.attention.init_state(batch, capacity, device=device, dtype=dtype)

    def unroll(self, features: Tensor, tokens: Tensor, embed: Embed, ctx: Context, steps: int) -> list[Tensor]:
        """Features [B,T,F] and tokens [B,T] -> per step j = 0 .. `steps` - 1 the outputs [B,T-1-j,D], as long as there are any.

        Output i of step j predicts token i+2+j: what drafting from position i finds j levels down, given the tokens of the text.
        In step j it reads its own output of step j-1, and attends to the keys of step 0 at positions up to i and to its own of
        the steps since. Cost: T^2 scores per head and step. Source: arXiv 2503.01840 section 3.2, training-time test.
        Raises ValueError for more steps than the attention's window.
        """
        mixer = self.attention
        window = mixer.config.window
        if window is not None and steps > window:
            raise ValueError(f"steps={steps}: beyond the attention window of {window}; lower it")
        hidden, embedded = self.fuse(features), embed(tokens)
        past: list[tuple[Tensor, Tensor]] = []
        outputs: list[Tensor] = []
        for step in range(min(steps, tokens.shape[1] - 1)):
            count = tokens.shape[1] - 1 - step
            here = pairs(ctx, step + 1)
            assert here.positions is not None
            mask = Causal() if window is None else Window(window - step)
            residual, x = self.opened(hidden[:, :count], embedded[:, step + 1 :])
            q, k, v = _project(mixer, x, here.positions + step)
            past = [(keys[:, :, :count], values[:, :, :count]) for keys, values in past] + [(k, v)]
            seen = allowed(mask, count, here.segments, tokens.device)
            mixed = _attend(mixer.position, q, past, seen, here.positions)
            hidden = self.closed(residual, mixer.out(mixed.transpose(1, 2).flatten(2)))
            outputs.append(hidden)
        return outputs


@final
class EagleHeads(EagleNetwork):
    """f'_{i+1} = Block(W [Emb(t_{i+1}); f_i] + b), unembedded by the trunk. Cost: one block and two products of width D.

    f are the activations after the trunk's last norm, as in the released code.
    """

    def __init__(self, config: EagleHeadsConfig, width: int, vocab: int, block: Block) -> None:
        super().__init__(("final",), width, vocab, block)
        self.fc = nn.Linear(2 * width, width, bias=config.bias)
        if not config.first_norm:
            block.mixer_norm = nn.Identity()

    def fuse(self, features: Tensor) -> Tensor:
        return features

    def opened(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(torch.cat([embedded, hidden], -1))
        return x, self.block.mixer_norm(x)

    def extend(self, hidden: Tensor, embedded: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        # as the base has it, and as one call where the kernels take the block
        return self.block.extend(self.fc(torch.cat([embedded, hidden], -1)), ctx, state)

    def logits(self, h: Tensor, unembed: Unembed) -> Tensor:
        return unembed(h)


@final
class Eagle3Heads(EagleNetwork):
    """g_i = W [low_i; mid_i; high_i], then its own outputs; attention reads [norm(Emb(t_{i+1})); norm(g_i)], the residual is g_i.

    It has a norm and an unembedding of its own. `d2t` [V_d] int64: draft token i is the trunk's token i + d2t[i], as in released
    checkpoints; None: all tokens can be drafted. Cost: one block, an unembedding of V_d tokens, and the fusing of 3D for each
    verified position.
    """

    d2t: Tensor | None

    def __init__(self, taps: tuple[str, ...], width: int, vocab: int, draft_vocab: int, block: Block) -> None:
        super().__init__(taps, width, vocab, block)
        self.norm_before_residual = False
        self.fc = nn.Linear(len(taps) * width, width, bias=False)
        old = self.attention.qkv  # the one layer of attention that sees how wide its input is
        self.attention.qkv = nn.Linear(2 * width, old.out_features, bias=old.bias is not None)
        self.embed_norm, self.hidden_norm, self.norm = block.mixer_norm, deepcopy(block.mixer_norm), deepcopy(block.mixer_norm)
        block.mixer_norm = nn.Identity()
        self.head = nn.Linear(width, draft_vocab, bias=False)
        self.register_buffer("d2t", None if draft_vocab == vocab else torch.zeros(draft_vocab, dtype=torch.int64))

    @property
    def ids(self) -> Tensor | None:
        return None if self.d2t is None else self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    @property
    def t2d(self) -> Tensor:
        """[V] bool: the trunk's tokens that can be drafted."""
        ids = self.ids
        mask = torch.zeros(self.vocab, dtype=torch.bool, device=self.head.weight.device)
        return ~mask if ids is None else mask.index_fill(0, ids, True)

    def restrict(self, counts: Tensor, unembedding: Tensor) -> None:
        """Draft the tokens that occur most often, `counts` [V] times in the training data, and `begin` anew.

        Of equals the lower id. Raises ValueError for the counts of another vocabulary.
        """
        if counts.shape != (self.vocab,):
            raise ValueError(f"counts: {tuple(counts.shape)} numbers for {self.vocab} tokens; count with the target's tokenizer")
        if self.d2t is not None:
            size = self.d2t.shape[0]
            ids = counts.sort(descending=True, stable=True).indices[:size].sort().values
            self.d2t.copy_(ids - torch.arange(size, device=ids.device))
        self.begin(unembedding)

    def begin(self, unembedding: Tensor) -> None:
        """Start from the trunk's `unembedding` [V,D] of the tokens that can be drafted."""
        with torch.no_grad():
            self.head.weight.copy_(unembedding if self.ids is None else unembedding[self.ids])

    def fuse(self, features: Tensor) -> Tensor:
        return self.fc(features)

    def opened(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.hidden_norm(hidden)
        return normed if self.norm_before_residual else hidden, torch.cat([self.embed_norm(embedded), normed], -1)

    def logits(self, h: Tensor, unembed: Unembed) -> Tensor:
        return self.head(self.norm(h))


def spread(logits: Tensor, ids: Tensor | None, vocab: int) -> Tensor:
    """Logits [...,V_d] of the tokens `ids` [V_d] -> [...,V]: all others have no mass. None: they are of all already."""
    if ids is None:
        return logits
    return logits.new_full((*logits.shape[:-1], vocab), float("-inf")).index_copy_(-1, ids, logits)


def pairs(ctx: Context, ahead: int) -> Context:
    """The context of the positions that have a token `ahead` of them; one whose token is of another segment becomes padding."""
    segments = ctx.segments
    if segments is not None:
        segments = torch.where(segments[:, :-ahead] == segments[:, ahead:], segments[:, :-ahead], -1)
    return Context(None if ctx.positions is None else ctx.positions[:, :-ahead], segments=segments, mask=ctx.mask)


def _project(mixer: Attention, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B,H,T,E], keys and values [B,G,T,E] of x [B,T,2D]."""
    heads = mixer.qkv(x).unflatten(-1, (-1, mixer.head_width)).transpose(1, 2)
    q, k, v = heads.split([mixer.heads, mixer.kv_heads, mixer.kv_heads], 1)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    q, k = mixer.position.rotate(q, k, positions, positions, {})
    return q, k, v


def _attend(position: NoPosition, q: Tensor, past: list[tuple[Tensor, Tensor]], seen: Tensor, places: Tensor) -> Tensor:
    """q [B,H,T,E] over the first keys where `seen` [1 or B,1,T,T] and over the later ones at its own place: [B,H,T,E].

    The first keys stand at `places` [B,T], those of step j at `places` + j, and the queries where the last ones do.
    """
    batch, heads, count, _ = q.shape
    (keys, values), *own = [(per_head(k, heads), per_head(v, heads)) for k, v in past]
    now = places + len(own)
    scores = _scores(position, q, keys, now, places).masked_fill(~seen, float("-inf"))
    if not own:
        return _mixed(position, scores.softmax(-1), values, now, places)
    # a query and the keys of its own place are a row to the encoding
    own_keys, own_values = (torch.stack(group, 3).transpose(1, 2).flatten(0, 1) for group in zip(*own, strict=True))
    later = (places.unsqueeze(2) + torch.arange(1, len(own) + 1, device=q.device)).flatten(0, 1)
    alone = _scores(position, q.transpose(1, 2).reshape(-1, heads, 1, q.shape[3]), own_keys, now.reshape(-1, 1), later)
    weights = torch.cat([scores, alone.view(batch, count, heads, -1).transpose(1, 2)], -1).softmax(-1)
    own_weights = weights[..., count:].transpose(1, 2).reshape(-1, heads, 1, len(own))
    mixed = _mixed(position, own_weights, own_values, now.reshape(-1, 1), later)
    first = _mixed(position, weights[..., :count], values, now, places)
    return first + mixed.view(batch, count, heads, -1).transpose(1, 2)


def _scores(position: NoPosition, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """[B,H,Q,K]."""
    scores, bias = q @ k.mT * q.shape[-1] ** -0.5, position.bias(q, k, q_pos, k_pos)
    return scores if bias is None else scores + bias


def _mixed(position: NoPosition, weights: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """[B,H,Q,E]."""
    y, added = weights @ v, position.value(weights, q_pos, k_pos)
    return y if added is None else y + added
