"""Prefill: whole prompts through a model, in chunks. This file knows neither drafters nor laws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import State, Tree
from fewstep.core.model import Target

_CHUNK = 512  # tokens per evaluation: enough to keep the matrix products busy, few enough to bound the attention scores


@final
@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts in a model: `logits` [B,V] after each last token, tapped activations [B,T,...], the state with all committed."""

    logits: Tensor
    hidden: Mapping[str, Tensor]
    state: State


def placement(target: Target) -> tuple[torch.device, torch.dtype]:
    """Where a model computes, and in which precision: its first parameter's."""
    first = next(cast(nn.Module, target).parameters())
    return first.device, first.dtype


def prompt_chain(prompts: Sequence[Sequence[int]], device: torch.device | str) -> Tree:
    """Ragged prompts as one padded chain [B,T]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    padded = [[*prompt, *(0,) * (longest - len(prompt))] for prompt in prompts]
    return Tree.chain(torch.tensor(padded, dtype=torch.int64, device=device), lengths)


def prefill(target: Target, prompt: Tree, state: State, taps: tuple[str, ...] = (), chunk: int = _CHUNK) -> Prefilled:
    """Feed a ragged chain to an empty `state`. Cost: ceil(T / chunk) evaluations, logits at one node per row."""
    lengths = prompt.valid.sum(1)
    logits: Tensor | None = None
    hidden: dict[str, list[Tensor]] = {name: [] for name in taps}
    for start in range(0, prompt.size, chunk):
        tokens = prompt.tokens[:, start : start + chunk]
        count = (lengths - start).clamp(0, tokens.shape[1])
        last = (count - 1).clamp(min=0).unsqueeze(1)
        output = target.extend(Tree.chain(tokens, count), state, taps=taps, need=None if "logits" in taps else last)
        assert output.logits is not None
        here = (
            output.logits
            if output.logits.shape[1] == 1
            else output.logits.gather(1, last.unsqueeze(-1).expand(-1, -1, target.vocab))
        )
        # a row that ended in an earlier chunk keeps the logits it had
        logits = here[:, 0] if logits is None else torch.where(count.unsqueeze(1) > 0, here[:, 0], logits)
        for name in taps:
            hidden[name].append(output.hidden[name])
        state = output.state.commit(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), count)
    assert logits is not None
    return Prefilled(logits, {name: torch.cat(parts, 1) for name, parts in hidden.items()}, state)
