"""[Q]'s mask as a file: which weights move, found once, for any number of runs.

    python masks.py --model M --text FILE --density 0.001 --out mask.safetensors
    python masks.py --model M --task rte --out mask.safetensors      the task's own loss instead

Scores and top-k are sensitivity.py's. train.py comes through here, too, without a --mask.
"""

import argparse
import gc
import hashlib
import json
import random
import re
import shlex
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import loading
import record
import scoring
import sensitivity
import tasks
import zo
from errors import UserError, fail
from sensitivity import STATISTICS

KINDS = ("sensitive", "random", "largest", "smallest")  # of masks, all of one size
SCORING = {  # settings of --kind sensitive alone, and what they are where nothing is said
    "statistic": STATISTICS[0], "samples": 100, "length": 512, "max_length": 2048, "groups": 1,
    "scores_device": None,
}  # fmt: skip


# ------------------------------------------------------------------ samples to score on

C4 = "allenai/c4 en/c4-train.00000-of-01024.json.gz"  # its first 10,000 documents are used
C4_COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"


def check_text(path: str) -> None:
    """UserError unless it is a file that `read_texts` can read, by its name."""
    if Path(path).suffix not in (".txt", ".jsonl") or not Path(path).is_file():
        raise UserError(f"--text {path}: a .txt or .jsonl file that exists")


def read_texts(path: str | None) -> list[str]:
    """Documents of a .jsonl of {"text": …} or a .txt (blank lines divide them); None: C4's."""
    if path is None:
        try:
            from datasets import load_dataset

            name, file = C4.split()
            rows = load_dataset(
                name, data_files=file, split="train", revision=C4_COMMIT, streaming=True
            )
            return [row["text"] for row in rows.take(10_000)]
        except Exception as error:  # offline, not installed: each has a type of its own
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"cannot stream C4 from the hub ({why}); give --text FILE") from error
    check_text(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8: {error}") from error
    if path.endswith(".txt"):
        return [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split at U+2028
        if line.strip():
            try:
                texts.append("" + json.loads(line)["text"])  # a TypeError where it is no text
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}:{number} is not a line {{"text": "…"}}') from error
    return texts


def text_windows(tokenizer, texts: list[str], samples: int, length: int, seed: int) -> Tensor:
    """[samples, length] token ids: random windows, each from a random document long enough for it.

    As SqueezeLLM-gradients draws from C4, but without replacement while documents last. Where the
    long ones together hold fewer than `samples` windows, all documents are joined and the windows
    come from anywhere.
    """
    rng = random.Random(seed)
    long, short = [], []
    for text in rng.sample(texts, len(texts)):
        ids = tokenizer(text, verbose=False)["input_ids"]
        (long if len(ids) >= length else short).append(ids)
        if len(long) == samples:
            break
    if sum(len(ids) // length for ids in long) < samples:
        long = [[token for ids in long + short for token in ids]]
    if len(long[0]) < length:
        raise UserError(
            f"the text has {len(long[0])} tokens, less than one sample of --length {length}; "
            "give more text or a smaller --length"
        )
    windows = []
    for i in range(samples):
        ids = long[i % len(long)]
        start = rng.randrange(len(ids) - length + 1)
        windows.append(ids[start : start + length])
    return torch.tensor(windows)


def text_losses(windows: Tensor) -> list:
    """Per row of [samples, length] token ids, the language-model loss."""

    def loss(ids, model):
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1].float(), ids[1:])

    return [partial(loss, row) for row in windows]


def task_losses(tokenizer, examples, classification: bool, max_length: int = 2048) -> list:
    """Per example, the loss that train.py would train it with."""

    def loss(example, model):
        batch = scoring.collate(
            tokenizer,
            [example],
            score="all" if classification else "right",
            max_length=max_length,
            device=model.device,
        )
        logits = model(**batch.inputs(model), use_cache=False).logits
        return batch.loss(logits)

    return [partial(loss, example) for example in examples]


# ------------------------------------------------------------------ the command


def check(args) -> None:
    """UserError for a value that cannot work; what was not said is filled in."""
    scored, task = args.kind == "sensitive", args.task or args.train_file
    text = args.text is not None  # also an empty one
    if sum(map(bool, (text, args.task, args.train_file, not scored))) > 1:
        raise UserError("give one of --text, --task, --train-file and another --kind")
    idle = SCORING if not scored else ("length",) if task else ("max_length",)
    if given := [loading.flag(name) for name in idle if getattr(args, name) is not None]:
        what = f"--kind {args.kind}" if not scored else "a task" if task else "text"
        raise UserError(f"{what} has no use for {', '.join(given)}; leave it out")
    for name, default in SCORING.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    loading.at_least(args, 1, "samples", "groups")
    loading.at_least(args, 2, "length", "max_length")
    if not 0 < args.density <= 1:
        raise UserError(f"--density {args.density}: outside (0, 1], the share of each matrix")
    if not 0 <= args.seed < zo.MAX_RUN_SEED:
        raise UserError(f"--seed {args.seed}: from 0 to {zo.MAX_RUN_SEED - 1}")
    if args.data_dir and not args.task:
        raise UserError(f"--data-dir {args.data_dir}: the folder of a task; give --task")
    loading.check_file("--out", Path(args.out), new=True)
    loading.check_folder(args.model)


def read(args, data: tasks.Data | None) -> tasks.Data | list[str] | None:
    """What is scored on: a task's examples, or texts; None: C4's, as it takes a while, or nothing.

    `data`: see `compute`.
    """
    if args.task or args.train_file:
        settings = loading.Settings(
            model=args.model, task=args.task, data_dir=args.data_dir, train_file=args.train_file
        )
        if args.train_file:
            settings.num_validation, settings.test_file = 0, args.train_file  # all of it is used
        loading.check(settings)
        return loading.load_data(settings) if data is None else data
    if args.kind == "sensitive" and args.text is None and loading.is_tiny(args.model):
        args.text = loading.locate("tiny/data/c4.jsonl")
    return None if args.text is None else read_texts(args.text)


def samples(args, source, tokenizer, config) -> tuple[list, dict]:
    """(losses, provenance) of what `read` found."""
    if isinstance(source, tasks.Data):
        longest = loading.usable_length(args.max_length, config)
        examples = source.train[: args.samples]
        losses = task_losses(tokenizer, examples, source.classification, longest)
        about = f"{args.task or args.train_file}, {source.source}"
        return losses, {"source": about, "data": source.fingerprint}
    length = loading.usable_length(args.length, config)
    if length < args.length:
        print(f"  windows of {length} tokens, not {args.length}: the model has no more positions")
    texts = read_texts(None) if source is None else source
    windows = text_windows(tokenizer, texts, args.samples, length, args.seed)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    about = {"source": args.text or C4, "length": length, "data": digest}
    return text_losses(windows), about


def compute(args, data: tasks.Data | None = None) -> tuple[dict[str, Tensor], dict]:
    """(index, provenance) for the command line's settings; bad ones fail before a model loads.

    `data`: the task's examples where the caller has them, with a split of its own.
    """
    check(args)
    device = loading.choose_device(args.device, args.device_map)
    scores_on = args.scores_device
    if scores_on is not None:
        scores_on = loading.choose_device(scores_on, flag="--scores-device")
    source, trust = read(args, data), args.trust_remote_code
    import transformers  # five seconds, so not before bad flags fail

    tokenizer, config = loading.load_tokenizer(args.model, trust)
    sensitivity.how_many(sensitivity.decoder_linears(loading.skeleton(config, trust)), args.density)
    made = {"model": args.model, "kind": args.kind, "density": args.density, "seed": args.seed}
    dtype = args.dtype
    if args.kind == "sensitive":
        losses, about = samples(args, source, tokenizer, config)
        made |= about | {"statistic": args.statistic, "samples": len(losses)}
        if dtype == "auto" and device != "cpu":
            dtype = "bfloat16"  # also where the checkpoint is fp16, whose gradients underflow
    model = loading.load_model(args.model, dtype, device, trust, device_map=args.device_map)
    weights = sensitivity.decoder_linears(model)
    if args.kind == "sensitive":
        how = {"statistic": args.statistic, "groups": args.groups, "device": scores_on}
        bar = partial(tqdm, desc="scoring", unit=" samples")
        index = sensitivity.sensitive_index(model, losses, args.density, progress=bar, **how)
    elif args.kind == "random":
        index = sensitivity.random_index(weights, args.density, args.seed)
    else:
        by_size = sensitivity.largest if args.kind == "largest" else sensitivity.smallest
        index = by_size(weights, args.density)
    made |= {"dtype": str(model.dtype).removeprefix("torch.")}
    made |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return index, made | {"matrices": sensitivity.signature(weights)}


def for_run(config, run: Path, data) -> None:
    """[Q]'s mask into the run directory: a copy of --mask, or made as `python masks.py` would."""
    path = run / record.MASK
    if config.mask is not None:
        return record.write_whole(path, Path(config.mask).read_bytes())
    of_task = ("task", "data_dir", "train_file", "max_length")
    names = ("text",) if config.mask_from == "text" else of_task
    names = ("model", "density", "seed", "device", "device_map", *names)
    said = {name: getattr(config, name) for name in names} | {"out": path}
    flags = [f"{loading.flag(n)}={value}" for n, value in said.items() if value is not None]
    flags += ["--trust-remote-code"] * config.trust_remote_code
    of = f" on {len(data.train)} training examples of this run" * (config.mask_from == "task")
    print(f"  making the mask as by: python masks.py {shlex.join(flags)}{of}")
    args = make_parser().parse_args(flags)
    record.write_json(run / "config.json", {"mask_from": config.mask_from})
    try:
        sensitivity.save_mask(path, *compute(args, data))
    except torch.OutOfMemoryError as error:
        raise UserError(
            "no memory to score the weights; make the mask with python masks.py --groups 8 (where "
            "that is not enough, --scores-device cpu), then give --mask FILE"
        ) from error
    gc.collect()  # the scored model, held in cycles
    if torch.cuda.is_available():  # the peak that a run reports is its own
        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python masks.py`; train.py goes through it, too."""
    parser = loading.Parser(description="Compute a mask of [Q] and write it to a file.")
    add = parser.add_argument
    add("--model", default=loading.Settings.model, help="hub name or local folder")
    add("--out", required=True, help="new file, such as mask.safetensors")
    add("--text", help='.txt or .jsonl of {"text": …}; default C4; tiny/model has its own')
    add("--task", help="instead of text: the training loss of this task")
    add("--data-dir", help="folder with the task's official files")
    add("--train-file", help="a task of your own, as for train.py")
    add("--kind", choices=KINDS, default="sensitive", help="the others are for comparison")
    add("--statistic", choices=STATISTICS, help="mean of squares (default)")
    add("--density", type=float, default=0.001, help="share of each matrix (default 0.001)")
    add("--samples", type=int, help="texts or examples (default 100)")
    add("--length", type=int, help="of text: tokens of a sample (default 512)")
    add("--max-length", type=int, help="of a task: tokens of a prompt (default 2048)")
    add("--seed", type=int, default=0, help="of the texts drawn and of --kind random")
    add("--groups", type=int, help="score 1/n of the matrices at a time, in n passes")
    add("--scores-device", help="where scores are kept, such as cpu; default the model's device")
    add("--dtype", choices=loading.DTYPES, default="auto", help="auto: bfloat16, on a CPU float32")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--device-map", choices=("auto",), help="spread the layers over all GPUs")
    add("--trust-remote-code", action="store_true")
    return parser


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    try:
        index, provenance = compute(args)
        sensitivity.save_mask(args.out, index, provenance)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        memory = "--groups 8, or --scores-device cpu where that is not enough"
        raise SystemExit(fail("masks.py", error, memory)) from None
    except KeyboardInterrupt:
        print("\nmasks.py: stopped; nothing was written")
        raise SystemExit(130) from None
    chosen = sum(map(len, index.values()))
    print(f"{args.out}: {chosen:,} weights of {len(index)} matrices, {args.kind}")


if __name__ == "__main__":  # as python masks.py
    main()
