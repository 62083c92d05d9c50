"""A model as users hold it: network, tokenizer, chat template and the recipe that made it, in one directory.

A directory holds `recipe.json`, `weights.safetensors`, `tokenizer.json` and the tokenizer's settings. This file knows the
families of no other library.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewstep.core.recipe import Config, resolve
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.weights import (
    Stored,
    allocated,
    check,
    distinct,
    fill,
    floating,
    headers,
    read_json,
    shards,
    write,
    write_texts,
)
from fewstep.text.chat import ChatTemplate
from fewstep.text.tokenizer import Tokenizer

MODELS: Mapping[str, type[Config]] = MappingProxyType({DecoderConfig.kind: DecoderConfig})

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
)

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of `name`. Raises ValueError for one that weights cannot have."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: not known; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def beside(directory: Path, vocab: int) -> tuple[Tokenizer | None, ChatTemplate | None, dict[str, str]]:
    """What stands beside the weights of a model of `vocab` tokens: tokenizer, chat template, and the settings that name them.

    The settings are text files by relative name. Raises ValueError for a damaged file or a tokenizer with more than `vocab` ids.
    """
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    _fitting(tokenizer, vocab)
    paths = [*(directory / name for name in SETTINGS), *sorted((directory / TEMPLATES).glob("*.jinja"))]
    settings = {str(path.relative_to(directory)): path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    return tokenizer, ChatTemplate.load(directory), settings


def assemble(
    config: DecoderConfig,
    stored: Mapping[str, Stored],
    source: str,
    *,
    device: torch.device | str,
    dtype: str | torch.dtype,
    named: Callable[[Decoder], Mapping[str, Tensor]] = lambda network: network.state_dict(keep_vars=True),
) -> Decoder:
    """The decoder of `config` with the `stored` weights; `named` gives its tensors, or views of them, by their stored names.

    `dtype`: "auto" takes the narrowest that holds what is stored. Cost: the memory of the model, and the pages of one file.
    Raises ValueError, naming `source`, for weights that do not fit, before that memory is taken.
    """
    if config.depth > len(stored):
        raise ValueError(f"{source}: {len(stored)} tensors for {config.depth} layers; the weights belong to another config")
    network = blank(config, source)
    check(named(network), stored, source)
    dtype = floating(stored) if dtype == "auto" else dtype_of(dtype)
    network.load_state_dict(allocated(network.state_dict(), dtype, device), assign=True)
    if config.tied:
        network.head.weight = network.embedding.weight
    fill(named(network), stored)
    return network


def blank(config: DecoderConfig, source: str) -> Decoder:
    """A decoder without memory: on the meta device, nothing drawn. Raises ValueError, naming `source`, for a bad config."""
    with torch.device("meta"), _Undrawn():
        try:
            return config.build()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


@final
class _Undrawn(TorchFunctionMode):
    """Leaves new weights undrawn: they are about to be read, and torch imports its whole compiler to draw on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_) else func(*args, **(kwargs or {}))


@final
class Model:
    """`network` with its `tokenizer` (None: token ids only), `chat` template and `recipe` (plain values by section).

    `settings`: text files by name, from wherever the model came, that stay with it as they are. `eos_ids`: the tokens that end a
    text, those of `recipe["generation"]["eos_ids"]`, else the tokenizer's one. Raises ValueError for a tokenizer with more ids
    than the network.
    """

    def __init__(
        self,
        network: Decoder,
        tokenizer: Tokenizer | None,
        recipe: Mapping[str, Any] | None = None,
        *,
        chat: ChatTemplate | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        _fitting(tokenizer, network.vocab)
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.recipe: dict[str, Any] = {**(recipe or {}), "model": network.config.model_dump(mode="json")}
        self.eos_ids = _eos_ids(self.recipe, tokenizer)
        self.chat = chat
        self.settings = dict(settings or {})

    @property
    def device(self) -> torch.device:
        return self.network.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.embedding.weight.dtype

    @property
    def size(self) -> int:
        """The number of weights, tied ones counted once, extra heads included."""
        return sum(tensor.numel() for tensor in distinct(self.network.state_dict(keep_vars=True)).values())

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """ids [B,T] int64 -> [B,T,V]: the law of the token after each position, unnormalised."""
        return self.network.unembed(self.network(ids.to(self.device)).final)

    @classmethod
    def load(cls, directory: Path | str, device: torch.device | str = "cpu", dtype: str | torch.dtype = "float32") -> "Model":
        """Read a fewstep model directory. Raises ValueError for a missing, damaged or mismatched file."""
        directory = Path(directory)
        recipe = read_json(directory / "recipe.json")
        if "model" not in recipe:
            raise ValueError(f"{directory / 'recipe.json'}: no section 'model'; this is not a model's recipe")
        config = cast(DecoderConfig, resolve(recipe["model"], MODELS, "model"))
        tokenizer, chat, settings = beside(directory, config.vocab)
        network = assemble(config, headers(shards(directory)), str(directory), device=device, dtype=dtype)
        return cls(network, tokenizer, recipe, chat=chat, settings=settings)

    def save(self, directory: Path | str, dtype: str | torch.dtype | None = None) -> None:
        """Write the model directory, its weights as `dtype` (None: as they are). Raises ValueError when the disk refuses."""
        directory = Path(directory)
        write_texts(directory, self.texts())
        weights = distinct(self.network.state_dict(keep_vars=True))
        write(directory / "weights.safetensors", weights, None if dtype is None else dtype_of(dtype))
        write_texts(directory, {"recipe.json": json.dumps(self.recipe, indent=2)})

    def texts(self) -> dict[str, str]:
        """The tokenizer's file and the settings beside it, by name."""
        return {**({} if self.tokenizer is None else self.tokenizer.files()), **self.settings}


def _fitting(tokenizer: Tokenizer | None, vocab: int) -> None:
    if tokenizer is not None and tokenizer.vocab > vocab:
        raise ValueError(
            f"tokenizer vocab={tokenizer.vocab}: larger than the model's vocab={vocab}; use the tokenizer it was trained with"
        )


def _eos_ids(recipe: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    match recipe.get("generation"):
        case {"eos_ids": [*ids]} if all(isinstance(token, int) for token in ids):
            return tuple(ids)
        case None:
            return () if tokenizer is None or tokenizer.eos is None else (tokenizer.eos,)
        case other:
            raise ValueError(f"recipe.generation={other!r}: expected a table with eos_ids, a list of token ids; correct it")
