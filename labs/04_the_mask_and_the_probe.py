"""Lab 4. The mask must not see the probe.

[S] Algorithm 1 adds ε ẑ to the weights, takes 2 ε ẑ away, and adds ε ẑ again (ẑ = m ⊙ z). Then
every weight is where it was. [S] §3.3 says what can go wrong: the mask depends on the weights, and
the probe changes the weights. Take a weight just below the threshold. The probe pushes it above.
Now it is outside the mask. So its ε z is never taken away.

How many weights leave the mask? Guess before you run. The standard deviation of the weights is
0.02, as in a real model, and ε is [S]'s 1e-3. A quarter of the weights moves.

`probe` takes the mask again at each of its three steps. Mend it: every weight must come back. As it
is, twice as many are not restored as +ε ẑ pushes out. Why? The last number is that of a hundred
probes without an update.

Your mended `probe` keeps one mask through all three steps, as Algorithm 1 does. To keep it takes
memory. [S] §3.3 has a way that keeps nothing: it takes the mask anew in each forward pass, from a θ
that nobody has written to. Lab 5 goes that way.
"""

import math

import lab
import torch

import zo
from masks import get_mask, threshold

N, SPREAD, EPS, CYCLES = 100_000, 0.02, 1e-3, 100


def probe(theta, h, z, eps):
    """(the weights at l⁺, the weights at l⁻, the weights after); h is the mask's threshold.

    They are three tensors of θ's dtype.
    """
    # ---- your code: at most five lines
    plus = theta + eps * get_mask(theta, h) * z
    minus = plus - 2 * eps * get_mask(plus, h) * z
    after = minus + eps * get_mask(minus, h) * z
    # ----
    return plus, minus, after


def left_by_theory():
    """The share of the mask that one probe pushes over the threshold, by calculus.

    The density of weights at h is φ(h/σ)/σ. A weight leaves on one side if it is within ε z of h,
    and the outward part of z, max(z, 0), is 1/√2π on average. There are two sides.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    h = float(normal.icdf(torch.tensor(0.625)))  # in units of σ: a quarter lies within ± h
    phi = math.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    return 2 * phi / SPREAD * EPS / math.sqrt(2 * math.pi) / 0.25


def measure():
    theta = SPREAD * zo.gaussian(4, 0, (N,)).double()
    h = threshold(theta, 0.25)
    noise = [zo.gaussian(zo.step_seed(4, t), 1, (N,)).double() for t in range(CYCLES)]
    points = probe(theta.clone(), h, noise[0].clone(), EPS)
    points = [lab.tensor("probe", point, theta.shape, theta.dtype) for point in points]
    inside, at = [1.0], theta
    for z in noise:
        at = probe(at.clone(), h, z.clone(), EPS)[2]
        inside.append(float((at.abs() <= h + 1e-12).sum() / (0.25 * N)))
    return theta, h, noise[0], points, inside


def numbers(found):
    theta, h, z, (plus, minus, after), inside = found
    mask = theta.abs() <= h
    moved = theta + EPS * mask * z
    left = float((moved[mask].abs() > h).double().mean())
    miss = (after - theta).abs()
    lost = (miss > 1e-9)[mask].double().mean()
    wrong = float((plus - moved).abs().max() + (plus + minus - 2 * theta).abs().max()) / EPS
    hint = "Weights that left the mask keep their ε z. All three steps need one mask, that of θ."
    if wrong <= 1e-6:
        hint = "Both points are right. The third step is not: it adds ε ẑ, with the same mask."
    there = "The points are not θ + ε ẑ and θ − ε ẑ. In ẑ = m ⊙ z, m is the mask of θ itself."
    if len({point.data_ptr() for point in (plus, minus, after)}) < 3:
        there = "`probe` must return three tensors. Here a later point was written over an earlier."
    return [
        lab.fact("share of the mask that +ε ẑ pushes out", left),
        lab.fact("the same by calculus", left_by_theory()),
        lab.near("share of the mask that is not restored", float(lost), 0, 0, hint),
        lab.near("largest miss, in units of ε", float(miss.max()) / EPS, 0, 1e-6, hint),
        lab.near("largest error of the two points, in ε", wrong, 0, 1e-6, there),
        lab.near("share of the mask left after 100 probes", inside[-1], 1, 0, hint),
    ]


def picture(found, figure):
    theta, h, _, (*_, after), inside = found
    left, right = figure.subplots(1, 2)
    mask = theta.abs() <= h
    left.plot(theta[mask][::10].tolist(), ((after - theta)[mask][::10] / EPS).tolist(), ".", ms=3)
    for edge in (-float(h), float(h)):
        left.axvline(edge, color="0.45", lw=0.8)
    left.set(xlabel="θ, and ± h", ylabel="θ after the probe − θ, in ε", ylim=(-5, 5))
    left.set_xticks((-0.006, -0.003, 0, 0.003, 0.006))
    right.plot(inside)
    right.set(xlabel="probes, without an update", ylabel="share of the mask left", ylim=(0, 1.05))


if __name__ == "__main__":
    lab.main()
