"""Compiles the C files of this folder with the system's compiler at first use and loads them as one library.

Knows compilers, instruction sets and the cache directory. Does not know tensors, nor what the kernels compute.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import final

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC")
PATHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # best first: the compiler flags of each instruction-set path
        "avx512bf16": ("-mavx512f", "-mavx512bf16", "-mtune=native"),
        "avx512": ("-mavx512f", "-mtune=native"),
        "avx2": ("-mavx2", "-mfma", "-mtune=native"),
        "portable": (),
    }
)
REQUIRES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # macros that the compiler defines for this CPU where a path can run
        "avx512bf16": ("__AVX512F__", "__AVX512BF16__"),
        "avx512": ("__AVX512F__",),
        "avx2": ("__AVX2__", "__FMA__"),
        "portable": (),
    }
)


@final
class BuildError(RuntimeError):
    """The kernels could not be compiled, stored or loaded; the message says which and why."""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise BuildError(f"{command[0]}: {reason.strip()}")
    return done.stdout


def compiler() -> tuple[str, ...]:
    """The C compiler's command: $CC, else the first of cc, gcc and clang on the path.

    Raises: BuildError where there is none.
    """
    if chosen := shlex.split(os.environ.get("CC", "")):
        return tuple(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    raise BuildError("no C compiler (cc, gcc or clang) on the path")


@cache
def _macros(command: tuple[str, ...]) -> str:
    """What a compiler predefines for this CPU: its own version and every instruction set it may use."""
    try:
        return _run([*command, "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    except BuildError:  # some compilers know no -march=native: without it they promise only the architecture's baseline
        return _run([*command, "-dM", "-E", "-x", "c", os.devnull])


def paths() -> tuple[str, ...]:
    """The instruction-set paths that this machine's compiler and CPU can build and run, best first."""
    defined = set(_macros(compiler()).split())
    return tuple(path for path in PATHS if defined.issuperset(REQUIRES[path]))


def cache_directory() -> Path:
    """Where built kernels are kept: $XDG_CACHE_HOME/fewstep/kernels, else ~/.cache/fewstep/kernels."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fewstep" / "kernels"


def _sources() -> list[Path]:
    return sorted(file for file in SOURCES.iterdir() if file.suffix in (".c", ".h"))


def _compile(flags: tuple[str, ...], target: Path) -> None:
    """Builds beside the target and renames, so that a reader or a second builder never sees half a file."""
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=target.stem, suffix=".partial", dir=target.parent)
    except OSError as error:
        raise BuildError(f"cache directory {target.parent}: {error.strerror}") from error
    os.close(handle)
    try:
        try:
            _link([*compiler(), *FLAGS, *flags, "-fopenmp"], partial)
        except BuildError:  # a compiler without OpenMP builds a kernel of one thread
            _link([*compiler(), *FLAGS, *flags], partial)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def _link(command: list[str], target: str) -> None:
    """Compiles the files side by side, and makes one library of them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [(file, str(Path(folder) / f"{file.stem}.o")) for file in _sources() if file.suffix == ".c"]
        list(pool.map(lambda pair: _run([*command, "-c", str(pair[0]), "-o", pair[1]]), made))
        _run([*command, "-shared", *(to for _, to in made), "-o", target])


def load(path: str) -> ctypes.CDLL:
    """The kernels built for an instruction-set path, compiled if the cache lacks it.

    A build is keyed by its sources, its flags and all that the compiler predefines for this CPU, so that a changed source,
    compiler or machine never meets a stale one.

    Args:
        path: one of `paths()`.

    Raises:
        ValueError: a path this machine cannot run.
        BuildError: no compiler, a failed build, a cache that cannot be written, a library that does not load.

    Cost: about 30 ms, and a few seconds when it must compile.
    """
    if path not in paths():
        raise ValueError(f"kernel path {path!r} cannot run here: expected one of {', '.join(paths())}")
    parts = (*(file.read_text() for file in _sources()), *compiler(), *FLAGS, *PATHS[path], _macros(compiler()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = cache_directory() / f"kernels-{path}-{key}.so"
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError:  # damaged since it was stored: build it again
            pass
    _compile(PATHS[path], target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"{target}: {error}") from error
