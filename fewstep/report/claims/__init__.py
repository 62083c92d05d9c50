"""Claims that `fewstep reproduce` can measure, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.report.claims import (
    block_cache,
    churn,
    ddim,
    diffusion_order,
    flash_memory,
    flow_likelihood,
    gau,
    heun_rho,
    hippo,
    induction_heads,
    learned_grid,
    length_extrapolation,
    linear_cost,
    mla_cache,
    mtp,
    performer,
    recall,
    recurrent_speculation,
    reversal,
    sampler_trap,
    selective_copying,
    solver_order,
    spec_bench,
    speculative_sampling,
    stratified_count,
    transnormer,
    typical_acceptance,
)
from fewstep.report.claims.claim import Claim

CLAIMS: Mapping[str, Claim] = MappingProxyType(
    {
        claim.name: claim
        for claim in (
            speculative_sampling.CLAIM,
            mtp.CLAIM,
            spec_bench.CLAIM,
            typical_acceptance.CLAIM,
            mla_cache.CLAIM,
            length_extrapolation.CLAIM,
            hippo.CLAIM,
            flash_memory.CLAIM,
            performer.CLAIM,
            transnormer.CLAIM,
            linear_cost.CLAIM,
            recall.CLAIM,
            selective_copying.CLAIM,
            induction_heads.CLAIM,
            gau.CLAIM,
            recurrent_speculation.CLAIM,
            flow_likelihood.CLAIM,
            solver_order.CLAIM,
            learned_grid.CLAIM,
            ddim.CLAIM,
            heun_rho.CLAIM,
            churn.CLAIM,
            diffusion_order.CLAIM,
            stratified_count.CLAIM,
            sampler_trap.CLAIM,
            reversal.CLAIM,
            block_cache.CLAIM,
        )
    }
)
