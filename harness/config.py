"""The settings of all commands, the papers' values for them, and errors in one line.

    Settings     which model, on which examples: train.py, eval.py
    MaskSettings and what [Q]'s mask is made from: harness.mask
    Config       those and how to train: train.py
    fill_in      what the user did not say: from the papers' tables, else from the defaults

A setting is one field: the command line's flag, the line in config.json, the attribute in the code.
`transformers.HfArgumentParser` makes the flags; both --batch-size and --batch_size are understood.
Settings are frozen. What completes them returns a copy.
"""

import argparse
import itertools
import json
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import masks
import tasks

ROOT = Path(__file__).resolve().parent.parent
TINY = "tiny/model"


def setting(default, help: str):
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass(frozen=True)
class Settings:
    """Which model, on which examples."""

    model: str = setting(TINY, "hub name or local folder")
    task: str | None = setting(None, ", ".join(tasks.TASKS))
    data_dir: str | None = setting(None, "folder with RTE/train.jsonl, …; default the hub")
    train_file: str | None = setting(
        None, 'own JSONL of {"prompt", "options", "label"}, {"prompt", "completion"}, {"messages"} '
        'or {"text"}; or .txt',
    )  # fmt: skip
    validation_file: str | None = setting(None, "the same; default a part of the training file")
    test_file: str | None = setting(None, "the same; needed beside --train-file")
    num_train: int | None = setting(None, "training examples; 1,000, or as [Q] has for the task")
    num_validation: int | None = setting(None, "validation examples; 500, or the task's own")
    num_test: int | None = setting(None, "test examples; 1,000, of WikiText-2 all")
    data_seed: int = setting(0, "which examples are drawn")
    batch_size: int | None = setting(None, "examples of one step; 16, for WikiText-2 2")
    micro_batch: int | None = setting(None, "examples in memory at once; default the whole batch")
    max_length: int = setting(2048, "tokens; a longer prompt loses its beginning")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "auto: the checkpoint's own on a GPU, float32 on a CPU"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, …")
    trust_remote_code: bool = setting(False, "let a model from the hub bring its own Python code")
    traceback: bool = setting(False, "show where an error was raised, not only its line")


@dataclass(frozen=True)
class MaskSettings(Settings):
    """What [Q]'s mask is made from."""

    mask_from: Literal["text", "task"] = setting("text", "what senszoq's mask is made from")
    text: str | None = setting(
        None, '.txt or .jsonl of {"text": …}, or c4 (default), wikitext103, openwebmath, arxiv'
    )
    groups: int = setting(1, "for the mask: score 1/n of the matrices at a time, in n passes")
    quantiser: Literal["nf4", "kmeans"] = setting(
        "nf4", "senszoq, 4 bits: nf4, or [Q]'s kmeans, fitted with the mask"
    )


@dataclass(frozen=True)
class Config(MaskSettings):
    """Every setting of a run. `fill_in` gives some that are None a value."""

    method: Literal["s-mezo", "mezo", "r-mezo", "senszoq"] = setting("s-mezo", "what moves")
    adapter: Literal["lora", "prefix"] | None = setting(
        None, "new tensors move, the weights do not"
    )
    bits: Literal[4, 16] | None = setting(
        None, "senszoq, or mezo with an adapter: of the weights that stand still"
    )
    density: float | None = setting(None, "share of the weights that move, in (0, 1]")
    lr: float | None = setting(None, "learning rate η")
    eps: float | None = setting(None, "perturbation scale ε")
    steps: int | None = setting(None, "training steps")
    seed: int = setting(0, "of noise, batch order, random mask, text of [Q]'s mask, adapter")
    mask_kind: Literal["dynamic", "constant"] = setting(
        "dynamic", "s-mezo: taken in every probe and update, or once, a bit per weight"
    )
    refresh_every: int = setting(
        0, "s-mezo: steps between new thresholds, or new constant masks; 0: never"
    )
    above: float = setting(0.0, "s-mezo: leave out this share of the smallest weights, too")
    mask: str | None = setting(None, "senszoq: a mask file; default: it is made")
    select: str = setting(
        "", "regular expression: only parameters whose name, of tied ones the first, matches move"
    )
    rounding: Literal["stochastic", "nearest"] = setting(
        "stochastic", "of updates to 16-bit weights; nearest loses small ones"
    )
    eval_every: int | None = setting(None, "steps between validations; default steps / 10")
    compile: Literal["auto", "yes", "no"] = setting("auto", "fuse noise, mask and add")
    out: str | None = setting(None, "run directory; default runs/ and a name")


# ------------------------------------------------------------------ the papers' values

TABLE_8 = {  # [S] Table 8: sparsity, the share that is frozen
    "llama": {"sst2": 0.70, "rte": 0.75, "boolq": 0.80, "wic": 0.80, "multirc": 0.80},
    "mistral": {"sst2": 0.70, "rte": 0.60, "boolq": 0.60, "wic": 0.70, "multirc": 0.60},
}
GRIDS = {  # [S] Tables 6 and 7: one value out of each grid
    "llama": ("[S] Table 6", {"mezo": 1e-6, "s-mezo": 3e-6, "r-mezo": 3e-6}),
    "mistral": ("[S] Table 7", {"mezo": 1e-7, "s-mezo": 3e-6, "r-mezo": 3e-6}),
}
ADAPTERS = {  # adapter and method: η, ε, and the source of η; what is not here makes no sense
    ("lora", "mezo"): (5e-5, 1e-2, "MeZO appendix E: of 1e-4 and 5e-5; tune it"),
    ("lora", "s-mezo"): (5e-5, 1e-2, "as MeZO-LoRA's, [S] does not say; tune it"),
    ("prefix", "mezo"): (1e-3, 1e-1, "MeZO appendix E: of 1e-2 and 1e-3; tune it"),
}
TINY_RATES = {  # the tiny model's best of the grids in studies/learning.py, for 300 steps
    "mezo": {"sst2": 1e-3, "rte": 3e-4, "boolq": 1e-3, "copa": 1e-3},
    "s-mezo": {"sst2": 3e-2, "rte": 1e-2, "boolq": 3e-3, "copa": 1e-1},
    "r-mezo": {"sst2": 3e-3, "rte": 1e-2, "boolq": 3e-3, "copa": 3e-3},
    "senszoq": {"sst2": 1.0, "rte": 0.3, "boolq": 0.3, "copa": 0.3},
}


def fill_in(config: Config, family: str) -> tuple[Config, dict[str, str]]:
    """The settings with what the user did not say, and {setting: where its value comes from}.

    `family`: the model's type, such as llama or opt.
    """
    source, rates = GRIDS.get(family, ("as LLaMA's, [S] Table 6", GRIDS["llama"][1]))
    spec = tasks.TASKS.get(config.task, tasks.OWN)
    found = {
        "batch_size": (spec.batch_size, "both papers" if spec.batch_size == 16 else spec.sizes),
        "lr": (rates.get(config.method), f"{source}: of the grid for {config.method}; tune it"),
        "eps": (1e-3, "[S], and a code base close to [Q]"),
        "steps": (20_000, "both papers"),
        "density": (0.25, "sparsity 0.75, best or near it in [S] Fig. 4"),
    }
    if sparsity := TABLE_8.get(family, {}).get(config.task):
        density = round(1 - sparsity, 2)
        found["density"] = density, f"[S] Table 8: sparsity {sparsity} on {config.task}"
    if config.method == "mezo":
        found["density"] = 1.0, "MeZO moves every weight"
    if config.method == "senszoq":
        found["lr"] = 1e-6, "[Q]'s grid is unknown; its full runs had 1e-7 to 1e-6; tune it"
        found["density"] = 0.001, "[Q]: 0.1 %"
        found["bits"] = 4, "[Q] §3.5"
    if is_tiny(config.model):
        rates = TINY_RATES[config.method]
        found["lr"] = min(rates.values()), "lowest of the tiny model's rates; tune it"
        if config.task in rates and not config.train_file:
            found["lr"] = rates[config.task], "from the grid in studies/learning.py"
        found["steps"] = 300, "enough for the tiny model"
    if config.adapter:
        lr, eps, source = ADAPTERS[config.adapter, config.method]
        found |= {"lr": (lr, source), "eps": (eps, f"MeZO appendix E, {config.adapter}")}
    steps = config.steps or found["steps"][0]
    found["eval_every"] = max(1, steps // 10), "steps / 10"
    return filled(config, found)


def filled(config, found: dict[str, tuple]) -> tuple:
    """(config, {setting: source}), where None becomes the value of {setting: (value, source)}."""
    missing = [name for name in found if getattr(config, name) is None]
    values = {name: found[name][0] for name in missing}
    return replace(config, **values), {name: found[name][1] for name in missing}


def show(config: Config, sources: dict[str, str], others: str = "you") -> None:
    """Print every value that is not a plain default, with its source."""
    for f in fields(config):
        value = getattr(config, f.name)
        said = value != f.default and f.name not in ("task", "data_dir", "out")
        if f.name in sources or said:
            print(f"  {f.name:<14} {value!s:<24} {sources.get(f.name, others)}")


# ------------------------------------------------------------------ what cannot work


def complete(config: Settings) -> Settings:
    """A copy with the tiny model's task and data where nothing is named.

    ValueError for a value that cannot work.
    """
    task, data_dir = config.task, config.data_dir
    tiny = is_tiny(config.model) and not config.train_file and not config.test_file
    task = task or ("rte" if tiny else None)
    if not (task or config.train_file):
        raise ValueError("no task: give --task, or --train-file and --test-file")
    if task:
        task = tasks.get_task(task).name  # SST-2 is sst2, also in the tables above
        if tiny and Path(locate("tiny/data"), tasks.TASKS[task].folder).is_dir():
            data_dir = data_dir or "tiny/data"
    config = replace(config, task=task, data_dir=data_dir)
    check_numbers(config)
    if isinstance(config, Config):
        _check_method(config)
    return config


def check_numbers(config: Settings) -> None:
    """ValueError for a number out of its range; names the flag."""
    least = dict(batch_size=1, max_length=2, num_train=1, num_test=1, num_validation=0, steps=1)
    least |= dict(eval_every=1, micro_batch=1, refresh_every=0, groups=1, seed=0, data_seed=0)
    least |= dict(samples=1, length=2)
    for name, low in least.items():
        value = getattr(config, name, None)
        if value is not None and not low <= value < 1 << 31:
            raise ValueError(f"{flag(name)} {value}: from {low} to {(1 << 31) - 1}")
    if getattr(config, "density", None) is not None:
        masks.check_density(config.density)
    most = torch.finfo(torch.float32).max
    for name, bound, below in (("lr", "finite", torch.inf), ("eps", "finite in fp32", most)):
        value = getattr(config, name, None)
        if value is not None and not 0 < value < below:
            raise ValueError(f"{flag(name)} {value}: above 0 and {bound}")


USES = {  # setting: the methods that have a use for it
    **dict.fromkeys(("mask_kind", "refresh_every", "above"), ["s-mezo"]),
    **dict.fromkeys(("quantiser", "mask", "mask_from", "text", "groups"), ["senszoq"]),
    **dict.fromkeys(("select", "rounding"), ["mezo", "s-mezo", "r-mezo"]),
    "bits": ["senszoq", "mezo --adapter lora", "mezo --adapter prefix"],
}


# A resumed run keeps these. In 16 bits log.compare bears much rounding, and might miss a change.
KEPT = ("method", "adapter", "density", "select", "mask_kind", "above", "refresh_every",
        "rounding", "seed", "bits", "lr", "eps", "batch_size")  # fmt: skip


def _check_method(config: Config) -> None:
    """ValueError for a setting that the method has no use for: it would be ignored in silence."""
    with reworded(f"--select {config.select} is no regular expression"):
        re.compile(config.select)
    if config.method == "mezo" and config.density not in (None, 1):
        raise ValueError(f"--density {config.density}: mezo moves all weights; use --method s-mezo")
    if config.adapter and find_spec("peft") is None:
        raise ValueError("--adapter needs peft, which is not installed: pip install peft")
    if config.adapter and (config.adapter, config.method) not in ADAPTERS:
        methods = ", ".join(method for adapter, method in ADAPTERS if adapter == config.adapter)
        raise ValueError(
            f"--adapter {config.adapter} is for --method {methods}, not for {config.method}"
        )
    method = config.method + (f" --adapter {config.adapter}" if config.adapter else "")
    for name, methods in USES.items():
        if method not in methods and getattr(config, name) != getattr(Config, name):
            raise ValueError(f"{flag(name)} is for --method {', '.join(methods)}, not for {method}")
    if config.above and config.mask_kind != "dynamic":
        raise ValueError(f"--above {config.above} is for --mask-kind dynamic")
    if config.quantiser == "kmeans" and config.bits == 16:
        raise ValueError("--quantiser kmeans is of 4 bits: leave out --bits 16")
    if config.mask and (config.text or config.mask_from != "text" or config.groups != 1):
        raise ValueError(
            f"--mask {config.mask} brings its own source; leave out --text, --mask-from, --groups"
        )
    if config.text and config.mask_from == "task":
        raise ValueError(f"--text {config.text} would be ignored beside --mask-from task")


# ------------------------------------------------------------------ the command line


def flag(name: str) -> str:
    """How a setting is spelt on the command line."""
    return "--" + name.replace("_", "-")


class OneLine(argparse.ArgumentParser):
    """An error is one line, as all of ours are, and not the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def parse(kind: type, description: str, argv=None, **more) -> dict:
    """{name: value} of what the command line says, and nothing of what it does not.

    `more`: {name: (type, help)} of flags that are no settings.
    """
    from transformers import HfArgumentParser  # a second

    class Parser(OneLine, HfArgumentParser):
        pass

    parser = Parser(kind, description=description, allow_abbrev=False)
    for name, (type_, help) in more.items():
        parser.add_argument(flag(name), type=type_, help=help)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is not said stays out
    return vars(parser.parse_args(argv))


def at_least(low: int):
    """For argparse: a whole number from `low` on."""

    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: at least {low}")
        return int(text)

    return number


positive = at_least(1)


def rate(text: str) -> float:
    """For argparse: a learning rate."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: above 0 and finite")
    return float(text)


def rates(text: str) -> tuple[float, ...]:
    """For argparse: learning rates with commas, such as 1e-7,1e-6."""
    return tuple(map(rate, text.split(",")))


def named(names, kind):
    """For argparse: NAME=…, one of these names and what `kind` makes of the rest."""

    def pair(text: str) -> tuple:
        name, _, rest = text.partition("=")
        if name not in names:
            raise argparse.ArgumentTypeError(f"{text}: {' or '.join(names)}, then =")
        return name, kind(rest)

    return pair


def study_parser(doc: str) -> argparse.ArgumentParser:
    """Of a study with that docstring: --help has every default, and no flag is abbreviated."""
    return OneLine(
        description=doc.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip


def first_line(error: BaseException) -> str:
    """What an error says first; the name of its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reworded(what: str, hint: str = ""):
    """ValueError for whatever a library raises inside: what failed, why, and what to do.

    Running out of memory stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # gated, offline, torn, custom code: each has a type of its own
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise ValueError(f"{what} ({why}){hint}") from error


@contextmanager
def one_line_errors(hint=lambda error: "", argv=None, workers: bool = False):
    """What a user can put right is one line and exit code 2, no traceback.

    `hint(error)` is said after the error. --traceback in `argv`, by default the command line's,
    shows where it was raised. `workers`: may torchrun start several of the command?
    """
    for name in ("SIGTERM", "SIGHUP"):  # a batch system's stop, a closed terminal: as Ctrl-C
        number = getattr(signal, name, None)  # Windows has one of them
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # no nohup
            with suppress(ValueError):  # not in a notebook's thread
                signal.signal(number, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # "±" in ASCII
    try:
        if not workers and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this command is one process: start it without torchrun")
        yield
    except (KeyboardInterrupt, ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as e:
        code, line = 2, f"error: {first_line(e)}"
        if isinstance(e, KeyboardInterrupt):
            code, line = 130, "stopped"
        elif "--traceback" in (sys.argv if argv is None else argv):
            raise
        if isinstance(e, torch.OutOfMemoryError):
            line += (
                "; try a smaller --micro-batch, --batch-size or --max-length, and --groups 8 where "
                "a mask is made"
            )
        for bar in list(tqdm._instances):  # so that what is said has a line of its own
            bar.close()
        print(f"{Path(sys.argv[0]).name}: {line}{hint(e)}", file=sys.stderr)
        raise SystemExit(code) from None


def goes_on(error: BaseException) -> str:
    """The hint of a study that keeps what is done."""
    return "; the same command goes on" if isinstance(error, KeyboardInterrupt) else ""


# ------------------------------------------------------------------ a run's directory


def locate(name: str) -> str:
    """The offline default lies beside the code, wherever the program is started."""
    return str(ROOT / name) if name.startswith("tiny/") and not Path(name).exists() else name


def is_tiny(model: str) -> bool:
    """Is it the offline default, by whatever path? It brings data and a text of its own."""
    return Path(locate(model)).resolve() == ROOT / TINY


def new_run(config: Config, what: str = "") -> Path:
    """An empty directory: --out, or runs/ and a name that is free. `what`: a part of that name."""
    if config.out is not None:
        run = Path(config.out)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            begun = isinstance(config, Config) and (run / "config.json").exists()
            way_out = f", or --resume {run}" if begun else ""
            raise ValueError(f"--out {run} is not empty; choose another{way_out}")
        run.mkdir(parents=True, exist_ok=True)
        (run / "steps.csv").touch(exist_ok=False)  # two may start at once: who makes it has the run
        return run
    data = Path(config.train_file).stem if config.train_file else config.task
    method = "-".join(filter(None, (config.method, getattr(config, "adapter", None), what)))
    name = f"{Path(config.model).name}-{data}-{method}-seed{config.seed}"
    Path("runs").mkdir(exist_ok=True)  # a file, or a link to nowhere, is said here
    for number in itertools.count(1):
        run = Path("runs", name + (f"-{number}" if number > 1 else ""))
        with suppress(FileExistsError):
            run.mkdir()
            return run


def save(run: Path, config: Config) -> None:
    """config.json: every setting, with absolute paths, so that it can be replayed from anywhere."""
    write_json(run / "config.json", absolute(asdict(config)))


def absolute(settings: dict) -> dict:
    """The settings with absolute paths, where these exist."""
    names = ("model", "data_dir", "train_file", "validation_file", "test_file", "text")
    paths = {name: Path(locate(settings[name])) for name in names if settings.get(name)}
    return settings | {name: str(path.resolve()) for name, path in paths.items() if path.exists()}


def load(run: Path, changes: dict) -> Config:
    """The settings of a run, with what the command line says now over them."""
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is no run directory: it has no config.json")
    with reworded(f"{run}/config.json is torn or of another version"):
        kept = json.loads((run / "config.json").read_text("utf-8-sig"))  # an editor's mark, or none
        if "by" in kept:
            raise ValueError(f"it is of {kept['by']}, whose weights no log rebuilds")
        config = Config(**kept | changes)
        check_types(config)
    fixed = {*KEPT, "out"}
    if (run / "mask.safetensors").exists():
        fixed |= {"mask", "mask_from", "text", "groups", "quantiser"}  # what it was made from
    typed = absolute(changes)
    for name in sorted(fixed & changes.keys()):
        if typed[name] != kept.get(name):
            has = run if name == "out" else repr(kept.get(name))
            more = ", or give --micro-batch" if name == "batch_size" else ""
            raise ValueError(
                f"{flag(name)} cannot be changed in {run}, which has {has}; start a new run{more}"
            )
    return complete(config)


def check_types(config: Settings) -> None:
    """ValueError for a value that its field cannot have: the file may have been edited."""
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) or (hint,)  # of X | None, both
        literal = [kind for kind in (hint, *kinds) if get_origin(kind) is Literal]
        choices = [choice for kind in literal for choice in get_args(kind)]
        types = (*kinds, int) if float in kinds else kinds
        if type(value) not in types and not (isinstance(value, (str, int)) and value in choices):
            raise ValueError(f"{name} is {value!r}")


def check_new(path: Path) -> None:
    """ValueError or OSError where no new file can be written: it is said before the work."""
    if path.exists():
        raise ValueError(f"--out {path} exists; give the name of a new file")
    path.touch()
    path.unlink()


@contextmanager
def whole(path: Path):
    """A path beside it: what is written there takes its place, whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:  # such as a full disk
        beside.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Whole or not at all, and synced."""
    with whole(path) as beside, open(beside, "w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
