"""studies/first_order.py: its updates beside torch's own, and the runs that it makes."""

import copy
import importlib.util
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from models import batch, build, loss_fn
from test_train import arguments, refused

import eval
import masks
import tasks
import train
from harness import dataset, loading, log
from studies import first_order
from studies.first_order import Config, masked_step, what_moves

METHODS = {"adam": 1e-3, "sgd": 3e-2, "sparse-adam": 3e-3, "lora": 1e-2}
PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
ALL = [pytest.param(name, marks=PEFT if name == "lora" else ()) for name in METHODS]
SPARSE = "--method=sparse-adam"


def backward(model, seed: int) -> list:
    """New gradients of one batch, in the weights and as a list."""
    model.zero_grad()
    loss_fn(model(**batch(seed=seed), use_cache=False).logits).backward()
    return [w.grad for w in model.parameters()]


def run(folder, out, *more):
    first_order.main(arguments(folder, out, *more))
    return json.loads((out / "result.json").read_text()), log.StepLog(out)


# ------------------------------------------------------------------ the updates


def test_a_full_mask_makes_it_torchs_adam():
    """At density 1 five steps of Sparse Adam are torch.optim.Adam's to the bit."""
    models = build("llama"), build("llama")
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in models]
    weights, h = what_moves(Config(method="sparse-adam", density=1.0), models[0])
    assert set(h) == set(weights) == set(models[0].parameters())
    for seed in range(5):
        for model in models:
            backward(model, seed)
        masked_step(optimizers[0], h)
        optimizers[1].step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_sparse_adam_is_adam_of_the_masked_gradient_inside_the_mask():
    """No weight outside |θ_t| ≤ h moves; those inside get Adam's update of m ⊙ g to the bit."""
    model, twin, left = build("llama"), build("llama"), 0
    weights, h = what_moves(Config(method="sparse-adam", density=0.25), model)
    fixed = [masks.threshold(w, 0.25) for w in twin.parameters()]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    theirs = torch.optim.Adam(twin.parameters(), lr=0.02)
    for seed in range(5):
        before = [w.detach().clone() for w in weights]
        m = [masks.get_mask(*pair) for pair in zip(before, fixed, strict=True)]
        gradients = backward(model, seed)
        for w, mask, g in zip(twin.parameters(), m, gradients, strict=True):
            w.grad = mask * g
        masked_step(optimizer, h)
        theirs.step()
        for w, other, mask, theta in zip(weights, twin.parameters(), m, before, strict=True):
            assert torch.equal(w[~mask], theta[~mask])
            assert torch.equal(w[mask], other[mask]) and not torch.equal(w[mask], theta[mask])
            left += int((mask & ~masks.get_mask(w, h[w])).sum())
            other.data[~mask] = theta[~mask]
    assert left > 100  # walked out with momentum, and stayed


@PEFT
def test_lora_moves_its_adapters_alone():
    """At q_proj and v_proj W x becomes W x + 16/8 B A x; A and B move, and no weight of before."""
    model, plain = build("llama"), build("llama")
    weights, h = what_moves(Config(method="lora"), model)
    assert h == {} and len(weights) == 2 * 2 * 2  # layers, q and v, A and B
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    start, optimizer = copy.deepcopy(weights), torch.optim.Adam(weights, lr=0.1)
    for seed in range(2):  # B is 0 at first, and A without a gradient
        backward(model, seed)
        masked_step(optimizer, h)
    assert not any(torch.equal(now, then) for now, then in zip(weights, start, strict=True))
    named = {name.replace(".base_layer", ""): w for name, w in model.named_parameters()}
    for name, w in plain.named_parameters():
        assert torch.equal(named[name], w), name
    (a, b), x = weights[:2], torch.randn(3, 32)
    ours, theirs = (m.model.layers[0].self_attn.q_proj for m in (model, plain))
    torch.testing.assert_close(ours(x), theirs(x) + 2 * (x @ a.T) @ b.T)
    with pytest.raises(ValueError, match="not found in the base model"):
        what_moves(Config(method="lora"), build("gpt2"))


@pytest.mark.parametrize("scored", ["all", "right"])
def test_parts_of_a_batch_have_its_loss_and_its_gradient(scored, folder):
    """A batch in parts of three has the loss and the gradient of train.py's whole minibatch."""
    config = Config(model=f"{folder}/model", batch_size=8, train_file=folder / "train.jsonl",
                    test_file=folder / "test.jsonl", seed=3)  # fmt: skip
    config, _, data = dataset.load(config)
    data = replace(data, scored=scored)
    model, found = loading.load_model(config.model), []
    for micro_batch in (None, 3):
        how = replace(config, micro_batch=micro_batch)
        loss = first_order.backward(how, model, data, 5)
        found.append([torch.tensor(loss), *(w.grad.clone() for w in model.parameters())])
    chosen = [data.train[i] for i in tasks.minibatch(len(data.train), 8, 3, 5)]
    whole = tasks.collate(data.tokenizer, chosen, scored=scored)
    assert found[0][0] == tasks.loss(model, whole).item()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ a run


@pytest.mark.picture
@pytest.mark.parametrize("method", ALL)
def test_each_method_learns_and_leaves_a_whole_run(method, folder, tmp_path, capsys):
    """80 steps halve the training loss; the run directory and the lines said are train.py's."""
    flags = [f"--method={method}", f"--lr={METHODS[method]}", "--steps=80", "--eval-every=40"]
    result, found = run(folder, tmp_path / "run", *flags)
    losses = [step.loss_plus for step in found.steps]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(s.loss_plus == s.loss_minus and s.a == -METHODS[method] for s in found.steps)
    names = {"config.json", "steps.csv", "result.json", "curve.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    lines = [s for s in (found.start, *found.steps) if s.validation is not None]
    assert [line.step for line in lines] == [0, 40, 80]
    share = {"sparse-adam": 0.25, "lora": 0.0763}.get(method, 1)
    assert lines[0].active_density == pytest.approx(share, rel=0.01)
    said = [line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line]
    starts = "zero-shot test accuracy ", "test accuracy, last weights  ", "test accuracy, best val"
    for name, start, line in zip(("zero_shot", "last", "best"), starts, said, strict=True):
        assert line.startswith(start) and f"{result[name]['value']:.3f} ±" in line


def test_a_run_finds_a_name(folder, tmp_path, monkeypatch):
    """Without --out a run has a directory in runs/, named by model, data, method and seed."""
    monkeypatch.chdir(tmp_path)
    first_order.main([a for a in arguments(folder, "", "--steps=1") if a != "--out="])
    assert (tmp_path / "runs/model-train-adam-seed0/result.json").exists()


def test_the_best_weights_on_validation_are_tested(folder, tmp_path, monkeypatch):
    """The last test is of the weights as they were when validation was best."""
    script, seen = iter([0.5, 0.6, 0.9, 0.9, 0.8]), []  # at steps 0, 2, 4, 6, 8

    def scripted(config, model, tokenizer, examples):
        seen.append((len(examples), [w.detach().clone() for w in model.parameters()]))
        return tasks.Score(next(script) if len(examples) == 12 else 0.5, len(examples))

    monkeypatch.setattr(train, "score", scripted)
    result, _ = run(folder, tmp_path / "run", "--eval-every=2")
    assert result["best_step"] == 4
    assert [n for n, _ in seen] == [20, 12, 12, 12, 12, 12, 20, 20]
    assert all(map(torch.equal, seen[-1][1], seen[3][1]))
    assert not any(map(torch.equal, seen[-1][1], seen[-2][1]))


def test_presets_are_said_with_their_source():
    """Batch and Adam's rate come from Table 6, Sparse Adam's from a reply, steps from the data."""
    found = {}
    for method in METHODS:
        config, sources = first_order.fill_in(Config(model="x", task="rte", method=method), 1000)
        assert config.batch_size == 8 and "Table 6" in sources["batch_size"]
        assert (config.steps, config.eval_every) == (625, 62)
        found[method] = config.lr, config.density, sources["lr"]
    assert found["adam"][0] in (1e-5, 5e-5, 8e-5) and "Table 6" in found["adam"][2]
    assert found["sparse-adam"][:2] == (2e-4, 0.25) and "reply" in found["sparse-adam"][2]
    assert all("guess" in found[method][2] for method in ("lora", "sgd"))
    said = Config(method="adam", lr=1.0, steps=5, batch_size=2)
    config, sources = first_order.fill_in(said, 1000)
    assert set(sources) == {"eval_every"} and config.lr == 1.0


# ------------------------------------------------------------------ bad input

BAD = {  # what the user types: what the one line must say
    "--method=mezo": "invalid choice: 'mezo'",
    "--eps=1e-3": "unrecognized arguments",
    "--dtype=float16": "invalid choice",
    "--lr=0": "--lr 0.0: above 0 and finite",
    "--steps=0": "--steps 0: from 1 to",
    "--density=0.5": "is for --method sparse-adam, not for adam",
    f"{SPARSE} --density=0": "above 0 and at most 1",
    f"{SPARSE} --density=1e-9": "takes none of",
    "--task=rte": "give a task",
    "--model=/no/such/folder": "does not exist",
    "--out={folder}": "is not empty",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line(typed, folder, tmp_path, capsys):
    """A mistake is one line and exit code 2, and no run directory is left of it."""
    argv = arguments(folder, tmp_path / "new", *typed.format(folder=folder).split())
    assert BAD[typed] in refused(first_order.main, argv, capsys)
    assert not (tmp_path / "new").exists()


def test_lora_on_other_layers_is_one_line(folder, tmp_path, monkeypatch, capsys):
    """A model without the layers that LoRA wants is refused before it is loaded."""
    monkeypatch.setattr(first_order.loading, "load_model", lambda *_: pytest.fail("loaded"))
    shutil.copytree(folder / "model", tmp_path / "gpt2")
    build("gpt2").config.save_pretrained(tmp_path / "gpt2")
    argv = arguments(folder, tmp_path / "new", f"--model={tmp_path}/gpt2", "--method=lora")
    assert "gpt2 has no q_proj for it" in refused(first_order.main, argv, capsys)


def test_lora_without_peft_is_one_line(folder, tmp_path, monkeypatch, capsys):
    """Where peft is missing, only LoRA needs it, and says how to install it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = arguments(folder, tmp_path / "new", "--method=lora")
    assert "pip install peft" in refused(first_order.main, argv, capsys)
    run(folder, tmp_path / "run", "--method=sgd", "--steps=1")


def test_too_high_a_rate_and_a_run_that_has_no_replay_are_one_line(folder, tmp_path, capsys):
    """A loss that is not finite ends the run, and eval.py says that the run is not train.py's."""
    argv = arguments(folder, tmp_path / "run", "--method=sgd", "--lr=1e30")
    assert "--lr 1e+30 is too high" in refused(first_order.main, argv, capsys)
    assert 0 < len(log.StepLog(tmp_path / "run").steps) < 8
    error = refused(eval.main, [f"--run={tmp_path}/run"], capsys)
    assert "config.json is torn or of another version" in error
