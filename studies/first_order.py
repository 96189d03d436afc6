"""What gradients do: Adam, SGD, LoRA and Sparse Adam, on train.py's data, loss and scores.

    g_t = ∇L(θ_t; B_t)                     one forward and one backward pass
    θ_t+1 = θ_t + m_t ⊙ u(g_1, …, g_t)     u: the optimizer's update; m_t = GetMask(θ_t, h)

    --method       what moves                            in the paper
    adam           every weight: m is all ones           [S] Table 1, "FT"
    sgd            every weight                          [S] appendix D
    lora           A and B, by Adam: W = W_0 + α/r B A   [S] Table 1, "LoRA"
    sparse-adam    |θ_t| ≤ h, taken at every step        [S], replies to reviewers, "Sparse Adam"

How it works
    Minibatches, loss, validation and test are train.py's, and equal seeds see equal batches. A run
    directory, too, holds config.json, steps.csv, result.json and curve.png. A line of steps.csv has
    the same columns. Both losses are L(θ_t; B). The seed is empty, because nothing is drawn. The
    column a is −η alone. Active density is the share of all the model's weights that move.

    Sparse Adam has S-MeZO's mask: h from |θ_0|, once; m from θ_t, at every step. A weight outside
    stays where it is, so it never comes back, and whether its gradient enters Adam's moments makes
    no difference. So `masked_step` makes any optimizer sparse.

What differs from the paper
    [S] gives Sparse Adam a name and two tables; that it masks as S-MeZO does is our reading. (Were
    only gradients masked, momentum would carry weights on outside the mask.) [S] gives the batch
    of 8, and Adam's rates. From MeZO come r, α and five epochs; its rate decays, here it is
    constant. The rates of LoRA and SGD are guesses. No weight decay, no clipping. Weights in fp32.

What it costs
    Bytes per weight: Adam 16, for θ, ∇L and two moments; SGD 8; Sparse Adam 21, with θ_t and m kept
    during the update; and 4 for the copy that was best on validation. LoRA has them for A and B
    alone. Llama-2-7B, by count: 135 GB with Adam, 27 with LoRA; and the activations of all layers.
    The run ends without its weights. No log can rebuild them, as a gradient does not fit in a line.
"""

import importlib.util
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import harness  # noqa: F401, isort: skip  # first: Ctrl-C while the rest is imported is one line
import torch

import masks
import tasks
import train
from harness import adapter, dataset, loading, log
from harness import config as configs
from harness.config import Settings, setting

RATES = {  # method: (rate, its source), and the tiny model's
    "adam": ((5e-5, "[S] Table 6, FT with Adam: of {1e-5, 5e-5, 8e-5}; tune it"), 3e-4),
    "sparse-adam": ((2e-4, "[S], reply to a reviewer: better than 1e-4; tune it"), 3e-3),
    "lora": ((2e-4, "a guess, [S] does not say; tune it"), 3e-3),
    "sgd": ((1e-3, "a guess, [S] does not say; tune it"), 3e-2),
}


@dataclass(frozen=True)
class Config(Settings):
    """Every setting of a run. None is filled in by `fill_in`."""

    batch_size: int | None = setting(None, "examples of one step; 8")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "bfloat16 loses small updates")
    method: Literal["adam", "sgd", "lora", "sparse-adam"] = setting("adam", "what moves, and how")
    density: float | None = setting(None, "sparse-adam: share of the weights that move, in (0, 1]")
    lr: float | None = setting(None, "learning rate η")
    steps: int | None = setting(None, "training steps")
    seed: int = setting(0, "of batch order, and of LoRA's A")
    eval_every: int | None = setting(None, "steps between validations; default steps / 10")
    out: str | None = setting(None, "run directory; default runs/ and a name")


def fill_in(config: Config, examples: int) -> tuple[Config, dict[str, str]]:
    """The settings with what the user did not say, and {setting: where its value comes from}."""
    rate, tiny_rate = RATES[config.method]
    found = {"batch_size": (8, "[S] Table 6, FT with Adam"), "lr": rate}
    found["steps"] = max(1, 5 * examples // (config.batch_size or 8)), "five epochs, as MeZO's FT"
    if configs.is_tiny(config.model):
        found["lr"] = tiny_rate, "learns the tiny model's RTE and COPA"
        found["steps"] = 100, "enough for the tiny model"
    if config.method == "sparse-adam":
        found["density"] = 0.25, "[S], reply to a reviewer: sparsity 0.75"
    found["eval_every"] = max(1, (config.steps or found["steps"][0]) // 10), "steps / 10"
    return configs.filled(config, found)


def complete(config: Config) -> Config:
    """As of train.py. ValueError for what cannot work, before anything is loaded."""
    config = configs.complete(config)
    loading.take_device(config.device)
    if config.density is not None and config.method != "sparse-adam":
        raise ValueError(f"--density is for --method sparse-adam, not for {config.method}")
    if config.method == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError("--method lora needs peft, which is not installed: pip install peft")
    return config


def what_moves(config: Config, model) -> tuple[list, dict]:
    """(the weights that the optimizer gets, {weight: h} of those with a mask)."""
    if config.method == "lora":
        import peft

        torch.manual_seed(config.seed)  # A is drawn; B is 0, so W is W_0 before training
        settings = peft.LoraConfig(**adapter.LORA)
        peft.inject_adapter_in_model(settings, model)  # asks gradients of A, B alone
    weights = [w for w in model.parameters() if w.requires_grad]
    masked = weights if config.method == "sparse-adam" else ()
    return weights, {w: masks.threshold(w, config.density) for w in masked}


@torch.no_grad()
def masked_step(optimizer, h: dict) -> None:
    """θ ← θ + m ⊙ (the optimizer's update), m = GetMask(θ, h). Without h, m is all ones."""
    before = [(w, w.clone(), masks.get_mask(w, h[w])) for w in h]
    optimizer.step()
    for w, theta, m in before:
        w.copy_(torch.where(m, w, theta))


def backward(config: Config, model, data: dataset.Data, t: int) -> float:
    """L(θ; B) of the minibatch that train.py's step t has; ∇L is left in the weights' grad."""
    batches = list(train.batches_of_step(config, model, data, t))
    count, total = sum(batch.count for batch in batches), 0.0
    model.zero_grad()
    for batch in batches:  # gradients add up over the parts
        loss = tasks.loss(model, batch) * (batch.count / count)
        loss.backward()
        total += loss.item()
    return total


def fit(config: Config, model, weights: list, h: dict, data, steps: log.StepLog) -> list:
    """θ_0 → θ_T, a line of the log per step. A copy of the weights at the best validation."""
    kind = torch.optim.SGD if config.method == "sgd" else torch.optim.Adam
    optimizer = kind(weights, lr=config.lr, foreach=False)  # foreach: a temporary for all of θ
    best, progress = [], log.Progress(steps, config.steps, quiet=False)
    for t in range(config.steps + 1):
        step = log.Step(0)  # before training
        if t > 0:
            loss = backward(config, model, data, t - 1)
            if not math.isfinite(loss):
                raise train.Broken(f"the loss of step {t} is {loss}: --lr {config.lr} is too high")
            masked_step(optimizer, h)
            step = log.Step(t, None, -config.lr, loss, loss)
        if t % config.eval_every == 0 or t == config.steps:
            step = step._replace(active_density=moving(weights, h) / model.num_parameters())
            if data.validation:
                found = train.score(config, model, data.tokenizer, data.validation)
                step = step._replace(validation=found.value)
        steps.append(step)
        if step.validation is not None and steps.best_step() == t:
            best = [w.detach().clone() for w in weights]
        if t > 0:
            progress.update(step)
    return best


def moving(weights: list, h: dict) -> int:
    """How many weights the next step moves."""
    return sum(int(masks.get_mask(w, h[w]).sum()) if w in h else w.numel() for w in weights)


def run_to_end(config: Config, run: Path) -> None:
    """A new run, to its result.json."""
    began = time.perf_counter()
    config, model_config, data = dataset.load(config)
    config, sources = fill_in(config, len(data.train))
    configs.show(config, sources)
    train.describe(config, model_config, data)
    if config.method in ("lora", "sparse-adam"):  # what cannot be is said before a model is loaded
        shapes = loading.skeleton(model_config, config.trust_remote_code)
        if config.method == "sparse-adam":
            masks.check_moves(config.density, shapes.parameters())
        elif layer := adapter.lacks(shapes):
            raise ValueError(f"--method lora: {config.model} has no {layer} for it; use adam")
    configs.write_json(run / "config.json", {"by": "studies/first_order.py"} | asdict(config))
    steps = log.StepLog(run, True, data.metric)
    model = loading.load_model(config.model, config.dtype, config.device, config.trust_remote_code)
    weights, h = what_moves(config, model)
    loading.restart_peak()  # result.json has that of training, as train.py's
    print(f"  {moving(weights, h):,} weights move, in {len(weights)} tensors\n  {run}/")
    zero_shot = train.score(config, model, data.tokenizer, data.test)
    print(f"zero-shot test {data.metric} {zero_shot}")
    kept = fit(config, model, weights, h, data, steps)

    last = best = train.score(config, model, data.tokenizer, data.test)
    print(f"test {data.metric}, last weights             {last}")
    if (best_step := steps.best_step()) != config.steps:  # chosen by validation, never by test
        for w, theta in zip(weights, kept, strict=True):
            w.data.copy_(theta)
        best = train.score(config, model, data.tokenizer, data.test)
    if data.validation:
        print(f"test {data.metric}, best validation weights  {best}, after step {best_step}")
    result = {"zero_shot": zero_shot._asdict(), "last": last._asdict(), "best": best._asdict()}
    result |= {"best_step": best_step, "skipped": 0, "workers": 1}
    result |= {"seconds": time.perf_counter() - began} | loading.machine(model.device)
    configs.write_json(run / "result.json", result)
    log.draw_curve(steps, f"{config.model}, {config.method}", zero_shot.value)
    print(f"{run}/ holds the run")


def main(argv=None) -> None:
    with configs.one_line_errors(argv=argv):
        config = complete(Config(**configs.parse(Config, __doc__.split("\n")[0], argv)))
        run = configs.new_run(config)
        try:
            run_to_end(config, run)
        finally:
            log.forget_unbegun(run)


if __name__ == "__main__":
    main()
