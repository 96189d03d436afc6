"""Lab 5. Perturb and restore in 16 bits.

[S]'s Algorithms 1 and 2 perturb the weights in place and restore them. In 16 bits the computer
rounds each of the three additions. So the weights do not come back. They drift from step to step,
and nothing is learnt. [S] §3.3 has another way. Nobody writes the weights, and the forward pass
computes with θ + ε ẑ. Change `probe` so that not a bit of θ changes.

The second half is about ε. A forward pass in bf16 rounds what one layer hands to the next. The step
divides the error of the loss by 2ε, and both papers have ε = 1e-3. A larger ε divides it by more.
But then the loss is no longer straight over the probe. See the picture, and choose `EPS_BF16`.
"""

import lab
import torch

import masks
import zo
from model_patch import Patch

N, EPS, CYCLES, DTYPES = 4000, 1e-3, 1000, (torch.float16, torch.bfloat16)
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
    """(share of weights that one probe changes, drift after each probe, slope seen over slope)."""
    start = (0.02 * zo.gaussian(5, 0, (N,))).to(dtype)
    slope = zo.gaussian(5, 1, (N,))  # the loss is linear
    theta, drift, seen, true = start.clone(), [], [], []
    for t in range(CYCLES):
        z = zo.gaussian(zo.step_seed(5, t), 2, (N,))
        both = probe(theta, lambda at: float(slope @ at.float()), z.to(dtype), EPS)
        seen.append(zo.projected_grad(*both, EPS))
        true.append(float(slope @ z))
        drift.append(float((theta.float() - start.float()).norm() / start.float().norm()))
        if t == 0:
            changed = float((theta != start).float().mean())
    seen, true = torch.tensor(seen), torch.tensor(true)
    return changed, drift, float((seen @ true) / (true @ true))


def here():
    """Weights that 100 probes of model_patch.py change, in bf16."""
    model = lab.Small().to(torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    patch = Patch(model, masks.SmallWeights(0.25))
    words = torch.arange(16)[None]
    for t in range(100):
        patch.losses({"input_ids": words}, lambda logits: logits.sum(), zo.step_seed(5, t))
    patch.remove()
    return sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))


def blurred(eps, seeds=24):
    """Correlation of the slope that bf16 activations show with autograd's, over the seeds."""
    words, parameters = torch.arange(16)[None], [p.data for p in lab.Small().double().parameters()]
    short = lambda x: x.bfloat16().double()  # noqa: E731

    def loss(embed, up, bias, head, last, hand_on=short):
        hidden = hand_on(torch.tanh(hand_on(hand_on(embed[words]) @ up.T + bias)))
        return lab.next_word(words)(hand_on(hidden @ head.T + last))

    leaves = [p.clone().requires_grad_() for p in parameters]
    gradient = torch.autograd.grad(loss(*leaves, hand_on=lambda x: x), leaves)
    pairs = []
    for seed in range(seeds):
        noise = [zo.gaussian(seed, i, p.shape).double() for i, p in enumerate(parameters)]
        l_plus, l_minus = (
            float(loss(*[p + a * z for p, z in zip(parameters, noise, strict=True)]))
            for a in (eps, -eps)
        )
        true = sum((g * z).sum() for g, z in zip(gradient, noise, strict=True))
        pairs.append((zo.projected_grad(l_plus, l_minus, eps), float(true)))
    return float(torch.corrcoef(torch.tensor(pairs).T)[0, 1])


def measure():
    with torch.no_grad():
        runs = {dtype: in_16_bits(dtype) for dtype in DTYPES}
    return runs, here(), {eps: blurred(eps) for eps in ALL_EPS}, blurred(EPS_BF16)


def numbers(found):
    runs, ours, _, correlation = found
    listed, hint = [], "θ is written, and rounded. Let `loss` read a new tensor instead."
    for dtype, (changed, drift, ratio) in runs.items():
        name = str(dtype).removeprefix("torch.")
        listed += [
            lab.near(f"{name}: weights changed by one probe", changed, 0, 0, hint),
            lab.near(f"{name}: drift after 1,000, of the weights' size", drift[-1], 0, 0, hint),
            lab.near(f"{name}: slope seen over true slope", ratio, 1, 0.05,
                     "The two losses must still be those at θ + ε z and θ − ε z."),
        ]  # fmt: skip
    blur = "Take ε where the curve of the picture is highest: less rounding, and still straight."
    listed.append(lab.fact("model_patch.py in bf16: weights changed by 100", ours))
    name = "bf16: correlation with the slope at your ε"
    return [*listed, lab.at_least(name, correlation, 0.99, blur)]


def picture(found, figure):
    runs, _, curve, correlation = found
    left, right = figure.subplots(1, 2)
    for dtype, (_, drift, _) in runs.items():
        left.plot([100 * x for x in drift], label=str(dtype).removeprefix("torch."))
    left.set(xlabel="probes, and no update", ylabel="drift, % of the weights' size")
    left.legend()
    right.semilogx(list(curve), list(curve.values()), ".-")
    right.semilogx(EPS_BF16, correlation, "s", color="0.45", label="your ε")
    right.set(xlabel="ε", ylabel="correlation with the slope, bf16", ylim=(0, 1.05))
    right.legend()


if __name__ == "__main__":
    lab.main()
