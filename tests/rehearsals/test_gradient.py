"""studies/gradient.py: its answers on the tiny model, and that what is known is not done again."""

import json

import pytest
import torch

import masks
from studies import gradient

SMALL = ["--tasks=rte", "--samples=8", "--length=32", "--seeds=4", "--trials=2", "--batch-size=4",
         "--tuning=10"]  # fmt: skip


def watched(part):
    """The part, which fails where it leaves other weights than it found, by one bit."""

    def call(study, *data):
        before = [p.detach().clone() for p in study.model.parameters()]
        found = part(study, *data)
        assert all(map(torch.equal, before, study.model.parameters()))
        return found

    return call


def test_a_small_study_of_the_tiny_model(tmp_path, capsys, monkeypatch):
    """Shares are shares, a task's own mask covers most, weights stay, a second call only draws."""
    for part in ("increase", "tuning"):
        monkeypatch.setattr(gradient.Study, part, watched(getattr(gradient.Study, part)))
    argv = [*SMALL, f"--out={tmp_path}"]
    gradient.main(argv)
    found = json.loads((tmp_path / "gradient.json").read_text())
    said = capsys.readouterr().out
    assert found["settings"]["data_dir"] == "None"  # as typed: the file serves any checkout
    for density, of in found["coverage"]["rte"].items():
        assert 0 <= min(of.values()) and max(of.values()) == of["task"] <= 1, density
    assert sum(found["magnitude"]["rte"].values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found["increase"]["rte"].values())
    tuned = found["tuning"]["rte"]
    for step in (0, 1, 10):
        static, dynamic = (tuned[f"step {step}, 0.01, {name}"] for name in ("static", "dynamic"))
        assert 0 <= static <= dynamic <= 1 and (step or static == dynamic)
    cosine = found["cosine"]["rte"]
    assert 0.2 < cosine["MeZO"] / cosine["MeZO, by chance"] < 3
    monkeypatch.setattr(gradient.loading, "load_model", lambda *_: pytest.fail("nothing to do"))
    gradient.main(argv)
    assert capsys.readouterr().out == said and (tmp_path / "gradient.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        gradient.main([*argv, "--samples=9"])
    assert "answers of other settings" in capsys.readouterr().err


def test_quarters_are_by_magnitude():
    """All of the score on the largest weights is all in the last quarter."""
    weights = {"w": torch.arange(-50.0, 50.0).view(10, 10)}
    scores = {"w": (weights["w"].abs() > masks.threshold(weights["w"], 0.75)).float()}
    assert gradient.quarters(weights, scores) == {
        "quarter 1": 0, "quarter 2": 0, "quarter 3": 0, "quarter 4": 1,
    }  # fmt: skip
