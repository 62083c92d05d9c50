"""A checkpoint is complete or absent, whatever happens to the process or the disk."""

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from train_toy import ToyModel, plan, trainer

import fewstep.training.checkpoint
from fewstep.training.checkpoint import WEIGHTS, Checkpoint, Checkpoints, load_tensors, pack, read, tensors_of, unpack


def _checkpoint(step: int, size: int = 50) -> Checkpoint:
    values = torch.arange(size, dtype=torch.float32) + step
    return Checkpoint(step, {"w": values}, {"optim.w/m": values * 2}, {"seconds": step / 3})


def _refuse(notice: str) -> None:
    raise AssertionError(notice)


def test_round_trip(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    store.write(_checkpoint(7), {"recipe.json": "{}"})
    found = store.latest(_refuse)
    assert found is not None and found.step == 7 and found.state == {"seconds": 7 / 3}
    assert torch.equal(found.weights["w"], _checkpoint(7).weights["w"])
    assert torch.equal(found.tensors["optim.w/m"], _checkpoint(7).tensors["optim.w/m"])
    assert (store.path(7) / "recipe.json").read_text() == "{}"


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 20, 300):
        store.write(_checkpoint(step), {})
    assert store.steps() == [20, 300]
    assert Checkpoints(tmp_path / "none", keep=2).latest(_refuse) is None


def test_a_death_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A child saves step 2 over step 1 with `keep` 1 and dies at its n-th file operation, for every n until it survives."""
    survived = False
    deaths = 0
    for moment in range(200):
        root = tmp_path / str(moment)
        store = Checkpoints(root, keep=1)
        store.write(_checkpoint(1), {})
        child = os.fork()
        if child == 0:
            _die_at(moment)
            store.write(_checkpoint(2), {"recipe.json": "{}"})
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        found = store.latest(_refuse)
        assert found is not None and found.step in ((2,) if survived else (1, 2))
        assert torch.equal(found.weights["w"], _checkpoint(found.step).weights["w"])
        store.write(_checkpoint(3), {})
        assert [path.name for path in root.iterdir()] == ["step-00000003"], "what the dead process left is swept"
        if survived:
            break
        deaths += 1
    assert survived and deaths > 20


def _die_at(moment: int) -> None:
    count = 0

    def hook(event: str, arguments: object) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refusing_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The operating system itself refuses to write more than 2000 bytes to a file."""
    store = Checkpoints(tmp_path, keep=1)
    store.write(_checkpoint(1), {})
    with (
        _files_of_at_most(2000),
        pytest.raises(ValueError, match=r"^checkpoint=.*cannot be written .*step 1 is intact; make room") as caught,
    ):
        store.write(_checkpoint(2, size=10_000), {})
    assert "\n" not in str(caught.value)
    found = store.latest(_refuse)
    assert found is not None and found.step == 1
    assert len(list(tmp_path.iterdir())) == 1, "nothing half-written stays"


def test_a_full_disk_stops_training_and_a_resume_goes_on(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = fewstep.training.checkpoint.save_file
    settings = plan(12, checkpoint_steps=4)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "8" in path.parent.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(fewstep.training.checkpoint, "save_file", full)
        with pytest.raises(ValueError, match=r"step-00000008.*No space left on device.*step 4 is intact; make room and resume"):
            trainer(tmp_path, seed, settings).run()
    assert trainer(tmp_path, seed, settings).run(resume=True).used.steps == 12


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "version"])
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(damage: str, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    store.write(_checkpoint(1), {})
    store.write(_checkpoint(2), {})
    weights, manifest = store.path(2) / WEIGHTS, store.path(2) / "manifest.json"
    content = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(content[:-7])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    notices: list[str] = []
    found = store.latest(notices.append)
    assert found is not None and found.step == 1
    assert len(notices) == 1 and "step-00000002" in notices[0] and "\n" not in notices[0]
    with pytest.raises(ValueError, match=r"^checkpoint=.*damaged"):
        read(store.path(2))
    store.write(_checkpoint(1, size=60), {})
    assert store.steps() == [1], "the damaged one goes when the run has saved again"


def test_when_all_are_damaged_nothing_is_started_over(tmp_path: Path, seed: int) -> None:
    summary = trainer(tmp_path, seed, plan(3)).run()
    (summary.checkpoint / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="all of them are damaged; train anew in another directory"):
        trainer(tmp_path, seed, plan(6)).run(resume=True)


def test_pack_is_inverted_by_unpack(seed: int) -> None:
    value = {"a": [1, 2.5, None, "x", True], "t": torch.full((2, 3), float(seed % 7 + 1)), "n": {"deep": [{"t": torch.ones(1)}]}}
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(value, tensors, "objective")))
    back = unpack(packed, tensors)
    assert (
        back["a"] == value["a"] and torch.equal(back["t"], value["t"]) and torch.equal(back["n"]["deep"][0]["t"], torch.ones(1))
    )
    assert sorted(tensors) == ["objective.n.deep.0.t", "objective.t"]
    with pytest.raises(ValueError, match=r"objective\.bad=\{1\}: a checkpoint holds tensors and JSON values only"):
        pack({"bad": {1}}, {}, "objective")
    with pytest.raises(ValueError, match="key 3 is not a string"):
        pack({3: 1}, {}, "objective")


def test_tied_weights_are_stored_once(seed: int) -> None:
    def tied(seed: int) -> nn.Module:
        model = ToyModel(seed)
        model.head.weight = model.embedding.weight
        return model

    model, other = tied(seed), tied(seed + 1)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    assert "embedding.weight" in tensors and "head.weight" not in tensors
    load_tensors(other, tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"weights 'head\.weight': not in the checkpoint"):
        load_tensors(ToyModel(seed), tensors)
    with pytest.raises(
        ValueError, match=r"weights 'embedding.weight': shape \(2, 3\) in the checkpoint, \(16, 24\) in the model"
    ):
        load_tensors(other, {**tensors, "embedding.weight": torch.ones(2, 3)})
