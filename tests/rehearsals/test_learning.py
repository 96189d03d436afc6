"""studies/learning.py: its runs on the tiny model, and that what is known is not done again."""

import json
import math
import os
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import refused

import train
from harness import mask
from harness.config import ROOT, TINY
from harness.log import StepLog
from studies import learning

SMALL = ["--num-train=16", "--num-validation=4", "--num-test=4"]
COMMON = [*SMALL, "--compile=no"]  # a loop takes longer to compile than these few steps
FEW = ["--short=2", "--every=2", "--seeds=1", *COMMON]


def test_a_small_study_of_the_tiny_model(tmp_path, capsys, monkeypatch):
    """The best rate's run is made longer, a rate that breaks is none, a second call only draws."""
    argv = ["--tasks=rte", "--rows", "S-MeZO", "--grid", "S-MeZO=1e-2,1e30", *FEW]
    argv += [f"--out={tmp_path}", "--eps=2e-3"]
    learning.main([*argv, "--steps=4"])
    said = capsys.readouterr().out
    assert "| S-MeZO | " in said and "| 4 shots | " in said
    found = json.loads((tmp_path / "learning.json").read_text())
    assert found["tables"]["rte"]["methods"]["S-MeZO"]["lr"] == 0.01
    folder = tmp_path / "runs" / "rte-method-s-mezo-0.01-0"
    known, log = found["runs"][folder.name], StepLog(folder)
    losses = [(s.loss_plus + s.loss_minus) / 2 for s in log.steps]
    assert known["loss"] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    assert known["validation"] == {str(s.step): s.validation for s in log.steps[1::2]} | {
        "0": log.start.validation
    }
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("nothing to do"))
    learning.main([*argv, "--steps=4"])
    assert capsys.readouterr().out == said and (tmp_path / "rte.png").stat().st_size > 10_000
    assert "has runs of 4 steps" in refused(learning.main, [*argv, "--steps=2"], capsys)
    with pytest.raises(SystemExit):
        learning.main([*argv, "--steps=4", "--max-length", "99"])
    assert "runs of other settings" in capsys.readouterr().err


def test_a_run_that_is_longer_than_asked_for_is_whole(tmp_path):
    """Where a longer part was stopped on its way, a shorter one takes the run and not as broken."""
    common = [f"--model={TINY}", *SMALL]  # compiled, as a study's runs are
    run = learning.Run("rte", "train --method=s-mezo", 1e-3, 0, 5)
    learning.carry_out(run, tmp_path / "run", 2, common)
    found = learning.carry_out(run._replace(steps=2), tmp_path / "run", 2, common)
    assert found["stopped"] is None and found["steps"] == 6 and len(found["loss"]) == 3
    assert found["test"] is not None and {2, 4, 6} <= set(found["validation"])


def test_what_may_pass_is_no_result(tmp_path):
    """A run that another process holds is tried again; one whose weights broke is not."""
    common = [f"--model={TINY}", *COMMON]
    run = learning.Run("rte", "train --method=mezo", 1e-3, 0, 2)
    learning.carry_out(run, tmp_path / "run", 2, common)
    other = StepLog(tmp_path / "run", write=True)
    with pytest.raises(ValueError, match="being trained by another process"):
        learning.carry_out(run._replace(steps=4), tmp_path / "run", 2, common)
    other.file.close()
    assert learning.carry_out(run._replace(steps=4), tmp_path / "run", 2, common)["test"]
    broken = learning.carry_out(run._replace(lr=1e39, steps=30), tmp_path / "bad", 2, common)
    assert "no log-probability" in broken["stopped"] and broken["test"] is None


def life(argv, said):
    """The command, as a terminal would start it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = open(said, "w", buffering=1)
    try:
        learning.main(argv)
    except SystemExit as stop:
        os._exit(stop.code)
    os._exit(0)


@pytest.mark.long
def test_ctrl_c_ends_all_jobs(tmp_path):
    """Two runs that would take a day end with the command that made them, which can go on."""
    argv = [
        "--tasks=rte",
        "--rows",
        "MeZO",
        "--steps=1000000",
        "--short=1000000",
        "--every=1000000",
    ]
    argv += ["--jobs=2", *COMMON, f"--out={tmp_path}"]
    process = get_context("fork").Process(target=life, args=(argv, tmp_path / "said"))
    process.start()
    try:
        logs = []
        while len(logs) < 2:
            assert process.is_alive()
            time.sleep(0.2)
            logs = list(tmp_path.glob("runs/*/steps.csv"))
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
        assert process.exitcode == 130
        assert "stopped; the same command goes on" in (tmp_path / "said").read_text()
    finally:
        process.kill()


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_run_that_broke_is_behind_all_others(metric):
    """Whatever is measured, the worst run that ended scores more than one that did not."""
    study = object.__new__(learning.Study)
    study.args = SimpleNamespace(short=2, every=2)
    ended = {"stopped": None, "metric": metric, "loss": [99.0], "validation": {2: 1e9}}
    if metric == "accuracy":
        ended["validation"] = {2: 0.0}
    assert study.score(ended) > study.score(ended | {"stopped": "why", "validation": {1: 0.5}})
    assert study.score(ended | {"stopped": "after --short"}) == study.score(ended)


@pytest.mark.parametrize("flag", ["--task=boolq", "--seed=7", "--lr=1"])
def test_what_a_study_sets_itself_is_refused(flag, tmp_path, capsys):
    """A flag of train.py that would change what the tables' rows are called is one line."""
    line = refused(learning.main, [flag, f"--out={tmp_path}"], capsys)
    assert f"{flag.split('=')[0]}: the study gives each run its own" in line


def test_a_name_tells_runs_apart():
    """Whatever the flags, rate or seed, another run has another name; its length has none."""
    runs = [learning.Run("rte", flags, lr, seed, 1) for lr in (1e-3, 3e-3) for seed in (0, 1)
            for flags in ("train --method=mezo", "train --method=s-mezo --density=0.3",
                          "train --method=s-mezo --density=0.3 --above=0.5")]  # fmt: skip
    assert len({run.name for run in runs}) == len(runs)
    assert runs[0]._replace(steps=9).name == runs[0].name


def test_what_goes_on_from_a_drop_begins_at_its_weights(tmp_path):
    """The first validation of what goes on is that of MeZO's weights where they dropped.

    It is of the same data.
    """
    data = shutil.copytree(ROOT / "tiny/data", tmp_path / "data")
    argv = ["--tasks=copa", "--parts=drop", "--grid", "MeZO=0.1", "S-MeZO=1e-3", *FEW]
    argv += [f"--data-dir={data}", f"--out={tmp_path}"]
    learning.main([*argv, "--num-validation=100", "--steps=4", "--short=4"])
    found = json.loads((tmp_path / "learning.json").read_text())
    drop = found["tables"]["copa"]["drop"]["drop"]
    begun = [run["validation"]["0"] for name, run in found["runs"].items() if "density" in name]
    assert begun == [drop["validation"]] * 2
    start = found["runs"]["copa-method-mezo-0.1-0"]["validation"]["0"]
    assert drop["validation"] < start
    made = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/config.json")]
    assert len(made) > 2 and {config["data_dir"] for config in made} == {str(data)}


def fallen(monkeypatch, metric: str, validation: dict) -> dict:
    """What the part gives where MeZO's validation is this; nothing is trained or saved."""
    study = object.__new__(learning.Study)
    study.given = {}
    study.args = SimpleNamespace(short=4, model=TINY, grid={"MeZO": (1e-2, 1e-3)}, out=Path())
    study.take = lambda runs: [{"metric": metric, "validation": validation}]
    study.short = lambda task, rows: {}
    monkeypatch.setattr(Path, "exists", lambda self: True)
    return study.drop("rte")


def test_a_plateau_is_no_drop(monkeypatch):
    """Where validation never falls nothing goes on from it; the rate is the largest."""
    found = fallen(monkeypatch, "accuracy", {0: 0.5, 1: 0.9, 2: 0.9})
    assert found == {"MeZO, 0.01, has no drop": {"lr": 0.01}}


@pytest.mark.parametrize("metric, values", [
    ("accuracy", (0.5, 0.7, 0.69, 0.4, 0.3)), ("perplexity", (9.0, 5.0, 5.1, math.inf, math.inf)),
])  # fmt: skip
def test_the_drop_is_the_largest_fall(metric, values, monkeypatch):
    """A small dip before the drop is none, nor is what comes after it, nor after --short steps.

    Perplexity drops upwards.
    """
    found = fallen(monkeypatch, metric, dict(enumerate(values)) | {9: 0.0})
    assert [row["after"] for row in found.values()] == [2, 3]


def test_a_mask_of_the_task_is_of_its_examples(tmp_path):
    """Of the kinds of mask, "task" has the task as its source, and "sensitive" the text."""
    argv = ["--tasks=copa", "--parts=masks", "--grid", "SensZOQ, 16 bits=0.1", *FEW]
    argv += ["--steps=2", "--densities", "0.01", "5e-5", "--samples=4"]
    learning.main([*argv, f"--out={tmp_path}/my study"])
    made = {path.stem: mask.load(path).provenance for path in tmp_path.glob("my study/masks/*")}
    assert made["copa-0.01"]["source"] == "copa" and made["copa-0.01"]["samples"] == 4
    assert made["sensitive-0.01"]["source"].endswith("c4.jsonl")
