"""The race of lab 6: rules of masks.py on the tiny model and RTE, each with five rates."""

import contextlib
import io

import lab  # first, so that the project's modules are found
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import masks
import tasks
import zo
from harness import config, dataset, loading

STEPS, SEEDS, EPS = 40, (1, 3), 1e-3
RATES = (30, 100, 300, 600, 1000)  # r = η (k + 2); the best of the papers' rules lie between


class Tiny:
    """The tiny model, and its loss of some training examples of RTE."""

    def __init__(self):
        self.tokenizer, _ = loading.load_tokenizer(config.TINY)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            self.model = loading.load_model(config.TINY, device="cpu")
        self.data = dataset.load_examples(config.Settings(task="rte", data_dir="tiny/data"))
        self.names = [name for name, _ in self.model.named_parameters()]
        self.gradients = torch.autograd.grad(self.loss(range(16))(), self.model.parameters())

    def loss(self, chosen):
        """A function of no argument: the loss at the model's weights."""
        batch = tasks.collate(
            self.tokenizer, [self.data.train[i] for i in chosen], scored=self.data.scored,
            max_length=128, **tasks.layout(self.model),
        )  # fmt: skip
        return lambda: tasks.loss(self.model, batch)

    def sensitive(self):
        """[Q]'s mask of the tiny model's own text: for each parameter its places, or none."""
        texts = dataset.read_texts(config.ROOT / "tiny/data/c4.jsonl")
        windows = tasks.text_windows(self.tokenizer, texts, samples=32, length=64, seed=0)
        index = masks.sensitive_index(self.model, tasks.text_losses(windows), 0.001)
        return [index.get(name, []) for name in self.names]

    def overlap(self, kind):
        """The share of each matrix's steepest tenth that is also in the tenth of a `kind`."""
        weights = masks.decoder_linears(self.model)
        steep = {n: g.square() for n, g in zip(self.names, self.gradients, strict=True)}
        steep = masks.sensitive({name: steep[name] for name in weights}, 0.1)
        return masks.overlap(steep, kind(weights, 0.1))


@torch.no_grad()
def run(tiny, rules):
    """The race of `rules`, {name: rule}. θ is one vector, and so is z, which all rules share.

    Returns three dictionaries by name: {r: the loss of every step, a mean over the seeds}, the
    mask before training, and {r: how many weights the mask holds after it}, of the last seed.
    """
    start = parameters_to_vector(tiny.model.parameters())
    sizes = [p.numel() for p in tiny.model.parameters()]
    element = [torch.arange(n, dtype=torch.int32) for n in sizes]
    states = {
        name: [rule.prepare(weight, i) for i, weight in enumerate(start.split(sizes))]
        for name, rule in rules.items()
    }
    for found, n in zip(states["yours"], sizes, strict=True):
        lab.tensor("prepare", found, (n,), torch.bool)  # a boolean for each weight

    def mask(name, theta):
        return torch.cat([*map(rules[name].mask, theta.split(sizes), element, states[name])])

    def loss_at(theta):
        vector_to_parameters(theta, tiny.model.parameters())
        return float(loss())

    before = {name: mask(name, start) for name in rules}
    k = {name: int(m.sum()) for name, m in before.items()}
    losses = {name: {r: torch.zeros(STEPS) for r in RATES} for name in rules}
    for seed in SEEDS:
        at = {(name, r): start for name in rules for r in RATES}
        for t in range(STEPS):
            loss = tiny.loss(tasks.minibatch(len(tiny.data.train), 8, seed, t))
            z = zo.gaussian(zo.step_seed(seed, t), 0, start.shape)
            for (name, r), theta in at.items():
                m = mask(name, theta)
                l_plus, l_minus = (loss_at(theta + a * m * z) for a in (EPS, -EPS))
                g = zo.projected_grad(l_plus, l_minus, EPS)
                at[name, r] = theta - r / (k[name] + 2) * g * m * z
                losses[name][r][t] += (l_plus + l_minus) / 2 / len(SEEDS)
    vector_to_parameters(start, tiny.model.parameters())
    after = {name: {r: int(mask(name, at[name, r]).sum()) for r in RATES} for name in rules}
    return losses, before, after
