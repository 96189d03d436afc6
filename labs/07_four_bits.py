"""Lab 7. Four bits and one thousandth.

[Q] trains a thousandth of the weights and keeps the rest in four bits (§3.5): w = dense + sparse.
[Q]'s own codes are k-means's. Here, as in the project's default NF4, a code names one of 16 levels,
and a block of 64 weights shares a scale, its largest |w|.
`quant.nf4_encode` makes the codes and scales of a tensor, `quant.nf4_decode` makes weights of them.

Write `split` and `read`. The weights that move leave first, and a 0 stands in their places. So they
keep all their bits, and a large one does not stretch the scale of its block. `read` puts them back.

Why not train the codes? The check probes them, too: weights ± ε z are put into four bits again. The
picture compares them with your values, for many ε. A small ε changes hardly any code. A large one
leaves the straight part of the loss. And an update is far smaller than the gap between two levels:
it changes about one code in 700. The other 699 weights have learnt nothing.
"""

import lab
import torch

import quant
import zo

ROWS, COLUMNS, K, SEEDS = 128, 256, 33, 24
ALL_EPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)


def split(weight, places):
    """(codes, scales, values): `values` are those at `places`, `nf4_encode` makes the others.

    `weight` is flat, (n,) fp32, and a copy of your own.
    """
    # ---- your code: at most five lines
    codes, scales = quant.nf4_encode(weight)
    return codes, scales, weight[places]
    # ----


def read(codes, scales, places, values):
    """The whole weight, (n,) fp32: the dense part, and `values` at `places`."""
    # ---- your code: at most five lines
    return quant.nf4_decode(codes, scales)
    # ----


def problem():
    """(weight, places, loss): a layer of 32,768 weights; 33 move, and half of those are large."""
    weight = 0.02 * zo.gaussian(7, 0, (ROWS * COLUMNS,))
    places = torch.arange(K) * 992 + 17
    weight[places[::2]] *= 10
    words = 4 * zo.gaussian(7, 1, (COLUMNS, 16)).double()
    last = zo.gaussian(7, 2, (16, ROWS)).double()

    def loss(flat):
        logits = last @ torch.tanh(flat.double().view(ROWS, COLUMNS) @ words)
        return torch.nn.functional.cross_entropy(logits.T, torch.arange(16))

    return weight, places, loss


def correlation(loss_at, slope, eps):
    """Of the slopes that two points show with the true ones, over the seeds."""
    noise = [zo.gaussian(zo.step_seed(7, s), 3, slope.shape) for s in range(SEEDS)]
    seen = [float(zo.projected_grad(loss_at(eps * z), loss_at(-eps * z), eps)) for z in noise]
    both = torch.tensor([seen, [float(slope @ z.double()) for z in noise]])
    return float(torch.corrcoef(both)[0, 1].nan_to_num())  # no spread: no correlation


def measure():
    weight, places, loss = problem()
    dense = weight.index_fill(0, places, 0)
    meant = quant.nf4_decode(*quant.nf4_encode(dense))
    meant[places] = weight[places]
    leaf = meant.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    found = split(weight.clone(), places)
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise SystemExit("Not yet. `split` must return codes, scales and values.")
    codes, scales, values = found
    lab.tensor("split, as values,", values, (K,), torch.float32)
    got = lab.tensor("read", read(codes, scales, places, values), weight.shape)

    ways = {
        "values": (lambda dv: loss(read(codes, scales, places, values + dv)), gradient[places]),
        "codes": (lambda dw: loss(quant.nf4_decode(*quant.nf4_encode(meant + dw))), gradient),
    }
    curves = {name: {e: correlation(*way, e) for e in ALL_EPS} for name, way in ways.items()}
    update = 1e-5 * zo.gaussian(7, 4, weight.shape)
    heard = (quant.nf4_encode(dense + update)[0] != quant.nf4_encode(dense)[0]).float().mean()
    size = codes.numel() / 2 + scales.nbytes + values.nbytes + 4 * K  # two codes to a byte
    return weight, places, values, got, meant, curves, heard, size


def numbers(found):
    weight, places, values, got, meant, curves, heard, size = found
    rest = torch.ones_like(weight).index_fill(0, places, 0).bool()
    error, least = (float((w - weight)[rest].square().mean().sqrt()) / 0.02 for w in (got, meant))
    kept = "`values` are not the weights at `places`, in fp32."
    kept += " Take them before the 0 is there." if not values.any() else ""
    back = "The weights that move come out of the codes, rounded. `read` must put `values` back."
    first = "A large weight that moves stretches its block's scale. Put a 0 there, then encode."
    return [
        lab.near("values that `split` loses", int((values != weight[places]).sum()), 0, 0, kept),
        lab.near("weights that `read` loses", int((got != weight)[places].sum()), 0, 0, back),
        lab.near("error of the rest, of their spread", error, least, 1e-6, first),
        lab.near("bytes for each weight", size / len(weight), 0.5706, 1e-3,
                 "Codes of 4 bits; in 32 bits a scale for each block of 64, the values and their"
                 " places. (In a run a scale takes 8 bits: quant.py has 0.5159.)"),
        lab.near("values: correlation with the slope", curves["values"][1e-3], 1, 1e-3, back),
        lab.fact("codes: correlation at their best ε", max(curves["codes"].values())),
        lab.fact("share of codes that an update of 1e-5 changes", float(heard)),
    ]  # fmt: skip


def picture(found, figure):
    left, right = figure.subplots(1, 2)
    for name, curve in found[5].items():
        left.semilogx(list(curve), list(curve.values()), marker=".", label=f"ε z on the {name}")
    left.set(xlabel="ε", ylabel="correlation with the slope", ylim=(-0.1, 1.05))
    left.legend()
    written = {"MeZO, in place,\nfour times 13 GB": 8, "S-MeZO here,\n13 GB once": 2,
               "SensZOQ,\nthe values": found[2].nbytes / len(found[0])}  # fmt: skip
    mb = [6476 * size for size in written.values()]  # of Llama-2-7B's 6.476e9 weights in matrices
    right.bar(list(written), mb, color=["0.3", "0.5", "0.7"], log=True)
    right.set(ylabel="MB of weights that a step writes at 7B")


if __name__ == "__main__":
    lab.main()
