"""Lab 2. Fewer directions, fewer steps.

[S] Theorem 1 says what a mask gains. Where d̂ weights move, ‖m ⊙ ∇ℓ‖² falls to σ² in about d̂ L / σ²
steps. ℓ is the loss here, L its largest curvature, and σ² the target, 0.04. But a mask alone saves
no step: the learning rate η must grow, too. The theorem's η is in its proof (appendix I, before
eq. 24; eq. 20's square is a slip). So far `rate` is that of 32 weights. Make it that of d̂ weights.
Then the steps grow like d̂ + 4.

A reviewer asked ([S] on OpenReview): "Would you get the best convergence if you update only 1
parameter?" Let a mask hold k of d weights, and a share c of ‖∇ℓ‖². So k is what Theorem 1 calls d̂.
Let the loss be a round bowl, with curvature L in every direction. The theorem's η is safe for every
loss; on the bowl the best η is 1/(L (k + 2)). A step then lowers the loss by
c ‖∇ℓ‖² / (2L (k + 2)) on average. A step without a mask has k = d and c = 1. Write `gain`: what a
step with the mask gains, divided by what a step without it gains. With all weights it is 1. The
check measures it for four masks. Then answer the reviewer: look at the first steps of the picture,
and at the last.
"""

import lab
import numpy as np
import torch

import zo

L, D, SIZES, TARGET, LIMIT = 1.0, 32, (4, 8, 16, 32), 0.04, 3000


def rate(d_hat):
    """Theorem 1's η where d̂ weights move. So far it is that of D = 32 weights, for every d̂."""
    # ---- your code: at most five lines
    return 1 / (4 * (D + 4) * L)
    # ----


def gain(k, c, d):
    """What a step with a mask of k weights and share c gains, over one with all d weights."""
    # ---- your code: at most five lines
    return c
    # ----


def estimate(slope_of, mask, z):
    """The gradient that two points see of a quadratic: their slope along m ⊙ z, times m ⊙ z."""
    return (slope_of * mask * z).sum(-1, keepdim=True) * mask * z


def steps_to_target(d_hat):
    """‖m ⊙ ∇ℓ‖² after every step, a mean over 16 runs, until it is σ² (0.04).

    A quadratic with d̂ curvatures, from L down to L/512. All directions share a loss of 1 equally.
    """
    curvature = L * 2.0 ** (-9 * (torch.arange(d_hat).double() + 0.5) / d_hat)
    theta = (2 / (d_hat * curvature)).sqrt().expand(16, -1)
    norms = []
    for t in range(LIMIT):
        norms.append(float((curvature * theta).square().sum(-1).mean()))
        if not TARGET < norms[-1] < 1e9:
            break
        z = zo.gaussian(zo.step_seed(2, t), 0, theta.shape).double()
        theta = theta - rate(d_hat) * estimate(curvature * theta, torch.ones(d_hat), z)
    return norms


def one_step():
    """{gradients in the mask: (k, c, gain, losses)} of a round bowl with 200 weights."""
    d, rows = 200, 8000
    i = torch.arange(d)
    theta = (i + 1).double() ** -0.8  # ∇ℓ = L θ: a few gradients are large
    kinds = {"1 middling": i == 30, "1 largest": i == 0, "10 largest": i < 10, "all 200": i >= 0}
    z, start, runs = zo.gaussian(2, 1, (rows, d)).double(), theta @ theta, {}
    for name, mask in kinds.items():
        k = int(mask.sum())
        after = theta - estimate(theta, mask, z) / (k + 2)
        losses, at = [1.0, float(after.square().sum(-1).mean() / start)], after[:8]
        for t in range(1, 600):
            at = at - estimate(at, mask, z[8 * t : 8 * t + 8]) / (k + 2)
            losses.append(float(at.square().sum(-1).mean() / start))
        runs[name] = k, float((theta[mask] ** 2).sum() / start), losses
    whole = 1 - runs["all 200"][2][1]
    return {n: (k, c, (1 - losses[1]) / whole, losses) for n, (k, c, losses) in runs.items()}


def measure():
    return {d_hat: steps_to_target(d_hat) for d_hat in SIZES}, one_step()


def numbers(found):
    runs, masked = found
    steps = [len(norms) for norms in runs.values()]
    exponent = np.polyfit(np.log(np.array(SIZES) + 4), np.log(steps), 1)[0]
    hint = "The rate falls with d̂, but not like 1 / (d̂ + 4). η stands before eq. 24."
    if rate(8) == rate(32):
        hint = "The rate is that of 32 weights, whatever the mask. Theorem 1's η falls with d̂."
    moved = "`rate` was right for 32 weights, and must stay so. Only what depends on d̂ changes."
    fast = "A run blew up, or did not arrive in 3,000 steps. η stands before eq. 24."
    more = "Put k and c into the formula, then d and 1 in their place. Divide the two."
    listed = [
        lab.near("runs that arrive, of 4", sum(n[-1] <= TARGET for n in runs.values()), 4, 0, fast),
        lab.near("exponent p: steps ~ (d̂ + 4)^p", exponent, 1, 0.15, hint),
        lab.near("rate(32) over Theorem 1's η", rate(D) * 4 * (D + 4) * L, 1, 1e-6, moved),
    ]
    for name, (k, c, target, _) in masked.items():
        within = target / 10 if k < 200 else 1e-9  # with all weights, the gain is 1 by its meaning
        listed.append(lab.near(f"gain, mask of {name}", gain(k, c, 200), target, within, more))
    return listed


def picture(found, figure):
    runs, masked = found
    left, right = figure.subplots(1, 2)
    styles = (("-", "0.0"), ("--", "0.3"), ("-.", "0.5"), (":", "0.2"))
    for (d_hat, norms), (line, grey) in zip(runs.items(), styles, strict=True):
        left.loglog(range(1, len(norms) + 1), norms, line, color=grey, label=f"d̂ = {d_hat}")
    left.axhline(TARGET, color="0.7", lw=0.8)
    left.set(xlabel="step (log scale)", ylabel="‖m ⊙ ∇ℓ‖², and σ² (log scale)")
    left.legend()
    for (name, (*_, losses)), (line, grey) in zip(masked.items(), styles, strict=True):
        right.semilogx(range(1, len(losses) + 1), losses, line, color=grey, label=name)
    right.set(xlabel="step (log scale)", ylabel="loss left", ylim=(0, 1.05))
    right.legend(title="gradients in the mask", fontsize=8, title_fontsize=8, loc="lower left")


if __name__ == "__main__":
    lab.main()
