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

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import masks
import model_patch
import record
import scoring
import tasks
from tasks import UserError

HERE = Path(__file__).resolve().parent
DTYPES = ("auto", "float32", "bfloat16", "float16")


def setting(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Which model, on which examples; train.py's settings are these and its own."""

    model: str = setting("tiny/model", "hub name or local folder")
    task: str | None = setting(None, f"one of {', '.join(tasks.TASKS)}")
    data_dir: str | None = setting(None, "folder with the official files, such as RTE/train.jsonl")
    train_file: str | None = setting(
        None, 'a task of your own: JSONL of {"prompt", "options", "label"}'
    )
    validation_file: str | None = setting(None, "the same; without it split off the training file")
    test_file: str | None = setting(None, "the same")
    num_train: int = setting(1000, "training examples")
    num_validation: int | None = setting(None, "validation examples; 500, for CB and COPA 100")
    num_test: int = setting(1000, "test examples")
    data_seed: int = setting(0, "which examples are drawn")
    batch_size: int = setting(16, "examples at a time")
    max_length: int = setting(2048, "tokens; a longer prompt loses its beginning")
    dtype: str = setting("auto", "auto: the checkpoint's own on a GPU, float32 on a CPU", DTYPES)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, …")
    trust_remote_code: bool = setting(False, "let a model from the hub bring its own Python code")


def make_parser(settings: type, description: str) -> argparse.ArgumentParser:
    """One flag per field of the dataclass; what the user leaves out stays out of the namespace."""
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    for f in fields(settings):
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
            continue
        kind = f.type if isinstance(f.type, type) else next(iter(f.type.__args__))  # int | None
        help += "" if f.default in (None, "") else f" (default {f.default})"
        parser.add_argument(flag, type=kind, choices=f.metadata["choices"], help=help)
    return parser


def check(settings: Settings) -> None:
    """Raise UserError for a value that cannot work, before loading; name task and data."""
    files = settings.train_file or settings.validation_file or settings.test_file
    if settings.task is None and not files:
        if settings.model != Settings.model:
            raise UserError(f"give --task, one of {', '.join(tasks.TASKS)}, or files of your own")
        settings.task = "rte"
    if settings.task is not None:
        settings.task = tasks.get_task(settings.task).name
        if settings.data_dir is None and settings.model == Settings.model and not files:
            settings.data_dir = locate("tiny/data")  # the tiny model brings data of its own
    for name in ("batch_size", "max_length", "num_train", "num_test"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: at least 1")
    if (settings.num_validation or 0) < 0:
        raise UserError(f"--num-validation {settings.num_validation}: at least 0")
    if not 0 <= settings.data_seed < 2**32:
        raise UserError(f"--data-seed {settings.data_seed}: from 0 to {2**32 - 1}")


def load_data(settings: Settings) -> tasks.Data:
    """The examples that the settings name, once `check` has completed them."""
    return tasks.load_examples(
        settings.task,
        data_dir=settings.data_dir,
        train_file=settings.train_file,
        validation_file=settings.validation_file,
        test_file=settings.test_file,
        num_train=settings.num_train,
        num_validation=settings.num_validation,
        num_test=settings.num_test,
        seed=settings.data_seed,
    )


def locate(name: str) -> str:
    """The offline default lies beside this file, wherever the program is started."""
    return str(HERE / name) if name.startswith("tiny/") and not Path(name).exists() else name


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


# ------------------------------------------------------------------ models


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """Tokenizer and configuration of a hub name or a local folder; UserError if there is none."""
    folder = Path(name := locate(name))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name} is a folder without config.json; give one in Hugging Face format")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"model folder {name} does not exist; give a folder or a hub name")
    from transformers import AutoConfig, AutoTokenizer  # five seconds, so not before bad flags fail

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code), config
    except Exception as error:  # gated, misspelt, offline, custom code: each has a type of its own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load model {name!r} ({why}); check the name, log in with `hf auth login` if "
            "it is gated, or give a local folder"
        ) from error


def load_model(name: str, dtype: str = "auto", device: str = "auto", trust_remote_code=False):
    """A causal LM in eval mode, loaded straight to its device and dtype.

    dtype: float32, bfloat16, float16, or auto: the checkpoint's own on a GPU, float32 on a CPU.
    """
    from transformers import AutoModelForCausalLM

    device = choose_device(device)
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            locate(name),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=None if device == "cpu" else {"": device},  # never twice in memory
            trust_remote_code=trust_remote_code,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no weights, or no causal LM
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"cannot load the weights of {name!r} as a causal LM: {why}") from error
    if device == "cpu" and model.num_parameters() < 4e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # threads cost more than they save on matrices this small
    return model.eval()  # OPT has dropout 0.1, which would drown the probes


def usable_length(max_length: int, model_config) -> int:
    """max_length, or the number of positions that the model has where that is less."""
    return min(max_length, getattr(model_config, "max_position_embeddings", None) or max_length)


def choose_device(device: str) -> str:
    """A device that is there: auto is the GPU if torch sees one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this torch sees no GPU; use --device cpu")
    return device


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


def fingerprint(model) -> str:
    """A hash of the weights' beginnings, shapes and dtypes: tells one base model from another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        sample = weight.detach().view(-1)[:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


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
    tokenizer, _ = load_tokenizer(config["model"], trust)
    model = load_model(config["model"], config["dtype"], config["device"], trust)
    if fingerprint(model) != config["model_fingerprint"]:
        raise UserError(f"{config['model']} is not the model, or not in the dtype, of that run")
    handle = make_patch(model, config)
    replay(handle, steps)
    handle.remove()
    return model, tokenizer


def main(argv=None) -> None:
    parser = make_parser(Settings, __doc__.split("\n\n")[0])
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
        raise SystemExit(fail("eval.py", error)) from None


def fail(program: str, error: Exception) -> int:
    """Print one line; the exit code of bad input."""
    hint = "; try a smaller --batch-size or --max-length"
    hint = hint if isinstance(error, torch.OutOfMemoryError) else ""
    print(
        f"{program}: error: {(str(error) or type(error).__name__).splitlines()[0]}{hint}",
        file=sys.stderr,
    )
    return 2


def evaluate(given: dict, split: str, shots: int) -> str:
    """Zero-shot or in-context accuracy of a model, as one line of text."""
    settings = Settings(**given)
    check(settings)
    data = load_data(settings)
    tokenizer, model_config = load_tokenizer(settings.model, settings.trust_remote_code)
    settings.max_length = usable_length(settings.max_length, model_config)
    if shots > len(data.train):
        raise UserError(f"--shots {shots}: there are {len(data.train)} training examples")
    examples = getattr(data, split)
    if shots:
        examples = [tasks.with_demonstrations(e, data.train[:shots]) for e in examples]
    if not examples:
        raise UserError(f"the {split} split is empty")
    model = load_model(settings.model, settings.dtype, settings.device, settings.trust_remote_code)
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
    data = load_data(settings)
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
