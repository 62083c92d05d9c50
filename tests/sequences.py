"""Subjects of the sequence laws (mixers, a block, whole decoders) behind one face, and a plain record of what a state holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Causal, Context, Mask, Tree, Window
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.blocks import Block, BlockConfig
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.efficient import EfficientConfig
from fewstep.nn.mixers.gau import GAUConfig
from fewstep.nn.mixers.linformer import LinformerConfig
from fewstep.nn.mixers.mixed_chunk import MixedChunkConfig
from fewstep.nn.mixers.mla import MLAConfig
from fewstep.nn.mixers.patterns import BlocksConfig, FixedConfig, StridedConfig, WindowConfig
from fewstep.nn.mixers.sparse import SparseConfig
from fewstep.nn.position import POSITIONS, NoPositionConfig, RopeConfig
from fewstep.nn.recurrent import Recurrent

WIDTH, HEADS, VOCAB = 16, 4, 11
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
LOOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32


def shaken(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """`module` as `dtype` with every parameter away from its start, so that no bias or gain is neutral."""
    module = module.to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


class Sublayer:
    """A mixer or a block: activations in, activations out, positions given by the caller."""

    takes_activations = True

    def __init__(self, module: nn.Module, masks: frozenset[type], modes: frozenset[str], mask: Mask | None = None) -> None:
        self.module: Any = module
        self.dtype = next(module.parameters()).dtype
        self.close = TIGHT if self.dtype == torch.float64 else LOOSE
        self.masks, self.modes, self.mask = masks, modes, mask or Causal()

    def inputs(self, *shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, dtype=self.dtype)

    def parallel(self, x: Tensor, segments: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        positions = positions_of(segments if segments is not None else torch.zeros(x.shape[:2], dtype=torch.int64))
        y, _ = self.module(x, Context(positions, segments=segments, mask=mask or self.mask))
        return y

    def start(self, batch: int, capacity: int) -> Any:
        return self.module.init_state(batch, capacity, device="cpu", dtype=self.dtype)

    def step(self, x: Tensor, parent: Tensor, positions: Tensor, state: Any, mask: Mask | None = None) -> tuple[Tensor, Any]:
        return self.module.extend(x, Context(positions, parent=parent, mask=mask or self.mask), state)


class Network(Sublayer):
    """A decoder: tokens in, logits out; it finds the positions itself."""

    takes_activations = False

    def inputs(self, *shape: int) -> Tensor:
        return torch.randint(VOCAB, shape)

    def parallel(self, x: Tensor, segments: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        return self.module.unembed(self.module(x, segments, mask=mask or self.mask).final)

    def step(self, x: Tensor, parent: Tensor, positions: Tensor, state: Any, mask: Mask | None = None) -> tuple[Tensor, Any]:
        output = self.module.extend(Tree(x, parent), state, mask=mask or self.mask)
        return output.logits, output.state


def _mixer(
    config: Any, position: Any = RopeConfig(base=100.0), mask: Mask | None = None, dtype: torch.dtype = torch.float64
) -> Callable[[], Sublayer]:
    def make() -> Sublayer:
        module = config.build(width=WIDTH, heads=HEADS, position=position.build(head_width=config.widths(WIDTH, HEADS)[1]))
        return Sublayer(shaken(module, dtype), module.masks, module.modes, mask)

    return make


class Embedded(nn.Module):
    """A mixer behind the input that its position encoding changes."""

    def __init__(self, position: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.position: Any = position
        self.mixer: Any = mixer

    def init_state(self, batch: int, capacity: int, *, device: str, dtype: torch.dtype) -> Any:
        return self.mixer.init_state(batch, capacity, device=device, dtype=dtype)

    def forward(self, x: Tensor, ctx: Context) -> Any:
        return self.mixer(self.position.embed(x, ctx.positions), ctx)

    def extend(self, x: Tensor, ctx: Context, state: Any) -> Any:
        return self.mixer.extend(self.position.embed(x, ctx.positions), ctx, state)


def placed(config: Any, position: Any) -> Callable[[], Sublayer]:
    """A mixer with any position encoding, which may embed and may be no encoding for cached calls."""

    def make() -> Sublayer:
        encoding = position.build(head_width=config.widths(WIDTH, HEADS)[1], width=WIDTH, heads=HEADS)
        mixer = config.build(width=WIDTH, heads=HEADS, position=encoding)
        module = Embedded(encoding, mixer) if "embed" in encoding.parts else mixer
        return Sublayer(shaken(module), mixer.masks, mixer.modes if encoding.pointwise else mixer.modes - {"causal"})

    return make


def _is_recurrent(config: Any) -> bool:
    return isinstance(config.build(width=WIDTH, heads=HEADS, position=NoPositionConfig().build(head_width=4)), Recurrent)


def _in_chunks(config: Any) -> Callable[[], Sublayer]:
    """A recurrent mixer that reads so few tokens at once that every law runs over several chunks."""

    def make() -> Sublayer:
        subject = _mixer(config)()
        subject.module.chunk = 3
        return subject

    return make


def _block(config: Any, norm: Any, activation: Any) -> Callable[[], Sublayer]:
    def make() -> Sublayer:
        mixer = config.build(width=WIDTH, heads=HEADS, position=RopeConfig().build(head_width=WIDTH // HEADS))
        block = Block(BlockConfig(norm=norm, activation=activation, hidden=24, mlp_bias=norm == "layer"), WIDTH, mixer)
        return Sublayer(shaken(block), mixer.masks, mixer.modes)

    return make


def decoder(**fields: Any) -> Decoder:
    """A small float64 decoder, shaken."""
    small: dict[str, Any] = {
        "vocab": VOCAB,
        "width": WIDTH,
        "depth": 2,
        "query_heads": HEADS,
        "hidden": 24,
        "max_positions": None,
    }
    return shaken(DecoderConfig(**{**small, **fields}).build())


def _network(mask: Mask | None = None, dtype: torch.dtype = torch.float64, **fields: Any) -> Callable[[], Sublayer]:
    def make() -> Sublayer:
        network = decoder(**fields).to(dtype)
        return Network(network, network.blocks[0].mixer.masks, network.blocks[0].mixer.modes, mask)

    return make


_SIZES: Mapping[str, Mapping[str, Any]] = {  # small enough that every law goes beyond them
    "deberta": {"reach": 3},
    "dynamic_ntk": {"base": 100.0, "factor": 2.0, "trained_length": 5},
    "multiplicative": {"length": 80},
    "ntk": {"base": 100.0},
    "recursive": {"hidden": 5},
    "rope": {"base": 100.0},
    "rope_2d": {"columns": 3},
    "rope_mixed": {"columns": 3},
    "shaw": {"reach": 2},
    "t5": {"buckets": 8, "farthest": 12},
    "trainable": {"length": 80},
    "yarn": {"base": 100.0, "trained_length": 16, "slow": 0.1, "fast": 2.0},
}
ENCODINGS: Mapping[str, Any] = {kind: config(**_SIZES.get(kind, {})) for kind, config in POSITIONS.items()}
_BIASED = ("alibi", "t5", "shaw", "transformer_xl", "deberta", "dynamic_ntk")  # of one call's places, trees and groups of heads
_WINDOWED = AttentionConfig(window=3)
MIXER_SUBJECTS: Mapping[str, Callable[[], Sublayer]] = {
    **{f"{kind}-rope": _mixer(config()) for kind, config in MIXERS.items()},
    **{f"{kind}-none": _mixer(config(), NoPositionConfig()) for kind, config in MIXERS.items()},
    **{f"{kind}-chunks": _in_chunks(config()) for kind, config in MIXERS.items() if _is_recurrent(config())},
    "attention-grouped": _mixer(AttentionConfig(kv_heads=2)),
    "attention-multiquery-normed": _mixer(AttentionConfig(kv_heads=1, qk_norm=True)),
    "attention-biased-wide": _mixer(AttentionConfig(bias=True, out_bias=True, head_width=6)),
    "attention-window": _mixer(_WINDOWED),
    "attention-window-1": _mixer(AttentionConfig(window=1)),
    "attention-masked-window": _mixer(AttentionConfig(), mask=Window(3)),
    "attention-narrowest-window": _mixer(AttentionConfig(window=5), mask=Window(3)),
    **{f"attention-{kind}": placed(AttentionConfig(kv_heads=2), ENCODINGS[kind]) for kind in _BIASED},
    "attention-window-shaw": placed(_WINDOWED, ENCODINGS["shaw"]),
    "attention-llama3": _mixer(AttentionConfig(), RopeConfig(scaling="llama3", factor=8.0, trained_length=16)),
    "mixed_chunk-small": _mixer(MixedChunkConfig(size=3)),
    "mixed_chunk-1": _in_chunks(MixedChunkConfig(size=1)),
    "gau-wide": _mixer(GAUConfig(expand=1.0, base=8)),
    "linformer-own": _mixer(LinformerConfig(length=16, rank=3, sharing="none", bias=True)),
    "sparse-strided": _mixer(SparseConfig(pattern=StridedConfig(stride=5))),
    "sparse-fixed": _mixer(SparseConfig(pattern=FixedConfig(block=3, summary=1), bias=True)),
    "sparse-window": _mixer(SparseConfig(pattern=WindowConfig(window=6, sinks=1))),
    "sparse-blocks": _mixer(SparseConfig(pattern=BlocksConfig(block=2, local=1, stride=2))),
    "mla-unequal-widths": _mixer(MLAConfig(latent=6, query_latent=5, content_width=3, rotary_width=2, value_width=7, bias=True)),
}
SUBJECTS: Mapping[str, Callable[[], Sublayer]] = {
    **MIXER_SUBJECTS,
    **{f"block-{kind}": _block(config(), "rms", "swiglu") for kind, config in MIXERS.items()},
    "block-layer-gelu": _block(AttentionConfig(), "layer", "gelu"),
    **{f"decoder-{kind}": _network(mixers=(config(),)) for kind, config in MIXERS.items()},
    "decoder-hybrid": _network(mixers=(_WINDOWED, AttentionConfig(kv_heads=2, qk_norm=True)), depth=3, tied=False),
    "decoder-sparse-hybrid": _network(mixers=(SparseConfig(pattern=StridedConfig(stride=4)), AttentionConfig()), depth=3),
    "decoder-gated-hybrid": _network(
        mixers=(MixedChunkConfig(size=2), AttentionConfig(), GAUConfig(), EfficientConfig()), depth=4
    ),
    "decoder-latent-hybrid": _network(mixers=(MLAConfig(latent=3), AttentionConfig(window=3)), depth=3),
    "decoder-nope": _network(position=NoPositionConfig(), norm="layer", activation="gelu", mlp_bias=True),
    "decoder-trainable": _network(position=ENCODINGS["trainable"], max_positions=80),
    "decoder-shaw": _network(position=ENCODINGS["shaw"]),
    "decoder-masked-window": _network(mask=Window(2)),
}
FAST_SUBJECTS: Mapping[str, Callable[[], Sublayer]] = {  # float32, where decoding takes other paths than float64
    **{f"{kind}-float32": _mixer(config(), dtype=torch.float32) for kind, config in MIXERS.items()},
    "attention-grouped-window-float32": _mixer(AttentionConfig(kv_heads=2, window=3), dtype=torch.float32),
    "decoder-hybrid-float32": _network(
        mixers=(_WINDOWED, AttentionConfig(kv_heads=2, qk_norm=True)), depth=3, tied=False, dtype=torch.float32
    ),
}


def positions_of(segments: Tensor) -> Tensor:
    """[B,T] places within runs of equal segments, by counting."""
    rows = []
    for row in segments.tolist():
        places: list[int] = []
        for i, segment in enumerate(row):
            places.append(places[-1] + 1 if i and segment == row[i - 1] else 0)
        rows.append(places)
    return torch.tensor(rows)


def path_to(parent: list[int], node: int) -> list[int]:
    """The nodes from the top down to `node`, itself included, by walking up."""
    path = [node]
    while parent[path[0]] >= 0:
        path.insert(0, parent[path[0]])
    return path


def random_parents(batch: int, count: int, earlier: list[list[int]], padding: float = 0.25) -> Tensor:
    """[B,count] parents of nodes that join the pending ones `earlier` per row: any valid node, no node, or padding."""
    rows = []
    for row in range(batch):
        all_nodes = list(earlier[row])
        for _ in range(count):
            valid = [-1] + [i for i, p in enumerate(all_nodes) if p != -2]
            pick = valid[int(torch.randint(len(valid), ()))]
            all_nodes.append(-2 if float(torch.rand(())) < padding else pick)
        rows.append(all_nodes[len(earlier[row]) :])
    return torch.tensor(rows, dtype=torch.int64).reshape(batch, count)


@dataclass
class Book:
    """A state, and beside it the plain record of each row: inputs committed, and pending (input, parent) nodes.

    Every `extend` checks every node: its output must be the last output of the parallel form over its own history.
    """

    subject: Sublayer
    state: Any
    committed: list[list[Tensor]]
    pending: list[list[tuple[Tensor, int]]]

    @classmethod
    def open(cls, subject: Sublayer, batch: int, capacity: int) -> Book:
        return cls(subject, subject.start(batch, capacity), [[] for _ in range(batch)], [[] for _ in range(batch)])

    @property
    def batch(self) -> int:
        return len(self.committed)

    @property
    def size(self) -> int:
        """Slots of the longest row: what a capacity must hold."""
        return max(map(len, self.committed)) + len(self.pending[0])

    def parents(self) -> list[list[int]]:
        return [[parent for _, parent in row] for row in self.pending]

    def history(self, row: int, node: int) -> list[Tensor]:
        path = path_to([parent for _, parent in self.pending[row]], node)
        return self.committed[row] + [self.pending[row][i][0] for i in path]

    def extend(self, x: Tensor, parent: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """Add nodes (default: a chain after the last pending node) and check them all."""
        first, count = len(self.pending[0]), x.shape[1]
        if parent is None:
            parent = torch.arange(first - 1, first + count - 1).expand(self.batch, -1)
        y, self.state = self.subject.step(x, parent, self._positions(parent), self.state, mask)
        for row in range(self.batch):
            self.pending[row] += zip(x[row], parent[row].tolist(), strict=True)
        nodes = [(row, i) for row in range(self.batch) for i in range(count) if parent[row, i] != -2]
        if nodes:
            wanted = last_outputs(self.subject, [self.history(row, first + i) for row, i in nodes], mask)
            torch.testing.assert_close(torch.stack([y[row, i] for row, i in nodes]), wanted, **self.subject.close)
        return y

    def commit(self, paths: list[list[int]]) -> None:
        """Keep `paths[row]`, pending nodes from the top down."""
        count = max(1, len(self.pending[0]))
        path = torch.randint(count, (self.batch, count))  # entries beyond `keep` are any index
        for row, nodes in enumerate(paths):
            path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int64)
            self.committed[row] = self.committed[row] + [self.pending[row][i][0] for i in nodes]
        self.pending = [[] for _ in self.pending]
        self.state = self.state.commit(path, torch.tensor([len(nodes) for nodes in paths]))

    def commit_any(self) -> None:
        """Keep some path of each row, nothing at times."""
        paths = []
        for row in self.parents():
            valid = [i for i, parent in enumerate(row) if parent != -2]
            whole = path_to(row, valid[int(torch.randint(len(valid), ()))]) if valid else []
            paths.append(whole[: int(torch.randint(len(whole) + 1, ()))] if float(torch.rand(())) < 0.3 else whole)
        self.commit(paths)

    def rollback(self) -> None:
        self.state, self.pending = self.state.rollback(), [[] for _ in self.pending]

    def fork(self, rows: list[int]) -> Book:
        state = self.state.fork(torch.tensor(rows, dtype=torch.int64))
        return Book(self.subject, state, [list(self.committed[row]) for row in rows], [list(self.pending[row]) for row in rows])

    def join(self, other: Book) -> Book:
        state = self.state.join(other.state)
        return Book(self.subject, state, self.committed + other.committed, self.pending + other.pending)

    def _positions(self, parent: Tensor) -> Tensor:
        """[B,N] committed length + depth of the new nodes; padding stands anywhere."""
        rows = []
        for row, new in enumerate(parent.tolist()):
            known = [p for _, p in self.pending[row]] + new
            first = len(known) - len(new)
            rows.append([len(self.committed[row]) + len(path_to(known, first + i)) - 1 for i in range(len(new))])
        return torch.tensor(rows)


def last_outputs(subject: Sublayer, histories: list[list[Tensor]], mask: Mask | None = None) -> Tensor:
    """The parallel form's output at the end of each history; causal, so what pads the shorter ones does not matter."""
    longest = max(map(len, histories))
    rows = [torch.stack(history + [history[-1]] * (longest - len(history))) for history in histories]
    y = subject.parallel(torch.stack(rows), mask=mask)
    return torch.stack([y[i, len(history) - 1] for i, history in enumerate(histories)])


def names(subjects: Mapping[str, Callable[[], Sublayer]], mode: str) -> Iterable[str]:
    """The subjects that have `mode`."""
    return [name for name, make in subjects.items() if mode in make().modes]
