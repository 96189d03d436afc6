"""studies/precision.py: what it counts, on the tiny model."""

import json

import pytest

from studies import precision


def test_what_half_precision_loses(tmp_path, capsys):
    """More of an update arrives in fp16 than in bf16, and of small weights more than of large."""
    argv = ["--lr=mezo=1e-3", "--eps=4e-3", "--count=3", f"--out={tmp_path}"]
    precision.main([*argv, "--task=rte", "--batch-size=4", "--compile=no"])
    found = json.loads((tmp_path / "precision.json").read_text())
    brain, half = found["arrive"].values()
    assert all(0 < b < h <= 1 for b, h in zip(brain, half, strict=True))
    assert brain == sorted(brain, reverse=True)
    for of in found["slopes"].values():
        assert of["error"] < of["spread"] and of["correlation"] > 0.5
    assert "| mezo, ε = 0.004, float16 | " in capsys.readouterr().out


def test_slopes_are_compared_with_the_exact_ones():
    """Equal slopes have no error and correlation 1; opposite ones −1 and twice the spread."""
    exact = [1.0, -2.0, 3.0]
    assert precision.compare(exact, exact) == {
        "error": 0, "spread": pytest.approx(2.517, abs=1e-3), "correlation": pytest.approx(1),
    }  # fmt: skip
    other = precision.compare(exact, [-x for x in exact])
    assert other["error"] == 2 * other["spread"] and other["correlation"] == pytest.approx(-1)
