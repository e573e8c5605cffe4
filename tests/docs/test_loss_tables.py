"""The tables of what sets of layers lose, from a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support.candidates import candidates, evidence

from lt_gguf.report.report import Report
from lt_gguf.selection import Model, Request, strategy

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "docs"))

import loss_tables


def test_every_set_has_its_row(tmp_path):
    lost = (0.0, 0.004, 0.5, 0.1)

    def of(layers):
        return evidence(sum(lost[il] for il in layers), *[1 - sum(lost[il] for il in layers)] * 8)

    chosen = strategy("loss").select(Request(Model("llama", "a model", 4, 4), candidates=candidates(of)))
    report = Report("m.gguf", "llama", chosen.spec(4), chosen, None)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_json()))
    text = "\n".join(loss_tables.tables(Report.read(path)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    by_name = {row[0]: row for row in rows}  # the last one of each: by kind, where there are several
    assert by_name["loss, 2"][1] == "0.4 % (0.4 % to 0.4 %)"
    assert by_name["layer 2"][-2:] == ["0.5", "50.0 % (50.0 % to 50.0 %)"]
    first = next(row for row in rows if row[0] == "loss, 3")
    assert first[1] == "0-1,3" and first[5] == "10.4 % (10.4 % to 10.4 %)"
    assert sum(row[0] == "loss, 4" for row in rows) == 2 and "| all |" in text
