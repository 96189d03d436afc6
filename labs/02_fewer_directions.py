"""Lab 2. Fewer directions, fewer steps.

[S] Theorem 1 says what a mask gains. Let d̂ weights move. The steps to a small masked gradient,
‖m ⊙ ∇L‖² ≤ σ², are of the order of d̂ L / σ². Here L is the smoothness of the loss. But a mask
alone saves no step. The proof (appendix I, before eq. 24) also sets the learning rate η, and its η
depends on d̂. Write `rate`, so that the steps grow in proportion to d̂ + 4.

Then a reviewer asked ([S] on OpenReview): "Would you get the best convergence if you update only 1
parameter?" The theorem is about the masked gradient. Let k weights be in the mask, and let c be its
share of the gradient, ‖m ⊙ ∇L‖² = c ‖∇L‖² (the c of [Q]'s rates). On a round bowl the best rate is
1/(L (k + 2)). A step then lowers the loss by c ‖∇L‖² / (2L (k + 2)) on average. Write `gain`: this
gain over that of a step that moves all d weights. The check measures it for four masks. Then answer
the reviewer: the right half of the picture shows the first step, and what comes after it.
"""

import lab
import torch

import zo

L, D, TARGET, LIMIT = 1.0, 32, 0.04, 3000
SIZES, COPIES = (4, 8, 16, 32), 16


def rate(d_hat):
    """Theorem 1's η where d̂ weights move. So far it is the one for all 32 weights."""
    # ---- your code: at most five lines
    return 1 / (4 * (D + 4) * L)
    # ----


def gain(k, c, d):
    """What one step with a mask of k weights and share c gains, over one with all d weights."""
    # ---- your code: at most five lines
    return c
    # ----


def estimate(slope_of, mask, z):
    """The gradient that two points see of a quadratic: their slope along m ⊙ z, times m ⊙ z."""
    return (slope_of * mask * z).sum(-1, keepdim=True) * mask * z


def steps_to_target(d_hat):
    """The norms ‖m ⊙ ∇L‖² of a run, means of 16 copies, until they reach σ² (0.04).

    A quadratic whose d̂ curvatures are spread from L down over nine octaves. Each of its directions
    has the same share of a loss of 1.
    """
    curvature = L * 2.0 ** (-9 * (torch.arange(d_hat).double() + 0.5) / d_hat)
    theta = (2 / (d_hat * curvature)).sqrt().expand(COPIES, -1)
    norms = []
    for t in range(LIMIT):
        norms.append(float((curvature * theta).square().sum(-1).mean()))
        if not TARGET < norms[-1] < 1e9:
            break
        z = zo.gaussian(zo.step_seed(2, t), 0, theta.shape).double()
        theta = theta - rate(d_hat) * estimate(curvature * theta, torch.ones(d_hat), z)
    return norms


def one_step():
    """{mask: (k, c, measured gain over all weights, losses)} of a round bowl with 200 weights."""
    d, rows = 200, 8000
    theta = torch.arange(1, d + 1).double() ** -0.8  # ∇L = L θ: a few gradients are large
    place = torch.arange(d)
    kinds = {"one weight, middling": place == 30, "one weight, the largest gradient": place == 0}
    kinds |= {"10 largest gradients": place < 10, "all 200 weights": place >= 0}
    z, start, runs = zo.gaussian(2, 1, (rows, d)).double(), theta @ theta, {}
    for name, mask in kinds.items():
        k = int(mask.sum())
        after = theta - estimate(theta, mask, z) / (k + 2)
        losses, at = [1.0, float(after.square().sum(-1).mean() / start)], after[:8]
        for t in range(1, 600):
            at = at - estimate(at, mask, z[8 * t : 8 * t + 8]) / (k + 2)
            losses.append(float(at.square().sum(-1).mean() / start))
        runs[name] = k, float((theta[mask] ** 2).sum() / start), losses
    all_weights = 1 - runs["all 200 weights"][2][1]
    return {n: (k, c, (1 - run[1]) / all_weights, run) for n, (k, c, run) in runs.items()}


def measure():
    return {d_hat: steps_to_target(d_hat) for d_hat in SIZES}, one_step()


def numbers(found):
    runs, masked = found
    x = torch.tensor([d_hat + 4.0 for d_hat in SIZES]).log()
    y = torch.tensor([len(norms) + 0.0 for norms in runs.values()]).log()
    x, y = x - x.mean(), y - y.mean()
    arrived = sum(norms[-1] <= TARGET for norms in runs.values())
    hint = "The rate is one for 32 weights, whatever the mask. Theorem 1's η falls with d̂."
    fast = "A run blew up, or did not arrive in 3,000 steps. η stands before eq. 24."
    more = "Put k and c into the formula, then d and a share of 1, and divide the two."
    listed = [
        lab.near("runs that arrive, of 4", arrived, 4, 0, fast),
        lab.near("exponent: steps ~ (d̂ + 4)^…", float((x @ y) / (x @ x)), 1, 0.15, hint),
    ]
    for name, (k, c, measured, _) in masked.items():
        listed.append(lab.near(f"gain of {name}", gain(k, c, 200), measured, 0.1 * measured, more))
    return listed


def picture(found, figure):
    runs, masked = found
    left, right = figure.subplots(1, 2)
    styles = (("-", "0.0"), ("--", "0.3"), ("-.", "0.5"), (":", "0.2"))
    for (d_hat, norms), (line, grey) in zip(runs.items(), styles, strict=True):
        left.loglog(range(1, len(norms) + 1), norms, line, color=grey, label=f"d̂ = {d_hat}")
    left.set(xlabel="step", ylabel="‖m ⊙ ∇L‖²")
    left.legend()
    for (name, (*_, losses)), (line, grey) in zip(masked.items(), styles, strict=True):
        right.semilogx(range(1, len(losses) + 1), losses, line, color=grey, label=name)
    right.set(xlabel="step", ylabel="loss left", ylim=(0, 1.05))
    right.legend(fontsize=8)


if __name__ == "__main__":
    lab.main()
