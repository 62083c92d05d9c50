"""Who may import whom: the ranks of the rooms, read from the imports themselves."""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping

import pytest
from codebase import ROOT, Function, Module, enclosing, modules, parents, report

RANKS: Mapping[str, int] = {
    "core": 0,
    "text": 1,
    "nn": 1,
    "diffusion": 1,
    "models": 2,
    "decode": 3,
    "training": 4,
    "hub": 5,
    "recipes": 6,
    "report": 7,
    "serve": 8,
    "agent": 8,
    "face": 9,
    "": 10,  # fewstep/__init__
    "cli": 11,
}
CORE_IMPORTS = {"torch", "pydantic", "pydantic_core", *sys.stdlib_module_names}
LOOPS = ("stream", "unmask", "denoise", "verify")
MODELS = ("fewstep.models", "fewstep.nn")
GUESTS: Mapping[str, str] = {"fewstep.nn.triton": "gpu"}  # packages whose modules are written with an extra and imported with it
IMPORT_NAMES: Mapping[str, str] = {"pillow": "PIL"}  # packages that are imported by another name than they are installed by


def room(name: str) -> str:
    """The room of a dotted module name: the part after `fewstep`."""
    return name.partition(".")[2].partition(".")[0]


def imports(module: Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Each import with the dotted name it reaches. `from fewstep import x` reaches the room x, or the package itself."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fewstep":
            yield from ((node, f"fewstep.{alias.name}" if alias.name in RANKS else "fewstep") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")


def project() -> Mapping[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    """The import names of requirements such as "torch>=2.11"."""
    plain = (requirement.split(">")[0].split("[")[0] for requirement in requirements)
    return {IMPORT_NAMES.get(name, name) for name in plain}


REQUIRED = names(project()["dependencies"])
EXTRAS = {
    name: extra
    for extra, requirements in project()["optional-dependencies"].items()
    if extra != "dev"
    for name in names(requirements) - REQUIRED
}


def guest(name: str) -> str | None:
    """The extra that a module of a guest package needs; the package itself needs none."""
    return next((extra for package, extra in GUESTS.items() if name.startswith(f"{package}.")), None)


def rank_violations(module: Module) -> list[str]:
    own = room(module.name)
    if own not in RANKS:
        return [f"{module.path}: room {own!r} has no rank; give it one in test_rooms.py"]
    found = []
    for node, name in imports(module):
        if name.startswith("."):
            found.append(f"{module.at(node)}: relative import; write the whole name")
        elif name.split(".")[0] == "fewstep" and room(name) != own and RANKS.get(room(name), 99) >= RANKS[own]:
            found.append(f"{module.at(node)}: {own or 'fewstep'} imports {name}, which is not of a lower rank")
    return found


def package_violations(module: Module) -> list[str]:
    """Third-party packages: core takes torch and pydantic, a room what is always installed, serve and agent their extra too."""
    own, above, found = guest(module.name) or room(module.name), parents(module.tree), []
    for node, name in imports(module):
        top = name.split(".")[0]
        inside = any(isinstance(scope, Function) for scope in enclosing(node, above))
        if guest(name) and not inside and guest(name) != guest(module.name):
            found.append(f"{module.at(node)}: {name} needs fewstep[{guest(name)}]; import it in the function that needs it")
        if top == "fewstep" or name.startswith("."):
            continue
        if own == "core":
            if top not in CORE_IMPORTS:
                found.append(f"{module.at(node)}: core imports {top}; it takes torch, pydantic and the standard library only")
        elif not inside and top not in REQUIRED | sys.stdlib_module_names and EXTRAS.get(top) != own:
            found.append(f"{module.at(node)}: {top} is not among the dependencies; import it in the function that needs it")
    return found


def inner_violations(module: Module) -> list[str]:
    """Imports inside functions: optional packages that name their extra, the commands of cli, the package's `__getattr__`."""
    above, found = parents(module.tree), []
    for node, name in imports(module):
        scopes = [scope for scope in enclosing(node, above) if isinstance(scope, Function)]
        if not scopes or room(module.name) == "cli" or (module.name == "fewstep" and scopes[-1].name == "__getattr__"):
            continue
        extra = EXTRAS.get(name.split(".")[0]) or guest(name)
        if extra is None:
            found.append(f"{module.at(node)}: {name} is imported inside a function; move the import to the top")
        elif f"fewstep[{extra}]" not in ast.unparse(scopes[-1]):
            found.append(f"{module.at(node)}: {name} may be absent; catch ImportError and name fewstep[{extra}]")
    return found


def reachable(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Every module of the package that `name` imports, directly or through others."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def loop_violations(package: tuple[Module, ...]) -> list[str]:
    graph = {module.name: {name for _, name in imports(module) if name.startswith("fewstep.")} for module in package}
    return [
        f"fewstep.decode.{loop}: reaches {name}; the loops know models by core.model alone"
        for loop in LOOPS
        for name in sorted(reachable(f"fewstep.decode.{loop}", graph))
        if name.startswith(MODELS)
    ]


@pytest.mark.parametrize("rule", [rank_violations, package_violations, inner_violations])
def test_rooms_import_only_what_they_may(rule):
    violations = [line for module in modules("fewstep") for line in rule(module)]
    assert not violations, report(violations)


def test_the_loops_import_no_model():
    violations = loop_violations(modules("fewstep"))
    assert not violations, report(violations)
    assert any(module.name == "fewstep.decode.stream" for module in modules("fewstep"))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (rank_violations, "fewstep/core/draft.py", "from fewstep.nn.slots import Slots"),
        (rank_violations, "fewstep/nn/heads.py", "import fewstep.text.stop"),
        (rank_violations, "fewstep/decode/laws.py", "def law():\n    from fewstep.hub import load"),
        (rank_violations, "fewstep/report/race.py", "from fewstep import load"),
        (rank_violations, "fewstep/report/race.py", "import fewstep"),
        (rank_violations, "fewstep/nn/heads.py", "from fewstep import models"),
        (rank_violations, "fewstep/nn/heads.py", "from .blocks import Block"),
        (rank_violations, "fewstep/attic/old.py", ""),
        (package_violations, "fewstep/core/event.py", "import numpy"),
        (package_violations, "fewstep/hub/convert.py", "import transformers"),
        (package_violations, "fewstep/hub/convert.py", "import fastapi"),
        (package_violations, "fewstep/nn/flash.py", "from fewstep.nn.triton.flash import flash_attention"),
        (package_violations, "fewstep/nn/triton/flash.py", "import numba"),
        (inner_violations, "fewstep/nn/triton/__init__.py", "def load():\n    from fewstep.nn.triton.scan import selective_scan"),
        (inner_violations, "fewstep/nn/heads.py", "def build():\n    import json"),
        (inner_violations, "fewstep/nn/heads.py", "def build():\n    import pyarrow"),
        (inner_violations, "fewstep/__init__.py", "def load():\n    from fewstep.models import Model"),
    ],
)
def test_a_planted_import_is_found(rule, path, text):
    assert len(rule(Module.of(path, text))) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (rank_violations, "fewstep/models/decoder.py", "from fewstep.nn.heads import HEADS\nfrom fewstep.models import weights"),
        (package_violations, "fewstep/serve/api.py", "import fastapi"),
        (package_violations, "fewstep/nn/triton/scan.py", "import triton\nfrom fewstep.nn.triton.tiles import on"),
        (inner_violations, "fewstep/cli.py", "def train():\n    from fewstep.recipes import run"),
        (inner_violations, "fewstep/__init__.py", "def __getattr__(name):\n    from fewstep.recipes import run"),
        (
            inner_violations,
            "fewstep/nn/x.py",
            "def f():\n    try:\n        import pyarrow\n    except ImportError:\n        f('fewstep[parquet]')",
        ),
    ],
)
def test_an_allowed_import_is_not(rule, path, text):
    assert not rule(Module.of(path, text))


def test_a_model_behind_another_module_is_found():
    chain = (
        Module.of("fewstep/decode/stream.py", "from fewstep.decode.prefill import prefill"),
        Module.of("fewstep/decode/prefill.py", "from fewstep.models.decoder import Decoder"),
    )
    assert len(loop_violations(chain)) == 1
