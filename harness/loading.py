"""Tokenizer and model, Hugging Face's, from the hub or a local folder, onto one device.

A model is loaded straight to its device and dtype. For SensZOQ each matrix of the mask is split as
it is read: its k values go to the vector that moves, the rest into 4 bits. So one 16-bit matrix is
in memory at a time, and a 7B model loads in 4 GB.
"""

import contextlib
import ctypes
import os
import platform
import re
import resource
from pathlib import Path

import torch

from harness.config import locate

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def choose_device(device: str) -> str:
    """A device that is there: auto is the GPU if torch sees one. ValueError where there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch sees no GPU; use --device cpu")
    return device


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """(tokenizer, model configuration). ValueError where there is no such model."""
    from transformers import AutoConfig, AutoTokenizer  # seconds, so not before bad flags fail

    folder = Path(name := locate(name))
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {name} has no config.json; give a folder in Hugging Face format")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name} does not exist; give a folder or a hub name")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code), config
    except Exception as error:  # gated, misspelt, offline, custom code: each has a type of its own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load --model {name} ({why}); check the name, log in with `hf auth login` if "
            "it is gated, or give a local folder"
        ) from error


def skeleton(config, trust_remote_code: bool = False):
    """The model without its weights (on torch's meta device): names and shapes before loading."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_model(
    name: str, dtype="auto", device="auto", trust_remote_code=False, split=None, index=()
) -> torch.nn.Module:
    """A causal LM in eval mode. ValueError where there is none, or a weight is not finite.

    dtype auto: the checkpoint's own on a GPU, float32 on a CPU. `split(model, name, weight)` is
    called for each matrix of `index` as it is read, and takes its place.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = choose_device(device)
    if ":" in device:
        torch.cuda.set_device(device)  # nothing of ours on another worker's GPU
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    quantiser = None if split is None else _splitter(split, set(index))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            locate(name),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=None if device == "cpu" else {"": device},  # never twice
            quantization_config=quantiser,
            trust_remote_code=trust_remote_code,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # none, torn, no LM
        if quantiser is not None and quantiser.error is not None:
            raise quantiser.error from None
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"cannot load the weights of {name} as a causal LM: {why}") from error
    if quantiser is not None:
        model.hf_quantizer.remove_quantization_config(model)  # our layers are not transformers'
    for name, weight in model.named_parameters():
        if weight.dtype in DTYPES and weight.numel():
            if not torch.stack(weight.detach().aminmax()).isfinite().all():  # NaN shows in both
                raise ValueError(f"{name} holds NaN or infinity; get a sound copy of the model")
    if device == "cpu" and model.num_parameters() < 4e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # threads cost more than they save on matrices this small
    return model.eval()  # OPT has dropout 0.1, which would drown the probes


def _splitter(split, names: set):
    """For from_pretrained(quantization_config=…): `split` each matrix of `names` as it is read.

    This is transformers' own way in for quantisers: sharded files, renamed keys and ties stay its
    job. What `split` raises is kept in the answer's `error`; transformers would say it much later.
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if "dense+sparse" not in AUTO_QUANTIZATION_CONFIG_MAPPING:

        class Split(ConversionOps):
            def __init__(self, config):
                self.config = config

            def convert(self, input_dict, full_layer_name, model, missing_keys, **_):
                """One weight as it was read, {name: [tensor]}; nothing is left to be set."""
                (weight,) = input_dict.values()
                weight = weight[0] if isinstance(weight, list) else weight
                try:
                    self.config.split(model, full_layer_name, weight)
                except ValueError as error:
                    self.config.error = error
                    raise
                missing_keys.discard(full_layer_name)
                return {}

        @register_quantizer("dense+sparse")
        class Quantiser(HfQuantizer):
            is_trainable = False
            quantized_element_size = 0.52  # bytes per weight, by which transformers allocates ahead

            def is_serializable(self):
                return False

            def param_needs_quantization(self, model, param_name, **_):
                return param_name in self.quantization_config.names

            def get_quantize_ops(self):
                return Split(self.quantization_config)

        @register_quantization_config("dense+sparse")
        class SplitConfig(QuantizationConfigMixin):
            def __init__(self, split, names):
                self.quant_method, self.split, self.names = "dense+sparse", split, names
                self.error = None

            def __deepcopy__(self, memo):
                return self  # so that `error` reaches the caller

    return AUTO_QUANTIZATION_CONFIG_MAPPING["dense+sparse"](split, names)


def usable_length(max_length: int, model_config) -> int:
    """max_length, or the number of positions that the model has where that is less."""
    return min(max_length, getattr(model_config, "max_position_embeddings", None) or max_length)


def compiles(setting: str, weights: int, device: str) -> bool:
    """--compile: auto is on a GPU, and on a CPU for 10 million moving weights; it takes seconds.

    False, with a line, where this machine has no compiler.
    """
    import masks
    import zo

    if setting == "no" or setting == "auto" and device == "cpu" and weights < 10e6:
        return False
    theta, everything = torch.zeros(256, device=device), masks.Everything()
    shift = zo.Shift.of(0.0, 0, device)
    try:
        zo.apply(theta, shift, zo.word(0, device), everything.mask, theta[:0], fused=True)
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C++ compiler, no Triton: whatever the backend raises
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"  torch.compile fails, so noise is ten times slower: {why[:200]}")
        return False


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of less than 64 MB, where it would hand them back at once.

    A forward frees its activations layer by layer. Getting them anew costs a page fault per 4 kB,
    up to a tenth of a step on a CPU. Call it after loading: weight-sized temporaries, if kept, left
    10 GB of holes at 7B.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as in malloc.h
        libc.mallopt(mmap_threshold, 1 << 26)
        libc.mallopt(trim_threshold, 1 << 30)


def machine(device: torch.device) -> dict:
    """Versions and hardware: a figure without them is no result."""
    import transformers

    if device.type == "cuda":
        hardware, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated()
    else:
        hardware = f"{processor()}, {torch.get_num_threads()} threads"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "hardware": hardware,
        "peak_memory_bytes": peak,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The name of the CPU, and the widest vectors that torch uses on it."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
