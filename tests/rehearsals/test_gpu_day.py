"""studies/gpu_day.py: every part runs at the tiny shape, so that it cannot be broken on the day."""

import json

import pytest

from studies import gpu_day


@pytest.mark.parametrize("part", gpu_day.PARTS)
def test_every_part_is_rehearsed(part, tmp_path, capsys):
    """A part ends with a table in which nothing was skipped, and keeps it with the machine."""
    gpu_day.main([part, "--tiny", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith(f"{part}: ") and "SKIPPED" not in out
    kept = json.loads((tmp_path / f"{part}.json").read_text())
    assert kept["table"] == out.splitlines()[1:] and kept["machine"]["torch"]


def test_what_fails_is_in_the_table(tmp_path, capsys, monkeypatch):
    """A command that fails, or runs out of time, is a line of the table and not the end."""

    def part(day):
        day.run("fails", "-c", "raise SystemExit('no such model')")
        day.ends = 0
        day.run("waits", "-c", "import time; time.sleep(60)")

    monkeypatch.setitem(gpu_day.PARTS, "right", part)
    gpu_day.main(["right", "--tiny", "--out", str(tmp_path)])
    _, fails, waits = capsys.readouterr().out.splitlines()
    assert fails.endswith("SKIPPED (1): no such model") and "SKIPPED (out of time)" in waits
