"""Windowed attention and `transformers`' Longformer agree with the same weights, with and without global tokens."""

import pytest
import torch

from fewstep.core.mixer import Context, Full
from fewstep.nn.mixers.patterns import WindowConfig
from fewstep.nn.mixers.sparse import SparseConfig

pytestmark = pytest.mark.claims
HEADS, WIDTH, LENGTH, REACH = 4, 24, 32, 4


@pytest.mark.parametrize("sinks", [0, 3])
def test_longformer(sinks: int) -> None:
    """Its global tokens see everything through projections of their own; the others see them as ours see sinks."""
    pytest.importorskip("transformers")
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "attention_window": [2 * REACH]}
    theirs = LongformerSelfAttention(LongformerConfig(num_hidden_layers=1, attention_probs_dropout_prob=0.0, **sizes), 0).eval()
    pattern = WindowConfig(window=REACH + 1, sinks=sinks)
    ours = SparseConfig(pattern=pattern, bias=True).build(width=WIDTH, heads=HEADS)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)
        parts = (theirs.query, theirs.key, theirs.value)
        ours.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        ours.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        ours.out.weight.copy_(torch.eye(WIDTH))
        ours.out.bias.zero_()
        x = torch.randn(2, LENGTH, WIDTH)
        is_global = (torch.arange(LENGTH) < sinks).expand(2, -1)
        wanted = theirs(
            x,
            attention_mask=torch.where(is_global, 10000.0, 0.0),
            is_index_masked=torch.zeros(2, LENGTH, dtype=torch.bool),
            is_index_global_attn=is_global,
            is_global_attn=sinks > 0,
        )[0]
        got, _ = ours(x, Context(torch.arange(LENGTH).expand(2, -1), mask=Full()))
    difference = float((got - wanted)[:, sinks:].abs().max())
    print(f"longformer, {sinks} global: {difference:.1e}, largest output {float(wanted.abs().max()):.2f}")
    assert difference < 1e-4
