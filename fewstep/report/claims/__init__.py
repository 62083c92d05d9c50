"""Claims that `fewstep reproduce` can measure, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.report.claims import mtp, speculative_sampling
from fewstep.report.claims.claim import Claim

CLAIMS: Mapping[str, Claim] = MappingProxyType({claim.name: claim for claim in (speculative_sampling.CLAIM, mtp.CLAIM)})
