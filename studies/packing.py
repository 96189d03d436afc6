"""What do rows save that several texts share? The same batches, padded as MeZO pads, and packed.

    python studies/packing.py                                        the tiny model, some seconds
    python studies/packing.py --model DIR --data-dir DIR --tasks sst2 rte boolq

    texts, rows     of a batch: each text has a row of its own in MeZO; here they share some
    tokens          rows × tokens of a row, padding included, over those without packing
    speed           time of a forward pass without packing over one with it, timed in turn:
                    median (min – max) over the batches
    loss            the largest difference between the two losses; it is rounding alone

Batches are those of train.py's first steps. See `tasks.pack_rows`.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import tasks
from harness import bench, dataset, loading
from harness.config import TINY, Settings, check, one_line_errors, positive, study_parser
from studies.learning import table


@torch.no_grad()
def compare(config: Settings, model, tokenizer, data, count: int) -> dict[str, str]:
    """The columns of a task, from its first `count` batches."""
    how, found = {"scored": data.scored, "max_length": config.max_length} | tasks.layout(model), []
    for t in range(count):
        numbers = tasks.minibatch(len(data.train), config.batch_size, config.data_seed, t)
        chosen = [data.train[i] for i in numbers]
        packed = tasks.collate(tokenizer, chosen, **how)
        padded = tasks.collate(tokenizer, chosen, **how | {"pack": 0})
        losses, seconds = [], []
        for batch in (padded, packed):
            losses.append(float(tasks.loss(model, batch)))  # also warms up
            seconds.append(bench.timed(lambda b=batch: tasks.loss(model, b), str(model.device)))
        sizes = [len(padded.input_ids), len(packed.input_ids)]
        sizes += [packed.input_ids.numel() / padded.input_ids.numel()]
        found.append((*sizes, seconds[0] / seconds[1], abs(losses[0] - losses[1])))
    texts, rows, tokens, speed, change = zip(*found, strict=True)
    return {
        "texts": f"{statistics.mean(texts):.0f}", "rows": f"{statistics.mean(rows):.1f}",
        "tokens": f"{statistics.mean(tokens):.2f}",
        "speed": f"{statistics.median(speed):.2f} ({min(speed):.2f} – {max(speed):.2f})",
        "loss": f"{max(change):.1e}",
    }  # fmt: skip


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "rte", "boolq", "copa"])
    parser.add_argument("--data-dir", help="the tiny model brings its own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--batches", type=positive, default=7)
    args = parser.parse_args(argv)
    with one_line_errors():
        model, rows = loading.load_model(args.model, args.dtype), {}
        for task in args.tasks:
            config = Settings(args.model, task, args.data_dir, batch_size=args.batch_size)
            check(config)
            tokenizer, _, data = dataset.prepare(config)
            rows[task] = compare(config, model, tokenizer, data, args.batches)
        print(table(f"{args.model}, {args.dtype}, batches of {args.batch_size}", rows))


if __name__ == "__main__":
    main()
