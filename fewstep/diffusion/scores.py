"""Concrete scores: the ratios p_t(y) / p_t(x) of one changed token, as laws of x_0 and as what a network puts out.

A score and a predicted law of x_0 say the same: each is the other's image under a linear map. This file knows no network.
"""

import torch
from torch import Tensor

from fewstep.core.corruption import Corruption
from fewstep.diffusion.corruptions import absorber, explained, slope


def scores(corruption: Corruption, x_t: Tensor, p_0: Tensor, t: Tensor) -> Tensor:
    """[B,L,V]: p_t(y) / p_t(x_t) with the other positions as they are, by the predicted law p_0 [B,L,V]; 1 at y = x_t.

    Source: Lou et al. 2024, arXiv 2310.16834, equation 4; Ou et al. 2024, arXiv 2406.03736, theorem 1 (absorption).
    """
    keep, weight = _level(corruption.keep(t)), explained(corruption, x_t, p_0, t)
    return keep * weight + (1 - keep) * corruption.prior * weight.sum(-1, keepdim=True)


def law_of_scores(corruption: Corruption, x_t: Tensor, score: Tensor, t: Tensor) -> Tensor:
    """The law p_0 [B,L,V] that has these scores [B,L,V]; the nearest to it in spirit where none has.

    Differs: scores that no law has are cut at 0 and normalised; the published samplers use them as they are.
    """
    keep, total = _level(corruption.keep(t)), score.sum(-1, keepdim=True)
    weight = ((score - (1 - keep) * corruption.prior * total) / keep.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    own = torch.nn.functional.one_hot(x_t, score.shape[-1]).double()
    law = weight * (keep * own + (1 - keep) * corruption.prior[x_t].unsqueeze(-1))
    absorbed = absorber(corruption)
    if absorbed is not None:
        law[..., absorbed] = 0
        law = torch.where((x_t == absorbed).unsqueeze(-1), law, own)
    return law / law.sum(-1, keepdim=True)


def log_scores(corruption: Corruption, x_t: Tensor, logits: Tensor, t: Tensor, mask_token: int | None) -> Tensor:
    """The log-scores [B,L,V] float64 that a network's output `logits` [B,L,V] stands for; 0 at y = x_t, -inf at the mask.

    Under absorption the output is scaled: ln(e^sigma - 1) and ln(number of real tokens) are taken off, where sigma = -ln keep.
    Source: Lou et al. 2024, arXiv 2310.16834, appendix C.2.
    """
    found, absorbed = logits.double(), absorber(corruption)
    if absorbed is not None:
        keep = _level(corruption.keep(t))
        found = found + torch.log(keep) - torch.log1p(-keep) - torch.log(torch.tensor(len(corruption.prior) - 1.0).double())
    if mask_token is not None:
        hidden = torch.arange(found.shape[-1], device=found.device) == mask_token
        found = found.masked_fill(hidden, -torch.inf)
    own = torch.nn.functional.one_hot(x_t, found.shape[-1]).bool()
    return found.masked_fill(own, 0.0)


def score_entropy(corruption: Corruption, x_t: Tensor, x_0: Tensor, log_score: Tensor, t: Tensor) -> Tensor:
    """[B,L]: the denoising score entropy of log-scores [B,L,V], weighted by the rates, whose integral over t bounds -ln p(x_0).

    -keep'/keep prior(x_t) sum over y != x_t of s_y - r_y ln s_y + r_y (ln r_y - 1), with r_y = q(y | x_0) / q(x_t | x_0).
    The sum over y is that of a law in proportion to the prior, put right at x_t and x_0: no table of one-hot tokens is made.
    Source: Lou et al. 2024, arXiv 2310.16834, equation 10, for any prior. Cost: two passes over the vocabulary.
    """
    keep, prior = _level(corruption.keep(t)).squeeze(-1), corruption.prior
    rate = -_level(slope(corruption, t) / corruption.keep(t)).squeeze(-1) * prior[x_t]
    jumps, changed = rate > 0, x_t != x_0
    own = torch.where(jumps, torch.where(changed, 0.0, keep) + (1 - keep) * prior[x_t], 1.0)  # q(x_t | x_0)
    share = torch.where(jumps, (1 - keep) / own, 0.0)  # r_y = share prior(y), and keep / own more at y = x_0

    def known(token: Tensor, ratio: Tensor) -> Tensor:
        """r (ln r - 1 - ln s) at a token of each position; 0 where r is."""
        score = log_score.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        return torch.xlogy(ratio, ratio) - ratio * (1 + torch.where(ratio > 0, score, 0.0))

    support = prior.nonzero().squeeze(1)
    mass, score = prior[support], log_score[..., support].masked_fill(~jumps.unsqueeze(-1), 0.0)
    everywhere = share * (torch.xlogy(mass, mass).sum() - mass.sum() - score @ mass) + torch.xlogy(share, share) * mass.sum()
    true = share * prior[x_0] + torch.where(jumps, keep / own, 0.0)
    data = torch.where(changed, known(x_0, true) - known(x_0, share * prior[x_0]), 0.0)
    return rate * (log_score.exp().sum(-1) - 1 + everywhere - known(x_t, share * prior[x_t]) + data)


def reverse_rates(corruption: Corruption, x_t: Tensor, p_0: Tensor, t: Tensor) -> Tensor:
    """[B,L,V]: the rates at which x_t jumps to y as time runs backwards, 0 at y = x_t.

    Source: Lou et al. 2024, arXiv 2310.16834, equation 3.
    """
    keep, weight = _level(corruption.keep(t)), explained(corruption, x_t, p_0, t)
    steep = -_level(slope(corruption, t))
    back = (1 - keep) / keep.clamp(min=1e-12)  # at keep = 0 every jump is certain; the sampler normalises
    rates = steep * corruption.prior[x_t].unsqueeze(-1) * (weight + back * corruption.prior * weight.sum(-1, keepdim=True))
    own = torch.nn.functional.one_hot(x_t, rates.shape[-1]).bool()
    return rates.masked_fill(own, 0.0)


def _level(keep: Tensor) -> Tensor:
    """[B] as [B,1,1], [B,L] as [B,L,1]."""
    return keep[:, None, None] if keep.dim() == 1 else keep.unsqueeze(-1)
