"""studies/precision.py: what it counts, on the tiny model."""

import json

import pytest
from test_train import refused

import train
from studies import precision


def test_what_rounding_to_nearest_loses(tmp_path, capsys, monkeypatch):
    """More of an update arrives in fp16 than in bf16, and of small weights more than of large."""
    measure = train.measure_step  # but one length for both: g itself is another in each dtype
    monkeypatch.setattr(train, "measure_step", lambda *args: measure(*args)._replace(a=3e-4))
    argv = ["--lr", "mezo=1e-3", "--count=3", f"--out={tmp_path}"]
    precision.main([*argv, "--task=rte", "--batch-size=4", "--compile=no"])
    found = json.loads((tmp_path / "precision.json").read_text())
    brain, half = found["arrive"].values()
    assert all(0 < b < h <= 1 for b, h in zip(brain, half, strict=True))
    assert brain == sorted(brain, reverse=True)
    assert "| mezo, η = 0.001, float16 | " in capsys.readouterr().out
    line = refused(precision.main, [*argv, "--task=copa"], capsys)
    assert "has the answers of other settings" in line
    assert json.loads((tmp_path / "precision.json").read_text()) == found


@pytest.mark.parametrize("flag", ["--dtype=float32", "--method=r-mezo", "--rounding=stochastic"])
def test_what_the_study_sets_itself_is_refused(flag, tmp_path, capsys):
    """A flag that its rows would override is one line."""
    line = refused(precision.main, [flag, f"--out={tmp_path}"], capsys)
    assert f"{flag.split('=')[0]}: the study gives each row its own" in line


def test_an_update_that_is_not_finite_is_one_line(tmp_path, capsys):
    """A rate that no weight survives ends with its name."""
    argv = ["--lr", "mezo=1e39", "--count=1", f"--out={tmp_path}", "--task=rte", "--batch-size=4"]
    assert "--lr 1e+39: the update of step 1 is not finite" in refused(precision.main, argv, capsys)
