"""Accuracy: zero-shot, in-context, or of a finished run.

    python eval.py --model MODEL --task rte                  zero-shot
    python eval.py --model MODEL --task rte --shots 32       in-context, 32 solved examples
    python eval.py --run runs/…                              a run of train.py, rebuilt from its log
    python eval.py --sparse runs/…/sparse.safetensors        [Q]'s result on top of its model

An example counts as right when the right option has the highest mean log-probability (scoring.py).
Accuracies come with their standard error, √(p (1 − p) / n), and n.

A run is its step log. θ_T follows from the original weights and one line per step, (seed, a) with
a = −η · proj_grad: `replay` applies θ ← θ + a m⊙z for each, no forward pass needed. 20,000 steps
are about a megabyte, and the weights they rebuild are bit-identical on the same kind of device.
Model, data and settings must be those of the run: fingerprints tell.
"""

import math
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import loading
import masks
import model_patch
import quant
import record
import scoring
import sensitivity
import snapshot
import sweep
import tasks
import workers
from errors import UserError, fail
from loading import Settings

OURS = {"device", "device_map", "trust_remote_code"}  # not a run's to decide, but ours
DATA = {"task", "data_dir", "train_file", "validation_file", "test_file"}


class Accuracy(NamedTuple):
    """Share of n examples answered right; of `broken` ones a score was not finite."""

    value: float
    n: int
    broken: int = 0

    @property
    def error(self) -> float:
        """Standard error of the mean of n coin flips."""
        return math.sqrt(self.value * (1 - self.value) / self.n)

    def facts(self) -> dict:
        """As it stands in result.json."""
        found = {"accuracy": self.value, "standard_error": self.error, "n": self.n}
        return found | {"not_finite": self.broken}

    def __str__(self):
        broken = f", {self.broken} of them without finite scores" if self.broken else ""
        return f"{self.value:.3f} ± {self.error:.3f} (n = {self.n}{broken})"


def sizes(settings: dict) -> dict:
    """Of `accuracy`'s batches: no more rows than a probe of the run has in memory, two of each."""
    rows = min(settings["batch_size"], 2 * (settings.get("micro_batch") or settings["batch_size"]))
    return {"batch_size": rows, "max_length": settings["max_length"]}


@torch.no_grad()
def accuracy(
    model, tokenizer, examples, *, batch_size=16, max_length=2048, group=workers.ALONE
) -> Accuracy:
    """Share of examples whose right option has the highest mean log-probability.

    Of several workers each answers its share, and all know the result. UserError where no score
    of any example is finite.
    """
    right = broken = 0
    by_length = sorted(examples, key=lambda e: len(e.prompt), reverse=True)  # little padding
    mine = group.share(by_length)  # the longest first: where memory ends, it ends at once
    quiet = {"leave": False, "delay": 5, "disable": group.rank > 0}
    for start in tqdm(range(0, len(mine), batch_size), "evaluating", **quiet):
        part = mine[start : start + batch_size]
        batch = scoring.collate(tokenizer, part, max_length=max_length, device=model.device)
        logits = model(**batch.inputs(model), use_cache=False).logits
        found, finite = scoring.correct(logits, batch)
        right, broken = right + int(found.sum()), broken + int((~finite).sum())
    right, broken = group.sum([right, broken])
    if broken == len(examples):
        raise UserError(
            "no log-probability of any example is finite: float16 overflow (try --dtype bfloat16), "
            "or weights broken by too high a rate"
        )
    return Accuracy(right / len(examples), len(examples), int(broken))


# ------------------------------------------------------------------ runs


def make_patch(model, settings: dict, index: dict | None = None) -> model_patch.Patch:
    """Patch a model as a run's config.json says. NaN in its weights is refused, once and here.

    Compiled kernels round differently, so a run keeps the kind that it began with. For a new run
    settings["compiled"] becomes what is possible.
    """
    if "fingerprint" in settings and settings.get("arithmetic") != sweep.ARITHMETIC:
        raise UserError("this run is of a nanoZO that reads runs differently: use that version")
    if (began := settings.get("torch", torch.__version__)) != torch.__version__:
        print(f"  the run began with torch {began}; with {torch.__version__} last bits may differ")
    for name, weight in model.named_parameters():
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
            if not torch.stack(weight.detach().aminmax()).isfinite().all():  # NaN shows in both
                raise UserError(f"{name} holds NaN or infinity; get a sound copy of the model")
    which = index
    if which is None:
        which = masks.make_rule(
            settings["method"],
            settings["density"],
            kind=settings["mask_kind"],
            refresh_every=settings["refresh_every"],
            seed=settings["seed"],
        )
    handle = model_patch.Patch(
        model,
        which,
        eps=settings["eps"],
        vectors=settings["vectors"],
        rounding=settings["rounding"],
        select=settings["select"],
        compiled=settings["compiled"],
    )
    if settings["compiled"] and not handle.warm_up():
        if "fingerprint" in settings:
            raise UserError("this run's kernels were compiled, and here that fails (see above)")
        settings["compiled"] = False
    if model.device.type == "cpu":
        loading.keep_freed_memory()
    return handle


def replay(handle: model_patch.Patch, steps, start: tuple[int, dict] = (0, {})) -> None:
    """θ_0 → θ_T: apply the logged updates. Leaves the model patched.

    `start`: (step, tensors) of a snapshot, from which on the log is replayed.
    """
    done, tensors = start
    if tensors:
        handle.load(tensors)
        del start, tensors  # as large as what moves
    quiet = {"leave": False, "delay": 5, "file": sys.stdout}  # a worker's stdout is nowhere
    for step, seed, a, *_ in tqdm(steps[done:], "replaying", **quiet):
        handle.refresh(step)
        if math.isfinite(a):  # else it was skipped
            handle.update(seed, a)


def open_data(settings: dict) -> tasks.Data:
    """The examples of a run, as they were; UserError where they have changed."""
    known = {f.name: settings.get(f.name, f.default) for f in fields(Settings)}
    data = loading.load_data(Settings(**known))
    if data.fingerprint != settings["data_fingerprint"]:
        raise UserError(f"the data of that run have changed: {data.source}; put the old ones back")
    return data


def open_model(settings: dict, run: Path):
    """(model, index) that a run begins with; UserError where one that began had others.

    index: [Q]'s mask, from the run's directory; None for the other methods.
    """
    index = path = about = None
    if settings["method"] in masks.FEW:
        path = run / record.MASK
        index, about = sensitivity.read_mask(path)
        if settings.get("mask_fingerprint") not in (None, mask_fingerprint(index)):
            raise UserError(f"{path} is not the mask that the run began with; put it back")
    model = load_original(settings, path, index, about)
    if settings.get("model_fingerprint") not in (None, loading.fingerprint(model)):
        raise UserError(f"{settings['model']} is not the model, or not in the dtype, of that run")
    return model, index


def load_original(settings: dict, path=None, index: dict | None = None, about: dict | None = None):
    """The model before training. For [Q] with the `index` of the file `path`: its matrices must
    hold the values that its provenance `about` remembers; for senszoq they are read into 4 bits."""
    four_bits, check = None, partial(sensitivity.check_values, path, about)
    if index is not None and settings["method"] == "senszoq":
        four_bits = quant.loading_config(index, settings["double_quant"], check)
    model = loading.load_model(
        settings["model"],
        settings["dtype"],
        settings["device"],
        settings["trust_remote_code"],
        four_bits=four_bits,
        device_map=settings["device_map"],
    )
    if index is not None and four_bits is None:
        for name in index:
            check(name, model.get_parameter(name))
    return model


def mask_fingerprint(index: dict | None) -> str | None:
    """Tells one index from another; None where there is none."""
    return None if index is None else f"{snapshot.digest(index):016x}"


def rebuild(settings: dict, steps, run: Path):
    """The patch with the weights after `steps`, from a run's config.json and its log.

    `run`: its directory, where a snapshot may lie and [Q]'s mask does. The patch is removed: its
    model is an ordinary one, or has ordinary 4-bit layers.
    """
    model, index = open_model(settings, run)
    handle = make_patch(model, settings, index)
    replay(handle, steps, snapshot.newest(run, len(steps), settings))
    handle.remove()
    return handle


def save_sparse(run: Path, settings: dict, index: dict, values: dict, step: int) -> None:
    """[Q]'s result into the run's directory, with all that `open_sparse` and `evaluate` need."""
    names = ("method", "dtype", "double_quant", "data_fingerprint")
    names += tuple(f.name for f in fields(Settings))
    about = {name: settings[name] for name in names} | {"step": step}
    about["matrices"] = sensitivity.read_mask(run / record.MASK)[1]["matrices"]
    snapshot.write_sparse(run / record.SPARSE, index, values, about)


def settings_of_sparse(path: Path, about: dict, given: dict) -> tuple[dict, bool]:
    """(those of the run that wrote the file and `given` over them, are the examples the run's own).

    What is given as the run had it changes nothing; other data come without the run's settings.
    """
    # files and folders are known by their whole paths
    other = {n for n, v in given.items() if about.get(n) not in (v, str(Path(str(v)).resolve()))}
    if "dtype" in other:
        raise UserError("--sparse brings its own dtype, that of its run; leave out --dtype")
    needed = {f.name for f in fields(Settings)} | {"data_fingerprint", "step"}
    if missing := sorted(needed - about.keys()):
        raise UserError(f"{path} says no {missing[0]}: from another version; train again")
    names = {"model", "dtype"} if other & DATA else {f.name for f in fields(Settings)} - OURS
    own = other <= OURS | {"model", "batch_size", "max_length"}
    return {name: about[name] for name in names} | given, own


def open_sparse(path: Path, found: tuple, settings: Settings, model_config):
    """The model that [Q]'s result was trained on, with the trained values in their places.

    `found`: what `snapshot.read_sparse(path)` gave, 12 bytes for each of the k places.
    """
    index, values, about = found
    skeleton = loading.skeleton(model_config, settings.trust_remote_code)
    weights = sensitivity.decoder_linears(skeleton)
    sensitivity.check_mask(path, index, about, weights)  # names and shapes, before anything loads
    model = load_original(about | vars(settings), path, index, about)
    handle = model_patch.Patch(model, index)
    handle.load(values)
    handle.remove()
    return model


def save_checkpoint(model, tokenizer, folder) -> None:
    """An ordinary Hugging Face checkpoint; 4-bit layers are written as the weights they stand for,
    and `model` is an ordinary model from then on."""
    quant.unpack(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv=None) -> None:
    parser = loading.make_parser(Settings, __doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="a run directory of train.py, instead of a model")
    parser.add_argument("--step", help="with --run: best (default), last or a step number")
    parser.add_argument("--sparse", type=Path, help="sparse.safetensors, on top of its model")
    parser.add_argument("--save", type=Path, help="with --run or --sparse: write a checkpoint here")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before the prompt")
    given = vars(parser.parse_args(argv))
    run, split, shots = given.pop("run", None), given.pop("split"), given.pop("shots")
    step, save, sparse = (given.pop(name, None) for name in ("step", "save", "sparse"))
    try:
        if run is None and (step or (save and sparse is None)):
            raise UserError("--step needs --run, and --save needs --run or --sparse")
        if run is not None and shots:
            raise UserError("--shots: a run has none; leave it out, or --save it and use --model")
        if run is not None and sparse is not None:
            raise UserError("--run or --sparse, not both")
        if shots < 0:
            raise UserError(f"--shots {shots}: at least 0")
        if save is not None:
            loading.check_new("--save", save)
        if run is not None:
            line, model, tokenizer = evaluate_run(run, step, given, split)
        else:
            line, model, tokenizer = evaluate(given, split, shots, sparse)
        print(line)
        if save is not None:
            save_checkpoint(model, tokenizer, save)
    except (UserError, torch.OutOfMemoryError, OSError, SafetensorError) as error:
        raise SystemExit(fail("eval.py", error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def evaluate(given: dict, split: str, shots: int, sparse: Path | None):
    """(line, model, tokenizer): accuracy of a model, perhaps with [Q]'s trained values."""
    found = snapshot.read_sparse(sparse) if sparse else None
    given, own = settings_of_sparse(sparse, found[2], given) if found else (given, False)
    settings = Settings(**given)
    loading.check(settings)
    data = loading.load_data(settings)
    examples = getattr(data, split)
    if shots > len(data.train):
        raise UserError(f"--shots {shots}: there are {len(data.train)} training examples")
    if not examples:
        raise UserError(f"the {split} split is empty")
    tokenizer, model_config = loading.load_tokenizer(settings.model, settings.trust_remote_code)
    if own and data.fingerprint != found[2]["data_fingerprint"]:
        raise UserError(f"the data of {sparse} have changed: {data.source}; name others")
    settings.max_length = loading.usable_length(settings.max_length, model_config)
    if shots:
        examples = [tasks.with_demonstrations(e, data.train[:shots]) for e in examples]
    cut = scoring.check_examples(tokenizer, examples, settings.max_length)
    name = settings.model
    how = f"{shots} shots" if shots else "no shots" if found else "zero-shot"
    if found:
        model = open_sparse(sparse, found, settings, model_config)
        name += f" with the values of {sparse}, step {found[2]['step']}"
    else:
        model = load_original(vars(settings))
    how += f", {cut} prompts cut to {settings.max_length} tokens" * bool(cut)
    score = accuracy(model, tokenizer, examples, **sizes(vars(settings)))
    return f"{name}, {how}, {data.source}: {split} accuracy {score}", model, tokenizer


def evaluate_run(run: Path, step: str | None, given: dict, split: str):
    """(line, model, tokenizer): accuracy of a run of train.py after its best, last or any step."""
    device = given.pop("device", None)
    loading.none_of(given, "--run")
    config, steps = record.open_run(run)
    if step in (None, "best"):
        stop = record.read_result(run)["best_step"]
        if stop > len(steps):
            raise UserError(f"{run} was best after step {stop}, but its log has {len(steps)}")
    elif step == "last":
        stop = len(steps)
    elif step.isdecimal() and int(step) <= len(steps):
        stop = int(step)
    else:
        raise UserError(
            f"--step {step}: best, last, or 0 … {len(steps)}, which is what {run} logged"
        )
    if device is not None:  # rebuilt elsewhere: equal bits only on the same kind of device
        config |= {"device": device, "device_map": None}
    data = open_data(config)
    examples = getattr(data, split)
    if not examples:
        raise UserError(f"the {split} split is empty")
    tokenizer, _ = loading.load_tokenizer(config["model"], config["trust_remote_code"])
    handle = rebuild(config, steps[:stop], run)
    found = accuracy(handle.model, tokenizer, examples, **sizes(config))
    line = f"{run} after {stop} steps, {data.source}: {split} accuracy {found}"
    return line, handle.model, tokenizer


if __name__ == "__main__":
    main()
