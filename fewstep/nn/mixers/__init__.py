"""The registry of sequence mixers: from a technique's name to its config class."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.efficient import EfficientConfig
from fewstep.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from fewstep.nn.mixers.gau import GAUConfig
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.nn.mixers.linformer import LinformerConfig
from fewstep.nn.mixers.lru import LRUConfig
from fewstep.nn.mixers.mamba import MambaConfig
from fewstep.nn.mixers.mamba2 import Mamba2Config
from fewstep.nn.mixers.mixed_chunk import MixedChunkConfig
from fewstep.nn.mixers.mla import MLAConfig
from fewstep.nn.mixers.performer import PerformerConfig
from fewstep.nn.mixers.retnet import RetNetConfig
from fewstep.nn.mixers.rwkv4 import Rwkv4Config
from fewstep.nn.mixers.rwkv6 import Rwkv6Config
from fewstep.nn.mixers.rwkv7 import Rwkv7Config
from fewstep.nn.mixers.s4 import S4Config, S4DConfig
from fewstep.nn.mixers.sparse import SparseConfig
from fewstep.nn.mixers.transnormer import DiagAttentionConfig, TransNormerConfig

MIXERS: Mapping[str, type[Config]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            AttentionConfig,
            DiagAttentionConfig,
            GatedDeltaNetConfig,
            EfficientConfig,
            GAUConfig,
            LinformerConfig,
            MixedChunkConfig,
            LinearConfig,
            LRUConfig,
            Mamba2Config,
            MLAConfig,
            MambaConfig,
            PerformerConfig,
            RetNetConfig,
            S4Config,
            S4DConfig,
            SparseConfig,
            Rwkv4Config,
            Rwkv6Config,
            Rwkv7Config,
            TransNormerConfig,
        )
    }
)
