"""Lab 6. Which weights?

[S] moves the small weights (§3.2). Its control, R-MeZO, moves random ones (Table 1). [Q] moves the
thousandth that has the largest squared gradient (§3.1) of a text (§3.3), here of each matrix. They
race for 40 steps on the tiny model and RTE. Each gets the best of five learning rates.

Write a rule of your own. `prepare` sees each tensor of the model once, flat, before training. It
returns one boolean for each weight: does it move? `gradient` has the same shape. It is that of the
task's first 16 examples. So far your rule takes the weights that are small before training, and
keeps them. [S] looks again in every probe, so a weight that has grown stops moving: see how many
are left. Beat the other four, and this one: bring the loss of the last 20 steps down to 0.05. You
may change the density, too. `gradient` costs a backward pass; [Q] pays for one once, on a text.

Two numbers tell a good mask. k is how many weights move, and c is their share of the squared
gradient. On lab 2's bowl more c and less k is better, and the best rate is η = r / (k + 2) with the
same r for all. This loss is no bowl. Where its gradient is largest it also bends most. So a mask of
the very largest gradients alone overshoots, even at r = 30.

A reviewer of [S] expected that weights which are pruned, set to 0, then get the largest gradients.
Do weights that are small as they are? The overlap says: of the tenth with the largest gradients,
how many are among the smallest tenth? By chance 0.1.
"""

import lab
import race
import torch

import masks


class Yours(masks.ConstantMask):
    """Which weights move: your answer. `gradients` has one flat tensor for each of the model's."""

    def __init__(self, gradients):
        # ---- your code: another density, if you like
        super().__init__(density=0.25)
        # ----
        self.gradients = gradients

    def prepare(self, weight, stream):
        gradient = self.gradients[stream]  # noqa: F841  # for your code
        # ---- your code: at most five lines
        return weight.abs() <= masks.threshold(weight, self.density)
        # ----


class SensZOQ(masks.ConstantMask):
    """[Q]'s: the same places at every step. `places` has one list for each tensor of the model."""

    def __init__(self, places):
        self.places = places

    def prepare(self, weight, stream):
        keep = torch.zeros(len(weight), dtype=torch.bool)
        keep[torch.as_tensor(self.places[stream]).long()] = True
        return keep


def measure():
    print("The race takes a minute or two.")
    tiny = race.Tiny()
    gradients = [g.flatten() for g in tiny.gradients]
    rules = {
        "MeZO": masks.Everything(),
        "S-MeZO": masks.SmallWeights(0.25),
        "R-MeZO": masks.RandomMask(0.25),
        "SensZOQ": SensZOQ(tiny.sensitive()),
        "yours": Yours(gradients),
    }
    overlaps = {kind.__name__: tiny.overlap(kind) for kind in (masks.smallest, masks.largest)}
    losses, moves, after = race.run(tiny, rules)
    squares = torch.cat(gradients).square()
    masks_of = {name: (int(m.sum()), float(squares[m].sum() / squares.sum()))
                for name, m in moves.items()}  # fmt: skip
    return losses, masks_of, overlaps, after


def best(runs):
    """(r, loss of every step) of the rate with the lowest loss in the second half."""
    return min(runs.items(), key=lambda run: float(run[1][20:].mean().nan_to_num(torch.inf)))


def numbers(found):
    losses, masks_of, overlaps, after = found
    listed = []
    for name, (k, c) in masks_of.items():
        r, run = best(losses[name])
        what = f"{name}: k = {k:,}, c = {c:.2f}, best r = {r}: loss"
        listed.append(lab.fact(what, float(run[20:].mean())))
    k, c = masks_of["yours"]
    hint = f"Your mask holds {c:.2f} of the squared gradient. Let the size of `gradient` choose."
    if c > 0.3:
        hint = f"Your mask holds {c:.2f} of the squared gradient. Try another density."
        hint += " Is it the size of `gradient` that chooses, whatever its sign,"
        hint += " and the same share of each tensor?"
    if c > 0.3 and k < 2000:
        hint = f"{k} of the steepest weights are too few. Let more of them move."
    listed[-1] = lab.at_most(what, listed[-1].yours, 0.05, hint)
    text = "steepest tenth that is also among the"
    stopped = 1 - after["S-MeZO"][best(losses["S-MeZO"])[0]] / masks_of["S-MeZO"][0]
    listed.append(lab.fact("S-MeZO: share of its weights that have stopped", stopped))
    return listed + [lab.fact(f"{text} {kind}", share) for kind, share in overlaps.items()]


def picture(found, figure):
    left, right = figure.subplots(1, 2)
    styles = (("-", "0.7"), (":", "0.0"), ("-.", "0.5"), ("--", "0.3"), ("-", "0.0"))
    for (name, runs), (line, grey) in zip(found[0].items(), styles, strict=True):
        r, run = best(runs)
        left.plot(run, line, color=grey, label=f"{name}, r = {r}", lw=2 if name == "yours" else 1)
    left.set(xlabel="step", ylabel="loss", ylim=(0, 1))
    left.legend()
    for name, (k, c) in found[1].items():
        right.plot(k, c, "s" if name == "yours" else "o", color="0.0" if name == "yours" else "0.5")
        place = (5, -12 if name == "S-MeZO" else 5)
        right.annotate(name, (k, c), xytext=place, textcoords="offset points")
    right.set(xlabel="k, how many weights move", ylabel="c, share of the squared gradient",
              xscale="log", xlim=(100, 3e6), ylim=(0, 1.1))  # fmt: skip


if __name__ == "__main__":
    lab.main()
