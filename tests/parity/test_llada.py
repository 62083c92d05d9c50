"""LLaDA's layout: a tiny checkpoint made here in its names, its network written out anew, in and out without a bit lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.mixer import Full
from fewstep.core.random import CounterRng
from fewstep.decode.readers import reader_of
from fewstep.decode.unmask import canvas_of, fill
from fewstep.diffusion.corruptions import AbsorbingConfig
from fewstep.diffusion.orders.ranked import ConfidenceConfig
from fewstep.hub.load import load
from fewstep.hub.save import save_hf
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model

WIDTH, LAYERS, HEADS, HIDDEN, VOCAB, MASK = 32, 3, 4, 48, 40, 37
CONFIG: dict[str, Any] = {  # the keys of the published 8B configuration that say something about the network
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_size": VOCAB,
    "eos_token_id": 36,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": MASK,
    "max_sequence_length": 64,
    "mlp_hidden_size": HIDDEN,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 36,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}


def checkpoint(directory: Path, seed: int, **changed: Any) -> dict[str, Tensor]:
    """A checkpoint in LLaDA's names and its tensors."""
    config, draw = {**CONFIG, **changed}, torch.Generator().manual_seed(seed)
    kv_width = WIDTH // HEADS * (config["n_kv_heads"] or HEADS)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) * columns**-0.5

    def gain() -> Tensor:
        return 1 + 0.3 * torch.randn(WIDTH, generator=draw)

    tensors = {"wte": matrix(VOCAB, WIDTH) * 5, "ln_f": gain(), "ff_out": matrix(VOCAB, WIDTH)}
    for i in range(LAYERS):
        block = {
            "attn_norm": gain(),
            "q_proj": matrix(WIDTH, WIDTH),
            "k_proj": matrix(kv_width, WIDTH),
            "v_proj": matrix(kv_width, WIDTH),
            "attn_out": matrix(WIDTH, WIDTH),
            "ff_norm": gain(),
            "ff_proj": matrix(HIDDEN, WIDTH),
            "up_proj": matrix(HIDDEN, WIDTH),
            "ff_out": matrix(WIDTH, HIDDEN),
        }
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    named = {f"model.transformer.{name}.weight": tensor for name, tensor in tensors.items()}
    directory.mkdir(parents=True)
    save_file(named, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return named


def logits_of(tensors: dict[str, Tensor], ids: list[int], kv_heads: int = HEADS) -> Tensor:
    """[T,V] by the paper alone, in float64, position by position: pre-norm, rotary halves, no causal mask, SwiGLU."""

    def weight(name: str) -> Tensor:
        return tensors[f"model.transformer.{name}.weight"].double()

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    size = WIDTH // HEADS
    speed = 500000.0 ** (-torch.arange(0, size, 2).double() / size)

    def turned(head: Tensor, place: int) -> Tensor:
        pairs = torch.complex(head[: size // 2], head[size // 2 :]) * torch.polar(torch.ones(size // 2).double(), place * speed)
        return torch.cat([pairs.real, pairs.imag])

    x = weight("wte")[ids]
    for i in range(LAYERS):
        own = f"blocks.{i}."
        h = normed(x, weight(own + "attn_norm"))
        q, k, v = (h @ weight(f"{own}{part}_proj").T for part in "qkv")
        mixed = torch.zeros_like(q)
        for head in range(HEADS):
            mine, shared = slice(head * size, (head + 1) * size), head * kv_heads // HEADS
            theirs = slice(shared * size, (shared + 1) * size)
            keys = torch.stack([turned(key, place) for place, key in enumerate(k[:, theirs])])
            for place, query in enumerate(q[:, mine]):
                seen = (keys @ turned(query, place) / size**0.5).softmax(0)
                mixed[place, mine] = seen @ v[:, theirs]
        x = x + mixed @ weight(own + "attn_out").T
        h = normed(x, weight(own + "ff_norm"))
        gate = h @ weight(own + "ff_proj").T
        x = x + (gate * gate.sigmoid() * (h @ weight(own + "up_proj").T)) @ weight(own + "ff_out").T
    return normed(x, weight("ln_f")) @ weight("ff_out").T


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@torch.no_grad()
def test_logits_are_those_of_the_network_written_out(kv_heads: int, tmp_path: Path, seed: int) -> None:
    tensors = checkpoint(tmp_path / "llada", seed, n_kv_heads=kv_heads)
    model = load(tmp_path / "llada", dtype="float64", packed=False)
    ids = torch.randint(VOCAB, (9,)).tolist()
    found = model.network.unembed(model.network(torch.tensor([ids]), mask=Full()).final)[0]
    torch.testing.assert_close(found, logits_of(tensors, ids, kv_heads), rtol=1e-5, atol=1e-5)
    assert (model.network.mask_token, model.eos_ids) == (MASK, (36,))


def test_what_is_read_is_written_bit_for_bit(tmp_path: Path, seed: int) -> None:
    tensors = checkpoint(tmp_path / "llada", seed)
    save_hf(load(tmp_path / "llada", packed=False), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == CONFIG


def test_a_decoder_of_our_own_with_a_mask_is_written_in_its_words(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    fields = {"vocab": VOCAB, "width": WIDTH, "depth": 2, "query_heads": 4, "hidden": 24, "mask_token": 0, "max_positions": 50}
    own = Model(DecoderConfig(**fields).build(), None, {"name": "own"})
    save_hf(own, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    said = {name: values[name] for name in ("model_type", "block_type", "vocab_size", "mask_token_id", "weight_tying", "rope")}
    assert said == {
        "model_type": "llada",
        "block_type": "llama",
        "vocab_size": VOCAB,
        "mask_token_id": 0,
        "weight_tying": True,
        "rope": True,
    }
    found = load(tmp_path / "out", packed=False).network
    assert found.mask_token == 0
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in own.network.state_dict().items())


def test_gaps_are_filled(tmp_path: Path, seed: int) -> None:
    checkpoint(tmp_path / "llada", seed)
    network = load(tmp_path / "llada").network
    canvas = canvas_of([[1, 2, None, None, 3, None]], VOCAB, network.mask_token)
    grid = torch.linspace(1, 0, 4, dtype=torch.float64)
    corruption = AbsorbingConfig().build(VOCAB, network.mask_token)
    made = fill(reader_of(network, canvas), corruption, ConfidenceConfig().build(), grid, canvas, CounterRng.seeded([seed]))[0]
    assert len(made.tokens) == 6 and MASK not in made.tokens and made.cost.calls == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_type": "sequential"}, "block_type='sequential': not supported; fewstep has 'llama'"),
        ({"alibi": True}, "alibi=True: not supported; fewstep has False"),
        ({"layer_norm_type": "low_precision"}, "layer_norm_type='low_precision': not supported; fewstep has 'rms'"),
        ({"activation_type": "gelu"}, "activation_type='gelu': not supported; fewstep has silu"),
        ({"mask_token_id": VOCAB}, f"mask_token={VOCAB}: outside 0..{VOCAB - 1}"),
        ({"mask_token_id": None}, "mask_token_id=None: expected a whole number"),
        ({"d_model": WIDTH * 2}, "the weights belong to another config"),
    ],
)
def test_what_it_cannot_be_is_refused_in_one_line(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "llada", 0)
    (tmp_path / "llada" / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        load(tmp_path / "llada")
