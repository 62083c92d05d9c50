"""Drafters: who proposes what comes next. Their names and configs."""

from collections.abc import Mapping
from types import MappingProxyType

from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.silent import SilentConfig

__all__ = ["DRAFTERS", "DrafterConfig", "Load"]

DRAFTERS: Mapping[str, type[DrafterConfig]] = MappingProxyType(
    {config.kind: config for config in (SilentConfig, NgramConfig, DraftModelConfig, MultiTokenConfig)}
)
