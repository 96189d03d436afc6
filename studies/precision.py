"""What half precision does to zeroth-order steps, before any training.

    python studies/precision.py                                          the tiny model, a minute
    python studies/precision.py --model M --task sst2 --data-dir D --lr mezo=3e-6 s-mezo=1e-5

    part     question
    arrive   which part of an update changes any bit, by quarter of the weights' magnitude?
    slopes   how far are the first projected gradients from those of fp32?

How it works
    Rounding to nearest loses an update below half a weight's spacing, and the spacing grows with
    the weight: large weights cannot hear what small ones can. So updates are rounded stochastically
    (zo.round_stochastically), and `arrive` shows what --rounding nearest would lose. The error of a
    16-bit forward is divided by 2ε, whatever the mask: `slopes` shows what is left of g.

    What training makes of it is `python studies/learning.py --parts precision`. Answers go to
    precision.json. Flags that are not listed here are train.py's.
"""

import argparse
import contextlib
import io
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import train
from harness import config as configs
from harness import loading

HALVES = ("bfloat16", "float16")


def open_run(method: str, lr: float, dtype: str, flags: list[str]):
    """(patch, a function of t that measures step t) of a run of train.py; θ is not moved."""
    given = configs.parse(configs.Config, "", [*flags, "--rounding=nearest"])
    config = configs.Config(**given | {"method": method, "lr": lr, "dtype": dtype})
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer, data = train.prepare(config)
        _, patch = train.open_model(config, Path(), train.what_moves(config, Path(), data))
    return patch, lambda t: train.measure_step(config, patch, tokenizer, data, t)


def arrive(method: str, lr: float, dtype: str, flags: list[str], count: int) -> list[float | None]:
    """Share of the weights inside the mask that an update changes, by quarter of |θ| in its tensor.

    The mean of `count` updates to nearest, each from the original weights. None for a quarter with
    hardly a weight inside the mask.
    """
    changed, inside = torch.zeros(4), torch.zeros(4)
    patch, measure = open_run(method, lr, dtype, flags)
    thetas = [weight.held[0].detach().view(-1) for weight in patch.weights]
    quarters = [t.float().abs().argsort().argsort() * 4 // len(t) for t in thetas]
    for step in map(measure, range(count)):
        originals = [theta.clone() for theta in thetas]
        patch.update(step.seed, step.a)
        for weight, theta, was, quarter in zip(
            patch.weights, thetas, originals, quarters, strict=True
        ):
            element = torch.arange(was.numel(), dtype=torch.int32, device=was.device)
            mask = patch.rule.mask(was, element, weight.state)
            inside += torch.bincount(quarter[mask], minlength=4).cpu()
            changed += torch.bincount(quarter[mask & (was != theta)], minlength=4).cpu()
            theta.copy_(was)
    few = inside.sum() / 100
    return [float(c / n) if n > few else None for c, n in zip(changed, inside, strict=True)]


def slopes(method: str, dtype: str, flags: list[str], count: int) -> list[float]:
    """The projected gradients of the first `count` steps, all from the original weights."""
    _, measure = open_run(method, 1.0, dtype, flags)
    return [-measure(t).a for t in range(count)]  # a is −η g, at a rate of 1


def compare(exact: list[float], other: list[float]) -> dict:
    """Error of one list of slopes beside the spread of the exact one, and their correlation."""
    errors = [a - b for a, b in zip(exact, other, strict=True)]
    return {
        "error": statistics.stdev(errors), "spread": statistics.stdev(exact),
        "correlation": statistics.correlation(exact, other),
    }  # fmt: skip


def rate(text: str) -> tuple[str, float]:
    method, _, number = text.partition("=")
    return method, float(number)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--lr", nargs="+", type=rate, metavar="METHOD=RATE",
                        default=[("mezo", 1e-3), ("s-mezo", 3e-2)])  # fmt: skip
    parser.add_argument("--eps", nargs="+", type=float, default=[1e-3, 4e-3], help="of slopes")
    parser.add_argument(
        "--count", type=int, default=20, help="steps, each from the original weights"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    args, flags = parser.parse_known_args(argv)
    found: dict = {"flags": flags, "count": args.count, "arrive": {}, "slopes": {}}
    with configs.one_line_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(args.lr) * (2 + 3 * len(args.eps)), unit="model")
        for method, lr in args.lr:
            for dtype in HALVES:
                row = f"{method}, η = {lr:g}, {dtype}"
                found["arrive"][row] = arrive(method, lr, dtype, flags, min(args.count, 10))
                bar.update()
            for eps in args.eps:
                lists = {}
                for dtype in ("float32", *HALVES):
                    lists[dtype] = slopes(method, dtype, [*flags, f"--eps={eps}"], args.count)
                    bar.update()
                for dtype in HALVES:
                    row = f"{method}, ε = {eps:g}, {dtype}"
                    found["slopes"][row] = compare(lists["float32"], lists[dtype])
                found["machine"] = loading.machine(torch.device(loading.choose_device("auto")))
                configs.write_json(args.out / "precision.json", found)
        bar.close()
    print("| updates that arrive | smallest quarter | | | largest |\n|---|---|---|---|---|")
    for row, shares in found["arrive"].items():
        print(f"| {row} | {' | '.join('–' if s is None else f'{s:.1%}' for s in shares)} |")
    print("\n| first slopes | correlation with fp32 | error | spread |\n|---|---|---|---|")
    for row, of in found["slopes"].items():
        print(f"| {row} | {of['correlation']:.3f} | {of['error']:.3g} | {of['spread']:.3g} |")


if __name__ == "__main__":
    main()
