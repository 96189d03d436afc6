"""Lab 1. Two points see the slope.

Zeroth-order training has no gradient. It draws a direction z and computes the loss at two points,
θ + ε z and θ − ε z. Their difference gives the slope along z. The estimate of the gradient is this
slope times z ([S] §2.2.1, and eq. 2 without its mask).

How much of the gradient does the estimate see? The measure is the cosine between the estimate and
the true gradient. For d weights it is about √(2/πd) on average. At d = 10 that is 0.25. For a model
of seven billion weights it is 0.00001. But the cosine is never negative. So a step against the
estimate begins downhill.

Write the estimate. The check takes the true gradient from autograd.
"""

import math

import lab
import torch

import zo

SIZES, DRAWS, EPS = (10, 100, 1000, 10_000), 400, 1e-3


def estimate(loss, theta, z, eps):
    """The gradient of `loss` at `theta` as two points see it: a tensor like z.

    `loss(theta)` is a number. `theta` and `z` are vectors of d numbers.
    """
    # ---- your code: at most five lines
    return torch.zeros_like(z)
    # ----


def problem(d):
    """(loss, θ): logistic regression on 32 random examples, in fp64."""
    examples = zo.gaussian(1, 0, (32, d)).double()
    theta = zo.gaussian(1, 1, (d,)).double() / math.sqrt(d)
    signs = torch.tensor([1.0, -1.0]).repeat(16).double()
    return lambda at: torch.nn.functional.softplus(-signs * (examples @ at)).mean(), theta


def measure():
    """{d: (cosine of every draw, slope seen, true slope, how far θ was moved)}."""
    found = {}
    for d in SIZES:
        loss, theta = problem(d)
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta), theta)
        theta, before = theta.detach(), theta.detach().clone()
        noise = zo.gaussian(2, 0, (DRAWS, d)).double()
        guess = [estimate(loss, theta, z.clone(), EPS) for z in noise]
        guess = torch.stack([lab.tensor("estimate", one, (d,)) for one in guess])
        cosine = torch.cosine_similarity(guess, gradient[None], dim=1)
        seen = (guess * noise).sum(1) / (noise * noise).sum(1)  # the factor before z
        found[d] = cosine, seen, noise @ gradient, float((theta - before).abs().max())
    return found


def numbers(found):
    moved = max(float(moved) for *_, moved in found.values())
    back = "`estimate` wrote into θ and left it elsewhere. Compute with new tensors."
    listed = [lab.near("how far θ was moved", moved, 0, 1e-9, back)]
    for d, (cosine, *_) in found.items():
        target = math.sqrt(2 / (math.pi * d))
        hint = "The estimate is a number times z. The number is the slope along z."
        if float(cosine.mean()) < 0:
            hint = "The estimate points downhill. A gradient points uphill: l⁺ comes first."
        name = f"mean cosine with the gradient, d = {d:,}"
        listed.append(lab.near(name, float(cosine.mean()), target, 0.1 * target, hint))
    _, seen, true, _ = found[SIZES[0]]
    ratio = float((seen @ true) / (true @ true))  # least squares
    length = "The direction is right and the length is not. The factor before z is the slope."
    if min(abs(ratio - 2), abs(ratio - 0.5)) < 0.01:
        length = "The slope is double or half. θ + ε z and θ − ε z are 2ε apart."
    below = sum(int((cosine < 0).sum()) for cosine, *_ in found.values())
    bend = "From θ to one side, the loss also bends. Go to both sides: a bend is the same on both."
    return [
        *listed,
        lab.near("slope seen over true slope, d = 10", ratio, 1, 1e-3, length),
        lab.near("draws with a negative cosine, of 1,600", below, 0, 0, bend),
    ]


def picture(found, figure):
    left, right = figure.subplots(1, 2)
    means = [float(cosine.mean()) for cosine, *_ in found.values()]
    left.loglog(SIZES, [math.sqrt(2 / (math.pi * d)) for d in SIZES], "-", label="√(2/πd)")
    left.loglog(SIZES, means, "s", color="0.45", label="yours, the mean of 400 draws")
    left.set(xlabel="d, how many weights", ylabel="cosine with autograd's gradient")
    left.legend()
    for (d, (cosine, *_)), style in zip(list(found.items())[:2], ("-", "--"), strict=True):
        right.hist(cosine.tolist(), bins=40, range=(-1, 1), histtype="step", linestyle=style,
                   label=f"d = {d}")  # fmt: skip
    right.set(xlabel="cosine of one draw", ylabel="draws", xticks=(-1, -0.5, 0, 0.5, 1))
    right.legend()


if __name__ == "__main__":
    lab.main()
