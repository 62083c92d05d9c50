"""Diagonal recurrences over chains and trees: h = a h' + b element by element, real or complex, where h' is the state before.

`Scanned` is the base of mixers that read whole sequences in one sweep instead of chunk after chunk. This file knows no mixer.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core.mixer import Aux, Context
from fewstep.nn.masks import places
from fewstep.nn.recurrent import Inputs, Links, Recurrent


def chain(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """[B,T,...] the states along a chain of T >= 1 tokens that follows the state `start` [B,...]; a and b are [B,T,...] each.

    Cost: 3 multiply-adds an element in 2 log2(T) sweeps. Source: odd-even reduction, Blelloch 1990, "Prefix sums and their
    applications": pairs of tokens are one step each, and the states between them follow.
    """
    count = a.shape[1]
    if count == 1:
        return a * start.unsqueeze(1) + b
    left, right = slice(0, count - count % 2, 2), slice(1, None, 2)
    odd = chain(a[:, right] * a[:, left], a[:, right] * b[:, left] + b[:, right], start)
    before = torch.cat([start.unsqueeze(1), odd[:, : (count - 1) // 2]], 1)
    even = a[:, ::2] * before + b[:, ::2]
    pairs = torch.stack([even[:, : odd.shape[1]], odd], 2).flatten(1, 2)
    return torch.cat([pairs, even[:, odd.shape[1] :]], 1) if count % 2 else pairs


def tree(a: Tensor, b: Tensor, start: Tensor, parent: Tensor) -> Tensor:
    """[B,T,...] the state of every token of a tree after those on its path; a and b are [B,T,...] each.

    `parent` [B,T]: an earlier token, -1: the state `start` [B,...], -2: nothing. Cost: 3 multiply-adds an element for each
    doubling of the longest path: every token takes up its parent's step, then that one's parent's, twice as far each time.
    """
    while bool((inside := parent >= 0).any()):
        up, steps = parent.clamp(min=0), _like(inside, a)
        a, b = torch.where(steps, a * _pick(a, up), a), torch.where(steps, a * _pick(b, up) + b, b)
        parent = torch.where(inside, parent.gather(1, up), parent)
    return torch.where(_like(parent == -1, b), a * start.unsqueeze(1) + b, b)


def along(a: Tensor, b: Tensor, start: Tensor, links: Links) -> Tensor:
    """[B,T,...] the state of every token that hangs together as `links` say, by `chain` where it can be."""
    if links.chain:  # whole rows are fresh, or none of their tokens is
        return chain(a, b, torch.where(_like(links.fresh[:, 0], start), 0, start))
    return tree(a, b, start, parents(links))


def parents(links: Links) -> Tensor:
    """[B,T] what `tree` calls the parent of each token."""
    return torch.where(links.fresh & (links.parent == -1), -2, links.parent)


def after(a: Tensor, b: Tensor, start: Tensor, real: Tensor) -> Tensor:
    """The state [B,...] after a chain of T >= 1 tokens, of which the `real` [B,T] are there. Cost: 2 multiply-adds an element."""
    a, b = torch.where(_like(real, a), a, 1), torch.where(_like(real, b), b, 0)
    while (count := a.shape[1]) > 1:
        left, right, rest = slice(0, count - count % 2, 2), slice(1, None, 2), slice(count - count % 2, None)
        b = torch.cat([a[:, right] * b[:, left] + b[:, right], b[:, rest]], 1)
        a = torch.cat([a[:, right] * a[:, left], a[:, rest]], 1)
    return a[:, 0] * start + b[:, 0]


class Scanned(Recurrent):
    """A recurrent mixer whose parallel form is one sweep over whole sequences, packed ones too.

    `shown`: how many of its features, the first ones, a token's inputs may be made of later; None: all.
    """

    shown: int | None = None

    @abstractmethod
    def sweep(self, inputs: Inputs, place: Tensor) -> Tensor:
        """[B,T,...] what `read` makes of whole sequences from the empty state; each token stands at `place` [B,T] of its own."""

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        self._check(ctx)
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        (batch, count, _), segments = x.shape, ctx.segments
        place = torch.arange(count, device=x.device).expand(batch, -1) if segments is None else places(segments)
        features = self.features(x)
        inputs = self.inputs(features, self._shifted(features, place), ctx.positions)
        return self.finish(self.sweep(inputs, place), features), {}

    def _shifted(self, features: Tensor, place: Tensor) -> Tensor:
        """[B,T,R,F] what the `reach` tokens before each show, zeros before the first."""
        shown, count = features[..., : self.shown], features.shape[1]
        padded = pad(shown, (0, 0, self.reach, 0))
        steps = [padded[:, r : r + count].masked_fill((place < self.reach - r).unsqueeze(-1), 0) for r in range(self.reach)]
        return torch.stack(steps, 2) if steps else shown.new_empty(*shown.shape[:2], 0, shown.shape[2])


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` with as many dimensions as x."""
    return mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B,T,...] at `index` [B,T] along its second dimension."""
    return x.gather(1, _like(index, x).expand_as(x))
