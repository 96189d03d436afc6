"""Which weights move: Algorithm 3, thresholds, and the rules made of them.

    code        paper
    density     share of the weights that move: 1 − [S]'s "sparsity"; [Q]'s 0.1 % is 0.001
    threshold   h_i, one per tensor, from a percentile of |θ_i|, once before training
    get_mask    m = GetMask(θ, h), Algorithm 3
    rule        one answer to "which weights move", the only thing that tells the methods apart
    index       [Q]'s m: per matrix, the places of the weights that move

[S]'s appendix C.2 puts "sparsity 80 %" at the 80th percentile "of the weight values", one of the
authors' replies 0.75 at the 75th, of |θ|: the smallest 75 % would move. Their RTE scores say
otherwise: sparsity 0.75 has 80.7 ± 1.6 (three seeds, in a reply), the smallest quarter alone 82.7,
the smallest three quarters 72.3, all weights 71.7. So **sparsity 0.75 means that the smallest 25 %
move.**

A rule has two methods. `prepare` looks at a weight once, before training, and returns what must be
kept for it (a threshold, a bit per weight, nothing); `mask` answers for any of its elements, from
the unperturbed θ and what was kept. It is traced into the fused kernel, so a rule costs what its
lines cost; README.md has one of five lines.

    rule               the mask is                                   kept
    Everything         all ones: MeZO                                nothing
    SmallWeights       re-taken every step: S-MeZO, "dynamic mask"   h, one number per tensor
      refresh_every=k  the same, and h re-taken every k steps        h
    ConstantMask       taken once, before training: [S] §3.2         one byte per weight
    PackedMask         the same, packed ([S] §3.3 packs m_t)         one bit per weight
    RandomMask         regenerated from a seed: R-MeZO               nothing

[Q]'s mask is not a rule but an index, found once by sensitivity.py and kept as a file; `python
masks.py` is the command for it (make_mask.py).

Deviations from [S]. Algorithm 3 is printed with two slips, see `get_mask`. "Layer" is read as one
parameter tensor.
"""

import torch
from torch import Tensor

import zo
from errors import UserError


def threshold(weight: Tensor, density: float) -> Tensor:
    """h: the k-th smallest |w|, k = round(density · numel), at least 1; 0-dim, the weight's dtype.

    [S] §3.2 and appendix C.2, at percentile 1 − sparsity (see above). |w| ≤ h holds for exactly k
    elements, more only where values tie with h: for all of a norm's untrained ones. Needs one copy.
    """
    assert 0 < density <= 1, f"density {density} is outside (0, 1]"
    magnitude = weight.detach().abs().flatten()
    return kth_smallest(magnitude, max(1, round(density * magnitude.numel())))


def get_mask(theta: Tensor, h: Tensor) -> Tensor:
    """[S] Algorithm 3, GetMask, of one tensor θ_i and its threshold h_i.

        printed:  if θ_ij ≤ h_i then θ_ij = 1, else 0          meant:  m_ij = 1 where |θ_ij| ≤ h_i

    Two misprints: the result is m; and without |·| all negative weights would move (50 %) and half
    of the smallest quarter (12.5 %), 62.5 % where 25 % are meant.
    """
    return theta.abs() <= h


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of a flat tensor, 0-dim, counted from 1; `values` may be reordered.

    `torch.quantile` refuses more than 2²⁴ elements. There are only 2¹⁵ magnitudes of 16 bits, in
    the order of their bits, so they are counted: an eighth of the time of numpy's partition, which
    on the CPU takes a sixth of `kthvalue`'s. UserError where a value is not finite.
    """
    low, high = values.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise UserError("the weight holds NaN or infinity, so it has no threshold")
    if values.element_size() == 2 and low >= 0:
        bits = values.view(torch.int16).bitwise_and_(0x7FFF)  # −0 is 0
        counts = torch.bincount(bits, minlength=1 << 15)
        return torch.searchsorted(counts.cumsum(0), k).to(torch.int16).view(values.dtype)
    if values.is_cuda:
        return values.kthvalue(k).values
    array = values.float().numpy() if values.element_size() < 4 else values.numpy()
    array.partition(k - 1)
    return torch.tensor(array[k - 1]).to(values.dtype)


class Rule:
    """Which elements of a weight move. `density` is the share wanted, in (0, 1]."""

    refresh_every = 0  # steps after which `prepare` is called again; 0: never
    static = False  # True: the mask never changes, so that its elements are counted once

    def __init__(self, density: float = 1.0):
        if not 0 < density <= 1:
            raise UserError(f"density {density} is outside (0, 1]: the share of weights that move")
        self.density = density

    def prepare(self, weight: Tensor, stream: int) -> Tensor:
        """What must be kept for `weight`, on its device; called before training."""
        return torch.empty(0, device=weight.device)

    @staticmethod
    def mask(theta: Tensor, index: Tensor, state: Tensor) -> Tensor:
        """m for the elements `index` of the flattened weight, whose values are `theta`; boolean.

        Called with parts of the weight, of any shape, so each element must be answered by itself.
        Static: all it knows of its weight is what `prepare` returned (its flattened mask, its
        number of columns, …), so one compiled kernel serves every tensor and every run.
        """
        raise NotImplementedError


class Everything(Rule):
    """MeZO: every weight moves."""

    static = True

    @staticmethod
    def mask(theta, index, state):
        return torch.ones_like(theta, dtype=torch.bool)


class SmallWeights(Rule):
    """S-MeZO, [S] §3.2 "dynamic mask": |θ_t| ≤ h, re-taken every step, h fixed before training.

    `refresh_every=k` re-takes h every k steps as well: the authors' ablation (one seed of RTE: 83.0
    with h fixed, 82.0 with k = 100, 80.2 with k = 5); in a loop of your own call `Patch.refresh(t)`
    before step t. With h fixed, a weight that walks out of [−h, h] freezes there: watch the active
    density in the metrics.
    """

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

    static = True

    def prepare(self, weight, stream):
        return get_mask(weight.detach().flatten(), threshold(weight, self.density))

    @staticmethod
    def mask(theta, index, state):
        return state[index]


class PackedMask(ConstantMask):
    """The constant mask at one bit per weight: weight j is bit j mod 8 of byte j div 8.

    [S] §3.3's "1-bit quantization" packs each step's own m; with its forward nothing needs storing.
    """

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

    static = True

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


METHODS = ("s-mezo", "mezo", "r-mezo", "sensitive", "senszoq")
FEW = ("sensitive", "senszoq")  # [Q]: an index says which weights move, dense in 16 or 4 bits
S_KINDS = ("dynamic", "constant", "packed")  # of s-mezo's mask, [S] §3.2; packed: at one bit


def make_rule(method: str, density: float, *, kind="dynamic", refresh_every=0, seed=0) -> Rule:
    """The rule of a method of [S]; `kind` is s-mezo's, one of S_KINDS."""
    if method == "mezo":
        return Everything()
    if method == "r-mezo":
        return RandomMask(density, seed)
    if kind == "dynamic":
        return SmallWeights(density, refresh_every)
    return {"constant": ConstantMask, "packed": PackedMask}[kind](density)


# ------------------------------------------------------------------ [Q]'s mask: an index


def check_places(places: Tensor, numel: int, name: str = "") -> None:
    """UserError unless `places` can be [Q]'s m of the matrix `name`: of its `numel` weights those
    that move, as flat positions, (k,) int, ascending."""
    of = f"{name}: " * bool(name)
    if places.dtype.is_floating_point or places.dtype == torch.bool or places.dim() != 1:
        kind = f"{places.dtype} {tuple(places.shape)}"
        hint = "of a boolean mask they are mask.flatten().nonzero()[:, 0]"
        raise UserError(f"{of}an index is flat positions, (k,) of int, not {kind}; {hint}")
    places = places.long()  # differences of unsigned numbers are never below 0
    if not len(places) or places[0] < 0 or int(places[-1]) >= numel or (places.diff() <= 0).any():
        raise UserError(f"{of}an index is k > 0 places in ascending order, from 0 to {numel - 1}")


if __name__ == "__main__":  # python masks.py …
    import make_mask

    make_mask.main()
