"""Fixtures of the kernel tests: every instruction-set path that this machine can build and run; threads given back; children."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from fewstep.nn.kernels import build
from fewstep.nn.kernels.kernel import default_kernel


def built_paths() -> tuple[str, ...]:
    try:
        return build.paths()
    except build.BuildError:
        return ()


@pytest.fixture(scope="module", params=built_paths())
def kernel_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction-set path, in use; without a compiler there is none and the test is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_KERNELS", request.param)
        default_kernel.cache_clear()
        kernel = default_kernel()
        assert kernel is not None and kernel.path == request.param
        yield request.param
    default_kernel.cache_clear()


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def holds_in_a_fork() -> Callable[[Callable[[], bool]], bool]:
    """Whether a law holds in a child, which has none of its parent's threads; one that waits for them fails the test."""

    def ask(law: Callable[[], bool]) -> bool:
        child = os.fork()
        if child == 0:
            held = False
            try:
                held = law()
            finally:
                os._exit(0 if held else 1)
        for _ in range(3000):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child waits for threads it does not have")

    return ask
