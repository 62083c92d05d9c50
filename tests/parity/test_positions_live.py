"""One layer of attention with a position encoding, against the live `transformers` of each paper's model, in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.mixer import Causal, Context, Full, Mask
from fewstep.nn.mixers.attention import Attention, AttentionConfig
from fewstep.nn.position import POSITIONS
from fewstep.nn.position.rope import RotaryConfig

pytestmark = pytest.mark.claims
WIDTH, HEADS, BATCH, TOKENS = 48, 6, 2, 40
HEAD = WIDTH // HEADS
CLOSE = {"rtol": 0, "atol": 1e-4}


def layer(kind: str, *, bias: bool = False, **fields: Any) -> Attention:
    """Attention with the encoding `kind`, everything away from its start."""
    position: Any = POSITIONS[kind](**fields)
    made = position.build(head_width=HEAD, width=WIDTH, heads=HEADS)
    return AttentionConfig(bias=bias, out_bias=bias).build(width=WIDTH, heads=HEADS, position=made).eval()


def shaken(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def give(mine: Attention, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Weights [H E,D] of the projections and [D,H E] of the output."""
    with torch.no_grad():
        mine.qkv.weight.copy_(torch.cat([q, k, v]))
        mine.out.weight.copy_(out)


def give_biases(mine: Attention, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    with torch.no_grad():
        assert mine.qkv.bias is not None and mine.out.bias is not None
        mine.qkv.bias.copy_(torch.cat([q, k, v]))
        mine.out.bias.copy_(out)


def run(mine: Attention, x: Tensor, mask: Mask) -> Tensor:
    y, _ = mine(x, Context(torch.arange(x.shape[1]).expand(x.shape[0], -1), mask=mask))
    return y


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def unseen() -> Tensor:
    """[1,1,T,T] additive causal mask."""
    return torch.full((TOKENS, TOKENS), -1e9).triu(1)[None, None]


def assert_agree(mine: Tensor, theirs: Tensor, label: str) -> None:
    print(f"{label}: largest difference {(mine - theirs).abs().max():.1e} of {theirs.abs().max():.1f}")
    torch.testing.assert_close(mine, theirs, **CLOSE)


@torch.no_grad()
def test_roformer() -> None:
    from transformers import RoFormerConfig
    from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention, RoFormerSinusoidalPositionalEmbedding

    theirs = shaken(RoFormerSelfAttention(RoFormerConfig(hidden_size=WIDTH, num_attention_heads=HEADS)))
    table = RoFormerSinusoidalPositionalEmbedding(TOKENS, HEAD)
    table.weight.copy_(table.create_weight())
    x, mine = inputs(), layer("rope_partial", bias=True, share=1.0)
    give(mine, theirs.query.weight, theirs.key.weight, theirs.value.weight, torch.eye(WIDTH))
    give_biases(mine, theirs.query.bias, theirs.key.bias, theirs.value.bias, torch.zeros(WIDTH))
    wanted = theirs(x, sinusoidal_pos=table((BATCH, TOKENS))[None, None])[0]
    assert_agree(run(mine, x, Full()), wanted, "RoFormer, adjacent pairs")


@torch.no_grad()
def test_gpt_j() -> None:
    from transformers import GPTJConfig
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    config = GPTJConfig(n_embd=WIDTH, n_head=HEADS, rotary_dim=4, n_positions=64)
    theirs = shaken(GPTJAttention(config, 0))
    x, mine = inputs(), layer("rope_partial", share=4 / HEAD)
    give(mine, theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight, theirs.out_proj.weight)
    wanted = theirs(x, position_ids=torch.arange(TOKENS).expand(BATCH, -1), attention_mask=unseen())[0]
    assert_agree(run(mine, x, Causal()), wanted, "GPT-J, adjacent pairs of a part")


@torch.no_grad()
def test_gpt_neox() -> None:
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = GPTNeoXConfig(hidden_size=WIDTH, num_attention_heads=HEADS, rope_parameters=rope)
    config._attn_implementation = "eager"
    theirs, angles = shaken(GPTNeoXAttention(config, 0)), GPTNeoXRotaryEmbedding(config)
    x, mine = inputs(), layer("rope_partial", bias=True, share=0.5, layout="half")
    q, k, v = theirs.query_key_value.weight.view(HEADS, 3, HEAD, WIDTH).unbind(1)
    give(mine, *(part.flatten(0, 1) for part in (q, k, v)), theirs.dense.weight)
    biases = theirs.query_key_value.bias.view(HEADS, 3, HEAD).unbind(1)
    give_biases(mine, *(part.flatten() for part in biases), theirs.dense.bias)
    places = angles(x, torch.arange(TOKENS).expand(BATCH, -1))
    wanted = theirs(x, attention_mask=unseen(), position_embeddings=places)[0]
    assert_agree(run(mine, x, Causal()), wanted, "GPT-NeoX, half-split pairs of a part")


@torch.no_grad()
@pytest.mark.parametrize("decoder", [True, False])
def test_t5(decoder: bool) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=WIDTH, d_kv=HEAD, num_heads=HEADS, is_decoder=decoder, relative_attention_max_distance=20)
    config._attn_implementation = "eager"
    theirs = shaken(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))
    x, mine = inputs(), layer("t5", farthest=20, bidirectional=not decoder)
    give(mine, theirs.q.weight * HEAD**0.5, theirs.k.weight, theirs.v.weight, theirs.o.weight)  # T5 does not scale scores
    mine.position.embedding.copy_(theirs.relative_attention_bias.weight)
    bias = theirs.compute_bias(TOKENS, TOKENS) + (unseen() if decoder else 0)
    wanted = theirs(x, position_bias=bias)[0]
    assert_agree(run(mine, x, Causal() if decoder else Full()), wanted, f"T5, decoder={decoder}")


@torch.no_grad()
def test_bloom() -> None:
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    theirs = shaken(BloomAttention(BloomConfig(hidden_size=WIDTH, n_head=HEADS), 0))
    x, mine = inputs(), layer("alibi", bias=True)
    q, k, v = theirs.query_key_value.weight.view(HEADS, 3, HEAD, WIDTH).unbind(1)
    give(mine, *(part.flatten(0, 1) for part in (q, k, v)), theirs.dense.weight)
    biases = theirs.query_key_value.bias.view(HEADS, 3, HEAD).unbind(1)
    give_biases(mine, *(part.flatten() for part in biases), theirs.dense.bias)
    slopes = build_alibi_tensor(torch.ones(BATCH, TOKENS, dtype=torch.int64), HEADS, torch.float32)
    wanted = theirs(x, torch.zeros_like(x), slopes, unseen())[0]
    assert_agree(run(mine, x, Causal()), wanted, "BLOOM")


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_xlnet(causal: bool) -> None:
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(vocab_size=4, d_model=WIDTH, n_layer=1, n_head=HEADS, d_inner=8, attn_type="uni" if causal else "bi")
    model = shaken(XLNetModel(config))
    theirs = model.layer[0].rel_attn
    x, mine = inputs(), layer("transformer_xl")
    q, k, v, o, r = (getattr(theirs, name).flatten(1) for name in "qkvor")
    give(mine, q.T, k.T, v.T, o)
    mine.position.distance.weight.copy_(r.T)
    mine.position.content_bias.copy_(theirs.r_w_bias.flatten())
    mine.position.distance_bias.copy_(theirs.r_r_bias.flatten())
    waves = model.relative_positional_encoding(TOKENS, TOKENS, bsz=BATCH)
    hidden = torch.ones(TOKENS, TOKENS).triu(1)[:, :, None, None].expand(-1, -1, BATCH, 1) if causal else None
    h = x.transpose(0, 1)
    heads = [torch.einsum("ibh,hnd->ibnd", value, weight) for value, weight in ((h, theirs.q), (h, theirs.k), (h, theirs.v))]
    mixed = theirs.rel_attn_core(*heads, torch.einsum("ibh,hnd->ibnd", waves, theirs.r), attn_mask=hidden)
    wanted = torch.einsum("ibnd,hnd->ibh", mixed, theirs.o).transpose(0, 1)
    assert_agree(run(mine, x, Causal() if causal else Full()), wanted, f"XLNet, causal={causal}")


@torch.no_grad()
@pytest.mark.parametrize("reach", [7, 64])
def test_deberta(reach: int) -> None:
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention, build_relative_position

    fields = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": reach}
    config = DebertaConfig(hidden_size=WIDTH, num_attention_heads=HEADS, hidden_dropout_prob=0.0, **fields)
    theirs = shaken(DisentangledSelfAttention(config))
    x, mine, table = inputs(), layer("deberta", bias=True, reach=reach), torch.randn(2 * reach, WIDTH)
    q, k, v = theirs.in_proj.weight.view(HEADS, 3, HEAD, WIDTH).unbind(1)
    give(mine, *(part.flatten(0, 1) for part in (q, k, v)), torch.eye(WIDTH))
    give_biases(mine, theirs.q_bias, torch.zeros(WIDTH), theirs.v_bias, torch.zeros(WIDTH))
    mine.position.embedding.copy_(table)
    mine.position.key.weight.copy_(theirs.pos_proj.weight)
    mine.position.query.load_state_dict(theirs.pos_q_proj.state_dict())
    places = build_relative_position(x, x)
    everything = torch.ones(1, 1, TOKENS, TOKENS)
    wanted = theirs(x, everything, relative_pos=places, rel_embeddings=table)[0]
    assert_agree(run(mine, x, Full()), wanted, f"DeBERTa, reach {reach}")


ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "yarn": ("yarn", {"factor": 4.0, "trained_length": 64}, {"factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn, other ramp": (
        "yarn",
        {"factor": 40.0, "trained_length": 4096, "slow": 0.5, "fast": 20.0, "attention": 0.9},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_slow": 0.5, "beta_fast": 20.0, "attention_factor": 0.9},
    ),
    "linear": ("rope", {"scaling": "linear", "factor": 3.0}, {"factor": 3.0}),
}


def scaled(kind: str, fields: dict[str, Any], length: int | None = None) -> tuple[Tensor, float]:
    """What `transformers` computes: frequencies and the factor of cos and sin, for heads of 64."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": 10000.0, **fields}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope)
    given: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    return given(config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("name", ROPES)
def test_scaled_frequencies(name: str) -> None:
    kind, fields, their_fields = ROPES[name]
    config: Any = POSITIONS[kind](**fields)
    assert isinstance(config, RotaryConfig)
    frequencies, factor = scaled(name.split(",")[0], their_fields)
    torch.testing.assert_close(config.frequencies(64, torch.device("cpu"), torch.float32), frequencies, rtol=1e-5, atol=1e-8)
    assert config.amplitude == pytest.approx(factor)


@pytest.mark.parametrize("length", [10, 64, 65, 300])
def test_dynamic_frequencies(length: int) -> None:
    config: Any = POSITIONS["dynamic_ntk"](factor=2.0, trained_length=64)
    frequencies, _ = scaled("dynamic", {"factor": 2.0}, length)
    mine = config.build(head_width=64).frequencies(length, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(mine, frequencies, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_a_long_prompts_last_token_with_dynamic_frequencies() -> None:
    """All of theirs turn by the base of the whole prompt, of ours the last query and its keys do; so the last outputs agree."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=16, rope_parameters=rope
    )
    config._attn_implementation = "eager"
    theirs, angles = shaken(LlamaAttention(config, 0)), LlamaRotaryEmbedding(config)
    position: Any = POSITIONS["dynamic_ntk"](factor=2.0, trained_length=16)
    mine = AttentionConfig(kv_heads=2).build(width=WIDTH, heads=HEADS, position=position.build(head_width=HEAD)).eval()
    give(mine, theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight, theirs.o_proj.weight)
    x = inputs()
    places = angles(x, torch.arange(TOKENS).expand(BATCH, -1))
    wanted = theirs(x, position_embeddings=places, attention_mask=unseen())[0]
    ours = run(mine, x, Causal())
    assert_agree(ours[:, -1], wanted[:, -1], "dynamic NTK, last token")
    assert (ours[:, 20] - wanted[:, 20]).abs().max() > 1e-3
