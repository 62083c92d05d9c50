"""fewstep: generative models in fewer, cheaper steps.

The public face: `load`, `generate`, `train`, `reproduce`. Each name is imported when it is first used, so that `import fewstep`
costs little more than `import torch`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.face import generate, load, reproduce, train

__all__ = ["generate", "load", "reproduce", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fewstep import face

        return getattr(face, name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
