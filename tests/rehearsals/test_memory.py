"""studies/memory.py: its table at the tiny shape, and that what is known is not measured again."""

import json

import pytest

from studies import memory


@pytest.mark.long
def test_a_small_table(tmp_path, capsys):
    """Every row has a number for every length, which is what the bench's files say."""
    flags = ["--shape=tiny", "--tokens", "8", "16", "--no-compile", "--device=cpu"]
    memory.main([*flags, f"--out={tmp_path}"])
    said = capsys.readouterr().out
    files = [tmp_path / f"tiny-float32-cpu-eager-1x{tokens}.json" for tokens in (8, 16)]
    for row in memory.ROWS:
        peaks = [json.loads(file.read_text())["rows"][row]["peak_bytes"] / 1e9 for file in files]
        (line,) = (line for line in said.splitlines() if line.startswith(f"| {row} | "))
        assert [cell.split()[0] for cell in line.split(" | ")[1:]] == [f"{gb:.2f}" for gb in peaks]
    assert (tmp_path / "memory.png").exists()
    found = json.loads(files[0].read_text())
    found["rows"]["Adam"]["peak_bytes"] = 12.34e9
    del found["rows"]["LoRA"]
    files[0].write_text(json.dumps(found))
    memory.main([*flags, f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert "| Adam | 12.34 (" in said and "| LoRA | – | " in said and " R " not in said
