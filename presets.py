"""The settings of a run: what can be said on train.py's command line, and what fills in the rest.

Values come from three places: the command line, else [S]'s tables (by model family and task), else
the defaults below. train.py prints each with its source.
"""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import loading
import masks
import moving
import quant
import sensitivity
import zo
from errors import UserError
from loading import Settings, flag, setting


@dataclass
class Config(Settings):
    """Every setting of a run: those of loading.py and these. None: filled in by `fill_in`."""

    method: str = setting("s-mezo", "which weights move", masks.METHODS)
    density: float | None = setting(None, "share of the weights that move, in (0, 1]")
    lr: float | None = setting(None, "learning rate η")
    eps: float = setting(1e-3, "perturbation scale ε")
    steps: int | None = setting(None, "training steps")
    seed: int = setting(0, "of noise, random mask and batch order")
    mask_kind: str | None = setting(
        None, "of s-mezo: re-taken every step; constant; constant, a bit each", masks.S_KINDS
    )
    mask: str | None = setting(None, "sensitive, senszoq: a file of masks.py")
    mask_from: str | None = setting(
        None, "sensitive, senszoq, without a file: make it from here", ("text", "task")
    )
    text: str | None = setting(
        None, "for --mask-from text: .txt or .jsonl; default C4; tiny/model has its own"
    )
    double_quant: bool = setting(True, "senszoq: 8-bit scales, 4.13 bits per weight and not 4.5")
    refresh_every: int = setting(0, "s-mezo: steps between new thresholds; 0 is never")
    vectors: str = setting(
        "masked", "what one-dimensional tensors (norms, biases) are", moving.VECTORS
    )
    rounding: str = setting(
        "stochastic", "of updates to 16-bit weights; nearest loses small ones", moving.ROUNDING
    )
    select: str = setting("", "regular expression: only parameters whose name matches move")
    eval_every: int | None = setting(None, "steps between validations; default steps / 10")
    log_every: int | None = setting(None, "steps between lines of metrics; default steps / 200")
    snapshot_every: int = setting(0, "steps between copies of the weights, to resume sooner")
    micro_batch: int | None = setting(None, "examples in memory at once; default the whole batch")
    compile: str = setting("auto", "fuse noise, mask and add", ("auto", "yes", "no"))
    out: str | None = setting(None, "run directory; default runs/ and a name")
    save_model: bool = setting(False, "write the best-validation weights as a checkpoint")


TABLE_8 = {  # [S] Table 8: sparsity, the share that is frozen
    "llama": {"sst2": 0.70, "rte": 0.75, "boolq": 0.80, "wic": 0.80, "multirc": 0.80},
    "mistral": {"sst2": 0.70, "rte": 0.60, "boolq": 0.60, "wic": 0.70, "multirc": 0.60},
}
GRIDS = {  # [S] Tables 6 and 7: one value out of each grid
    "llama": ("[S] Table 6", {"mezo": 1e-6, "s-mezo": 3e-6, "r-mezo": 3e-6}),
    "mistral": ("[S] Table 7", {"mezo": 1e-7, "s-mezo": 3e-6, "r-mezo": 3e-6}),
}
FEW_RATE = 1e-6, "[Q]'s grid is unknown; its full zeroth-order runs had 1e-7 to 1e-6; tune it"
TINY = {  # the tiny model's, of the grids in tiny/compare.py, for 300 steps
    "mezo": {"sst2": 1e-3, "rte": 1e-3, "boolq": 3e-4, "copa": 1e-3},
    "s-mezo": {"sst2": 3e-2, "rte": 1e-2, "boolq": 3e-3, "copa": 3e-2},
    "r-mezo": {"sst2": 1e-2, "rte": 3e-3, "boolq": 1e-3, "copa": 3e-3},
    "sensitive": {"sst2": 1.0, "rte": 1e-1, "boolq": 1e-1, "copa": 3e-1},
    "senszoq": {"sst2": 1.0, "rte": 1e-1, "boolq": 3e-2, "copa": 3e-1},
}


def fill_in(config: Config, family: str) -> dict[str, tuple[object, str]]:
    """{setting: (value, source)} for what the user did not say. `family`: tiny, llama, opt, …"""
    if config.method in masks.FEW:
        found = {"lr": FEW_RATE, "steps": (20_000, "[Q]"), "density": (0.001, "[Q]: 0.1 %")}
        if config.mask is None:
            found["mask_from"] = "text", "[Q]: pre-training text"
    else:
        source, rates = GRIDS.get(family, ("as LLaMA's, [S] Table 6", GRIDS["llama"][1]))
        sparsity = TABLE_8.get(family, {}).get(config.task)
        found = {
            "lr": (rates[config.method], f"{source}: of the grid for {config.method}; tune it"),
            "steps": (20_000, "[S] §4.1"),
            "density": (0.25, "sparsity 0.75, best or near it in [S] Fig. 4"),
        }
        if sparsity is not None:
            source = f"[S] Table 8: sparsity {sparsity} on {config.task}"
            found["density"] = round(1 - sparsity, 2), source
        if config.method == "s-mezo":
            found["mask_kind"] = "dynamic", "[S] §3.2: re-taken every step"
    if family == "tiny":
        rates = TINY[config.method]
        found["lr"] = min(rates.values()), "lowest of the tiny model's rates; tune it"
        if config.task in rates and not config.train_file:
            found["lr"] = rates[config.task], "best of the grid in tiny/compare.py"
        found["steps"] = 300, "enough for the tiny model"
    if config.method == "mezo":
        found["density"] = 1.0, "MeZO moves every weight"
    steps = config.steps or found["steps"][0]
    found["eval_every"] = max(1, steps // 10), "steps / 10"
    found["log_every"] = max(1, steps // 200), "steps / 200"
    return {name: v for name, v in found.items() if getattr(config, name) is None}


def complete(config: Config, given: dict, model_config) -> None:
    """All that the user did not say, filled in; each value is printed with its source.

    Raises UserError where what is to move does not fit the model.
    """
    config.max_length = loading.usable_length(config.max_length, model_config)
    filled = fill_in(config, "tiny" if config.model == Config.model else model_config.model_type)
    for name, (value, _) in filled.items():
        setattr(config, name, value)
    shapes = model_config, config.trust_remote_code
    if config.method in masks.FEW:
        check_mask(config, loading.skeleton(*shapes))
        if config.mask is not None:
            filled["density"] = config.density, "the mask's"
    elif config.select:
        moving.selected(loading.skeleton(*shapes), config.vectors, config.select)
    for name, value in asdict(config).items():
        source = filled[name][1] if name in filled else "you" if name in given else None
        if source:
            print(f"  {name:<14} {value!s:<24} {source}")


def check(config: Config, workers: int = 1) -> None:
    """Raise UserError for a value that cannot work, before anything is loaded."""
    loading.check(config)
    for name in ("eps", "lr", "steps", "eval_every", "log_every"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} {value}: it must be positive and finite")
    for name, least, bound in (("seed", 0, zo.MAX_RUN_SEED), ("steps", 1, zo.MAX_STEP)):
        if not least <= (getattr(config, name) or least) < bound:
            raise UserError(f"--{name} {getattr(config, name)}: from {least} to {bound - 1}")
    loading.at_least(config, 0, "refresh_every", "snapshot_every")
    loading.at_least(config, 1, "micro_batch")
    if config.density is not None and not 0 < config.density <= 1:
        raise UserError(
            f"--density {config.density}: the share of weights that move, above 0 and at most 1 "
            "(the paper's sparsity 0.75 is --density 0.25)"
        )
    if config.device_map and workers > 1:
        raise UserError("--device-map spreads one worker's model; leave it out under torchrun")
    if config.refresh_every and config.snapshot_every % config.refresh_every:
        raise UserError(
            f"--snapshot-every {config.snapshot_every}: a multiple of --refresh-every "
            f"{config.refresh_every}, as a snapshot holds no thresholds"
        )
    try:
        re.compile(config.select)
    except re.error as error:
        raise UserError(f"--select {config.select!r} is no regular expression: {error}") from error
    check_method(config)


def check_method(config: Config) -> None:
    """Raise UserError for a setting that is another method's, or contradicts another."""
    method, few = config.method, config.method in masks.FEW
    if method == "mezo" and config.density not in (None, 1):
        raise UserError(f"--density {config.density}: mezo moves all weights; use --method s-mezo")
    if config.mask_kind and method != "s-mezo":
        raise UserError(f"--mask-kind {config.mask_kind} is for s-mezo, not for {method}")
    if config.refresh_every and (method != "s-mezo" or config.mask_kind not in (None, "dynamic")):
        raise UserError(
            f"--refresh-every {config.refresh_every}: only the dynamic mask of s-mezo has a "
            "threshold to take again"
        )
    if not config.double_quant and method != "senszoq":
        raise UserError(f"--no-double-quant is for senszoq, not for {method}")
    if not few and (config.mask or config.mask_from or config.text):
        names = " and ".join(masks.FEW)
        raise UserError(f"--mask, --mask-from and --text are for {names}, not for {method}")
    if few and (config.vectors != "masked" or config.select or config.rounding != Config.rounding):
        raise UserError(
            f"--vectors, --select and --rounding are not for {method}: a mask says which weights "
            "move, and their values are kept in fp32"
        )
    if config.text and config.mask_from == "task":
        raise UserError(f"--text {config.text} with --mask-from task: one of the two")
    if config.mask and (config.mask_from or config.density or config.text):
        raise UserError(
            f"--mask {config.mask} brings its own source and density; leave out --mask-from, "
            "--text and --density"
        )
    if config.mask:
        sensitivity.read_mask(config.mask)  # `check_mask` asks whether it fits the model


def check_mask(config: Config, skeleton) -> None:
    """UserError where [Q]'s mask, or one of this density, does not fit the model. `skeleton`: names
    and shapes are enough, so nothing is loaded."""
    weights = sensitivity.decoder_linears(skeleton)
    if config.method == "senszoq":
        quant.check_linears(skeleton, weights)
    if config.mask is None:
        sensitivity.how_many(weights, config.density)
    else:
        index, about = sensitivity.read_mask(config.mask)
        sensitivity.check_mask(config.mask, index, about, weights)
        config.density = about["density"]


def run_name(config: Config) -> str:
    """The name of a run that was not given one."""
    model = "tiny" if config.model == Config.model else Path(config.model).name
    data = Path(config.train_file).stem if config.train_file else config.task
    return f"{model}-{data}-{config.method}-seed{config.seed}"
