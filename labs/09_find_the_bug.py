"""Lab 9. Find the bug.

    python labs/09_find_the_bug.py --draw 7
    python labs/09_find_the_bug.py --draw 7 --answer zo.py:123

Each draw puts one classic mistake into a copy of zo.py, masks.py, quant.py and model_patch.py.
Nobody runs a test on the copy. It trains for 30 steps in four ways, beside the sound source, and
the picture shows the losses. Read the picture first. Which of the four suffer, and how? The first
is Algorithm 1 as printed, `zo.sparse_mezo_step`. The others go through `model_patch.Patch`. They
share some lines and not others. Then read the copy, with the paper open, and name the file and the
line. `diff` would find it, too, and teach you nothing. Draws 1 to 10 make a score of first answers.
"""

import argparse
import importlib
import json
import sys
from types import SimpleNamespace

import lab
import torch

from tests.mutants import MUTANTS

MODULES, STEPS = ("zo", "masks", "quant", "model_patch"), 30
SEEN = {  # mistakes that a curve of this lab shows: words of their names in tests/mutants.py
    "zo": ("uphill", "redrawn", "update forgets", "second probe", "−2ε", "not restored", "l⁻ − l⁺",
           "2ε written as ε", "probes forget", "all tensors", "global generator", "Box-Muller"),
    "masks": ("absolute value", "as density", "normal draw", "indices negated"),
    "model_patch": ("both probes", "equal shapes", "redrawn", "scratch"),
    "quant": ("first one's values",),
}  # fmt: skip
BUGS = [m for m in MUTANTS if any(words in m[0] for words in SEEN.get(m[1], ()))]
DRAW, ANSWER = 1, ""


def named(draw):
    """The line that you think is wrong, as file:line. The command line gives it."""
    return ANSWER


def bug(draw):
    """The mutant of a draw. Neighbours in the list are no neighbours here."""
    return BUGS[5 * draw % len(BUGS)]


def copy(draw):
    """(folder of the copy, file, first and last line of its bug)."""
    _, module, old, new, _ = bug(draw)
    folder = lab.PICTURES / f"draw-{draw}"
    folder.mkdir(parents=True, exist_ok=True)
    for other in MODULES:
        text = (lab.HERE.parent / f"{other}.py").read_text("utf-8")
        if other == module:
            first = text[: text.index(old)].count("\n") + 1
            text = text.replace(old, new)
        (folder / f"{other}.py").write_text(text, "utf-8")
    return folder, f"{module}.py", first, first + new.count("\n")


def score(right):
    """Of draws 1 to 10, how many first answers were right; kept beside the pictures."""
    path = lab.PICTURES / "score.json"
    first = json.loads(path.read_text()) if path.exists() else {}
    if ANSWER:
        first.setdefault(str(DRAW), right)
        path.write_text(json.dumps(first))
    return sum(first.get(str(draw), False) for draw in range(1, 11))


def modules_of(folder):
    """The four modules as they are in a folder. Who has imported others keeps those."""
    kept = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    importlib.invalidate_caches()
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def train(m, model, moves, lr):
    """The losses of a short run of model_patch.py."""
    patch, losses, words = m.model_patch.Patch(model, moves), [], torch.arange(16)[None]
    for t in range(STEPS):
        seed = m.zo.step_seed(9, t)
        l_plus, l_minus = patch.losses(words, lab.next_word, seed)
        patch.update(seed, float(-lr * m.zo.projected_grad(l_plus, l_minus, patch.eps)))
        losses.append(float(l_plus + l_minus) / 2)
    return losses


def algorithm_1(m):
    """The losses of Algorithm 1 as printed, on two tensors and a quadratic."""
    theta = [lab.zo.gaussian(9, 0, (10,)).double() * size for size in (1, 2)]
    h, losses = [m.masks.threshold(t, 0.5) for t in theta], []
    for t in range(STEPS):
        losses.append(sum(float((t - 3).square().sum()) for t in theta))
        m.zo.sparse_mezo_step(
            theta, lambda: sum(float((t - 3).square().sum()) for t in theta),
            lambda at: [m.masks.get_mask(*pair) for pair in zip(at, h, strict=True)],
            lr=0.002, eps=0.1, seed=m.zo.step_seed(9, t),
        )  # fmt: skip
    return losses


def curves(m):
    """{method: losses} with the modules `m`."""
    model = lab.Small()
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}
    sparse = m.quant.DenseSparse(m.masks.largest(matrices, 0.05), bits=16)
    for name in sparse.index:
        sparse.split(model, name)
    return {
        "Algorithm 1": algorithm_1(m),
        "S-MeZO": train(m, lab.Small(), m.masks.SmallWeights(0.25), 0.02),
        "R-MeZO": train(m, lab.Small(), m.masks.RandomMask(0.25), 0.02),
        "dense + sparse": train(m, model, sparse, 0.05),
    }


def measure():
    folder, file, first, last = copy(DRAW)
    answer, _, line = named(DRAW).partition(":")
    right = answer == file and line.isdigit() and first - 1 <= int(line) <= last + 1
    return folder, right, curves(modules_of(lab.HERE.parent)), curves(modules_of(folder))


def numbers(found):
    folder, right, sound, drawn = found
    listed = []
    for name, losses in sound.items():
        apart = max(abs(a - b) for a, b in zip(losses, drawn[name], strict=True))
        apart /= max(losses) - min(losses)
        listed.append(lab.fact(f"{name}: losses apart, of their way", apart))
    listed.append(lab.fact("first answers right, of draws 1 to 10", score(right)))
    hint = f"{ANSWER} is not the line. " if ANSWER else ""
    hint += f"See the picture, read the files in {folder}, and give --answer file:line."
    return [*listed, lab.near("bugs found", int(right), 1, 0, hint)]


def picture(found, figure):
    for axes, name in zip(figure.subplots(1, 4), found[2], strict=True):
        axes.plot(found[2][name], "--", color="0.6", label="sound")
        axes.plot(found[3][name], "-", color="0.0", label=f"draw {DRAW}")
        axes.set_title(name, fontsize=8)
        axes.set(xlabel="step")
    axes.legend()


def main():
    global DRAW, ANSWER
    parser = argparse.ArgumentParser(description="Find the bug: see the first lines of this file.")
    parser.add_argument("--draw", type=int, default=1)
    parser.add_argument("--answer", default="", help="file:line, such as zo.py:123")
    parser.add_argument("--solved", action="store_true", help="let the solution answer")
    args = parser.parse_args()
    DRAW, ANSWER = args.draw, args.answer
    lab.main()


if __name__ == "__main__":
    main()
