"""w = dense + sparse: the weights that stand still in 4 bits, the few that move beside them.

    code       paper                        [Q] §3.5: fine-tune 0.1 %, quantise the rest
    index      where m = 1, k places        positions in the flattened weight
    values     w_sparse = m ⊙ w             fp32 masters, the only thing that training changes
    dense      w_dense ≈ (1 − m) ⊙ w        NF4 codes, two per byte, and a scale per block of 64

The k sensitive values leave first: their places become 0, which NF4 represents exactly, so
dense + sparse is w there bit for bit, and a large value no longer stretches its block's scale.

NF4 (Dettmers et al., 2023) is a table of 16 levels, the quantiles of a normal distribution scaled
to [−1, 1]; a block of 64 weights is divided by its largest magnitude and each goes to the nearest
level. `nf4_encode` and `nf4_decode` say it in torch; bitsandbytes, which has kernels for CPU and
CUDA, does the work, and a test holds the two equal.

    bytes per weight                4-bit codes   scales   together   Llama-2-7B's 6.476e9 weights
    fp32 scales                     0.5           1/16     0.5625     3.64 GB
    double quantisation             0.5           1/64 ⁺   0.5159     3.34 GB
    sparse part, density 0.001      8 bytes of index, 4 of value, 2 of noise stream each: 0.09 GB

(⁺ 8-bit scales, and one fp32 number for every 256 of them.)

Deviation from [Q]: the paper quantises with SqueezeLLM, a 16-entry codebook per output row fitted
by k-means weighted with squared gradients. NF4 needs no fitting and has kernels everywhere.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masks
from errors import UserError

NF4 = (  # bitsandbytes' table; the middle of the two halves is an exact 0
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels it does not need


def nf4_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales): of each weight the nearest level, of each block of 64 the largest |w|."""
    blocks = weight.float().view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    unit = blocks * torch.where(scales > 0, 1 / scales, 0)
    levels = torch.tensor(NF4, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(unit, middles)
    return codes.to(torch.uint8).flatten(), scales.flatten()


def nf4_decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights that codes and scales stand for, fp32 and flat."""
    levels = torch.tensor(NF4, device=codes.device)
    return (levels[codes.long()].view(-1, BLOCK) * scales[:, None]).flatten()


class DenseSparseLinear(nn.Module):
    """y = (dense + sparse) x + b, dense in 4 bits: stands where an nn.Linear stood.

    `dense` unpacks the whole matrix, with zeros where the sparse values belong; `weight` puts them
    there. Both are made for one forward and dropped: in memory stay codes, scales, index, values.
    No `state_dict` has them, nor does `.to` move them: `Patch.tensors`, and `unpack` before saving.
    """

    def __init__(self, weight: Tensor, index: Tensor, bias=None, double_quant: bool = False):
        """`weight` (out, in) in the compute dtype is read, not kept; `index`: (k,) places, sorted.

        UserError where the places cannot be such, or a weight is not finite.
        """
        from bitsandbytes.functional import quantize_4bit  # two seconds, and only [Q] needs it

        super().__init__()
        self.out_features, self.in_features = weight.shape
        assert weight.numel() % BLOCK == 0, f"{tuple(weight.shape)} does not fill blocks of {BLOCK}"
        self.bias = bias
        if not torch.isfinite(torch.stack(weight.aminmax())).all():
            raise UserError("a weight to be quantised holds NaN or infinity")
        masks.check_places(index, weight.numel())
        index = index.to(weight.device, torch.int64)
        dense = weight.detach().reshape(-1).clone()
        # Plain attributes: buffers would be empty ones when transformers is done loading.
        self.index, self.values = index, dense[index].float()
        dense[index] = 0
        # A row per block: bitsandbytes 0.50's CPU kernel errs where blocks straddle the rows.
        self.codes, self.state = quantize_4bit(
            dense.view(-1, BLOCK),
            blocksize=BLOCK,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        self._is_hf_initialized = True  # transformers must not draw it anew after loading

    def dense(self) -> Tensor:
        """w_dense, (out, in) in the compute dtype; fresh memory, so the caller may write to it."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).view(self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """w = dense + sparse, (out, in); inside a probe what model_patch.py put in its place."""
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.dense()
            weight.view(-1)[self.index] = self.values.to(weight.dtype)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    @property
    def size(self) -> int:
        """How many weights it stands for."""
        return self.out_features * self.in_features

    def stored_bytes(self) -> int:
        """What stays in memory for this matrix, the bias aside."""
        state = self.state
        kept = [self.codes, self.index, self.values, state.absmax]
        kept += [state.state2.absmax] if state.nested else []
        return sum(t.numel() * t.element_size() for t in kept)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, NF4 + {self.index.numel()} values"


def check_linears(model: nn.Module, names) -> None:
    """UserError unless each weight of `names` belongs to an nn.Linear: only those go into 4 bits.

    On torch's meta device, too, so that it can be said before anything is loaded.
    """
    hint = "; --method sensitive keeps 16 bits"
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        if type(module) is not nn.Linear:
            kind = type(module).__name__
            raise UserError(f"{name} is of a {kind}; only nn.Linear goes into 4 bits{hint}")
        if module.weight.numel() % BLOCK:
            shape = tuple(module.weight.shape)
            raise UserError(f"{name} {shape} does not fill blocks of {BLOCK}{hint}")


def quantise(model: nn.Module, name: str, weight: Tensor, index: Tensor, double_quant: bool):
    """Put a DenseSparseLinear in the place of the nn.Linear whose weight is called `name`."""
    path = name.removesuffix(".weight")
    check_linears(model, [name])
    linear = model.get_submodule(path)
    layer = DenseSparseLinear(weight, index, linear.bias, double_quant)
    model.set_submodule(path, layer.train(linear.training))


def packed(model: nn.Module) -> dict[str, DenseSparseLinear]:
    """{path: layer} of the layers that are in 4 bits."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DenseSparseLinear)}


def count_weights(model: nn.Module) -> int:
    """How many weights a model has, those in 4 bits included."""
    layers = packed(model).values()
    return sum(p.numel() for p in model.parameters()) + sum(layer.size for layer in layers)


def unpack(model: nn.Module) -> None:
    """An ordinary model again: every 4-bit layer an nn.Linear with the weights it stood for.

    They are on the CPU, as a GPU that holds the model in 4 bits may not in 16.
    """
    for path, layer in packed(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.weight.cpu()), layer.bias
        model.set_submodule(path, linear.train(layer.training))


def loading_config(index: dict[str, Tensor], double_quant=False, check=lambda name, weight: None):
    """For from_pretrained(quantization_config=…): quantise each matrix of `index` as it is read.

    `check(name, weight)` may raise UserError; what was raised is kept in the answer's `error`.
    One 16-bit matrix is in memory at a time, so a 7B model loads in 4 GB. This is transformers' own
    way in for quantisers (`register_quantizer`): sharded files, renamed keys and ties stay its job.
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if "senszoq" not in AUTO_QUANTIZATION_CONFIG_MAPPING:

        class Quantise(ConversionOps):
            def __init__(self, config):
                self.config = config

            def convert(self, input_dict, full_layer_name, model, missing_keys, **_):
                """One weight as it was read, {name: [tensor]}; nothing is left to be set."""
                (weight,) = input_dict.values()
                weight = weight[0] if isinstance(weight, list) else weight
                config, name = self.config, full_layer_name
                try:
                    config.check(name, weight)
                    quantise(model, name, weight, config.index[name], config.double_quant)
                except ValueError as error:  # ours, or bitsandbytes'
                    config.error = error  # transformers would say it in many lines, much later
                    raise
                missing_keys.discard(name)
                return {}

        @register_quantizer("senszoq")
        class SensZOQQuantizer(HfQuantizer):
            is_trainable = False

            def is_serializable(self):
                return False

            @property
            def quantized_element_size(self):
                """Bytes per weight, by which transformers allocates ahead and spreads over GPUs."""
                return 0.52 if self.quantization_config.double_quant else 0.5625

            def param_needs_quantization(self, model, param_name, **_):
                return param_name in self.quantization_config.index

            def get_quantize_ops(self):
                return Quantise(self.quantization_config)

        @register_quantization_config("senszoq")
        class SensZOQConfig(QuantizationConfigMixin):
            def __init__(self, index, double_quant, check):
                self.quant_method, self.index, self.double_quant = "senszoq", index, double_quant
                self.check, self.error = check, None

            def __deepcopy__(self, memo):
                return self  # so that `error` reaches the caller, and the index is not copied

    return AUTO_QUANTIZATION_CONFIG_MAPPING["senszoq"](index, double_quant, check)
