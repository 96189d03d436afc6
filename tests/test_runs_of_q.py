"""Runs of [Q]: train.py --method sensitive and senszoq, the sparse file, and what may go wrong."""

import csv
import json
import shutil

import pytest
import torch
from models import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval
import loading
import make_mask
import quant
import record
import sensitivity
import snapshot
import tasks
import train

METHODS = ("sensitive", "senszoq")


@pytest.fixture(scope="module")
def mask(folder, tmp_path_factory):
    """A mask of 2 % of the tiny model, by the task's own gradient."""
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    make_mask.main(
        [f"--model={folder}/model", f"--train-file={folder}/train.jsonl", f"--out={path}"]
        + ["--density=0.02", "--samples=20"]
    )
    return path


def arguments(folder, out, method, *more):
    files = [f"--{n}-file={folder}/{n}.jsonl" for n in ("train", "test")]
    sizes = ["--lr=0.5", "--steps=12", "--eval-every=4", "--num-validation=30"]
    return [f"--model={folder}/model", *files, f"--out={out}", f"--method={method}", *sizes, *more]


def run(folder, out, method, *more):
    train.main(arguments(folder, out, method, *more))
    return json.loads((out / "result.json").read_text())


def refused(argv, main, capsys) -> str:
    """The one line that a refusal prints; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in line
    return line


def answers(model, tokenizer, folder):
    """Which test examples a model answers right."""
    data = tasks.load_examples(
        None, train_file=f"{folder}/train.jsonl", test_file=f"{folder}/test.jsonl"
    )
    import scoring

    batch = scoring.collate(tokenizer, data.test)
    with torch.no_grad():
        logits = model(**batch.inputs(model), use_cache=False).logits
    return scoring.correct(logits, batch)[0]


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("method", METHODS)
def test_the_sparse_file_on_its_model_is_the_trained_model(method, folder, mask, tmp_path, capsys):
    """train → sparse.safetensors → eval.py: the same accuracy; merged and loaded by transformers:
    the same answers, example by example."""
    result = run(folder, tmp_path / "run", method, f"--mask={mask}")
    sparse = tmp_path / "run" / "sparse.safetensors"
    files = [f"--{n}-file={folder}/{n}.jsonl" for n in ("train", "test")]
    capsys.readouterr()
    eval.main([f"--sparse={sparse}", *files, f"--save={tmp_path / 'merged'}"])
    line = capsys.readouterr().out
    best = result["best"]
    assert f"accuracy {best['accuracy']:.3f} ±" in line and f"n = {best['n']}" in line
    eval.main([f"--run={tmp_path / 'run'}"])
    assert f"accuracy {best['accuracy']:.3f} ±" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(m, quant.DenseSparseLinear) for m in merged.modules())
    trained = eval.open_sparse(
        sparse,
        snapshot.read_sparse(sparse),
        loading.Settings(model=f"{folder}/model"),
        merged.config,
    )
    assert torch.equal(answers(merged, tokenizer, folder), answers(trained, tokenizer, folder))
    for name, values in snapshot.read_sparse(sparse)[1].items():
        index = sensitivity.read_mask(mask)[0][name].long()
        assert torch.equal(merged.get_parameter(name).detach().flatten()[index], values)


@pytest.mark.parametrize("method", METHODS)
def test_the_log_rebuilds_the_values_to_the_bit(method, folder, mask, tmp_path):
    """Replaying (seed, a) from the original weights gives the sparse file's values, bit for bit."""
    result = run(folder, tmp_path / "run", method, f"--mask={mask}", "--num-validation=0")
    config, steps = record.open_run(tmp_path / "run")
    assert result["best_step"] == len(steps) == 12
    handle = eval.rebuild(config, steps, tmp_path / "run")
    values = snapshot.read_sparse(tmp_path / "run" / "sparse.safetensors")[1]
    before = eval.rebuild(config, [], tmp_path / "run")
    for name, value in handle.tensors().items():
        assert torch.equal(value, values[name])
        assert not torch.equal(value, before.tensors()[name])


def test_four_bits_change_the_loss_little(folder, mask, tmp_path):
    """The same steps on a 4-bit and on a 16-bit dense part: nearly the same losses, one noise."""
    curves = {}
    for method in METHODS:
        run(folder, tmp_path / method, method, f"--mask={mask}", "--lr=1e-3")
        with open(tmp_path / method / "steps.csv") as file:
            rows = list(csv.DictReader(file))
        curves[method] = [float(row["loss_plus"]) for row in rows]
        seeds = [row["seed"] for row in rows]
    assert curves["sensitive"] == pytest.approx(curves["senszoq"], abs=0.1)
    assert curves["sensitive"] != curves["senszoq"]
    assert len(set(seeds)) == 12


def test_the_sparse_file_knows_its_runs_data(folder, mask, tmp_path, capsys):
    """Without other flags eval.py asks the run's own examples, and refuses changed ones."""
    flags = [f"--mask={mask}", "--num-train=50", "--num-test=17", "--data-seed=3"]
    run(folder, tmp_path / "run", "senszoq", *flags)
    sparse = tmp_path / "run" / "sparse.safetensors"
    best = json.loads((tmp_path / "run" / "result.json").read_text())["best"]
    capsys.readouterr()
    eval.main([f"--sparse={sparse}"])
    line = capsys.readouterr().out
    assert f"accuracy {best['accuracy']:.3f} ±" in line and "(n = 17)" in line
    eval.main([f"--sparse={sparse}", "--num-test=5"])
    assert "(n = 5)" in capsys.readouterr().out
    build("opt").save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "opt")
    line = refused([f"--sparse={sparse}", f"--model={tmp_path / 'opt'}"], eval.main, capsys)
    assert str(sparse) in line
    text = (folder / "test.jsonl").read_text()
    try:
        (folder / "test.jsonl").write_text(text.replace('"label": 0', '"label": 1'))
        line = refused([f"--sparse={sparse}"], eval.main, capsys)
    finally:
        (folder / "test.jsonl").write_text(text)
    assert f"the data of {sparse} have changed" in line


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_to_the_same_bits(method, folder, mask, tmp_path):
    """Cut after five steps, with a snapshot at four, a run of [Q] ends as if it had not stopped."""
    flags = [f"--mask={mask}", "--snapshot-every=4"]
    run(folder, tmp_path / "whole", method, *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = tmp_path / "cut"
    for name in ("result.json", "sparse.safetensors"):
        (cut / name).unlink()
    log = (cut / "steps.csv").read_text().splitlines(keepends=True)
    (cut / "steps.csv").write_text("".join(log[:6]))
    metrics = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in metrics if json.loads(line)["step"] <= 5]
    (cut / "metrics.jsonl").write_text("".join(kept))
    train.main([f"--resume={cut}"])
    assert (cut / "steps.csv").read_text() == "".join(log)
    whole, again = (load_file(tmp_path / d / "sparse.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_naming_what_the_run_had_changes_nothing(tmp_path, capsys, monkeypatch):
    """eval.py --sparse F with F's own task, folder or numbers: F's examples; beside another one,
    all that was given counts."""
    flags = ["--method=sensitive", "--mask-from=task", "--task=copa", "--density=0.01", "--steps=1"]
    train.main([*flags, "--num-test=9", "--num-validation=0", f"--out={tmp_path}/run"])
    capsys.readouterr()
    sparse = f"--sparse={tmp_path}/run/sparse.safetensors"
    monkeypatch.chdir(loading.HERE)
    shutil.copytree("tiny/data", tmp_path / "data")
    for given, task, n in (
        (["--task=copa"], "COPA", 9),
        (["--task=copa", "--data-dir=tiny/data"], "COPA", 9),
        (["--num-test=9", "--device=cpu"], "COPA", 9),
        (["--task=copa", f"--data-dir={tmp_path}/data", "--num-test=12"], "data/COPA", 12),
        (["--task=rte", "--num-test=9"], "RTE", 9),
    ):
        eval.main([sparse, *given])
        line = capsys.readouterr().out
        assert f"{task}: test" in line and f"(n = {n})" in line


@pytest.mark.parametrize("source", ["text", "task"])
def test_a_run_makes_its_own_mask(source, folder, tmp_path, capsys):
    """--mask-from text or task: as `python masks.py` with the flags that are printed."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("red blue a b c d . red e f g blue ?" for _ in range(60)))
    flags = [f"--mask-from={source}", "--density=0.02", "--num-validation=0"]
    flags += [f"--text={text}"] if source == "text" else []
    run(folder, tmp_path / "run", "senszoq", *flags)
    printed = next(l for l in capsys.readouterr().out.splitlines() if "python masks.py" in l)  # noqa: E741
    again = tmp_path / "again.safetensors"
    words = [w for w in printed.split() if w.startswith("--") and not w.startswith("--out")]
    make_mask.main([*words, f"--out={again}"])
    one, two = (
        sensitivity.read_mask(tmp_path / "run" / "mask.safetensors"),
        sensitivity.read_mask(again),
    )
    assert all(torch.equal(one[0][name], two[0][name]) for name in two[0])
    assert sum(len(i) for i in one[0].values()) / sum(
        int(torch.tensor(m["shape"]).prod()) for m in one[1]["matrices"].values()
    ) == pytest.approx(0.02, rel=0.1)


def test_sixteen_bits(folder, mask, tmp_path):
    """Both methods run in bf16 and move values by less than bf16 could hear."""
    for method in METHODS:
        run(folder, tmp_path / method, method, f"--mask={mask}", "--dtype=bfloat16", "--lr=1e-4")
        values = snapshot.read_sparse(tmp_path / method / "sparse.safetensors")[1]
        config, _ = record.open_run(tmp_path / method)
        before = eval.rebuild(config, [], tmp_path / method).tensors()
        last = eval.rebuild(config, record.open_run(tmp_path / method)[1], tmp_path / method)
        moved = torch.cat([(last.tensors()[n] - before[n]).abs() for n in before])
        lost = torch.cat([last.tensors()[n].bfloat16() == before[n].bfloat16() for n in before])
        assert (moved > 0).float().mean() > 0.99 and lost.float().mean() > 0.1
        assert values.keys() == before.keys()


# ------------------------------------------------------------------ bad input


def test_bad_flags_of_q_are_one_line(folder, mask, tmp_path, capsys, monkeypatch):
    """Each mistake is one line that names the value, before any model is loaded."""
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    other = tmp_path / "torn.safetensors"
    other.write_bytes(mask.read_bytes()[:200])
    cases = [
        (["--mask=nowhere.safetensors"], "no mask file nowhere.safetensors"),
        ([f"--mask={other}"], "is no complete mask file"),
        ([f"--mask={mask}", "--density=0.1"], "brings its own source and density"),
        ([f"--mask={mask}", "--mask-from=text"], "brings its own source and density"),
        (["--density=1e-6"], "takes none of the 512 weights of"),
        (["--density=0"], "--density 0.0: the share of weights that move"),
        (["--vectors=free"], "a mask says which weights move"),
        (["--rounding=nearest"], "their values are kept in fp32"),
        (["--refresh-every=5"], "only the dynamic mask of s-mezo"),
        (["--text=x.txt", "--mask-from=task"], "one of the two"),
        (["--device-map=auto"], "sees no GPU"),
        ([f"--mask={mask}", "--text=x.txt"], "leave out --mask-from, --text and --density"),
    ]
    for flags, message in cases:
        line = refused(arguments(folder, tmp_path / "run", "senszoq", *flags), train.main, capsys)
        assert message in line, (flags, line)
        assert not (tmp_path / "run").exists()
    for method, flag in (("mezo", "--text=x.txt"), ("s-mezo", "--mask-from=text")):
        line = refused(arguments(folder, tmp_path / "run", method, flag), train.main, capsys)
        assert "are for sensitive and senszoq" in line
    line = refused(
        arguments(folder, tmp_path / "run", "sensitive", "--no-double-quant"), train.main, capsys
    )
    assert "--no-double-quant is for senszoq" in line
    line = refused(
        arguments(folder, tmp_path / "run", "s-mezo", f"--mask={mask}"), train.main, capsys
    )
    assert "for sensitive and senszoq, not for s-mezo" in line


def test_a_run_goes_on_without_the_text_that_its_mask_was_made_from(folder, tmp_path):
    """The mask lies in the run's directory, so --resume reads no text, which may be gone."""
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("red blue a b c " * 200)
    flags = [f"--text={text}", "--density=0.01", "--steps=2"]
    train.main(arguments(folder, out, "sensitive", *flags))
    text.unlink()
    train.main([f"--resume={out}", "--steps=3"])
    assert len(train.record.open_run(out)[1]) == 3


def test_text_that_is_too_short_gives_the_name_back(folder, tmp_path, capsys):
    """A text shorter than one sample is one line, and the run directory is not left behind."""
    (tmp_path / "text.txt").write_text("red blue")
    flags = ["--mask-from=text", f"--text={tmp_path}/text.txt", "--density=0.02"]
    line = refused(arguments(folder, tmp_path / "run", "senszoq", *flags), train.main, capsys)
    assert "less than one sample" in line
    assert not (tmp_path / "run").exists()


def test_a_mask_that_was_made_survives_a_start_that_fails(folder, tmp_path, capsys, monkeypatch):
    """It may be hours of work: it is kept, a line says where, and no later run takes it away."""

    def no_memory(*arguments, **more):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(eval, "accuracy", no_memory)
    flags = ["--mask-from=task", "--density=0.02"]
    with pytest.raises(SystemExit):
        train.main(arguments(folder, tmp_path / "run", "sensitive", *flags))
    kept = tmp_path / "run" / "mask.safetensors"
    assert f"the mask that was made is kept: --mask {kept}" in capsys.readouterr().out
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    sensitivity.read_mask(kept)
    again = arguments(folder, tmp_path / "run", "sensitive", f"--mask={kept}")
    assert "is already there and not empty" in refused(again, train.main, capsys)
    assert kept.exists()
    with pytest.raises(SystemExit):  # a copied mask is not kept
        train.main(arguments(folder, tmp_path / "other", "sensitive", f"--mask={kept}"))
    assert kept.exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_for_another_model_is_refused(method, folder, mask, tmp_path, capsys):
    """Same shapes, other weights: refused by the values that the mask file remembers."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    flags = [f"--mask={mask}", f"--model={tmp_path}/model"]
    line = refused(arguments(folder, tmp_path / "run", method, *flags), train.main, capsys)
    assert f"was made for {folder}/model, not for this model" in line
    assert not (tmp_path / "run").exists()


def test_a_mask_that_changed_is_refused(folder, mask, tmp_path, capsys):
    """A run's mask.safetensors replaced by another: neither resumed nor evaluated."""
    run(folder, tmp_path / "run", "senszoq", f"--mask={mask}")
    (tmp_path / "run" / "mask.safetensors").unlink()
    make_mask.main(
        [f"--model={folder}/model", "--kind=random", "--density=0.02"]
        + [f"--out={tmp_path}/run/mask.safetensors"]
    )
    for main, argv in (
        (eval.main, [f"--run={tmp_path}/run"]),
        (train.main, [f"--resume={tmp_path}/run", "--steps=20"]),
    ):
        assert "is not the mask that the run began with" in refused(argv, main, capsys)
    assert len(record.open_run(tmp_path / "run")[1]) == 12


def test_a_sparse_file_is_checked(folder, mask, tmp_path, capsys):
    """A torn sparse file, one of another model or of another version are one line each."""
    run(folder, tmp_path / "run", "sensitive", f"--mask={mask}")
    sparse = tmp_path / "run" / "sparse.safetensors"
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(sparse.read_bytes()[:-9])
    files = [f"--{n}-file={folder}/{n}.jsonl" for n in ("train", "test")]
    line = refused([f"--sparse={torn}", *files], eval.main, capsys)
    assert "holds no sparse weights of train.py" in line
    line = refused([f"--sparse={mask}", *files], eval.main, capsys)
    assert "holds no sparse weights of train.py" in line
    tiny = str(loading.HERE / "tiny/model")
    line = refused([f"--sparse={sparse}", f"--model={tiny}", "--task=rte"], eval.main, capsys)
    assert "not for this model" in line
    index, values, about = snapshot.read_sparse(sparse)
    del about["data_fingerprint"]
    snapshot.write_sparse(tmp_path / "old.safetensors", index, values, about)
    line = refused([f"--sparse={tmp_path}/old.safetensors", *files], eval.main, capsys)
    assert "says no data_fingerprint: from another version" in line


def test_conv1d_goes_into_sixteen_bits_only(folder, tmp_path, capsys):
    """GPT-2's Conv1D trains as `sensitive`; as `senszoq` it is refused before loading."""

    build("gpt2").save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "gpt2")
    flags = [f"--model={tmp_path}/gpt2", "--mask-from=task", "--density=0.02"]
    line = refused(arguments(folder, tmp_path / "run", "senszoq", *flags), train.main, capsys)
    assert "is of a Conv1D; only nn.Linear goes into 4 bits" in line
    assert run(folder, tmp_path / "run", "sensitive", *flags)["best"]["n"] == 40


# ------------------------------------------------------------------ real models


@pytest.mark.parametrize("density", ["0.01", "0.001"])
def test_a_real_model_trains(shared, tmp_path, density):
    """tinystories656k on real SST-2 with a mask from real C4 text: it runs, in 16 and in 4 bits."""
    model, mask = f"--model={shared}/models/tinystories656k", tmp_path / "mask.safetensors"
    text = f"--text={shared}/data/text/c4_sample.jsonl"
    make_mask.main(
        [model, text, f"--density={density}", "--samples=8", "--length=64", f"--out={mask}"]
    )
    for method in METHODS:
        train.main(
            [model, "--task=sst2", f"--data-dir={shared}/data/sst2", f"--method={method}"]
            + [f"--mask={mask}", f"--out={tmp_path}/{method}", "--lr=1e-3", "--steps=3"]
            + ["--num-validation=20", "--num-test=20"]
        )
        assert (tmp_path / method / "sparse.safetensors").is_file()
