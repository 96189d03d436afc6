"""Lab 8. The run is its seeds.

A step of zeroth-order training is θ ← θ + a m ⊙ z, with a = −η · proj_grad ([S] Algorithm 1, last
loop). z follows from the seed, and m follows from θ. So two numbers are the whole step, and a list
of them is the whole run. This lab trains a small model, keeps (seed, a) of every step, and deletes
the weights. Write `rebuild`. It makes the trained weights from the first ones and the log. They
must be the same to the bit.

The second half has two workers. Each has its own part of a batch, 5 examples and 3. They can take
the same step if they know the same two losses. Each sends three numbers of 8 bytes: the sum of its
examples' l⁺, the sum of their l⁻, and how many they are. Write `common`: what a worker makes of all
the messages. So far each worker believes its own message, which comes first.
"""

import lab
import torch

import masks
import zo
from model_patch import Patch

STEPS, LR, SHARES = 100, 0.05, (5, 3)


def rebuild(patch, log):
    """Take the model of `patch` from the first weights to the last. `log` is [(seed, a), …].

    `patch.update(seed, a)` is θ ← θ + a m ⊙ z.
    """
    # ---- your code: at most five lines
    # ----


def common(messages):
    """(l⁺, l⁻) of the whole batch. A message is (Σ l⁺, Σ l⁻, count), and yours comes first."""
    # ---- your code: at most five lines
    total_plus, total_minus, count = messages[0]
    return total_plus / count, total_minus / count
    # ----


def patched():
    return Patch(lab.Small(), masks.SmallWeights(0.25))


def weights(patch):
    return torch.cat([p.detach().flatten().clone() for p in patch.model.parameters()])


def batch(t):
    """The t-th batch: 8 texts of 4 words, from the project's noise."""
    return zo.gaussian(zo.step_seed(8, t), 9, (8, 4)).mul(1000).long() % 16


def message(patch, words, seed):
    """What a worker sends of its examples: three numbers, float64."""
    both = patch.losses(words, lab.next_word, seed)
    return torch.tensor([*both, 1.0]).double() * len(words)


def train():
    """(weights before, weights after, log, loss of every step) of one worker."""
    patch, log, losses = patched(), [], []
    before = weights(patch)
    for t in range(STEPS):
        seed, words = zo.step_seed(8, t), batch(t)
        l_plus, l_minus = patch.losses(words, lab.next_word, seed)
        log.append((seed, float(-LR * zo.projected_grad(l_plus, l_minus, patch.eps))))
        patch.update(*log[-1])
        losses.append(float(l_plus + l_minus) / 2)
    return before, weights(patch), log, losses


def two_workers():
    """(both workers' weights, largest error of a loss, bytes that a worker sends in a step)."""
    patches, error = [patched() for _ in SHARES], 0.0
    for t in range(20):
        seed, words = zo.step_seed(8, t), batch(t)
        parts = words.split(SHARES)
        sent = [message(p, part, seed) for p, part in zip(patches, parts, strict=True)]
        whole = (message(patches[0], words, seed) / len(words)).tolist()[:2]
        for i, patch in enumerate(patches):
            both = common([m.tolist() for m in sent[i:] + sent[:i]])
            patch.update(seed, float(-LR * zo.projected_grad(*both, patch.eps)))
            error = max(error, *(abs(a - b) for a, b in zip(both, whole, strict=True)))
    return [weights(patch) for patch in patches], error, sent[0].nbytes


def measure():
    before, after, log, losses = train()
    fresh, path = patched(), []
    update = fresh.update
    fresh.update = lambda *step: (update(*step), path.append(weights(fresh)))
    rebuild(fresh, log)
    return before, after, log, losses, path, weights(fresh), *two_workers()


def numbers(found):
    before, after, log, _, _, rebuilt, (one, two), error, sent = found
    text = "".join(f"{seed},{a!r}\n" for seed, a in log)
    distance = lambda a, b: float((a - b).norm() / (after - before).norm())  # noqa: E731
    replay = "Go through the log from its first step, and make each step's update."
    agree = "The workers' losses differ, so they part. Each must add up all messages, not its own."
    whole = "The workers agree, but not on the whole batch. Divide the sums by the sum of counts."
    return [
        lab.near("weights that differ from the trained ones", int((rebuilt != after).sum()), 0, 0,
                 replay),
        lab.fact("bytes of log for one step", len(text) / STEPS),
        lab.near("distance between the workers, of the way trained", distance(one, two), 0, 1e-6,
                 agree),
        lab.near("error of a loss, beside the whole batch's", error, 0, 1e-5, whole),
        lab.fact("bytes that a worker sends in a step", sent),
    ]  # fmt: skip


def picture(found, figure):
    before, after, log, losses, path, *_, sent = found
    left, right = figure.subplots(1, 2)
    left.plot(losses, label="loss", lw=0.8)
    far = [float((w - after).norm() / (before - after).norm()) for w in [before, *path]]
    left.plot(far, "--", label="rebuilt weights: distance still to go")
    left.set(xlabel="step", title=f"{len(path)} steps rebuilt")
    left.legend()
    sizes = {"weights of 7B,\n16 bits": 13.5e9, "log of\n20,000 steps": 20_000 * 40,
             "gradients,\none step": 13.5e9, "a worker,\none step": sent}  # fmt: skip
    right.bar(list(sizes), list(sizes.values()), color=["0.3", "0.7", "0.3", "0.7"], log=True)
    right.set(ylabel="bytes")


if __name__ == "__main__":
    lab.main()
