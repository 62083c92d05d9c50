"""What claims about samplers are measured on: mixtures with a known denoiser and small networks trained on points.

All networks of a run have the same size and training but for what the claim varies. This file knows no claim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Recipe
from fewstep.decode.denoise import sample, start
from fewstep.models.denoiser import Denoiser
from fewstep.recipes import SECTIONS
from fewstep.recipes.run import train
from fewstep.report.claims.claim import Bench

_BATCH, _RATE = 512, 2e-3


def trained(bench: Bench, law: str, steps: int, parts: Mapping[str, Any]) -> Denoiser:
    """A network of points after `steps` steps on fresh points of `law`; `parts` of the model: process and parameterisation."""
    seed = bench.effort.seed
    values = {
        "model": {"kind": "denoiser", "shape": [2], "backbone": {"kind": "points", "width": 128, "depth": 3}, **parts},
        "data": {"kind": "points", "density": law},
        "objective": {"kind": "denoising"},
        "optim": {"kind": "adamw", "lr": _RATE, "weight_decay": 0.0},
        "schedule": {"kind": "cosine"},
        "budget": {"steps": steps},
        "run": {"batch": _BATCH, "seed": seed, "ema": 0.99, "validate_every": 0, "checkpoint_steps": 0, "checkpoint_seconds": 0},
    }
    recipe = Recipe.from_values(f"{law}-{parts['process']['kind']}-{steps}", values, registries=SECTIONS)
    bench.console.print(f"training a denoiser of {law} for {steps} steps")
    model = train(recipe, directory=bench.scratch / recipe.name, console=bench.console).model
    assert isinstance(model, Denoiser)
    return model.eval()


def arrive(denoiser: Denoise, process: Process, solver: Solver[Any], grid: Tensor, eps: Tensor, seed: int = 0) -> Tensor:
    """x / alpha at the end of `grid` from unit noise `eps` [B, ...] at its start, a row's own draws from `seed` on."""
    x = process.sigma(grid[0]).to(eps.dtype) * eps
    found = sample(denoiser, process, solver, grid, x, CounterRng.seeded(range(seed, seed + len(eps)))).payload.x
    return found / process.alpha(grid[-1]).to(eps.dtype)


def drawn(
    denoiser: Denoise, process: Process, solver: Solver[Any], grid: Tensor, count: int, seed: int, dtype: torch.dtype
) -> Tensor:
    """`count` samples of points in the plane."""
    rng = CounterRng.seeded(range(seed, seed + count))
    return sample(denoiser, process, solver, grid, start(process, grid, (2,), rng, dtype), rng).payload.x
