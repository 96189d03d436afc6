"""studies/quantisers.py: its figures on the tiny model."""

import json
from pathlib import Path

from test_train import refused

import quant
from studies import quantisers


def test_a_small_study_of_the_tiny_model(tmp_path, capsys):
    """As loaded nothing is off, k-means has the lower error, and a short text is one line."""
    tiny = Path(quant.__file__).parent / "tiny"
    flags = [f"--model={tiny}/model", f"--text={tiny}/data/c4.jsonl"]
    flags += [f"--other={tiny}/data/other.jsonl", "--samples=2", "--length=32", "--density=0.01"]
    quantisers.main([*flags, f"--out={tmp_path}/found"])
    found = json.loads((tmp_path / "found").read_text())
    assert {found["as loaded"][what] for what in ("more, text", "more, other", "error")} == {0}
    assert 0 < found["k-means"]["error"] < found["NF4"]["error"] < 0.02
    assert f"k-means {found['k-means']['loss, other']:.5g}" in capsys.readouterr().out
    for out in ("found", "."):  # nothing is written over
        line = refused(quantisers.main, [*flags, f"--out={tmp_path}/{out}"], capsys)
        assert "exists; give the name of a new file" in line
    argv = [*flags, "--samples=100000", f"--out={tmp_path}/new"]
    assert "not 2 × --samples" in refused(quantisers.main, argv, capsys)
    assert not (tmp_path / "new").exists()
