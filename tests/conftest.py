"""What every test shares: one torch thread, and a seed of its own drawn from the run's seed, which is printed and can be set."""

import hashlib
import os
import secrets

import pytest
import torch

os.environ["FEWSTEP_SEED"] = os.environ.get("FEWSTEP_SEED") or str(secrets.randbits(32))  # the workers of -n inherit it
RUN_SEED = int(os.environ["FEWSTEP_SEED"])

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels run on the CPU, in Python


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed: it depends on the run's seed and the test's name alone, not on what ran before."""
    digest = hashlib.sha256(f"{RUN_SEED} {request.node.nodeid}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


@pytest.fixture(autouse=True)
def _reproducible(seed: int) -> None:
    """Weights drawn from torch's own generator follow the test's seed too."""
    torch.manual_seed(seed)


def pytest_report_header() -> str:
    return f"FEWSTEP_SEED={RUN_SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The header is not shown under -q, and a failure must be repeatable."""
    terminalreporter.write_line(f"repeat these draws with FEWSTEP_SEED={RUN_SEED}")
