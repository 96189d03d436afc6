"""Zeroth-order optimisation: Algorithms 1 and 2 as printed, and the noise that they are made of.

[S] is Sparse MeZO (Liu et al., 2024), [Q] is SensZOQ (Guo et al., 2024). Both do three things:

    ẑ = m ⊙ z,  z ~ N(0, I)                                  [S] eq. 1
    g = (L(θ + ε ẑ) − L(θ − ε ẑ)) / 2ε                       [S] eq. 2 is g ẑ; [Q] SPSA
    θ ← θ − η g ẑ

    code               paper             code             paper
    theta              θ                 loss_plus        l⁺ = L(θ + ε ẑ)
    z, mask            z, m              loss_minus       l⁻ = L(θ − ε ẑ)
    a                  ±ε, −2ε or −ηg    projected_grad   proj_grad, g
    eps, lr            ε, η              seed             s, fresh for every step (not Alg. 1's
                                                          other s, the sparsification interval)

`sparse_mezo_step` is [S]'s step; MeZO's is the same with masks of ones, [Q]'s with masks that never
change. No model is seen here: parameters are plain tensors and the loss is a closure, so a
quadratic and a 7B model run the same code, in place: the reference that tests compare with.
Training uses the same primitive, `shifted`, through model_patch.py (§3.3 of [S]).

What it costs: as written here, memory for a tensor's whole z, and ten times the time of sweep.py,
which makes fused loops of the same functions.
"""

import math

import torch
from torch import Tensor


def shifted(theta: Tensor, a, mask: Tensor, z: Tensor) -> Tensor:
    """The one primitive: θ + a·m⊙z, with a ∈ {ε, −2ε, −ε, −η·proj_grad}.

    Computed in fp32 (fp64 for fp64 weights) and returned so; the caller rounds once, to θ's dtype.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    return theta.to(wide) + a * (mask * z.to(wide))


@torch.no_grad()
def perturb_parameters(theta: list[Tensor], a: float, seed: int, masks: list[Tensor]) -> None:
    """[S] Algorithm 2, PerturbParameters: θ_i ← θ_i + m_i ⊙ a z_i, in place, z_i redrawn from seed.

    `theta`: tensors of any shape and float dtype; tensor i draws from noise stream i. `masks`:
    booleans of the same shapes. ValueError where the lists differ in length.
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
    none of it. (Nor does θ come back where `loss` raises.)
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


# ------------------------------------------------------------------ the noise
#
# Noise is a function, not a stream. MeZO regenerates z by reseeding the global generator and
# visiting the parameters in the same order. Here z is a pure function of (seed, stream, element):
# Philox-2x32-10 (Salmon et al., SC'11), a ten-round cipher of a counter. Its random words are equal
# on every device, in any chunking or order; z too, up to the last bit or two of log and cos. Rows
# of an embedding can be drawn alone, the global generator is never touched, and a log of (seed, a)
# replays a run, to the bit on the same kind of device. (`torch.randn` can do none of this.)
#
# The counter is 64 bits and the key 32. They are divided so that no two draws ever share an input:
#
#     word           bits     holds
#     counter 0      16 + 16  seed's upper bits, stream: which tensor
#     counter 1      32       which draw; one serves two elements of the flattened tensor
#     key            32       seed's lower bits
#
# and a step's 48-bit seed is 24 bits of run seed and 24 bits of step (`step_seed`).

MULTIPLIER, WEYL, WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF  # Philox-2x32's constants; 32 ones
MAX_RUN_SEED, MAX_STEP = 1 << 24, 1 << 24
MAX_ELEMENTS, MAX_STREAMS = 1 << 32, 1 << 15  # the upper half of the streams is for masks
HALF = 64  # of a block of 128 elements: one this far from another shares its draw of two words


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
    angle = word1.float() * math.radians(360 * 2.0**-32)
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
    return torch.where((index & HALF) == 0, first, second)


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
    return int(run_seed) << 24 | int(step)  # of numpy's 32 bits some would fall off
