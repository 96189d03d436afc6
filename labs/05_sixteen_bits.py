"""Lab 5. Perturb and restore in 16 bits.

[S]'s Algorithms 1 and 2 add to the weights in place, three times. In 16 bits each sum is rounded.
So the weights do not come back. They drift from step to step. [S] §3.3 has another way: θ is never
written, and the forward pass computes with θ + ε ẑ. Change `probe` so that nothing is ever written
into θ, not even to put it back.

Then choose ε. A forward pass in bf16 rounds what one layer hands to the next. So each loss has an
error. The step divides it by 2ε, and a larger ε leaves less of it. But a loss is straight only near
θ. [S] has ε = 1e-3. Look at the right half of the picture, and choose `EPS_BF16`. The weights of
that half have a spread of 0.3, fifteen times a real model's. So take the method home and not the
number: `python -m studies.slopes` measures the same for a model of yours.
"""

import lab
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import masks
import zo
from model_patch import Patch

N, EPS, CYCLES, WORDS = 4000, 1e-3, 1000, torch.arange(16)[None]
ALL_EPS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1, 0.3, 1.0)

# ---- your code: one number
EPS_BF16 = 1e-3
# ----


def probe(theta, loss, z, eps):
    """(l⁺, l⁻). θ and z are of the same 16-bit dtype; `loss(theta)` is a number."""
    # ---- your code: at most five lines
    loss_plus = loss(theta.add_(eps * z))
    loss_minus = loss(theta.sub_(2 * eps * z))
    theta.add_(eps * z)
    # ----
    return loss_plus, loss_minus


def in_16_bits(dtype):
    """(how often one probe writes into θ, share of weights that it changes, drift after each probe,
    slopes over true slope).
    """
    start = (0.02 * zo.gaussian(5, 0, (N,))).to(dtype)
    slope = zo.gaussian(5, 1, (N,))  # the loss is linear
    loss = lambda at: float(slope @ at.float())  # noqa: E731
    theta, changed, drift, slopes = start.clone(), [], [], []
    for t in range(CYCLES):
        z, middle = zo.gaussian(zo.step_seed(5, t), 2, (N,)), loss(theta)
        l_plus, l_minus = probe(theta, loss, z.to(dtype), EPS)
        slopes.append(((l_plus - middle) / EPS, (middle - l_minus) / EPS, float(slope @ z)))
        changed.append(float((theta != start).float().mean()))
        drift.append(float((theta.float() - start.float()).norm() / start.float().norm()))
    *seen, true = torch.tensor(slopes).T
    over_true = [float(true @ half / (true @ true)) for half in seen]
    return theta._version / CYCLES, changed[0], drift, over_true


def here():
    """Weights that 100 probes of model_patch.py change, in bf16."""
    model = lab.Small().to(torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    patch = Patch(model, masks.SmallWeights(0.25))
    for t in range(100):
        patch.losses(WORDS, lab.next_word, zo.step_seed(5, t))
    patch.remove()
    return sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))


def blurred(eps):
    """Correlation of the slope that bf16 activations show with autograd's, over 100 directions."""
    model, loss = lab.Small().double(), lambda: lab.next_word(model, WORDS)
    theta = parameters_to_vector(model.parameters()).detach()
    gradient = parameters_to_vector(torch.autograd.grad(loss(), list(model.parameters())))
    for layer in model.children():
        layer.register_forward_hook(lambda _, given, out: out.bfloat16().double())
    model.head.register_forward_pre_hook(lambda _, given: given[0].bfloat16().double())
    pairs = []
    for z in zo.gaussian(5, 3, (100, len(theta))).double():
        both = []
        for a in (eps, -eps):
            vector_to_parameters(theta + a * z, model.parameters())
            both.append(loss().item())
        pairs.append((zo.projected_grad(*both, eps), float(gradient @ z)))
    return float(torch.corrcoef(torch.tensor(pairs).T)[0, 1])


def measure():
    runs = {"float16": in_16_bits(torch.float16), "bfloat16": in_16_bits(torch.bfloat16)}
    return runs, here(), {eps: blurred(eps) for eps in ALL_EPS}, blurred(EPS_BF16)


def numbers(found):
    runs, ours, _, correlation = found
    listed, hint = [], "θ is written, and rounded. Let `loss` read a new tensor instead."
    there = "The two losses must still be those at θ + ε z and θ − ε z."
    for name, (written, changed, drift, slopes) in runs.items():
        listed += [
            lab.near(f"{name}: writes into θ of one probe", written, 0, 0, hint),
            lab.near(f"{name}: weights changed by one probe", changed, 0, 0, hint),
            lab.near(f"{name}: drift after 1,000 probes, of ‖θ‖", drift[-1], 0, 0, hint),
            lab.near(f"{name}: slope to θ + ε z over true slope", slopes[0], 1, 0.05, there),
            lab.near(f"{name}: slope to θ − ε z over true slope", slopes[1], 1, 0.05, there),
        ]
    blur = "At your ε the loss bends: see the picture's right end. Take a smaller one."
    if EPS_BF16 < 0.01:
        blur = "At your ε rounding drowns the slope: see the picture's left end. Take a larger one."
    listed.append(lab.fact("model_patch.py, bf16: weights changed by 100 probes", ours))
    return [*listed, lab.at_least("bf16: correlation at your ε", correlation, 0.99, blur)]


def picture(found, figure):
    runs, _, curve, correlation = found
    left, right = figure.subplots(1, 2)
    for name, (*_, drift, _) in runs.items():
        left.plot([100 * x for x in drift], label=name)
    left.set(xlabel="probes, without an update", ylabel="drift, % of ‖θ‖", ylim=(-0.5, 14))
    left.legend()
    right.semilogx(list(curve), list(curve.values()), ".-")
    right.semilogx(EPS_BF16, correlation, "s", color="0.45", label="your ε")
    right.set(xlabel="ε", ylabel="correlation of slopes, bf16 and exact", ylim=(0, 1.05))
    right.legend()


if __name__ == "__main__":
    lab.main()
