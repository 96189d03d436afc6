"""Lab 8. The run is its seeds.

A step of zeroth-order training is θ ← θ + a m ⊙ z, with a = −η · proj_grad ([S] Algorithm 1, last
loop). z follows from the seed, and m follows from θ. So two numbers are the whole step, and a list
of them is the whole run. This lab trains a small model and keeps (seed, a) of every step. Write
`rebuild`. It makes the trained weights from the first ones and the log, to the bit.

The second half has two workers. Each has its own part of a batch. They take the same step if they
know the same two losses, those of the whole batch. Each sends three numbers of 8 bytes: the sum of
its examples' l⁺, the sum of their l⁻, and how many they are. Write `common`: what a worker makes of
all the messages. So far each worker believes its own message, which comes first.
"""

import lab
import torch

import masks
import zo
from model_patch import Patch

STEPS, LR = 100, 0.05


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
    """The t-th batch: 8, 7 or 6 texts of 4 words, from the project's noise."""
    return zo.gaussian(zo.step_seed(8, t), 9, (8 - t % 3, 4)).mul(1000).long() % 16


def message(patch, seed, words):
    """What a worker sends of its examples: three numbers."""
    both = patch.losses(words, lab.next_word, seed)
    return [float(loss) * len(words) for loss in both] + [len(words)]


def step(patch, seed, both):
    """One step, and what the log keeps of it."""
    a = float(-LR * zo.projected_grad(*both, patch.eps))
    patch.update(seed, a)
    return seed, a


def measure():
    alone, fresh, (one, two), error = patched(), patched(), (patched(), patched()), 0.0
    path, rebuilt, log = [weights(alone)], [weights(fresh)], []
    for t in range(STEPS):
        seed, words = zo.step_seed(8, t), batch(t)
        sent = [message(one, seed, words[:5]), message(two, seed, words[5:])]
        both, others = (common([m.copy() for m in order]) for order in (sent, sent[::-1]))
        *totals, count = message(one, seed, words)
        error = max(error, *(abs(a - b / count) for a, b in zip(both, totals, strict=True)))
        step(one, seed, both), step(two, seed, others)
        *totals, count = message(alone, seed, words)
        log.append(step(alone, seed, [total / count for total in totals]))
        path.append(weights(alone))
    update = fresh.update
    fresh.update = lambda seed, a: (update(seed, a), rebuilt.append(weights(fresh)))
    rebuild(fresh, log)
    return log, path, rebuilt, weights(one) - weights(two), error


def numbers(found):
    log, path, rebuilt, apart, error = found
    replay = f"Updates that `rebuild` has made: {len(rebuilt) - 1}. The log has {STEPS}."
    if len(rebuilt) == len(path):
        right = sum(map(torch.equal, rebuilt, path)) - 1
        replay = f"Updates that are right: {right}. Each takes its own seed and a, in order."
    agree = "The workers' losses differ, so they part. Each must add up all messages, not its own."
    whole = "The workers agree, but not on the whole batch. Divide the sums by the sum of counts."
    return [
        lab.near("weights that differ from the trained ones",
                 int((rebuilt[-1] != path[-1]).sum()), 0, 0, replay),
        lab.fact("bytes of log for one step", sum(len(f"{s},{a!r}\n") for s, a in log) / STEPS),
        lab.near("workers' distance, of the trained run's length",
                 float(apart.norm() / (path[-1] - path[0]).norm()), 0, 1e-6, agree),
        lab.near("error of a loss, beside the whole batch's", error, 0, 1e-5, whole),
        lab.fact("bytes that a worker sends in a step", 3 * 8),
    ]  # fmt: skip


def picture(found, figure):
    _, path, rebuilt, *_ = found
    left, right = figure.subplots(1, 2)
    for name, run, how in (("trained", path, {"color": "0.8", "lw": 5}), ("rebuilt", rebuilt, {})):
        far = [float((w - path[-1]).norm() / (path[0] - path[-1]).norm()) for w in run]
        left.plot(far, label=name, **how)
    left.set(xlabel="step", ylabel="distance to the trained weights", ylim=(0, None))
    left.legend()
    sizes = {"weights of 7B,\n16 bits": 13.5e9, "(seed, a) of\n20,000 steps": 20_000 * 40,
             "gradients,\none step": 13.5e9, "a worker,\none step": 3 * 8}  # fmt: skip
    right.bar(list(sizes), list(sizes.values()), color=["0.3", "0.7", "0.3", "0.7"], log=True)
    right.set(ylabel="bytes")


if __name__ == "__main__":
    lab.main()
