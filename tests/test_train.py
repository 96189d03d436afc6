"""train.py and eval.py: what a run writes, what it comes back from, and what is refused."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import kill
import numpy as np
import pytest
import torch
from models import build, needs_gpu
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eval
import masks
import model_patch
import quant
import tasks
import train
import zo
from harness import config as configs
from harness import dataset, loading, log, mask
from studies import find_lr, first_order

ROOT = Path(train.__file__).parent
SENSZOQ = ["--method=senszoq", "--mask-from=task", "--density=0.02", "--lr=0.3"]
METHODS = [
    ["--method=mezo", "--lr=1e-3"],
    ["--method=s-mezo", "--refresh-every=3", "--above=0.25"],
    ["--method=s-mezo", "--mask-kind=constant", "--refresh-every=3"],
    ["--method=s-mezo", "--mask-kind=constant", "--dtype=bfloat16"],
    ["--method=r-mezo", "--density=0.5", "--select=proj"],
    SENSZOQ,
    [*SENSZOQ, "--quantiser=kmeans", "--dtype=float16"],
    [*SENSZOQ, "--bits=16", "--dtype=bfloat16"],
]


def files(folder):
    return [f"--{name}-file={folder}/{name}.jsonl" for name in ("train", "test")]


def arguments(folder, out, *more):
    """The command line of a run of a second or less; what stands later counts."""
    few = ["--lr=1e-2", "--steps=8", "--eval-every=4"]
    return [f"--model={folder}/model", *files(folder), *few, f"--out={out}", *more]


def run(folder, out, *more):
    train.main(arguments(folder, out, *more))
    return json.loads((out / "result.json").read_text())


def code(main, argv) -> int:
    """The exit code. Nothing keeps the frames, and with them the lock of a log."""
    try:
        main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def refused(main, argv, capsys) -> str:
    """The one line that a command says which must end with exit code 2."""
    capsys.readouterr()
    assert code(main, argv) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if ": error: " in line]
    assert "Traceback" not in said and said.rstrip().endswith(line)
    return line


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps_of(directory):
    return log.StepLog(directory).steps


def moving(model):
    """The weights of a model: of a split one its values, else all."""
    parts = [part for module in model.modules() for part in quant.answers(module).values()]
    return [parts[0].sparse.values] if parts else [p.detach() for p in model.parameters()]


def rebuilt(directory, steps=None):
    """Those of a run after its first `steps` steps, by its log."""
    config, _, data = dataset.load(configs.load(directory, {}))
    logged = steps_of(directory)
    after = len(logged) if steps is None else steps
    return moving(train.rebuild(config, directory, data, logged, after))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def trained(monkeypatch):
    """After a run of train.main: its last weights, as they were in memory."""
    original, weights = train.train, []

    def spy(config, patch, *arguments):
        original(config, patch, *arguments)
        weights[:] = [theta.clone() for theta in patch.moving()]

    monkeypatch.setattr(train, "train", spy)
    return weights


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """A finished run of S-MeZO, the task it is of, and copies of its model that were changed."""
    base = tmp_path_factory.mktemp("base")
    run(folder, base / "run", "--refresh-every=3")
    for name in ("late", "nan"):
        shutil.copytree(folder / "model", base / name)
        tensors = load_file(base / name / "model.safetensors")
        tensors["model.norm.weight"][-1] += 1 if name == "late" else math.nan
        save_file(tensors, base / name / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "model", base / "other")
    build("llama-tied", seed=5, num_hidden_layers=1).save_pretrained(base / "other")
    text = (folder / "train.jsonl").read_text()
    flipped = text.replace('"label": 0', '"label": 2').replace('"label": 1', '"label": 0')
    (base / "flipped.jsonl").write_text(flipped.replace('"label": 2', '"label": 1'))
    return base


@pytest.fixture
def ready(base, tmp_path):
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(base / "run", tmp_path / "ready"))


# ------------------------------------------------------------------ what a run is


@pytest.mark.picture
@pytest.mark.parametrize("flags", METHODS, ids=" ".join)
def test_the_log_rebuilds_the_last_weights_to_the_bit(flags, folder, tmp_path, trained):
    """A run of every method is whole, and its log gives its last weights to the bit."""
    out = tmp_path / "run"
    result = run(folder, out, *flags)
    names = {"config.json", "steps.csv", "result.json", "curve.png"}
    assert {p.name for p in out.iterdir()} - {"mask.safetensors"} == names
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    found = log.StepLog(out)
    lines = [found.start, *found.steps]
    assert [line.step for line in lines] == list(range(9))
    assert [line.step for line in lines if line.validation is not None] == [0, 4, 8]
    assert all(0 < line.active_density <= 1 for line in lines[::4])
    assert result["best_step"] in (0, 4, 8)
    for name in ("zero_shot", "last", "best"):
        assert 0 <= result[name]["value"] <= 1 and result[name]["n"] == 20
    assert {"hardware", "torch", "transformers", "seconds"} <= result.keys()
    end = rebuilt(out)
    if "--select=proj" in flags:  # only those have a place in the patch
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        end = [w for w, (n, _) in zip(end, model.named_parameters(), strict=True) if "proj" in n]
    assert equal(trained, end)
    assert not any(torch.equal(a, b) for a, b in zip(end, rebuilt(out, 0), strict=False))


def test_one_seed_is_one_run(folder, tmp_path):
    """Runs of one seed have the same log to the last digit, and runs of two do not."""
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(logs))  # the global generator must not matter
        run(folder, tmp_path / name, f"--seed={seed}")
        logs.append((tmp_path / name / "steps.csv").read_text())
    assert logs[0] == logs[1] != logs[2]


def test_the_log_is_minus_lr_times_proj_grad_and_a_fresh_seed(folder, tmp_path):
    """A line's a is −η times the slope of its own losses, and its seed that of the step."""
    run(folder, tmp_path / "run", "--seed=5")
    for step in steps_of(tmp_path / "run"):
        assert step.seed == zo.step_seed(5, step.step - 1)
        slope = (step.loss_plus - step.loss_minus) / (2 * 1e-3)
        assert step.a == float(np.float32(-1e-2 * slope))


def test_training_learns(folder, tmp_path):
    """60 steps of MeZO bring the training loss well below that of a coin."""
    flags = ["--steps=60", "--eval-every=60", "--lr=2e-3", "--num-test=1", "--num-validation=1"]
    run(folder, tmp_path / "run", "--method=mezo", *flags)
    losses = [step.loss_plus for step in steps_of(tmp_path / "run")]
    assert sum(losses[-20:]) / 20 < 0.75 * sum(losses[:5]) / 5


def test_validation_chooses_the_weights_that_are_tested(folder, tmp_path, monkeypatch, capsys):
    """Result and eval.py take the step with the best validation accuracy, the first of equals."""
    script = iter([0.5, 0.6, 0.9, 0.9, 0.8])  # at steps 0, 2, 4, 6, 8
    original = train.score

    def scripted(config, model, tokenizer, examples):
        if len(examples) == 12:  # the validation examples: a third of 36
            return tasks.Score(next(script), 12)
        return original(config, model, tokenizer, examples)

    monkeypatch.setattr(train, "score", scripted)
    result = run(folder, tmp_path / "run", "--eval-every=2")
    assert result["best_step"] == 4
    capsys.readouterr()
    eval.main([f"--run={tmp_path}/run"])
    assert "after 4 of 8 logged steps (--steps 8)" in (line := capsys.readouterr().out)
    assert f"accuracy {result['best']['value']:.3f} ±" in line


def test_a_loss_that_is_not_finite_never_touches_the_weights(
    folder, tmp_path, monkeypatch, trained, capsys
):
    """A step whose loss is NaN or infinite is logged and moves nothing; twenty in a row end it."""
    original, calls = tasks.classification_loss, []

    def sometimes(logits, batch):
        calls.append(1)  # two for the look before training, then two for each step
        bad = {5: math.nan, 6: math.nan, 10: math.inf}
        return original(logits, batch) * bad.get(len(calls), 1)

    monkeypatch.setattr(tasks, "classification_loss", sometimes)
    assert run(folder, tmp_path / "a")["skipped"] == 2
    steps = steps_of(tmp_path / "a")
    assert [s.step for s in steps if not math.isfinite(s.a)] == [2, 4]
    kept = [s for s in steps if math.isfinite(s.a)]
    monkeypatch.setattr(tasks, "classification_loss", original)
    assert equal(trained, rebuilt(tmp_path / "a"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    patch = model_patch.Patch(model, masks.SmallWeights(0.25))
    for step in kept:
        patch.update(step.seed, step.a)
    patch.remove()
    assert equal(trained, moving(model))
    monkeypatch.setattr(tasks, "classification_loss", lambda *_: torch.tensor(math.nan))
    error = refused(train.main, arguments(folder, tmp_path / "b", "--steps=40"), capsys)
    assert "20 steps in a row had no finite loss" in error and "goes on" not in error
    assert len(steps_of(tmp_path / "b")) == 19


def test_scores_that_are_not_finite_are_wrong(folder, monkeypatch, capsys):
    """An example without finite scores counts as wrong and is counted; only such is an error."""
    original = tasks.option_scores

    def broken(logits, batch):
        scores = original(logits, batch)
        scores[:which] = math.nan
        return scores

    monkeypatch.setattr(tasks, "option_scores", broken)
    argv, which = [f"--model={folder}/model", *files(folder), "--batch-size=10"], 1
    eval.main(argv)
    assert "(n = 20, 2 of the examples without finite scores)" in capsys.readouterr().out
    which = None
    assert "no log-probability of any example is finite" in refused(eval.main, argv, capsys)


def test_the_picture_may_fail(folder, tmp_path, monkeypatch, capsys):
    """Without its picture a run is whole, and a line says why there is none."""

    def fails(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(log, "draw_curve", fails)
    assert run(folder, tmp_path / "run").keys() >= {"last", "best"}
    out = capsys.readouterr().out
    assert "no curve.png: RuntimeError: no font" in out and "test accuracy, last weights" in out


@pytest.mark.parametrize("backend", ["nonsense", "matplotlib_inline.backend_inline"])
def test_the_picture_is_drawn_wherever_it_may_be(backend, base, tmp_path):
    """A notebook's backend in the environment and dollars in a path are no obstacle to it."""
    run = shutil.copytree(base / "run", tmp_path / "a$b$c")
    (run / "curve.png").unlink()
    program = "import sys, pathlib; from harness import log; where = pathlib.Path(sys.argv[1]); "
    program += "log.draw_curve(log.StepLog(where), f'{where}/$x_', 0.5)"
    environment = {"MPLBACKEND": f"module://{backend}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program, str(run)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_values_and_their_sources(base, folder, capsys, tmp_path):
    """What the user leaves out comes from the papers' tables, and is printed with its source."""

    def filled(family, **said):
        return configs.fill_in(train.Config(model="x", **said), family)

    config, sources = filled("llama", task="rte")
    assert (config.density, config.steps, config.eps) == (0.25, 20_000, 1e-3)
    assert sources["density"] == "[S] Table 8: sparsity 0.75 on rte"
    assert config.lr in (1e-6, 2e-6, 3e-6, 4e-6, 5e-6) and "[S] Table 6" in sources["lr"]
    assert config.batch_size == 16 and config.eval_every == 2_000
    assert filled("mistral", task="boolq")[0].density == 0.4
    assert filled("llama", method="mezo", task="rte")[0].density == 1
    config, sources = filled("opt", method="senszoq", task="rte", lr=1.0)
    assert (config.density, config.bits, config.lr) == (0.001, 4, 1.0) and "lr" not in sources
    run(folder, tmp_path / "run", "--steps=1")
    rows = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()[:12]]
    assert ["lr", "0.01", "you"] in [[w.strip() for w in row] for row in rows]
    assert any(row[:2] == ["density", "0.25"] and "[S]" in row[2] for row in rows)


# ------------------------------------------------------------------ going on with a run


@pytest.mark.parametrize("flags", [["--refresh-every=3"], SENSZOQ], ids=["s-mezo", "senszoq"])
def test_a_torn_last_line_is_dropped(flags, folder, tmp_path, trained):
    """From a log with a torn last line a run goes on to the same bytes and the same weights."""
    run(folder, tmp_path, *flags)
    weights, log_file = [w.clone() for w in trained], tmp_path / "steps.csv"
    whole, before = log_file.read_bytes(), json.loads((tmp_path / "result.json").read_text())
    lines = whole.splitlines(keepends=True)
    for last in (0, 5):
        log_file.write_bytes(b"".join(lines[: last + 2]) + lines[last + 2][:-5])
        train.main([f"--resume={tmp_path}"])
        assert log_file.read_bytes() == whole and equal(trained, weights)
        after = json.loads((tmp_path / "result.json").read_text())
        for name in ("zero_shot", "last", "best", "best_step", "skipped"):
            assert after[name] == before[name]


def test_a_line_that_the_disk_has_no_room_for_ends_the_run(ready):
    """A line that is written in part is no finished step: it is said, and stays the last one."""
    steps = log.StepLog(ready, True)
    steps.file = SimpleNamespace(write=lambda data: len(data) // 2)
    with pytest.raises(OSError, match="the disk is full"):
        steps.append(steps.steps[-1]._replace(step=9))
    assert len(log.StepLog(ready).steps) == 8


@pytest.mark.parametrize("content", ["whole", "torn"])
def test_a_file_is_whole_or_as_it_was(content, tmp_path):
    """What is written takes a file's place when it is complete; else nothing is left of it."""
    (path := tmp_path / "f.json").write_text("before")
    with pytest.raises(OSError) if content == "torn" else contextlib.nullcontext():
        with configs.whole(path) as beside:
            beside.write_text(content)
            if content == "torn":
                raise OSError("the disk is full")
    assert path.read_text() == ("before" if content == "torn" else content)
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_run_of_q_reads_a_mask_in_its_folder(ready):
    """A mask that lies in a run of S-MeZO says nothing of its density."""
    (ready / "mask.safetensors").write_text("no mask")
    train.main([f"--resume={ready}"])


@pytest.mark.parametrize(
    "a, plus, minus, advice",
    [(0.0, 1.0, 1.0, "--eps 0.001 is too small for this dtype or far too high"),
     (0.0, 1.0, 1.1, "η · proj_grad was too small: try a higher --lr"),
     (math.nan, math.inf, math.inf, "a loss was not finite: try a lower --lr or --eps")],
)  # fmt: skip
def test_steps_that_move_nothing_say_why(a, plus, minus, advice, capsys):
    """Equal losses, an update that fp32 rounds to 0 and a loss that overflows are told apart."""
    record = log.StepLog(None)
    record.append(log.Step(1, 0, a, plus, minus))
    train.advise(configs.Config(eps=1e-3), record)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("1 steps moved nothing, as ") and advice in line


def test_a_run_keeps_the_dtype_that_it_took(ready):
    """What `auto` stood for is in the settings, as another machine may choose otherwise."""
    assert json.loads((ready / "config.json").read_text())["dtype"] == "float32"


def test_more_steps_are_what_a_longer_run_would_have_done(folder, ready, tmp_path):
    """--resume with --steps ends as a run that was asked for them at once."""
    run(folder, tmp_path / "long", "--refresh-every=3", "--steps=12")
    train.main([f"--resume={ready}", "--steps=12"])
    assert (ready / "steps.csv").read_bytes() == (tmp_path / "long" / "steps.csv").read_bytes()
    assert json.loads((ready / "config.json").read_text())["steps"] == 12


def test_a_longer_run_that_stops_has_no_result_of_the_shorter(ready, monkeypatch, capsys):
    """What was tested after step 8 is not said of a later one; a torn result.json is named."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([f"--resume={ready}", "--steps=12"])
    result = json.loads((ready / "result.json").read_text())
    assert result["zero_shot"]["n"] == 20 and not {"last", "best", "best_step"} & result.keys()
    (ready / "result.json").write_text('{"zero_shot": ')
    assert "result.json is torn" in refused(train.main, [f"--resume={ready}"], capsys)


CHANGES = {
    "model": ["--model={base}/other"],
    "a late value of the model": ["--model={base}/late"],
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_refuses_what_is_not_the_runs_own(what, base, ready, capsys):
    """Changed settings, model or data are one line that says the difference; no file changes."""
    before = contents(ready)
    flags = [flag.format(base=base) for flag in CHANGES[what]]
    not_its_own(ready, flags, before, capsys)


def not_its_own(run, flags, before, capsys):
    error = refused(train.main, [f"--resume={run}", "--steps=12", *flags], capsys)
    assert "step 8 does not come out as it was logged" in error and "has changed" in error
    step = steps_of(run)[-1]
    assert repr(step.a) in error and repr(step.loss_plus) in error
    assert contents(run) == before


def edit_config(run, edit):
    kept = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(kept | edit))


EDITS = [{"method": "r-mezo", "refresh_every": 0}, {"density": 0.5}, {"batch_size": 8}]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_resume_refuses_a_config_that_was_edited(edit, ready, capsys):
    """Another setting in config.json is noticed by the step that is taken again."""
    edit_config(ready, edit)
    not_its_own(ready, [], contents(ready), capsys)


@pytest.mark.parametrize("edit", [{"seed": 1}, {"lr": 2e-2}, {"eps": 2e-3}], ids=str)
def test_a_line_follows_from_its_losses(edit, ready, capsys):
    """Another seed, η or ε in config.json is noticed by the first line of the log."""
    edit_config(ready, edit)
    before = contents(ready)
    for main, argv in ((train.main, [f"--resume={ready}"]), (eval.main, [f"--run={ready}"])):
        assert "is no step of this run: seed and a" in refused(main, argv, capsys)
    assert contents(ready) == before


@pytest.mark.parametrize(
    "typed",
    ["--seed=1", "--method=mezo", "--density=0.5", "--select=layers.0", "--mask-kind=constant",
     "--above=0.1", "--refresh-every=0", "--rounding=nearest", "--lr=0.02", "--eps=0.01",
     "--batch-size=8"],
)  # fmt: skip
def test_a_resumed_run_moves_what_it_moved(typed, ready, capsys):
    """Refused before anything is loaded: 16 bits bear much rounding, and might miss a change."""
    before = contents(ready)
    error = refused(train.main, [f"--resume={ready}", "--steps=9", typed], capsys)
    assert f"{typed.split('=')[0]} cannot be changed in {ready}, which has " in error
    assert contents(ready) == before


def test_a_setting_that_is_said_again_is_no_change(ready):
    """What a run has may be said on --resume."""
    same = ["--refresh-every=3", "--seed=0", "--max-length=2048"]  # which is all that the model has
    train.main([f"--resume={ready}", "--steps=9", *same])


def test_a_run_of_q_does_not_go_on_with_another_mask(folder, tmp_path, capsys):
    """A run's mask that was replaced by another of its size is noticed as any change is."""
    out = tmp_path / "run"
    run(folder, out, *SENSZOQ)
    assert "zero-shot in 4 bits, test accuracy" in capsys.readouterr().out  # not the original's
    (out / "mask.safetensors").unlink()
    make = [f"--model={folder}/model", "--kind=random", "--density=0.02"]
    mask.main([*make, f"--out={out}/mask.safetensors"])
    before = contents(out)
    for main, argv in ((train.main, [f"--resume={out}"]), (eval.main, [f"--run={out}"])):
        error = refused(main, [*argv, *(["--step=last"] if main is eval.main else [])], capsys)
        assert "does not come out as it was logged" in error
    assert contents(out) == before


def test_rounding_is_said_and_no_obstacle(ready, monkeypatch, capsys):
    """Losses that differ by a millionth are another machine's, and the run goes on with them."""
    original = train.losses

    def rounded(patch, batches, seed):
        plus, minus = original(patch, batches, seed)
        return plus * (1 + 1e-6), minus

    monkeypatch.setattr(train, "losses", rounded)
    train.main([f"--resume={ready}", "--steps=10"])
    assert "comes out as it was logged but for rounding" in capsys.readouterr().out
    assert len(steps_of(ready)) == 10


def test_a_loss_that_is_no_number_comes_out_again(capsys):
    """A step with one such loss, taken again on another machine, is the same step."""
    logged = log.Step(4, 3, math.nan, math.nan, 0.7)
    log.compare(logged, logged._replace(loss_minus=0.7000001), "float32", "run")
    assert "but for rounding" in capsys.readouterr().out
    for other in ({"loss_plus": 0.7}, {"loss_minus": math.nan}, {"loss_minus": 0.8}):
        with pytest.raises(ValueError, match="step 4 does not come out as it was logged"):
            log.compare(logged, logged._replace(**other), "float32", "run")


@pytest.mark.parametrize("reads_at_first", [True, False])
def test_a_batch_need_not_reach_every_expert(reads_at_first, folder, tmp_path, monkeypatch, capsys):
    """What some forward pass reads before training may move; --resume does not ask again."""
    original, asked = loading.load_model, []

    def with_expert(*args, **how):
        def one_batch(mlp, *_):  # before training reaches it
            expert = quant.answers(mlp.expert).get("weight")
            if reads_at_first and not asked and expert and expert.patch.shift is None:
                asked.append(mlp.expert.weight)

        model = original(*args, **how)
        mlp = model.model.layers[0].mlp
        mlp.expert = torch.nn.Linear(4, 4, bias=False).eval()
        mlp.register_forward_hook(one_batch)
        return model

    monkeypatch.setattr(loading, "load_model", with_expert)
    argv = arguments(folder, tmp_path / "run", "--compile=no")
    if not reads_at_first:
        said = refused(train.main, argv, capsys)
        assert "no forward reads model.layers.0.mlp.expert.weight (1 such" in said
        return
    train.main(argv)
    train.main([f"--resume={tmp_path}/run", "--steps=10"])
    assert len(steps_of(tmp_path / "run")) == 10 and len(asked) == 1


def test_other_test_examples_are_said(folder, ready, tmp_path, capsys):
    """Those that score the weights leave no trace in a loss; a run notices, and says so once."""
    train.main([f"--resume={ready}", "--steps=9"])
    assert "are not those" not in capsys.readouterr().out
    rows = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(rows[1:]))
    train.main([f"--resume={ready}", "--steps=10", f"--test-file={tmp_path}/test.jsonl"])
    assert "the test examples are not those that the run began with" in capsys.readouterr().out
    result = json.loads((ready / "result.json").read_text())
    assert result["zero_shot"] is None and result["last"]["n"] == len(rows) - 1
    train.main([f"--resume={ready}", "--steps=11"])
    assert "are not those" not in capsys.readouterr().out  # said once


@pytest.mark.parametrize("flag", ["--data-seed=1", "--train-file={base}/flipped.jsonl",
                                  "--max-length=32"])  # fmt: skip
def test_another_draw_and_other_labels_are_refused(flag, base, ready, capsys):
    """Examples of another seed, or with other labels, are not those that the run learnt from."""
    before = contents(ready)
    argv = [f"--resume={ready}", "--steps=12", flag.format(base=base)]
    assert "the training or validation examples are not those" in refused(train.main, argv, capsys)
    assert contents(ready) == before


def test_other_validation_examples_are_refused(base, folder, tmp_path, capsys):
    """Accuracies on two sets name no best step."""
    run(folder, tmp_path / "run", f"--validation-file={folder}/test.jsonl")
    argv = [f"--resume={tmp_path}/run", f"--validation-file={base}/flipped.jsonl", "--steps=9"]
    assert "the training or validation examples are not those" in refused(train.main, argv, capsys)


def test_other_training_examples_are_refused(folder, ready, tmp_path, capsys):
    """Also where the changed row is not in the batch that --resume takes again."""
    (config, _, data), before = dataset.load(configs.load(ready, {})), contents(ready)
    last = tasks.minibatch(
        len(data.train), config.batch_size, config.seed, len(steps_of(ready)) - 1
    )
    other = next(e for i, e in enumerate(data.train) if i not in last)
    text = (folder / "train.jsonl").read_text()
    assert json.dumps(other.prompt) in text
    changed = text.replace(json.dumps(other.prompt), json.dumps("a " + other.prompt))
    (tmp_path / "train.jsonl").write_text(changed)
    argv = [f"--resume={ready}", "--steps=9", f"--train-file={tmp_path}/train.jsonl"]
    assert "the training or validation examples are not those" in refused(train.main, argv, capsys)
    assert contents(ready) == before


def test_a_run_goes_on_in_smaller_parts(ready, capsys):
    """--resume with --micro-batch, after memory was full, goes on with the same steps."""
    before = (ready / "steps.csv").read_text()
    train.main([f"--resume={ready}", "--micro-batch=3", "--steps=10"])
    assert (ready / "steps.csv").read_text().startswith(before)
    assert json.loads((ready / "config.json").read_text())["micro_batch"] == 3


def test_ctrl_c_says_how_to_go_on(folder, ready, tmp_path, monkeypatch, capsys):
    """A stopped run says the command that goes on with it, and that gives the unstopped run."""
    original, calls = model_patch.Patch.update, []

    def interrupted(self, seed, a):
        calls.append(original(self, seed, a))
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_patch.Patch, "update", interrupted)
    assert code(train.main, arguments(folder, tmp_path / "run", "--refresh-every=3")) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(f"stopped; python train.py --resume {tmp_path}/run goes on")
    monkeypatch.undo()
    assert len(steps_of(tmp_path / "run")) == 5
    result = tmp_path / "run/result.json"
    before = json.loads(result.read_text())["seconds"]
    train.main([f"--resume={tmp_path}/run"])
    assert json.loads(result.read_text())["seconds"] > before > 0
    assert (tmp_path / "run/steps.csv").read_bytes() == (ready / "steps.csv").read_bytes()


def test_a_directory_that_is_no_run_is_left_alone(folder, tmp_path, capsys):
    """--resume of a folder without config.json, and --out of one with files, delete nothing."""
    (tmp_path / "steps.csv").write_text("mine")
    for argv, message in (
        ([f"--resume={tmp_path}"], "is no run directory"),
        ([f"--resume={tmp_path}/none"], "is no run directory"),
        (arguments(folder, tmp_path), "is not empty"),
    ):
        error = refused(train.main, argv, capsys)
        assert message in error and "or --resume" not in error
        assert contents(tmp_path) == {"steps.csv": b"mine"}


def other_sign(found):
    return found[1] + ("" if found[2] else "-")


@pytest.mark.parametrize(
    "file, spoil, message",
    [
        ("config.json", lambda text: text[:99], "is torn or of another version"),
        ("config.json", lambda text: text.replace('"lr"', '"rate"'), "is torn or of another"),
        ("steps.csv", lambda text: text.replace("\n3,", "\n4,", 1), "line 5 is '4,"),
        ("steps.csv", lambda text: text.replace("\n3,", "\n3,,", 1), "number of columns"),
        ("steps.csv", lambda text: text.replace("\n3,", "\n\0\n3,", 1), "line 5 is"),
        ("steps.csv", lambda text: re.sub(r"\n1,\d+,", "\n1,,", text), "is no step of this run"),
        ("steps.csv", lambda text: re.sub(r"(\n2,\d+,)(-?)", other_sign, text), "is no step"),
        ("steps.csv", lambda text: re.sub(r"(\n2,\d+,)[^,]+", r"\g<1>0.0", text), "'2,1,0.0,"),
        ("steps.csv", lambda text: text.replace("\n", "\r"), "saved by another program"),
        ("steps.csv", lambda text: re.sub(r"\n1,\d+,", "\n1,-7,", text), "is no step"),
        ("steps.csv", lambda text: re.sub(r"(\n1,[^,]+,[^,]+,)[^,]+", r"\1", text), "is no step"),
        ("config.json", lambda text: text.replace("{", '{"by": "studies",', 1), "is of studies"),
    ],
)
def test_files_that_were_edited_are_one_line(file, spoil, message, ready, capsys):
    """A run with an edited file is refused and stays as it is."""
    (ready / file).write_text(spoil((ready / file).read_text()))
    before = contents(ready)
    for main, argv in ((train.main, [f"--resume={ready}"]), (eval.main, [f"--run={ready}"])):
        assert message in refused(main, argv, capsys)
    assert contents(ready) == before


@pytest.mark.parametrize("text", ["[]", '{"seconds": null}', '{"zero_shot": 0.5}'])
def test_a_result_of_another_kind_is_one_line(text, ready, capsys):
    """It is said before the work, and not when the run ends."""
    (ready / "result.json").write_text(text)
    assert "result.json is torn" in refused(train.main, [f"--resume={ready}"], capsys)


def test_a_config_may_begin_with_an_editors_mark(ready):
    """A byte order mark, which an editor may write, is no part of config.json."""
    text = (ready / "config.json").read_text()
    (ready / "config.json").write_text(text, encoding="utf-8-sig")
    train.main([f"--resume={ready}", "--steps=9"])


def test_two_processes_do_not_train_one_run(folder, ready, capsys):
    """While a run is being trained, no other process writes its log."""
    held = log.StepLog(ready, write=True)
    before = contents(ready)
    error = refused(train.main, [f"--resume={ready}", "--steps=12"], capsys)
    assert error.endswith("is being trained by another process right now")
    error = refused(train.main, arguments(folder, ready), capsys)
    assert error.endswith(f"choose another, or --resume {ready}") and contents(ready) == before
    held.file.close()
    assert code(train.main, [f"--resume={ready}", "--steps=9"]) == 0


def test_a_start_that_fails_leaves_nothing(folder, tmp_path, capsys):
    """What only the loaded model shows to be wrong leaves no directory that blocks the name."""
    argv = arguments(folder, tmp_path / "run", "--select=nothing")
    error = refused(train.main, argv, capsys)
    assert "nothing moves: no parameter's name matches 'nothing'" in error
    assert not (tmp_path / "run").exists() and "goes on" not in error
    train.main(arguments(folder, tmp_path / "run", "--select=proj"))
    assert len(steps_of(tmp_path / "run")) == 8


def test_a_start_that_fails_keeps_the_mask(folder, tmp_path, monkeypatch, capsys):
    """A mask of [Q] that was made before the failure is used when the run goes on."""
    with monkeypatch.context() as patched:
        patched.setattr(quant, "DenseSparse", lambda *_: (_ for _ in ()).throw(OSError("full")))
        error = refused(train.main, arguments(folder, tmp_path / "run", *SENSZOQ), capsys)
    assert error.endswith(f"full; python train.py --resume {tmp_path}/run goes on")
    monkeypatch.setattr(mask, "make", lambda *_: pytest.fail("the mask was made again"))
    train.main([f"--resume={tmp_path}/run"])
    assert len(steps_of(tmp_path / "run")) == 8


def test_a_start_with_another_models_mask_leaves_nothing(folder, tmp_path, capsys):
    """The user has the mask's file, so no run is kept, and none is said to go on."""
    weights = masks.decoder_linears(loading.load_model(f"{folder}/model"))
    others = {name: w + 0.01 for name, w in weights.items()}
    mask.save(tmp_path / "of", masks.largest(others, 0.01), others, {})
    flags = ["--method=senszoq", "--bits=16", f"--mask={tmp_path}/of"]
    argv = arguments(folder, tmp_path / "run", *flags)
    short = [word for word in argv if not word.startswith(("--steps", "--eval-every"))]
    for main, words in ((train.main, argv), (find_lr.main, short)):
        error = refused(main, words, capsys)
        assert "has other values here" in error and "--resume" not in error
        assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_kill_9_at_random_moments(folder, tmp_path, monkeypatch):
    """Killed between and inside its writes, a run ends as if it had been left alone."""
    fork = get_context("fork")  # of this process, which has imported everything
    monkeypatch.setattr(kill, "get_context", lambda _: fork)
    killed, finished = kill.kill_often(folder, tmp_path, kills=5, seed=1)
    assert killed == 5 and finished >= 1


def test_weights_that_broke_are_not_the_checkpoint_s_fault(folder, tmp_path, capsys, monkeypatch):
    """Where thresholds are taken of weights that are no numbers, a line says the rate."""

    def update(patch, seed, a):
        patch.weights[0].theta.fill_(math.nan)

    monkeypatch.setattr(model_patch.Patch, "update", update)
    argv = arguments(folder, tmp_path / "run", "--refresh-every=1")
    error = refused(train.main, argv, capsys)
    assert "the weights are not finite: --lr 0.01" in error and "goes on" not in error
    assert f"eval.py --run {tmp_path}/run evaluates" in error


def test_a_task_of_few_rows_goes_on(folder, tmp_path, capsys):
    """Where [Q]'s 200 validation examples are not there, a run keeps those that it took."""
    row = {"context": "a", "answerA": "x", "answerB": "y", "answerC": "z", "label": "1"}
    rows = "".join(json.dumps(row | {"question": f"b {i}?"}) + "\n" for i in range(12))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    where = [f"--model={folder}/model", "--task=siqa", f"--data-dir={tmp_path}"]
    train.main([*where, "--lr=1e-3", "--steps=2", "--batch-size=2", f"--out={tmp_path}/run"])
    train.main([f"--resume={tmp_path}/run", "--steps=3"])
    assert len(steps_of(tmp_path / "run")) == 3
    numbers = "train 8, validation 4, test 12; [Q] appendix, dataset splits"
    assert capsys.readouterr().out.count(numbers) == 2


@needs_gpu
@pytest.mark.parametrize("flags", METHODS, ids=" ".join)
def test_on_a_gpu_a_run_is_its_log(flags, folder, tmp_path, trained):
    """On CUDA, too, the log gives the last weights to the bit, and a cut run ends as it."""
    run(folder, tmp_path / "run", "--device=cuda", *flags)
    whole, weights = (tmp_path / "run/steps.csv").read_bytes(), [w.clone() for w in trained]
    if "--select=proj" not in flags:
        assert equal(weights, rebuilt(tmp_path / "run"))
    (tmp_path / "run/steps.csv").write_bytes(whole[: len(whole) * 2 // 3])
    train.main([f"--resume={tmp_path}/run"])
    assert (tmp_path / "run/steps.csv").read_bytes() == whole and equal(trained, weights)


# ------------------------------------------------------------------ masks of [Q]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone")
def test_the_peak_of_memory_counts_from_its_restart():
    """Half a gigabyte that is gone by then is no part of the peak."""
    cpu = torch.device("cpu")
    torch.ones(1 << 27)
    before = loading.machine(cpu)["peak_memory_bytes"]
    loading.restart_peak()
    assert loading.machine(cpu)["peak_memory_bytes"] < before - 4e8


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone")
def test_the_peak_of_a_run_is_that_of_its_training(folder, tmp_path, monkeypatch):
    """What loading takes for a moment, before training or for the best step's test, is no part."""
    took = []

    def taking(numbers, function):
        return lambda *args, **how: took.append(torch.ones(numbers).sum()) or function(*args, **how)

    monkeypatch.setattr(loading, "load_model", taking(1 << 28, loading.load_model))  # a gigabyte
    monkeypatch.setattr(train, "train", taking(1 << 27, train.train))
    monkeypatch.setattr(log.StepLog, "best_step", lambda self: 4)
    peak = run(folder, tmp_path / "run", "--device=cpu")["peak_memory_bytes"]
    loading.restart_peak()
    assert 4e8 < peak - loading.peak_memory(torch.device("cpu")) < 8e8 and len(took) == 3


@pytest.mark.parametrize("flags", [[], SENSZOQ], ids=["s-mezo", "senszoq"])
def test_a_model_is_gone_before_the_next_is_loaded(flags, folder, tmp_path, monkeypatch):
    """No two models share the memory: the scored one, the trained one and that of the best step."""
    load, loaded = loading.load_model, []

    def one(*args, **how):
        assert not [model for model in loaded if model() is not None]
        model = load(*args, **how)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", one)
    monkeypatch.setattr(log.StepLog, "best_step", lambda self: 4)
    run(folder, tmp_path / "run", *flags)
    assert len(loaded) == (3 if flags else 2)


@pytest.mark.parametrize("status", ["VmRSS: 5 kB", FileNotFoundError()], ids=repr)
def test_a_system_that_does_not_tell_its_peak_has_none(status, monkeypatch):
    """A run that has ended must not fail at its last line."""

    def read(path):
        if isinstance(status, str):
            return status
        raise status

    monkeypatch.setattr(Path, "read_text", read)
    assert loading.machine(torch.device("cpu"))["peak_memory_bytes"] is None


def test_a_run_brings_its_own_mask(folder, tmp_path, capsys):
    """A mask made from a text is the command's, and --mask with that file gives the same run."""
    text, file = tmp_path / "text.txt", tmp_path / "mask.safetensors"
    text.write_text("\n\n".join("red blue a b c d . red e f g blue ?" for _ in range(60)))
    made = [f"--text={text}", "--density=0.02"]
    run(folder, tmp_path / "a", "--method=senszoq", "--lr=0.3", *made)
    mask.main([f"--model={folder}/model", *made, f"--out={file}"])
    index, again = (mask.load(path).index for path in (tmp_path / "a/mask.safetensors", file))
    assert equal(index.values(), again.values())
    run(folder, tmp_path / "b", "--method=senszoq", "--lr=0.3", f"--mask={file}")
    assert (tmp_path / "b/mask.safetensors").read_bytes() == file.read_bytes()
    assert (tmp_path / "a/steps.csv").read_bytes() == (tmp_path / "b/steps.csv").read_bytes()
    assert "density        0.02" in capsys.readouterr().out
    train.main([f"--resume={tmp_path}/a", f"--text={os.path.relpath(text)}"])
    text.unlink(), file.unlink()  # each run has an own copy
    for name in ("a", "b"):
        train.main([f"--resume={tmp_path}/{name}", "--steps=9"])
        assert len(steps_of(tmp_path / name)) == 9


# ------------------------------------------------------------------ eval.py


@pytest.mark.parametrize(
    "flags",
    [[], SENSZOQ, [*SENSZOQ, "--quantiser=kmeans"], [*SENSZOQ, "--bits=16"]],
    ids=["s-mezo", "senszoq", "kmeans", "16"],
)
def test_eval_gives_the_numbers_of_the_run(flags, folder, tmp_path, capsys):
    """A run at its best, last or any step answers as it did, and so does its saved checkpoint."""
    out = tmp_path / "run"
    result = run(folder, out, *flags)

    def accuracy(*argv):
        capsys.readouterr()
        eval.main([str(word) for word in argv])
        return capsys.readouterr().out.split("accuracy ")[1].split()[0]

    for step in ("best", result["best_step"]):
        assert accuracy(f"--run={out}", f"--step={step}") == f"{result['best']['value']:.3f}"
    start = accuracy(f"--model={folder}/model", *files(folder))
    assert start == f"{result['zero_shot']['value']:.3f}"
    saved = tmp_path / "saved"
    last = accuracy(f"--run={out}", "--step=last", f"--save={saved}")
    assert accuracy(f"--model={saved}", *files(folder)) == last == f"{result['last']['value']:.3f}"
    model = AutoModelForCausalLM.from_pretrained(saved)
    if not flags:
        assert equal(moving(model), rebuilt(out))
    for name, places in mask.load(out / "mask.safetensors").index.items() if flags else ():
        theirs = model.get_parameter(name).detach().flatten()[places.long()]
        assert torch.isin(theirs, rebuilt(out)[0]).all()


def test_eval_refuses_another_base_model(base, ready, capsys):
    """A log replayed on another model, or on one with a late value changed, is an error."""
    for name in ("other", "late"):
        argv = [f"--run={ready}", "--step=last", f"--model={base}/{name}"]
        assert "does not come out as it was logged" in refused(eval.main, argv, capsys)


def test_eval_of_solved_examples_and_of_validation(folder, capsys):
    """--shots puts solved examples before the prompt, and --split names the part."""
    flags = ["--shots=4", "--split=validation"]
    eval.main([f"--model={folder}/model", *files(folder), *flags])
    out = capsys.readouterr().out
    assert "4 shots" in out and "validation accuracy" in out and "(n = 12)" in out


def test_traceback_shows_where(folder, capsys):
    """With --traceback an error is raised as it is, also of a command that Python calls."""
    with pytest.raises(ValueError, match="mezo moves all weights"):
        train.main(["--method=mezo", "--density=0.5", "--traceback", *files(folder)])


def test_what_is_one_process_says_so(folder, monkeypatch, capsys):
    """Commands that know nothing of workers refuse torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main in (eval.main, find_lr.main, first_order.main):
        argv = [f"--model={folder}/model", *files(folder)]
        assert "start it without torchrun" in refused(main, argv, capsys)


@pytest.mark.parametrize("held", [0, 4])
def test_eval_says_what_the_best_step_is_best_on(held, folder, tmp_path, capsys):
    """Without validation examples no step is called the best on validation."""
    run(folder, tmp_path / "run", f"--num-validation={held}")
    capsys.readouterr()
    eval.main([f"--run={tmp_path}/run"])
    assert ("best on validation" in capsys.readouterr().out) == bool(held)


def test_runs_are_evaluated_from_any_folder(tmp_path, monkeypatch, capsys):
    """A run of the offline default, or of relative paths, is one from another folder, too."""
    monkeypatch.chdir(ROOT)
    few = ["--steps=2", "--num-test=20", "--num-validation=10", "--num-train=30"]
    train.main([*few, f"--out={tmp_path}/run"])
    monkeypatch.chdir(tmp_path)
    eval.main(["--run=run", "--step=last"])
    assert "after 2 of 2 logged steps" in capsys.readouterr().out


# ------------------------------------------------------------------ bad input

BAD = {  # what the user types: what the one line must say
    "--task=rtee": "unknown task 'rtee': tasks are sst2, rte, cb, boolq",
    "--method=adam": "invalid choice: 'adam'",
    "--density=0": "above 0 and at most 1",
    "--density=1.5": "the paper's sparsity 0.75 is density 0.25",
    "--density=nan": "above 0 and at most 1",
    "--lr=nan": "--lr nan: above 0 and finite",
    "--lr=fast": "invalid float value",
    "--eps=0": "above 0 and finite",
    "--eps=1e39": "above 0 and finite in fp32",
    "--steps=0": "--steps 0: from 1 to",
    "--steps=99999999999": "from 1 to",
    "--seed=-1": "--seed -1: from 0 to",
    "--batch-size=0": "--batch-size 0: from 1",
    "--micro-batch=0": "--micro-batch 0: from 1",
    "--method=mezo --density=0.3": "mezo moves all",
    "--method=mezo --mask-kind=constant": "is for --method s-mezo, not for mezo",
    "--mask=some": "--mask is for --method senszoq, not for s-mezo",
    "--bits=4": "--bits is for --method senszoq",
    "--above=0.9 --density=0.3": "above 0.9: more than 0, and with density 0.3 at most 1",
    "--mask-kind=constant --above=0.25": "is for --mask-kind dynamic",
    "--method=senszoq --select=proj": "is for --method mezo, s-mezo, r-mezo, not for senszoq",
    "--quantiser=kmeans": "--quantiser is for --method senszoq, not for s-mezo",
    "--method=senszoq --quantiser=kmeans --bits=16": "leave out --bits 16",
    "--method=senszoq --quantiser=squeeze": "invalid choice",
    "--method=senszoq --mask=x --mask-from=task": "brings its own source",
    "--method=senszoq --mask=x --groups=2": "brings its own source",
    "--method=senszoq --mask-from=task --text=x.txt": "would be ignored",
    "--method=senszoq --mask=nowhere": "no mask file nowhere",
    "--method=senszoq --mask={folder}/train.jsonl": "is no complete mask file",
    "--method=senszoq --mask={data}/mask.safetensors": "is a mask of another model",
    "--select=(": "no regular expression",
    "--dtype=int8": "invalid choice",
    "--device=tpu": "auto, cpu, cuda or cuda:N",
    "--device=cuda": "this torch sees no GPU",
    "--unknown-flag=1": "unrecognized arguments",
    "--model={folder}/model": "no task: give --task",
    "--task=rte --train-file={folder}/train.jsonl": "give a task",
    "--task=rte --data-dir=/nowhere": "no file",
    "--model=/no/such/folder --task=rte --data-dir={tiny}": "does not exist",
    "--model={data} --task=rte --data-dir={tiny}": "has no config.json",
    "--model=no-such-org/no-such-model --task=rte --data-dir={tiny}": "hf auth login",
    "--train-file={folder}/train.jsonl": "give a task",
    "--train-file={folder}/none.jsonl --test-file={folder}/test.jsonl": "no file",
    "--train-file={data}/torn.jsonl --test-file={folder}/test.jsonl": "torn.jsonl:2",
    "--model={folder}/model --train-file={data}/late.jsonl --test-file={folder}/test.jsonl":
        "it needs 1, and 1 before it",
    "--out={folder}": "is not empty",
    "--out=/proc/nowhere/run": "No such file or directory",
    "eval --step=3 --run=/nowhere": "is no run directory",
    "eval --step=3": "--step is of a run",
    "eval --split=train": "test or validation",
    "eval --split=validation --num-validation=0": "there are no validation examples",
    "eval --shots=-1": "--shots -1: from 0 to",
    "eval --run=/nowhere --shots=2": "a run has none",
    "eval --save={folder}": "is not empty",
    "eval --run={ready} --step=9": "best, last, or 0 … 8, as logged",
    "eval --run={ready} --step=²": "best, last, or 0 … 8, as logged",
}  # fmt: skip


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line(typed, folder, ready, tmp_path, capsys, monkeypatch):
    """A mistake is one line and exit code 2 before a model is loaded, and nothing is left of it."""
    if typed == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    (data := tmp_path / "data").mkdir()
    row = {"prompt": "a", "options": [" red", " blue" * 70], "label": 0}
    text = (folder / "train.jsonl").read_text()
    (data / "torn.jsonl").write_text(text.split("\n")[0] + "\n{oops")
    (data / "late.jsonl").write_text(text + json.dumps(row) + "\n")
    weights = masks.decoder_linears(build("llama-tied"))
    mask.save(data / "mask.safetensors", masks.largest(weights, 0.01), weights, {"density": 0.01})
    named = {"folder": folder, "data": data, "ready": ready, "tiny": ROOT / "tiny/data"}
    argv = [word.format(**named) for word in typed.removeprefix("eval ").split()]
    main = eval.main if typed.startswith("eval ") else train.main
    out = [] if main is eval.main or "--out" in typed else ["--out=new"]
    before = contents(tmp_path)
    assert BAD[typed] in refused(main, [*argv, *out], capsys)
    assert contents(tmp_path) == before and not Path("new").exists()


@pytest.mark.parametrize(
    "flag, line",
    [
        ("--density=0.1", "is 0.01"),
        ("--quantiser=kmeans", "has no codebooks, which are fitted while a mask is made"),
    ],
)
def test_a_mask_says_what_goes_with_it(flag, line, folder, tmp_path, capsys):
    """Beside --mask another density is refused, and k-means where the file has no codebooks."""
    weights = masks.decoder_linears(AutoModelForCausalLM.from_pretrained(folder / "model"))
    file = tmp_path / "mask.safetensors"
    mask.save(file, masks.largest(weights, 0.01), weights, {"density": 0.01})
    flags = ["--method=senszoq", f"--mask={file}", flag]
    assert line in refused(train.main, arguments(folder, tmp_path / "run", *flags), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--method=mezo"], [*SENSZOQ, "--bits=4"]], ids=" ".join)
def test_a_model_with_nan_is_refused(flags, base, folder, tmp_path, capsys):
    """A weight that is not finite is named, also where nothing would have read it."""
    argv = arguments(folder, tmp_path / "run", f"--model={base}/nan", *flags)
    assert "model.norm.weight holds NaN" in refused(train.main, argv, capsys)


def test_without_a_compiler_a_run_goes_on(monkeypatch, capsys):
    """Where the loop cannot be made, one line says so; where memory is short, that is the error."""
    patch = model_patch.Patch(build("llama"), masks.SmallWeights(0.3))
    assert not loading.compiles("auto", patch) and not loading.compiles("no", patch)

    def fail(error):
        def compiled(*_):
            raise error

        monkeypatch.setattr(zo, "_fused", compiled)

    fail(RuntimeError("no C++ compiler\nand more"))
    assert loading.compiles("yes", patch) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert "no compiled loop" in line and line.endswith("no C++ compiler")
    fail(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        loading.compiles("yes", patch)


def test_runs_have_names_of_their_own(tmp_path, monkeypatch):
    """Without --out runs are numbered, never overwritten."""
    monkeypatch.chdir(tmp_path)
    config = train.Config(model="some/llama", task="rte", seed=3)
    names = [configs.new_run(config).as_posix() for _ in range(2)]
    assert names == ["runs/llama-rte-s-mezo-seed3", "runs/llama-rte-s-mezo-seed3-2"]


# ------------------------------------------------------------------ real models, real data


@pytest.mark.parametrize(
    "model, task, flags",
    [
        ("tinystories656k", "copa", ["--method=mezo"]),
        ("stories260K", "rte", ["--method=s-mezo", "--max-length=128"]),
        ("tinystories656k", "sst2", ["--method=senszoq", "--mask-from=task", "--density=0.01"]),
    ],
)
def test_real_models_on_real_tasks(shared, tmp_path, model, task, flags):
    """The main job runs on real weights and official files."""
    data = shared / "data" / ("sst2" if task == "sst2" else "superglue")
    few = ["--num-train=40", "--num-validation=8", "--num-test=8", "--steps=3", "--batch-size=4"]
    argv = [f"--model={shared}/models/{model}", f"--task={task}", f"--data-dir={data}", *few]
    train.main([*argv, "--lr=1e-5", f"--out={tmp_path}/run", *flags])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["skipped"] == 0 and result["last"]["n"] == 8
