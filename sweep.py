"""One pass over the weights: noise, mask, add and round, fused. The kernel of the training path.

    out ← θ + a·m⊙z     for the probes two outs, a = ±ε; for the update out is θ itself, a = −ηg

The functions of zo.py are the kernel: `Sweep` compiles them, with a rule's mask (masks.py), to some
1.6 ns per weight on two CPU cores, where `torch.randn` alone takes 3.6 (torch 2.13 makes two loops
of it, with radius and angle written between them). Without a compiler the same lines run in small
chunks, ten times slower. θ is read once for both probes and z is never stored.

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

from zo import MAX_ELEMENTS, PAIR, draw_of, normal, normal_pair, random_words, shifted


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
