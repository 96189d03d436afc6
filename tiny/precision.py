"""What half precision does to zeroth-order updates: python tiny/precision.py --json FILE

MeZO and S-MeZO, trained in fp32, bf16 and fp16, the 16-bit updates rounded to nearest and
stochastically: loss of the last 100 steps and test accuracy, mean ± standard deviation over the
seeds. And for the first updates from the original weights, which of them arrive: the share of
weights whose bits an update changes, by quartile of their magnitude. Rounding to nearest loses an
update below half a weight's spacing, and the spacing grows with the weight: large weights cannot
hear what small ones can. And how far the first projected gradients are from those of fp32: the
error of a 16-bit forward is divided by 2ε, whatever the mask. An hour on two cores.

    python tiny/precision.py --lr mezo=2e-5 s-mezo=1e-4 --model M --task sst2 --data-dir D

Flags that are not its own go to train.py.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import train_once

KINDS = (  # dtype, rounding
    ("float32", "nearest"),
    ("bfloat16", "nearest"),
    ("bfloat16", "stochastic"),
    ("float16", "nearest"),
    ("float16", "stochastic"),
)


def probes(method: str, lr: float, dtype: str, flags: list[str], count: int):
    """(patch, step) for each of the first `count` steps of a run; θ is not moved."""
    import train
    from harness import config as configs

    given = configs.parse(configs.Config, "", [*flags, "--rounding=nearest", "--compile=no"])
    config = configs.Config(**given | {"method": method, "lr": lr, "dtype": dtype})
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer, data = train.prepare(config)
        _, patch = train.open_model(config, Path(), train.what_moves(config, Path(), data))
    for t in range(count):
        yield patch, train.take_step(config, patch, tokenizer, data, t)


def heard(method: str, lr: float, dtype: str, flags: list[str]) -> list[float]:
    """Share of weights inside the mask that one update changes, by quartile of |θ| in its tensor.

    Ten updates to nearest, each from the original weights.
    """
    import torch

    changed, inside = torch.zeros(4), torch.zeros(4)
    for patch, step in probes(method, lr, dtype, flags, 10):
        thetas = [weight.held[0].detach().view(-1) for weight in patch.weights]
        originals = [theta.clone() for theta in thetas]
        patch.update(step.seed, step.a)
        for weight, theta, was in zip(patch.weights, thetas, originals, strict=True):
            index = torch.arange(was.numel(), dtype=torch.int32)
            quarter = was.float().abs().argsort().argsort() * 4 // len(was)
            mask = patch.rule.mask(was, index, weight.state)
            inside += torch.bincount(quarter[mask], minlength=4)
            changed += torch.bincount(quarter[mask & (was != theta)], minlength=4)
            theta.copy_(was)
    few = inside.sum() / 100  # a quarter with hardly a weight inside the mask says nothing
    return [
        (c / n).item() if n > few else float("nan") for c, n in zip(changed, inside, strict=True)
    ]


def slopes(method: str, dtype: str, flags: list[str]) -> list[float]:
    """The projected gradients of 40 first steps, in `dtype`."""
    return [-step.a for _, step in probes(method, 1.0, dtype, flags, 40)]  # at a rate of 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lr", nargs="*", default=["mezo=1e-3", "s-mezo=3e-2"])
    parser.add_argument("--scales", nargs="*", type=float, default=[1.0, 0.1], help="of the rates")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--figure", type=Path, help="draw the second table")
    args, common = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    common = ["--task=copa", *common]  # where it is given again, the last one counts
    rates = {pair.split("=")[0]: float(pair.split("=")[1]) for pair in args.lr}
    cases = [(m, float(f"{lr * scale:.3g}")) for m, lr in rates.items() for scale in args.scales]
    found: dict = {"common": common, "steps": args.steps, "heard": {}, "slopes": {}, "trained": {}}
    with ProcessPoolExecutor() as pool:
        print(
            "| first updates that arrive | smallest | | | largest quarter |\n|---|---|---|---|---|"
        )
        jobs = [(m, lr, dtype, common) for m, lr in cases for dtype in ("bfloat16", "float16")]
        for job, shares in zip(jobs, pool.map(heard, *zip(*jobs, strict=True)), strict=True):
            found["heard"][str(job[:3])] = shares
            cells = " | ".join("–" if share != share else f"{share:.1%}" for share in shares)
            print(f"| {job[0]}, η = {job[1]:g}, {job[2]} | {cells} |", flush=True)
        print("\n| error of g / spread of g (correlation) | bfloat16 | float16 |\n|---|---|---|")
        for method in rates:
            dtypes = ("float32", "bfloat16", "float16")
            exact, *others = pool.map(slopes, [method] * 3, dtypes, [common] * 3)
            cells, found["slopes"][method] = [], [exact, *others]
            for other in others:
                errors = [a - b for a, b in zip(exact, other, strict=True)]
                error, spread = statistics.stdev(errors), statistics.stdev(exact)
                cells.append(
                    f"{error:.2f} / {spread:.2f} ({statistics.correlation(exact, other):.2f})"
                )
            print(f"| {method} | {' | '.join(cells)} |", flush=True)
        print(f"\n| {args.steps} steps | loss at the end | test accuracy |\n|---|---|---|")
        for method, lr in cases:
            keys = [(kind, seed) for kind in KINDS for seed in range(args.seeds)]
            jobs = []
            for (dtype, rounding), seed in keys:
                flags = [f"--method={method}", f"--dtype={dtype}", f"--rounding={rounding}"]
                jobs.append(([*common, *flags], lr, seed, args.steps, 100))
            ended = pool.map(train_once, jobs)  # in order, so that a row is printed when it is done
            for kind in KINDS:
                runs = [next(ended) for _ in range(args.seeds)]
                found["trained"][str((method, lr, *kind))] = runs
                cells = []
                for what in ("loss", "test"):
                    values = [run[what] for run in runs]
                    spread = statistics.stdev(values) if len(values) > 1 else 0
                    cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
                name = "float32" if kind[0] == "float32" else ", ".join(kind)
                print(f"| {method}, η = {lr:g}, {name} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.figure:
        draw(found, args.figure)


def draw(found: dict, path: Path) -> None:
    """Test accuracy of every seed, and their mean, by method and by dtype and rounding."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    names = ["float32" if kind[0] == "float32" else "\n".join(kind) for kind in KINDS]
    cases = dict.fromkeys(ast.literal_eval(key)[:2] for key in found["trained"])
    for number, (method, lr) in enumerate(cases):
        runs = [found["trained"][str((method, lr, *kind))] for kind in KINDS]
        tests = [[run["test"] for run in seeds] for seeds in runs]
        shift, color = 0.16 * (number - (len(cases) - 1) / 2), f"C{number}"
        for place, values in enumerate(tests):
            axes.plot([place + shift] * len(values), values, ".", color=color)
        means = [statistics.mean(values) for values in tests]
        places = [place + shift for place in range(len(means))]
        axes.plot(places, means, "_", color=color, markersize=18, label=f"{method}, η = {lr:g}")
    axes.set_xticks(range(len(KINDS)), names)
    axes.set_ylabel(f"test accuracy after {found['steps']} steps")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
