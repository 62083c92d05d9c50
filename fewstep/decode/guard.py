"""A drafter that falls silent where drafting does not pay, and tries again ever more seldom.

Every row keeps an account in plain steps. This file knows drafters by their contract and costs as numbers it is given: it
reads no clock, so that a row's text depends on nothing but the row.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Output
from fewstep.core.random import Rng
from fewstep.decode.prefill import placement

CREDIT = 3.0  # plain steps
GRACE = 4.0  # tokens
CEILING = 64.0  # plain steps
_USUAL = 64  # nodes of trees whose prices are worked out beforehand
_ROOM = 256  # draft nodes: more than a proposal of one node needs


@final
@dataclass(frozen=True, slots=True)
class Prices:
    """What a step costs, a plain step being 1: `steps[n]` if its tree has n nodes, without its proposal, and `draft`, that; and
    `read`, what each token takes that the drafter is shown late.

    Between the sizes that were measured the price is linear; beyond the last it goes on as it went before.
    """

    steps: Mapping[int, float]
    draft: float
    read: float = 0.0

    def __call__(self, nodes: int) -> float:
        return interpolated(self.steps, nodes) + self.draft


def interpolated(known: Mapping[int, float], at: int) -> float:
    """The value at `at` of the broken line through `known`, continued beyond its ends; one point is a constant."""
    places = sorted(known)
    if at in known or len(places) == 1:
        return known.get(at, known[places[0]])
    after = min(max(bisect_left(places, at), 1), len(places) - 1)
    low, high = places[after - 1], places[after]
    return known[low] + (known[high] - known[low]) * (at - low) / (high - low)


class Row(NamedTuple):
    """A row's `balance` in plain steps against plain decoding of its `tokens` new tokens, the last `silent` of them plain."""

    balance: float = 0.0
    tokens: int = 0
    silent: int = 0

    def waited(self) -> "Row":
        """After a plain step."""
        return Row(self.balance, self.tokens + 1, self.silent + 1)


@final
@dataclass(frozen=True, slots=True)
class Account:
    """The drafter's state, the rows, and which of them are `drafting`. While none is, `missed` holds the tokens [B,1] and
    activations of every step since, which the drafter has not observed, in `held` bytes."""

    drafts: Any
    rows: tuple[Row, ...]
    drafting: tuple[bool, ...]
    missed: tuple[tuple[Tensor, Mapping[str, Tensor]], ...] = ()
    held: int = 0

    def fork(self, rows: Tensor) -> "Account":
        index = rows.tolist()
        missed = tuple((tokens[rows], {name: h[rows] for name, h in hidden.items()}) for tokens, hidden in self.missed)
        kept = tuple(self.rows[i] for i in index), tuple(self.drafting[i] for i in index)
        return Account(self.drafts.fork(rows), *kept, missed, self.held * len(index) // len(self.rows))

    def join(self, other: "Account") -> "Account":
        if self.missed or other.missed:
            raise ValueError("join: a batch whose drafter is silent; let it draft again first")
        return Account(self.drafts.join(other.drafts), self.rows + other.rows, self.drafting + other.drafting)

    def nbytes(self) -> int:
        return int(self.drafts.nbytes()) + self.held


@final
class Guarded:
    """`drafter`, asked only for rows that can afford it.

    A step that drafts costs `prices(nodes)` and earns the tokens it emits; a plain step costs and earns 1. A row drafts as long
    as it has lost no more than `credit` + log2(1 + T / `grace`) plain steps over its T tokens so far, so that one whose drafts
    fail is silent for ever longer: it never loses more than that and one step. Savings above `ceiling` are not kept, so that a
    turn for the worse is noticed. When no row drafts, the drafter is not called; before it drafts again it is shown what it
    missed, at the price of a proposal and of reading that. Exact as the drafter is: what decides lies in the past of the row.
    """

    def __init__(
        self, drafter: Drafter[Any], prices: Prices, credit: float = CREDIT, grace: float = GRACE, ceiling: float = CEILING
    ) -> None:
        self.taps, self.prompt_taps = drafter.taps, drafter.prompt_taps
        self._drafter, self._prices = drafter, prices
        self._credit, self._grace, self._ceiling = credit, grace, ceiling
        self._usual = tuple(prices(nodes) for nodes in range(1, _USUAL + 1))

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Account:
        rows = prompt.batch
        return Account(self._drafter.init(prompt, hidden, capacity), (Row(),) * rows, (True,) * rows)

    def propose(self, root: Tensor, state: Account, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Account]:
        drafting = tuple(row.balance + self._credit + log2(1 + row.tokens / self._grace) >= 0 for row in state.rows)
        if not any(drafting):
            tokens = root.unsqueeze(1)
            return Tree(tokens, torch.full_like(tokens, -1)), replace(state, drafting=drafting)
        if state.missed:
            state = self._caught_up(root, state, handle, rng)
        if not all(drafting):
            budget = torch.where(torch.tensor(drafting, device=budget.device), budget, 1)
        tree, drafts = self._drafter.propose(root, state.drafts, handle, budget, rng)
        return tree, Account(drafts, state.rows, drafting)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Account) -> Account:
        if not any(state.drafting):
            rows = tuple(row.waited() for row in state.rows)
            held = state.held + sum(tensor.nbytes for tensor in (tree.tokens, *hidden.values()))
            return replace(state, rows=rows, missed=(*state.missed, (tree.tokens, hidden)), held=held)
        steps = zip(state.rows, verdict.keep.tolist(), tree.parent.tolist(), state.drafting, strict=True)
        rows = tuple(
            self._paid(row, keep, len(parent) - parent.count(-2)) if drafting else row.waited()
            for row, keep, parent, drafting in steps
        )
        return Account(self._drafter.observe(tree, verdict, hidden, state.drafts), rows, state.drafting)

    def _paid(self, row: Row, keep: int, nodes: int) -> Row:
        """After a step with a tree of `nodes` nodes that emitted `keep` tokens."""
        price = self._usual[nodes - 1] if nodes <= _USUAL else self._prices(nodes)
        if row.silent:  # who starts again pays for what it has to be shown, in whatever company
            price += self._prices.draft + self._prices.read * row.silent
        return Row(min(self._ceiling, row.balance + keep - price), row.tokens + keep)

    def _caught_up(self, root: Tensor, state: Account, handle: Handle, rng: Rng) -> Account:
        """The steps missed, shown as one accepted chain that follows a proposal of nothing."""
        tokens = torch.cat([tokens for tokens, _ in state.missed], 1)
        hidden = {name: torch.cat([seen[name] for _, seen in state.missed], 1) for name in self.taps}
        chain, budget = Tree.chain(tokens), torch.ones_like(root)
        apart = _Apart(handle)
        _, drafts = self._drafter.propose(tokens[:, 0], state.drafts, apart, budget, rng.split("missed"))
        order = torch.arange(chain.size, device=root.device).expand_as(tokens)
        drafts = self._drafter.observe(chain, Verdict(order, torch.full_like(root, chain.size), root), hidden, drafts)
        return replace(state, drafts=drafts, missed=(), held=0)


@final
class _Apart:
    """The `Handle` of a proposal that is thrown away: what it drafts with the target must leave no trace, so it drafts from an
    empty state."""

    def __init__(self, handle: Handle) -> None:
        self.target, self.law = handle.target, handle.law
        self._handle = handle
        self._state: State | None = None

    def extend(
        self, tree: Tree, *, layers: range | None = None, taps: tuple[str, ...] = (), need: Tensor | None = None
    ) -> Output:
        if self._state is None:
            device, dtype = placement(self.target)
            self._state = self.target.init_state(tree.batch, _ROOM, device=device, dtype=dtype)
        output = self.target.extend(tree, self._state, layers=layers, taps=taps, need=need)
        self._state = output.state
        return output

    def resume(self, layers: range, inputs: Tensor) -> None:
        pass

    def charge(self, calls: int) -> None:
        self._handle.charge(calls)
