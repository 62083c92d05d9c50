"""Multi-head latent attention (arXiv 2405.04434): the two forms of one score, what is cached, and its claim."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.nn.mixers.mla import MLA, MLAConfig
from fewstep.nn.position import RopeConfig
from fewstep.nn.position.shaw import ShawConfig
from fewstep.report.claims import CLAIMS

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
HEADS, WIDTH = 4, 24
CONFIG = MLAConfig(latent=10, query_latent=7, content_width=6, rotary_width=4, value_width=5)


def made(config: MLAConfig = CONFIG) -> MLA:
    return config.build(width=WIDTH, heads=HEADS, position=RopeConfig(base=50.0).build(head_width=4)).double()


def by_definition(mixer: MLA, x: Tensor) -> Tensor:
    """Equations 37 to 47 of the appendix, head by head and token by token."""
    n, r, e = mixer.content, mixer.rotary, mixer.value
    positions = torch.arange(x.shape[0])
    c_kv, k_r = (x @ mixer.kv_down.weight.T).split([mixer.latent, r], -1)
    c_kv = c_kv / (c_kv.square().mean(-1, keepdim=True) + mixer.config.eps).sqrt()
    c_q = x @ mixer.q_down.weight.T
    c_q = c_q / (c_q.square().mean(-1, keepdim=True) + mixer.config.eps).sqrt()
    outputs = []
    for head in range(HEADS):
        w_q = mixer.q.weight[head * (n + r) : (head + 1) * (n + r)]
        w_kv = mixer.kv_up[head * (n + e) : (head + 1) * (n + e)]
        q_n, q_r = (c_q @ w_q.T).split([n, r], -1)
        k_n, v = (c_kv @ w_kv.T).split([n, e], -1)
        turned_q, turned_k = mixer.position.rotate(q_r[None, None], k_r[None, None], positions[None], positions[None], {})
        scores = (q_n @ k_n.T + turned_q[0, 0] @ turned_k[0, 0].T) / math.sqrt(n + r)
        scores = scores.masked_fill(positions > positions[:, None], -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1) @ mixer.out.weight.T


def test_is_the_papers_attention() -> None:
    mixer, x = made(), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    y, _ = mixer(x, Context(torch.arange(9).expand(2, -1)))
    torch.testing.assert_close(y, torch.stack([by_definition(mixer, row) for row in x]), **TIGHT)


@pytest.mark.parametrize("value_width", [3, 5, 10, 13])
def test_absorbed_equals_materialised(value_width: int) -> None:
    """Any mask, values narrower, as wide as and wider than keys, with gradients."""
    mixer = made(CONFIG.model_copy(update={"value_width": value_width}))
    q = torch.randn(2, HEADS, 5, 10, dtype=torch.float64, requires_grad=True)
    cache = torch.randn(2, 1, 7, 14, dtype=torch.float64, requires_grad=True)
    visible = (torch.rand(2, 1, 5, 7) < 0.6) | torch.eye(5, 7, dtype=torch.bool)
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)
    both = [mixer.absorbed(q, cache, visible), mixer.materialised(q, cache, bias)]
    torch.testing.assert_close(*both, **TIGHT)
    weight = torch.randn_like(both[0])
    gradients = [torch.autograd.grad((y * weight).sum(), (q, cache, mixer.kv_up)) for y in both]
    torch.testing.assert_close(*gradients, **TIGHT)


def test_a_long_extend_over_a_cache_expands_it_and_a_short_one_does_not() -> None:
    """Both are taken, by what they cost, and agree with the whole."""
    mixer, x = made(), torch.randn(1, 40, WIDTH, dtype=torch.float64)
    whole, _ = mixer(x, Context(torch.arange(40).expand(1, -1)))
    assert mixer.absorbs(4) and not mixer.absorbs(30)
    for start in (36, 10):
        state = mixer.init_state(1, 40, device="cpu", dtype=torch.float64)
        _, state = mixer.extend(x[:, :start], Context(), state)
        end, _ = mixer.extend(x[:, start:], Context(), state)
        torch.testing.assert_close(end, whole[:, start:], **TIGHT)


def test_one_tensor_is_cached_the_normed_latent_and_the_turned_key() -> None:
    mixer, x = made(), torch.randn(1, 3, WIDTH, dtype=torch.float64)
    _, state = mixer.extend(x, Context(), mixer.init_state(1, 3, device="cpu", dtype=torch.float64))
    assert state.cache.shape == (1, 1, 3, 10 + 4)
    latent, key = state.cache.split([10, 4], -1)
    torch.testing.assert_close(latent.square().mean(-1), torch.ones(1, 1, 3, dtype=torch.float64), rtol=1e-4, atol=0)
    unturned = mixer.kv_down(x)[..., 10:]
    torch.testing.assert_close(key[0, 0].norm(dim=-1), unturned[0].norm(dim=-1), **TIGHT)
    assert (key[0, 0] - unturned[0]).abs().amax(-1)[1:].min() > 1e-6


def test_the_claim_about_the_cache() -> None:
    claim = CLAIMS["mla-cache"]
    findings = list(claim.measure(cast(Any, SimpleNamespace(effort=SimpleNamespace(seed=0)))))
    assert [finding.criterion for finding in findings] == list(claim.criteria)
    assert findings[0].value == 576 / (2 * 128 * 128) and findings[1].value == 2.25
    assert all(finding.verdict == "reproduced" for finding in findings)


def test_what_it_cannot_honour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^position='shaw': mla has no softmax weights [^\n]*$"):
        CONFIG.build(width=WIDTH, heads=HEADS, position=ShawConfig().build(head_width=4, heads=HEADS))
    with pytest.raises(ValueError, match=r"^heads=5: must divide width=24; [^\n]*$"):
        MLAConfig().build(width=24, heads=5)
    MLAConfig(content_width=4, rotary_width=4, value_width=4).build(width=24, heads=5)
