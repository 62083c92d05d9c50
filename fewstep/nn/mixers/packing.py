"""Packed sequences taken apart, for mixers whose form of a sequence depends on where it begins. This file knows no mixer."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor], Tensor]  # [N,M,F], positions [N,M] -> [N,M,E]


def apart(form: Form, x: Tensor, positions: Tensor, segments: Tensor | None, *, exact: bool) -> Tensor:
    """`form` over each packed sequence of x [B,T,F] for itself: [B,T,E], zeros at padding.

    Sequences of like lengths share a batch. `exact`: of equal lengths only; else up to twice as long, and what stands behind a
    sequence's end must not matter to it.

    Cost: that of `form` over at most twice the tokens, as often as there are lengths (rounded up to powers of two).
    """
    if segments is None:
        return form(x, positions)
    tokens, places = x.flatten(0, 1), positions.flatten(0, 1)
    outputs, homes = [], []
    for index in _batches(segments, exact):
        real, held = index >= 0, index.clamp(min=0)
        outputs.append(form(tokens[held], places[held])[real])
        homes.append(index[real])
    if not outputs:
        return torch.zeros_like(form(x[:, :1], positions[:, :1])).expand(-1, x.shape[1], -1)
    y = torch.cat(outputs)
    return y.new_zeros(len(tokens), y.shape[1]).index_copy(0, torch.cat(homes), y).unflatten(0, x.shape[:2])


def _batches(segments: Tensor, exact: bool) -> list[Tensor]:
    """The token numbers [N,M] of sequences of like lengths, -1 behind their ends; tokens are counted over all rows."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([segments.numel()])])
    alike = defaultdict(list)
    for start, end, segment in zip(starts.tolist(), ends.tolist(), segments.flatten()[starts].tolist(), strict=True):
        if segment >= 0:
            alike[end - start if exact else (end - start - 1).bit_length()].append((start, end))
    batches = []
    for runs in alike.values():
        first, last = torch.tensor(runs, device=segments.device).unsqueeze(2).unbind(1)
        index = first + torch.arange(int((last - first).max()), device=segments.device)
        batches.append(torch.where(index < last, index, -1))
    return batches
