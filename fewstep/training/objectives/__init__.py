"""The registry of objectives: from a name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.training.objectives.block import BlockConfig
from fewstep.training.objectives.consistency import ConsistencyObjectiveConfig
from fewstep.training.objectives.d3pm import D3PMConfig
from fewstep.training.objectives.denoising import DenoisingConfig
from fewstep.training.objectives.eagle import Eagle3Config, EagleConfig
from fewstep.training.objectives.early_exit import LayerSkipConfig
from fewstep.training.objectives.likelihood import LikelihoodConfig
from fewstep.training.objectives.masked import MaskedConfig
from fewstep.training.objectives.mean_flow import MeanFlowConfig
from fewstep.training.objectives.multi_token import HydraConfig, MedusaConfig, MultiTokenConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.objectives.score_entropy import ScoreEntropyConfig
from fewstep.training.objectives.self_speculation import SelfSpeculationConfig
from fewstep.training.objectives.sliced import SlicedConfig
from fewstep.training.objectives.variational import VariationalConfig

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
            SlicedConfig,
            VariationalConfig,
            ConsistencyObjectiveConfig,
            MeanFlowConfig,
            MaskedConfig,
            BlockConfig,
            ScoreEntropyConfig,
            D3PMConfig,
            SelfSpeculationConfig,
        )
    }
)
