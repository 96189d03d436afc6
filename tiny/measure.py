"""What masks of text know of tasks, on the tiny model: python tiny/measure.py

[Q]'s measurements, the tables of RESULTS.md. The gradient of a task is the mean over its training
examples, as in [Q]'s figures; masks are per-sample Fisher masks. Text is the model's own
pre-training text (tiny/data/c4.jsonl) and another corpus, sums about fruit (other.jsonl).

    concentration   share of the squared gradient in its own top fraction: mean ± standard deviation
                    over matrices
    coverage        share of the task's squared gradient, over all matrices, inside a mask
    overlap         |mask ∩ the task's own mask| / k; by chance k/d

About two minutes on one core.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import masks
import tasks
from harness import config, loading

TASKS = ("sst2", "rte", "boolq", "copa")
DENSITIES = (1e-3, 1e-2, 1e-1)


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=512, help="texts, and examples of a task")
    parser.add_argument(
        "--length", type=int, default=64, help="tokens of a text; documents have 70"
    )
    args = parser.parse_args()
    folder = config.HERE / "tiny/data"
    tokenizer, _ = loading.load_tokenizer(config.TINY)
    model = loading.load_model(config.TINY, device="cpu")
    weights = masks.decoder_linears(model)

    losses = {}
    for name in ("c4", "other"):
        texts = tasks.read_texts(f"{folder}/{name}.jsonl")
        windows = tasks.text_windows(tokenizer, texts, args.samples, args.length, seed=0)
        losses[name] = tasks.text_losses(windows)
    for name in TASKS:
        data = tasks.load_examples(name, data_dir=folder, num_train=args.samples)
        losses[name] = tasks.task_losses(tokenizer, data.train, data.score)
    fisher, mean = (
        {name: masks.fisher(model, part, statistic=s) for name, part in losses.items()}
        for s in ("per-sample", "of-mean")
    )

    head = [f"{density:g}" for density in DENSITIES]
    rows = []
    for name in losses:
        cells = []
        for scores in (fisher, mean):
            for density in DENSITIES:
                found = masks.concentration(scores[name], density).values()
                cells.append(f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}")
        rows.append([name, *cells])
    both = [f"{kind}, {density}" for kind in ("Fisher", "mean gradient") for density in head]
    print(table(["concentration", *both], rows))

    for density in DENSITIES:
        own = {name: masks.sensitive(scores, density) for name, scores in fisher.items()}
        seeds = [masks.random_index(weights, density, seed) for seed in range(5)]
        rows = []
        for name in TASKS:
            columns = [[own["c4"]], [own["other"]], [own[name]], seeds]
            columns += [[masks.largest(weights, density)], [masks.smallest(weights, density)]]
            cells = []
            for column in columns:
                c = statistics.mean(masks.coverage(mean[name], m) for m in column)
                o = statistics.mean(masks.overlap(m, own[name]) for m in column)
                cells.append(f"{c:.3f} ({o:.3f})")
            best = masks.coverage(mean[name], masks.sensitive(mean[name], density))
            rows.append([name, *cells, f"{best:.3f}"])
        d, k = sum(w.numel() for w in weights.values()), sum(map(len, own["c4"].values()))
        title = f"coverage (overlap), density {density:g}, k = {k}, chance {k / d:.4f}"
        kinds = ["text", "other text", "own Fisher", "random", "largest", "smallest", "best"]
        print(table([title, *kinds], rows))


if __name__ == "__main__":
    main()
