"""`fewstep.generate` and `fewstep.sample`: a few lines over the rooms that do the work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.core.draft import Drafter
from fewstep.core.recipe import parse
from fewstep.decode.arrays import Samples, requested
from fewstep.decode.arrays import sample as sample_arrays
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.generate import Completion
from fewstep.decode.text import GenerationConfig, Prompts
from fewstep.decode.text import generate as generate_rows
from fewstep.hub.arrays import load_arrays
from fewstep.hub.heads import companion
from fewstep.hub.load import load
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow import Flow
from fewstep.models.model import Model
from fewstep.report.tuned import choose


def generate(
    model: Model | Path | str,
    prompts: Prompts,
    *,
    max_new_tokens: int = 64,
    drafter: str | DrafterConfig | Drafter[Any] = "auto",
    temperature: float = 0.0,
    seed: int = 0,
    options: Mapping[str, object] | None = None,
) -> Completion | list[Completion]:
    """Continue `prompts` (a text, texts, token ids or a [B,T] tensor): one `Completion` for one text, else a list.

    `drafter`: a name ("auto": what `fewstep tune` found, else the checkpoint's own heads, else prompt lookup),
    "draft_model=PATH" or "medusa=RUN", a config or a drafter; the output never depends on it. `options`: any other field of
    `GenerationConfig` by name, e.g. {"top_p": 0.9, "stop": ["\\n\\n"]}.
    Raises ValueError for a bad option, an empty prompt or one that exceeds the context.
    """
    model = model if isinstance(model, Model) else load(model)
    fields = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, **(options or {})}
    config = parse(GenerationConfig, fields)
    count = config.samples * (1 if isinstance(prompts, str) else len(prompts))
    rows = generate_rows(model, prompts, choose(model, drafter, count, config, companion(model)).drafter, config)
    return rows[0] if isinstance(prompts, str) and len(rows) == 1 else rows


def sample(
    model: Denoiser | Flow | Path | str,
    count: int = 64,
    *,
    solver: str | None = None,
    steps: int | None = None,
    label: int | Sequence[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    options: Mapping[str, object] | None = None,
) -> Samples:
    """`count` samples of a model of arrays, a denoiser or a flow: `x` [N, *shape] in the data's own unit, and their cost.

    `solver` and `steps`: how a denoiser goes from noise to data (None: as its kind is best sampled, most by DEIS in 18 steps, a
    consistency model in one call); a flow takes one call. `label`: the class of all samples, or of
    each. `options`: any other field of `SampleConfig` by name, e.g. {"grid": "uniform", "process": "vp"}.
    Raises ValueError for a bad option, and for what the model, the solver and the grid refuse.
    """
    labels = () if label is None else (label,) if isinstance(label, int) else tuple(label)
    asked = {name: value for name, value in {"solver": solver, "steps": steps, **(options or {})}.items() if value is not None}
    kinds = {name: {"kind": value} if isinstance(value, str) else value for name, value in asked.items()}
    fields = {"count": count, "label": labels, "guidance": guidance, "seed": seed, **kinds}
    model = load_arrays(model) if isinstance(model, Path | str) else model
    return sample_arrays(model, requested(model, fields))
