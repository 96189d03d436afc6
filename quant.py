"""w = dense + sparse: what stands still in 4 bits, the few that move beside it in fp32.

    w = w_dense + w_sparse,   w_sparse = m ⊙ w        [Q] §3.5: fine-tune 0.1 %, quantise the rest

    code       paper
    index      where m = 1: per matrix, the flat positions of its moving weights
    values     w_sparse: one fp32 vector, (k,), of the moving weights of all matrices
    codes      w_dense ≈ (1 − m) ⊙ w in NF4: two codes per byte, and a scale per block of 64

How it works
    `DenseSparse` owns `values`, and a step of [Q] is Algorithm 1 on that vector: `values += a z`.
    Every matrix of the index gets a parametrization (torch.nn.utils.parametrize), `Parts`. When
    a layer asks for its weight, `Parts` makes the dense matrix, puts its slice of `read` into the
    moving places and answers with that. `read` is `values`, or `values ± ε z` while a probe is open
    (model_patch.py). With bits=4 the dense matrix is unpacked from its codes, with bits=16 it is a
    copy of the parameter. That is the only difference between the two.

    The k values leave first. Their places become 0, which NF4 represents exactly. So dense + sparse
    is w there bit for bit, and a large value no longer stretches its block's scale.

    NF4 (Dettmers et al., 2023) is a table of 16 levels, the quantiles of a normal distribution
    scaled to [−1, 1]. A block of 64 weights is divided by its largest magnitude, and each goes to
    the nearest level. `nf4_encode` and `nf4_decode` say it in torch; bitsandbytes does the work,
    and a test holds the two equal.

What differs from the paper
    [Q] quantises with SqueezeLLM, a 16-entry codebook per output row fitted by k-means weighted
    with squared gradients. NF4 needs no fitting and has kernels for CPU and CUDA.

What it costs
    0.5159 bytes per weight: 4-bit codes, an 8-bit scale per block, an fp32 number for every 256 of
    the scales. That is 3.34 GB for Llama-2-7B's 6.476e9 weights. Each place has 8 bytes of position
    and 4 of value: 0.08 GB at density 0.001. While a layer computes, its matrix in 16 bits.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import masks

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


class DenseSparse:
    """[Q]'s model: the matrices of an index read as dense + sparse, and only `values` moves.

    sparse = DenseSparse(index, bits=4)
    for name in index:
        sparse.split(model, name)       # its k values go into `values`, the rest into 4 bits
    patch = model_patch.Patch(model, sparse)

    `index`: {parameter name: flat positions, (k,) int, sorted}. `values` has the places of the
    matrices one after the other, in the order of their names.
    """

    def __init__(self, index: dict[str, Tensor], bits: int = 4, device="cpu"):
        if bits not in (4, 16):
            raise ValueError(f"bits {bits}: 4, or 16 for the dense part as it is")
        self.index, self.bits = dict(sorted(index.items())), bits
        ends = torch.tensor([len(places) for places in self.index.values()]).cumsum(0).tolist()
        starts = [0, *ends][:-1]
        self.slices = {
            name: slice(start, end)
            for name, start, end in zip(self.index, starts, ends, strict=True)
        }
        self.values = torch.zeros(ends[-1] if ends else 0, device=device)
        self.read = self.values  # what the layers see
        self.parts: dict[str, Parts] = {}

    def split(self, model: nn.Module, name: str, weight: Tensor | None = None) -> None:
        """Split one matrix. `weight` is given where the model's own has not been loaded.

        ValueError where the places cannot be such, or a weight is not finite.
        """
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, attribute)
        weight = parameter.detach() if weight is None else weight
        masks.check_places(self.index[name], weight.numel(), name)
        if not torch.stack(weight.aminmax()).isfinite().all():  # NaN shows in both
            raise ValueError(f"{name} holds NaN or infinity; get a sound copy of the model")
        places = self.index[name].to(weight.device, torch.int64)
        self.values[self.slices[name]] = weight.reshape(-1)[places].float()
        self.parts[name] = part = Parts(self, name, places, weight)
        owners = [(m, n) for m in model.modules() for n, p in m._parameters.items()
                  if p is parameter]  # fmt: skip
        if part.bits == 4:  # a tensor without elements holds the name
            parameter = nn.Parameter(weight.new_empty(0), requires_grad=False)
        elif parameter.is_meta:  # nor has it been loaded
            parameter = nn.Parameter(weight.clone(), requires_grad=False)
        for owner, n in owners:  # a tied matrix has several
            owner._parameters[n] = parameter
            parametrize.register_parametrization(owner, n, part, unsafe=True)
            owner.train(owner.training)  # its new children, too
            owner._is_hf_initialized = True

    def count_weights(self) -> int:
        """How many weights the matrices of the index have."""
        return sum(part.shape.numel() for part in self.parts.values())


class Parts(nn.Module):
    """The dense and the sparse part of one matrix: what torch asks when a layer wants a weight."""

    def __init__(self, sparse: DenseSparse, name: str, places: Tensor, weight: Tensor):
        super().__init__()
        self.sparse, self.part, self.places = sparse, sparse.slices[name], places
        self.shape, self.was_read = weight.shape, False
        self.bits = sparse.bits if weight.numel() % BLOCK == 0 else 16  # it fills no blocks
        if self.bits == 4:
            from bitsandbytes.functional import quantize_4bit  # two seconds, and only this needs it

            dense = weight.detach().reshape(-1).clone()
            dense[places] = 0
            # A row per block: bitsandbytes 0.50's CPU kernel errs where blocks straddle the rows.
            # Plain attributes: buffers would be empty ones when transformers is done loading.
            self.codes, self.state = quantize_4bit(
                dense.view(-1, BLOCK), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )

    def dense(self, parameter: Tensor) -> Tensor:
        """The matrix in 16 (or 32) bits, in fresh memory."""
        if self.bits == 16:
            return parameter.detach().clone(memory_format=torch.contiguous_format)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).view(self.shape)

    def forward(self, parameter: Tensor) -> Tensor:
        self.was_read = True
        weight = self.dense(parameter)
        weight.view(-1)[self.places] = self.sparse.read[self.part].to(weight.dtype)
        return weight


def join(model: nn.Module) -> None:
    """An ordinary model again: every split matrix a parameter with the weights it stood for.

    They are on the CPU, as a GPU that holds the model in 4 bits may not in 16.
    """
    whole: dict[Parts, nn.Parameter] = {}
    for module in list(model.modules()):
        lists = getattr(module, "parametrizations", {})
        parts = {name: part for name, (part, *_) in lists.items() if isinstance(part, Parts)}
        for name, part in parts.items():
            if part not in whole:
                whole[part] = nn.Parameter(getattr(module, name).cpu(), requires_grad=False)
        if parts:
            unparametrize(module, {name: whole[part] for name, part in parts.items()})


def unparametrize(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """A module without parametrizations, with these parameters in their places.

    torch's own way takes the property from the class, and so from deep copies of the module, too.
    """
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
