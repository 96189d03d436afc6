"""bench.py and shapes.py on the tiny shape: every row runs, and what is counted is stored."""

import json
import sys

import pytest
import torch

import bench
import quant
import shapes


def test_every_row_runs_and_is_written_down(tmp_path, monkeypatch, capsys):
    """All rows of the table on the tiny shape: a ratio with its spread, bytes, the machine."""
    path = tmp_path / "bench.json"
    flags = ["--shape=tiny", "--batch=2", "--tokens=8", "--rounds=1", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, f"--json={path}"])
    bench.main()
    found = json.loads(path.read_text())
    assert set(found["rows"]) == set(bench.ROWS)
    for name, row in found["rows"].items():
        assert 0 < row["R_min"] <= row["R"] <= row["R_max"], name
        assert row["seconds"] > 0 and "peak_bytes" in row
    assert found["weights"] == found["weights_bytes"] / 4
    assert set(found["rows"]["s-mezo"]["parts"]) == {
        "one forward of the doubled batch",
        "noise, mask, perturbed copies",
        "update",
    }
    assert "torch" in found["machine"] and "two forwards" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_said_before_measuring(tmp_path, monkeypatch, capsys):
    """One line and exit code 2, not a traceback after an hour."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--shape=tiny", f"--json={tmp_path}/no/file"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and not (said := capsys.readouterr()).out
    assert said.err.startswith("bench.py: error: ")


def test_where_only_four_bits_fit_they_are_measured(tmp_path, monkeypatch, capsys):
    """A model too large in 16 bits costs its own rows, not the others."""

    def too_large(shape, dtype, device, four_bits):
        if not four_bits:
            raise torch.OutOfMemoryError
        return shapes.build(shape, dtype, device, four_bits)

    flags = ["--shape=tiny", "--batch=2", "--tokens=8", "--rounds=1", "--no-compile", "--rows"]
    monkeypatch.setattr(bench, "build", too_large)
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, "mezo", "4 bits: senszoq"])
    bench.main()
    said = capsys.readouterr().out
    assert said.count("does not fit") == 1 and "4 bits: senszoq          R" in said


@pytest.mark.parametrize("shape", ["tiny", "134m"])
def test_a_four_bit_model_stores_what_its_table_says(shape):
    """Linears at 4.13 bits a weight and 12 bytes for each value that moves; the rest in 16."""
    if shape == "134m":
        shapes.SHAPES["small"] = ("llama", dict(shapes.SHAPES["134m"][1], layers=1, vocab=512))
        shape = "small"
    model = shapes.build(shape, torch.bfloat16, "cpu", four_bits=True)
    layers = quant.packed(model).values()
    weights = sum(m.size for m in layers)
    values = sum(m.index.numel() for m in layers)
    assert values == pytest.approx(shapes.SENSITIVE * weights, rel=0.02)
    stored = sum(m.stored_bytes() for m in layers) - 12 * values
    assert stored * 8 / weights == pytest.approx(4.13, abs=0.1)
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    assert bench.counted("4 bits: senszoq", model, torch.bfloat16) >= stored + 12 * values + rest
    assert not any(p.is_meta for p in model.parameters())


def test_opt_shapes_tie_their_head():
    """OPT's head is its embedding: drawn once, so one tensor."""
    shapes.SHAPES["small-opt"] = (
        "opt",
        dict(hidden_size=64, intermediate_size=128, layers=1, heads=2, vocab=96),
    )
    model = shapes.build("small-opt", torch.float32, "cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight
