"""Denoisers taught by a trained one: what a run reads from the teacher, how the student begins, what it learns from.

This file knows which data and objectives want a teacher, and nothing of how they use it.
"""

from pathlib import Path
from typing import Any, ClassVar, cast, final

from rich.console import Console
from rich.progress import Progress

from fewstep.core.objective import Objective
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.parameterisations import PARAMETERISATIONS
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.data.arrays import Arrays, ArraysConfig
from fewstep.training.data.coupling import CouplingConfig, couple
from fewstep.training.objectives.consistency import ConsistencyObjectiveConfig


@final
class StudentConfig(Config):
    """A denoiser like the `teacher`, a run's folder or a model's, that begins with its weights.

    `parameterisation`: what the student's output means, if not what the teacher's does. What is saved is a denoiser, which needs
    no teacher.
    """

    kind: ClassVar[str] = "student"
    source: ClassVar[str] = "Liu et al. 2023, arXiv 2209.03003; Song et al. 2023, arXiv 2303.01469"

    teacher: str = "runs/points-flow-matching"
    parameterisation: choice(lambda: PARAMETERISATIONS, "parameterisation") | None = None  # type: ignore[valid-type]

    def like(self, teacher: Denoiser) -> DenoiserConfig:
        """The student's own config."""
        update = {} if self.parameterisation is None else {"parameterisation": self.parameterisation}
        return teacher.config.model_copy(update=update)

    def build(self, device: str = "cpu") -> Denoiser:
        """The student as it begins. Raises ValueError if there is no such teacher."""
        teacher = cast(Denoiser, open_teacher(self, device))
        student = self.like(teacher).build().to(device)
        student.load_state_dict(teacher.state_dict())
        return student


def open_teacher(model: Config, device: str) -> Denoiser | None:
    """The teacher of a student, not to be trained; None for any other `model`. Raises ValueError if it is no denoiser."""
    if not isinstance(model, StudentConfig):
        return None
    teacher = load_arrays(model.teacher, device)
    if not isinstance(teacher, Denoiser):
        raise ValueError(f"model.teacher={model.teacher!r}: a {teacher.config.kind}; students learn from a denoiser, name one")
    return teacher.requires_grad_(False)


def data_of(source: ArraysConfig, teacher: Denoiser | None, cache: Path, console: Console) -> Arrays:
    """The data, made by the teacher, with a progress bar, where only a teacher can."""
    if teacher is None or not isinstance(source, CouplingConfig):
        return source.build()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("pairs of noise and data", total=None)
        return couple(source, teacher, cache, lambda made, total: progress.update(task, completed=made, total=total))


def objective_of(config: Config, teacher: Denoiser | None) -> Objective:
    """The objective, told of the teacher if it asks for one."""
    made = config.build(teacher) if isinstance(config, ConsistencyObjectiveConfig) else cast(Any, config).build()
    return cast(Objective, made)
