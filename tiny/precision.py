"""What half precision does to zeroth-order updates: python tiny/precision.py --json FILE

MeZO and S-MeZO, trained in fp32, bf16 and fp16, the 16-bit updates rounded to nearest and
stochastically: loss of the last 100 steps and test accuracy, mean ± standard deviation over the
seeds. And for the first updates from the original weights, which of them arrive: the share of
weights whose bits an update changes, by quartile of their magnitude. Rounding to nearest loses an
update below half a weight's spacing, and the spacing grows with the weight: large weights cannot
hear what small ones can. About 20 minutes on two cores.

    python tiny/precision.py --lr mezo=2e-5 s-mezo=1e-4 --model M --task sst2 --data-dir D

Flags that are not its own go to train.py.
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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


def heard(method: str, lr: float, dtype: str, common: list[str], updates: int = 10) -> list[float]:
    """Share of weights inside the mask that one update changes, by quartile of |θ| in its tensor.

    `updates` updates to nearest, each from the original weights, on batches of the task.
    """
    import torch

    import loading
    import masks
    import scoring
    import tasks
    import train
    import zo
    from model_patch import Patch

    config = train.Config(**vars(loading.make_parser(train.Config, "").parse_args(common)))
    loading.check(config)
    data = loading.load_data(config)
    tokenizer, _ = loading.load_tokenizer(config.model)
    model = loading.load_model(config.model, dtype, "cpu")
    handle = Patch(model, masks.make_rule(method, 0.25))
    original = {name: flat.clone() for name, flat in handle.tensors().items()}
    loss_fn = scoring.classification_loss if data.classification else scoring.lm_loss
    changed, inside = torch.zeros(4), torch.zeros(4)
    for step in range(updates):
        chosen = tasks.batches(len(data.train), config.batch_size, 0, step)
        batch = scoring.collate(
            tokenizer,
            [data.train[i] for i in chosen],
            score="all" if data.classification else "right",
        )
        seed = zo.step_seed(0, step)
        loss = partial(loss_fn, batch=batch)
        losses = handle.losses(batch.inputs(model), loss, seed)
        handle.update(seed, -lr * zo.projected_grad(*losses, handle.eps).item())
        for p in handle.moving.values():
            was, index = original[p.name], torch.arange(p.flat.numel())
            quarter = was.float().abs().argsort().argsort() * 4 // len(was)
            mask = p.rule.mask(was, index, p.state)
            inside += torch.bincount(quarter[mask], minlength=4)
            changed += torch.bincount(quarter[mask & (was != p.flat)], minlength=4)
        handle.load(original)
    few = inside.sum() / 100  # a quarter with hardly a weight inside the mask says nothing
    return [
        (c / n).item() if n > few else float("nan") for c, n in zip(changed, inside, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lr", nargs="*", default=["mezo=1e-3", "s-mezo=3e-2"])
    parser.add_argument("--scales", nargs="*", type=float, default=[1.0, 0.1], help="of the rates")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything here")
    args, common = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    common = ["--task=copa", *common]  # where it is given again, the last one counts
    rates = {pair.split("=")[0]: float(pair.split("=")[1]) for pair in args.lr}
    cases = [(m, float(f"{lr * scale:.3g}")) for m, lr in rates.items() for scale in args.scales]
    found: dict = {"common": common, "steps": args.steps, "heard": {}, "trained": {}}
    with ProcessPoolExecutor() as pool:
        print(
            "| first updates that arrive | smallest | | | largest quarter |\n|---|---|---|---|---|"
        )
        jobs = [(m, lr, dtype, common) for m, lr in cases for dtype in ("bfloat16", "float16")]
        for job, shares in zip(jobs, pool.map(heard, *zip(*jobs, strict=True)), strict=True):
            found["heard"][str(job[:3])] = shares
            cells = " | ".join("–" if share != share else f"{share:.1%}" for share in shares)
            print(f"| {job[0]}, η = {job[1]:g}, {job[2]} | {cells} |", flush=True)
        print(f"\n| {args.steps} steps | loss at the end | test accuracy |\n|---|---|---|")
        for method, lr in cases:
            keys = [(kind, seed) for kind in KINDS for seed in range(args.seeds)]
            jobs = []
            for (dtype, rounding), seed in keys:
                flags = [f"--method={method}", f"--dtype={dtype}", f"--rounding={rounding}"]
                jobs.append(([*common, *flags, "--log-every=100"], lr, seed, args.steps, 1))
            runs = dict(zip(keys, pool.map(train_once, jobs), strict=True))
            for kind in KINDS:
                cells = []
                for what in ("loss", "test"):
                    values = [runs[kind, seed][what] for seed in range(args.seeds)]
                    spread = statistics.stdev(values) if len(values) > 1 else 0
                    cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
                found["trained"][str((method, lr, *kind))] = [
                    runs[kind, s] for s in range(args.seeds)
                ]
                name = "float32" if kind[0] == "float32" else ", ".join(kind)
                print(f"| {method}, η = {lr:g}, {name} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
