"""The documents tell what the registries hold."""

import pytest
from codebase import ROOT

from fewstep.report.systems import markdown, names, systems_table


@pytest.mark.parametrize(("document", "form"), [("README.md", names), ("docs/techniques.md", markdown)])
def test_the_tables_of_techniques_are_those_of_the_registries(document, form) -> None:
    table = form(systems_table())
    assert table in (ROOT / document).read_text(encoding="utf-8"), f"put this into {document}:\n{table}"
