"""One zeroth-order step: how two forward passes replace a gradient (Algorithms 1 and 2 of [S]).

    ẑ = m ⊙ z,  z ~ N(0, I)                                  [S] eq. 1
    g = (L(θ + ε ẑ) − L(θ − ε ẑ)) / 2ε                       [S] eq. 2 is g ẑ; [Q] SPSA
    θ ← θ − η g ẑ

[S] is Sparse MeZO (Liu et al., 2024), [Q] is SensZOQ (Guo et al., 2024).

    code               paper             code             paper
    theta              θ                 loss_plus        l⁺ = L(θ + ε ẑ)
    z, mask            z, m              loss_minus       l⁻ = L(θ − ε ẑ)
    a                  ±ε, −2ε or −ηg    projected_grad   proj_grad, g
    eps, lr            ε, η              seed             s, fresh for every step

How it works
    Everything here is one primitive, θ + a·m⊙z, with a different a each time. First comes the step
    as the papers print it, then its noise, `gaussian`, as a function of a seed. Training runs
    `apply`, the primitive as one loop, which is compiled where that pays.

    `sparse_mezo_step` is [S]'s step. MeZO's step is the same with masks of ones. [Q]'s step is the
    same on one vector of k values. No function here sees a model: parameters are plain tensors and
    the loss is a closure. So a quadratic and a 7B model run the same code.

What differs from the paper
    The noise comes from Threefry and not from the framework's generator. Updates are computed in
    fp32. The literal step rounds them to nearest; `apply` can round 16-bit weights stochastically.

What it costs
    The literal step holds a tensor's whole z. `apply`, compiled, holds none of it.
"""

import functools
import math
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def shifted(theta: Tensor, a, mask: Tensor, z: Tensor) -> Tensor:
    """The one primitive: θ + a·m⊙z, with a ∈ {ε, −2ε, −ε, −η·proj_grad}.

    It is computed and returned in fp32 (fp64 for fp64 weights). The caller rounds it once.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    return theta.to(wide) + a * (mask * z.to(wide))


@torch.no_grad()
def perturb_parameters(theta: list[Tensor], a: float, seed: int, masks: list[Tensor]) -> None:
    """[S] Algorithm 2, PerturbParameters: θ_i ← θ_i + m_i ⊙ a z_i, in place, z_i redrawn from seed.

    `theta`: tensors of any shape and float dtype. `masks`: booleans of the same shapes. Tensor i
    draws from noise stream i. ValueError where the two lists differ in length.
    """
    for stream, (theta_i, mask_i) in enumerate(zip(theta, masks, strict=True)):
        z_i = gaussian(seed, stream, theta_i.shape, device=theta_i.device)
        theta_i.copy_(shifted(theta_i, a, mask_i, z_i))  # rounds to θ's dtype


def projected_grad(loss_plus, loss_minus, eps: float):
    """[S] Algorithm 1's proj_grad, the slope of L along ẑ: (l⁺ − l⁻) / 2ε. Eq. 2 is g ẑ."""
    return (loss_plus - loss_minus) / (2 * eps)


@torch.no_grad()
def sparse_mezo_step(theta: list[Tensor], loss, get_masks, *, lr: float, eps: float, seed: int):
    """[S] Algorithm 1, one step, in place and as printed; returns (l⁺, l⁻, proj_grad).

    `loss()` evaluates L(θ; B) on the tensors in `theta`. `get_masks(theta)` returns m, a list of
    booleans. The masks are taken once, from the unperturbed θ, and held for the step: a mask taken
    again from θ + ε ẑ would differ, and the restore would miss.

    Adding and subtracting ε ẑ rounds, so θ does not come back to the bit. In 16 bits that drift is
    larger than an update. §3.3, in model_patch.py, has none of it.
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


# ------------------------------------------------------------------ noise is a function of a seed
#
# MeZO regenerates z by reseeding the global generator and visiting the parameters in the same
# order. Here z is a function of (seed, stream, element), where the stream says which tensor.
# Threefry-2x32 (Salmon et al., SC'11), the cipher behind JAX's generator, turns a counter into two
# random words, in 13 rounds where JAX takes 20: noise needs no secrecy, and Random123 publishes
# known answers for both. Words are equal on every device, in any chunking or order, and z is
# equal up to its last bits. The global generator is never touched, and a log of (seed, a) rebuilds
# a run.
#
#     word           holds                            word      holds
#     counter 0      which draw                       key 0     the run's seed
#     counter 1      the stream                       key 1     the step; of random masks the stream
#
# One draw makes two normals. Of n elements, draw i gives element i (r cos φ) and element i + ⌈n/2⌉
# (r sin φ).

MAX_RUN_SEED = MAX_STEP = MAX_ELEMENTS = 1 << 31  # elements are of one tensor
MASK_STREAM = 1 << 30  # streams from here on belong to random masks, those below to noise
ROTATIONS, PARITY = (13, 15, 26, 6, 17, 29, 16, 24), 0x1BD11BDA  # Threefry-2x32's constants


def step_seed(run_seed: int, step: int) -> int:
    """The seed of one training step: one-to-one, so equal noise needs equal run seed and step."""
    assert 0 <= run_seed < MAX_RUN_SEED, f"run seed {run_seed} is not in [0, 2^31)"
    assert 0 <= step < MAX_STEP, f"step {step} is not in [0, 2^31)"
    return int(run_seed) << 32 | int(step)


def threefry(counter0: Tensor, counter1: Tensor, key0: Tensor, key1: Tensor, rounds: int = 13):
    """Threefry-2x32: 64 counter bits and 64 key bits to 64 random bits, as two words.

    Words are int32 tensors, whose sums wrap at 2³². A round adds, rotates and xors; after every
    fourth round a part of the key is added.
    """
    keys = (key0, key1, key0 ^ key1 ^ PARITY)
    word0, word1 = counter0 + keys[0], counter1 + keys[1]
    for i in range(rounds):
        turn = ROTATIONS[i % 8]
        word0 = word0 + word1
        left, right = word1 << turn, word1 >> (32 - turn) & ((1 << turn) - 1)
        word1 = (left | right) ^ word0
        if i % 4 == 3:
            j = i // 4 + 1
            word0, word1 = word0 + keys[j % 3], word1 + keys[(j + 1) % 3] + j
    return word0, word1


def normal_pair(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1), fp32, from two words: Box-Muller, (r cos φ, r sin φ).

    The radius takes 31 bits of word 0. The angle inside a quadrant takes 30 bits of word 1, whose
    two upper bits are the signs. Logarithm, cosine and sine are polynomials, fitted to these ranges
    alone: torch's own functions take any argument, and cost more. Cosine and sine are right to
    2e-7, the radius to 3e-7 of itself.
    """
    unit = math.pi / 2 * 2.0**-30
    x = minus_two_log((word0 & 0x7FFFFFFF).float() * 2.0**-31 + 2.0**-32)  # of u in (0, 1]
    radius = x * x.rsqrt()  # √x: on a GPU one instruction, where √ rounded right takes a dozen
    angle = (word1 & 0x3FFFFFFF).float() * unit + unit / 2  # (0, π/2]
    square = angle * angle
    cosine = horner(square, [1.0, -0.5, 0.041666638, -0.0013888362, 2.4760160e-5, -2.6051481e-7])
    sine = angle * horner(square, [1.0, -0.16666648, 0.0083328998, -1.9800897e-4, 2.5904867e-6])
    return radius * signed(cosine, word1), radius * signed(sine, word1 << 1)


def minus_two_log(u: Tensor) -> Tensor:
    """−2 log u of fp32 numbers in (0, 1]: u = 2ᵉ m, and log m is a polynomial in m − 1.

    It is never 0, but 2e-30 at u = 1, so that x · rsqrt(x) is not 0 · ∞.
    """
    bits = u.view(torch.int32)
    exponent = bits - 0x3F3504F3 & -(1 << 23)  # e · 2²³; √½ has these bits, so √½ ≤ m < √2
    m = (bits - exponent).view(torch.float32)
    log_m = [-1e-30, 0.99999982, -0.50000668, 0.33336183, -0.24959342, 0.19873036, -0.17333479,
             0.16420068, -0.10102291]  # fmt: skip
    two_log_2 = 2 * math.log(2) * 2.0**-23
    return horner(m - 1, [-2 * c for c in log_m]) - exponent.float() * two_log_2


def horner(x: Tensor, coefficients: list[float]) -> Tensor:
    """The polynomial c₀ + c₁ x + c₂ x² + …"""
    *rest, value = coefficients
    for c in reversed(rest):
        value = value * x + c
    return value


def signed(x: Tensor, bits: Tensor) -> Tensor:
    """±x, the sign from the highest of 32 bits."""
    return (x.view(torch.int32) ^ (bits & -(1 << 31))).view(torch.float32)


def word(number: int) -> Tensor:
    """The low 32 bits of a number, as a 0-dim int32 tensor.

    It stays on the CPU and is passed to the kernel as an argument. On a GPU, making it would cost a
    launch, and reading it a load.
    """
    low = (number & 0xFFFFFFFF) - ((number & 0x80000000) << 1)
    return torch.full((), low, dtype=torch.int32, device="cpu")


def seed_words(seed: int) -> tuple[Tensor, Tensor]:
    """The two words of a seed: the run's, and the step."""
    assert 0 <= seed < MAX_RUN_SEED << 32, f"seed {seed} does not fit: use step_seed"
    return word(seed >> 32), word(seed)


class Shift(NamedTuple):
    """a and the two words of z's seed, as tensors: numbers would become constants of the loop."""

    a: Tensor  # 0-dim fp32
    key0: Tensor  # 0-dim int32: the run's seed
    key1: Tensor  # 0-dim int32: the step

    @classmethod
    def of(cls, a: float, seed: int) -> "Shift":
        return cls(torch.full((), a, dtype=torch.float32, device="cpu"), *seed_words(seed))


def gaussian(seed: int, stream: int, shape, *, device="cpu") -> Tensor:
    """The noise z of one tensor, fp32 of `shape`: a pure function of (seed, stream, shape)."""
    n = math.prod(shape)
    draw = torch.arange((n + 1) // 2, dtype=torch.int32, device=device)
    cosine, sine = normal_pair(*threefry(draw, word(stream), *seed_words(seed)))
    return torch.cat([cosine, sine[: n // 2]]).view(shape)


# ------------------------------------------------------------------ θ + a·m⊙z as one fused loop


def round_stochastically(value: Tensor, dtype: torch.dtype, word0: Tensor, word1: Tensor) -> Tensor:
    """fp32 `value` to a neighbour in fp16 or bf16, up or down, so that the mean is `value`.

    Rounding to nearest loses an update far below the spacing of θ's dtype, every time. Here it
    arrives on average: random bits are added below `dtype`'s last place, and the sum is cut there.
    They are the low bytes of z's own words, which hardly affect z. So no second draw is needed.
    """
    info = torch.finfo(dtype)
    cut = 23 + int(math.log2(info.eps))  # fp32 has 23 bits behind the point, bf16 7, fp16 10
    random = (word0 & 0xFF) << 8 | word1 & 0xFF  # [0, 2¹⁶)
    bits = (value.view(torch.int32) + (random >> (16 - cut))) & ~((1 << cut) - 1)
    rounded = bits.view(torch.float32)
    if dtype == torch.float16:  # below 6e-5 its numbers are 2⁻²⁴ apart, unlike fp32's
        below = torch.floor(value * 2.0**24)
        small = (below + (value * 2.0**24 - below > random * 2.0**-16)) * 2.0**-24
        rounded = torch.where(value.abs() < info.tiny, small, rounded)
    return rounded.to(dtype)


def _apply(outs, thetas, start, half, shift: Shift, stream, mask, state, stochastic):
    """out ← θ + a·m⊙z for the draws from `start` on: (draws,) elements of either half of a tensor.

    `outs` and `thetas` are each (first half, second half) of a tensor, as flat views, or on a GPU
    as rows of `ROW` elements. The second half begins `half` elements after the first.
    """
    draw = torch.arange(thetas[0].numel(), dtype=torch.int32, device=thetas[0].device)
    draw = draw.view(thetas[0].shape) + start
    words = threefry(draw, stream, shift.key0, shift.key1)
    for i, z in enumerate(normal_pair(*words)):
        theta, out, element = thetas[i], outs[i], draw + i * half
        n = theta.shape[0]  # the second half of an odd number is one shorter
        m = mask(theta, element[:n], state)
        value = shifted(theta, shift.a, m, z[:n])
        if stochastic and out.dtype.itemsize < 4:  # 32 bits are rounded to nearest
            value = round_stochastically(value, out.dtype, words[i][:n], words[1 - i][:n])
        out.copy_(value)  # rounds to nearest


# Draws of a chunk, without a compiler. A chunk needs some 10 temporaries of its size, and on a GPU
# 200 launches.
CHUNK, GPU_CHUNK = 1 << 16, 1 << 22
ROW = 16  # if rows have a fixed length, Triton reads and writes 16 bytes at once


class Halves:
    """Views of a contiguous tensor for `apply`: flat, and its two halves.

    Making views takes longer than the loop over a small tensor, so they are kept.
    """

    def __init__(self, tensor: Tensor):
        assert tensor.is_contiguous(), "its elements are not in order"
        self.tensor = tensor.detach()
        self.flat = flat = self.tensor.view(-1)
        n = flat.numel()
        assert n <= MAX_ELEMENTS, f"{n} elements of one tensor; the noise has {MAX_ELEMENTS}"
        self.half = (n + 1) // 2  # where the second half begins
        self.half_word = word(self.half)
        rows = flat.is_cuda and n % (2 * ROW) == 0
        halves = flat[: n // 2], flat[self.half :]  # without the middle of an odd number
        self.pair = [half.view(-1, ROW) if rows else half for half in halves]
        self.kind = flat.dtype, flat.device, rows


@functools.cache
def _fused(mask, stochastic: bool, in_place: bool, kind: tuple, state: tuple):
    """`_apply` as one compiled loop, for the halves of all tensors of a kind, whatever their size.

    `kind`: that of `Halves`. `state`: (dtype, device, shape), in which None is any size above 1.
    The loop is made at first use, which takes seconds. torch.compile would make the same one, but
    it checks at every call that the loop fits. That takes longer than the loop over a small tensor.
    Here nobody checks, so a mask must not branch on a size: ValueError.
    """
    import torch._inductor  # takes time, and only this needs it
    from torch.fx.experimental.proxy_tensor import make_fx

    dtype, device, rows = kind
    state_dtype, state_device, shape = state

    def loop(a, key0, key1, half, stream, state, *halves):
        # what is asserted of a size becomes a constant of the loop, which is meant here
        assert not rows or halves[0].shape[1] == ROW
        assert all(n in (None, size) for n, size in zip(shape, state.shape, strict=True))
        shift = Shift(a, key0, key1)
        _apply(halves[-2:], halves[:2], 0, half, shift, stream, mask, state, stochastic)
        return ()

    # torch 2.13 keeps compiled loops on disk and forgets for which vectors: a loop for AVX-512 that
    # is taken up by an AVX2 process leaves half of the elements out, without an error
    vectors = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())
    options = {
        "triton.autotune_pointwise": False,  # its trials would copy what is written
        "assume_aligned_inputs": True,  # those that are not are copied for the call
        "size_asserts": False,  # `apply` and `Halves` make them; a third of a call
        "cpp.enable_floating_point_contract_flag": "fast",  # multiply-add in one
        "cpp.dynamic_threads": True,  # as many threads as there are at the call
        # the compiler traces an expression anew wherever it is read, unless it has so many
        # operations; by default 30, which takes a third longer to compile
        "realize_opcount_threshold": 16,
        "max_fusion_size": 512,  # by default 64, which would split R-MeZO's loop
        "cpp.simdlen": vectors,
    }

    # an example; its sizes differ, as the compiler takes equal ones for always equal
    size = (1 << 16, ROW) if rows else (1 << 20,)
    halves = [torch.empty(size, dtype=dtype, device=device) for _ in range(2 if in_place else 4)]
    size = [100 + i if n is None else n for i, n in enumerate(shape)]
    example = torch.empty(size, dtype=state_dtype, device=state_device)
    words = *Shift.of(0.0, 0), word(0), word(0)
    traced = make_fx(loop, tracing_mode="symbolic")(*words, example, *halves)
    sizes = traced.shape_env
    if asked := {str(sizes.simplify(guard.expr)) for guard in sizes.guards} - {"True"}:
        raise ValueError(f"a mask may compute with a size, but not ask for one: {min(asked)}")
    inputs = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
    whole = torch.fx.GraphModule(traced, traced.graph)  # without `shape_env`, it can be cached
    with _bitcasts_of_vectors() if device.type == "cpu" else nullcontext():
        return torch._inductor.compile(whole, inputs, options)


@contextmanager
def _bitcasts_of_vectors():
    """Inside, `view` between fp32 and int32 compiles to one operation on a CPU's vectors.

    torch 2.13 compiles it to a loop over their elements, and these take half of the time.
    """
    from torch._inductor.codegen.cpp import CppVecOverrides
    from torch._inductor.virtualized import V

    slow, names = CppVecOverrides.to_dtype_bitcast, {torch.float32: "float", torch.int32: "int32_t"}

    def bitcast(x, dtype, source):
        if not {dtype, source} <= names.keys() or V.kernel._get_num_vectors(source) > 1:
            return slow(x, dtype, source)
        return f"at::vec::cast<{names[dtype]}, {names[source]}>({x})"

    CppVecOverrides.to_dtype_bitcast = staticmethod(bitcast)
    try:
        yield
    finally:
        CppVecOverrides.to_dtype_bitcast = staticmethod(slow)


def apply(
    theta: Halves, shift: Shift, stream: Tensor, mask, state: Tensor, *,
    out: Halves | None = None, stochastic: bool = False, fused: bool = False,
) -> None:  # fmt: skip
    """out ← θ + a·m⊙z, or without `out` in place, θ ← θ + a·m⊙z.

    `out`: of θ's size, dtype and device, without a common element. `stream`: `word(number)`.
    `mask(theta, element, state)`: that of a rule of masks.py.
    `stochastic`: 16-bit results are rounded up or down at random, as updates are; otherwise, as
    probes are, to nearest.
    `fused`: one compiled loop, as fast as memory allows. Otherwise, and in fp64, the same lines run
    in chunks, ten times slower. The two agree to the last bit or two of z.
    """
    out = theta if out is None else out
    n, half = theta.flat.numel(), theta.half
    assert out.kind == theta.kind and out.flat.numel() == n, "out is not of θ's kind and size"
    fused = fused and n > 1 and theta.flat.dtype != torch.float64
    if fused:
        # the size of a small state is a constant of the loop; a stored mask may have any size
        few, state = state.numel() <= 4, state.contiguous()
        shape = tuple(size if few or size < 2 else None for size in state.shape)
        kind = state.dtype, state.device, shape
        loop = _fused(mask, stochastic, out is theta, theta.kind, kind)
        outs = () if out is theta else out.pair
        loop(*shift, theta.half_word, stream, state, *theta.pair, *outs)
    chunk = GPU_CHUNK if theta.flat.is_cuda else CHUNK
    for start in range(n // 2 if fused else 0, half, chunk):  # fused: the middle of an odd n
        ends = [(start, min(start + chunk, half)), (half + start, min(half + start + chunk, n))]
        outs, thetas = ([whole.flat[a:b] for a, b in ends] for whole in (out, theta))
        _apply(outs, thetas, start, half, shift, stream, mask, state, stochastic)
