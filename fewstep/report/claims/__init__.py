"""Claims that `fewstep reproduce` can measure, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.report.claims import (
    flash_memory,
    flow_likelihood,
    gau,
    hippo,
    induction_heads,
    length_extrapolation,
    linear_cost,
    mla_cache,
    mtp,
    performer,
    recall,
    recurrent_speculation,
    selective_copying,
    solver_order,
    spec_bench,
    speculative_sampling,
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
        )
    }
)
