"""The registry of sequence mixers: from a technique's name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.nn.mixers.retnet import RetNetConfig

MIXERS: Mapping[str, type[Config]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            AttentionConfig,
            LinearConfig,
            RetNetConfig,
        )
    }
)
