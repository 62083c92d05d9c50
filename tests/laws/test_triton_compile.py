"""The Triton kernels compile for a Hopper GPU on a machine without one, in a process of its own: here Triton is interpreted."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


class Hopper:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(dtype: torch.dtype, width: int, values: int) -> None:
    """Forward and backward of every kernel on the CPU, launching nothing."""
    from fewstep.nn.triton import load

    kernels = load()
    assert kernels is not None
    q, k, v = (
        torch.zeros(1, heads, 64, size, dtype=dtype, requires_grad=True) for heads, size in ((2, width), (1, width), (1, values))
    )
    bias, segments = torch.zeros(2, 127, requires_grad=True), torch.zeros(1, 64, dtype=torch.int64)
    for given in ({"causal": True}, {"bias": bias, "segments": segments}):
        y, _ = kernels.flash_attention(q, k, v, **given)
        y.sum().backward()
    q, k, v = (torch.zeros(1, 64, 1, size, dtype=dtype, requires_grad=True) for size in (width, width, values))
    y, last = kernels.sweep(q, k, v, torch.zeros(1, 64, 1, requires_grad=True), torch.zeros(1, 1, width, values))
    (y.sum() + last.sum()).backward()
    u, a, b = (
        torch.zeros(1, 64, 64, dtype=dtype, requires_grad=True),
        torch.zeros(16, 64, dtype=dtype),
        torch.zeros(1, 64, 16, dtype=dtype),
    )
    y, last = kernels.selective_scan(u, u, a, b, b, torch.zeros(1, 16, 64, dtype=dtype))
    (y.sum() + last.sum()).backward()


def main() -> None:
    """Prints how many kernels were compiled, each with the first of the tiles that fit."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch, prune, compiled = JITFunction.run, Autotuner.prune_configs, set()

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.add(launch(self, *args, grid=(1,), warmup=True, **options).hash)

    driver.set_active(Hopper())
    JITFunction.run = only_compile
    Autotuner.prune_configs = lambda self, options: prune(self, options)[:1]
    Autotuner.do_bench = staticmethod(lambda call, quantiles: call() or [1.0] * len(quantiles))
    compile_all(torch.bfloat16, 128, 128)
    compile_all(torch.float32, 20, 3)
    print(len(compiled))


@pytest.mark.claims
def test_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; install fewstep[gpu]")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FEWSTEP_KERNELS")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2 * 18


if __name__ == "__main__":
    main()
