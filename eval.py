"""Accuracy: zero-shot, in-context, or of a finished run.

    python eval.py --model MODEL --task rte                  zero-shot
    python eval.py --model MODEL --task rte --shots 32       in-context, 32 solved examples
    python eval.py --run runs/…                              a run of train.py, rebuilt from its log

An example counts as right when the right option has the highest mean log-probability (scoring.py).
Accuracies come with their standard error, √(p (1 − p) / n), and n.

A run is its step log. θ_T follows from the original weights and one line per step, (seed, a) with
a = −η · proj_grad: `replay` applies θ ← θ + a m⊙z for each, no forward pass needed. 20,000 steps
are about a megabyte, and the weights they rebuild are bit-identical on the same kind of device.
"""

import inspect
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import loading
import masks
import model_patch
import record
import scoring
import tasks
from loading import Settings
from tasks import UserError


class Accuracy(NamedTuple):
    """Share of n examples answered right."""

    value: float
    n: int

    @property
    def error(self) -> float:
        """Standard error of the mean of n coin flips."""
        return math.sqrt(self.value * (1 - self.value) / self.n)

    def __str__(self):
        return f"{self.value:.3f} ± {self.error:.3f} (n = {self.n})"


def model_inputs(model, batch: scoring.Batch) -> dict:
    """What this model's forward takes of a batch; logits only where an option is scored."""
    wanted = batch.inputs() | {"logits_to_keep": batch.keep}
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in known}


@torch.no_grad()
def accuracy(model, tokenizer, examples, *, batch_size=16, max_length=2048) -> Accuracy:
    """Share of examples whose right option has the highest mean log-probability."""
    right = 0
    examples = sorted(examples, key=lambda example: len(example.prompt))  # little padding
    for start in tqdm(range(0, len(examples), batch_size), "evaluating", leave=False, delay=5):
        part = examples[start : start + batch_size]
        batch = scoring.collate(tokenizer, part, max_length=max_length, device=model.device)
        logits = model(**model_inputs(model, batch), use_cache=False).logits
        right += int(scoring.correct(logits, batch).sum())
    return Accuracy(right / len(examples), len(examples))


# ------------------------------------------------------------------ runs


def make_patch(model, settings: dict) -> model_patch.Patch:
    """Patch a model as a run's config.json says."""
    rule = masks.make_rule(
        settings["method"],
        settings["density"],
        kept=settings["mask"],
        refresh_every=settings["refresh_every"],
        seed=settings["seed"],
    )
    try:
        return model_patch.patch(
            model,
            rule,
            eps=settings["eps"],
            vectors=settings["vectors"],
            select=settings["select"],
            compiled=settings["compiled"],
        )
    except ValueError as error:  # NaN in a weight, nothing selected
        raise UserError(str(error)) from error


def replay(handle: model_patch.Patch, steps) -> None:
    """θ_0 → θ_T: apply the logged updates. Leaves the model patched."""
    for step, seed, a in steps:
        handle.refresh(step)
        if a:  # a skipped step has a = 0
            handle.update(seed, a)


def rebuild(config: dict, steps):
    """(model, tokenizer) with the weights after `steps`, from a run's config.json and its log."""
    trust = config["trust_remote_code"]
    tokenizer, _ = loading.load_tokenizer(config["model"], trust)
    model = loading.load_model(config["model"], config["dtype"], config["device"], trust)
    if loading.fingerprint(model) != config["model_fingerprint"]:
        raise UserError(f"{config['model']} is not the model, or not in the dtype, of that run")
    handle = make_patch(model, config)
    replay(handle, steps)
    handle.remove()
    return model, tokenizer


def main(argv=None) -> None:
    parser = loading.make_parser(Settings, __doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="a run directory of train.py, instead of a model")
    parser.add_argument("--step", help="with --run: best (default), last or a step number")
    parser.add_argument("--save", help="with --run: write its weights as a checkpoint here")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before the prompt")
    given = vars(parser.parse_args(argv))
    run, split, shots = given.pop("run", None), given.pop("split"), given.pop("shots")
    step, save = given.pop("step", None), given.pop("save", None)
    try:
        if run is None and (step or save):
            raise UserError("--step and --save: these need --run")
        if shots < 0:
            raise UserError(f"--shots {shots}: at least 0")
        if run is not None:
            print(evaluate_run(run, step, given, split, save))
        else:
            print(evaluate(given, split, shots))
    except (UserError, torch.OutOfMemoryError) as error:
        raise SystemExit(loading.fail("eval.py", error)) from None


def evaluate(given: dict, split: str, shots: int) -> str:
    """Zero-shot or in-context accuracy of a model, as one line of text."""
    settings = Settings(**given)
    loading.check(settings)
    data = loading.load_data(settings)
    tokenizer, model_config = loading.load_tokenizer(settings.model, settings.trust_remote_code)
    settings.max_length = loading.usable_length(settings.max_length, model_config)
    if shots > len(data.train):
        raise UserError(f"--shots {shots}: there are {len(data.train)} training examples")
    examples = getattr(data, split)
    if shots:
        examples = [tasks.with_demonstrations(e, data.train[:shots]) for e in examples]
    if not examples:
        raise UserError(f"the {split} split is empty")
    model = loading.load_model(
        settings.model, settings.dtype, settings.device, settings.trust_remote_code
    )
    sizes = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    found = accuracy(model, tokenizer, examples, **sizes)
    how = f"{shots} shots" if shots else "zero-shot"
    return f"{settings.model}, {how}, {data.source}: {split} accuracy {found}"


def evaluate_run(run: Path, step: str | None, given: dict, split: str, save: str | None) -> str:
    """Accuracy of a run of train.py after its best, its last or any other step."""
    device = given.pop("device", None)
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"--run brings its own settings; leave out {names}")
    config, steps = record.open_run(run)
    if step in (None, "best"):
        if not (run / "result.json").is_file():
            raise UserError(f"{run} has not finished, so no step is best yet; try --step last")
        stop = json.loads((run / "result.json").read_text())["best_step"]
    elif step == "last":
        stop = len(steps)
    elif step.isdigit() and int(step) <= len(steps):
        stop = int(step)
    else:
        raise UserError(
            f"--step {step}: best, last, or 0 … {len(steps)}, which is what {run} logged"
        )
    if device is not None:  # rebuilt elsewhere: equal bits only on the same kind of device
        config["device"] = device
    settings = Settings(**{f.name: config[f.name] for f in fields(Settings)})
    data = loading.load_data(settings)
    examples = getattr(data, split)
    if not examples:
        raise UserError(f"the {split} split is empty")
    if data.fingerprint != config["data_fingerprint"]:
        raise UserError(f"the data that {run} was trained on have changed")
    model, tokenizer = rebuild(config, steps[:stop])
    if save is not None:
        model.save_pretrained(save)
        tokenizer.save_pretrained(save)
    sizes = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    found = accuracy(model, tokenizer, examples, **sizes)
    return f"{run} after {stop} steps, {data.source}: {split} accuracy {found}"


if __name__ == "__main__":
    main()
