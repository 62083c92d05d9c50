"""Exactness on a model's own laws: the next token after stated contexts, drawn through `verify` from the drafter's own trees.

Target and draft are evaluated once per context; 10^5 to 10^6 draws then cost a proposal each at most. This file knows models
and drafters by their contracts; greedy decoding, where equality is bit by bit, is its neighbour `bitwise`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.draft import Drafter, Law, Verdict, Verify
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Output, Target
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.prefill import placement, prefill, prompt_chain
from fewstep.decode.verify import verify
from fewstep.report.power import Outcome, draws_needed, goodness_of_fit

_REUSED = 16  # draws from one tree of chosen nodes
CELLS = 63  # tokens with a cell of their own; the others share one


@final
class ExactnessConfig(Config):
    """What is promised: a deviation of total variation `variation` is seen with probability `power`, a correct drafter fails with
    probability `alarm` (shared by `tests` tests).

    `contexts` laws of next tokens are tested, with `draws` draws in all (0: as many as the promise needs). Second tokens are
    tested after the `follow` likeliest first ones. `rows` are proposed together, in trees of at most `budget` nodes.
    """

    variation: float = Field(default=0.01, gt=0, lt=1)
    power: float = Field(default=0.99, gt=0, lt=1)
    alarm: float = Field(default=0.001, gt=0, lt=1)
    tests: int = Field(default=3, ge=1)
    contexts: int = Field(default=2, ge=1)
    draws: int = Field(default=0, ge=0)
    follow: int = Field(default=2, ge=0)
    rows: int = Field(default=256, ge=1)
    budget: int = Field(default=16, ge=2)
    seed: int = 0

    def planned(self, vocab: int) -> int:
        """Draws per context."""
        freedom = self.contexts * min(CELLS, vocab - 1)
        total = self.draws or draws_needed(freedom, self.variation, self.alarm / self.tests, self.power)
        return -(-total // self.contexts)


@final
@dataclass(frozen=True, slots=True)
class Laws:
    """What `certify` found: the tests of first and of second tokens, and the largest total variation between the law that a call
    on a tree gives and that of plain decoding, over the contexts."""

    first: Outcome
    second: Outcome
    evaluation: float

    def passed(self, config: ExactnessConfig) -> bool:
        return min(self.first.p_value, self.second.p_value) > config.alarm / config.tests


def certify(
    target: Target,
    drafter: Drafter[Any],
    contexts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    config: ExactnessConfig = ExactnessConfig(),
    verdicts: Verify = verify,
) -> Laws:
    """Do draws through `verdicts` from the trees of `drafter` have the law of plain decoding after each of `contexts`?

    The first token, and the second after the likeliest first ones if trees are that deep; for that `verdicts` must judge a node
    by what is above it alone (a block is kept for its later nodes, too: set `config.follow` to 0). Raises ValueError for greedy
    sampling or a context of fewer than three tokens.

    It sees: nodes not drawn as their q says, a wrong verification, a tree call whose law is not the plain one, at these
    contexts, to two levels. It does not see: other contexts, levels below the second, differences among the tokens that share
    a cell, and the sampling transform itself, which both sides go through.
    """
    if sampling.temperature == 0:
        raise ValueError("temperature=0: greedy has no law to test; give one above 0, greedy output is compared bit by bit")
    sites = [_Site.prepared(target, drafter, context, sampling, config) for context in contexts]
    counts = [site.drawn(target, drafter, config, verdicts, number) for number, site in enumerate(sites)]
    first = goodness_of_fit([found[0] for found in counts], [site.plain[0] for site in sites])
    seen = [
        (row, law)
        for found, site in zip(counts, sites, strict=True)
        for row, law in zip(found[1:], site.plain[1:], strict=True)
        if row.sum() > 0
    ]
    second = goodness_of_fit([row for row, _ in seen], [law for _, law in seen])
    return Laws(first, second, max(float((site.laws - site.plain).abs().sum(1).max()) / 2 for site in sites))


def liveliest(
    target: Target, contexts: Mapping[str, Sequence[int]], sampling: SamplingConfig, count: int
) -> dict[str, Sequence[int]]:
    """The `count` of the named contexts after which the next token is least certain, where a deviation has the most room."""
    entropy = {}
    for name, tokens in contexts.items():
        law = _law(target, tokens, sampling)
        entropy[name] = float(torch.special.entr(law).sum())
    return {name: contexts[name] for name in sorted(entropy, key=lambda name: -entropy[name])[:count]}


@torch.inference_mode()
def _law(target: Target, tokens: Sequence[int], sampling: SamplingConfig) -> Tensor:
    device, dtype = placement(target)
    chain = prompt_chain([tokens], device)
    found = prefill(target, chain, target.init_state(1, len(tokens), device=device, dtype=dtype))
    law = sampling.build(1, target.vocab, device).commit(chain, _joined(chain, chain.size - 1))
    root = Tree(chain.tokens[:, -1:], torch.full_like(chain.tokens[:, -1:], -1))
    return law(found.logits.unsqueeze(1), root)[0, 0]


@final
@dataclass(frozen=True, slots=True)
class _Site:
    """A context, its last token the `root` of the trees to come: states of target, drafter and law one row each, before it.

    Tokens are numbered by cells: row 0 of `cells` [1+F,V] after the root, row k after the root and `followed[k-1]`; `heads`
    [1+F,C] are the tokens with a cell of their own. `laws` and `plain` [1+F,C+1]: the laws over cells as a call on the tree of
    the root and `followed` gives them, and as plain decoding does.
    """

    root: Tensor
    state: State
    drafts: Any
    law: Law
    followed: Tensor
    heads: Tensor
    cells: Tensor
    laws: Tensor
    plain: Tensor

    @classmethod
    @torch.inference_mode()
    def prepared(
        cls, target: Target, drafter: Drafter[Any], context: Sequence[int], sampling: SamplingConfig, config: ExactnessConfig
    ) -> "_Site":
        if len(context) < 3:
            raise ValueError(f"contexts: one of {len(context)} tokens; give at least three, so that the drafter has begun")
        device, dtype = placement(target)
        chain = prompt_chain([context[:-2]], device)
        empty = target.init_state(1, len(context) + config.budget + 1, device=device, dtype=dtype)
        begun = prefill(target, chain, empty, drafter.prompt_taps)
        drafts = drafter.init(chain, begun.hidden, len(context) + 2 * config.budget)
        law: Law = sampling.build(1, target.vocab, device).commit(chain, _joined(chain, chain.size))
        # one step by force, so that later proposals start from a token and not from a prompt
        root, after = (torch.tensor([token], device=device) for token in context[-2:])
        budget = torch.tensor([config.budget], device=device)
        handle = _Loan(target, law, begun.state, root.new_zeros(1))
        tree, drafts = drafter.propose(root, drafts, handle, budget, CounterRng.seeded([config.seed], device))
        output = target.extend(tree, begun.state, taps=drafter.taps)
        verdict = Verdict(torch.zeros_like(tree.tokens), torch.ones_like(root), after)
        drafts, law = drafter.observe(tree, verdict, output.hidden, drafts), law.commit(tree, verdict)
        state = output.state.commit(verdict.path, verdict.keep)
        plain = [_plain(target, law, state, [context[-1]])]
        followed = plain[0].topk(min(config.follow, config.budget - 1, target.vocab)).indices
        plain += [_plain(target, law, state, [context[-1], token]) for token in followed.tolist()]
        tokens = torch.cat([after, followed]).unsqueeze(0)
        star = Tree(tokens, torch.where(torch.arange(tokens.shape[1], device=device) == 0, -1, 0).unsqueeze(0))
        logits = target.extend(star, state.fork(root.new_zeros(1))).logits
        assert logits is not None
        reference, called = torch.stack(plain), law(logits, star)[0]
        own = min(CELLS, target.vocab)
        heads = reference.topk(own).indices
        numbers = torch.arange(own, device=device).expand_as(heads)
        cells = torch.full_like(reference, own, dtype=torch.int64).scatter_(1, heads, numbers)
        return cls(after, state, drafts, law, followed, heads, cells, _pooled(called, heads), _pooled(reference, heads))

    @torch.inference_mode()
    def drawn(
        self,
        target: Target,
        drafter: Drafter[Any],
        config: ExactnessConfig,
        verdicts: Verify,
        number: int,
    ) -> Tensor:
        """[1+F,C+1] how often each cell came first, and second after each followed token."""
        counts = torch.zeros_like(self.plain, dtype=torch.int64)
        wanted, done = config.planned(target.vocab), 0
        seeds = torch.arange(config.rows, device=self.root.device) + (config.seed + (number << 32))
        while done < wanted:
            rows = torch.zeros_like(seeds)
            rng = CounterRng.seeded(seeds + done, self.root.device)
            loan = _Loan(target, self.law, self.state, rows)
            budget = torch.full_like(rows, config.budget)
            tree, _ = drafter.propose(self.root[rows], self.drafts.fork(rows), loan, budget, rng.split("draft"))
            small, watched = self._small(tree)
            if small.q is None or not bool(small.q.any()):  # exact for whatever was chosen, so one choice serves many draws
                many = torch.arange(config.rows, device=rows.device).repeat(max(1, min(_REUSED, (wanted - done) // config.rows)))
                small, watched = Tree(small.tokens[many], small.parent[many]), watched[many]
                rng = CounterRng.seeded(torch.arange(len(many), device=rows.device) + int(seeds[0]) + done, rows.device)
            self._count(small, watched, verdicts(small, self.laws[watched.clamp(min=0)], rng.split("verify")), counts)
            done += small.batch
        return counts

    def _small(self, tree: Tree) -> tuple[Tree, Tensor]:
        """`tree` with its tokens numbered by cells and without what is below nodes whose law is not known, and which law is known
        after each node, -1 for none."""
        match = tree.tokens.unsqueeze(-1) == self.followed
        which = (match * torch.arange(1, 1 + len(self.followed), device=match.device)).sum(-1)
        watched = torch.where((which > 0) & (tree.parent == 0), which, -1)
        watched[:, 0] = 0
        above = watched.gather(1, tree.parent.clamp(min=0))
        above[:, 0] = 0
        kept = (tree.parent > -2) & (above >= 0)
        table = above.clamp(min=0)
        tokens = self.cells[table, tree.tokens]
        q = None if tree.q is None else _pooled(tree.q, self.heads[table])
        return Tree(tokens, torch.where(kept, tree.parent, -2), q), watched

    def _count(self, tree: Tree, watched: Tensor, verdict: Verdict, counts: Tensor) -> None:
        """Add what came out first, and second after the followed tokens."""
        width = counts.shape[1]
        node, below = (verdict.path[:, min(place, tree.size - 1)].unsqueeze(1) for place in (1, 2))
        accepted = verdict.keep > 1
        first = torch.where(accepted, tree.tokens.gather(1, node).squeeze(1), verdict.next)
        second = torch.where(verdict.keep > 2, tree.tokens.gather(1, below).squeeze(1), verdict.next)
        after = torch.where(accepted, watched.gather(1, node).squeeze(1), -1)
        counts[0] += torch.bincount(first, minlength=width)
        for k in range(1, len(counts)):
            counts[k] += torch.bincount(second[after == k], minlength=width)


@final
class _Loan:
    """The `Handle` of proposals for `rows` copies of one context: the target's state is copied when it is asked for."""

    def __init__(self, target: Target, law: Law, state: State, rows: Tensor) -> None:
        self.target, self.law = target, law.fork(rows)
        self._rows, self._base, self._state = rows, state, state
        self._used = False

    def extend(
        self, tree: Tree, *, layers: range | None = None, taps: tuple[str, ...] = (), need: Tensor | None = None
    ) -> Output:
        if not self._used:
            self._state, self._used = self._base.fork(self._rows), True
        output = self.target.extend(tree, self._state, layers=layers, taps=taps, need=need)
        self._state = output.state
        return output

    def resume(self, layers: range, inputs: Tensor) -> None:
        pass  # laws are computed once, by whole calls

    def charge(self, calls: int) -> None:
        pass


def _plain(target: Target, law: Law, state: State, tokens: Sequence[int]) -> Tensor:
    """[V] the law after `tokens`, which follow `state`, fed one by one."""
    state = state.fork(torch.zeros(1, dtype=torch.int64))
    for token in tokens[:-1]:
        tree = _alone(target, token)
        verdict = Verdict(torch.zeros_like(tree.tokens), torch.ones_like(tree.tokens[0]), tree.tokens[0])
        state = target.extend(tree, state).state.commit(verdict.path, verdict.keep)
        law = law.commit(tree, verdict)
    last = _alone(target, tokens[-1])
    logits = target.extend(last, state).logits
    assert logits is not None
    return law(logits, last)[0, 0]


def _alone(target: Target, token: int) -> Tree:
    tokens = torch.tensor([[token]], device=placement(target)[0])
    return Tree(tokens, torch.full_like(tokens, -1))


def _pooled(law: Tensor, heads: Tensor) -> Tensor:
    """Laws [...,V] over the tokens `heads` [...,C] and all others together: [...,C+1]."""
    own = law.gather(-1, heads)
    rest = (law.sum(-1) - own.sum(-1)).clamp_(min=0)
    if heads.shape[-1] == law.shape[-1]:
        rest = torch.zeros_like(rest)
    return torch.cat([own, rest.unsqueeze(-1)], -1)


def _joined(chain: Tree, count: int) -> Verdict:
    """The verdict by which the first `count` tokens of one prompt join the history."""
    order = torch.arange(chain.size, device=chain.tokens.device).unsqueeze(0)
    return Verdict(order, chain.tokens.new_tensor([count]), chain.tokens[:, -1])
