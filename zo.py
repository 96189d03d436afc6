"""Zeroth-order optimisation: noise, the two-point estimate, Algorithms 1 and 2.

[S] is Sparse MeZO (Liu et al., 2024), [Q] is SensZOQ (Guo et al., 2024). Both do three things:

    ẑ = m ⊙ z,  z ~ N(0, I)                                  [S] eq. 1
    g = (L(θ + ε ẑ) − L(θ − ε ẑ)) / 2ε                       [S] eq. 2 is g ẑ; [Q] SPSA
    θ ← θ − η g ẑ

    code               paper             code             paper
    theta              θ                 loss_plus        l⁺ = L(θ + ε ẑ)
    z, mask            z, m              loss_minus       l⁻ = L(θ − ε ẑ)
    a                  ±ε, −2ε or −ηg    projected_grad   proj_grad, g
    eps, lr            ε, η              seed             s, fresh for every step

This module never sees a model: parameters are plain tensors and the loss is a closure, so a
quadratic and a 7B model run the same code. `sparse_mezo_step` is Algorithm 1 as printed, in place:
the reference that the tests compare against. Training uses the same primitive through
model_patch.py (§3.3 of [S]).

Noise is a function, not a stream. MeZO regenerates z by reseeding the global generator and visiting
the parameters in the same order. Here z is a pure function of (seed, stream, element):
Philox-2x32-10 (Salmon et al., SC'11), a ten-round cipher of a counter. So its random words are the
same on every device, in any chunking and visiting order, and z is, to the last bit or two in which
logarithms and cosines round; the rows of an embedding can be drawn alone; the global generator is
never touched; and a log of (seed, a) pairs replays a run, to the bit on the same kind of device.
(`torch.randn` can do none of this.)

The counter is 64 bits and the key 32. They are divided so that no two draws ever share an input:

    word           bits     holds
    counter 0      16 + 16  seed's upper bits, stream: which tensor
    counter 1      32       which draw; one serves two elements of the flattened tensor
    key            32       seed's lower bits

and a step's 48-bit seed is 24 bits of run seed and 24 bits of step (`step_seed`).

What it costs: the readable function is the kernel. `Sweep` compiles it, to some 1.6 ns per weight
on two CPU cores, where `torch.randn` alone takes 3.6 (torch 2.13 makes two loops of it, with radius
and angle written between them). Without a compiler the same lines run in small chunks, ten times
slower.
"""

import math
import warnings

import torch
from torch import Tensor

MULTIPLIER, WEYL, WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF  # Philox-2x32's constants; 32 ones
MAX_RUN_SEED, MAX_STEP = 1 << 24, 1 << 24
MAX_ELEMENTS, MAX_STREAMS = 1 << 32, 1 << 15  # the upper half of the streams is for masks
ARITHMETIC = 2  # goes up when an update gets other bits: a run is continued by its own kind
PAIR = 64  # two elements this far apart share one draw of two words


def philox(counter0, counter1: Tensor, key):
    """Philox-2x32-10: 64 counter bits and 32 key bits to 64 random bits, as two words.

    Words are non-negative int64 below 2³². The product c·M of two of them would overflow int64,
    which C++ leaves undefined (and gcc did break); c·(M − 2³²) + c·2³² is the same and never does.
    """
    for _ in range(10):
        product = counter0 * (MULTIPLIER - (1 << 32))
        high, low = (product >> 32) + counter0 & WORD, product & WORD
        counter0, counter1 = high ^ key ^ counter1, low
        key = (key + WEYL) & WORD
    return counter0, counter1


def random_words(seed, stream, index: Tensor):
    """Two random 32-bit words for each number `index` (int64) of tensor `stream` under `seed`.

    `seed` (48 bits) and `stream` (16 bits) are ints, or 0-dim int64 tensors inside a compiled
    kernel. (The element is counter 1, so the first product is one number for the whole tensor; as
    counter 0 it also made torch 2.13's compiler, seeing small indices, multiply in 32 bits.)
    """
    return philox(seed >> 32 << 16 | stream, index, seed & WORD)


def normal_pair(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1), fp32, from two words: Box-Muller, (r cos φ, r sin φ)."""
    radius = torch.sqrt(-2.0 * torch.log((word0.float() + 1.0) * 2.0**-32))  # log of (0, 1]
    angle = word1.float() * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def draw_of(index: Tensor) -> Tensor:
    """Which draw serves an element: one serves two, e and e + 64 of each block of 128.

        element   0 … 63   64 … 127   128 … 191   192 … 255   …
        draw      0 … 63    0 … 63     64 … 127    64 … 127   …
        is its    r cos φ   r sin φ    r cos φ     r sin φ

    Two for the price of one; 64 apart, so that a kernel reads and writes both in whole lines.
    """
    return index >> 7 << 6 | index & 63


def normal(index: Tensor, word0: Tensor, word1: Tensor) -> Tensor:
    """z ~ N(0, 1), fp32, one per element of `index`: its half of the draw with these words."""
    first, second = normal_pair(word0, word1)
    return torch.where((index & PAIR) == 0, first, second)


def gaussian(seed: int, stream: int, shape, *, start: int = 0, device="cpu") -> Tensor:
    """The noise z of one tensor, fp32 of `shape`, from its element `start` on.

    A row range equals the slice of the whole: gaussian(s, i, (2, c), start=3 * c) is rows 3 and 4.
    """
    numel = math.prod(shape)
    assert 0 <= stream < 2 * MAX_STREAMS, f"stream {stream} does not fit 16 bits"
    assert 0 <= seed < 1 << 48, f"seed {seed} does not fit 48 bits"
    assert 0 <= start <= start + numel <= MAX_ELEMENTS, f"element {start + numel} exceeds 32 bits"
    index = torch.arange(start, start + numel, device=device)
    return normal(index, *random_words(seed, stream, draw_of(index))).view(shape)


def step_seed(run_seed: int, step: int) -> int:
    """The seed of one training step; one-to-one, so no two steps of any two runs share noise."""
    assert 0 <= run_seed < MAX_RUN_SEED, f"run seed {run_seed} is not in [0, 2^24)"
    assert 0 <= step < MAX_STEP, f"step {step} is not in [0, 2^24)"
    return run_seed << 24 | step


def shifted(theta: Tensor, a, mask: Tensor, z: Tensor) -> Tensor:
    """The one primitive: θ + a·m⊙z, with a ∈ {ε, −2ε, −ε, −η·proj_grad}.

    Computed in fp32 (fp64 for fp64 weights) and returned so; the caller rounds once, to θ's dtype.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    return theta.to(wide) + a * (mask * z.to(wide))


def round_stochastically(value: Tensor, dtype: torch.dtype, high: Tensor, low: Tensor) -> Tensor:
    """fp32 `value` to a neighbour in fp16 or bf16, up or down, so that the mean is `value`.

    An update far below the spacing of θ's dtype is lost by rounding to nearest, every time; this
    way it arrives on average. Random bits are added where `dtype` has none (the last 16 of fp32 for
    bf16, 13 for fp16), and what is there then is cut off: it carries as often as it should. The
    random bits are the low bytes of z's own two words. They are its last: of 1,000 z one differs by
    more than 1e-5 without them, so rounding does not see z, and no second draw is needed.
    """
    info = torch.finfo(dtype)
    cut = 23 + int(math.log2(info.eps))  # fp32 has 23 bits behind the point, bf16 7, fp16 10
    random = ((high & 0xFF) << 8 | low & 0xFF).int()  # [0, 2¹⁶)
    bits = (value.view(torch.int32) + (random >> (16 - cut))) & ~((1 << cut) - 1)
    rounded = bits.view(torch.float32)
    if dtype == torch.float16:  # below 6e-5 its numbers are 2⁻²⁴ apart, unlike fp32's
        below = torch.floor(value * 2.0**24)
        small = (below + (value * 2.0**24 - below > random * 2.0**-16)) * 2.0**-24
        rounded = torch.where(value.abs() < info.tiny, small, rounded)
    return rounded.to(dtype)


@torch.no_grad()
def perturb_parameters(theta: list[Tensor], a: float, seed: int, masks: list[Tensor]) -> None:
    """[S] Algorithm 2, PerturbParameters: θ_i ← θ_i + m_i ⊙ a z_i, in place, z_i redrawn from seed.

    `theta`: tensors of any shape; the position in the list is the noise stream. `masks`: boolean,
    alike.
    """
    for stream, (theta_i, mask_i) in enumerate(zip(theta, masks, strict=True)):
        z_i = gaussian(seed, stream, theta_i.shape, device=theta_i.device)
        theta_i.copy_(shifted(theta_i, a, mask_i, z_i))  # rounds to θ's dtype


def projected_grad(loss_plus, loss_minus, eps: float):
    """[S] Algorithm 1's proj_grad, the slope of L along ẑ: (l⁺ − l⁻) / 2ε. Eq. 2 is it times ẑ."""
    return (loss_plus - loss_minus) / (2 * eps)


@torch.no_grad()
def sparse_mezo_step(theta: list[Tensor], loss, get_masks, *, lr: float, eps: float, seed: int):
    """[S] Algorithm 1, one step, in place and as printed; returns (l⁺, l⁻, proj_grad).

    `loss()` evaluates L(θ; B) on the tensors in `theta`; `get_masks(theta)` returns m, a list of
    booleans. The masks are taken once, from the unperturbed θ, and held for the step: a mask taken
    again from θ + ε ẑ would differ, and the restore would miss. Adding and subtracting ε ẑ rounds,
    so θ does not come back to the bit; in 16 bits that drift is larger than an update. §3.3 has
    none of it.
    """
    masks = get_masks(theta)  # m ← GetMask(θ_t, h): Algorithm 3, masks.get_mask for each tensor
    perturb_parameters(theta, eps, seed, masks)
    loss_plus = float(loss())  # l⁺ = L(θ_t; B)
    perturb_parameters(theta, -2 * eps, seed, masks)
    loss_minus = float(loss())  # l⁻ = L(θ_t; B)
    perturb_parameters(theta, eps, seed, masks)
    g = projected_grad(loss_plus, loss_minus, eps)
    perturb_parameters(theta, -lr * g, seed, masks)  # θ_i ← θ_i − η_t · proj_grad · m_i ⊙ z_i
    return loss_plus, loss_minus, g


# ------------------------------------------------------------------ one pass over memory


def draw_at(index: Tensor, seed, stream) -> list:
    """[(z, elements, words)] of any elements of tensor `stream`, `index`: (n,) int64.

    z (n,) fp32 is [S]'s z_i at those elements; words: two of (n,) int64, each below 2³².
    """
    words = random_words(seed, stream, draw_of(index))
    return [(normal(index, *words), index, words)]


def draw_blocks(start: Tensor, like: Tensor, seed, stream) -> list:
    """[(z, elements, words)] of both halves of whole blocks from element `start` on: the same as
    `draw_at`, each tensor (blocks, 64) like `like`.

    Each draw serves both halves. The second has the words the other way round, so that not the same
    bits round both.
    """
    draw = torch.arange(like.numel(), device=like.device).view(-1, PAIR) + start // 2
    words = random_words(seed, stream, draw)
    cosine, sine = normal_pair(*words)
    element = draw + (draw >> 6 << 6)
    return [(cosine, element, words), (sine, element + PAIR, words[::-1])]


def _sweep(outs, coefficients, theta, index, start, seed, stream, mask, state, stochastic):
    """out ← θ + a·m⊙z for each (out, a), z drawn once; `mask(theta, index, state)` gives m.

    `theta` and each of `outs` are lists: of one flat tensor, the elements `index` of the whole; or,
    `index` None, of the two `halves` of whole blocks from element `start` on.
    """
    if index is None:
        drawn = draw_blocks(start, theta[0], seed, stream)
    else:
        drawn = draw_at(index, seed, stream)
    for half, (z, element, words) in enumerate(drawn):
        m = mask(theta[half], element, state)
        for out, a in zip(outs, coefficients, strict=True):
            value, dtype = shifted(theta[half], a, m, z), out[half].dtype
            if stochastic and dtype.itemsize < 4:  # 32-bit weights hear every update
                value = round_stochastically(value, dtype, *words)
            out[half].copy_(value)  # rounds to nearest


def halves(flat: Tensor) -> list[Tensor]:
    """Of whole blocks of 128 the first 64 and the last: two times (blocks, 64)."""
    return [half.data for half in flat.view(-1, 2, PAIR).unbind(1)]  # `.data`: see `alone`


def alone(flat: Tensor) -> list[Tensor]:
    """The tensor itself; without its base (`.data`), views of all kinds share one compilation."""
    return [flat.data]


class Sweep:
    """`_sweep` as a kernel: compiled to fused loops, or eager. In chunks, which bounds temporaries.

    Compiled and eager agree to the last bit or two of z (the fused cos and log round differently),
    so whether a run was compiled belongs to its record; how it was chunked changes nothing.
    """

    # elements: eager temporaries of 8 bytes stay in L2, compiled ones of 4 in L3; on a GPU, where a
    # launch costs more, they take a few hundred MB
    CHUNK = {"cpu": (1 << 16, 1 << 22), "cuda": (1 << 22, 1 << 25)}  # (eager, compiled)

    def __init__(self, compiled: bool = False):
        self.kernel, self.worked = None, False
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # a few per rule and dtype; the default is 8
            self.kernel = torch.compile(_sweep, dynamic=True, fullgraph=True)

    @property
    def compiled(self) -> bool:
        return self.kernel is not None

    @torch.no_grad()
    def __call__(
        self, outs, coefficients, theta, seed, stream, mask, state, index=None, stochastic=False
    ) -> None:
        """Flat `outs` ← θ + a·m⊙z, rounded to nearest in their dtype or stochastically. Numbers (a,
        seed, stream) are 0-dim tensors on θ's device, so that a new value never recompiles. `out`
        may be θ itself, the same object."""
        numel, device, last = theta.numel(), theta.device, (mask, state, stochastic)
        assert index is not None or numel <= MAX_ELEMENTS, f"{numel} elements exceed the counter"
        whole = 0 if index is not None else numel // (2 * PAIR) * (2 * PAIR)
        chunk = self.CHUNK["cuda" if theta.is_cuda else "cpu"][self.compiled]

        def cut(parts, start, end):
            own = parts(theta[start:end])
            return [own if o is theta else parts(o[start:end]) for o in outs], coefficients, own

        for start in range(0, whole, chunk):  # whole blocks
            first = torch.full((), start, device=device)  # no copy from the host
            own = cut(halves, start, min(start + chunk, whole))
            self._run(*own, None, first, seed, stream, *last)
        for start in range(whole, numel, chunk):  # picked elements, or what the blocks left over
            end = min(start + chunk, numel)
            which = torch.arange(start, end, device=device) if index is None else index[start:end]
            its = stream[start:end].long() if stream.dim() else stream
            self._run(*cut(alone, start, end), which, None, seed, its, *last)

    def _run(self, *arguments) -> None:
        if self.kernel is not None:
            try:
                self.kernel(*arguments)
                self.worked = True
                return None
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C++ compiler, no Triton: whatever the backend raises
                if self.worked:  # half a run compiled and half eager could not be replayed
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                warnings.warn(f"torch.compile failed, running eager: {reason[0]}", stacklevel=3)
                self.kernel = None
        return _sweep(*arguments)
