"""Training data: sources of documents, tokenizers to train, token shards and packed batches; and arrays, which need none.

`prepare(DATA["stdlib"](), TOKENIZERS["bpe"](), directory)` gives a `Dataset`; its `train(...)` gives batches.
"""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.core.recipe import Config
from fewstep.training.data.arrays import ArraysConfig, CSVConfig, DigitsConfig
from fewstep.training.data.bpe import BPEConfig
from fewstep.training.data.coupling import CouplingConfig
from fewstep.training.data.dataset import Dataset, prepare
from fewstep.training.data.drawings import GlyphsConfig, ShapesConfig
from fewstep.training.data.images import ImagesConfig
from fewstep.training.data.loader import Loader
from fewstep.training.data.points import PointsConfig
from fewstep.training.data.sources import Corpus, DataConfig, TextConfig
from fewstep.training.data.stdlib import StdlibConfig
from fewstep.training.data.target import SelfDistilledConfig, TargetTokenizerConfig

DATA: Mapping[str, type[DataConfig]] = MappingProxyType(
    {config.kind: config for config in (StdlibConfig, TextConfig, SelfDistilledConfig)}
)
ARRAYS: Mapping[str, type[ArraysConfig]] = MappingProxyType(
    {
        config.kind: config
        for config in (PointsConfig, DigitsConfig, CSVConfig, ImagesConfig, GlyphsConfig, ShapesConfig, CouplingConfig)
    }
)
TOKENIZERS: Mapping[str, type[Config]] = MappingProxyType({config.kind: config for config in (BPEConfig, TargetTokenizerConfig)})

__all__ = [
    "ARRAYS",
    "DATA",
    "TOKENIZERS",
    "ArraysConfig",
    "BPEConfig",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Loader",
    "SelfDistilledConfig",
    "StdlibConfig",
    "TargetTokenizerConfig",
    "TextConfig",
    "prepare",
]
