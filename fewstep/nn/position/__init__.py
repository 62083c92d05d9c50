"""Position encodings behind `core.position.Position`, and their registry: from a technique's name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.nn.position.alibi import AlibiConfig
from fewstep.nn.position.convolution import ConvolutionConfig
from fewstep.nn.position.deberta import DebertaConfig
from fewstep.nn.position.dynamic import DynamicNtkConfig
from fewstep.nn.position.encoding import EncodingConfig
from fewstep.nn.position.none import NoPositionConfig
from fewstep.nn.position.partial import PartialRopeConfig
from fewstep.nn.position.phase import ComplexConfig
from fewstep.nn.position.plane import AxialRopeConfig, MixedRopeConfig
from fewstep.nn.position.recursive import RecursiveConfig
from fewstep.nn.position.rope import Rope, RopeConfig, RotaryConfig, turn
from fewstep.nn.position.shaw import ShawConfig
from fewstep.nn.position.sinusoidal import SinusoidalConfig
from fewstep.nn.position.stretched import NtkConfig, YarnConfig
from fewstep.nn.position.t5 import T5Config
from fewstep.nn.position.table import MultiplicativeConfig, TrainableConfig
from fewstep.nn.position.transformer_xl import TransformerXLConfig

__all__ = ["POSITIONS", "EncodingConfig", "NoPositionConfig", "Rope", "RopeConfig", "RotaryConfig", "YarnConfig", "turn"]

POSITIONS: Mapping[str, type[Config]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            RopeConfig,
            NoPositionConfig,
            PartialRopeConfig,
            AxialRopeConfig,
            MixedRopeConfig,
            NtkConfig,
            DynamicNtkConfig,
            YarnConfig,
            AlibiConfig,
            T5Config,
            ShawConfig,
            TransformerXLConfig,
            DebertaConfig,
            TrainableConfig,
            SinusoidalConfig,
            MultiplicativeConfig,
            ComplexConfig,
            RecursiveConfig,
            ConvolutionConfig,
        )
    }
)
