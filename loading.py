"""What a command line names, checked and loaded: settings, data, tokenizer, model.

One dataclass holds every setting; the command line is derived from it (`make_parser`). Bad input
fails before anything large is loaded, in the seconds that importing takes: `UserError`, one line,
exit code 2. Models and tokenizers are Hugging Face's, from the hub or a local folder.
"""

import argparse
import contextlib
import ctypes
import hashlib
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

import tasks
from errors import UserError

HERE = Path(__file__).resolve().parent
DTYPES = ("auto", "float32", "bfloat16", "float16")


def setting(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Which model, on which examples; train.py's settings are these and its own."""

    model: str = setting("tiny/model", "hub name or local folder")
    task: str | None = setting(None, f"one of {', '.join(tasks.TASKS)}")
    data_dir: str | None = setting(
        None, "folder with RTE/train.jsonl, …; default the hub, of tiny/model tiny/data"
    )
    train_file: str | None = setting(
        None, 'a task of your own: JSONL of {"prompt", "options", "label"}'
    )
    validation_file: str | None = setting(None, "the same; without it split off the training file")
    test_file: str | None = setting(None, "the same; needed beside --train-file")
    num_train: int = setting(1000, "training examples")
    num_validation: int | None = setting(None, "validation examples; 500, for CB and COPA 100")
    num_test: int = setting(1000, "test examples")
    data_seed: int = setting(0, "which examples are drawn")
    batch_size: int = setting(16, "examples at a time")
    max_length: int = setting(2048, "tokens; a longer prompt loses its beginning")
    dtype: str = setting("auto", "auto: the checkpoint's own on a GPU, float32 on a CPU", DTYPES)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, …")
    device_map: str | None = setting(None, "spread the layers over all GPUs", ("auto",))
    trust_remote_code: bool = setting(False, "let a model from the hub bring its own Python code")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, as all of ours are, and not the whole usage."""

    def __init__(self, **how):
        super().__init__(**how)
        with contextlib.suppress(AttributeError):  # a test's stdout is no terminal
            sys.stdout.reconfigure(errors="replace")  # "±" in ASCII

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def make_parser(settings: type, description: str) -> Parser:
    """One flag per field of the dataclass; what the user leaves out stays out of the namespace."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(settings):
        help = f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            help += f" (default {'yes' if f.default else 'no'})"
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=help)
            continue
        kind = f.type if isinstance(f.type, type) else next(iter(f.type.__args__))  # int | None
        help += "" if f.default in (None, "") else f" (default {f.default})"
        parser.add_argument(flag(f.name), type=kind, choices=f.metadata["choices"], help=help)
    return parser


def flag(name: str) -> str:
    """How a setting is spelt on the command line."""
    return "--" + name.replace("_", "-")


def at_least(settings, least: int, *names: str) -> None:
    """UserError where one of these settings is given, and less."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"{flag(name)} {value}: at least {least}")


def none_of(given: dict, source: str) -> None:
    """UserError where settings were given beside what brings its own."""
    if names := ", ".join(map(flag, given)):
        raise UserError(f"{source} brings its own settings; leave out {names}")


def check(settings: Settings) -> None:
    """Raise UserError for a value that cannot work, before loading; name task and data."""
    check_folder(settings.model)
    choose_device(settings.device, settings.device_map)
    files = settings.train_file or settings.validation_file or settings.test_file
    if is_tiny(settings.model):
        settings.model = Settings.model
    if settings.task is None and not files:
        if settings.model != Settings.model:
            raise UserError(f"give --task, one of {', '.join(tasks.TASKS)}, or files of your own")
        settings.task = "rte"
    if settings.task is not None:
        settings.task = tasks.get_task(settings.task).name
        if settings.data_dir is None and settings.model == Settings.model and not files:
            settings.data_dir = locate("tiny/data")  # the tiny model brings data of its own
    at_least(settings, 1, "batch_size", "max_length", "num_train", "num_test")
    at_least(settings, 0, "num_validation")
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


def is_tiny(model: str) -> bool:
    """Is it the offline default, by whatever path? It brings data and a text of its own."""
    return Path(locate(model)).resolve() == HERE / Settings.model


# ------------------------------------------------------------------ models


def check_folder(name: str) -> None:
    """UserError where a model is named by a path, and no model is there."""
    folder = Path(name := locate(name))
    if folder.is_file() or folder.is_dir() and not (folder / "config.json").is_file():
        what = "a file" if folder.is_file() else "a folder without config.json"
        raise UserError(f"{name!r} is {what}; give a folder in Hugging Face format")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"model folder {name} does not exist; give a folder or a hub name")


def check_file(flag: str, path: Path, new: bool = False) -> None:
    """UserError unless a file of that name can be written; `new`: and none is there."""
    if path.is_dir() or new and path.exists() or not os.access(path.absolute().parent, os.W_OK):
        kind = "a new file" if new else "a file"
        raise UserError(f"{flag} {path}: {kind} in a folder that can be written to")


def check_new(flag: str, folder: Path) -> None:
    """UserError unless a checkpoint can be written there, over nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is already there and not empty; choose another name")
    above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{flag} {folder}: {above} is no folder that can be written to")


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """Tokenizer and configuration of a hub name or a local folder; UserError if there is none."""
    check_folder(name := locate(name))
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


def skeleton(config, trust_remote_code: bool = False):
    """The model without its weights (on torch's meta device): names and shapes before loading."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"a {config.model_type} model is no causal language model") from error


def load_model(
    name: str,
    dtype="auto",
    device="auto",
    trust_remote_code=False,
    four_bits=None,
    device_map: str | None = None,
) -> torch.nn.Module:
    """A causal LM in eval mode, loaded straight to its device and dtype.

    device_map: "auto" spreads its layers over all GPUs, through accelerate.
    dtype: float32, bfloat16, float16, or auto: the checkpoint's own on a GPU, float32 on a CPU.
    four_bits: `quant.loading_config`'s answer; its matrices are quantised as they are read.
    """
    from transformers import AutoModelForCausalLM

    device = choose_device(device, device_map)
    if ":" in device:
        torch.cuda.set_device(device)  # nothing of ours on another worker's GPU
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            locate(name),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map or (None if device == "cpu" else {"": device}),  # never twice
            quantization_config=four_bits,
            trust_remote_code=trust_remote_code,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # none, torn, no LM
        if four_bits is not None and four_bits.error is not None:
            raise UserError(str(four_bits.error)) from error
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"cannot load the weights of {name!r} as a causal LM: {why}") from error
    if four_bits is not None:
        model.hf_quantizer.remove_quantization_config(model)  # our layers are not transformers'
    if device_map and {"cpu", "disk"} & set(map(str, model.hf_device_map.values())):
        raise UserError(f"{name!r} does not fit on the GPUs there are; try --dtype bfloat16")
    if device == "cpu" and model.num_parameters() < 4e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # threads cost more than they save on matrices this small
    return model.eval()  # OPT has dropout 0.1, which would drown the probes


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of less than 64 MB, where it would hand them back at once.

    A forward frees its activations layer by layer. Getting them anew, a page fault per 4 kB, costs
    up to a tenth of a step on a CPU, and more for the doubled batch than for two plain ones. Call
    it after loading and thresholds: their weight-sized temporaries, if kept, left 10 GB of holes at
    7B.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as in malloc.h
        libc.mallopt(mmap_threshold, 1 << 26)
        libc.mallopt(trim_threshold, 1 << 30)


def usable_length(max_length: int, model_config) -> int:
    """max_length, or the number of positions that the model has where that is less."""
    return min(max_length, getattr(model_config, "max_position_embeddings", None) or max_length)


def choose_device(device: str, device_map: str | None = None, flag: str = "--device") -> str:
    """A device that is there: auto is the GPU if torch sees one. UserError where there is none."""
    if device_map and not torch.cuda.is_available():
        raise UserError(f"--device-map {device_map}: this torch sees no GPU; leave it out")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"{flag} {device}: auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{flag} {device}: this torch sees no GPU; use {flag} cpu")
    return device


def fingerprint(model) -> str:
    """A hash of the weights' beginnings, shapes and dtypes: tells one base model from another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():  # of 4-bit layers the mask file knows values
        sample = weight.detach().view(-1)[:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
