"""`fewstep systems --matrix`: every encoding and every mixer on the screen, and the same cells in the file beside it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.nn.mixers import MIXERS
from fewstep.nn.position import POSITIONS
from fewstep.report.matrix import TESTED, UNUSED, text

CELLS = {
    "rope": {"attention": TESTED, "gau": TESTED, "s4": UNUSED},
    "alibi": {"attention": TESTED, "gau": "position='alibi': gau has no scores; choose another", "s4": UNUSED},
}


def test_names_run_down_and_each_reason_is_told_once() -> None:
    table, reasons = text(CELLS).split("\n\n")
    assert table.splitlines()[-3:] == ["      n u 4", "rope  ✓ ✓ –", "alibi ✓ a –"]
    assert "".join(line[6:7] for line in table.splitlines()[:-2]) == "attention"
    assert reasons.splitlines() == [f"✓ {TESTED}", f"– {UNUSED}", "a it has no scores; choose another"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_what_it_writes(as_json: bool, tmp_path: Path) -> None:
    out = tmp_path / "new" / "matrix.json"
    done = CliRunner().invoke(app, ["systems", "--matrix", "--out", str(out), *(["--json"] if as_json else [])])
    assert done.exit_code == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert list(written) == list(POSITIONS) and all(list(row) == list(MIXERS) for row in written.values())
    if as_json:
        assert json.loads(done.output) == written
    else:
        assert done.output == f"{text(written)}\n{out}\n"
