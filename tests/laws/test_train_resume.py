"""A run that was stopped, killed or interrupted ends in the state of an uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_toy import ToyData, ToyModel, ToyObjective, assert_same_end, plan, trainer

from fewstep.core.objective import Batch
from fewstep.training.checkpoint import read

_STEPS = 24
_CASES = {
    "adamw": {},
    "muon": {"optim": "muon"},
    "fp16 with its scale": {"precision": "fp16"},
    "bf16, recompute": {"precision": "bf16", "recompute": True},
    "average": {"ema": 0.9},
    "accumulation": {"accumulate": 3},
    "all": {"optim": "muon", "precision": "fp16", "ema": 0.9, "accumulate": 2, "validate_every": 6},
}


class Killed(BaseException):
    """Stands for a death that runs no handler of the trainer."""


class Dying(ToyData):
    """Data that dies when batch `last` is asked for."""

    def __init__(self, seed: int, last: int) -> None:
        super().__init__(seed)
        self.last = last

    def batch(self, step: int) -> Batch:
        if step == self.last:
            raise Killed
        return super().batch(step)


@pytest.mark.parametrize("case", _CASES)
def test_resumed_run_is_bit_identical(case: str, tmp_path: Path, seed: int) -> None:
    settings = plan(_STEPS, checkpoint_steps=5, **_CASES[case])
    whole = trainer(tmp_path / "whole", seed, settings).run()
    for death in (8, 17):
        with pytest.raises(Killed):
            dying = Dying(seed, death * settings.run.accumulate)
            trainer(tmp_path / "cut", seed, settings, data=dying).run(resume=death > 8)
    cut = trainer(tmp_path / "cut", seed, settings, model=ToyModel(seed + 1)).run(resume=True)
    assert_same_end(whole, cut)
    assert cut.validation == whole.validation and cut.validation


def test_without_the_optimizer_state_a_resume_would_differ(tmp_path: Path, seed: int) -> None:
    """The law above can fail: forgetting the optimizer's moments changes the weights."""
    settings = plan(_STEPS, checkpoint_steps=5)
    whole = trainer(tmp_path / "whole", seed, settings).run()
    with pytest.raises(Killed):
        trainer(tmp_path / "cut", seed, settings, data=Dying(seed, 8)).run()
    forgetful = trainer(tmp_path / "cut", seed, settings)
    forgetful._optimizers.load = lambda state: None  # type: ignore[method-assign]
    cut = forgetful.run(resume=True)
    with pytest.raises(AssertionError):
        assert_same_end(whole, cut)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resume_goes_on(number: signal.Signals, tmp_path: Path, seed: int) -> None:
    class Signalling(ToyData):
        def batch(self, step: int) -> Batch:
            if step == 7:
                os.kill(os.getpid(), number)
            return super().batch(step)

    before = signal.getsignal(number)
    settings = plan(_STEPS, checkpoint_steps=0)
    whole = trainer(tmp_path / "whole", seed, settings).run()
    stopped = trainer(tmp_path / "cut", seed, settings, data=Signalling(seed)).run()
    assert stopped.interrupted and stopped.used.steps == 8
    assert signal.getsignal(number) == before
    cut = trainer(tmp_path / "cut", seed, settings).run(resume=True)
    assert not cut.interrupted
    assert_same_end(whole, cut)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, seed: int) -> None:
    settings = plan(6)
    first = trainer(tmp_path, seed, settings).run()
    again = trainer(tmp_path, seed, settings).run(resume=True)
    assert again.used == first.used and again.checkpoint == first.checkpoint


def test_a_run_is_never_overwritten(tmp_path: Path, seed: int) -> None:
    first = trainer(tmp_path, seed, plan(6)).run()
    content = read(first.checkpoint)
    with pytest.raises(ValueError, match=r"directory=.*holds a run already; resume it"):
        trainer(tmp_path, seed, plan(12)).run()
    assert read(first.checkpoint).state == content.state


def test_resuming_with_another_model_is_refused(tmp_path: Path, seed: int) -> None:
    trainer(tmp_path, seed, plan(4)).run()
    other = ToyModel(seed)
    other.block.append(torch.nn.Linear(24, 24))
    with pytest.raises(ValueError, match=r"weights 'block.5.bias': not in the checkpoint; resume with the recipe"):
        trainer(tmp_path, seed, plan(8), model=other).run(resume=True)


_MURDER = """
import os, random, signal, sys, time
from pathlib import Path
from train_toy import plan, trainer

directory, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
settings = plan(40, "muon", "fp16", ema=0.9, checkpoint_steps=1, keep=2)
chance = random.Random(seed)
survived = 0
for attempt in range(kills):
    child = os.fork()
    if child == 0:
        trainer(directory, seed, settings).run(resume=True)
        os._exit(0)
    time.sleep(chance.uniform(0.02, 0.4))
    os.kill(child, signal.SIGKILL)
    survived += os.waitpid(child, 0)[1] == 0
print("finished early:", survived)
"""


def test_kill_nine_at_random_moments_loses_nothing(tmp_path: Path, seed: int) -> None:
    """Five deaths at moments drawn at random, with a checkpoint every step; then the run is finished and compared."""
    script = tmp_path / "murder.py"
    script.write_text(_MURDER)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path / "cut"), str(seed), "5"], env=environment, check=True)
    settings = plan(40, "muon", "fp16", ema=0.9, checkpoint_steps=1, keep=2)
    cut = trainer(tmp_path / "cut", seed, settings).run(resume=True)
    whole = trainer(tmp_path / "whole", seed, plan(40, "muon", "fp16", ema=0.9)).run()
    assert_same_end(whole, cut)


def test_the_objectives_state_survives(tmp_path: Path, seed: int) -> None:
    first, second = ToyObjective(), ToyObjective()
    trainer(tmp_path, seed, plan(6), objective=first).run()
    trainer(tmp_path, seed, plan(6), objective=second).run(resume=True)
    assert second.steps == first.steps == 6
    assert first.average is not None and second.average is not None and torch.equal(first.average, second.average)
