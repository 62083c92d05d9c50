"""`fewstep.generate`: a few lines over the rooms that do the work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.core.draft import Drafter
from fewstep.core.recipe import parse
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.generate import Completion
from fewstep.decode.text import GenerationConfig, Prompts
from fewstep.decode.text import generate as generate_rows
from fewstep.hub.heads import companion
from fewstep.hub.load import load
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
