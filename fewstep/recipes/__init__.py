"""Shipped recipes, and the binding of section names to registries: the one place that knows every training technique's room."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fewstep.core.recipe import Config, Recipe, suggestion
from fewstep.models.denoiser import DenoiserConfig
from fewstep.models.flow import FlowConfig
from fewstep.models.model import MODELS
from fewstep.recipes.converting import ConvertedConfig
from fewstep.recipes.distilling import StudentConfig
from fewstep.recipes.drafting import DrafterConfig
from fewstep.training.data import ARRAYS, DATA, TOKENIZERS
from fewstep.training.objectives import OBJECTIVES
from fewstep.training.optim import OPTIMS
from fewstep.training.plan import BUDGETS, RUNS
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES

NETWORKS: Mapping[str, type[Config]] = MappingProxyType(
    {**MODELS, **{config.kind: config for config in (DrafterConfig, ConvertedConfig, FlowConfig, DenoiserConfig, StudentConfig)}}
)
SOURCES: Mapping[str, type[Config]] = MappingProxyType({**DATA, **ARRAYS})

SECTIONS: Mapping[str, Mapping[str, type[Config]]] = MappingProxyType(
    {
        "model": NETWORKS,
        "tokenizer": TOKENIZERS,
        "data": SOURCES,
        "objective": OBJECTIVES,
        "optim": OPTIMS,
        "schedule": SCHEDULES,
        "precision": PRECISIONS,
        "budget": BUDGETS,
        "run": RUNS,
    }
)


def shipped() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def load_recipe(source: Path | str, overrides: Mapping[str, object] | None = None) -> Recipe:
    """A shipped recipe by name or one from a file, with dotted `overrides`. Raises ValueError: field, value, next move."""
    known = shipped()
    path = known.get(str(source), Path(source))
    if not path.is_file() and not path.suffix:
        raise ValueError(f"recipe={str(source)!r}: no such recipe; {suggestion(str(source), list(known))}")
    return Recipe.load(path, overrides, registries=SECTIONS)
