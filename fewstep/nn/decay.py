"""Linear recurrences whose state decays by one factor a head: S_t = a_t S_{t-1} + k_t v_t', y_t = q_t S_t, over chains and trees.

Decays enter as logarithms and leave as exponentials of differences along a path, never as quotients. This file knows no mixer.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.nn.recurrent import Links
from fewstep.nn.triton import fused


def read(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, carry: Tensor, links: Links) -> Tensor:
    """[B,T,H,E] what the queries find.

    Args:
        q, k: [B,T,H,D].
        v: [B,T,H,E].
        log_a: [B,T,H], at most 0; None: nothing decays.
        carry: [B,H,D,E], the state before.
        links: how the tokens hang together.

    Cost: T^2 H (D + E) + T H D E. Source: Katharopoulos et al. 2020, arXiv 2006.16236; chunks: Sun et al. 2023, arXiv 2307.08621;
    the tree form replaces the causal mask by that of ancestors and lets the decay run along the path.
    """
    sees = links.sees.unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT
    before = q if links.carried else q * (~links.fresh)[:, None, :, None]
    if log_a is None:
        scores = scores * sees
    else:
        total = along(log_a, links).transpose(1, 2).unsqueeze(-1)
        if scores.shape[-1] > 1:  # a token alone sees itself undecayed
            scores = scores * (total - total.mT).masked_fill(~sees, -torch.inf).exp()
        before = before * total.exp()
    return (scores @ v + before @ carry).transpose(1, 2)


def along(x: Tensor, links: Links) -> Tensor:
    """[B,T,...] the sums of x [B,T,...] over each token and its ancestors."""
    return x if x.shape[1] == 1 else (links.sees.to(x.dtype) @ x.flatten(2)).view(x.shape)


def advance(k: Tensor, v: Tensor, log_a: Tensor | None, carry: Tensor, real: Tensor) -> Tensor:
    """The state [B,H,D,E] after a chain of tokens, of which the `real` [B,T] are there. Cost: T H D E."""
    k = k * real[:, :, None, None]
    if log_a is not None:
        log_a = log_a * real.unsqueeze(-1)
        total = log_a if k.shape[1] == 1 else log_a.cumsum(1)
        whole = total[:, -1]
        if k.shape[1] > 1:
            k = k * (whole.unsqueeze(1) - total).exp().unsqueeze(-1)
        carry = carry * whole.exp()[:, :, None, None]
    return carry + k.permute(0, 2, 3, 1) @ v.transpose(1, 2)


def swept(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, place: Tensor) -> Tensor | None:
    """What `sweep` finds from the empty state [B,T,H,E] where Triton's kernel does it; None elsewhere.

    Each token stands at `place` [B,T] of its own sequence.
    """
    if fused(q, k, v) is None:
        return None
    empty = v.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
    return sweep(q, k, v, log_a, empty, place == 0)[0]


def sweep(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, begins: Tensor | None = None, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """What the queries of whole sequences find [B,T,H,E], and the state behind the last token.

    All chunks are read side by side, in PyTorch's operators or, on a CUDA device, by a Triton kernel with chunks of its own.

    Args:
        q, k, v, log_a: as of `read`.
        start: [B,H,D,E], the state before the first token.
        begins: bool [B,T], tokens that know none before them (packed sequences); None: there is no such token.
        chunk: tokens that read one another.

    Cost: T H (chunk (D + E) + 2 D E); memory T H (chunk + D E / chunk). Source: Sun et al. 2023, arXiv 2307.08621, eq. 7; Dao &
    Gu 2024, arXiv 2405.21060, section 6.
    """
    gpu = fused(q, k, v)
    if gpu is not None:
        return gpu.sweep(q, k, v, log_a, start, begins)
    count = q.shape[1]
    steps = q.new_zeros(q.shape[:3]) if log_a is None else log_a
    run = q.new_zeros(q.shape[:2]) if begins is None else begins.cumsum(1)  # how many have begun, the carried one is 0
    q, k, v, steps, run = (_cut(x, chunk) for x in (q, k, v, steps.unsqueeze(3), run[:, :, None, None]))
    total, run = steps.cumsum(3), run.cummax(3).values  # what is padded goes on with the last
    whole, behind = total[:, :, :, -1:], run[:, :, :, -1:]
    before = pad(behind[:, :, :-1], (0, 0, 0, 0, 1, 0))
    sees = (run == run.mT).tril()
    scores = q @ k.mT * (total - total.mT).masked_fill(~sees, -torch.inf).exp()
    left = (k * (whole - total).exp() * (run == behind)).mT @ v
    through = whole.exp() * (before == behind)
    carried = [start]
    for here, put in zip(through.unbind(2), left.unbind(2), strict=True):
        carried.append(carried[-1] * here + put)
    y = scores @ v + (q * total.exp() * (run == before)) @ torch.stack(carried[:-1], 2)
    return y.flatten(2, 3)[:, :, :count].transpose(1, 2), carried[-1]


def _cut(x: Tensor, chunk: int) -> Tensor:
    """[B,T,H,D] -> [B,H,N,chunk,D], zeros behind the last token."""
    return pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk)).transpose(1, 2).unflatten(2, (-1, chunk))
