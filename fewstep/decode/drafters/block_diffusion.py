"""Speculation with block diffusion: what follows the text is filled in a block at a time, many tokens an evaluation.

The model is one of its own, or the target's own network in its masked mode. This file knows models as `readers` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.prefill import placement
from fewstep.decode.readers import Cached, Network
from fewstep.diffusion.corruptions import AbsorbingConfig
from fewstep.diffusion.orders.ranked import ConfidenceConfig


@final
class BlockDiffusionConfig(DrafterConfig):
    """Draft with the block diffusion model in the directory `path` ("": the target itself, trained for both).

    `size`: the blocks [tokens] it was trained in, counted from the start of the text; a draft ends where one does. `steps`: the
    evaluations a block. With one, its tokens are independent given the text: sampled ("drawn", the default) or the likeliest
    ("chosen"), with `branching` children a node, level by level ((): a chain). With more, the surest are revealed first and the
    others see them: a chain of chosen nodes, since what an earlier token was predicted from may hold later ones.
    """

    kind: ClassVar[str] = "block_diffusion"
    source: ClassVar[str] = "DFlash, arXiv 2602.06036; TiDAR, arXiv 2511.08923; Arriola et al. 2025, arXiv 2503.09573"
    claims: ClassVar[tuple[str, ...]] = ("block-drafts",)

    path: str = ""
    size: int = Field(default=4, ge=1)
    steps: int = Field(default=1, ge=1)
    branching: tuple[Annotated[int, Field(ge=1)], ...] = ()
    mode: Mode | None = None

    @model_validator(mode="after")
    def _is_true(self) -> "BlockDiffusionConfig":
        if self.steps > 1 and (self.mode == "drawn" or self.branching):
            raise ValueError(f"steps={self.steps}: such a block is a chain of chosen nodes; leave mode and branching out")
        if len(self.branching) > self.size:
            raise ValueError(f"branching={self.branching}: more levels than size={self.size}; name at most one a token")
        return self

    def build(self, target: Target, load: Load) -> "BlockDiffusion":
        model = load(self.path) if self.path else target
        if not isinstance(model, Network) or model.mask_token is None:
            raise ValueError(
                f"drafter.path={self.path!r}: a model without a mask token; give one trained with objective block or selfspec"
            )
        if not target.vocab <= model.vocab <= target.vocab + (model.mask_token == target.vocab):
            raise ValueError(
                f"drafter.path={self.path!r}: a vocabulary of {model.vocab} tokens, the target's has {target.vocab} (a mask may "
                "follow them); use a draft model with the target's tokenizer"
            )
        if max(self.branching, default=1) > target.vocab:
            raise ValueError(f"drafter.branching={self.branching}: more children than the {target.vocab} tokens; lower it")
        return BlockDiffusion(self, model, model.mask_token, target)


@final
@dataclass(frozen=True, slots=True)
class BlockState:
    """The texts, `length` [B] tokens in `text` [B,C], and the draft model's state, which holds their first `read` [B]."""

    model: State
    read: Tensor
    text: Tensor
    length: Tensor

    def fork(self, rows: Tensor) -> "BlockState":
        return BlockState(self.model.fork(rows), self.read[rows], self.text[rows], self.length[rows])

    def join(self, other: "BlockState") -> "BlockState":
        width = max(self.text.shape[1], other.text.shape[1])
        text = torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in (self.text, other.text)])
        read, length = torch.cat([self.read, other.read]), torch.cat([self.length, other.length])
        return BlockState(self.model.join(other.model), read, text, length)

    def nbytes(self) -> int:
        return self.model.nbytes() + self.read.nbytes + self.text.nbytes + self.length.nbytes


@final
@dataclass(frozen=True, slots=True)
class _Window:
    """The block that a text ends in: its tokens `x` [B,S], of which the first `given` [B] are known and `rest` [B] may follow."""

    x: Tensor
    given: Tensor
    rest: Tensor


@final
class BlockDiffusion:
    """The rest of the block that the text ends in, or the next one.

    The cache holds whole blocks as the verdicts left them, which is exact; tokens of a block that is not whole are read with its
    masks, and a block that became whole in the first evaluation of the next. Cost: `steps` evaluations; a target that drafts for
    itself keeps a second cache, since left to right it reads the same tokens otherwise.
    Differs: DFlash and TiDAR draft from what the target has computed of the text; here the draft model reads it for itself.
    """

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, config: BlockDiffusionConfig, network: Network, mask_token: int, target: Target) -> None:
        self.config, self._network, self._mask_token, self._vocab = config, network, mask_token, target.vocab
        self._corruption = AbsorbingConfig().build(network.vocab, mask_token, placement(network)[0])
        # what fits a target with no longer a context fits the draft model too, to the last token
        own, theirs = network.max_positions, target.max_positions
        self._limit = own if own is not None and (theirs is None or own < theirs) else None

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> BlockState:
        if self._limit is not None and capacity > self._limit:
            raise ValueError(
                f"drafter.path={self.config.path!r}: a context of {self._limit} tokens, {capacity} are needed (drafted ones "
                "included); lower max_new_tokens or use a draft model with a longer context"
            )
        network, size, length = self._network, self.config.size, prompt.valid.sum(1)
        device, dtype = placement(network)
        # beside the text: a block to fill, and one that the tokens accepted last may have made whole
        empty = network.init_state(prompt.batch, capacity + 2 * size, device=device, dtype=dtype)
        reader = Cached(network, size, empty, torch.zeros_like(length))
        reader.advance(prompt.tokens, length // size * size)
        return BlockState(reader.state, reader.read, functional.pad(prompt.tokens, (0, capacity - prompt.size)), length)

    def propose(self, root: Tensor, state: BlockState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, BlockState]:
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        if int(budget.max()) == 1:
            return tree, state
        text, size = state.text.scatter(1, state.length.unsqueeze(1), root.unsqueeze(1)), self.config.size
        first = (state.length + 1) // size * size
        end, longest = first + size, self._network.max_positions
        end = end if longest is None else end.clamp(max=longest)
        reader = Cached(self._network, size, state.model, state.read)
        handle.charge(int(reader.enter(text, end, first, size).max()))
        given, order = state.length + 1 - first, torch.arange(size, device=root.device)
        known = text.gather(1, (first.unsqueeze(1) + order).clamp(max=text.shape[1] - 1))
        window = _Window(torch.where(order < given.unsqueeze(1), known, self._mask_token), given, end - first - given)
        fill = self._at_once if self.config.steps == 1 else self._in_steps
        return fill(tree, window, reader, handle, budget, rng), replace(state, model=reader.state, read=reader.read)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: BlockState) -> BlockState:
        tokens = tree.tokens.gather(1, verdict.path[:, : int(verdict.keep.max())])
        place = state.length.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        # what a row has beyond its new length is never looked at
        return replace(state, text=state.text.scatter(1, place, tokens), length=state.length + verdict.keep)

    def _at_once(self, tree: Tree, window: _Window, reader: Cached, handle: Handle, budget: Tensor, rng: Rng) -> Tree:
        logits = self._logits(reader, window.x, handle)
        branching, mode = self.config.branching or (1,) * self.config.size, self.config.mode or "drawn"
        nodes_of_level = torch.tensor((1, *branching), device=logits.device).cumprod(0)
        # a node is left out for its place alone: a row's tree ends with its block
        room = nodes_of_level.cumsum(0)[window.rest.clamp(max=len(branching))]
        budget = torch.minimum(budget, room)
        widest, count = int(budget.max()), 1
        for level, branch in enumerate(branching):
            if tree.size >= widest:
                break
            place = (window.given + level).clamp(max=logits.shape[1] - 1)[:, None, None]
            here = logits.gather(1, place.expand(-1, 1, logits.shape[2])).repeat(1, count, 1)
            nodes = torch.arange(tree.size - count, tree.size, device=logits.device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(here, tree, nodes), here, branch, budget, mode, rng)
            count *= branch
        return cut(tree, widest)

    def _in_steps(self, tree: Tree, window: _Window, reader: Cached, handle: Handle, budget: Tensor, rng: Rng) -> Tree:
        x, place = window.x, torch.arange(self.config.size, device=budget.device)
        free = (place >= window.given.unsqueeze(1)) & (place < (window.given + window.rest).unsqueeze(1))
        grid = torch.linspace(1, 0, self.config.steps + 1, dtype=torch.float64, device=budget.device)
        order = ConfidenceConfig(temperature=0.0).build()
        memory, i = order.init(x, free, self._corruption, grid), 0
        while not bool(memory.done.all()):
            x, memory = order.step(lambda x, t: self._logits(reader, x, handle).double().softmax(-1), x, i, memory, rng.at(i))
            i += 1
        count = torch.minimum(budget, 1 + window.rest)
        drafted = x.gather(1, (window.given.unsqueeze(1) + place).clamp(max=x.shape[1] - 1))
        drafted = torch.where(place + 1 < count.unsqueeze(1), drafted, 0)  # the target may not know the mask
        return cut(Tree.chain(torch.cat([tree.tokens, drafted], 1), count), int(count.max()))

    def _logits(self, reader: Cached, x: Tensor, handle: Handle) -> Tensor:
        """[B,S,V] over the target's vocabulary, the mask left out."""
        masked = (x == self._mask_token).double().mean(1)
        logits = reader(x, masked)[..., : self._vocab]
        handle.charge(1)
        if self._mask_token < self._vocab:
            logits = logits.index_fill(-1, x.new_tensor([self._mask_token]), -torch.inf)
        return logits
