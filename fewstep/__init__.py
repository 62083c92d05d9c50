"""fewstep: generative models in fewer, cheaper steps.

The public face: `load`, `generate`, `sample`, `train`, `reproduce`. Each name is imported when it is first used, so
that `import fewstep` costs little more than `import torch`.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.face import generate, sample
    from fewstep.hub.load import load
    from fewstep.recipes.run import train
    from fewstep.report.reproduce import reproduce

_HOMES = MappingProxyType(
    {
        "generate": "fewstep.face",
        "load": "fewstep.hub.load",
        "train": "fewstep.recipes.run",
        "reproduce": "fewstep.report.reproduce",
        "sample": "fewstep.face",
    }
)

__all__ = ["generate", "load", "reproduce", "sample", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
