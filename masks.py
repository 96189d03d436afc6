"""Which weights move: Algorithm 3, the thresholds, and the rules made of them.

    code        paper
    density     share of the weights that move: 1 − [S]'s "sparsity"; [Q]'s 0.1 % is 0.001
    threshold   h_i, one per tensor, from a percentile of |θ_i|, once before training
    get_mask    m = GetMask(θ, h), Algorithm 3
    rule        one answer to "which weights move", the only thing that tells the methods apart

[S]'s appendix reads the other way round in one sentence ("with 80 % sparsity … the 80th
percentile"); its ablation (smallest quarter 82.7 on RTE, everything 71.7) and the authors' replies
settle it: **sparsity 0.75 means that the smallest 25 % move.**

A rule has two methods. `prepare` looks at a weight once, before training, and returns what must be
kept for it (a threshold, a bit per weight, nothing); `mask` answers for any of its elements, from
the unperturbed θ and what was kept. It is traced into the fused kernel, so a rule costs what its
lines cost. A rule of your own is these few lines:

    class LargeWeights(Rule):
        def prepare(self, weight, stream):
            return threshold(weight, 1 - self.density)
        @staticmethod
        def mask(theta, index, state):
            return theta.abs() > state

    rule               the mask is                                   kept
    Everything         all ones: MeZO                                nothing
    SmallWeights       re-taken every step: S-MeZO, "dynamic mask"   h, one number per tensor
      refresh_every=k  the same, and h re-taken every k steps        h
    ConstantMask       taken once, before training: [S] §3.2         one byte per weight
    PackedMask         the same, packed: [S] §3.3                    one bit per weight
    RandomMask         regenerated from a seed: R-MeZO               nothing

Deviations from [S]. Algorithm 3 prints θ ≤ h; without the absolute value it would select 62.5 % of
the weights where 25 % are meant, so `get_mask` compares |θ|. "Layer" is read as one parameter
tensor.
"""

import torch
from torch import Tensor

import zo


def threshold(weight: Tensor, density: float) -> Tensor:
    """h: the k-th smallest |w|, k = round(density · numel), at least 1; 0-dim, the weight's dtype.

    [S] §3.2 and appendix C.2. |w| ≤ h holds for exactly k elements, more only where values tie with
    h. `torch.quantile` refuses more than 2²⁴ elements; on the CPU numpy's partition needs one copy
    of the weight and a sixth of `kthvalue`'s time. Raises ValueError where the weight is not
    finite.
    """
    magnitude = weight.detach().abs().flatten()
    k = max(1, round(density * magnitude.numel()))
    if not torch.isfinite(magnitude.max()):
        raise ValueError("the weight holds NaN or infinity, so it has no threshold")
    if magnitude.is_cuda:
        return magnitude.kthvalue(k).values
    values = magnitude.float().numpy() if magnitude.element_size() < 4 else magnitude.numpy()
    values.partition(k - 1)  # in place, on our copy
    return torch.tensor(values[k - 1]).to(weight.dtype)


def get_mask(theta: Tensor, h: Tensor) -> Tensor:
    """[S] Algorithm 3, GetMask: m_ij = 1 where |θ_ij| ≤ h_i. The printed version forgets |·|."""
    return theta.abs() <= h


class Rule:
    """Which elements of a weight move. `density` is the share wanted, in (0, 1]."""

    refresh_every = 0  # steps after which `prepare` is called again; 0: never
    static = True  # does the mask stay the same while θ moves?

    def __init__(self, density: float = 1.0):
        if not 0 < density <= 1:
            raise ValueError(f"density {density} is outside (0, 1]: the share of weights that move")
        self.density = density

    def prepare(self, weight: Tensor, stream: int) -> Tensor:
        """What must be kept for `weight`, on its device; called before training."""
        return torch.empty(0, device=weight.device)

    @staticmethod
    def mask(theta: Tensor, index: Tensor, state: Tensor) -> Tensor:
        """m for the elements `index` of the flattened weight, whose values are `theta`; boolean.

        Static: all it knows of its weight is what `prepare` returned, so one compiled kernel serves
        every tensor and every run.
        """
        raise NotImplementedError


class Everything(Rule):
    """MeZO: every weight moves."""

    @staticmethod
    def mask(theta, index, state):
        return torch.ones_like(theta, dtype=torch.bool)


class SmallWeights(Rule):
    """S-MeZO, [S] §3.2 "dynamic mask": |θ_t| ≤ h, re-taken every step, h fixed before training.

    `refresh_every=k` re-takes h every k steps as well: the authors' ablation (RTE 83.0 with h
    fixed, 82.0 with k = 100). With h fixed, a weight that walks out of [−h, h] freezes there: watch
    the active density in the metrics.
    """

    static = False

    def __init__(self, density: float, refresh_every: int = 0):
        super().__init__(density)
        self.refresh_every = refresh_every

    def prepare(self, weight, stream):
        return threshold(weight, self.density)

    @staticmethod
    def mask(theta, index, state):
        return get_mask(theta, state)


class ConstantMask(Rule):
    """[S] §3.2 "constant mask": the small weights of before training, stored as booleans."""

    def prepare(self, weight, stream):
        return get_mask(weight.detach().flatten(), threshold(weight, self.density))

    @staticmethod
    def mask(theta, index, state):
        return state[index]


class PackedMask(ConstantMask):
    """[S] §3.3 "1-bit quantization" of the same mask: weight j is bit j mod 8 of byte j div 8."""

    def prepare(self, weight, stream):
        mask = super().prepare(weight, stream)
        packed = torch.zeros((mask.numel() + 7) // 8, dtype=torch.uint8, device=mask.device)
        for bit in range(8):
            column = mask[bit::8].to(torch.uint8)
            packed[: column.numel()] |= column << bit
        return packed

    @staticmethod
    def mask(theta, index, state):
        return (state[index >> 3] >> (index & 7) & 1).bool()


class RandomMask(Rule):
    """R-MeZO ([S] Table 1): a random mask, constant over the run, regenerated and never stored.

    Weight j moves when a uniform 32-bit word of its own is below density · 2³². (Comparing a
    *normal* draw with the density, as one code base does, turns 0.5 into 0.69.)
    """

    def __init__(self, density: float, seed: int = 0):
        super().__init__(density)
        self.seed = seed

    def prepare(self, weight, stream):
        bound = int(self.density * 2**32)
        return torch.tensor([self.seed, zo.MAX_STREAMS + stream, bound], device=weight.device)

    @staticmethod
    def mask(theta, index, state):
        seed, stream, bound = state[0], state[1], state[2]
        return zo.random_words(seed, stream, index)[0] < bound


@torch.no_grad()
def active_count(rule: Rule, flat: Tensor, state: Tensor) -> int:
    """How many elements of a flattened weight are inside the mask now."""
    chunk = 1 << 22  # bounds the temporaries: 32 MB of indices
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), chunk):
        theta = flat[start : start + chunk]
        index = torch.arange(start, start + theta.numel(), device=flat.device)
        total += torch.count_nonzero(rule.mask(theta, index, state))
    return int(total)


METHODS = ("s-mezo", "mezo", "r-mezo")
KEPT = ("dynamic", "constant", "packed")


def make_rule(method: str, density: float, *, kept="dynamic", refresh_every=0, seed=0) -> Rule:
    """The rule of a method; for s-mezo `kept` says how its mask is kept ([S] §3.2, §3.3)."""
    if method == "mezo":
        return Everything()
    if method == "r-mezo":
        return RandomMask(density, seed)
    if kept == "dynamic":
        return SmallWeights(density, refresh_every)
    return {"constant": ConstantMask, "packed": PackedMask}[kept](density)
