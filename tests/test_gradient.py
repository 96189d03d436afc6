"""studies/gradient.py: its answers on the tiny model, and that what is known is not done again."""

import json

import pytest
import torch

import masks
from studies import gradient

SMALL = ["--tasks=rte", "--samples=8", "--length=32", "--seeds=4", "--trials=2", "--batch-size=4"]


def test_a_small_study_of_the_tiny_model(tmp_path, capsys, monkeypatch):
    """Shares are shares, a task's own mask covers most, and a second call only draws."""
    argv = [*SMALL, f"--out={tmp_path}"]
    gradient.main(argv)
    found = json.loads((tmp_path / "gradient.json").read_text())
    said = capsys.readouterr().out
    for density, of in found["coverage"]["rte"].items():
        assert 0 <= min(of.values()) and max(of.values()) == of["task"] <= 1, density
    assert sum(found["magnitude"]["rte"].values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found["increase"]["rte"].values())
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


def test_steps_are_single_ones_from_the_original_weights(tmp_path, monkeypatch):
    """The trials of every method leave the weights as they were, to the bit."""
    original = gradient.Study.increase

    def watched(study, data):
        before = [p.detach().clone() for p in study.model.parameters()]
        found = original(study, data)
        assert all(map(torch.equal, before, study.model.parameters()))
        return found

    monkeypatch.setattr(gradient.Study, "increase", watched)
    gradient.main([*SMALL, f"--out={tmp_path}"])
    assert (tmp_path / "gradient.png").exists()
