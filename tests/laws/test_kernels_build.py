"""Building the kernel: keyed, atomic, safe for builders that meet, and one clear notice where it cannot be built."""

import ctypes
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_paths import built_paths
from torch.nn import functional as F

from fewstep.nn import kernels
from fewstep.nn.kernels import build
from fewstep.nn.kernels.kernel import default_kernel

needs_compiler = pytest.mark.skipif(not built_paths(), reason="no C compiler here")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FEWSTEP_KERNELS", raising=False)
    default_kernel.cache_clear()
    yield tmp_path / "fewstep" / "kernels"
    default_kernel.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for C files."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def write(sources: Path, name: str) -> None:
    """A library of two files that says its name."""
    (sources / "name.h").write_text(f'#define NAME "{name}"\n')
    (sources / "tiny.c").write_text('#include "name.h"\nconst char *instruction_set(void) { return NAME; }\n')


def name_of(library: ctypes.CDLL) -> str:
    function = library.instruction_set
    function.restype = ctypes.c_char_p
    return bytes(function()).decode()


@needs_compiler
def test_every_path_says_its_name() -> None:
    assert build.paths()[-1] == "portable"
    for path in build.paths():
        assert name_of(build.load(path)) == path


@needs_compiler
def test_builders_that_meet_leave_one_whole_library(empty_cache: Path, sources: Path) -> None:
    write(sources, "tiny")
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(build.load, ["portable"] * 4))
    assert {name_of(library) for library in libraries} == {"tiny"}
    (stored,) = empty_cache.iterdir()
    assert stored.name.startswith("kernels-portable-") and stored.suffix == ".so"
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    inode = stored.stat().st_ino
    build.load("portable")
    assert stored.stat().st_ino == inode  # found, not built again


@needs_compiler
def test_another_source_is_another_build(empty_cache: Path, sources: Path) -> None:
    write(sources, "first")
    assert name_of(build.load("portable")) == "first"
    write(sources, "second")
    assert name_of(build.load("portable")) == "second"
    assert len(list(empty_cache.iterdir())) == 2


@needs_compiler
def test_a_damaged_library_is_built_again(empty_cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(sources, "whole")
    compiled = build._compile
    monkeypatch.setattr(build, "_compile", lambda flags, target: (target.parent.mkdir(parents=True), target.write_bytes(b"half")))
    with pytest.raises(build.BuildError, match=r"kernels-portable-.*\.so"):
        build.load("portable")
    monkeypatch.setattr(build, "_compile", compiled)
    assert name_of(build.load("portable")) == "whole"


@needs_compiler
def test_a_failed_build_leaves_nothing_and_says_the_error(empty_cache: Path, sources: Path) -> None:
    (sources / "broken.c").write_text("int instruction_set(void) { return nonsense; }\n")
    with pytest.raises(build.BuildError, match="nonsense"):
        build.load("portable")
    assert not list(empty_cache.iterdir())


@needs_compiler
def test_a_compiler_without_openmp_builds_one_thread(
    empty_cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "plain-cc"
    real = " ".join(build.compiler())
    refuse = 'for a in "$@"; do [ "$a" = -fopenmp ] && { echo "error: no OpenMP" >&2; exit 1; }; done'
    wrapper.write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    write(sources, "plain")
    assert name_of(build.load("portable")) == "plain"


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")


def failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")


def unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a directory cannot be made below a file, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


OBSTACLES = [
    pytest.param(no_compiler, "no C compiler"),
    pytest.param(missing_compiler, "/nowhere/cc"),
    pytest.param(failing_compiler, "false: exit code 1"),
    pytest.param(unwritable_cache, "cache directory .*file", marks=needs_compiler),
]


@pytest.mark.parametrize("obstacle, reason", OBSTACLES)
def test_an_obstacle_is_one_notice_and_aten(
    obstacle: object, reason: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    assert callable(obstacle)
    obstacle(monkeypatch, tmp_path)
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 20, generator=generator), torch.randn(10, 20, generator=generator)
    with pytest.warns(RuntimeWarning, match=f"PyTorch's own operators.*{reason}") as caught:
        packed = kernels.pack(weight)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.available()
        assert torch.equal(kernels.linear(x, packed), F.linear(x, weight))


def test_the_switch(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    assert not kernels.available() and not empty_cache.exists()
    default_kernel.cache_clear()
    monkeypatch.setenv("FEWSTEP_KERNELS", "fast")
    with pytest.raises(ValueError, match="FEWSTEP_KERNELS is 'fast': set it to auto, off or one of avx512bf16"):
        kernels.available()


@needs_compiler
def test_a_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    default_kernel.cache_clear()
    monkeypatch.setenv("FEWSTEP_KERNELS", "portable")
    try:
        forced = default_kernel()
        assert forced is not None and forced.path == "portable"
    finally:
        default_kernel.cache_clear()
    with pytest.raises(ValueError, match=r"'sse9' cannot run here: expected one of .*portable"):
        build.load("sse9")
