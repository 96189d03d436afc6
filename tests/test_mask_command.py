"""harness/mask.py: the file holds what masks.py and tasks.py compute, and comes back whole."""

import json
from pathlib import Path

import pytest
import torch
from models import WORDS, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import arguments

import masks
import quant
import tasks
import train
from harness import config as configs
from harness import dataset, loading, log, mask

ROOT = Path(masks.__file__).resolve().parent


@pytest.fixture
def text(tmp_path):
    """A .jsonl of 29 documents in the words of the tiny model."""
    texts = [" ".join(WORDS[(i * j) % 14] for j in range(9, 40)) for i in range(1, 30)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return tmp_path / "text.jsonl"


def command(folder, out, *flags):
    """The command on the model in `folder`; (index, provenance)."""
    mask.main([f"--model={folder}/model", f"--out={out}", "--density=0.01", *map(str, flags)])
    file = mask.load(out)
    return file.index, file.provenance


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_mask_of_a_text_is_what_the_functions_compute(folder, text, tmp_path, capsys):
    """From text to file, in any number of groups; the file says how it was made."""
    flags = [f"--text={text}", "--samples=7", "--length=16", "--seed=3"]
    index, made = command(folder, tmp_path / "a", *flags)
    assert f"{tmp_path}/a: {sum(map(len, index.values()))} weights of 7 matrices" in (
        capsys.readouterr().out.replace(",", "")
    )
    tokenizer, _ = loading.load_tokenizer(f"{folder}/model")
    model = loading.load_model(f"{folder}/model")
    windows = tasks.text_windows(tokenizer, dataset.read_texts(str(text)), 7, 16, 3)
    assert equal(index, masks.sensitive_index(model, tasks.text_losses(windows), 0.01))
    facts = {"kind": "sensitive", "statistic": "per-sample", "samples": 7, "length": 16, "seed": 3}
    facts |= {"density": 0.01, "source": str(text), "model": f"{folder}/model"}
    assert made.items() >= facts.items()
    file = mask.load(tmp_path / "a")
    mask.check_shapes(file, masks.decoder_linears(model))
    capsys.readouterr()
    assert equal(index, command(folder, tmp_path / "b", *flags, "--groups=4")[0])
    assert "scoring 4/4: 100%" in capsys.readouterr().err  # each pass has a bar
    assert not equal(index, command(folder, tmp_path / "c", *flags, "--statistic=of-mean")[0])


def test_codebooks_are_those_of_the_scores(folder, text, tmp_path):
    """--quantiser kmeans: beside the same places, what Codebooks.fit gives, whatever --groups."""
    flags = [f"--text={text}", "--samples=5", "--length=16", "--quantiser=kmeans"]
    index, made = command(folder, tmp_path / "a", *flags, "--groups=3")
    assert made["quantiser"] == "kmeans"
    assert equal(index, command(folder, tmp_path / "b", *flags[:-1])[0])
    found = mask.load(tmp_path / "a", "kmeans").codebooks
    tokenizer, _ = loading.load_tokenizer(f"{folder}/model")
    model = loading.load_model(f"{folder}/model")
    windows = tasks.text_windows(tokenizer, dataset.read_texts(str(text)), 5, 16, 0)
    for name, scores in masks.fisher(model, tasks.text_losses(windows)).items():
        weight = model.get_parameter(name).detach()
        codes, levels = quant.Codebooks.fit(weight, scores, index[name])
        ours = found.pop(name)
        assert torch.equal(ours[0], codes) and torch.equal(ours[1], levels)
    assert not found


def test_a_mask_of_a_task_is_of_its_training_loss(folder, tmp_path):
    """The first of the training examples that a run would draw, with the loss of a run."""
    files = [f"--train-file={folder}/train.jsonl", f"--test-file={folder}/test.jsonl"]
    index, made = command(folder, tmp_path / "a", "--mask-from=task", "--samples=5", *files)
    tokenizer, _ = loading.load_tokenizer(f"{folder}/model")
    names = {f"{part}_file": f"{folder}/{part}.jsonl" for part in ("train", "test")}
    data = dataset.load_examples(configs.Settings(**names), tokenizer)
    losses = tasks.task_losses(data, 5)
    model = loading.load_model(f"{folder}/model")
    assert equal(index, masks.sensitive_index(model, losses, 0.01)) and made["samples"] == 5


@pytest.mark.parametrize("kind", ["random", "largest", "smallest"])
def test_the_other_kinds_need_no_text(folder, tmp_path, kind):
    """They are what the functions give, and the file says which it is."""
    weights = masks.decoder_linears(loading.load_model(f"{folder}/model"))
    index, made = command(folder, tmp_path / "a", f"--kind={kind}")
    function = masks.random_index if kind == "random" else getattr(masks, kind)
    assert made["kind"] == kind and equal(index, function(weights, 0.01))


def test_the_offline_default_makes_masks_of_text_and_of_a_task(tmp_path):
    """Without a model it is the tiny one, with its text and its tasks: nothing to download."""
    found = []
    for flags in (["--length=64"], ["--mask-from=task"], ["--mask-from=task", "--task=copa"]):
        out = tmp_path / f"{len(found)}.safetensors"
        mask.main([f"--out={out}", "--density=0.01", "--samples=4", *flags])
        found.append(mask.load(out).index)
        assert len(found[-1]) == 21
    assert not any(equal(a, b) for a, b in zip(found, found[1:], strict=False))


def test_real_weights_and_real_text(shared, tmp_path):
    """A real small LLaMA's mask, of real C4, covers another text's gradient far above chance."""
    name, text = shared / "models/tinystories656k", shared / "data/text/c4_sample.jsonl"
    out = tmp_path / "mask.safetensors"
    flags = ["--samples=6", "--length=128", "--density=0.001"]
    mask.main([f"--model={name}", f"--text={text}", f"--out={out}", *flags])
    model, (tokenizer, _) = loading.load_model(str(name)), loading.load_tokenizer(str(name))
    texts = dataset.read_texts(str(shared / "data/text/tinystories_sample.txt"))
    losses = tasks.text_losses(tasks.text_windows(tokenizer, texts, 6, 128, 0))
    scores = masks.fisher(model, losses, statistic="of-mean")
    assert masks.coverage(scores, mask.load(out).index) > 5 * 0.001


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text=nowhere.txt"], "a .txt or .jsonl file that exists"),
        (["--density=0.0001"], "takes none of the 1536 weights"),
        (["--density=2"], "density 2.0"),
        (["--samples=0"], "--samples 0: from 1"),
        (["--length=1"], "--length 1: from 2"),
        (["--groups=0"], "--groups 0: from 1"),
        (["--seed=-1"], "--seed -1: from 0"),
        (["--text=", "--mask-from=task"], "no task: give --task"),
        (["--text=", "--mask-from=task", "--task=ret"], "unknown task 'ret'"),
        (["--mask-from=task", "--task=rte"], "--text has no use with --mask-from task"),
        (["--task=rte"], "--task has no use with --mask-from text"),
        (["--kind=tallest"], "invalid choice"),
        (["--kind=random"], "--text has no use with --kind random"),
        (["--kind=random", "--samples=7"], "--samples has no use with --kind random"),
        (["--mask-from=task", "--task=rte", "--length=5"], "--length has no use with --mask-from"),
        (["--kind=random", "--quantiser=kmeans"], "--quantiser has no use with --kind random"),
        (["--kind=random", "--statistic=of-mean"], "--statistic has no use with --kind random"),
        (["--max-length=64"], "--max-length has no use with --mask-from text"),
        (["--batch-size=2"], "--batch-size has no use with --mask-from text"),
        (["--text=", "--kind=largest", "--seed=4"], "--seed has no use with --kind largest"),
        (["--device=tpu"], "--device tpu"),
        (["--model={tmp_path}"], "has no config.json"),
        (["--out={tmp_path}/no/where"], "No such file or directory"),
        (["--out={tmp_path}/text.jsonl"], "text.jsonl exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    folder, text, tmp_path, monkeypatch, capsys, flags, message
):
    """Exit code 2, one line that says what to do, no model loaded, nothing written."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    flags = [f"--text={text}", *(flag.format(tmp_path=tmp_path) for flag in flags)]
    with pytest.raises(SystemExit) as stopped:
        command(folder, tmp_path / "mask", *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


# ------------------------------------------------------------------ files


@pytest.fixture
def saved(tmp_path):
    """A model, a mask of it, and the file."""
    model, path = build("llama"), tmp_path / "mask.safetensors"
    weights = masks.decoder_linears(model)
    index = masks.random_index(weights, 0.05, 1)
    mask.save(path, index, weights, {"model": "some/llama"})
    return model, index, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_file_comes_back_and_fits_its_model_in_every_dtype(saved, dtype):
    """Places and provenance are as they were, shapes are checked without weights, then values."""
    model, index, path = saved
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (beside := path.with_name("beside")).touch()
    assert path.stat().st_mode == beside.stat().st_mode  # others may read it where they may
    beside.unlink()
    file = mask.load(path)
    assert equal(file.index, index) and file.provenance == {"model": "some/llama"}
    assert all(i.dtype == torch.int32 for i in load_file(path).values())
    weights = masks.decoder_linears(model.to(dtype))
    mask.check_shapes(file, {name: w.to("meta") for name, w in weights.items()})
    for name, w in weights.items():
        mask.check_values(file, name, w)
        with pytest.raises(ValueError, match=f"another model: {name} has other values"):
            mask.check_values(file, name, w + 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebooks_are_of_every_weight(saved, dtype):
    """One weight that is another one is refused where codebooks stand for it, and only there."""
    model, index, path = saved
    weights = masks.decoder_linears(model)
    scores = {name: torch.ones_like(w) for name, w in weights.items()}
    fit = quant.Codebooks.fit
    books = {name: fit(weights[name].detach(), scores[name], index[name]) for name in index}
    mask.save(path, index, weights, {}, books)
    file = mask.load(path, "kmeans")
    assert file.codebooks
    for name, w in masks.decoder_linears(model.to(dtype)).items():
        mask.check_values(file, name, w)
        other = w.detach().clone()
        other.view(-1)[1] += 0.5
        mask.check_values(mask.load(path), name, other)
        with pytest.raises(ValueError, match=f"another model: {name} has other values"):
            mask.check_values(file, name, other)


def test_a_mask_of_ones_own_trains(folder, tmp_path):
    """`save` takes any provenance; a run with the file moves as many weights as the mask has."""
    weights = masks.decoder_linears(loading.load_model(f"{folder}/model"))
    index = masks.largest(weights, 0.01)
    mask.save(tmp_path / "own.safetensors", index, weights, {"by": "me"})
    argv = arguments(folder, tmp_path / "run", "--method=senszoq", "--bits=16")
    train.main([*argv, f"--mask={tmp_path}/own.safetensors"])
    last = log.StepLog(tmp_path / "run").steps[-1]
    share = sum(map(len, index.values())) / sum(w.numel() for w in weights.values())
    assert last.active_density == pytest.approx(share)
    assert configs.load(tmp_path / "run", {}).density == pytest.approx(share)


@pytest.mark.parametrize("other", ["opt", "shape", "fewer"])
def test_a_mask_of_another_model_is_refused(saved, other):
    """Other names, another shape, a matrix that the model lacks: one line names the matrix."""
    model, _, path = saved
    weights = masks.decoder_linears(build("opt") if other == "opt" else model)
    name = next(iter(mask.load(path).matrices))
    if other == "shape":
        weights[name] = weights[name].view(16, 64)
    elif other == "fewer":
        del weights[name]
    with pytest.raises(ValueError, match=f"^{path} is a mask of another model: {name} is .*$"):
        mask.check_shapes(mask.load(path), weights)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", "folder",
                                    "no metadata", "matrix", "extra", "half", "order"])  # fmt: skip
def test_a_file_that_is_no_mask_is_refused_in_one_line(saved, damage):
    """Truncated, garbage, missing, of another kind: one line that names the file."""
    model, index, path = saved
    with safe_open(path, "pt") as file:
        about = file.metadata()
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        path.write_bytes(b"not a mask at all, but longer than eight bytes")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    elif damage == "no metadata":
        save_file(index, path)
    elif damage == "matrix":
        save_file(dict(list(index.items())[1:]), path, about)
    elif damage == "extra":
        save_file(index | {"another.weight": index[next(iter(index))].clone()}, path, about)
    elif damage == "half":  # codebooks of one matrix alone
        save_file(index | {f"{next(iter(index))}.codes": torch.zeros(4)}, path, about)
    elif damage == "order":
        save_file({name: i.flip(0) for name, i in index.items()}, path, about)
    with pytest.raises(ValueError, match="mask.safetensors") as error:
        mask.load(path)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    """A mask is replaced by a complete one or not at all."""
    model, index, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(configs.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mask.save(path, {n: i[:1] for n, i in index.items()}, masks.decoder_linears(model), {})
    assert path.read_bytes() == before
