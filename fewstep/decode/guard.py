"""A drafter that falls silent where drafting does not pay, and tries again later.

Every row keeps an account in plain steps. This file knows drafters by their contract and costs as numbers it is given: it
reads no clock, so that a row's text depends on nothing but the row.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Output
from fewstep.core.random import Rng
from fewstep.decode.prefill import placement

CREDIT, SLACK, CEILING = 3.0, 0.01, 16.0
_ROOM = 256  # draft nodes: more than a proposal of one node needs


@final
@dataclass(frozen=True, slots=True)
class Prices:
    """What a step costs, a plain step being 1: `steps[n]` if its tree has n nodes, without its proposal, and `draft`, that.

    Between the sizes that were measured the price is linear; beyond the last it goes on as it went before.
    """

    steps: Mapping[int, float]
    draft: float

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


@final
@dataclass(frozen=True, slots=True)
class Account:
    """The drafter's state and each row's `balance` in plain steps. While no row drafts, `missed` holds the tokens [B,1] and
    activations of every step since, which the drafter has not observed."""

    drafts: Any
    balance: tuple[float, ...]
    drafting: tuple[bool, ...]
    missed: tuple[tuple[Tensor, Mapping[str, Tensor]], ...] = ()

    def fork(self, rows: Tensor) -> "Account":
        index = rows.tolist()
        missed = tuple((tokens[rows], {name: h[rows] for name, h in hidden.items()}) for tokens, hidden in self.missed)
        balance, drafting = (tuple(kept[i] for i in index) for kept in (self.balance, self.drafting))
        return Account(self.drafts.fork(rows), balance, drafting, missed)

    def join(self, other: "Account") -> "Account":
        if self.missed or other.missed:
            raise ValueError("join: a batch whose drafter is silent; let it draft again first")
        return Account(self.drafts.join(other.drafts), self.balance + other.balance, self.drafting + other.drafting)

    def nbytes(self) -> int:
        held = (tensor for tokens, hidden in self.missed for tensor in (tokens, *hidden.values()))
        return int(self.drafts.nbytes()) + sum(tensor.nbytes for tensor in held)


@final
class Guarded:
    """`drafter`, asked only for rows whose account is not overdrawn.

    A step that drafts costs `prices(nodes)` and earns the tokens it emits; a plain step costs and earns 1. Every token earns
    `slack` more, so that an overdrawn row drafts again after a while. By these prices a row of T tokens takes at most
    T (1 + slack) + `credit` + the price of one step; savings above `ceiling` are not kept, so that a turn for the worse is
    noticed soon. When no row drafts, the drafter is not called; before it drafts again it is shown what it missed, at the price
    of one proposal. Exact as the drafter is: what decides lies in the past of the row.
    """

    def __init__(
        self, drafter: Drafter[Any], prices: Prices, credit: float = CREDIT, slack: float = SLACK, ceiling: float = CEILING
    ) -> None:
        self.taps, self.prompt_taps = drafter.taps, drafter.prompt_taps
        self._drafter, self._prices = drafter, prices
        self._credit, self._slack, self._ceiling = credit, slack, ceiling

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Account:
        rows = prompt.batch
        return Account(self._drafter.init(prompt, hidden, capacity), (self._credit,) * rows, (True,) * rows)

    def propose(self, root: Tensor, state: Account, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Account]:
        drafting = tuple(balance >= 0 for balance in state.balance)
        if not any(drafting):
            tokens = root.unsqueeze(1)
            return Tree(tokens, torch.full_like(tokens, -1)), replace(state, drafting=drafting)
        if state.missed:
            state = self._caught_up(root, state, handle, rng)
        # who starts again pays for what it has to be shown, in whatever company
        balance = tuple(
            kept - self._prices.draft if now and not before else kept
            for kept, now, before in zip(state.balance, drafting, state.drafting, strict=True)
        )
        if not all(drafting):
            budget = torch.where(torch.tensor(drafting, device=budget.device), budget, 1)
        tree, drafts = self._drafter.propose(root, state.drafts, handle, budget, rng)
        return tree, replace(state, drafts=drafts, balance=balance, drafting=drafting)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Account) -> Account:
        if not any(state.drafting):
            balance = tuple(balance + self._slack for balance in state.balance)
            return replace(state, balance=balance, missed=(*state.missed, (tree.tokens, hidden)))
        steps = zip(state.balance, verdict.keep.tolist(), tree.valid.sum(1).tolist(), state.drafting, strict=True)
        balance = tuple(
            min(self._ceiling, balance + keep * (1 + self._slack) - self._prices(nodes)) if paid else balance + self._slack
            for balance, keep, nodes, paid in steps
        )
        return replace(state, drafts=self._drafter.observe(tree, verdict, hidden, state.drafts), balance=balance)

    def _caught_up(self, root: Tensor, state: Account, handle: Handle, rng: Rng) -> Account:
        """The steps missed, shown as one accepted chain that follows a proposal of nothing."""
        tokens = torch.cat([tokens for tokens, _ in state.missed], 1)
        hidden = {name: torch.cat([seen[name] for _, seen in state.missed], 1) for name in self.taps}
        chain, budget = Tree.chain(tokens), torch.ones_like(root)
        apart = _Apart(handle)
        _, drafts = self._drafter.propose(tokens[:, 0], state.drafts, apart, budget, rng.split("missed"))
        order = torch.arange(chain.size, device=root.device).expand_as(tokens)
        drafts = self._drafter.observe(chain, Verdict(order, torch.full_like(root, chain.size), root), hidden, drafts)
        return replace(state, drafts=drafts, missed=())


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


def guarded(drafter: Drafter[Any], prices: Prices) -> Guarded:
    """`drafter` with the default account."""
    return Guarded(drafter, prices)
