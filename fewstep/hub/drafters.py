"""Heads in the layouts of other projects, read and written. This file knows no layout: `layouts` has them as data.

Files from others are hostile input: safetensors only, every name and shape checked before memory is taken. What a layout stores
of the target once more, its embedding say, is compared with the target's own and not kept.
"""

import json
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.recipe import lookup
from fewstep.hub.huggingface import CONFIG, WEIGHTS
from fewstep.hub.layouts import LAYOUTS, Layout
from fewstep.hub.names import pieces
from fewstep.hub.pickles import SUFFIXES, refusal
from fewstep.hub.save import appearing
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import blank
from fewstep.models.weights import Stored, allocated, check, fill, headers, read_json, shards, write, write_texts
from fewstep.nn.eagle import Eagle3Heads
from fewstep.nn.medusa import FreeHeads
from fewstep.nn.packed import PackedModule, pack

FILES = (*sorted({layout.file for layout in LAYOUTS.values()} - {WEIGHTS}), WEIGHTS)
OFFSETS, MASK = "d2t", "t2d"
_FAR = 0.02  # a copy that was rounded on the way is nearer to its original, in norm


def is_foreign(directory: Path) -> bool:
    """Whether `directory` holds heads in one of the layouts, alone or among a model's own tensors.

    Raises ValueError for a damaged file, or pickles where safetensors should be.
    """
    return (directory / CONFIG).is_file() and any(_matching(headers(files(directory)).keys()))


def read_drafter(directory: Path | str, target: Decoder) -> Decoder:
    """The heads in `directory` on the device and in the dtype of `target`, packed if it is, beside a trunk without memory.

    Their layout is found by the names of their tensors. Raises ValueError for a missing, damaged or truncated file, a missing or
    unknown tensor, a config that fewstep or `target` cannot follow, and heads for another model; nothing is half loaded.
    """
    directory = Path(directory)
    source, stored = str(directory), headers(files(directory))
    layout, prefix = _layout(stored.keys(), source)
    values = read_json(directory / CONFIG)
    try:
        config = layout.read(values, {name.removeprefix(prefix) for name in stored}, target.config)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    shell = blank(config, source)
    (heads,) = shell.heads.values()
    bias = layout.bias or any(name.endswith(".bias") for name in stored)
    own = _named(heads, layout, config, prefix, bias=bias)
    copies = {name: end for name, end in _copies(heads, layout, config, prefix).items() if name in stored and name not in own}
    stored = {name: header for name, header in stored.items() if name in own or not _beside(name, layout, config)}
    check({**own, **_tables(heads, stored), **{name: _end(target, end) for name, end in copies.items()}}, stored, source)
    weight = target.embedding.weight
    heads.load_state_dict(allocated(heads.state_dict(), weight.dtype, weight.device), assign=True)
    own = _named(heads, layout, config, prefix, bias=bias)
    fill(own, {name: stored[name] for name in own})
    if not bias:
        _zero_biases(heads)
    for name, end in copies.items():
        _check_copy(_tensor(name, stored), _end(target, end), f"{source}: {name}")
    _check_tables(heads, {name: _tensor(name, stored) for name in (OFFSETS, MASK) if name in stored}, source)
    if any(isinstance(part, PackedModule) for part in target.modules()):
        pack(heads)
    return shell.eval()


def save_drafter(network: Decoder, layout: str, directory: Path | str, target: Decoder, *, name: str) -> None:
    """Write the heads of `network` in the words of `layout`; `target` is the model they serve, called `name`.

    `directory` must be new or empty; it appears whole or not at all. Raises ValueError for a layout that is not known or cannot
    say these heads, and when the disk refuses.
    """
    chosen = lookup(LAYOUTS, layout, "to")
    heads = network.heads.get(chosen.drafter)
    if heads is None:
        has = ", ".join(network.heads) or "none"
        raise ValueError(f"to={layout!r}: holds {chosen.drafter} heads, there are {has}; choose another layout")
    config = network.config.model_copy(update={"heads": _plain(network.config, chosen.drafter)})
    try:
        named = _named(heads, chosen, config, "", bias=True)
        values = chosen.write(config, target.config, name)
        said = chosen.read(values, named.keys(), target.config)
        if said.heads != config.heads:
            raise ValueError(f"cannot say {config.heads[0]!r}")
    except ValueError as error:
        raise ValueError(f"to={layout!r}: {error}; choose another layout") from None
    if isinstance(heads, Eagle3Heads) and heads.d2t is not None:
        named[MASK] = heads.t2d
    if not (isinstance(heads, FreeHeads) and len(heads.unembeddings)):
        copied = {part.format(**fields) for part in chosen.copied for fields in _counts(heads, config)}
        copies = _copies(heads, chosen, config, "")
        named |= {part: _end(target, copies[part]).detach().clone() for part in sorted(copied)}
    with appearing(directory) as partial:
        write(partial / chosen.file, named)
        write_texts(partial, {CONFIG: json.dumps(values, indent=2) + "\n"})


def files(directory: Path) -> list[Path]:
    """The safetensors files of `directory`. Raises ValueError where there are none, with the command that converts a pickle."""
    pickles = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    if pickles and not any(directory.glob("*.safetensors")):
        raise refusal(pickles[0])
    return shards(directory, FILES)


def _matching(names: Set[str]) -> Iterator[tuple[Layout, str]]:
    """The layouts, with the prefix of their names, that could have `names`."""
    for layout in LAYOUTS.values():
        for prefix in ("", *layout.prefixes):
            mark, unless = (re.compile(re.escape(prefix) + pattern) for pattern in (layout.mark, layout.unless))
            if any(map(mark.fullmatch, names)) and not any(map(unless.fullmatch, names)):
                yield layout, prefix


def _layout(names: Set[str], source: str) -> tuple[Layout, str]:
    match [*_matching(names)]:
        case [found]:
            return found
        case []:
            raise ValueError(f"{source}: no heads in a layout that fewstep reads; expected one of {', '.join(LAYOUTS)}")
        case several:
            kinds = ", ".join(f"{prefix}{layout.name}" for layout, prefix in several)
            raise ValueError(f"{source}: heads in several layouts ({kinds}); keep the files of one")


def _plain(config: DecoderConfig, drafter: str) -> tuple[Any, ...]:
    """The heads that serve `drafter`, with nothing said twice: a draft vocabulary that is all of the target's is none."""
    (head,) = (head for head in config.heads if head.drafter == drafter)
    drafted = dict(head).get("draft_vocab")
    return (head.model_copy(update={"draft_vocab": None}) if drafted is not None and drafted >= config.vocab else head,)


def _named(heads: nn.Module, layout: Layout, config: DecoderConfig, prefix: str, *, bias: bool) -> dict[str, Tensor]:
    """Every tensor of `heads`, or view of it, by the name `layout` stores it under; without `bias` no bias.

    Raises ValueError for a tensor that it has no name for.
    """
    modules: dict[str, list[str]] = {}
    for fields in _counts(heads, config):
        for ours, theirs in layout.modules.items():
            parts = modules.setdefault(ours.format(**fields), [])
            parts += [part for name in theirs if (part := name.format(**fields)) not in parts]
    named: dict[str, Tensor] = {}
    for name, tensor in heads.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        if not module:
            named[prefix + name] = tensor
        elif module not in modules:
            raise ValueError(f"no name for {name}")
        elif leaf != "bias" or bias:
            split = zip(modules[module], pieces(heads, module, tensor, len(modules[module])), strict=True)
            named |= {f"{prefix}{part}.{leaf}": piece for part, piece in split}
    return named


def _counts(heads: nn.Module, config: DecoderConfig) -> Iterator[dict[str, int]]:
    """The numbers that stand in names, head by head and block by block."""
    (head,) = (dict(head) for head in config.heads)
    blocks = head["layers"] if isinstance(heads, FreeHeads) else 1
    for k in range(head.get("depth", 1)):
        for deep in range(max(1, blocks - 1)):
            yield {"k": k, "layer": config.depth + k, "deep": deep, "block": deep + 1, "blocks": blocks}


def _copies(heads: nn.Module, layout: Layout, config: DecoderConfig, prefix: str) -> dict[str, str]:
    """Which of the target's ends the tensors that `layout` shares with it repeat."""
    return {prefix + name.format(**fields): end for name, end in layout.shared.items() for fields in _counts(heads, config)}


def _end(target: Decoder, end: str) -> Tensor:
    return target.embedding.weight if end == "embedding" else target.head.weight


def _beside(name: str, layout: Layout, config: DecoderConfig) -> bool:
    """Whether `name` is of the trunk that the heads may be stored with."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return re.fullmatch(layout.beside, name) is not None and (layer is None or int(layer[1]) < config.depth)


def _tables(heads: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """What the tables of a reduced vocabulary look like that `heads` do not keep, if they are `stored`."""
    if not isinstance(heads, Eagle3Heads):
        return {}
    made = {OFFSETS: torch.empty(heads.head.out_features, dtype=torch.int64, device="meta")} if heads.d2t is None else {}
    made |= {MASK: torch.empty(heads.vocab, dtype=torch.bool, device="meta")}
    return {name: tensor for name, tensor in made.items() if name in stored}


def _tensor(name: str, stored: Mapping[str, Stored]) -> Tensor:
    held = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype)}
    fill(held, {name: stored[name]})
    return held[name]


def _zero_biases(heads: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()


def _check_copy(copy: Tensor, own: Tensor, place: str) -> None:
    own = own.detach().to("cpu", torch.float32)
    if not (copy.float() - own).norm() <= _FAR * own.norm():
        raise ValueError(f"{place} differs from the model's own, which is what drafts here; give heads trained for this model")


def _check_tables(heads: nn.Module, tables: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError unless `d2t` names tokens of the model, none twice, and `t2d` the same ones."""
    if not isinstance(heads, Eagle3Heads) or OFFSETS not in tables:
        return
    ids = tables[OFFSETS] + torch.arange(len(tables[OFFSETS]))
    outside = [token for token, id in enumerate(ids.tolist()) if not 0 <= id < heads.vocab]
    if outside:
        given, known = int(ids[outside[0]]), f"0 .. {heads.vocab - 1}"
        raise ValueError(f"{source}: d2t[{outside[0]}]: names token {given}, expected {known}; give heads trained for this model")
    if len(ids.unique()) < len(ids) or (heads.d2t is None and tables[OFFSETS].any()):
        raise ValueError(f"{source}: d2t: names a token twice, or reorders a whole vocabulary; the file is damaged")
    mask = torch.zeros(heads.vocab, dtype=torch.bool).index_fill(0, ids, True)
    if MASK in tables and not torch.equal(tables[MASK], mask):
        raise ValueError(f"{source}: t2d: marks other tokens than d2t names; the file is damaged")
