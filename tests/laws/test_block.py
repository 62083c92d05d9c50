"""Blocks without an MLP, and hybrids of which the kernels take a part alone."""

import pytest
import torch

from fewstep.core.mixer import Tree
from fewstep.core.recipe import parse
from fewstep.models.decoder import DecoderConfig
from fewstep.nn.packed import pack

SHAPE = {"vocab": 13, "width": 32, "depth": 3, "query_heads": 4, "init_std": 0.3}


@pytest.mark.parametrize("hidden", [0, 48])
@pytest.mark.parametrize("mixers", [["attention"], ["gau"], ["gau", "attention"], ["mamba2", "attention"]], ids="+".join)
@torch.inference_mode()
def test_packing_changes_no_model(mixers: list[str], hidden: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = parse(DecoderConfig, {**SHAPE, "hidden": hidden, "mixers": [{"kind": kind} for kind in mixers]})
    network = config.build().eval()
    tokens = Tree.chain(torch.randint(13, (2, 9)))
    state = network.init_state(2, 16, device="cpu", dtype=torch.float32)
    plain = network.extend(tokens, state).logits
    torch.testing.assert_close(plain, network.unembed(network(tokens.tokens).final), rtol=1e-3, atol=1e-4)
    pack(network)
    state = network.init_state(2, 16, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(network.extend(tokens, state).logits, plain, rtol=1e-3, atol=1e-4)


def test_a_block_without_an_mlp_has_no_weights_for_one() -> None:
    network = parse(DecoderConfig, {**SHAPE, "hidden": 0}).build()
    assert not any("mlp" in name for name in network.state_dict())
