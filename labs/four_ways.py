"""The four ways in which lab 9 trains a small model, with the sound source or with a copy of it."""

import sys
from types import SimpleNamespace

import lab
import torch

import masks
import model_patch
import quant
import zo

STEPS = 30
SOUND = {"zo": zo, "masks": masks, "quant": quant, "model_patch": model_patch}


def curves(folder):
    """{way: the loss of every step} with the modules of a folder, which nobody else sees."""
    try:
        for name in SOUND:  # each imports those before it
            sys.modules[name] = lab.load(folder / f"{name}.py")
        m = SimpleNamespace(**{name: sys.modules[name] for name in SOUND})
    finally:
        sys.modules.update(SOUND)
    words = torch.arange(16)[None]
    torch.manual_seed(0)  # a bug may draw from torch's own generator

    def printed(model):
        theta = [p.data for p in model.parameters()]
        h = [m.masks.threshold(t, 0.25) for t in theta]
        loss_here = lambda: lab.next_word(model, words)  # noqa: E731
        get_masks = lambda at: list(map(m.masks.get_mask, at, h))  # noqa: E731
        how = {"lr": 0.02, "eps": 0.1}
        return lambda seed: m.zo.sparse_mezo_step(theta, loss_here, get_masks, seed=seed, **how)[:2]

    def patched(model, moves, lr=0.02):
        patch = m.model_patch.Patch(model, moves, eps=0.1)

        def step(seed):
            both = patch.losses(words, lab.next_word, seed)
            patch.update(seed, float(-lr * m.zo.projected_grad(*both, patch.eps)))
            return both

        return step

    model = lab.Small()
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}
    sparse = m.quant.DenseSparse(m.masks.largest(matrices, 0.05), bits=16)
    for name in sparse.index:
        sparse.split(model, name)
    ways = {
        "Algorithm 1": printed(lab.Small()),
        "S-MeZO": patched(lab.Small(), m.masks.SmallWeights(0.25)),
        "R-MeZO": patched(lab.Small(), m.masks.RandomMask(0.25)),
        "dense + sparse": patched(model, sparse, lr=0.05),
    }
    return {way: [float(sum(step(m.zo.step_seed(9, t)))) / 2 for t in range(STEPS)]
            for way, step in ways.items()}  # fmt: skip
