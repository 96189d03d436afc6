"""Zeroth-order fine-tuning: `python train.py --model meta-llama/Llama-2-7b-hf --task rte`.

One step is [S] Algorithm 1 with the mask and the noise inside forward (§3.3): two losses, one
number, one update. The loop in `train` is in the order of the printed algorithm.

What a run writes is in record.py. Settings come from three places, printed at the start: the
command line, else [S]'s tables (by model family and task), else the defaults below.
"""

import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import eval
import loading
import masks
import model_patch
import record
import scoring
import tasks
import zo
from loading import Settings, setting
from tasks import UserError


@dataclass
class Config(Settings):
    """Every setting of a run: those of loading.py and these. None: filled in by `presets`."""

    method: str = setting("s-mezo", "which weights move", masks.METHODS)
    density: float | None = setting(None, "share of the weights that move, in (0, 1]")
    lr: float | None = setting(None, "learning rate η")
    eps: float = setting(1e-3, "perturbation scale ε")
    steps: int | None = setting(None, "training steps")
    seed: int = setting(0, "of noise, random mask and batch order")
    mask: str = setting("dynamic", "s-mezo: re-taken every step, or kept from before", masks.KEPT)
    refresh_every: int = setting(0, "s-mezo: steps between new thresholds; 0 is never")
    vectors: str = setting(
        "masked", "what one-dimensional tensors (norms, biases) are", model_patch.VECTORS
    )
    select: str = setting("", "regular expression: only parameters whose name matches move")
    eval_every: int | None = setting(None, "steps between validations; default steps / 10")
    log_every: int | None = setting(None, "steps between lines of metrics; default steps / 200")
    compile: str = setting("auto", "fuse noise, mask and add", ("auto", "yes", "no"))
    out: str | None = setting(None, "run directory; default runs/ and a name")
    save_model: bool = setting(False, "write the best-validation weights as a checkpoint")


# ------------------------------------------------------------------ presets

TABLE_8 = {  # [S] Table 8: sparsity, the share that is frozen
    "llama": {"sst2": 0.70, "rte": 0.75, "boolq": 0.80, "wic": 0.80, "multirc": 0.80},
    "mistral": {"sst2": 0.70, "rte": 0.60, "boolq": 0.60, "wic": 0.70, "multirc": 0.60},
}
GRIDS = {  # [S] Tables 6 and 7: one value out of each grid
    "llama": ("[S] Table 6", {"mezo": 1e-6, "s-mezo": 3e-6, "r-mezo": 3e-6}),
    "mistral": ("[S] Table 7", {"mezo": 1e-7, "s-mezo": 3e-6, "r-mezo": 3e-6}),
}
TINY = {  # the tiny model's, of the grids in tiny/compare.py, for 300 steps
    "mezo": {"sst2": 1e-3, "rte": 1e-3, "boolq": 3e-4, "copa": 1e-3},
    "s-mezo": {"sst2": 1e-2, "rte": 1e-2, "boolq": 3e-3, "copa": 3e-2},
    "r-mezo": {"sst2": 3e-3, "rte": 3e-3, "boolq": 1e-3, "copa": 3e-3},
}


def presets(config: Config, family: str) -> dict[str, tuple[object, str]]:
    """{setting: (value, source)} for what the user did not say. `family`: tiny, llama, opt, …"""
    source, rates = GRIDS.get(family, ("as LLaMA's, [S] Table 6", GRIDS["llama"][1]))
    sparsity = TABLE_8.get(family, {}).get(config.task)
    found = {
        "lr": (rates[config.method], f"{source}: from the grid for {config.method}; worth tuning"),
        "steps": (20_000, "[S] §4.1"),
        "density": (0.25, "sparsity 0.75, best or near it in [S] Fig. 4"),
    }
    if sparsity is not None:
        found["density"] = (
            round(1 - sparsity, 2),
            f"[S] Table 8: sparsity {sparsity} on {config.task}",
        )
    if family == "tiny":
        rate = TINY[config.method].get(config.task, min(TINY[config.method].values()))
        found["lr"] = rate, "best of the grid in tiny/compare.py"
        found["steps"] = 300, "enough for the tiny model"
    if config.method == "mezo":
        found["density"] = 1.0, "MeZO moves every weight"
    steps = config.steps or found["steps"][0]
    found["eval_every"] = max(1, steps // 10), "steps / 10"
    found["log_every"] = max(1, steps // 200), "steps / 200"
    return {name: v for name, v in found.items() if getattr(config, name) is None}


def check(config: Config) -> None:
    """Raise UserError for a value that cannot work, before anything is loaded."""
    loading.check(config)
    for name in ("eps", "lr", "steps", "eval_every", "log_every"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be positive")
    if config.density is not None and not 0 < config.density <= 1:
        raise UserError(
            f"--density {config.density}: the share of weights that move, above 0 and at most 1 "
            "(the paper's sparsity 0.75 is --density 0.25)"
        )
    if config.method == "mezo" and config.density not in (None, 1):
        raise UserError(f"--density {config.density}: mezo moves all weights; use --method s-mezo")
    if config.method != "s-mezo" and (config.mask != "dynamic" or config.refresh_every):
        raise UserError(f"--mask and --refresh-every belong to s-mezo, not to {config.method}")
    if config.refresh_every < 0 or (config.refresh_every and config.mask != "dynamic"):
        raise UserError(
            f"--refresh-every {config.refresh_every} with --mask {config.mask}: at least 0, and "
            "only a dynamic mask has a threshold to take again"
        )
    for name, bound in (("seed", zo.MAX_RUN_SEED), ("steps", zo.MAX_STEP)):
        if not 0 <= (getattr(config, name) or 0) < bound:
            raise UserError(f"--{name} {getattr(config, name)}: from 0 to {bound - 1}")
    try:
        re.compile(config.select)
    except re.error as error:
        raise UserError(f"--select {config.select!r} is no regular expression: {error}") from error


def run_name(config: Config) -> str:
    """The name of a run that was not given one."""
    model = "tiny" if config.model == Config.model else Path(config.model).name
    data = Path(config.train_file).stem if config.train_file else config.task
    return f"{model}-{data}-{config.method}-seed{config.seed}"


# ------------------------------------------------------------------ training


def train(config: Config, run: Path, model, tokenizer, data: tasks.Data, handle) -> dict:
    """[S] Algorithm 1, T steps; the model holds the last weights. Returns what `Record` found."""
    loss_fn = scoring.classification_loss if data.classification else scoring.lm_loss
    score = "all" if data.classification else "right"
    sizes = {"batch_size": config.batch_size, "max_length": config.max_length}

    def validate() -> float | None:
        if data.validation:
            return eval.accuracy(model, tokenizer, data.validation, **sizes).value

    with record.Record(config, run, validate()) as log:
        for t in range(config.steps):  # for t ← 1 to T do
            # Sample minibatch B from X and random seed s
            seed = zo.step_seed(config.seed, t)
            chosen = tasks.batches(len(data.train), config.batch_size, config.seed, t)
            batch = scoring.collate(
                tokenizer,
                [data.train[i] for i in chosen],
                score=score,
                max_length=config.max_length,
                device=model.device,
            )
            handle.refresh(t)  # h is fixed, unless --refresh-every says otherwise
            # m ← GetMask(θ_t, h);  l⁺ = L(θ_t + ε m⊙z; B);  l⁻ = L(θ_t − ε m⊙z; B)
            inputs = eval.model_inputs(model, batch)
            try:
                losses = handle.losses(inputs, lambda logits, b=batch: loss_fn(logits, b), seed)
            except ValueError as error:  # a weight that forward never used
                raise UserError(str(error)) from error
            loss_plus, loss_minus = torch.stack(losses).tolist()
            # proj_grad ← (l⁺ − l⁻) / 2ε
            projected_grad = zo.projected_grad(loss_plus, loss_minus, config.eps)
            # θ_i ← θ_i − η_t · proj_grad · m_i ⊙ z_i, unless a loss is not finite
            a = float(np.float32(-config.lr * projected_grad))
            if math.isfinite(a):
                handle.update(seed, a)
            log.step(t, seed, a, loss_plus, loss_minus, projected_grad)
            if log.validation_due():
                log.validation(validate())
            if log.metrics_due():
                log.metrics(handle.active_density())
    return log.result()


def worth_compiling(config: Config, model) -> bool:
    """Eager noise takes about 15 ns per weight and sweep, compiled 2, compiling some 30 s."""
    if config.compile != "auto":
        return config.compile == "yes"
    weights = sum(p.numel() for p in model.parameters())
    return model.device.type == "cuda" or weights * config.steps * 2 * 13e-9 > 60


def main(argv=None) -> None:
    given = vars(loading.make_parser(Config, __doc__.split("\n\n")[0]).parse_args(argv))
    config, run = Config(**given), None
    try:
        check(config)
        data = loading.load_data(config)
        tokenizer, model_config = loading.load_tokenizer(config.model, config.trust_remote_code)
        device = loading.choose_device(config.device)
        config.max_length = loading.usable_length(config.max_length, model_config)
        family = "tiny" if config.model == Config.model else model_config.model_type
        filled = presets(config, family)
        for name, (value, _) in filled.items():
            setattr(config, name, value)
        run = record.make_run_directory(config.out, run_name(config))
        fine_tune(config, run, given, filled, data, tokenizer, device)
    except (UserError, torch.OutOfMemoryError) as error:
        if run is not None:
            record.discard(run)
        raise SystemExit(loading.fail("train.py", error)) from None
    except KeyboardInterrupt:
        if run is not None:
            record.discard(run)
        kept = run is not None and run.exists()
        where = f"; {run} keeps the steps so far: eval.py --run {run} --step last" if kept else ""
        print(f"\ntrain.py: stopped{where}")
        raise SystemExit(130) from None


def fine_tune(config: Config, run: Path, given, filled, data, tokenizer, device: str) -> None:
    """One run from the original weights to result.json."""
    began = time.perf_counter()
    for name, value in asdict(config).items():
        source = filled[name][1] if name in filled else "you" if name in given else None
        if source:
            print(f"  {name:<14} {value!s:<24} {source}")
    parts = [len(part) for part in (data.train, data.validation, data.test)]
    print(f"  {'data':<14} {data.source}: train {parts[0]}, validation {parts[1]}, test {parts[2]}")
    model = loading.load_model(config.model, config.dtype, device, config.trust_remote_code)
    facts = {
        "compiled": worth_compiling(config, model),
        "model_fingerprint": loading.fingerprint(model),
        "data_fingerprint": data.fingerprint,
    }
    settings = asdict(config) | facts | {"dtype": str(model.dtype).removeprefix("torch.")}
    for name in ("model", "data_dir", "train_file", "validation_file", "test_file"):
        if settings[name] and Path(settings[name]).exists():  # to be replayed from anywhere
            settings[name] = str(Path(settings[name]).resolve())
    handle = eval.make_patch(model, settings)
    record.write_json(run / "config.json", settings)
    print(f"  {handle.report()}")
    print(f"  {run}/" + ("; compiling the kernels takes the first seconds" * facts["compiled"]))

    sizes = {"batch_size": config.batch_size, "max_length": config.max_length}
    zero_shot = eval.accuracy(model, tokenizer, data.test, **sizes)
    print(f"zero-shot test accuracy {zero_shot}")
    trained = time.perf_counter()
    result = train(config, run, model, tokenizer, data, handle)
    seconds = time.perf_counter() - trained
    result["compiled"] = handle.sweep.compiled
    record.write_json(run / "result.json", result)  # whatever fails from here, best_step is known
    last = best = eval.accuracy(model, tokenizer, data.test, **sizes)
    handle.remove()
    if result["best_step"] != config.steps:  # chosen by validation accuracy, never by test
        del model, handle  # before the second copy is loaded
        model, _ = eval.rebuild(settings, record.read_steps(run)[: result["best_step"]])
        best = eval.accuracy(model, tokenizer, data.test, **sizes)
    if config.save_model:
        model.save_pretrained(run / "model")
        tokenizer.save_pretrained(run / "model")
    result |= {
        name: {"accuracy": found.value, "standard_error": found.error, "n": found.n}
        for name, found in (("zero_shot", zero_shot), ("last", last), ("best", best))
    }
    result |= {"training_seconds": seconds, "seconds": time.perf_counter() - began}
    result |= {"seed": config.seed, "data_seed": config.data_seed} | record.machine(model.device)
    record.write_json(run / "result.json", result)
    record.draw_curve(run, f"{config.model}, {config.method}", zero_shot.value)
    print(f"test accuracy, last weights             {last}")
    print(f"test accuracy, best validation weights  {best}, after step {result['best_step']}")
    print(f"{run}/ holds the run; {config.steps} steps and their validation took {seconds:.0f} s")


if __name__ == "__main__":
    main()
