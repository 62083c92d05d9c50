"""Consistency models: a network whose estimate is the same all along a path of the ODE, by a teacher's steps or without one."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.core.objective import Batch, Loss
from fewstep.core.process import Process
from fewstep.core.random import Rng
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.parameterisations import ConsistencyConfig
from fewstep.diffusion.processes import diffuse, ratio
from fewstep.diffusion.solvers import SOLVERS
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.models.denoiser import Denoiser
from fewstep.training.objectives.rows import labels, part


@final
class ConsistencyObjectiveConfig(Config):
    """The distance between the estimates at both ends of a step along a grid; the later, cleaner end is the target.

    The grid has `steps` steps, uniform in (sigma / alpha)^(1 / `rho`), and twice as many every `double_every` training steps up
    to `most` (0: never). With a teacher its one step of `solver` leads to the cleaner end (distillation), without one the same
    noise does (training). `times`: which step, all alike or by a log of sigma / alpha normal around `location` with deviation
    `spread`.
    The target is the average of the student's weights with `decay`, or the student as it is (0).
    """

    kind: ClassVar[str] = "consistency"
    source: ClassVar[str] = (
        "Song et al. 2023, arXiv 2303.01469, algorithms 2 and 3; doubling, pseudo-Huber: Song and Dhariwal 2023, arXiv 2310.14189"
    )
    claims: ClassVar[tuple[str, ...]] = ("few-step-digits",)

    steps: int = Field(default=17, ge=2)
    most: int = Field(default=1280, ge=2)
    double_every: int = Field(default=0, ge=0)
    rho: float = Field(default=7.0, ge=1)
    times: Literal["uniform", "log-normal"] = "uniform"
    location: float = -1.1
    spread: float = Field(default=2.0, gt=0)
    solver: choice(lambda: SOLVERS, "solver") = HeunConfig()  # type: ignore[valid-type]
    distance: Literal["square", "pseudo-huber"] = "square"
    decay: float = Field(default=0.95, ge=0, lt=1)
    unlabelled: float = Field(default=0.0, ge=0, le=1)

    def build(self, teacher: Denoiser | None = None) -> "Consistency":
        """`teacher`: whom the student learns from; None: from the data alone."""
        return Consistency(self, teacher)

    def drawn(self, process: Process, grid: Tensor, uniform: Tensor) -> Tensor:
        """The number [B] of a step of `grid` [K+1], from uniform numbers [B] of [0, 1)."""
        steps = len(grid) - 1
        if self.times == "uniform":
            return (uniform * steps).long()
        edges = (ratio(process, grid).log() - self.location) / self.spread
        mass = torch.special.ndtr(edges[:-1]) - torch.special.ndtr(edges[1:])
        return torch.searchsorted(mass.cumsum(0) / mass.sum(), uniform, right=True).clamp(max=steps - 1)


@final
class Consistency:
    """Reads what denoising reads; the student's parameterisation is "consistency", so that it says x / alpha at the least noise.

    State: the averaged weights and the number of training steps. Cost: two passes of the backbone, one backward, and the
    teacher's step. Raises ValueError for another parameterisation, or a stochastic solver.
    """

    def __init__(self, config: ConsistencyObjectiveConfig, teacher: Denoiser | None) -> None:
        self.config, self._teacher, self._solver = config, teacher, cast(Any, config.solver).build()
        if self._solver.stochastic:
            raise ValueError(f"objective.solver={config.solver.kind!r}: adds noise; choose a deterministic one")
        self._steps, self._average = 0, dict[str, Tensor]()

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        student, process = cast(Denoiser, model), cast(Denoiser, model).process
        x_0 = student.normed(part(batch, "x"))
        label = labels(student, batch, self.config.unlabelled, rng)
        grid = self._grid(student).to(x_0.device)
        i = self.config.drawn(process, grid, rng.split("time").uniform())
        pair, eps = torch.stack((grid[i], grid[i + 1]), 1), process.noise(x_0.shape[1:], rng.split("noise"))
        x_t = diffuse(process, x_0, pair[:, 0], eps)
        with torch.no_grad():
            x_s = self._cleaner(x_t, diffuse(process, x_0, pair[:, 1], eps), process, pair, label, rng)
            average = {name: weight.to(x_0.device) for name, weight in self._average.items()}
            wanted: Tensor = functional_call(student, average, (x_s, pair[:, 1], label))
        off = (student(x_t, pair[:, 0], label) - wanted).square().flatten(1)
        value = self._distance(off, ratio(process, pair)).mean()
        return Loss(value, len(x_0), {"consistency": off.detach().mean(), "steps": torch.tensor(float(len(grid) - 1))})

    def after_step(self, model: nn.Module) -> None:
        """Move the target."""
        self._steps += 1
        if not self.config.decay:
            return
        for name, weight in model.named_parameters():
            mean = self._average.get(name, weight.detach()).to(weight.device)
            self._average[name] = torch.lerp(weight.detach(), mean, self.config.decay)

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Nothing to learn from it."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != {"steps", "average"}:
            raise ValueError(
                f"objective state {sorted(state)}: consistency keeps 'average' and 'steps'; the checkpoint is another objective's"
            )
        self._steps, self._average = state["steps"], dict(state["average"])

    def _grid(self, student: Denoiser) -> Tensor:
        """[K+1] times from noise to the least noise of the parameterisation."""
        parameterisation, config = student.parameterisation, self.config
        if not isinstance(parameterisation, ConsistencyConfig):
            raise ValueError(
                f"model.parameterisation={parameterisation.kind!r}: says nothing definite at the least noise; set 'consistency'"
            )
        doublings = self._steps // config.double_every if config.double_every else 0
        steps = min(config.steps << min(doublings, 32), max(config.most, config.steps))
        every = KarrasConfig(rho=config.rho, least=parameterisation.sigma_min, to_zero=False)
        return every.build(student.process, steps)

    def _cleaner(self, x_t: Tensor, other: Tensor, process: Process, pair: Tensor, label: Tensor | None, rng: Rng) -> Tensor:
        """x at the cleaner end of each row's step: where the teacher leads, or `other`, which has the noise of x_t."""
        if self._teacher is None:
            return other
        memory = self._solver.init(x_t, process, pair)
        x_s: Tensor = self._solver.step(self._teacher.denoiser(label, process), x_t, 0, memory, rng)[0]
        return x_s

    def _distance(self, off: Tensor, ratios: Tensor) -> Tensor:
        """[B] of squared differences [B,d]."""
        if self.config.distance == "square":
            return off.mean(1)
        small = 0.00054 * off.shape[1] ** 0.5
        return (torch.sqrt(off.sum(1) + small**2) - small) / (ratios[:, 0] - ratios[:, 1]).to(off)
