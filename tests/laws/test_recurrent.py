"""What recurrent mixers share: a kernel's sweep in place of chunks where there is one, and the tables of positions."""

from typing import Any

import pytest
import torch
from sequences import TIGHT, VOCAB, decoder, shaken
from torch import Tensor

from fewstep.core.mixer import Context, Tree
from fewstep.nn import decay
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.nn.mixers.mamba2 import Mamba2Config
from fewstep.nn.mixers.retnet import RetNetConfig
from fewstep.nn.position import RopeConfig
from fewstep.nn.position.rope import Rope
from fewstep.nn.triton import Kernels

SWEPT = (LinearConfig(), RetNetConfig(), Mamba2Config(groups=2))


def with_gradients(module: Any, x: Tensor, weight: Tensor, segments: Tensor | None) -> list[Tensor]:
    places = torch.arange(x.shape[1]).expand(len(x), -1)
    y, _ = module(x, Context(places, segments=segments))
    return [y, *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", SWEPT, ids=lambda config: config.kind)
def test_a_kernels_sweep_is_chunk_after_chunk(config: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is told of every sequence's beginning; what stands in for it here is the sweep in PyTorch's operators."""
    module = shaken(config.build(width=8, heads=2, position=RopeConfig(base=100.0).build(head_width=4)))
    module.chunk = 3
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 4 + [1] * 2 + [2] * 5, [0] * 1 + [3] * 8 + [-1] * 2]) if packed else None
    weight = torch.randn(2, 11, 8, dtype=torch.float64) if segments is None else (segments >= 0).double().unsqueeze(-1)
    wanted, calls = with_gradients(module, x, weight, segments), []

    def kernel(*given: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(given)
        with monkeypatch.context() as patch:
            patch.setattr(decay, "fused", lambda *_: None)
            return decay.sweep(*given, chunk=4)

    monkeypatch.setattr(decay, "fused", lambda *_: Kernels(kernel, kernel, kernel))
    found = with_gradients(module, x, weight, segments)
    assert calls
    if segments is not None:  # what padding makes of itself is free
        wanted[0], found[0] = (each[0][segments >= 0] for each in (wanted, found))
    torch.testing.assert_close(found, wanted, **TIGHT)


@pytest.mark.parametrize("kinds", [("linear",), ("retnet",), ("linear", "retnet", "attention")])
def test_layers_make_the_tables_of_positions_once(kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a call for all recurrent layers, and once for all others, whose tables may be narrower."""
    network, made, table = decoder(mixers=tuple(MIXERS[kind]() for kind in kinds), depth=6), [], Rope.table
    monkeypatch.setattr(Rope, "table", lambda *given: made.append(given) or table(*given))
    wanted = 1 + ("attention" in kinds)
    network(torch.randint(VOCAB, (2, 5)))
    assert len(made) == wanted
    network.extend(Tree.chain(torch.randint(VOCAB, (2, 3))), network.init_state(2, 8, device="cpu", dtype=torch.float64))
    assert len(made) == 2 * wanted


def test_a_narrow_network_turns_recurrent_layers_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of softmax attention turn bfloat16; neither reads the other's table."""
    network = decoder(mixers=tuple(MIXERS[kind]() for kind in ("linear", "attention", "retnet")), depth=3).bfloat16()
    dtypes, table = [], Rope.table
    monkeypatch.setattr(Rope, "table", lambda self, places, dtype: dtypes.append(dtype) or table(self, places, dtype))
    y = network(torch.randint(VOCAB, (2, 5))).final
    assert y.dtype == torch.bfloat16 and sorted(map(str, dtypes)) == ["torch.bfloat16", "torch.float32"]
