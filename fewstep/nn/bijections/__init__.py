"""The registry of bijections: from a name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.nn.bijections.continuous import ContinuousConfig
from fewstep.nn.bijections.glow import GlowConfig
from fewstep.nn.bijections.layer import BijectionConfig
from fewstep.nn.bijections.maf import IAFConfig, MAFConfig
from fewstep.nn.bijections.nice import NICEConfig
from fewstep.nn.bijections.nsf import NSFAutoregressiveConfig, NSFConfig
from fewstep.nn.bijections.realnvp import RealNVPConfig
from fewstep.nn.bijections.tarflow import TarFlowConfig

BIJECTIONS: Mapping[str, type[BijectionConfig]] = MappingProxyType(
    {
        c.kind: c
        for c in (
            NICEConfig,
            RealNVPConfig,
            GlowConfig,
            MAFConfig,
            IAFConfig,
            NSFConfig,
            NSFAutoregressiveConfig,
            ContinuousConfig,
            TarFlowConfig,
        )
    }
)
