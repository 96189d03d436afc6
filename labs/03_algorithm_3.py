"""Lab 3. Algorithm 3, as printed and as meant.

[S] moves the small weights of each layer. Its Algorithm 3 is to find them. It says "if θ ≤ h then
θ = 1". The threshold h is the 25th percentile of |θ| here, and a quarter of the weights should
move. (Appendix C.2 takes the percentile of the sparsity, which would be the 75th; masks.py says why
that cannot be meant.) Run this file and see how many do. Then mend `get_mask`.

[S] §3.3 also names a mask with one bit for each weight. A byte then holds eight weights. Weight j
is bit j % 8 of byte j // 8. Bit 0 is the lowest: it counts 1, and bit 7 counts 128. So far `pack`
takes a whole byte for each weight. Mend it, too. The project's `masks.PackedMask` reads your bytes.
"""

import lab
import torch

import masks
import zo

N, DENSITY = 80_000, 0.25


def get_mask(theta, h):
    """[S] Algorithm 3: which weights move, as booleans of θ's shape."""
    # ---- your code: at most five lines
    return theta <= h
    # ----


def pack(mask):
    """The mask (n,), n a multiple of 8, as bytes: a uint8 tensor (n / 8,)."""
    # ---- your code: at most five lines
    return mask.to(torch.uint8)
    # ----


def measure():
    """(θ, your mask, the mask that is meant, what the project reads in your bytes, your bytes,
    how many weights `get_mask` has changed).
    """
    theta = 0.02 * zo.gaussian(3, 0, (N,))
    order = theta.abs().argsort()
    meant = torch.zeros(N, dtype=torch.bool)
    meant[order[: int(DENSITY * N)]] = True
    lent = theta.clone()
    mask = get_mask(lent, theta.abs()[order[int(DENSITY * N) - 1]])
    lab.tensor("get_mask", mask, theta.shape, torch.bool)
    packed = lab.tensor("pack", pack(meant)).flatten()
    element = torch.arange(min(N, 8 * packed.numel()), dtype=torch.int32)
    read = masks.PackedMask.mask(theta, element, packed.to(torch.uint8))
    return theta, mask, meant, read, packed, int((lent != theta).sum())


def numbers(found):
    theta, mask, meant, read, packed, written = found
    large, small = int((mask & ~meant).sum()), int((meant & ~mask).sum())
    bits = (read != meant[: len(read)]).sum() + N - len(read)
    which = "Small weights are left out. Negative ones move, too, and so does the one at |θ| = h."
    if large:
        which = "Weights above the threshold move. Only those of |θ| ≤ h should."
    if mask[theta < 0].all():
        which = "All negative weights move, however large. Small is a matter of |θ|."
    back = "`get_mask` wrote into θ. The result is a new tensor, m: that θ becomes 1 is a misprint."
    byte = "Eight weights share a byte. Make rows of eight, shift each weight, add, end in uint8."
    order = "A byte is not the mask of its eight weights. The first weight is the lowest bit."
    return [
        lab.near("share of the weights that move", float(mask.float().mean()), 0.25, 1e-4, which),
        lab.near("weights that move and should not", large, 0, 0, which),
        lab.near("weights that should move and do not", small, 0, 0, which),
        lab.near("weights that `get_mask` has changed", written, 0, 0, back),
        lab.near("bytes of the packed mask for each weight", packed.nbytes / N, 0.125, 0, byte),
        lab.near("weights whose bit is not their mask", int(bits), 0, 0, order),
    ]


def picture(found, figure):
    theta, mask, meant, read, packed, _ = found
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for values, label, grey in ((theta, "all weights", "0.8"), (theta[mask], "move", "0.3")):
        left.hist(values.numpy(), bins=80, range=(-0.08, 0.08), color=grey, label=label)
    left.set(xlabel="θ", ylabel="weights", title=f"{float(mask.float().mean()):.1%} move")
    left.legend()
    bits = torch.stack([packed[:32].to(torch.uint8) >> bit & 1 for bit in range(8)], dim=1)
    right.imshow(bits.flip(1).numpy(), aspect="auto", cmap="gray_r", vmin=0, vmax=1)
    right.set(xlabel="bit", ylabel="byte", title="the first 32 bytes: black is 1", xticks=range(8))
    right.set_xticklabels(range(7, -1, -1))


if __name__ == "__main__":
    lab.main()
