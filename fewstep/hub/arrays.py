"""`load_arrays`: a model of arrays, a denoiser or a flow, from wherever it is."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch

from fewstep.core.recipe import Config
from fewstep.hub.load import RECIPE, RUN, locate, newest
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.models.flow import Flow, FlowConfig
from fewstep.models.stored import restore

ARRAY_MODELS: Mapping[str, type[Config]] = MappingProxyType({config.kind: config for config in (DenoiserConfig, FlowConfig)})


def load_arrays(source: str | Path, device: torch.device | str = "cpu") -> Denoiser | Flow:
    """The model in a directory of fewstep's, or the newest whole checkpoint of a training run.

    Raises ValueError when there is none, or one that is damaged or of tokens.
    """
    directory = locate(source)
    if not (directory / RECIPE).is_file() and (directory / RUN).is_dir():
        directory = newest(directory)
    return cast(Denoiser | Flow, restore(directory, ARRAY_MODELS, device))
