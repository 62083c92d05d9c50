"""The registry of solvers: from a method's name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.diffusion.solvers.adaptive import AdaptiveConfig
from fewstep.diffusion.solvers.ancestral import AncestralConfig
from fewstep.diffusion.solvers.consistency import ConsistencySamplerConfig
from fewstep.diffusion.solvers.heun import ChurnConfig, HeunConfig
from fewstep.diffusion.solvers.langevin import AnnealedLangevinConfig, PredictorCorrectorConfig
from fewstep.diffusion.solvers.ode import DEISConfig, DPMSolverConfig, EulerConfig
from fewstep.diffusion.solvers.sde import DDIMConfig, EulerMaruyamaConfig, SDEDPMSolverConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig

SOLVERS: Mapping[str, type[Config]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            DEISConfig,
            UniPCConfig,
            DPMSolverConfig,
            HeunConfig,
            EulerConfig,
            DDIMConfig,
            AncestralConfig,
            ChurnConfig,
            EulerMaruyamaConfig,
            SDEDPMSolverConfig,
            PredictorCorrectorConfig,
            AnnealedLangevinConfig,
            AdaptiveConfig,
            ConsistencySamplerConfig,
        )
    }
)
