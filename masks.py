"""Which weights move? The small ones (Algorithm 3 of [S]), or the most sensitive ones ([Q] §3.1).

    m_ij = 1 where |θ_ij| ≤ h_i                       [S] Algorithm 3, m = GetMask(θ, h)
    m_ij = 1 where E (∂ℓ/∂w_ij)² is among the top k   [Q] §3.1, per weight matrix i

    code          paper
    density       share of the weights that move: 1 − [S]'s "sparsity"; [Q]'s 0.1 % is 0.001
    threshold     h_i, one per tensor, from a percentile of |θ_i|, once before training
    get_mask      m = GetMask(θ, h), Algorithm 3
    Rule          says which weights move: MeZO, S-MeZO and R-MeZO differ in their rule alone
    fisher        diagonal of [Q]'s empirical Fisher matrix, the mean over samples of (∂ℓ/∂w_j)²
    sensitive     [Q]'s m: per matrix the k = density · numel weights with the highest score
    index         [Q]'s m as data: {name of a matrix: flat positions of its moving weights}

How it works
    A rule has two methods. `prepare` looks at a weight before training, and returns its state.
    `mask` says which elements of the weight move, from the unperturbed θ and this state. zo.apply
    calls it in its loop. YOUR_OWN.md has a rule of six lines.

    rule             the mask is                                    state
    Everything       all ones: MeZO                                 nothing
    SmallWeights     taken in every probe and update: S-MeZO        h, one number per tensor
    MagnitudeGroup   the same of other groups by magnitude          two numbers per tensor
    ConstantMask     taken before training, [S] §3.2                one byte per weight
    PackedMask       the same, packed ([S] §3.3, "1-bit")           one bit per weight
    RandomMask       regenerated from a seed: R-MeZO                three numbers per tensor

    With `refresh_every=n`, `Patch.refresh(t)` before step t makes the state anew every n steps. A
    loop of your own must call it. The new state is `prepare`'s, but a constant mask keeps its h.

    [Q]'s mask is no rule but an index. It is found once, from the gradients of a text, and is the
    same at every step. harness/mask.py keeps it in a file.

What differs from the papers
    Algorithm 3 is printed with two slips, see `get_mask`. [S] has one h per "layer". Here each
    parameter tensor has one, norms and biases included. [S]'s appendix C.2 and a reply set h so
    that at sparsity 0.75 the smallest 75 % would move. [S]'s scores on RTE contradict that:
    sparsity 0.75 has 80.7 ± 1.6, the smallest quarter alone 82.7, the smallest three quarters 72.3.
    So here sparsity 0.75 means density 0.25.

    We had [Q]'s summary, reviews and replies, not its full text or code. [Q] defines the score as a
    mean of squares. A code base close to [Q] squares the mean gradient (statistic="of-mean"). From
    that code come the ranking per matrix and the choice of matrices, too.

What it costs
    A threshold needs, for a moment, a copy of its weight. For scores, see `fisher`. A mask of [Q]
    as a file costs 4 bytes per place.
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zo

# ------------------------------------------------------------------ [S]: Algorithm 3


def threshold(weight: Tensor, density: float) -> Tensor:
    """h: the k-th smallest |w|, k = round(density · numel), at least 1; 0-dim, the weight's dtype.

    [S] §3.2 and appendix C.2, at percentile 1 − sparsity (see above). |w| ≤ h holds for exactly k
    elements, and for more only where values tie with h. At density 1 it is ∞: all move, also those
    that grow. ValueError where a weight is not finite.
    """
    magnitude = weight.detach().abs().flatten()
    h = kth_smallest(magnitude, max(1, round(check_density(density) * magnitude.numel())))
    return h if density < 1 else torch.full_like(h, torch.inf)


def get_mask(theta: Tensor, h: Tensor) -> Tensor:
    """[S] Algorithm 3, GetMask, of one tensor θ_i and its threshold h_i; boolean, θ's shape.

        printed:  if θ_ij ≤ h_i then θ_ij = 1, else 0          meant:  m_ij = 1 where |θ_ij| ≤ h_i

    Two misprints. The result is m and not θ. And without |·| all negative weights would move (50 %)
    and, of the positive ones, those of the smallest quarter (12.5 %): 62.5 % where 25 % are meant.
    """
    return theta.abs() <= h


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of a flat tensor, 0-dim, counted from 1.

    `torch.quantile` refuses more than 2²⁴ elements, and `kthvalue` is slow on a GPU. So values are
    counted by their upper bits, and only those that share the k-th's are looked at again.
    ValueError where a value is not finite.
    """
    check_finite(values)
    if values.element_size() == 8:
        return values.kthvalue(k).values
    parts = values.split(1 << 22)  # bounds the temporaries
    counts = sum(torch.bincount(upper_bits(part), minlength=1 << 16) for part in parts)
    ends = counts.cumsum(0)
    upper = int(torch.searchsorted(ends, k))
    alike = torch.cat([part[upper_bits(part) == upper] for part in parts])
    return alike.kthvalue(k - int(ends[upper] - counts[upper])).values


def upper_bits(values: Tensor) -> Tensor:
    """A number from 0 to 2¹⁶ − 1 for each value of 16 or 32 bits, int32, in the values' order."""
    kind, sign = (torch.int16, 15) if values.element_size() == 2 else (torch.int32, 31)
    bits = values.view(kind)
    if values.is_floating_point():  # as integers, negative floats sort backwards
        bits = bits ^ (bits >> sign & torch.iinfo(kind).max)
    return (bits.to(torch.int32) >> (sign - 15)) + (1 << 15)


class Rule:
    """Which elements of a weight move. `density` is the share wanted, in (0, 1]."""

    def __init__(self, density: float = 1.0, refresh_every: int = 0):
        self.density = check_density(density)
        self.refresh_every = refresh_every  # steps after which `refresh` is called; 0: never

    def prepare(self, weight: Tensor, stream: int) -> Tensor:
        """The state of `weight`, a tensor on its device; called before training."""
        return torch.empty(0, device=weight.device)

    def refresh(self, weight: Tensor, stream: int) -> Tensor:
        """The state anew, of the weight as it is now; called every `refresh_every` steps."""
        return self.prepare(weight, stream)

    @staticmethod
    def mask(theta: Tensor, element: Tensor, state: Tensor) -> Tensor:
        """m, boolean. `theta` has the values of some elements, `element` their places, int32.

        Both are (n,), on a GPU also (n / 16, 16). `state` is what `prepare` or `refresh` returned.
        The method is static, and compiled once for all tensors and runs. So a number that changes
        belongs in the state, and no branch may ask for a size.
        """
        raise NotImplementedError


class Everything(Rule):
    """MeZO: every weight moves."""

    @staticmethod
    def mask(theta, element, state):
        return torch.ones_like(theta, dtype=torch.bool)


class SmallWeights(Rule):
    """S-MeZO, [S] §3.2 "dynamic mask": |θ_t| ≤ h, taken in every probe and update, by a fixed h.

    `refresh_every=k` takes h again every k steps: the authors' ablation (one seed of RTE: 83.0 with
    h fixed, 82.0 with k = 100, 80.2 with k = 5). With h fixed, a weight that walks out of [−h, h]
    freezes there: watch the active density.
    """

    def prepare(self, weight, stream):
        return threshold(weight, self.density)

    @staticmethod
    def mask(theta, element, state):
        return get_mask(theta, state)


class MagnitudeGroup(SmallWeights):
    """[S]'s replies: the weights whose |θ_i| ranks between `above` and `above` + `density`, as
    shares of their tensor. above = 0.25, density = 0.25 is the group "0.25–0.5".
    """

    def __init__(self, density: float, above: float, refresh_every: int = 0):
        super().__init__(density, refresh_every)
        self.above = above
        if not (above > 0 and above + density <= 1):
            raise ValueError(f"above {above}: more than 0, and with density {density} at most 1")

    def prepare(self, weight, stream):
        bounds = self.above, self.above + self.density
        return torch.stack([threshold(weight, share) for share in bounds])

    @staticmethod
    def mask(theta, element, state):
        return (theta.abs() > state[0]) & get_mask(theta, state[1])


class ConstantMask(Rule):
    """[S] §3.2 "constant mask": the small weights of before training, stored as booleans.

    `refresh_every=k` takes the mask again every k steps, by the h of before training. [S] replies
    that a mask taken at every step scores 79.0 on average, and one of every fifth step 76.3.
    """

    def __init__(self, density: float, refresh_every: int = 0):
        super().__init__(density, refresh_every)
        self.h: dict[int, Tensor] = {}  # by stream

    def prepare(self, weight, stream):
        # not in place: Patch makes a shallow copy of the rule
        self.h = self.h | {stream: threshold(weight, self.density)}
        return self.refresh(weight, stream)

    def refresh(self, weight, stream):
        return get_mask(weight.detach().flatten(), self.h[stream])

    @staticmethod
    def mask(theta, element, state):
        return state[element]


class PackedMask(ConstantMask):
    """The constant mask at one bit per weight: weight j is bit j mod 8 of byte j div 8.

    [S] §3.3 names this "1-bit quantization", and then makes m in each forward pass instead.
    """

    def refresh(self, weight, stream):
        mask = super().refresh(weight, stream)
        packed = torch.zeros((mask.numel() + 7) // 8, dtype=torch.uint8, device=mask.device)
        for bit in range(8):
            column = mask[bit::8].to(torch.uint8)
            packed[: column.numel()] |= column << bit
        return packed

    @staticmethod
    def mask(theta, element, state):
        return (state[element >> 3] >> (element & 7) & 1).bool()


class RandomMask(Rule):
    """R-MeZO ([S] Table 1): a random mask, constant over the run, regenerated and never stored.

    Weight j moves when a uniform 32-bit word of its own is below density · 2³².
    """

    def __init__(self, density: float, seed: int = 0):
        super().__init__(density)
        self.seed = seed

    def prepare(self, weight, stream):
        bound = min(int(self.density * 2**32), 2**32 - 1) - 2**31  # words are signed here
        state = [self.seed, zo.MASK_STREAM + stream, bound]
        return torch.tensor(state, dtype=torch.int32, device=weight.device)

    @staticmethod
    def mask(theta, element, state):
        seed, stream, bound = state[0], state[1], state[2]
        return zo.threefry(element, stream, seed, stream)[0] < bound


# ------------------------------------------------------------------ [Q]: scores and the top k


def decoder_blocks(model) -> list[nn.Module]:
    """The text decoder's blocks: of the ModuleList with most weights, and others of their types."""
    decoder = getattr(model, "get_decoder", lambda: None)() or model  # not of the image encoder
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    heaviest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])
    kinds = {type(block) for block in heaviest}
    return [block for blocks in lists for block in blocks if type(block) in kinds]


def decoder_linears(model) -> dict[str, nn.Parameter]:
    """The weights that [Q] masks and quantises: the linear layers' in the decoder blocks, in order.

    By type (nn.Linear, GPT-2's Conv1D) and place, not by name. Embeddings, head, norms and biases
    stay out, and so do experts and routers that are no nn.Linear. ValueError if none is left.
    """
    inside = [module for block in decoder_blocks(model) for module in block.modules()]
    kinds = [m for m in inside if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    linear = {id(module.weight) for module in kinds}
    found = {name: p for name, p in model.named_parameters() if id(p) in linear}
    if not found or not all(w.dim() == 2 and w.is_floating_point() for w in found.values()):
        raise ValueError(f"{type(model).__name__} has no decoder blocks of 16- or 32-bit linears")
    return found


@contextmanager
def _only_gradients_of(wanted: dict[str, Tensor], model, receive):
    """Inside, backward passes call `receive(name, weight)`, which takes the gradient out of it.

    Each block is checkpointed: its activations are computed again when its gradients are due.
    Hugging Face's own switch works in train mode only, where OPT would drop out a tenth; wrapping
    `forward` works in eval mode. All is as before afterwards, also after an exception.
    """
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for p in model.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
        model.eval()
        model.requires_grad_(False)
        for name, p in wanted.items():
            p.requires_grad_(True)
            undo.callback(setattr, p, "grad", p.grad)
            p.grad = None
            hook = p.register_post_accumulate_grad_hook(partial(receive, name))
            undo.callback(hook.remove)
        for block in decoder_blocks(model):
            own = {key: value for key, value in vars(block).items() if key == "forward"}
            undo.callback(vars(block).update, own)  # runs last
            undo.callback(vars(block).pop, "forward")
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        with torch.enable_grad():
            yield


def fisher(model, losses, *, statistic="per-sample", weights=None) -> dict:
    """[Q]'s score of every decoder linear, {name: fp32 tensor}: the empirical Fisher diagonal.

    `losses`: a function for each sample, loss(model) → scalar, which calls it with use_cache=False.
    per-sample: the mean of the samples' squared gradients. of-mean: the square of their mean.
    Squares are taken in fp32: in fp16 a gradient of 1e-4 squares to zero. `weights` restricts it to
    some of `decoder_linears`.

    Peak memory: the model, 4 bytes per scored weight, the gradient of one matrix as it comes and in
    fp32, one block's activations, every block's input, the logits. Llama-2-7B in bf16 at 512
    tokens, by count: 13.5 + 25.9 + 0.3 + under 1 GB. With `sensitive_index(groups=8)` the 25.9
    become 3.2, in eight passes. ValueError where a gradient is not finite.
    """
    if statistic not in ("per-sample", "of-mean"):
        raise ValueError(f"statistic {statistic!r}: per-sample or of-mean")
    weights = decoder_linears(model) if weights is None else weights
    scores = {name: torch.zeros(w.shape, device=w.device) for name, w in weights.items()}
    samples = 0

    def receive(name, weight):
        gradient, weight.grad = weight.grad, None
        if not torch.isfinite(gradient).all():
            raise ValueError(f"the gradient of {name} is not finite; use float32 or bfloat16")
        g = gradient.to(scores[name].device, torch.float32)
        scores[name].addcmul_(g, g) if statistic == "per-sample" else scores[name].add_(g)

    with _only_gradients_of(weights, model, receive):
        for loss in losses:
            value = loss(model)
            if not getattr(value, "requires_grad", False):
                raise ValueError("the loss has no gradient by the decoder linears that were found")
            value.backward()
            samples += 1
    for score in scores.values():
        score /= max(1, samples)
        if statistic == "of-mean":
            score.square_()
    return scores


def how_many(weights: dict[str, Tensor], density: float) -> dict[str, int]:
    """k = round(density · numel) per matrix, where that is 1 or more; ValueError if nowhere."""
    check_moves(density, weights.values())
    counts = {name: round(density * w.numel()) for name, w in weights.items()}
    return {name: k for name, k in counts.items() if k}


def top(values: Tensor, k: int) -> Tensor:
    """Where the k largest are: sorted flat int32 positions, exactly k, of equal ones the first."""
    flat = values.detach().flatten()
    h = kth_smallest(flat, flat.numel() - k + 1)
    above, equal = (flat > h).nonzero(), (flat == h).nonzero()
    chosen = torch.cat([above, equal[: k - len(above)]]).flatten()
    return chosen.sort().values.to("cpu", torch.int32)


def sensitive(scores: dict[str, Tensor], density: float, ks: dict | None = None) -> dict:
    """[Q]'s mask, {name: places}: per matrix the k highest scores, as `top` gives them.

    Left out are a matrix too small for one place, and one that no gradient reaches, such as an
    expert that no token was routed to. `ks`: k by name, where `scores` has a part of the matrices.
    """
    ks = how_many(scores, density) if ks is None else ks
    return {name: top(s, ks[name]) for name, s in scores.items() if name in ks and s.any()}


def sensitive_index(
    model, losses, density: float, *, groups=1, then=lambda *_: None, bar=lambda x, _: x, **how
) -> dict[str, Tensor]:
    """[Q]'s mask of a model, made in `groups` passes over the list `losses`.

    Each pass scores one group of matrices, so that only its scores are in memory. `then(scores,
    index)` is called after each pass, before these are dropped. `bar(losses, name)`: such as tqdm,
    one per pass. `how`: what `fisher` takes.
    """
    weights, index = decoder_linears(model), {}
    ks = how_many(weights, density)  # of all, as one part alone may have no place
    names, size = list(weights), -(-len(weights) // groups)
    passes = range(0, len(names), size)
    for number, first in enumerate(passes, 1):
        part = {name: weights[name] for name in names[first : first + size]}
        shown = bar(losses, f"scoring {number}/{len(passes)}")
        scores = fisher(model, shown, weights=part, **how)
        found = sensitive(scores, density, ks)
        then(scores, found)
        index |= found
        del scores  # before the next are made
    if not index:
        raise ValueError("no gradient reaches any matrix: the losses do not depend on them")
    return index


def largest(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Baseline of the same size: per matrix the k largest |w|."""
    return {name: top(weights[name].abs(), k) for name, k in how_many(weights, density).items()}


def smallest(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Baseline of the same size: per matrix the k smallest |w|, [S]'s choice."""
    return {name: top(-weights[name].abs(), k) for name, k in how_many(weights, density).items()}


def random_index(weights: dict[str, Tensor], density: float, seed: int = 0) -> dict[str, Tensor]:
    """Baseline of the same size: per matrix k weights drawn without replacement."""
    index = {}
    for number, (name, k) in enumerate(how_many(weights, density).items()):
        n, stream = weights[name].numel(), zo.word(zo.MASK_STREAM + number)
        words = [
            zo.threefry(part, stream, zo.word(seed), stream)[0]
            for part in torch.arange(n, dtype=torch.int32).split(1 << 16)
        ]
        index[name] = top(torch.cat(words), k)
    return index


# ------------------------------------------------------------------ what [Q] measures of masks


def concentration(scores: dict[str, Tensor], density: float) -> dict[str, float]:
    """Per matrix, the share of the squared gradient in its own top fraction."""
    index = sensitive(scores, density)
    return {name: coverage({name: scores[name]}, {name: i}) for name, i in index.items()}


def coverage(scores: dict[str, Tensor], index: dict[str, Tensor]) -> float:
    """c = ‖m ⊙ ∇L‖² / ‖∇L‖²: the share of one gradient's square, over all matrices, inside a mask.

    A random mask has c = k/d, the density, on average.
    """
    inside = sum(scores[name].flatten()[i.long()].double().sum() for name, i in index.items())
    return float(inside / sum(score.double().sum() for score in scores.values()))


def overlap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|A ∩ B| / k over all matrices, for masks of one size. By chance: k/d, the density."""
    assert {n: len(i) for n, i in a.items()} == {n: len(i) for n, i in b.items()}, "other sizes"
    both = sum(int(torch.isin(a[name], b[name]).sum()) for name in a)
    return both / sum(len(i) for i in a.values())


# ------------------------------------------------------------------ what cannot be


def check_density(density: float) -> float:
    """The density, if it is one. ValueError otherwise."""
    if not 0 < density <= 1:
        raise ValueError(
            f"density {density}: the share of weights that move, above 0 and at most 1 "
            "(the paper's sparsity 0.75 is density 0.25)"
        )
    return density


def check_moves(density: float, weights) -> None:
    """ValueError where the density selects no weight even of the largest tensor."""
    largest = max(w.numel() for w in weights)
    if not round(check_density(density) * largest):
        raise ValueError(
            f"density {density:g} takes none of the {largest} weights of the largest tensor, so "
            f"nothing moves; give {1 / largest:.1g} or more"
        )


def check_finite(weight: Tensor, name: str = "the weight") -> None:
    """ValueError where a weight holds NaN or infinity."""
    if not torch.stack(weight.aminmax()).isfinite().all():  # NaN shows in both
        raise ValueError(f"{name} holds NaN or infinity; get a sound copy of the model")


def check_places(places: Tensor, numel: int, name: str) -> None:
    """ValueError unless `places` can be [Q]'s m of a matrix of `numel` weights."""
    if places.dtype not in (torch.int32, torch.int64) or places.dim() != 1:
        kind = f"{places.dtype} {tuple(places.shape)}"
        hint = "of a boolean mask they are mask.flatten().nonzero()[:, 0]"
        raise ValueError(f"{name}: an index is flat positions, (k,) of int, not {kind}; {hint}")
    if not len(places) or places[0] < 0 or int(places[-1]) >= numel or (places.diff() <= 0).any():
        raise ValueError(f"{name}: an index is k > 0 places in ascending order, below {numel}")
