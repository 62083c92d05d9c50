"""What is loaded when: `import fewstep` and `fewstep --help` answer at once because they load little."""

import json
import os
import subprocess
import sys

import pytest
from codebase import ROOT

HEAVY = {
    *("transformers", "accelerate", "matplotlib", "tensorboard", "pyarrow", "scipy", "huggingface_hub", "jinja2"),
    *("fastapi", "uvicorn", "playwright", "PIL"),
}

COMMANDS = """
from fewstep import cli
from typer.main import get_command
def helps(command, path):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, [*path, name])
for path in list(helps(get_command(cli.app), [])):
    sys.argv = ["fewstep", *path, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, path
"""


def loaded(script: str) -> set[str]:
    """The top-level packages a fresh interpreter has loaded after `script`."""
    report = "\nprint(chr(10) + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import json, sys\n{script}{report}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("script", ["import fewstep\nassert fewstep.__version__", "import fewstep.core.model, fewstep.nn.mixers"])
def test_importing_loads_no_optional_package(script):
    assert not loaded(script) & HEAVY


def test_help_loads_no_torch():
    assert not loaded(COMMANDS) & {"torch", "numpy", *HEAVY}


def test_a_loaded_package_is_seen():
    assert "jinja2" in loaded("import jinja2")
