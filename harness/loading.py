"""Tokenizer and model, Hugging Face's, from the hub or a local folder, onto one device.

What would train to meaningless numbers is refused here: a format that cannot be unpacked, weights
that the checkpoint lacks, a model that is not causal or that minds padding (`check_model`).

A model is loaded straight to its device and dtype. For SensZOQ it stays on disk at first, as parts
of the mapped file. Then one matrix of the mask after the other is read and split: its k values go
to the vector that moves, the rest into 4 bits. So one such matrix is in memory at a time in 16
bits. A 7B model loads in 6 GB, beside pages of the file that the system can take back.
"""

import contextlib
import ctypes
import gc
import os
import platform
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import masks
import tasks
import zo
from harness.config import first_line, locate, reworded

# how far rounding may move a position's logits, relative to their spread; at 135 M it is a fifth
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
UNPACKED = ("fp8", "mxfp4")  # quantised formats that transformers makes plain as it reads them
# names that older libraries left in checkpoints: buffers, a reward model's head, draft heads
HARMLESS = re.compile(r"rotary_emb|(attn|attention)\.(masked_)?bias|position_ids|^v_head|\bmtp\b")


def take_device(device: str) -> str:
    """A device that is there, and torch is set to it. ValueError where there is none.

    auto is the GPU if torch sees one. Of several workers on a machine, each takes the next GPU, and
    nothing of ours is on another's.

    Attention does without cuDNN. On an H100, torch 2.13 takes cuDNN's kernels first. Their backward
    pass gives NaN under a mask at some lengths (pytorch#196678), and each new shape costs a plan.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or device == "auto" and not found:
        return "cpu"
    if not found:
        raise ValueError(f"--device {device}: this torch sees no GPU; use --device cpu")
    if ":" not in device:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % found}"  # torchrun's
    elif int(device[5:]) >= found:
        raise ValueError(f"--device {device}: this torch sees {found} GPUs, from cuda:0 on")
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """(tokenizer, model configuration). ValueError where there is no such model, or none to use."""
    from transformers import AutoConfig, AutoTokenizer  # seconds, so not before bad flags fail

    folder = Path(name := locate(name))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--model {name} has a PEFT adapter; merge it first: merge_and_unload")
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {name} has no config.json; give a folder in Hugging Face format")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name} does not exist; give a folder or a hub name")
    for file in folder.iterdir() if folder.exists() else ():
        if file.is_file() and file.open("rb").read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file; `git lfs pull` gets it")
    way_out = "; check the name, log in with `hf auth login` if it is gated, or give a local folder"
    with reworded(f"cannot load --model {name}", way_out):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if (kind := quantised(config)) not in (None, *UNPACKED):
        raise ValueError(
            f"--model {name} is quantised ({kind}), and a probe cannot move its codes; give the "
            "16-bit checkpoint that it was made from"
        )
    return tokenizer, config


def quantised(config) -> str | None:
    """The format in which a checkpoint's weights are quantised; None: they are plain."""
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            return found.get("quant_method", "in a format without a name")
    return None


def skeleton(config, trust_remote_code: bool = False):
    """The model without its weights (on torch's meta device): names and shapes before loading."""
    from transformers import AutoModelForCausalLM

    with reworded(f"cannot make the model of {config.name_or_path}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_model(
    name: str, dtype="auto", device="auto", trust_remote_code=False, split=None, index=(), nf4=False
) -> torch.nn.Module:
    """A causal LM in eval mode. ValueError where there is none, or it would compute nonsense.

    dtype auto: the checkpoint's own on a GPU, float32 on a CPU. `split(model, name, weight)` is
    called for each matrix of `index`, before the next is read.
    `nf4`: bitsandbytes' 4-bit linear layers, which stand still under an adapter.
    FP8 and MXFP4 checkpoints become plain weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = take_device(device)
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    with reworded(f"cannot load the weights of {name} as a causal LM"):
        config = AutoConfig.from_pretrained(locate(name), trust_remote_code=trust_remote_code)
        if packed := quantised(config):
            for part in (config, config.get_text_config()):
                if getattr(part, "quantization_config", None):
                    part.quantization_config["dequantize"] = True
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        method = None
        if nf4:
            method = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )  # fmt: skip
        straight = split is None and (nf4 or device != "cpu")
        model, read = AutoModelForCausalLM.from_pretrained(
            locate(name),
            config=config,
            dtype="auto" if split else kind,  # another than the file's would be a copy
            device_map={"": device} if straight else None,  # never twice in memory
            quantization_config=method,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if split is not None:
        there = partial(Tensor.to, device=device, dtype=None if kind == "auto" else kind)
        for key in tqdm(index, "splitting", leave=False, delay=5):
            split(model, key, there(model.get_parameter(key).detach()))
        for parameter in model.parameters():  # a copy, as one view would keep its file mapped
            parameter.data = there(parameter.data, copy=True)
        model.to(device)  # its buffers, which keep their dtypes
    if packed:
        model._weight_conversions = None  # or it would be saved in codes and scales again
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"--model {name} has a PEFT adapter; merge it first: merge_and_unload")
    model.eval()  # OPT has dropout 0.1, which would drown the probes
    for module in model.modules() if nf4 else ():
        module.compute_dtype = model.dtype  # by default bitsandbytes computes in fp32,
        module.support_avx512bf16_for_cpu = False  # and on some CPUs in bf16, come what may
    if not packed:
        check_stored(name)
    check_names(name, read)
    check_model(model, name)
    model.pack = shared_row(model)
    if device == "cpu" and model.num_parameters() < 4e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # threads cost more than they save on matrices this small
    return model


def check_stored(name: str) -> None:
    """ValueError where weights are stored as codes, and nothing says what they stand for."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    for file in sorted(Path(cached_file(locate(name), "config.json")).parent.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                kind = tensors.get_slice(key).get_dtype()
                if key.endswith("weight") and kind not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"{file} holds {key} as {kind}, and config.json does not say how to read "
                        "it; give a 16-bit checkpoint"
                    )


def check_names(name: str, read: dict) -> None:
    """ValueError where a checkpoint, as transformers `read` it, has not its model's weights."""
    left = [key for key in read["unexpected_keys"] if not HARMLESS.search(key)]
    for keys, what in (
        (read["missing_keys"], "lacks these weights, which would be drawn at random"),
        (left, "has weights that this model has no place for"),
    ):
        if keys := sorted(keys):
            raise ValueError(
                f"the checkpoint {name} {what}: {', '.join(keys[:3])} ({len(keys)} in all); get a "
                "complete one, whose config.json is its own"
            )


@torch.no_grad()
def check_model(model, name: str) -> None:
    """ValueError where a model would train, and be scored, to numbers that mean nothing.

    It is asked itself, with twelve tokens: do logits depend on a later token, or on padding to the
    left?
    """
    for key, weight in model.named_parameters():
        if weight.dtype in ROUNDING and weight.numel():
            masks.check_finite(weight, key)
    kind, padding, rounding = f"{name} ({model.config.model_type})", 5, ROUNDING.get(model.dtype, 0)
    ids = _twelve_tokens(model)
    other, padded = ids.clone(), torch.cat([ids[:, :1].expand(2, padding), ids], dim=1)
    other[:, -1] = ids[0, 0]
    mask = torch.ones_like(padded)
    with reworded(f"{kind} cannot read twelve tokens alone"):
        plain = _logits(model, input_ids=ids, attention_mask=mask[:, padding:])
        ahead = _logits(model, input_ids=other, attention_mask=mask[:, padding:])
        mask[0, :padding] = 0  # row 0 is padded on the left, row 1 is as long without
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        behind = _logits(model, **tasks.model_inputs(model, padded, mask, positions))[0, padding:]
    if not plain.isfinite().all():
        return  # such as overflow in float16; train.score says it, if it holds for the examples
    if not (moved := float(_change(plain, ahead)[:, :-1].max())) <= rounding:  # NaN is refused
        raise ValueError(
            f"{kind} is no causal language model: its logits depend on later tokens ({moved:.1%})"
        )
    if not (moved := float(_change(plain[0], behind).median())) <= rounding:
        raise ValueError(
            f"{kind} minds padding: its logits change by {moved:.1%} with {padding} masked tokens "
            "on the left, so losses of batches would be wrong"
        )


@torch.no_grad()
def shared_row(model) -> int:
    """How many tokens long a row may be that several texts share; 0 where they would mix."""
    ids, rounding = _twelve_tokens(model), ROUNDING.get(model.dtype, 0)
    # two rows of two texts: the second texts are equal, the first are not
    first, n = torch.stack([ids[0].flip(0), ids[0].roll(1)]), ids.shape[1]
    row, positions = torch.cat([first, ids], dim=1), torch.arange(2 * n, device=ids.device) % n
    positions = positions.expand_as(row)
    mask, keep = tasks.packed_mask(positions), torch.arange(n, 2 * n, device=ids.device)
    plain = _logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    try:
        inputs = tasks.model_inputs(model, row, mask, positions, keep.expand(2, n))
        found = _logits(model, **inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it knows no mask of a row of its own, or no places
        return 0
    if found.dim() != 3:  # places of each row mean another thing to it
        return 0
    one, two = found[:, -n:]
    leak, shift = _change(one, two).max(), _change(plain[0], one).max()
    if not (leak <= rounding / 1000 and shift <= rounding):
        return 0
    config = model.config.get_text_config()
    windows = "sliding_window", "attention_chunk_size"  # the mask knows nothing of them
    return min(filter(None, (getattr(config, name, None) for name in windows)), default=1 << 30)


def _twelve_tokens(model) -> Tensor:
    """[2, 12], two equal rows."""
    ids = (1234 + 7919 * torch.arange(12)) % model.get_input_embeddings().num_embeddings
    return ids.expand(2, 12).to(model.device)


def _logits(model, **inputs) -> Tensor:
    return model(**inputs, use_cache=False).logits.float()


def _change(a: Tensor, b: Tensor) -> Tensor:
    """Of each position's logits, relative to their spread."""
    return (a - b).square().mean(-1).sqrt() / a.std().clamp(min=1e-30)


def usable_length(max_length: int, model_config, taken: int = 0) -> int:
    """max_length, or the number of the model's positions that are not taken, where that is less."""
    positions = getattr(model_config, "max_position_embeddings", None)
    return min(max_length, positions - taken) if positions else max_length


def compiles(setting: str, patch) -> bool:
    """--compile: auto is on a GPU, and on a CPU for 10 million moving weights.

    The loop of a probe is made here, which takes seconds. False, with a line, where this machine
    has no compiler.
    """
    sizes = [theta.numel() for theta in patch.moving()]
    if setting == "no" or setting == "auto" and patch.device.type == "cpu" and sum(sizes) < 10e6:
        return False
    weight, nowhere = patch.weights[sizes.index(max(sizes))], zo.Shift.of(0.0, 0)
    where = weight.halves, nowhere, weight.word, patch.rule.mask, weight.state
    try:
        zo.apply(*where, out=patch.scratch(weight.theta), fused=True)
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C++ compiler, no Triton: whatever the backend raises
        print(f"  no compiled loop, so noise is ten times slower: {first_line(error)[:200]}")
        return False


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of less than 32 MB, where it would hand them back at once.

    A forward frees its activations layer by layer. Getting them anew costs a page fault per 4 kB,
    up to a tenth of a step on a CPU. Call it after loading: weight-sized temporaries, if kept, left
    10 GB of holes at 7B.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as in malloc.h
        libc.mallopt(mmap_threshold, 1 << 25)  # before 2.35 the most it takes
        libc.mallopt(trim_threshold, 1 << 30)


def restart_peak() -> None:
    """Give free memory back, then count its peak anew: a GPU's, and on Linux the process's."""
    gc.collect()  # such as a model that nobody uses
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS


def peak_memory(device: torch.device) -> int | None:
    """Bytes, since `restart_peak`: of the GPU's allocator, on Linux of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, IndexError):  # getrusage would count who started the process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return None


def machine(device: torch.device) -> dict:
    """Versions, hardware and peak memory: a figure without them is no result."""
    import transformers

    hardware = f"{processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "hardware": hardware,
        "peak_memory_bytes": peak_memory(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The name of the CPU, and the widest vectors that torch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):  # no Linux, or one that does not say
        name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
