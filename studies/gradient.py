"""What the gradients of a language model are like, and what masks know of them.

    python -m studies.gradient                                    the tiny model, a few minutes
    python -m studies.gradient --model DIR --data-dir DIR --tasks sst2 rte \\
        --text c4.jsonl --other wikitext.txt --out DIR            a real one, an hour per task

    part           question                                                       claim
    concentration  how much of the squared gradient do its own top weights hold?  [Q]: 0.1 %, half
    coverage       how much of a task's lies inside a mask from elsewhere?        [Q] Fig. 3: C4's
                   mask has 20 times what masks by magnitude have
    overlap        which share of two masks' places is common?                    [Q]: transferable
    magnitude      how much lies in each quarter of the weights by size?          where [S] and [Q]
                   meet: [S] moves the smallest quarter
    cosine         how far is g ẑ from the gradient?                              √(2/πd̂), by chance
    increase       how often does a step increase the loss, of its own batch and  [S] Fig. 2b and 5
                   of another?
    tuning         what is left of concentration and coverage after a tenth of a  [Q] Fig. 3,
                   fine-tuning by Adam, and after all of it?                      replies

How it works
    Scores are per-sample Fisher diagonals of the linears in the decoder (masks.fisher), and masks
    take their top per matrix. A task's gradient is the mean over its examples, as in [Q]'s figures.
    `--parts scores` is the first four. Answers go to gradient.json as they come. What is in it is
    not done again, and with everything in it only the tables and the picture are made. Other
    settings want another --out.

What it costs
    A forward and a backward pass per sample, and two fp32 copies of the weights per source of text.
"""

import argparse
import itertools
import json
import math
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

import masks
import tasks
import train
import zo
from harness import config as configs
from harness import dataset, loading
from harness.config import ROOT, TINY, is_tiny, one_line_errors, positive, study_parser, write_json
from studies import first_order
from studies.learning import table
from studies.slopes import patched, slope

DENSITIES = (1e-4, 1e-3, 1e-2, 1e-1)
MASK = 1e-3  # [Q]'s density
# {part: the last table of its answer}
PARTS = {"scores": "magnitude", "cosine": "cosine", "increase": "increase", "tuning": "tuning"}
UNLIKE = ("out", "tasks", "parts")  # in these, answers of one file may differ
RULES = {"MeZO": masks.Everything(), "S-MeZO": masks.SmallWeights(0.25)}


def quarters(weights: dict, scores: dict) -> dict[str, float]:
    """The share of the scores' sum in each quarter of every matrix's weights, by magnitude."""
    shares, whole, below = {}, sum(float(s.double().sum()) for s in scores.values()), 0.0
    for quarter in (1, 2, 3, 4):
        inside = sum(
            float(scores[name][w.abs() <= masks.threshold(w, quarter / 4)].double().sum())
            for name, w in weights.items()
        )
        shares[f"quarter {quarter}"], below = (inside - below) / whole, inside
    return shares


class Study:
    """One model, its sources of text, and the file of answers."""

    def __init__(self, args):
        self.args, self.file = args, args.out / "gradient.json"
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}
        kept = {name: str(value) for name, value in vars(args).items() if name not in UNLIKE}
        if self.found.setdefault("settings", kept) != kept:
            raise ValueError(f"{self.file} has the answers of other settings; give another --out")
        if is_tiny(args.model):
            tiny = f"{ROOT}/tiny/data"
            args.data_dir, args.text = args.data_dir or tiny, args.text or f"{tiny}/c4.jsonl"
            args.other = args.other or f"{tiny}/other.jsonl"
        if args.other is None:
            raise ValueError("--other: another text, .txt or .jsonl, such as WikiText-2")
        self.how = argparse.Namespace(**vars(args), seed=1, micro_batch=None)  # as of train.py

    @cached_property
    def model(self):
        return loading.load_model(self.args.model, self.args.dtype)

    @cached_property
    def weights(self) -> dict:
        return masks.decoder_linears(self.model)

    def answer(self, task: str) -> None:
        """Every part for one task, unless it is there."""
        missing = [part for part in self.args.parts if task not in self.found.get(PARTS[part], {})]
        if not missing:
            return
        args = self.args
        settings = configs.Settings(args.model, task, args.data_dir, max_length=args.max_length)
        _, model_config, data = dataset.load(settings)
        tasks.check_examples(data, data.train, args.max_length, model_config)
        for part in missing:
            for name, rows in getattr(self, part)(data).items():
                self.found.setdefault(name, {})[task] = rows
            write_json(self.file, self.found | {"machine": loading.machine(self.model.device)})

    def fisher(self, losses, name: str, **how) -> dict:
        return masks.fisher(self.model, tqdm(losses, f"scoring {name}", leave=False), **how)

    @cached_property
    def masks_of_texts(self) -> dict:
        """{density: {name of a mask: index}} of every mask that no task made."""
        args, kinds = self.args, {}
        tokenizer, model_config = loading.load_tokenizer(args.model)
        for name, file in (("C4", args.text), ("other text", args.other)):
            texts = dataset.read_texts(file)
            windows = tasks.text_windows(tokenizer, texts, args.samples, args.length, seed=0)
            tasks.check_tokens(tokenizer, windows.flatten().tolist(), model_config)
            scores = self.fisher(tasks.text_losses(windows), name)
            for density in DENSITIES:
                kinds.setdefault(density, {})[name] = masks.sensitive(scores, density)
        for density, found in kinds.items():
            found["largest"] = masks.largest(self.weights, density)
            found["smallest"] = masks.smallest(self.weights, density)
            found["random"] = masks.random_index(self.weights, density)
        return kinds

    # ------------------------------------------------------------------ the parts

    def scores(self, data) -> dict[str, dict]:
        """Concentration, coverage, overlap and magnitude: all follow from a task's scores."""
        losses = tasks.task_losses(data, self.args.samples, self.args.max_length)
        own = self.fisher(losses, "the task")
        mean = self.fisher(losses, "the task", statistic="of-mean")
        kinds = self.masks_of_texts
        mine = {density: masks.sensitive(own, density) for density in DENSITIES}
        best = {density: masks.sensitive(mean, density) for density in DENSITIES}
        top = {f"{d:g}": masks.coverage(own, mine[d]) for d in DENSITIES}
        top |= {f"{d:g}, mean gradient": masks.coverage(mean, best[d]) for d in DENSITIES}
        columns = {
            f"{d:g}": {
                name: masks.coverage(mean, index)
                for name, index in {"task": mine[d], **kinds[d]}.items()
            }
            for d in DENSITIES
        }
        names = {"task": mine[MASK], **kinds[MASK]}
        common = {
            f"{a} and {b}": masks.overlap(names[a], names[b])
            for a, b in itertools.combinations(names, 2)
        }
        found = {"concentration": top, "coverage": columns, "overlap": common}
        return found | {"magnitude": quarters(self.weights, mean)}

    def batches(self, data, count: int):
        """`count` batches, drawn as train.py draws them."""
        for t in range(count):
            yield from train.batches_of_step(self.how, self.model, data, t)

    def gradient(self, batch) -> dict:
        """autograd's, of every parameter."""
        tasks.loss(self.model, batch).backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def cosine(self, data) -> dict:
        """Mean |cos| of ẑ and the gradient of one batch, and what a z that knows nothing has."""
        (batch,) = self.batches(data, 1)
        gradients, found = self.gradient(batch), {}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        for name, rule in RULES.items():
            patch, d, inside = patched(self.model, rule), 0, 0.0
            for weight in patch.weights:
                mask = weight.mask()
                d += int(mask.sum())
                inside += float((gradients[weight.name] * mask).double().square().sum())
            slopes = [
                abs(slope(patch, gradients, zo.step_seed(2, t))) for t in range(self.args.seeds)
            ]
            patch.remove()
            found[name] = sum(slopes) / len(slopes) / (norm * math.sqrt(d))
            found[f"{name}, by chance"] = math.sqrt(2 / math.pi / d * inside) / norm
        return {"cosine": found}

    def increase(self, data) -> dict:
        """Share of single steps from θ_0 that increase the loss, per method and batch."""
        start = [(p, p.detach().clone()) for p in self.model.parameters()]
        trials, counts = self.args.trials, {}
        drawn = list(self.batches(data, trials + 1))

        @torch.no_grad()
        def loss(batch):
            return float(tasks.loss(self.model, batch))

        before = [loss(batch) for batch in drawn]
        for name, rate in self.args.rates.items():
            worse = {"own batch": 0, "another": 0}
            patch = None if name == "SGD" else patched(self.model, RULES[name])
            for t in tqdm(range(trials), f"steps of {name}", leave=False):
                if patch is None:
                    for key, g in self.gradient(drawn[t]).items():
                        self.model.get_parameter(key).data.sub_(rate * g)
                else:
                    seed = zo.step_seed(3, t)
                    plus, minus = patch.losses(drawn[t], tasks.loss, seed)
                    patch.update(seed, -rate * float(zo.projected_grad(plus, minus, patch.eps)))
                worse["own batch"] += loss(drawn[t]) > before[t]
                worse["another"] += loss(drawn[t + 1]) > before[t + 1]
                for p, theta in start:
                    p.data.copy_(theta)
            if patch is not None:
                patch.remove()
            counts |= {f"{name}, {which}": n / trials for which, n in worse.items()}
        return {"increase": counts}

    def tuning(self, data) -> dict:
        """Of weights that Adam moves: whose masks still cover the task's squared gradient?

        "static" is the task's mask of before, "dynamic" its mask of now.
        """
        args, found = self.args, {}
        elsewhere = {density: kinds["C4"] for density, kinds in self.masks_of_texts.items()}
        start = [(p, p.detach().clone()) for p in self.model.parameters()]
        optimizer = torch.optim.Adam(self.model.parameters(), lr=args.adam, foreach=False)
        losses = tasks.task_losses(data, args.samples, args.max_length)
        static = {}
        for t in tqdm(range(args.tuning + 1), "tuning", leave=False):
            if t in (0, args.tuning // 10, args.tuning):
                own = self.fisher(losses, "the task")
                mean = self.fisher(losses, "the task", statistic="of-mean")
                alone = masks.concentration(mean, MASK).values()
                found[f"step {t}, top {MASK:g}, mean over matrices"] = sum(alone) / len(alone)
                for density in DENSITIES:
                    now = masks.sensitive(own, density)
                    kinds = {"dynamic": now, "static": static.setdefault(density, now)}
                    for name, index in (kinds | {"C4": elsewhere[density]}).items():
                        found[f"step {t}, {density:g}, {name}"] = masks.coverage(mean, index)
            first_order.backward(self.how, self.model, data, t)
            optimizer.step()
        with torch.no_grad():
            for p, theta in start:
                p.copy_(theta)
        self.model.zero_grad(set_to_none=True)
        return {"tuning": found}


# ------------------------------------------------------------------ tables and picture


def tables(found: dict) -> str:
    """A table per part, a column per task."""
    parts = {part: rows for part, rows in found.items() if part not in ("machine", "settings")}
    coverage = parts.pop("coverage", {})
    for density in (f"{d:g}" for d in DENSITIES):
        parts[f"coverage at {density}"] = {task: of[density] for task, of in coverage.items()}

    def turned(of: dict) -> dict:  # {task: {row: number}} to {row: {task: number}}
        return {row: {task: of[task][row] for task in of} for row in next(iter(of.values()))}

    return "\n".join(table(part, turned(of)) for part, of in parts.items() if of)


def draw(found: dict, path: Path) -> None:
    """Concentration, coverage at 0.1 %, quarters by magnitude and increases, readable in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = {
        "squared gradient in its own top share": found.get("concentration", {}),
        "share of the squared gradient inside a mask of 0.1 %": {
            task: of[f"{MASK:g}"] for task, of in found.get("coverage", {}).items()
        },
        "squared gradient by size of the weights": found.get("magnitude", {}),
        "share of steps that increase the loss": found.get("increase", {}),
    }
    for axis, (title, rows) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axis.set_title(title, fontsize=10)
        for number, (task, of) in enumerate(rows.items()):
            places = [i + 0.8 * (number + 0.5) / len(rows) for i in range(len(of))]
            grey = str(0.15 + 0.65 * number / max(1, len(rows) - 1))
            axis.bar(places, list(of.values()), 0.8 / len(rows), label=task, color=grey)
            axis.set_xticks([i + 0.4 for i in range(len(of))], list(of), rotation=30, ha="right")
        axis.tick_params(labelsize=7)
        if rows:
            axis.legend(fontsize=7)
    figure.savefig(path)


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--tasks", nargs="+", default=["rte", "copa"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data-dir", help="as for train.py; the tiny model brings its own")
    parser.add_argument("--text", help="C4, or what stands for it; default the hub's")
    parser.add_argument("--other", help="another text")
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--samples", type=positive, default=64, help="texts, and a task's examples")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a text")
    parser.add_argument("--max-length", type=positive, default=256, help="tokens of an example")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--seeds", type=positive, default=16, help="of the cosine")
    parser.add_argument("--trials", type=positive, default=30, help="steps per method")
    parser.add_argument("--tuning", type=positive, default=100, help="steps of Adam, of tuning")
    parser.add_argument("--adam", type=configs.rate, default=3e-4, help="their learning rate")
    pair = configs.named((*RULES, "SGD"), configs.rate)
    parser.add_argument("--rates", nargs="+", type=pair, metavar="METHOD=RATE",
                        default=[("MeZO", 1e-3), ("S-MeZO", 1e-2), ("SGD", 1e-1)])  # fmt: skip
    args = parser.parse_args(argv)
    args.rates = dict(args.rates)
    with one_line_errors(configs.goes_on):
        args.out.mkdir(parents=True, exist_ok=True)
        study = Study(args)
        for task in args.tasks:
            study.answer(task)
        print(tables(study.found))
        draw(study.found, args.out / "gradient.png")


if __name__ == "__main__":
    main()
