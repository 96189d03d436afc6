"""What do rows save that several texts share? The same batches, padded as MeZO pads, and packed.

    python -m studies.packing                                        the tiny model, some seconds
    python -m studies.packing --model DIR --data-dir DIR --tasks sst2 rte boolq

    texts, rows     of a batch: each text has a row of its own in MeZO; here they share some
    tokens          rows × tokens of a row, padding included, over those without packing
    forward         time of a forward pass without packing over one with it
    step            the same of a step of S-MeZO
    R               time of a step over that of two forward passes, both packed
    loss            the largest difference between the two losses; it is rounding alone

What is compared is timed in turn; each ratio is the median (min – max) over the batches, which are
those of train.py's first steps. See `tasks.pack_rows`.
"""

import statistics

import torch
from tqdm import tqdm

import masks
import tasks
from harness import bench, dataset, loading
from harness.config import TINY, Settings, complete, one_line_errors, positive, study_parser
from model_patch import Patch
from studies.learning import table
from studies.slopes import patched


@torch.no_grad()
def compare(config: Settings, patch: Patch, data, count: int) -> dict[str, str]:
    """The columns of a task, from its first `count` batches."""
    model, device, found = patch.model, str(patch.device), []
    how = {"scored": data.scored, "max_length": config.max_length} | tasks.layout(model)

    def step(batch):
        patch.losses(batch, tasks.loss, seed=0)
        patch.update(seed=0, a=1e-9)

    for t in tqdm(range(count), "batches", leave=False):
        numbers = tasks.minibatch(len(data.train), config.batch_size, config.data_seed, t)
        chosen = [data.train[i] for i in numbers]
        packed = tasks.collate(data.tokenizer, chosen, **how)
        # at 1 no row is shared, and the head is read as in `packed`
        padded = tasks.collate(data.tokenizer, chosen, **how | {"pack": min(1, how["pack"])})
        losses, forward, whole = [], [], []
        for batch in (padded, packed):
            losses.append(float(tasks.loss(model, batch)))  # also warms up
            step(batch)
            forward.append(bench.timed(lambda b=batch: tasks.loss(model, b), device))
            whole.append(bench.timed(lambda b=batch: step(b), device))
        sizes = [len(padded.input_ids), len(packed.input_ids)]
        sizes += [packed.input_ids.numel() / padded.input_ids.numel()]
        ratios = [forward[0] / forward[1], whole[0] / whole[1], whole[1] / forward[1] / 2]
        found.append((*sizes, *ratios, abs(losses[0] - losses[1])))
    texts, rows, tokens, *ratios, change = zip(*found, strict=True)
    return {
        "texts": f"{statistics.mean(texts):.0f}", "rows": f"{statistics.mean(rows):.1f}",
        "tokens": f"{statistics.mean(tokens):.2f}",
        **{
            name: f"{statistics.median(of):.2f} ({min(of):.2f} – {max(of):.2f})"
            for name, of in zip(("forward", "step", "R"), ratios, strict=True)
        },
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
        patch = patched(model, masks.SmallWeights(0.25))
        loading.keep_freed_memory()  # as for training
        for task in args.tasks:
            config = complete(Settings(args.model, task, args.data_dir, batch_size=args.batch_size))
            config, model_config, data = dataset.load(config)
            tasks.check_examples(data, data.train, config.max_length, model_config)
            rows[task] = compare(config, patch, data, args.batches)
            title = f"{args.model}, {args.dtype}, batches of {args.batch_size}"
            lines = table(title, rows).splitlines()
            print(*(lines if len(rows) == 1 else lines[-1:]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
