"""Reproductions: a paper's claim, measured here, beside the threshold that was fixed before.

This file knows how a claim is set up and written down; the claims are in `claims`.
"""

import json
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from fewstep.core.recipe import lookup, parse
from fewstep.hub.load import load
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Bench, Effort, Report
from fewstep.report.costs import cpu_name
from fewstep.report.prompts import prompts_for

__all__ = ["CLAIMS", "reproduce"]


def reproduce(
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    directory: Path | str = Path("runs/reproduce"),
    console: Console | None = None,
) -> Report:
    """Measure the claim `name`, print it and write `reproduce-NAME.json` into `directory`, with a folder NAME for long claims.

    `options`: fields of `Effort` by name, e.g. {"model": "runs/mine", "seconds": 60}. A negative result is a result: it raises
    nothing. Raises ValueError for an unknown claim or option, or a model that cannot be loaded.
    """
    claim = lookup(CLAIMS, name, "claim")
    effort = parse(Effort, options or {})
    console = console or Console()
    model = load(effort.model, dtype=effort.dtype)
    draft = load(effort.draft, dtype=effort.dtype) if effort.draft else None
    prompts = prompts_for(effort.model, model, effort.count, effort.seed)
    setting = {
        **effort.model_dump(mode="json"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path = Path(directory) / f"reproduce-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(model, draft, prompts, effort, Path(scratch), console, path.parent / name)
        report = Report(claim, (), setting)
        for finding in claim.measure(bench):  # written down one by one: what took minutes to measure is not lost
            console.print(f"{finding.criterion.name}: {finding.verdict}", highlight=False)
            report = replace(report, findings=(*report.findings, finding))
            path.write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")
    console.print(report.table())
    console.print(str(path), soft_wrap=True)
    return report
