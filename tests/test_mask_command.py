"""python -m harness.mask: from text or a task to a mask file."""

import json
from pathlib import Path

import pytest
import torch
from models import WORDS, write_model
from safetensors.torch import load_file

import masks
import tasks
from harness import loading, mask

ROOT = Path(masks.__file__).resolve().parent


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random LLaMA with a word tokenizer, and a text."""
    path = tmp_path_factory.mktemp("model")
    write_model(path / "model")
    text = [" ".join(WORDS[(i * j) % 14] for j in range(9, 40)) for i in range(1, 30)]
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
    (path / "short.txt").write_text("a b c")
    return path


def command(folder, out, *flags):
    """`python -m harness.mask` on the model in `folder`; of text, samples of 16 tokens."""
    length = ["--length=16"] * any(flag.startswith("--text") for flag in flags)
    mask.main([f"--model={folder}/model", f"--out={out}", "--density=0.01", *length, *flags])
    return masks.load(out)


def test_the_command_writes_the_mask_that_the_functions_compute(folder, tmp_path, capsys):
    """Text to file, end to end: the index is the brute-force one, the file says how it was made."""
    out = tmp_path / "mask.safetensors"
    flags = [f"--text={folder}/text.jsonl", "--samples=7", "--seed=3"]
    index, made, _ = command(folder, out, *flags)
    chosen = sum(map(len, index.values()))
    assert capsys.readouterr().out == f"{out}: {chosen} weights of 14 matrices\n"
    tokenizer, _ = loading.load_tokenizer(f"{folder}/model")
    texts = tasks.read_texts(f"{folder}/text.jsonl")
    windows = tasks.text_windows(tokenizer, texts, 7, 16, 3)
    model = loading.load_model(f"{folder}/model")
    want = masks.sensitive(masks.fisher(model, tasks.text_losses(windows)), 0.01)
    assert masks.overlap(index, want) > 0.99
    facts = {"kind": "sensitive", "statistic": "per-sample", "samples": 7, "length": 16, "seed": 3}
    facts |= {"density": 0.01, "torch": torch.__version__}
    assert made.items() >= facts.items()
    assert made["source"] == f"{folder}/text.jsonl" and made["model"] == f"{folder}/model"
    again, *_ = command(folder, tmp_path / "b", *flags, "--groups=4")
    assert equal(index, again)
    assert not equal(index, command(folder, tmp_path / "c", *flags, "--statistic=of-mean")[0])


def test_the_other_kinds_need_no_text(folder, tmp_path):
    """random, largest and smallest are what the functions give, and carry their kind."""
    weights = masks.decoder_linears(loading.load_model(f"{folder}/model"))
    for kind in ("random", "largest", "smallest"):
        function = getattr(masks, "random_index" if kind == "random" else kind)
        index, made, _ = command(folder, tmp_path / kind, f"--kind={kind}", "--dtype=float32")
        assert made["kind"] == kind and equal(index, function(weights, 0.01))


def test_the_offline_default_makes_masks_of_text_and_of_a_task(tmp_path):
    """Without a model the tiny one, its text or its tasks: nothing to download."""
    found = []
    for flags in (
        ["--length=64"],
        ["--task=copa", "--mask-from=task"],
        ["--text", str(ROOT / "tiny/data/other.jsonl")],
    ):
        out = tmp_path / f"mask{len(found)}.safetensors"
        mask.main([f"--out={out}", "--density=0.01", "--samples=8", *flags])
        index, made, _ = masks.load(out)
        found.append(index)
        assert len(index) == 21 and made["samples"] == 8
    assert not equal(found[0], found[1]) and not equal(found[0], found[2])


def test_real_weights_and_real_text(shared, tmp_path):
    """A real small LLaMA on real C4: its mask covers its own gradient far above chance."""
    model, text = shared / "models/tinystories656k", shared / "data/text/c4_sample.jsonl"
    out = tmp_path / "mask.safetensors"
    flags = ["--samples=6", "--length=128", "--density=0.001"]
    mask.main([f"--model={model}", f"--text={text}", f"--out={out}", *flags])
    loaded = loading.load_model(str(model))
    index, *_ = masks.load(out)
    tokenizer, _ = loading.load_tokenizer(str(model))
    texts = tasks.read_texts(str(shared / "data/text/tinystories_sample.txt"))
    windows = tasks.text_windows(tokenizer, texts, 6, 128, 0)
    other = masks.fisher(loaded, tasks.text_losses(windows), statistic="of-mean")
    assert masks.coverage(other, index) > 5 * 0.001


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text=nowhere.txt"], "a .txt or .jsonl file that exists"),
        (["--text={folder}/short.txt"], "4 tokens, less than one sample of --length 16"),
        (
            ["--text={folder}/text.jsonl", "--density=0.0001"],
            "the smallest that takes one of every",
        ),
        (["--text={folder}/text.jsonl", "--density=2"], "density 2.0"),
        (["--text={folder}/text.jsonl", "--device=tpu"], "--device tpu"),
        (["--mask-from=task", "--task=ret"], "unknown task 'ret'"),
        (["--text={folder}/text.jsonl", "--out={folder}/text.jsonl"], "text.jsonl: a new file"),
        (["--text={folder}/text.jsonl", "--model={folder}"], "config.json"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, capsys, flags, message
):
    """Exit code 2, one line that says what to do, no model loaded, nothing written."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        command(folder, tmp_path / "mask", *[flag.format(folder=folder) for flag in flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert len([line for line in error.splitlines() if "error: " in line]) == 1
    assert not list(tmp_path.iterdir())


def test_the_file_holds_int32_and_nothing_else(folder, tmp_path):
    """Any reader of safetensors can use the mask: one sorted int32 tensor per matrix."""
    out = tmp_path / "mask"
    command(folder, out, "--kind=random")
    assert all(i.dtype == torch.int32 and i.dim() == 1 for i in load_file(out).values())
