"""How fast does each method learn, and which weights should move? Many runs of train.py.

    python -m studies.learning            two parts on the tiny model, ten minutes
    python -m studies.learning --model DIR --data-dir DIR --tasks sst2 --steps 1000 --short 300 \\
        --seeds 3 --num-validation 200 --num-test 300             a real one, a day

    part       question                                                   where it is claimed
    rates      loss and accuracy against the learning rate                [S] Fig. 2a
    methods    the same against steps, each method at its best rate       [S] Fig. 1 and 3, Table 1
    sparsity   S-MeZO with more or fewer weights                          [S] Fig. 4
    groups     weights by magnitude: four quarters, and from the smallest [S], replies
    refresh    thresholds, or whole masks, taken again every k steps      [S], replies
    drop       go on from where MeZO dropped, with small or large weights [S] Fig. 2c
    masks      [Q]'s mask beside others of its size                       [Q] Fig. 5
    precision  S-MeZO in 16 bits, its updates rounded one way or another  (ours)

How it works
    A run is a run directory of train.py under --out, named by its flags. One that was stopped goes
    on, one that is done is not done again, one that is too short is made longer. What the tables
    need goes to learning.json; with everything in it only the tables and the picture are made.
    Flags that are not listed here are train.py's, for every run.

    Every row has a grid of rates. They are tried with seed 0 for --short steps. The best by
    validation accuracy is taken, ties by training loss. Test examples choose nothing. The parts
    sparsity, groups, refresh, precision and drop take --short steps. All their rows have S-MeZO's
    best rate. With --tune each row gets the best of S-MeZO's grid for itself. Without it, a rate
    that suits few weights may break a row with many.

What differs from the papers
    They take 20,000 steps of models of 7 B parameters. Most of their figures have one seed.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import harness  # noqa: F401, isort: skip  # first: Ctrl-C while the rest is imported is one line
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import eval
import tasks
import train
from harness import config as configs
from harness import mask
from harness.config import TINY, is_tiny, one_line_errors, positive, study_parser, write_json
from harness.log import StepLog
from studies import first_order

SENSZOQ = "train --method=senszoq --mask=sensitive-0.001"
ROWS = {  # name: (program and flags, grid of rates for the tiny model, for one of 100 M parameters)
    "MeZO": ("train --method=mezo", (3e-4, 1e-3, 3e-3), (3e-6, 1e-5, 3e-5)),
    "S-MeZO": ("train --method=s-mezo", (3e-3, 1e-2, 3e-2, 1e-1), (1e-5, 3e-5, 1e-4)),
    "R-MeZO": ("train --method=r-mezo", (1e-3, 3e-3, 1e-2), (1e-5, 3e-5, 1e-4)),
    "SensZOQ, 4 bits": (SENSZOQ, (3e-2, 1e-1, 3e-1, 1), (1e-4, 3e-4, 1e-3)),
    "SensZOQ, 16 bits": (f"{SENSZOQ} --bits=16", (3e-2, 1e-1, 3e-1, 1), (1e-4, 3e-4, 1e-3)),
    "MeZO, LoRA": ("train --method=mezo --adapter=lora", (3e-3, 1e-2, 3e-2), (5e-5, 1e-4, 3e-4)),
    "S-MeZO, LoRA": ("train --adapter=lora", (1e-2, 3e-2, 1e-1), (5e-5, 1e-4, 3e-4)),
    "MeZO, prefix": ("train --method=mezo --adapter=prefix", (3e-1, 1, 3), (1e-3, 1e-2, 3e-2)),
    "norms alone": ("train --method=mezo --select=norm", (1e-2, 3e-2, 1e-1), (1e-4, 1e-3, 1e-2)),
    "Adam": ("first_order --method=adam", (1e-4, 3e-4, 1e-3), (1e-5, 3e-5, 1e-4)),
    "Sparse Adam": ("first_order --method=sparse-adam", (3e-4, 1e-3, 3e-3), (1e-5, 3e-5, 1e-4)),
    "LoRA, Adam": ("first_order --method=lora", (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)),
}
DENSITIES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
KINDS = ("sensitive", "task", "largest", "random")
QUARTERS = (0.25, 0.5, 0.75)
HALVES = [(d, r) for d in ("bfloat16", "float16") for r in ("stochastic", "nearest")]
OF_S_MEZO = {  # part: {row: flags}
    "sparsity": {f"{1 - d:g}": f"--density={d:g}" for d in DENSITIES},
    "groups": {f"0–{d:g}": f"--density={d:g}" for d in (*QUARTERS, 1)}
    | {f"{a:g}–{a + 0.25:g}": f"--density=0.25 --above={a:g}" for a in QUARTERS},
    "refresh": {
        "mask of every step, h of before": "",
        "h of every 100th": "--refresh-every=100",
        "h of every 5th": "--refresh-every=5",
        "mask of before": "--mask-kind=constant",
        "mask of every 5th": "--mask-kind=constant --refresh-every=5",
    },
    "precision": {"float32": "--dtype=float32"}
    | {f"{d}, {r}": f"--dtype={d} --rounding={r}" for d, r in HALVES},
}
RUNS_OWN = {  # settings that the study gives to each
    "task", "train_file", "test_file", "validation_file", "seed", "lr", "method", "eval_every",
}  # fmt: skip


class Run(NamedTuple):
    """One run of a program: its name is its flags, and `steps` is how far it has to be."""

    task: str
    flags: str
    lr: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        words = shlex.split(self.flags.replace("--", "").replace("=", "-"))[1:]
        return "-".join([self.task, *map(os.path.basename, words), f"{self.lr:g}", f"{self.seed}"])


def carry_out(run: Run, folder: Path, every: int, common: list[str]) -> dict:
    """Begin a run, or go on with it, and say what the tables need of it.

    Losses are means over windows of `every` steps; validation and active share have their step.
    """
    program, *flags = shlex.split(run.flags)
    main = {"train": train.main, "first_order": first_order.main}[program]
    result, steps = folder / "result.json", run.steps
    if program == "first_order" or not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # it had not begun, or cannot go on
        argv = ["--compile=yes"] if program == "train" else []  # one process has many runs
        argv += [f"--task={run.task}", *common, *flags, f"--lr={run.lr}", f"--seed={run.seed}"]
        argv += [f"--steps={run.steps}", f"--eval-every={every}", f"--out={folder}"]
    else:  # it may be longer already, where a longer part was stopped
        steps = max(steps, -(-len(StepLog(folder).steps) // every) * every)
        argv = [f"--resume={folder}", f"--steps={steps}"]
    said, stopped = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(argv)
        except SystemExit as error:
            if error.code == 130:
                raise KeyboardInterrupt from error
            stopped = said.getvalue().strip().splitlines()[-1]
            # the context is what the command has put into a line; all but broken weights may pass
            broke = isinstance(error.__context__, train.Broken)
            if not broke or not StepLog(folder).steps:
                raise ValueError(f"{run.name}: {stopped}") from error
    log = StepLog(folder)
    mean = [step.loss for step in log.steps]
    checked = [s for s in (log.start, *log.steps) if s.validation is not None]
    return {
        "steps": steps, "stopped": stopped, "metric": log.metric,
        "loss": [statistics.mean(mean[i : i + every]) for i in range(0, len(mean), every)],
        "validation": {s.step: s.validation for s in checked},
        "active": {s.step: s.active_density for s in checked},
        "test": None if stopped else json.loads(result.read_text())["last"]["value"],
    }  # fmt: skip


class Study:
    """The runs that are known, and a way to the others."""

    def __init__(self, args, common: list[str]):
        self.args, self.file = args, args.out / "learning.json"
        self.given = configs.parse(configs.Config, "", common)  # for every run
        for name in RUNS_OWN & self.given.keys():
            raise ValueError(f"{configs.flag(name)}: the study gives each run its own; see --help")
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}
        named = ("every", "short", "model", "text", "samples", "length")
        settings = {name: getattr(args, name) for name in named} | {"flags": self.given}
        if self.found.setdefault("settings", settings) != settings:
            raise ValueError(f"{self.file} has runs of other settings; give another --out")
        self.runs = self.found.setdefault("runs", {})
        for known in self.runs.values():  # a file has its steps as text
            for name in ("validation", "active"):
                known[name] = {int(step): value for step, value in known[name].items()}
        self.tables = self.found.setdefault("tables", {})

    def grid(self, row: str) -> tuple[float, ...]:
        return self.args.grid.get(row, ROWS[row][1 if is_tiny(self.args.model) else 2])

    def common(self, kind: type, unused=frozenset()) -> list[str]:
        """The flags for every run that a command with these settings knows, and has a use for."""
        known = {field.name for field in fields(kind)} - unused
        given = [f"{configs.flag(n)}={value}" for n, value in self.given.items() if n in known]
        return [f"--model={self.args.model}", *given]

    def with_mask(self, flags: str, task: str) -> str:
        """The flags with the path of a mask file in place of its name; it is made if need be."""
        before, _, rest = flags.partition("--mask=")
        if not rest:
            return flags
        args, (name, *more) = self.args, rest.split()
        kind, density = name.split("-", 1)  # such as 5e-05
        path = args.out / "masks" / f"{task if kind == 'task' else kind}-{density}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            few, text = f"--samples={args.samples}", [f"--text={args.text}"] if args.text else []
            how = {
                "sensitive": [few, f"--length={args.length}", *text],
                "task": [few, "--mask-from=task", f"--task={task}"],
            }.get(kind, [f"--kind={kind}"])
            known = configs.parse(mask.MaskConfig, "", how)
            unused = mask.without_use(mask.MaskConfig(**known))
            # scored in its own dtype, as gradients underflow in float16
            how += self.common(configs.Settings, unused | {"dtype"})
            how += [f"--density={density}", f"--out={path}"]
            with contextlib.redirect_stdout(io.StringIO()):
                mask.main(how)
        return " ".join([f"{before}--mask={shlex.quote(str(path))}", *more])

    def take(self, runs: list[Run]) -> list[dict]:
        """What is known of the runs, once they are carried out."""
        missing = [
            run for run in dict.fromkeys(runs)
            if self.runs.get(run.name, {"steps": 0})["steps"] < run.steps
        ]  # fmt: skip
        jobs, ways, total = self.args.jobs, [], sum(run.steps for run in missing)
        for run in missing:
            run = run._replace(flags=self.with_mask(run.flags, run.task))
            folder = (self.args.out / "runs" / run.name).absolute()
            kind = configs.Config if run.flags.startswith("train") else first_order.Config
            ways.append((run, folder, self.args.every, self.common(kind)))
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=total, unit="step", disable=not missing))
            pool = None
            if jobs > 1 and missing:
                spawn = multiprocessing.get_context("spawn")  # as CUDA bears no fork
                executor = ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,))
                pool = stack.enter_context(executor)
            done = [pool.submit(carry_out, *way) for way in ways] if pool else ways
            try:
                for run, way in zip(missing, done, strict=True):
                    bar.set_description(run.name)
                    self.runs[run.name] = way.result() if pool else carry_out(*way)
                    write_json(self.file, self.found)
                    bar.update(run.steps)
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.kill()  # or the pool would wait for its last run; a log is kept
                raise
        return [self.runs[run.name] for run in runs]

    def best(self, row: str, task: str, flags: str | None = None) -> float:
        """The rate of a row's grid that is best on validation after --short steps."""
        rates = self.grid(row)
        runs = [Run(task, flags or ROWS[row][0], lr, 0, self.args.short) for lr in rates]
        known = self.take(runs)
        return max(zip(rates, known, strict=True), key=lambda pair: self.score(pair[1]))[0]

    def score(self, known: dict) -> tuple[float, float]:
        """Better is higher: validation after --short steps, of a perplexity −, then −loss."""
        found = self.columns(known)
        if found["loss"] is None:
            return -math.inf, -math.inf
        better = 1 if known["metric"] == "accuracy" else -1
        return better * found["validation"], -found["loss"]

    def short(self, task: str, rows: dict[str, str], grid="S-MeZO", tune=False) -> dict:
        """{row: columns} of short runs, seed 0, at the best rate of `grid`, or each at its own."""
        tune = tune or self.args.tune
        runs = [
            Run(task, flags, self.best(grid, task, flags if tune else None), 0, self.args.short)
            for flags in rows.values()
        ]
        return {
            name: {"lr": run.lr, **self.columns(known)}
            for name, run, known in zip(rows, runs, self.take(runs), strict=True)
        }

    def columns(self, known: dict) -> dict:
        """Loss and validation after --short steps; None of a run that stopped before."""
        validation = known["validation"].get(self.args.short)
        if validation is None:
            return {"loss": None, "validation": None}
        loss = known["loss"][self.args.short // self.args.every - 1]
        return {"loss": loss, "validation": validation}

    # ------------------------------------------------------------------ the parts

    def rates(self, task: str) -> dict:
        cells = [(row, lr) for row in self.args.rows for lr in self.grid(row)]
        known = self.take([Run(task, ROWS[row][0], lr, 0, self.args.short) for row, lr in cells])
        return {
            f"{row}, {lr:g}": self.columns(of) for (row, lr), of in zip(cells, known, strict=True)
        }

    def methods(self, task: str) -> dict:
        options = tasks.get_task(task).options
        shots = (0,) if len(options) == 1 else (0, 4)  # a text has no demonstrations
        table = {f"{n} shots": {"test": self.prompted(task, n)} for n in shots}
        self.rates(task)
        rates = {row: self.best(row, task) for row in self.args.rows}
        runs = {
            row: [Run(task, ROWS[row][0], lr, s, self.args.steps) for s in range(self.args.seeds)]
            for row, lr in rates.items()
        }
        self.take([run for of in runs.values() for run in of])
        curves = {}
        for row, lr in rates.items():
            known = self.take(runs[row])
            if (longest := max(k["steps"] for k in known)) > self.args.steps:
                raise ValueError(
                    f"{self.args.out} has runs of {longest} steps: give --steps {longest}, or "
                    "another --out"
                )
            curves[row] = mean_of([k["validation"] for k in known])
            tests = [k["test"] for k in known if k["test"] is not None]
            table[row] = {
                "lr": lr, "seeds": len(tests), "test": statistics.mean(tests) if tests else None,
                "spread": statistics.stdev(tests) if len(tests) > 1 else None,
                "first loss": statistics.mean(k["loss"][0] for k in known),
                "last loss": statistics.mean(k["loss"][-1] for k in known),
                "active": statistics.mean(list(k["active"].values())[-1] for k in known),
            }  # fmt: skip
        if "MeZO" in curves and known[0]["metric"] == "accuracy":
            bar = max(curves["MeZO"].values())
            for row, curve in curves.items():
                reached = [step for step, value in curve.items() if value >= bar]
                table[row][f"steps to {bar:.3f}"] = min(reached, default=None)
        return table

    def prompted(self, task: str, shots: int) -> float:
        """Test accuracy without training, zero-shot or in-context."""
        known = self.found.setdefault("prompted", {})
        if (name := f"{task}, {shots}") not in known:
            argv = [*self.common(configs.Settings), f"--task={task}", f"--shots={shots}"]
            with contextlib.redirect_stdout(io.StringIO()):
                known[name] = eval.main(argv).value
        return known[name]

    def masks(self, task: str) -> dict:
        rows = {
            f"{kind}, {density:g}": f"train --method=senszoq --bits=16 --mask={kind}-{density:g}"
            for density in self.args.densities for kind in KINDS
        }  # fmt: skip
        return self.short(task, rows, "SensZOQ, 16 bits", tune=True)

    def drop(self, task: str) -> dict:
        """MeZO at the largest rate of its grid; then on from the largest fall of its validation."""
        lr = max(self.grid("MeZO"))
        fallen = Run(task, ROWS["MeZO"][0], lr, 0, self.args.short)
        (known,) = self.take([fallen])
        taken = {step: v for step, v in known["validation"].items() if step <= self.args.short}
        better = 1 if known["metric"] == "accuracy" else -1
        falls = {
            (before, after): better * (taken[before] - taken[after])
            for before, after in itertools.pairwise(sorted(taken))
        }
        before, point = max(falls, key=falls.get)
        if not falls[before, point] > 0:
            return {f"MeZO, {lr:g}, has no drop": {"lr": lr}}
        table = {
            name: {"lr": lr, "validation": taken[step], "after": step}
            for name, step in (("before the drop", before), ("drop", point))
        }
        saved = self.args.out / "dropped" / f"{fallen.name}-{point}"
        if not saved.exists():
            folder = self.args.out / "runs" / fallen.name
            beside = saved.with_name(f"{saved.name}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            eval.main([f"--run={folder}", f"--step={point}", f"--save={beside}"])
            beside.rename(saved)
        fifth = f"train --method=s-mezo --density=0.2 --model={shlex.quote(str(saved.absolute()))}"
        if is_tiny(self.args.model) and "data_dir" not in self.given:
            fifth += " --data-dir=tiny/data"
        rows = {"on with the smallest fifth": fifth}
        rows |= {"on with the largest fifth": f"{fifth} --above=0.8"}
        return table | self.short(task, rows)


PARTS = ("rates", "methods", "sparsity", "groups", "refresh", "drop", "masks", "precision")


def mean_of(curves: list[dict]) -> dict[int, float]:
    """The mean over seeds, at the steps that all of them have."""
    shared = sorted(set.intersection(*map(set, curves)))
    return {step: statistics.mean(curve[step] for curve in curves) for step in shared}


def table(title: str, rows: dict) -> str:
    """In Markdown; a run that ended early has no numbers."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"\n{title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        values = [row.get(column) for column in columns]
        cells = ["–" if v is None else v if type(v) is str else f"{v:.3g}" for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(study: Study, task: str, path: Path) -> None:
    """Loss, validation and active share against steps; loss against rate, sparsity and group."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    (loss, accuracy, active), (rate, sparse, group) = figure.subplots(2, 3)
    found, every = study.tables.get(task, {}), study.args.every
    looks = {
        row: {"ls": ["-", "--", ":", "-."][number % 4], "color": str(0.65 * number / len(ROWS))}
        for number, row in enumerate(ROWS)
    }
    for row, of in found.get("methods", {}).items():
        if row not in ROWS:  # prompts, without steps
            continue
        names = [Run(task, ROWS[row][0], of["lr"], s, 0).name for s in range(study.args.seeds)]
        known = [study.runs[name] for name in names if name in study.runs]
        curve = mean_of([dict(enumerate(k["loss"])) for k in known])
        loss.plot([every * (i + 0.5) for i in curve], list(curve.values()), label=row, **looks[row])
        for axis, what in ((accuracy, "validation"), (active, "active")):
            curve = mean_of([k[what] for k in known])
            axis.plot(list(curve), list(curve.values()), label=row, **looks[row])
    for row in study.args.rows:
        lines = {lr: found.get("rates", {}).get(f"{row}, {lr:g}", {}) for lr in study.grid(row)}
        lines = {lr: of["loss"] for lr, of in lines.items() if of.get("loss") is not None}
        rate.plot(list(lines), list(lines.values()), marker=".", label=row, **looks[row])
    for axis, part, line in ((sparse, "sparsity", "o-"), (group, "groups", "o")):
        rows = {name: of for name, of in found.get(part, {}).items() if of["loss"] is not None}
        axis.plot(list(rows), [of["loss"] for of in rows.values()], line, color="black")
        axis.tick_params(labelsize=7)
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="step", ylabel="validation")  # accuracy, or perplexity
    active.set(xlabel="step", ylabel="active share", yscale="log")
    rate.set(xlabel="learning rate", ylabel=f"loss, step {study.args.short}", xscale="log")
    rate.set(yscale="log")
    sparse.set(xlabel="sparsity", ylabel=f"loss, step {study.args.short}")
    group.set(xlabel="share of the weights by magnitude", ylabel=f"loss, step {study.args.short}")
    for axis in figure.axes:
        axis.set_visible(any(len(line.get_xdata()) for line in axis.lines))
    (loss if found.get("methods") else rate).legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--tasks", nargs="+", default=["rte", "copa"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["rates", "methods"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS),
                        metavar="ROW", help='such as S-MeZO "SensZOQ, 4 bits"')  # fmt: skip
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--short", type=positive, help="of all parts but methods; like --steps")
    parser.add_argument("--every", type=positive, default=50, help="steps between validations")
    parser.add_argument("--seeds", type=positive, default=3, help="of methods")
    pair = configs.named(ROWS, configs.rates)
    parser.add_argument("--grid", nargs="+", type=pair, default=[], metavar="ROW=RATE,RATE")
    parser.add_argument("--tune", action="store_true", help="a rate for each row of every part")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01],
                        help="of masks")  # fmt: skip
    parser.add_argument("--text", help="for [Q]'s mask; default C4")
    parser.add_argument("--samples", type=positive, default=100, help="windows of the text")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a window")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args, common = parser.parse_known_args(argv)
    args.grid, args.short = dict(args.grid), args.short or args.steps
    with one_line_errors(configs.goes_on):
        if args.short > args.steps or args.short % args.every:
            raise ValueError(
                f"--short {args.short} (by default --steps): at most --steps, and a multiple of "
                f"--every, {args.every}"
            )
        (args.out / "runs").mkdir(parents=True, exist_ok=True)
        study = Study(args, common)
        if study.given.get("num_validation") == 0:
            raise ValueError("--num-validation 0: validation chooses the rates")
        for task in args.tasks:
            for part in args.parts:
                if part in OF_S_MEZO:
                    flags = OF_S_MEZO[part].items()
                    commands = {row: f"train --method=s-mezo {more}" for row, more in flags}
                    rows = study.short(task, commands)
                else:
                    rows = getattr(study, part)(task)
                study.tables.setdefault(task, {})[part] = rows
                write_json(study.file, study.found)
                print(table(f"{task}, {part}", rows), flush=True)
            draw(study, task, args.out / f"{task}.png")


if __name__ == "__main__":
    main()
