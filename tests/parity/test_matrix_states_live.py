"""Mixers with a matrix state and those of `transformers` compute the same from the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.mixer import Context
from fewstep.nn.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from fewstep.nn.mixers.mamba2 import Mamba2, Mamba2Config
from fewstep.nn.mixers.rwkv4 import Rwkv4, Rwkv4Config

pytestmark = pytest.mark.claims
WIDTH = 24


def assert_agree(mine: Any, theirs: Any, batch: int, count: int, label: str) -> None:
    """Whole sequences, and the same token by token through a state; `theirs` returns its output first if it returns several."""
    x = torch.randn(batch, count, WIDTH)
    with torch.no_grad():
        wanted = theirs(x)
        wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
        parallel, _ = mine(x, Context(torch.arange(count).expand(batch, -1)))
        state, steps = mine.init_state(batch, count, device="cpu", dtype=torch.float32), []
        for t in range(count):
            y, state = mine.extend(x[:, t : t + 1], Context(), state)
            state = state.commit(torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, dtype=torch.int64))
            steps.append(y)
    for name, found in (("parallel", parallel), ("stepwise", torch.cat(steps, 1))):
        difference = float((found - wanted).abs().max())
        print(f"{label}, {name}: largest difference {difference:.1e}, largest output {float(wanted.abs().max()):.2f}")
        assert difference < 1e-4


def shake(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups: int) -> None:
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    settings = TheirConfig(
        num_heads=6, head_dim=8, hidden_size=WIDTH, state_size=10, n_groups=groups, expand=2, chunk_size=16, num_hidden_layers=1
    )
    theirs = Mamba2Mixer(settings, layer_idx=0).eval()
    shake(theirs)
    config = Mamba2Config(state=10, head_width=8, groups=groups, eps=settings.layer_norm_epsilon)
    mine: Mamba2 = config.build(width=WIDTH, heads=4)
    copies = {
        mine.into.weight: theirs.in_proj.weight,
        mine.conv.weight: theirs.conv1d.weight[:, 0].T,
        mine.conv.bias: theirs.conv1d.bias,
        mine.step_bias: theirs.dt_bias,
        mine.a_log: theirs.A_log,
        mine.skip: theirs.D,
        mine.gain: theirs.norm.weight,
        mine.out.weight: theirs.out_proj.weight,
    }
    for to, value in copies.items():
        to.copy_(value)
    assert len(copies) == len(list(mine.parameters())) == len(list(theirs.parameters()))
    assert_agree(mine, theirs, 2, 45, f"Mamba-2, {groups} groups")


@torch.no_grad()
def test_gated_deltanet() -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    heads, d, e = 3, 8, 10
    settings = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=d,
        linear_value_head_dim=e,
    )
    theirs = Qwen3NextGatedDeltaNet(settings, layer_idx=0).eval()
    shake(theirs)
    config = GatedDeltaNetConfig(key_width=d, value_width=e, eps=settings.rms_norm_eps)
    mine: GatedDeltaNet = config.build(width=WIDTH, heads=heads)
    parts = theirs.in_proj_qkvz.weight.view(heads, 2 * d + 2 * e, WIDTH).split([d, d, e, e], 1)  # theirs lie head by head
    rates = theirs.in_proj_ba.weight.view(heads, 2, WIDTH)
    copies = {
        mine.into.weight: torch.cat([part.flatten(0, 1) for part in parts]),
        mine.rates.weight: rates.transpose(0, 1).flatten(0, 1),
        mine.conv.weight: theirs.conv1d.weight[:, 0].T,
        mine.step_bias: theirs.dt_bias,
        mine.a_log: theirs.A_log,
        mine.gain: theirs.norm.weight,
        mine.out.weight: theirs.out_proj.weight,
    }
    for to, value in copies.items():
        to.copy_(value)
    assert len(copies) == len(list(mine.parameters())) == len(list(theirs.parameters()))
    assert_agree(mine, theirs, 2, 70, "Qwen3-Next's gated delta rule")


@torch.no_grad()
def test_rwkv4() -> None:
    """A batch of one, whole sequences: theirs cannot decode several rows token by token."""
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=WIDTH, attention_hidden_size=WIDTH, num_hidden_layers=2)).eval()
    mine: Rwkv4 = Rwkv4Config().build(width=WIDTH, heads=4)
    for parameter in mine.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    copies = {
        theirs.time_decay: mine.speed,
        theirs.time_first: mine.bonus,
        theirs.time_mix_receptance: mine.mix[0].view(1, 1, -1),
        theirs.time_mix_key: mine.mix[1].view(1, 1, -1),
        theirs.time_mix_value: mine.mix[2].view(1, 1, -1),
        theirs.receptance.weight: mine.rkv[0].weight,
        theirs.key.weight: mine.rkv[1].weight,
        theirs.value.weight: mine.rkv[2].weight,
        theirs.output.weight: mine.out.weight,
    }
    for to, value in copies.items():
        to.copy_(value)
    assert len(copies) == len(list(theirs.parameters()))
    assert_agree(mine, theirs, 1, 50, "RWKV-4")
