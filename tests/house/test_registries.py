"""Every registry, found by walking the package: what an entry must be, and that its defaults work or say clearly why not."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from codebase import report
from toys import TableModel

import fewstep
from fewstep.core.recipe import Config, parse, resolve
from fewstep.diffusion.processes import PROCESSES
from fewstep.nn.blocks import Block, BlockConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.training.data import DATA

Registry = Mapping[str, type[Config]]

# what no paper proposed: sections of a recipe that only say how much and of what
RECIPE_PARTS = {"ARRAYS", "BUDGETS", "DATA", "RUNS", "SOURCES"}


def block() -> Block:
    return Block(BlockConfig(hidden=16), 16, AttentionConfig().build(width=16, heads=2))


def small() -> TableModel:
    return TableModel(vocab=5, seed=0)


USES: Mapping[str, Callable[[Any], object]] = {  # how an entry of each registry is put to use
    "ARRAY_MODELS": lambda config: config.build(),
    "ARRAYS": lambda config: config.build(),
    "BACKBONES": lambda config: config.build((2,) if config.kind == "points" else (1, 8, 8)),
    "BIJECTIONS": lambda config: config.build(shape=(2,)),
    "BUDGETS": lambda config: config.progress(SimpleNamespace(steps=1, tokens=1, seconds=1.0)),
    "CORRUPTIONS": lambda config: config.build(5, 4),
    "DATA": lambda config: next(config.documents()),
    "DRAFTERS": lambda config: config.build(small(), lambda path: small()),
    "GRIDS": lambda config: config.build(PROCESSES["edm"](), 8),
    "HEADS": lambda config: config.build(width=16, vocab=5, trunk_depth=2, eps=1e-6, make_block=block),
    "MIXERS": lambda config: config.build(width=64, heads=4),
    "MODELS": lambda config: config.build(),
    "NETWORKS": lambda config: config.build(),
    "NOISES": lambda config: config.keep(torch.tensor(0.5)),
    "OBJECTIVES": lambda config: config.build(),
    "OPTIMS": lambda config: config.build(torch.nn.Linear(4, 4)),
    "PARAMETERISATIONS": lambda config: config.build(),
    "PATTERNS": lambda config: config.pieces(40, True, torch.device("cpu")),
    "ORDERS": lambda config: config.build(),
    "POSITIONS": lambda config: config.build(head_width=16),
    "PRECISIONS": lambda config: config.context(torch.device("cpu")),
    "PROCESSES": lambda config: config.build().sigma(torch.tensor(0.5)),
    "RUNS": lambda config: config.model_dump(),
    "SCHEDULES": lambda config: config.factor(0, 0.0),
    "SOLVERS": lambda config: config.build(),
    "SOURCES": lambda config: config.documents() if config.kind in DATA else config.build(),
    "VERIFICATIONS": lambda config: config.build(),
    "TOKENIZERS": lambda config: config.build(["def area(width, height):\n    return width * height\n"]),
}


@cache
def package() -> tuple[tuple[ModuleType, ...], tuple[str, ...]]:
    """Every module of the package, and one line for each that cannot be imported."""
    imported, failed = [], []
    for found in pkgutil.walk_packages(fewstep.__path__, "fewstep."):
        try:
            imported.append(importlib.import_module(found.name))
        except ModuleNotFoundError as error:
            if error.name != "triton":  # of the extra gpu
                failed.append(f"{found.name}: {error}")
        except Exception as error:  # whatever it is, it is reported with the others
            failed.append(f"{found.name}: {type(error).__name__}: {error}")
    return tuple(imported), tuple(failed)


@cache
def registries() -> Mapping[str, Registry]:
    """Each mapping of the package whose values are all config classes, once."""
    return {
        name: value
        for module in package()[0]
        for name, value in vars(module).items()
        if isinstance(value, Mapping) and value and all(isinstance(v, type) and issubclass(v, Config) for v in value.values())
    }


def entries() -> list[Any]:
    return [pytest.param(name, key, id=f"{name}-{key}") for name, registry in sorted(registries().items()) for key in registry]


def configs(base: type[Config] = Config) -> Iterator[type[Config]]:
    """Every config class of the package, whichever module it is in."""
    for config in base.__subclasses__():
        if config.__module__.startswith("fewstep."):
            yield config
            yield from configs(config)


def test_every_module_can_be_imported():
    assert not package()[1], report(list(package()[1]))


def test_the_registries_are_found():
    assert {"MIXERS", "POSITIONS", "DRAFTERS", "OBJECTIVES"} <= set(registries())
    assert not set(registries()) - set(USES), "say in USES how the entries of a new registry are put to use"


@pytest.mark.parametrize("name", sorted(registries()))
def test_a_registry_is_read_only(name):
    registry = registries()[name]
    assert isinstance(registry, MappingProxyType)
    with pytest.raises(TypeError):
        registry["new"] = Config


@pytest.mark.parametrize(("name", "key"), entries())
def test_an_entry_says_what_it_is(name, key):
    config = registries()[name][key]
    assert config.kind == key
    assert config.source or name in RECIPE_PARTS, f"{config.__name__}.source: empty; name the paper, or `none: why`"
    assert config.__doc__ and config.model_config["frozen"] and config.model_config["extra"] == "forbid"


@pytest.mark.parametrize(("name", "key"), entries())
def test_an_entry_survives_being_written_down(name, key):
    registry = registries()[name]
    config = registry[key]()
    assert resolve(json.loads(config.model_dump_json()), registry, name) == config
    with pytest.raises(ValueError, match="no such field") as refusal:
        parse(registry[key], {"no_such_field": 1})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "key"), entries())
def test_the_defaults_work_or_say_clearly_why_not(name, key):
    try:
        made = USES[name](registries()[name][key]())
    except ValueError as error:
        assert "\n" not in str(error) and "; " in str(error), f"{error}: expected one line with the next move after a semicolon"
    else:
        assert made is not None


def test_every_config_with_a_name_is_registered():
    registered = {config for registry in registries().values() for config in registry.values()}
    missing = [f"{c.__module__}.{c.__name__}: {c.kind!r} is in no registry" for c in configs() if c.kind and c not in registered]
    assert not missing, report(missing)
