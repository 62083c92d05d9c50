"""Drafters: who proposes what comes next. Their names and configs."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.eagle import Eagle2Config, Eagle3Config, EagleConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.medusa import HydraConfig, MedusaConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import SilentConfig

__all__ = ["DRAFTERS", "DrafterConfig", "Load"]

DRAFTERS: Mapping[str, type[DrafterConfig]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            SilentConfig,
            NgramConfig,
            DraftModelConfig,
            MultiTokenConfig,
            MedusaConfig,
            HydraConfig,
            EagleConfig,
            Eagle2Config,
            Eagle3Config,
            RetrievalConfig,
            LookaheadConfig,
            EarlyExitConfig,
            BlockDiffusionConfig,
        )
    }
)
