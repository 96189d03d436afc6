"""Which part of an update reaches 16-bit weights, if it is rounded to nearest?

    python -m studies.precision                                          the tiny model, a minute
    python -m studies.precision --model M --task sst2 --data-dir D --lr mezo=3e-6 s-mezo=1e-5

Rounding to nearest loses an update below half a weight's spacing, and the spacing grows with the
weight: large weights cannot hear what small ones can. So updates are rounded stochastically
(zo.round_stochastically). Printed is what --rounding nearest would let through, by quarter of the
weights' magnitude.

What 16 bits make of g is studies/slopes.py --dtype, and what training makes of both is
studies/learning.py --parts precision. Answers go to precision.json. Flags that are not listed here
are train.py's.
"""

import contextlib
import io
import json
import math
from pathlib import Path

import torch

import train
from harness import config as configs
from harness import loading


def arrive(method: str, lr: float, dtype: str, flags: list[str], count: int) -> list[float | None]:
    """Share of the weights inside the mask that an update changes, by quarter of |θ| in its tensor.

    The mean of `count` updates to nearest of a run of train.py, each from the original weights.
    None for a quarter with hardly a weight inside the mask.
    """
    given = configs.parse(configs.Config, "", flags)
    how = {"method": method, "lr": lr, "dtype": dtype, "rounding": "nearest"}
    if both := sorted(how.keys() & given.keys()):
        raise ValueError(f"{configs.flag(both[0])}: the study gives each row its own")
    config = configs.complete(configs.Config(**given | how))
    with contextlib.redirect_stdout(io.StringIO()):
        config, data = train.prepare(config)
        patch = train.open_patch(config, Path(), data)
    changed, inside = torch.zeros(4), torch.zeros(4)
    thetas = [weight.theta.view(-1) for weight in patch.weights]
    quarters = [t.float().abs().argsort().argsort() * 4 // len(t) for t in thetas]
    for t in range(count):
        step = train.measure_step(config, patch, data, t)
        if not math.isfinite(step.a):
            raise ValueError(f"--lr {config.lr}: the update of step {t + 1} is not finite")
        before = [(w.theta.flatten().clone(), w.mask().flatten()) for w in patch.weights]
        patch.update(step.seed, step.a)
        for theta, (was, mask), quarter in zip(thetas, before, quarters, strict=True):
            inside += torch.bincount(quarter[mask], minlength=4).cpu()
            changed += torch.bincount(quarter[mask & (was != theta)], minlength=4).cpu()
            theta.copy_(was)
    few = inside.sum() / 100
    return [float(c / n) if n > few else None for c, n in zip(changed, inside, strict=True)]


def main(argv=None) -> None:
    parser = configs.study_parser(__doc__)
    pair = configs.named(("mezo", "s-mezo", "r-mezo"), configs.rate)
    parser.add_argument("--lr", nargs="+", type=pair, metavar="METHOD=RATE",
                        default=[("mezo", 1e-3), ("s-mezo", 3e-2)])  # fmt: skip
    parser.add_argument("--count", type=configs.positive, default=10, help="updates of θ_0")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    args, flags = parser.parse_known_args(argv)
    print("| updates that arrive | smallest quarter | | | largest |\n|---|---|---|---|---|")
    with configs.one_line_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        file, settings = args.out / "precision.json", {"flags": flags, "count": args.count}
        found = json.loads(file.read_text()) if file.exists() else settings | {"arrive": {}}
        if {name: found[name] for name in settings} != settings:
            raise ValueError(f"{file} has the answers of other settings; give another --out")
        for method, lr in args.lr:
            for dtype in ("bfloat16", "float16"):
                row = f"{method}, η = {lr:g}, {dtype}"
                shares = found["arrive"][row] = arrive(method, lr, dtype, flags, args.count)
                cells = ["–" if share is None else f"{share:.1%}" for share in shares]
                print(f"| {row} | {' | '.join(cells)} |", flush=True)
                found["machine"] = loading.machine(torch.device(loading.take_device("auto")))
                configs.write_json(file, found)


if __name__ == "__main__":
    main()
