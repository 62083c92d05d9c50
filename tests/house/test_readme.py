"""The README tells what the registries hold."""

from codebase import ROOT

from fewstep.report.systems import markdown, systems_table


def test_the_table_of_techniques_is_that_of_the_registries() -> None:
    table = markdown(systems_table())
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), f"put this into README.md:\n{table}"
