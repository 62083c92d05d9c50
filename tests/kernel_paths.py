"""Fixtures of the kernel tests: every instruction-set path that this machine can build and run; the thread count given back."""

from collections.abc import Iterator

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
