"""[Q]'s mask, made once for any number of runs.

    python -m harness.mask --model M --text FILE --out mask.safetensors
    python -m harness.mask --model M --task rte --mask-from task --out mask.safetensors

Scoring 7B takes 40 GB where training takes 5, so it is often done on another machine. train.py
calls `make`, too, where no --mask is given. Kinds beside "sensitive" are for comparison.

With --quantiser kmeans the file also holds the weights in 4 bits (quant.py). They stay in host
memory until it is written, and writing doubles them.

The file is in safetensors format. Under each matrix's name it holds the flat positions of the
weights that move, as int32. It holds no trained values: the model and a run's log rebuild those.
It also says which model it is of. `check_shapes` refuses another model's mask before the model is
loaded, and `check_values` while it is.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

import masks
import quant
import tasks
import zo
from harness import config as configs
from harness import dataset, loading
from harness.config import MaskSettings, reworded, setting


@dataclass(frozen=True)
class MaskConfig(MaskSettings):
    """What a mask is made of; the names shared with train.py's Config mean the same."""

    out: str | None = setting(None, "new file, such as mask.safetensors")
    density: float = setting(0.001, "share of each matrix")
    kind: Literal["sensitive", "random", "largest", "smallest"] = setting("sensitive", "of mask")
    statistic: Literal["per-sample", "of-mean"] = setting("per-sample", "see masks.fisher")
    samples: int = setting(100, "texts or examples")
    length: int = setting(512, "tokens of a text")
    seed: int = setting(0, "of the texts drawn and of --kind random")


def make(config, path, data=None) -> dict[str, Tensor]:
    """The mask of `config` (a MaskConfig, or a run's Config), which is also in the file `path`.

    `data`: a run's dataset.Data, for --mask-from task.
    """
    settings = MaskConfig(**{
        name: getattr(config, name) for name in MaskConfig.__dataclass_fields__
        if hasattr(config, name)
    })  # fmt: skip
    device, sensitive = loading.take_device(settings.device), settings.kind == "sensitive"
    about = {name: getattr(settings, name) for name in ("model", "kind", "density", "seed")}
    tokenizer, model_config = loading.load_tokenizer(settings.model, settings.trust_remote_code)
    shapes = masks.decoder_linears(loading.skeleton(model_config, settings.trust_remote_code))
    masks.how_many(shapes, settings.density)  # what cannot be is said before a model is loaded
    if sensitive:
        losses, source = what_is_scored(settings, tokenizer, model_config, data)
        about |= source | {"statistic": settings.statistic, "samples": len(losses)}
        about |= {"quantiser": settings.quantiser}
    dtype = settings.dtype
    if sensitive and dtype == "auto" and device != "cpu":
        dtype = "bfloat16"  # also where the checkpoint is fp16, whose gradients underflow
    if settings.quantiser == "kmeans" and dtype == "float16":
        dtype = "bfloat16"  # fp16 lacks small weights: `_bits` would be of another model
    model = loading.load_model(settings.model, dtype, device, settings.trust_remote_code)
    weights, codebooks = masks.decoder_linears(model), {}

    def fit(scores, index):
        for name, places in index.items() if settings.quantiser == "kmeans" else ():
            codebooks[name] = quant.Codebooks.fit(weights[name].detach(), scores[name], places)

    if sensitive:
        index = masks.sensitive_index(
            model, losses, settings.density, groups=settings.groups, then=fit,
            bar=partial(tqdm, unit=" samples"), statistic=settings.statistic,
        )  # fmt: skip
    elif settings.kind == "random":
        index = masks.random_index(weights, settings.density, settings.seed)
    else:
        by_size = masks.largest if settings.kind == "largest" else masks.smallest
        index = by_size(weights, settings.density)
    if without := len(weights) - len(index):
        print(f"{without} of {len(weights)} matrices stay still: too small, or without a gradient")
    save(path, index, weights, about | {"torch": str(torch.__version__)}, codebooks)
    return index


def what_is_scored(settings: MaskConfig, tokenizer, model_config, data) -> tuple[list, dict]:
    """(losses, what they are of): windows of a text, or a task's examples."""
    if settings.mask_from == "task":
        losses = tasks.task_losses(data, settings.samples, settings.max_length)
        return losses, {"source": settings.task or settings.train_file}
    text = settings.text
    if text is None and configs.is_tiny(settings.model):
        text = configs.locate("tiny/data/c4.jsonl")
    length = loading.usable_length(settings.length, model_config)
    texts = dataset.read_texts(text)
    windows = tasks.text_windows(tokenizer, texts, settings.samples, length, settings.seed)
    tasks.check_tokens(tokenizer, windows.flatten().tolist(), model_config)
    source = dataset.TEXTS.get(text or "c4", [text])[:2]
    return tasks.text_losses(windows), {"source": " ".join(source), "length": length}


# ------------------------------------------------------------------ the file


def _fitted(name: str) -> tuple[str, str]:
    """What a matrix's codes and levels are called in the file."""
    return f"{name}.codes", f"{name}.levels"


def _sample(weight: Tensor) -> list[float]:
    """Eight values of a matrix, which tell one model from another."""
    flat = weight.detach().flatten()
    return [float(f"{v:.6g}") for v in flat[:: max(1, flat.numel() // 8)][:8].float().tolist()]


def _bits(weight: Tensor) -> int:
    """The sum of all weights' bits in bfloat16, which fp32 and bf16 copies of a model share."""
    return int(weight.detach().bfloat16().view(torch.int16).sum(dtype=torch.int64))


def save(path, index: dict, weights: dict, provenance: dict, codebooks: dict | None = None) -> None:
    """Write {name: positions}, which weights they are of, and where they come from (JSON values).

    `codebooks`: {name: what quant.Codebooks.fit gave}. A file of that name is replaced by a
    complete one or not at all.
    """
    matrices = {n: {"shape": list(weights[n].shape), "sample": _sample(weights[n])} for n in index}
    tensors = dict(index)
    for name, fitted in (codebooks or {}).items():
        matrices[name]["bits"] = _bits(weights[name])
        tensors |= zip(_fitted(name), fitted, strict=True)
    about = {"provenance": provenance, "matrices": matrices}
    with configs.whole(Path(path)) as beside:
        # `save_file` would let nobody else read it, whatever the umask
        text = {key: json.dumps(value) for key, value in about.items()}
        beside.write_bytes(to_bytes(tensors, text))


class MaskFile(NamedTuple):
    """What `load` finds in a mask file."""

    path: Path
    index: dict[str, Tensor]
    provenance: dict
    matrices: dict[str, dict]  # shapes and values of the model that the mask was made for
    codebooks: dict[str, tuple]  # what quant.Codebooks.fit gave, for the quantiser kmeans


def load(path: Path, quantiser: str = "nf4") -> MaskFile:
    """A mask file, without a model. ValueError where it is none, or lacks codebooks for kmeans."""
    from safetensors import safe_open

    if not Path(path).exists():
        raise ValueError(f"no mask file {path}; python -m harness.mask makes one")
    with reworded(f"{path} is no complete mask file", "; make it again"):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}  # not read yet
        provenance, matrices = json.loads(about["provenance"]), json.loads(about["matrices"])
        index = {name: tensors.pop(name) for name in sorted(matrices)}
        if set(tensors) not in (set(), {key for name in index for key in _fitted(name)}):
            raise ValueError("its matrices are not those it speaks of")
    for name, places in index.items():
        masks.check_places(places, zo.MAX_ELEMENTS, f"{path}: {name}")
    if quantiser == "kmeans" and not tensors:
        raise ValueError(
            f"{path} has no codebooks, which are fitted while a mask is made; make one with "
            "python -m harness.mask --quantiser kmeans"
        )
    wanted = index if quantiser == "kmeans" else ()
    codebooks = {name: tuple(tensors[key] for key in _fitted(name)) for name in wanted}
    return MaskFile(path, index, provenance, matrices, codebooks)


def check_shapes(file: MaskFile, weights: dict[str, Tensor]) -> None:
    """ValueError unless a mask's names and shapes are among `weights`, the `decoder_linears`."""
    here = {name: list(w.shape) for name, w in weights.items()}
    for name, about in file.matrices.items():
        if about["shape"] != here.get(name):
            raise ValueError(
                f"{file.path} is a mask of another model: {name} is {about['shape']} there and "
                f"{here.get(name, 'missing')} here; make one with python -m harness.mask"
            )


def density_of(path: Path, config, model_config) -> float:
    """A mask file's. ValueError where it is of another model, or of another density than asked."""
    file = load(path, config.quantiser)
    shapes = loading.skeleton(model_config, config.trust_remote_code)
    check_shapes(file, masks.decoder_linears(shapes))
    whole = sum(math.prod(matrix["shape"]) for matrix in file.matrices.values())
    density = file.provenance.get("density", sum(map(len, file.index.values())) / whole)
    if config.density not in (None, density):
        raise ValueError(f"--density {config.density}: that of the mask {path} is {density}")
    return density


def check_values(file: MaskFile, name: str, weight: Tensor) -> None:
    """ValueError unless `weight` has the values that the file remembers, to 16-bit rounding.

    So a mask of the fp32 model fits the same model in 16 bits, on any device. Eight values per
    matrix are compared. Codebooks stand for all weights of a matrix, so they want all the same.
    """
    about = file.matrices[name]
    theirs = torch.tensor(about["sample"])
    same = torch.allclose(torch.tensor(_sample(weight)), theirs, rtol=2**-7, atol=1e-6)
    if not same or (file.codebooks and about.get("bits") != _bits(weight)):
        raise ValueError(
            f"{file.path} is a mask of another model: {name} has other values here; "
            "make one with python -m harness.mask"
        )


# ------------------------------------------------------------------ the command


def without_use(config: MaskConfig) -> set[str]:
    """The settings that the mask does not depend on."""
    text = {"text", "length"}
    examples = {
        "task", "data_dir", "train_file", "validation_file", "test_file", "num_train",
        "num_validation", "num_test", "data_seed", "max_length",
    }  # fmt: skip
    nowhere = {"batch_size", "micro_batch"}  # a loss is of one sample
    if config.kind == "sensitive":
        return nowhere | (text | {"seed"} if config.mask_from == "task" else examples)
    scored = {"samples", "mask_from", "quantiser", "statistic", "groups"}
    return nowhere | text | examples | scored | (set() if config.kind == "random" else {"seed"})


def main(argv=None) -> None:
    with configs.one_line_errors(argv=argv):
        given = configs.parse(MaskConfig, __doc__.split("\n")[0], argv)
        config = MaskConfig(**given)
        if config.out is None:
            raise ValueError("no --out: give the name of a new file, such as mask.safetensors")
        configs.check_new(Path(config.out))
        configs.check_numbers(config)
        if wrong := sorted(name for name in without_use(config) & given.keys() if given[name]):
            sensitive = config.kind == "sensitive"
            use = f"--mask-from {config.mask_from}" if sensitive else f"--kind {config.kind}"
            raise ValueError(f"{configs.flag(wrong[0])} has no use with {use}; leave it out")
        data = None
        if config.mask_from == "task":
            config, model_config, data = dataset.load(configs.complete(config))
            few = data.train[: config.samples]  # train.py has checked its own
            tasks.check_examples(data, few, config.max_length, model_config)
        index = make(config, config.out, data)
        print(f"{config.out}: {sum(map(len, index.values())):,} weights of {len(index)} matrices")


if __name__ == "__main__":
    main()
