"""Claims that `fewstep reproduce` can measure, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.report.claims import (
    hippo,
    length_extrapolation,
    mla_cache,
    mtp,
    spec_bench,
    speculative_sampling,
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
        )
    }
)
