"""The registry of orders: from a name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.diffusion.orders.adaptive import EditingConfig, EntropyBoundConfig, FactorConfig, ThresholdConfig
from fewstep.diffusion.orders.ranked import ConfidenceConfig, EntropyConfig, MarginConfig, RandomConfig
from fewstep.diffusion.orders.reverse import AnalyticConfig, AncestralConfig, EulerConfig, FirstHittingConfig, RemaskingConfig

ORDERS: Mapping[str, type[Config]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            RandomConfig,
            ConfidenceConfig,
            MarginConfig,
            EntropyConfig,
            ThresholdConfig,
            FactorConfig,
            EntropyBoundConfig,
            EditingConfig,
            AncestralConfig,
            EulerConfig,
            AnalyticConfig,
            RemaskingConfig,
            FirstHittingConfig,
        )
    }
)
