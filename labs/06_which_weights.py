"""Lab 6. Which weights?

[S] moves the small weights (§3.2). Its control, R-MeZO, moves random ones (Table 1). [Q] moves the
few with the largest squared gradient of a text (§3.1). Here they race on a problem with a known
answer: 500 weights and a round quadratic. Its gradient is large in a few places, as it is in a real
model, and small weights are as likely to have it as large ones. Each rule has the best rate of the
same grid.

Write a rule of your own, a subclass of `masks.Rule`. `prepare` sees the weights once and returns
what the rule keeps. So far yours is [S]'s constant mask. `gradient` is that of the task's first
batch. Beat the other four: leave at most a tenth of the loss after 500 steps. You may change the
density, too. More weights, or better ones? Lab 2 has the formula.

The last three numbers are of a real, if tiny, model. A reviewer of [S] expected that small weights
get the largest gradients. The overlap says whether they do: by chance it is the density, 0.1.
"""

import contextlib
import io

import lab
import torch

import masks
import tasks
import zo
from harness import config, loading

D, STEPS, COPIES, RATES = 500, 500, 8, (0.001, 0.003, 0.01, 0.03, 0.1)


class Yours(masks.Rule):
    """Which weights move: your answer."""

    def __init__(self, gradient):
        # ---- your code: another density, if you like
        super().__init__(density=0.25)
        # ----
        self.gradient = gradient

    def prepare(self, weight, stream):
        # ---- your code: at most five lines
        return weight.abs() <= masks.threshold(weight, self.density)
        # ----

    @staticmethod
    def mask(theta, element, state):
        return state[element]


class Given(Yours):
    """[Q]'s: the five weights with the largest squared gradient of a text."""

    def prepare(self, weight, stream):
        index = masks.top(self.gradient.square(), 5).long()
        return torch.zeros(D, dtype=torch.bool).index_fill(0, index, True)


def problem():
    """(θ, what the task wants, gradient of a text). The loss is ½ ‖θ − wanted‖².

    The gradient's sizes fall like i^{−0.8}, in an order that knows nothing of the weights. The text
    has the order in common with the task, and the rest by half. The seeds are such that [S]'s mask
    and the random one both have a quarter of ‖∇L‖², as they have on average.
    """
    order, weights, signs, other = (zo.gaussian(9, i, (D,)).double() for i in range(4))
    size = 0.002 * (1.0 + order.argsort().argsort()) ** -0.8
    theta = 0.02 * weights
    return theta, theta - size * signs.sign(), size * (signs.sign() + other) / 2


def race(rules, theta, wanted):
    """{name: (best rate, loss left after every step)}: means of 8 copies, the same z for all."""
    element, start = torch.arange(D, dtype=torch.int32), ((theta - wanted) ** 2).sum()
    states = {name: rule.prepare(theta, 0) for name, rule in rules.items()}
    at = {name: theta.expand(len(RATES), COPIES, D) for name in rules}
    losses = {name: [] for name in rules}
    eta = torch.tensor(RATES).double()[:, None, None]
    for t in range(STEPS):
        z = zo.gaussian(zo.step_seed(6, t), 9, (COPIES, D)).double()
        for name, rule in rules.items():
            z_hat = rule.mask(at[name], element, states[name]) * z
            slope = ((at[name] - wanted) * z_hat).sum(-1, keepdim=True)
            at[name] = at[name] - eta * slope * z_hat
            left = ((at[name] - wanted) ** 2).sum(-1).mean(1) / start
            losses[name].append(left.nan_to_num(torch.inf))
    best = {name: int(run[-1].argmin()) for name, run in losses.items()}
    return {n: (RATES[best[n]], [float(x[best[n]]) for x in run]) for n, run in losses.items()}


def overlaps():
    """Of the most sensitive tenth of each matrix, how much is also in other tenths."""
    tokenizer, _ = loading.load_tokenizer(config.TINY)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model = loading.load_model(config.TINY, device="cpu")
    texts = tasks.read_texts(str(config.HERE / "tiny/data/c4.jsonl"))
    windows = tasks.text_windows(tokenizer, texts, samples=32, length=64, seed=0)
    sensitive = masks.sensitive(masks.fisher(model, tasks.text_losses(windows)), 0.1)
    weights = masks.decoder_linears(model)
    kinds = (masks.smallest, masks.largest, masks.random_index)
    return {kind.__name__: masks.overlap(sensitive, kind(weights, 0.1)) for kind in kinds}


def measure():
    theta, wanted, text = problem()
    rules = {
        "MeZO": masks.Everything(),
        "S-MeZO": masks.SmallWeights(0.25),
        "R-MeZO": masks.RandomMask(0.25, seed=1),
        "SensZOQ": Given(text),
        "yours": Yours(theta - wanted),
    }
    return race(rules, theta, wanted), overlaps()


def numbers(found):
    runs, overlap = found
    hint = "A weight is small or large whatever its gradient is. Let `self.gradient` choose."
    listed = [lab.fact(f"{n}: loss left, rate {rate:g}", x[-1]) for n, (rate, x) in runs.items()]
    listed[-1] = lab.at_most(listed[-1].what, runs["yours"][1][-1], 0.1, hint)
    name = "tiny model: sensitive tenth among the"
    kinds = {"smallest": "smallest", "largest": "largest", "random": "random_index"}
    return listed + [lab.fact(f"{name} {kind}", overlap[key]) for kind, key in kinds.items()]


def picture(found, figure):
    left, right = figure.subplots(1, 2)
    styles = ((":", "0.0"), (":", "0.5"), ("-.", "0.5"), ("--", "0.3"), ("-", "0.0"))
    for (name, (rate, losses)), (line, grey) in zip(found[0].items(), styles, strict=True):
        left.plot(losses, line, color=grey, label=f"{name}, η = {rate:g}")
    left.set(xlabel="step", ylabel="loss left", ylim=(0, 1.02))
    left.legend()
    right.bar(list(found[1]), list(found[1].values()), color=["0.3", "0.5", "0.7"])
    right.axhline(0.1, color="black", lw=0.8)
    right.set(ylabel="share of the sensitive tenth", title="tiny/model; by chance 0.1")


if __name__ == "__main__":
    lab.main()
