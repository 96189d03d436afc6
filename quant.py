"""w = dense + sparse: what stands still in 4 bits, the few that move beside it in fp32.

    w = w_dense + w_sparse,   w_sparse = m ⊙ w        [Q] §3.5: fine-tune 0.1 %, quantise the rest

    code       paper
    index      where m = 1: per matrix, the flat positions of its moving weights
    values     w_sparse: one fp32 vector, (k,), of the moving weights of all matrices
    codes      w_dense ≈ w where m = 0: four bits per weight; where m = 1 `values` replace it
    NF4Blocks  what codes mean: 16 fixed levels, times a scale for every block of 64 weights
    Codebooks  what they mean in [Q]: 16 levels for every row, by k-means (SqueezeLLM's way)

How it works
    `DenseSparse` owns `values`, and a step of [Q] is Algorithm 1 on that vector: `values += a z`.
    Every matrix of the index gets its `Parts`. When a layer asks for its weight, `Parts` makes the
    dense matrix, puts its slice of `values` into the moving places and answers with that. While a
    probe is open, `values` reads as values ± ε z (model_patch.py). With bits=4 the dense matrix is
    decoded from its codes, with bits=16 it is a copy of the parameter as it was loaded. 4 and
    16 bits differ in nothing else. Embeddings, head, norms, biases, and matrices that the index
    lacks stay as they were loaded. With NF4, so do matrices whose size is no multiple of 64.

    The k values are taken out before quantisation. NF4 sees a 0 in their places, and k-means gives
    them weight 0. So a large value neither stretches its block's scale nor takes a level of its
    row. `Parts` writes the k values over the dense matrix, so there a layer reads w bit for bit.

    NF4 (Dettmers et al., 2023) is a table of 16 levels, the quantiles of a normal distribution
    scaled to [−1, 1]. A block of 64 weights is divided by its largest magnitude, and each goes to
    the nearest level. `nf4_encode` and `nf4_decode` say it in torch; bitsandbytes does the work,
    and a test holds the two equal.

    k-means chooses a row's 16 levels so that Σ F (w − level)² is small. F are the mask's squared
    gradients, and are not kept. So harness/mask.py fits levels and codes when it makes the mask,
    matrix by matrix, and keeps them in the mask's file. They take half a byte per weight.

What differs from the paper
    NF4 is the default: it needs no fitting and has kernels for CPU and CUDA. k-means has the lower
    Σ F (w − level)² where F differs much within a row, as in 206 of SmolLM2-135M's 210 matrices.
    If all F were equal and the weights normal, NF4's would be lower: 0.0085 of Σ w², against
    0.0095. RESULTS.md has both figures of a real model.

What it costs
    0.5159 bytes per weight: 4-bit codes, an 8-bit scale per block, an fp32 number for every 256 of
    the scales. That is 3.34 GB for Llama-2-7B's 6.476e9 weights; with k-means 3.28, as a row has 16
    levels. Each moving weight takes 8 bytes for its position and 4 for its value: 0.08 GB at
    density 0.001. While a layer computes, its matrix is there in 16 bits, too. While k-means
    unpacks the matrix, in plain torch, it takes 9 bytes per weight more.
"""

import logging
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class NF4Blocks:
    """A matrix in NF4, by bitsandbytes: 4-bit codes, and scales in 8 bits."""

    kind = "4-bit NF4"

    def __init__(self, weight: Tensor):
        from bitsandbytes.functional import quantize_4bit  # two seconds, and only this needs it

        # A row per block: bitsandbytes 0.50's CPU kernel errs where blocks straddle the rows.
        self.codes, self.scales = quantize_4bit(
            weight.view(-1, BLOCK), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )

    def decode(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.scales)


class DenseSparse(nn.Module):
    """[Q]'s model: the matrices of an index read as dense + sparse, and only `values` moves.

    sparse = DenseSparse(index, bits=4)
    for name in index:
        sparse.split(model, name)       # its k values go into `values`, the rest into 4 bits
    patch = model_patch.Patch(model, sparse)

    `index`: {parameter name: flat positions, (k,) int, sorted}. `values` has the places of the
    matrices one after the other, in the order of their names. bits: 4; or 16, which leaves the
    dense part in the dtype that it was loaded in. `codebooks`: {name: what `Codebooks.fit` gave},
    else NF4. Save the model after `join`: before, its parameters are not what its layers read.
    """

    def __init__(self, index: dict, bits: int = 4, device="cpu", codebooks: dict | None = None):
        super().__init__()
        if bits not in (4, 16):
            raise ValueError(f"bits {bits}: 4, or 16 for the dense part as it was loaded")
        self.index, self.bits = dict(sorted(index.items())), bits
        self.codebooks = codebooks
        self.slices, end = {}, 0
        for name, places in self.index.items():
            self.slices[name] = slice(end, end + len(places))
            end += len(places)
        self.values = nn.Parameter(torch.zeros(end, device=device), requires_grad=False)
        self.parts: dict[str, Parts] = {}

    def split(self, model: nn.Module, name: str, weight: Tensor | None = None) -> None:
        """Split one matrix. `weight`: its copy in another dtype or on another device.

        ValueError where the places cannot be such, or a weight is not finite.
        """
        path, _, attribute = name.rpartition(".")
        parameter = model.get_submodule(path)._parameters[attribute]
        users = owners(model)[parameter]
        check_owners(users, name, Parts)
        weight = parameter.detach() if weight is None else weight
        masks.check_places(self.index[name], weight.numel(), name)
        masks.check_finite(weight, name)
        places = self.index[name].to(weight.device, torch.int64)
        self.values[self.slices[name]] = weight.reshape(-1)[places].float()
        self.parts[name] = part = Parts(self, name, places, weight)
        if part.packed is not None:  # an empty parameter keeps the name in the model
            parameter = nn.Parameter(weight.new_empty(0), requires_grad=False)
        for module, attribute in users:
            module._parameters[attribute] = parameter
            read_as(module, attribute, part)

    def __str__(self):
        kinds = Counter(getattr(part.packed, "kind", part.dtype) for part in self.parts.values())
        return " and ".join(f"{kind} ({n})" for kind, n in kinds.items()).replace("torch.", "")


class Parts:
    """The dense and the sparse part of one matrix: what a layer asks for its weight."""

    def __init__(self, sparse: DenseSparse, name: str, places: Tensor, weight: Tensor):
        self.sparse, self.slice, self.places = sparse, sparse.slices[name], places
        self.shape, self.was_read = weight.shape, False
        self.packed, self.dtype = None, weight.dtype
        if sparse.bits == 4 and sparse.codebooks:
            self.packed = Codebooks(*sparse.codebooks[name], weight)
        elif sparse.bits == 4 and weight.numel() % BLOCK == 0:  # else it fills no blocks
            dense = weight.detach().clone(memory_format=torch.contiguous_format)
            dense.view(-1)[places] = 0
            self.packed = NF4Blocks(dense)

    def dense(self, parameter: Tensor) -> Tensor:
        """The matrix in 16 (or 32) bits, in fresh memory."""
        if self.packed is None:
            return parameter.detach().clone(memory_format=torch.contiguous_format)
        return self.packed.decode().view(self.shape)

    def __call__(self, parameter: Tensor) -> Tensor:
        self.was_read = True
        weight = self.dense(parameter)
        weight.view(-1)[self.places] = self.sparse.values[self.slice].to(weight.dtype)
        return weight


def join(model: nn.Module) -> None:
    """An ordinary model again: every split matrix a parameter with the weights it stood for.

    They are on the CPU, as a GPU with room for 4 bits may have none for 16. While a probe is open
    they would be perturbed for good: call it after the probe.
    """
    whole: dict[Parts, nn.Parameter] = {}
    for module in model.modules():
        parts = {name: part for name, part in answers(module).items() if isinstance(part, Parts)}
        for name, part in parts.items():
            if part not in whole:
                whole[part] = nn.Parameter(getattr(module, name).cpu(), requires_grad=False)
            module._parameters[name] = whole[part]
            part.sparse.parts.clear()  # a patch of it can probe nothing any more
        if parts:
            read_plainly(module)


# ------------------------------------------------------------------ how a weight reads


def owners(model: nn.Module) -> dict[Tensor, list]:
    """{parameter: [(module, its name there)]}; a tied parameter has several."""
    found = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            found.setdefault(parameter, []).append((module, name))
    return found


def check_owners(owners: list, name: str, kind: type) -> None:
    """ValueError where a module reads the weight, or another one in another way, already."""
    for module, attribute in owners:
        there = answers(module)
        if attribute in there or {type(answer) for answer in there.values()} - {kind}:
            raise ValueError(
                f"{name}: its module reads a weight as another already; undo that first"
            )


def read_as(module: nn.Module, name: str, answer) -> None:
    """From now on `module.name` is answer(parameter). The parameter stays in its place.

    The module keeps the answer in an attribute `_answers`, so a deep copy has its own.
    torch.nn.utils.parametrize does the same, but moves the parameter to another name and takes
    several times as long for each read. ValueError where other answers are there.
    """
    check_owners([(module, name)], name, type(answer))
    vars(module).setdefault("_answers", {})[name] = answer

    def read(module):
        try:
            return module._answers[name](module._parameters[name])
        except AttributeError as error:  # else nn.Module answers with the parameter
            raise RuntimeError(f"{name}: {error}") from error

    kind = type(module)
    inside = {name: property(read), "_reads": True, "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), inside)


def answers(module: nn.Module) -> dict:
    """{name: answer} of the module's parameters that do not read as they are."""
    return vars(module).get("_answers", {})


def read_plainly(module: nn.Module) -> None:
    """Undo `read_as`, for all names of the module."""
    while "_reads" in vars(type(module)):
        module.__class__ = type(module).__bases__[0]
    vars(module).pop("_answers", None)


# ------------------------------------------------------------------ k-means, [Q]'s quantiser

EVEN, WIDEST = 65, 31  # cuts that `kmeans` chooses from


def kmeans(weight: Tensor, importance: Tensor, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """(codes, levels), (rows, n) uint8 and (rows, 16) fp32, of (rows, n) weights, row by row.

    Levels are k-means centres in ascending order, and a code is the number of the nearest one.
    Σ importance · (w − level)² comes within two percent of the least there is, if the importances
    are within six decades, and is 0 where 16 levels suffice. No library fits many weighted rows at
    once; [Q]'s code asks scikit-learn for one after the other.
    """
    heaviest = weight.gather(1, importance.argmax(1, keepdim=True))
    w = weight.where(importance > 0, heaviest).double()  # importance 0 claims no level
    w, order = w.sort(dim=1)
    importance = importance.double().gather(1, order)
    # a cluster is a run of the sorted row; its sum is the difference of two of these
    sums = [F.pad(x.cumsum(1), (1, 0)) for x in (importance, importance * w)]

    # Where may a cut be? At the widest gaps, and where Σ ∛(importance · gap²) reaches equal shares:
    # the best spacing of many levels (Panter and Dite, 1951).
    gaps = w.diff(dim=1)
    widest = gaps.topk(min(WIDEST, gaps.shape[1])).indices
    wanted = ((importance[:, 1:] + importance[:, :-1]) * gaps**2) ** (1 / 3)
    wanted = wanted.scatter(1, widest, 0)  # these have a cut already
    wanted = F.pad(wanted.cumsum(1), (1, 0))
    steps = wanted[:, -1:] * torch.linspace(0, 1, EVEN, dtype=w.dtype, device=w.device)
    cuts = torch.cat([torch.searchsorted(wanted, steps), widest + 1], 1).sort(1).values
    cuts = F.pad(cuts, (0, 1), value=w.shape[1])  # the first is 0

    # The best 16 runs between these cuts, by dynamic programming. A run explains moment² / mass of
    # Σ importance · w². `explained` is the most that the runs up to each cut can explain.
    mass, moment = (x.gather(1, cuts) for x in sums)
    mass, moment = (x[:, None, :] - x[:, :, None] for x in (mass, moment))
    gain = (moment**2 / mass.clamp(min=1e-30)).masked_fill(mass < 0, -math.inf)
    explained, origins = gain[:, 0], []
    for _ in range(15):
        explained, origin = (explained[:, :, None] + gain).max(1)
        origins.append(origin)
    ends = [torch.full_like(cuts[:, :1], cuts.shape[1] - 1)]
    for origin in reversed(origins):
        ends.insert(0, origin.gather(1, ends[0]))
    cuts = cuts.gather(1, torch.cat([torch.zeros_like(ends[0]), *ends], 1))

    for _ in range(rounds):  # Lloyd: a level is the mean of its run, a cut is amid two levels
        start, end = cuts[:, :-1], cuts[:, 1:]
        mass, moment = (x.gather(1, end) - x.gather(1, start) for x in sums)
        first, last = start.clamp(max=w.shape[1] - 1), (end - 1).clamp(min=0)
        levels = (moment / mass.clamp(min=1e-30)).clamp(w.gather(1, first), w.gather(1, last))
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        cuts = torch.cat([cuts[:, :1], torch.searchsorted(w, middles), cuts[:, -1:]], 1)
    return torch.searchsorted(middles, weight.double()).to(torch.uint8), levels.float()


class Codebooks:
    """A matrix as [Q] has it: 4-bit codes, and 16 levels per row.

    GPT-2 stores its matrices transposed, so there a row is an input.

    `codes`, `levels`: what `fit` gave. `like`: a tensor of the matrix's shape, dtype and device.
    """

    kind = "4-bit k-means"

    def __init__(self, codes: Tensor, levels: Tensor, like: Tensor):
        self.codes, self.shape = codes.to(like.device), like.shape
        self.levels = levels.to(like.device, like.dtype)

    @staticmethod
    def fit(weight: Tensor, scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, two to a byte; levels, (rows, 16) fp32), on the CPU.

        `scores`: squared gradients, the importance of a weight. At `places` it is 0.
        """
        importance = scores / scores.mean(1, keepdim=True).clamp(min=1e-30)
        importance += 1e-6  # so all weights of a row that no gradient reaches count alike
        importance.view(-1)[places.to(scores.device, torch.int64)] = 0
        numbers = max(weight.shape[1], (EVEN + WIDEST) ** 2)  # of a temporary, per row
        rows = max(1, (1 << 20) // numbers)  # at a time
        parts = map(kmeans, weight.split(rows), importance.split(rows))
        codes, levels = map(torch.cat, zip(*parts, strict=True))
        codes = F.pad(codes.flatten(), (0, codes.numel() % 2))
        return (codes[0::2] << 4 | codes[1::2]).cpu(), levels.cpu()

    def decode(self) -> Tensor:
        codes = torch.stack([self.codes >> 4, self.codes & 15], 1).flatten()[: self.shape.numel()]
        return self.levels.gather(1, codes.view(self.shape).long())
