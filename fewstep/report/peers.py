"""Contestants from `transformers`: the same weights through its own `generate`. Nothing here is needed to run fewstep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from fewstep.core.event import Cost
from fewstep.hub.save import save_hf
from fewstep.models.model import Model
from fewstep.report.contest import Contestant, Lap, RaceConfig

LIBRARY = "transformers"
_LOOKUP = 10  # tokens, as in its documentation


def transformers_peers(model: Model, draft: Model | None, config: RaceConfig, directory: Path) -> list[Contestant]:
    """`generate` plain, with prompt lookup, and assisted by `draft` if there is one; exports go to `directory`.

    Its speculative modes take one prompt at a time, so a larger batch leaves plain `generate` alone. Raises ValueError when
    transformers is missing or has no architecture for these weights.
    """
    network = _exported(model, directory / "target")
    peers: list[Contestant] = [Generate("generate", network, config)]
    if config.batch == 1:
        peers.append(Generate("prompt lookup", network, config, lookup=_LOOKUP))
        if draft is not None:
            peers.append(Generate("assisted", network, config, assistant=_exported(draft, directory / "draft")))
    return peers


@final
class Generate:
    """`transformers.GenerationMixin.generate` in one of its modes; every call of the networks is counted."""

    library = LIBRARY

    def __init__(self, name: str, network: Any, config: RaceConfig, *, lookup: int | None = None, assistant: Any = None) -> None:
        self.name = name
        self._network, self._assistant, self._config = network, assistant, config
        self._options: dict[str, Any] = {"assistant_model": assistant} if assistant is not None else {}
        if lookup:
            self._options["prompt_lookup_num_tokens"] = lookup

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap:
        width = max(map(len, prompts))
        device = self._network.device
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        torch.manual_seed(seeds[0])
        calls = _Calls(self._network), _Calls(self._assistant)
        output = self._network.generate(ids, attention_mask=mask, **self._law(), **self._options)
        made, draft_made = (count.stop() for count in calls)
        rows = len(prompts)
        tokens = output[:, width:].tolist()
        return Lap(tokens, Cost((made - 1) * rows, draft_made * rows, rows, sum(map(len, tokens))))

    def _law(self) -> dict[str, Any]:
        config = self._config
        law: dict[str, Any] = {"do_sample": False}
        if config.temperature:
            law = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
        return {"max_new_tokens": config.max_new_tokens, **law}


@final
class _Calls:
    """Counts the calls of a network until it is stopped."""

    def __init__(self, network: nn.Module | None) -> None:
        self._count = 0
        self._hook = None if network is None else network.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, arguments: object) -> None:
        self._count += 1

    def stop(self) -> int:
        if self._hook is not None:
            self._hook.remove()
        return self._count


def _exported(model: Model, directory: Path) -> Any:
    """The same weights as a transformers model, in the same dtype and place."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ValueError("peers: transformers is not installed; pip install 'fewstep[peers]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    save_hf(model, directory)
    network: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=model.dtype, local_files_only=True)
    network.generation_config.eos_token_id = None  # every contestant emits the same number of tokens
    network.generation_config.pad_token_id = 0
    return network.to(model.device).eval()
