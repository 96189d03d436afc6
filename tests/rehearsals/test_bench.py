"""harness/bench.py: every row runs at the tiny shape, and what it says is kept."""

import argparse
import json

import pytest
import torch

from harness import bench


@pytest.mark.long
def test_every_row_runs_and_is_written_down(tmp_path, monkeypatch, capsys):
    """Each row of the table gives R and a peak, and the JSON names the machine."""
    file = tmp_path / "bench.json"
    monkeypatch.setitem(bench.SHAPES, "tiny", ("llama", 64, 128, 1, 2, 2, 96))
    flags = "--shape tiny --batch 2 --tokens 8 --rounds 1 --device cpu --no-compile --json"
    bench.main([*flags.split(), str(file)])
    found = json.loads(file.read_text())
    assert list(found["rows"]) == list(bench.ROWS)
    for row in found["rows"].values():
        assert 0 < row["R_min"] <= row["R"] <= row["R_max"]
    assert found["machine"]["torch"] == torch.__version__
    assert "does not fit" not in capsys.readouterr().out


def test_all_rows_read_the_head_in_one_product(monkeypatch):
    """As in training: a product per row would copy a 16-bit head for each, in the unit of R."""
    monkeypatch.setitem(bench.SHAPES, "tiny", ("llama", 64, 128, 1, 2, 2, 96))
    how = {"shape": "tiny", "dtype": "bfloat16", "device": "cpu", "compile": False}
    subject = bench.Subject(argparse.Namespace(**how, batch=3, tokens=8))
    with torch.profiler.profile(record_shapes=True) as recorded, torch.no_grad():
        subject.loss()
    products = [(e.name, e.input_shapes[:2]) for e in recorded.events() if e.name[-2:] == "mm"]
    assert ("aten::mm", [[3, 64], [64, 96]]) in products
    assert not any(name == "aten::bmm" and 96 in shapes[1] for name, shapes in products)


@pytest.mark.parametrize("name", ["no/file", "."])
def test_a_file_that_cannot_be_written_is_said_before_measuring(name, tmp_path, capsys):
    """A wrong --json, such as a folder, ends in one line before the first row."""
    with pytest.raises(SystemExit) as stop:
        bench.main(["--shape", "tiny", "--json", str(tmp_path / name)])
    assert stop.value.code == 2 and "two forwards" not in capsys.readouterr().out


def test_opt_shapes_tie_their_head():
    """OPT's embedding and head are one parameter, as published: 13 B and not 13.3 B."""
    model = bench.build("opt-13b", torch.float16, "meta")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(12.85e9, rel=0.01)
