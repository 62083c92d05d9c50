"""The one loop of left-to-right generation: propose, evaluate, verify, commit, observe.

Plain decoding is this loop with the silent drafter. This file knows models, drafters and laws through their contracts only,
and no text.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.draft import Drafter, Law, Verdict, Verify
from fewstep.core.event import Cost, Event
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Output, Target
from fewstep.core.random import Rng
from fewstep.decode.prefill import placement, prefill, prompt_chain
from fewstep.decode.verify import verify


class Finish(IntEnum):
    """Why a row ended, or that it has not."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    STOP = 3


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """What bounds the loop: tokens to emit (for all rows or row by row), the tokens that end a row (emitted, then nothing
    more), the nodes a tree may have (root included), whether the logits of emitted tokens are kept, and who judges the trees."""

    max_new_tokens: int | Sequence[int] = 64
    eos: tuple[int, ...] = ()
    budget: int = 16
    keep_logits: bool = False
    verify: Verify = verify


@final
@dataclass(frozen=True, slots=True)
class Step:
    """What one step emitted, for the R rows that were still running.

    `rows` [R]: the request of each entry. `tokens` [R,W]: the first `count[r]` >= 1 were emitted, the others mean nothing; the
    first `drafted[r]` of them were drafted and accepted, the rest computed. `nodes` [R]: tree nodes evaluated, root included, 0
    where the token came with the prompt. `finish` [R]: a `Finish` each. `calls`, `draft_calls`: evaluations per row, of the
    target (0 where the token came with the prompt) and of a draft network. `logits` [R,W,V]: what each token was drawn from,
    before the law, if kept.
    """

    rows: Tensor
    tokens: Tensor
    count: Tensor
    drafted: Tensor
    nodes: Tensor
    finish: Tensor
    calls: int
    draft_calls: int
    logits: Tensor | None


Review = Callable[[Step], Step]  # may end rows early: a smaller `count` and a `finish` for those rows, nothing else


@torch.inference_mode()
def stream(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    law: Law,
    rng: Rng,
    settings: Settings = Settings(),
    review: Review | None = None,
) -> Iterator[Event[Step]]:
    """Continue every prompt until it ends; the first event holds the tokens that came with the prompts.

    One row per prompt in `law` and `rng`. Equal prompts are evaluated once and forked, so n samples are n equal prompts with
    different seeds. A row's tokens depend on its own prompt, law, seed and limits alone. `review` sees every step before it is
    emitted. Costs are cumulative: a prefill counts once for each row that continues it, since it emits one token for each.
    Raises ValueError before any evaluation if a prompt is empty, holds an unknown token or does not fit the context.
    """
    start = time.perf_counter()
    limits = _checked(target, prompts, settings)
    batch, tree, logits = _begin(target, drafter, prompts, limits, law, rng, settings)
    step, verdict = _decide(batch, tree, logits, settings, review, None)
    batch.law = batch.law.commit(tree, verdict)
    cost = Cost(prefill_calls=len(prompts), tokens=len(prompts), seconds=time.perf_counter() - start, bytes=batch.nbytes())
    yield Event(step, cost)
    while batch.advance(step, verdict):
        lease = _Lease(target, batch.law, batch.state)
        budget = batch.remaining.clamp(max=settings.budget)  # so no node lies deeper than the last token wanted
        tree, batch.drafts = drafter.propose(batch.root, batch.drafts, lease, budget, batch.draft_rng.at(batch.emitted()))
        output = target.extend(tree, lease.release(), taps=drafter.taps, inputs=lease.inputs, layers=lease.layers)
        assert output.logits is not None
        step, verdict = _decide(batch, tree, output.logits, settings, review, lease)
        batch.state = output.state.commit(verdict.path, verdict.keep)
        batch.law = batch.law.commit(tree, verdict)
        batch.drafts = drafter.observe(tree, verdict, output.hidden, batch.drafts)
        rows = len(step.rows)
        cost = Cost(
            calls=cost.calls + rows * step.calls,
            draft_calls=cost.draft_calls + rows * step.draft_calls,
            prefill_calls=cost.prefill_calls,
            tokens=cost.tokens + int(step.count.sum()),
            seconds=time.perf_counter() - start,
            bytes=max(cost.bytes, batch.nbytes()),
        )
        yield Event(step, cost)


@final
@dataclass(slots=True)
class _Batch:
    """The rows still running: which request each is, its last token, the tokens it may emit and still has to, and its states."""

    rows: Tensor
    root: Tensor
    limit: Tensor
    remaining: Tensor
    state: State
    drafts: Any
    law: Law
    draft_rng: Rng
    verify_rng: Rng

    def advance(self, step: Step, verdict: Verdict) -> bool:
        """Move the roots and drop the rows that finished, at one copy of the state; False when none is left."""
        self.root = verdict.next
        if not bool(step.finish.any()):
            return True
        alive = (step.finish == Finish.RUNNING).nonzero().squeeze(1)
        if len(alive) == 0:
            return False
        self.rows, self.root, self.limit, self.remaining = (x[alive] for x in (self.rows, self.root, self.limit, self.remaining))
        self.state, self.drafts, self.law = self.state.fork(alive), self.drafts.fork(alive), self.law.fork(alive)
        self.draft_rng, self.verify_rng = self.draft_rng.fork(alive), self.verify_rng.fork(alive)
        return True

    def emitted(self) -> Tensor:
        """[R] tokens emitted: the position of the row's random numbers."""
        return self.limit - self.remaining

    def nbytes(self) -> int:
        return self.state.nbytes() + self.drafts.nbytes() + self.law.nbytes()


@final
class _Lease:
    """The loop's `Handle` for one proposal: draft nodes go on top of the target's state and are dropped by `release`.

    `layers`, `inputs`: what is left to run of the target, if the drafter ran its first blocks.
    """

    def __init__(self, target: Target, law: Law, state: State) -> None:
        self.target, self.law = target, law
        self.calls = self.draft_calls = 0
        self.layers: range | None = None
        self.inputs: Tensor | None = None
        self._state, self._used = state, False

    def extend(
        self, tree: Tree, *, layers: range | None = None, taps: tuple[str, ...] = (), need: Tensor | None = None
    ) -> Output:
        output = self.target.extend(tree, self._state, layers=layers, taps=taps, need=need)
        self._state, self._used = output.state, True
        if layers is None:  # the whole network: a call like any other
            self.calls += 1
        else:
            self.draft_calls += 1
        return output

    def resume(self, layers: range, inputs: Tensor) -> None:
        self.layers, self.inputs = layers, inputs

    def charge(self, calls: int) -> None:
        self.draft_calls += calls

    def release(self) -> State:
        return self._state.rollback() if self._used else self._state


def _checked(target: Target, prompts: Sequence[Sequence[int]], settings: Settings) -> list[int]:
    """The number of tokens each row is to emit. Raises ValueError: field, value, range, next move."""
    if not prompts:
        raise ValueError("prompts=[]: empty; give at least one prompt")
    wanted = settings.max_new_tokens
    limits = [wanted] * len(prompts) if isinstance(wanted, int) else list(wanted)
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens: {len(limits)} numbers for {len(prompts)} prompts; give one number or one per prompt")
    if settings.budget < 1:
        raise ValueError(f"budget={settings.budget}: below 1; a tree holds at least its root")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompts[{i}]=[]: empty; give at least one token, e.g. the tokenizer's begin-of-text token")
        if limit < 1:
            raise ValueError(f"max_new_tokens={limit}: below 1 (prompt {i}); ask for at least one token")
        unknown = [token for token in (min(prompt), max(prompt)) if not 0 <= token < target.vocab]
        if unknown:
            raise ValueError(
                f"prompts[{i}]: token {unknown[0]} is outside 0..{target.vocab - 1}; encode the text with this model's tokenizer"
            )
        if target.max_positions is not None and len(prompt) + limit > target.max_positions:
            raise ValueError(
                f"prompts[{i}]: {len(prompt)} tokens and max_new_tokens={limit} exceed the context of {target.max_positions}; "
                f"shorten the prompt or ask for at most {max(0, target.max_positions - len(prompt))} tokens"
            )
    return limits


def _begin(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    limits: list[int],
    law: Law,
    rng: Rng,
    settings: Settings,
) -> tuple[_Batch, Tree, Tensor]:
    """The batch with its prompts evaluated, the tree of their last tokens, and the logits [B,1,V] there."""
    device, dtype = placement(target)
    prompts = [tuple(prompt) for prompt in prompts]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    chain = prompt_chain(list(place), device)
    length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    empty = target.init_state(chain.batch, length + settings.budget, device=device, dtype=dtype)
    first = prefill(target, chain, empty, drafter.prompt_taps)
    state, logits, drafts = first.state, first.logits, drafter.init(chain, first.hidden, length + 2 * settings.budget)
    if len(place) < len(prompts):
        source = torch.tensor([place[prompt] for prompt in prompts], device=device)
        state, logits, drafts = state.fork(source), logits[source], drafts.fork(source)
        chain = Tree(chain.tokens[source], chain.parent[source])
    before = chain.valid.sum(1) - 1
    order = torch.arange(chain.size, device=device).expand_as(chain.tokens)
    root = chain.tokens.gather(1, before.unsqueeze(1))
    law = law.commit(chain, Verdict(order, before, root.squeeze(1)))  # the last prompt token joins as the root of the first tree
    rows, limit = torch.arange(len(prompts), device=device), torch.tensor(limits, device=device)
    batch = _Batch(rows, root.squeeze(1), limit, limit, state, drafts, law, rng.split("draft"), rng.split("verify"))
    return batch, Tree(root, torch.full_like(root, -1)), logits.unsqueeze(1)


def _decide(
    batch: _Batch, tree: Tree, logits: Tensor, settings: Settings, review: Review | None, lease: _Lease | None
) -> tuple[Step, Verdict]:
    """Verify the tree and count what it emits; without a lease it is the end of the prompts."""
    p = batch.law(logits, tree)
    # a greedy verdict draws nothing, and moving the generator is not free
    verdict = settings.verify(tree, p, batch.verify_rng.at(batch.emitted()) if p.is_floating_point() else batch.verify_rng)
    count, tokens, nodes = verdict.keep, verdict.next.unsqueeze(1), verdict.keep
    if tree.size > 1:
        kept = count.tolist()
        width = max(kept)
        tokens = torch.cat([tree.tokens.gather(1, verdict.path[:, 1:width]), tokens], 1)
        if min(kept) < width:
            tokens = tokens.scatter(1, count.unsqueeze(1) - 1, verdict.next.unsqueeze(1))
        nodes = tree.valid.sum(1)
    batch.remaining, drafted = batch.remaining - count, count - 1
    finish = (batch.remaining <= 0) * int(Finish.LENGTH)
    if settings.eos and any(ends := _ends(tokens, count, settings.eos)):
        until = count.new_tensor(ends)
        count, drafted = torch.where(until > 0, until, count), torch.where(until > 0, torch.minimum(drafted, until), drafted)
        finish = torch.where(until > 0, int(Finish.EOS), finish)
    read = None
    if settings.keep_logits:
        read = logits.gather(1, verdict.path[:, : tokens.shape[1]].unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    if lease is None:
        step = Step(batch.rows, tokens, count, drafted, torch.zeros_like(nodes), finish, 0, 0, read)
    else:
        step = Step(batch.rows, tokens, count, drafted, nodes, finish, 1 + lease.calls, lease.draft_calls, read)
    return (step if review is None else review(step)), verdict


def _ends(tokens: Tensor, count: Tensor, eos: tuple[int, ...]) -> list[int]:
    """For each row the number of tokens up to its first end token, that one included; 0 if none is among its first `count`."""
    # by the host: two small transfers, where tensors take some ten operators
    rows = zip(tokens.tolist(), count.tolist(), strict=True)
    return [next((i for i, token in enumerate(row[:kept], 1) if token in eos), 0) for row, kept in rows]
