"""One pass over the weights: noise, mask, add and round, fused. The kernel of the training path.

    out ← θ + a·m⊙z     for the probes two outs, a = ±ε; for the update out is θ itself, a = −ηg

The functions of zo.py are the kernel: `Sweep` compiles them, with a rule's mask (masks.py), to some
1.6 ns per weight on two CPU cores, where `torch.randn` alone takes 3.6 (torch 2.13 makes two loops
of it there, with radius and angle written between them; for a GPU one Triton kernel, without
temporaries). Without a compiler the same lines run in small chunks, ten times slower. θ is read
once for both probes and z is never stored.

    code       meaning
    words      the two random words of a draw: z comes of them, and so does the noise of rounding
    halves     of blocks of 128 elements the first and the last 64, which share their draws
    index      which elements, where they are picked ones: an embedding's rows, [Q]'s few

Not in the papers: updates of 16-bit weights are rounded stochastically (`round_stochastically`).
"""

import math
import warnings

import torch
from torch import Tensor

from zo import HALF, MAX_ELEMENTS, draw_of, normal, normal_pair, random_words, shifted

ARITHMETIC = 4  # raise it when a log gives other bits, or config.json means another thing


def round_stochastically(value: Tensor, dtype: torch.dtype, high: Tensor, low: Tensor) -> Tensor:
    """fp32 `value` to a neighbour in fp16 or bf16, up or down, so that the mean is `value`.

    An update far below the spacing of θ's dtype is lost by rounding to nearest, every time; this
    way it arrives on average. Uniform bits are added below `dtype`'s last place (fp32's last 16 for
    bf16, 13 for fp16), and the sum is cut there: it carries with the right probability. They are
    the low bytes of z's own words; dropping them moves one z in 1,000 by over 1e-5, so rounding is
    all but independent of z, without a second draw.
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


def draw_at(index: Tensor, seed, stream) -> list:
    """[(z, elements, words)] of any elements of tensor `stream`, `index`: (n,) int64.

    z (n,) fp32 is [S]'s z_i at those elements; words: two of (n,) int64, each below 2³².
    """
    words = random_words(seed, stream, draw_of(index))
    return [(normal(index, *words), index, words)]


def draw_blocks(start: Tensor, like: Tensor, seed, stream) -> list:
    """[(z, elements, words)] of both halves of whole blocks from element `start` on: the z of
    `draw_at`, each tensor (blocks, 64) like `like`.

    Each draw serves both halves. The second has the words the other way round, so that other bits
    round it (in the rest of a tensor that fills no block, e and e + 64 share theirs).
    """
    assert like.stride() == (2 * HALF, 1)  # so that a compiled kernel may move 16 bytes at a time
    draw = torch.arange(like.numel(), device=like.device).view(-1, HALF) + (start >> 1)
    words = random_words(seed, stream, draw)
    cosine, sine = normal_pair(*words)
    element = draw + (draw >> 6 << 6)
    return [(cosine, element, words), (sine, element + HALF, words[::-1])]


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
        assert m.dtype == torch.bool, f"a rule's mask is boolean, not {m.dtype}"
        for out, a in zip(outs, coefficients, strict=True):
            value, dtype = shifted(theta[half], a, m, z), out[half].dtype
            if stochastic and dtype.itemsize < 4:  # 32-bit weights hear every update
                value = round_stochastically(value, dtype, *words)
            out[half].copy_(value)  # rounds to nearest


def halves(flat: Tensor) -> list[Tensor]:
    """Of whole blocks of 128 the first 64 and the last: two times (blocks, 64)."""
    return [half.data for half in flat.view(-1, 2, HALF).unbind(1)]  # `.data`: see `alone`


def alone(flat: Tensor) -> list[Tensor]:
    """The tensor itself; without its base (`.data`), views of all kinds share one compilation."""
    return [flat.data]


class Sweep:
    """`_sweep` as a kernel: compiled to fused loops, or eager. In chunks, which bounds temporaries.

    Compiled and eager agree to the last bit or two of z (the fused cos and log round differently),
    so whether a run was compiled belongs to its record; how it was chunked changes nothing.
    """

    # elements: eager temporaries of 8 bytes stay in L2, compiled ones of 4 in L3; on a GPU eager
    # ones take a few hundred MB, compiled ones nothing, and a launch costs more
    CHUNK = {"cpu": (1 << 16, 1 << 22), "cuda": (1 << 22, 1 << 28)}  # (eager, compiled)

    def __init__(self, compiled: bool = False):
        self.kernel, self.worked = None, False
        if compiled:
            torch._dynamo.config.recompile_limit = 256  # a few per rule, dtype, GPU; default 8
            options = {
                "triton.autotune_pointwise": False,  # its trials copy what is written
                # parallel, however small the first tensor is: the disk cache does not ask its size
                "cpp.dynamic_threads": True,
            }
            self.kernel = torch.compile(_sweep, dynamic=True, fullgraph=True, options=options)

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
        numel, device = theta.numel(), theta.device
        assert index is not None or numel <= MAX_ELEMENTS, f"{numel} elements exceed the counter"
        whole = 0 if index is not None else numel // (2 * HALF) * (2 * HALF)
        chunk = self.CHUNK["cuda" if theta.is_cuda else "cpu"][self.compiled]
        for start in (*range(0, whole, chunk), *range(whole, numel, chunk)):
            if start < whole:
                cut, end, at, its = halves, min(start + chunk, whole), None, stream
                first = torch.full((), start, device=device)  # no copy from the host
            else:  # picked elements, or what the blocks left over
                cut, end, first = alone, min(start + chunk, numel), None
                at = torch.arange(start, end, device=device) if index is None else index[start:end]
                its = stream[start:end].long() if stream.dim() else stream
            own = cut(theta[start:end])
            into = [own if out is theta else cut(out[start:end]) for out in outs]
            self._run(into, coefficients, own, at, first, seed, its, mask, state, stochastic)

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
