"""studies/packing.py: what it counts, and what it prints of the tiny model."""

import pytest

import masks
import tasks
from harness import config, dataset, loading
from model_patch import Patch
from studies import packing


def test_a_long_text_leaves_room_for_the_short_ones():
    """Of one text of some 60 words and three of four, the short ones share a row."""
    tokenizer, _ = loading.load_tokenizer(config.TINY)
    model = loading.load_model(config.TINY)
    train = [tasks.Example("The dog is big?" * n, (" Yes", " No"), 0) for n in (15, 1, 1, 1)]
    data = dataset.Data(train, [], [], "all", "", tokenizer)
    patch = Patch(model, masks.Everything())
    found = packing.compare(config.Settings(batch_size=4), patch, data, 2)
    assert found["texts"] == "4" and found["rows"] == "2.0" and found["tokens"] == "0.50"
    assert 0 <= float(found["loss"]) < 1e-5


def test_a_table_of_tasks(capsys):
    """A row for each task; what cannot be counted is one line."""
    packing.main(["--tasks", "sst2", "rte", "--batches=1"])
    said = capsys.readouterr().out
    assert "| sst2 | 16 | " in said and "| rte | 16 | " in said
    with pytest.raises(SystemExit) as stop:
        packing.main(["--batches=0"])
    assert stop.value.code == 2 and "at least 1" in capsys.readouterr().err
