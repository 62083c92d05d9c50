"""The live `transformers` and fewstep compute the same Mamba from the same weights: whole passes, prompts, steps behind them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.nn.mixers.mamba import Mamba, MambaConfig

pytestmark = pytest.mark.claims
WIDTH, DEPTH, PROMPT, COUNT = 24, 2, 70, 78


def taken_from(theirs: Any, config: MambaConfig) -> Mamba:
    mine = config.build(width=WIDTH, heads=4)
    copies = {
        mine.into.weight: theirs.in_proj.weight,
        mine.conv.weight: theirs.conv1d.weight[:, 0].T,
        mine.conv.bias: theirs.conv1d.bias,
        mine.select.weight: theirs.x_proj.weight,
        mine.step: theirs.dt_proj.weight,
        mine.step_bias: theirs.dt_proj.bias,
        mine.a_log: theirs.A_log,
        mine.skip: theirs.D,
        mine.out.weight: theirs.out_proj.weight,
    }
    for to, value in copies.items():
        assert to is not None
        to.copy_(value)
    assert len(copies) == len(list(mine.parameters())) == len(list(theirs.parameters()))
    return mine


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"state": 5, "conv": 3, "rank": 7, "expand": 3}])
def test_a_tiny_model(fields: dict[str, int]) -> None:
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaModel

    config = MambaConfig(**fields)
    settings = TheirConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        state_size=config.state,
        conv_kernel=config.conv,
        expand=config.expand,
        time_step_rank=config.rank or "auto",
    )
    theirs = MambaModel(settings).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    mixers = [taken_from(block.mixer, config) for block in theirs.layers]
    states: list[Any] = [mixer.init_state(2, COUNT, device="cpu", dtype=torch.float32) for mixer in mixers]

    def through(tokens: Tensor, cached: bool) -> Tensor:
        x, count = theirs.embeddings(tokens), tokens.shape[1]
        for i, (block, mixer) in enumerate(zip(theirs.layers, mixers, strict=True)):
            if cached:
                y, state = mixer.extend(block.norm(x), Context(), states[i])
                path = torch.arange(count).expand(2, -1)
                states[i] = state.commit(path, torch.full((2,), count))
            else:
                y, _ = mixer(block.norm(x), Context(torch.arange(count).expand(2, -1)))
            x = x + y
        return theirs.norm_f(x)

    tokens = torch.randint(50, (2, COUNT))
    pieces = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, 1)]
    decoded = torch.cat([through(piece, cached=True) for piece in pieces], 1)
    cache, steps = None, []
    for piece in pieces:
        output = theirs(piece, cache_params=cache, use_cache=True)
        cache = output.cache_params
        steps.append(output.last_hidden_state)
    whole = theirs(tokens).last_hidden_state
    compared = {"parallel": (through(tokens, cached=False), whole), "prompt and steps": (decoded, torch.cat(steps, 1))}
    for name, (found, wanted) in compared.items():
        difference = float((found - wanted).abs().max())
        print(f"Mamba, {name}: largest difference {difference:.1e}, largest output {float(wanted.abs().max()):.2f}")
        assert difference < 1e-4
