"""Networks for continuous data, by name: from a noisy array, its noise level and a class to an array of the same shape."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.nn.backbones.dit import DiTConfig
from fewstep.nn.backbones.points import PointsConfig
from fewstep.nn.backbones.unet import UNetConfig

BACKBONES: Mapping[str, type[Config]] = MappingProxyType(
    {config.kind: config for config in (PointsConfig, UNetConfig, DiTConfig)}
)
