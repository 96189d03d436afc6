"""studies/slopes.py: g beside the slope that autograd gives."""

import pytest
from test_train import refused

from harness.config import ROOT, TINY
from studies import slopes


def test_g_is_the_slope_in_fp32(capsys):
    """On the tiny model the two have a correlation above 0.999, for MeZO and for S-MeZO."""
    flags = [f"--model={TINY}", "--task=rte", f"--data-dir={ROOT}/tiny/data"]
    slopes.main([*flags, "--seeds=4", "--batch-size=2"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| MeZO, float32", "| S-MeZO, float32"]
    assert all(float(row[2]) > 0.999 for row in rows)
    assert "density 0.0: the share" in refused(slopes.main, [*flags, "--density=0"], capsys)


def test_a_wrong_flag_of_a_study_is_one_line(capsys):
    """As of train.py, without the usage before it."""
    assert "--help lists the flags" in refused(slopes.main, ["--model=m", "--nonsense"], capsys)
    with pytest.raises(SystemExit):
        slopes.main(["--nonsense"])
    assert len(capsys.readouterr().err.splitlines()) == 1
