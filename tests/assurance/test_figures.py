"""What a suite counts arrives in the report, and a report of short runs is not put into the documents."""

from __future__ import annotations

import json

import pytest

import figures
import report


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders and a document of the test's own."""
    monkeypatch.setattr(figures, "MADE", tmp_path / "made")
    monkeypatch.setattr(figures, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(figures, "_counted", {})
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "assurance.md")
    report.DOCUMENT.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


@pytest.mark.parametrize("full", [False, True])
def test_report__what_a_suite_counted__is_printed_and_written_if_it_was_all(full, places, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FULL", full)
    monkeypatch.setattr("sys.argv", ["report.py", "--write"])
    for _ in range(3):
        figures.add("weather", wet_days=700)
    figures.record("weather", longest_drought="9 days")
    figures.record("weather", by_hand=True, years=30)
    assert report.main() == (0 if full else 1)
    printed = capsys.readouterr().out
    for line in ("### Weather", "| wet days | 2,100 |", "| longest drought | 9 days |", "### Weather, by hand", "| years | 30 |"):
        assert line in printed
    document = report.DOCUMENT.read_text()
    assert document.startswith("before\n")
    assert document.endswith("after\n")
    assert ("2,100" in document) == full
    assert ("old" in document) == (not full)


def test_record__a_new_process__begins_anew(places, monkeypatch):
    figures.add("weather", wet_days=1)
    monkeypatch.setattr(figures, "_counted", {})
    figures.add("weather", dry_days=2)
    assert json.loads((figures.MADE / "weather.json").read_text())["figures"] == {"dry days": 2}
