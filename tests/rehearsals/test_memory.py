"""studies/memory.py: its table at the tiny shape, and that what is known is not measured again."""

import json

from studies import memory


def test_a_small_table(tmp_path, capsys):
    """Every row has a number, which is what the bench's file says."""
    flags = ["--shape=tiny", "--tokens", "8", "--no-compile", "--device=cpu"]
    memory.main([*flags, f"--out={tmp_path}"])
    said = capsys.readouterr().out
    file = tmp_path / "tiny-float32-cpu-eager-1x8.json"
    for row in memory.ROWS:
        peak = json.loads(file.read_text())["rows"][row]["peak_bytes"] / 1e9
        (line,) = (line for line in said.splitlines() if line.startswith(f"| {row} | "))
        assert line.split(" | ")[1].split()[0] == f"{peak:.2f}"
    assert (tmp_path / "memory.png").exists()
    found = json.loads(file.read_text())
    found["rows"]["Adam"]["peak_bytes"] = 12.34e9
    del found["rows"]["LoRA"]
    file.write_text(json.dumps(found))
    memory.main([*flags, f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert "| Adam | 12.34 (" in said and "| LoRA | – |" in said and " R " not in said
