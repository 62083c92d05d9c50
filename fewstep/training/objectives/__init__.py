"""The registry of objectives: from a name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.training.objectives.denoising import DenoisingConfig
from fewstep.training.objectives.eagle import Eagle3Config, EagleConfig
from fewstep.training.objectives.early_exit import LayerSkipConfig
from fewstep.training.objectives.likelihood import LikelihoodConfig
from fewstep.training.objectives.multi_token import HydraConfig, MedusaConfig, MultiTokenConfig
from fewstep.training.objectives.next_token import NextTokenConfig

OBJECTIVES: Mapping[str, type[Config]] = MappingProxyType(
    {
        c.kind: c
        for c in (
            NextTokenConfig,
            MultiTokenConfig,
            MedusaConfig,
            HydraConfig,
            EagleConfig,
            Eagle3Config,
            LayerSkipConfig,
            LikelihoodConfig,
            DenoisingConfig,
        )
    }
)
