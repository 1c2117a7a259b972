"""Export: the whole lab, readable by other programs, without the key."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.errors import RefusedError
from db.export import export_lab

if TYPE_CHECKING:
    from tests.db.conftest import Filled

KEY = "sk-or-v1-very-secret"


@pytest.fixture
def lab(filled: Filled) -> Filled:
    """A lab in which somebody pasted the key into a hypothesis."""
    experiment = filled.experiment(title='commas, "quotes" and\nlines 漢', hypothesis=f"my key is {KEY}")
    filled.run(experiment)
    filled.runner()
    return filled


def test_json_lines(lab: Filled, tmp_path: Path) -> None:
    output = tmp_path / "lab.jsonl"
    counts = export_lab(lab.store, output, secret=KEY)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert {table: sum(line["table"] == table for line in lines) for table in counts} == counts
    assert (counts["experiments"], counts["runs"], counts["runners"], counts["metrics"]) == (1, 1, 1, 0)
    (row,) = [line["row"] for line in lines if line["table"] == "experiments"]
    assert row["title"] == 'commas, "quotes" and\nlines 漢'
    assert row["hypothesis"] == "my key is [secret]"
    assert KEY not in output.read_text()
    assert not any("fts" in table or table.startswith("_") for table in counts)


def test_csv_folder(lab: Filled, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    counts = export_lab(lab.store, folder, secret=KEY)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{table}.csv" for table in counts)
    with (folder / "experiments.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)

    assert (row["title"], row["hypothesis"]) == ('commas, "quotes" and\nlines 漢', "my key is [secret]")
    assert KEY not in "".join(path.read_text() for path in folder.iterdir())
    assert (folder / "metrics.csv").read_bytes() == b"attempt_id,name_id,step,value\r\n"


def test_refusals_leave_nothing(lab: Filled, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"cannot export to lab\.xlsx: use a file ending in \.jsonl, or a folder"):
        export_lab(lab.store, tmp_path / "lab.xlsx")

    with pytest.raises(RefusedError, match="No such file or directory; nothing was exported"):
        export_lab(lab.store, tmp_path / "missing" / "lab.jsonl")

    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="nothing was exported"):
        export_lab(lab.store, tmp_path / "file")

    folder = tmp_path / "folder"
    (folder / "events.csv").mkdir(parents=True)  # stands in the way of one of the tables
    with pytest.raises(RefusedError, match="nothing was exported"):
        export_lab(lab.store, folder)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "lab"]
    assert [path.name for path in folder.iterdir()] == ["events.csv"]
