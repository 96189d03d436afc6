"""The table of methods on the tiny model in RESULTS.md: python tiny/compare.py --json FILE

Every method on every task for the same number of steps, each at its own best learning rate of a
stated grid: all rates with seed 0, then the other seeds for the better two, and of these the best
by mean validation accuracy over the seeds, ties by training loss. Reported is test accuracy of the
last weights, mean ± standard deviation over the seeds, and for S-MeZO how much of what moved is
still inside the mask at the end. About three minutes a row on two cores.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TASKS = ("sst2", "rte", "boolq", "copa")
IN_16 = "--method=senszoq --bits=16"
METHODS = {  # row: (flags, grid of learning rates)
    "MeZO": ("--method=mezo", (3e-4, 1e-3, 3e-3)),
    "S-MeZO": ("--method=s-mezo", (3e-3, 1e-2, 3e-2, 1e-1)),
    "R-MeZO": ("--method=r-mezo", (1e-3, 3e-3, 1e-2)),
    "norm weights only": ("--method=mezo --select=norm", (1e-2, 3e-2, 1e-1, 3e-1)),
    "SensZOQ, 0.1 % in 4 bits": ("--method=senszoq --mask=sensitive-0.001", (3e-2, 1e-1, 3e-1, 1)),
    "the same in 16 bits": (f"{IN_16} --mask=sensitive-0.001", (3e-2, 1e-1, 3e-1, 1)),
    "0.1 % largest": (f"{IN_16} --mask=largest-0.001", (1e-1, 3e-1, 1, 3)),
    "0.1 % random": (f"{IN_16} --mask=random-0.001", (3e-1, 1, 3, 10)),
    "1 % sensitive": (f"{IN_16} --mask=sensitive-0.01", (1e-2, 3e-2, 1e-1, 3e-1)),
    "1 % largest": (f"{IN_16} --mask=largest-0.01", (3e-2, 1e-1, 3e-1, 1)),
    "1 % random": (f"{IN_16} --mask=random-0.01", (3e-2, 1e-1, 3e-1, 1)),
}


def quietly(function, *arguments) -> str:
    """Call it, and return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        function(*arguments)
    return out.getvalue()


def mask_file(path: Path, seed: int) -> None:
    """kind-density.safetensors by harness.mask; sensitive: of the pre-training text."""
    from harness import mask

    kind, density = path.stem.split("-")
    flags = [f"--kind={kind}", f"--density={density}", f"--out={path}"]
    flags += ["--length=64"] if kind == "sensitive" else [f"--seed={seed}"]  # documents have 70
    quietly(mask.main, flags)


def train_once(job) -> dict:
    """One run of train.py: (flags, lr, seed, steps, n) to what the tables need of it. Its loss is
    the mean of the last n steps."""
    import torch

    import train
    from harness.log import StepLog

    torch.set_num_threads(1)
    flags, lr, seed, steps, n = job
    with tempfile.TemporaryDirectory() as folder:
        if flags[-1].startswith("--mask="):
            mask = Path(folder, flags[-1].removeprefix("--mask=") + ".safetensors")
            mask_file(mask, seed)
            flags = [*flags[:-1], f"--mask={mask}"]
        run = Path(folder, "run")
        common = [f"--lr={lr}", f"--seed={seed}", f"--steps={steps}", f"--out={run}"]
        common += [f"--eval-every={steps}", "--compile=yes"]
        quietly(train.main, [*flags, *common])
        result = json.loads((run / "result.json").read_text())
        log = StepLog(run)
    return {
        "test": result["last"]["value"],
        "validation": log.steps[-1].validation,
        "loss": statistics.mean((s.loss_plus + s.loss_minus) / 2 for s in log.steps[-n:]),
        "active": log.steps[-1].active_density,
    }


def score(runs: list[dict]) -> tuple[float, float]:
    """Better is higher: validation accuracy, then training loss."""
    validation = statistics.mean(run["validation"] for run in runs)
    return validation, -statistics.mean(run["loss"] for run in runs)


def prompted(task: str, shots: int) -> float:
    """Zero-shot or in-context test accuracy, from eval.py."""
    import eval

    text = quietly(eval.main, [f"--task={task}", f"--shots={shots}"])
    return float(text.split("accuracy ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread per run: the model is small
    found: dict = {"steps": args.steps, "seeds": args.seeds, "rows": {}}
    with ProcessPoolExecutor() as pool:
        for shots, name in ((0, "zero-shot"), (4, "in-context, 4 shots")):
            row = dict(zip(args.tasks, pool.map(prompted, args.tasks, [shots] * 9), strict=False))
            found["rows"][name] = {task: {"accuracy": [value]} for task, value in row.items()}
            print(name, row, flush=True)
        for name in args.methods:
            flags, grid = METHODS[name]
            row = found["rows"][name] = {}

            def train_all(keys, flags=flags):
                jobs = [
                    ([f"--task={t}", *flags.split()], lr, s, args.steps, 20) for t, lr, s in keys
                ]
                return dict(zip(keys, pool.map(train_once, jobs), strict=True))

            runs = train_all([(task, lr, 0) for task in args.tasks for lr in grid])
            better = {
                task: sorted(grid, key=lambda lr, t=task: score([runs[t, lr, 0]]))[-2:]
                for task in args.tasks
            }
            more = range(1, args.seeds)
            runs |= train_all([(t, lr, s) for t in args.tasks for lr in better[t] for s in more])
            for task in args.tasks:
                by_rate = {
                    lr: [runs[task, lr, seed] for seed in range(args.seeds)] for lr in better[task]
                }
                lr = max(by_rate, key=lambda lr: score(by_rate[lr]))
                row[task] = {
                    "lr": lr,
                    "accuracy": [run["test"] for run in by_rate[lr]],
                    "active": statistics.mean(run["active"] for run in by_rate[lr]),
                    "all": {str(key[1:]): run for key, run in runs.items() if key[0] == task},
                }
            print(name, {task: (v["lr"], v["accuracy"]) for task, v in row.items()}, flush=True)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict) -> str:
    """The table, in Markdown."""
    tasks = list(next(iter(found["rows"].values())))
    lines = [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, row in found["rows"].items():
        cells = []
        for task in tasks:
            values = row[task]["accuracy"]
            cell = f"{statistics.mean(values):.3f}"
            if "lr" in row[task]:
                spread = statistics.stdev(values) if len(values) > 1 else 0
                cell += f" ± {spread:.3f} ({row[task]['lr']:g}"
                cell += f"; {row[task]['active']:.0%} active)" if name.startswith("S-") else ")"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
