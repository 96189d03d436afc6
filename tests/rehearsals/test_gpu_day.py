"""studies/gpu_day.py: every part runs at the tiny shape, so that it cannot be broken on the day."""

import contextlib
import json
import multiprocessing
import runpy
import sys
from types import SimpleNamespace

import pytest

import tasks
from harness import bench
from harness.config import ROOT
from studies import gpu_day

IN_A_PROCESS = gpu_day.Day.start
FORK = multiprocessing.get_context("fork")  # of this process, as it has imported everything
WINDOWS = tasks.text_windows


def start_here(day, name, *words):
    """Day.start in this process, which has imported transformers already."""
    if words[1] == "pytest":  # it wants one of its own
        return IN_A_PROCESS(day, name, *words)
    module, *argv = map(str, words[1:] if words[0] == "-m" else words)
    code = 0
    with (
        open(day.args.out / f"{name}.txt", "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", [module, *argv])
        patch.chdir(ROOT)
        patch.setattr(tasks, "text_windows", few_windows)
        patch.setattr(multiprocessing, "get_context", lambda *_: FORK)
        try:
            if words[0] == "-m":
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(module, run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
    return name, SimpleNamespace(wait=lambda seconds: code)


def few_windows(tokenizer, texts, samples, length, seed):
    return WINDOWS(tokenizer, texts, 4, 16, seed)


@pytest.mark.long
@pytest.mark.parametrize("part", gpu_day.PARTS)
def test_every_part_is_rehearsed(part, tmp_path, capsys, monkeypatch):
    """A part ends with a table in which nothing was skipped, and keeps it with the machine."""
    monkeypatch.setattr(gpu_day.Day, "start", start_here)
    monkeypatch.setitem(bench.SHAPES, "tiny", ("llama", 32, 64, 1, 2, 2, 96))
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
