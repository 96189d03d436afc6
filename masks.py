"""Which weights move: Algorithm 3, thresholds, and the rules made of them.

    code        paper
    density     share of the weights that move: 1 − [S]'s "sparsity"; [Q]'s 0.1 % is 0.001
    threshold   h_i, one per tensor, from a percentile of |θ_i|, once before training
    get_mask    m = GetMask(θ, h), Algorithm 3
    rule        one answer to "which weights move", the only thing that tells the methods apart
    index       [Q]'s m: per matrix, the places of the weights that move (sensitivity.py)

[S]'s appendix C.2 puts "sparsity 80 %" at the 80th percentile "of the weight values", one of the
authors' replies 0.75 at the 75th, of |θ|: the smallest 75 % would move. Their RTE scores say
otherwise: sparsity 0.75 has 80.7 ± 1.6 (three seeds, in a reply), the smallest quarter alone 82.7,
the smallest three quarters 72.3, all weights 71.7. So **sparsity 0.75 means that the smallest 25 %
move.**

A rule has two methods. `prepare` looks at a weight once, before training, and returns what must be
kept for it (a threshold, a bit per weight, nothing); `mask` answers for any of its elements, from
the unperturbed θ and what was kept. It is traced into the fused kernel, so a rule costs what its
lines cost; README.md has one of five lines.

    rule               the mask is                                   kept
    Everything         all ones: MeZO                                nothing
    SmallWeights       re-taken every step: S-MeZO, "dynamic mask"   h, one number per tensor
      refresh_every=k  the same, and h re-taken every k steps        h
    ConstantMask       taken once, before training: [S] §3.2         one byte per weight
    PackedMask         the same, packed ([S] §3.3 packs m_t)         one bit per weight
    RandomMask         regenerated from a seed: R-MeZO               nothing

[Q]'s mask is not a rule but an index, computed once and kept as a file, for any number of runs:

    python masks.py --model M --text FILE --density 0.001 --out mask.safetensors
    python masks.py --model M --task rte --out mask.safetensors      the task's own loss instead

Deviations from [S]. Algorithm 3 is printed with two slips, see `get_mask`. "Layer" is read as one
parameter tensor.
"""

import argparse
import hashlib
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import zo
from errors import UserError, fail
from sensitivity import (
    STATISTICS,
    decoder_linears,
    how_many,
    kth_smallest,
    largest,
    random_index,
    save_mask,
    sensitive_index,
    signature,
    smallest,
)


def threshold(weight: Tensor, density: float) -> Tensor:
    """h: the k-th smallest |w|, k = round(density · numel), at least 1; 0-dim, the weight's dtype.

    [S] §3.2 and appendix C.2, at percentile 1 − sparsity (see above). |w| ≤ h holds for exactly k
    elements, more only where values tie with h: for all of a norm's untrained ones. Needs one copy.
    """
    assert 0 < density <= 1, f"density {density} is outside (0, 1]"
    magnitude = weight.detach().abs().flatten()
    return kth_smallest(magnitude, max(1, round(density * magnitude.numel())))


def get_mask(theta: Tensor, h: Tensor) -> Tensor:
    """[S] Algorithm 3, GetMask, of one tensor θ_i and its threshold h_i.

        printed:  if θ_ij ≤ h_i then θ_ij = 1, else 0          meant:  m_ij = 1 where |θ_ij| ≤ h_i

    Two misprints: the result is m; and without |·| all negative weights would move (50 %) and half
    of the smallest quarter (12.5 %), 62.5 % where 25 % are meant.
    """
    return theta.abs() <= h


class Rule:
    """Which elements of a weight move. `density` is the share wanted, in (0, 1]."""

    refresh_every = 0  # steps after which `prepare` is called again; 0: never
    static = False  # True: the mask never changes, so that its elements are counted once

    def __init__(self, density: float = 1.0):
        if not 0 < density <= 1:
            raise UserError(f"density {density} is outside (0, 1]: the share of weights that move")
        self.density = density

    def prepare(self, weight: Tensor, stream: int) -> Tensor:
        """What must be kept for `weight`, on its device; called before training."""
        return torch.empty(0, device=weight.device)

    @staticmethod
    def mask(theta: Tensor, index: Tensor, state: Tensor) -> Tensor:
        """m for the elements `index` of the flattened weight, whose values are `theta`; boolean.

        Called with parts of the weight, of any shape, so each element must be answered by itself.
        Static: all it knows of its weight is what `prepare` returned (its flattened mask, its
        number of columns, …), so one compiled kernel serves every tensor and every run.
        """
        raise NotImplementedError


class Everything(Rule):
    """MeZO: every weight moves."""

    static = True

    @staticmethod
    def mask(theta, index, state):
        return torch.ones_like(theta, dtype=torch.bool)


class SmallWeights(Rule):
    """S-MeZO, [S] §3.2 "dynamic mask": |θ_t| ≤ h, re-taken every step, h fixed before training.

    `refresh_every=k` re-takes h every k steps as well: the authors' ablation (one seed of RTE: 83.0
    with h fixed, 82.0 with k = 100, 80.2 with k = 5); in a loop of your own call `Patch.refresh(t)`
    before step t. With h fixed, a weight that walks out of [−h, h] freezes there: watch the active
    density in the metrics.
    """

    def __init__(self, density: float, refresh_every: int = 0):
        super().__init__(density)
        self.refresh_every = refresh_every

    def prepare(self, weight, stream):
        return threshold(weight, self.density)

    @staticmethod
    def mask(theta, index, state):
        return get_mask(theta, state)


class ConstantMask(Rule):
    """[S] §3.2 "constant mask": the small weights of before training, stored as booleans."""

    static = True

    def prepare(self, weight, stream):
        return get_mask(weight.detach().flatten(), threshold(weight, self.density))

    @staticmethod
    def mask(theta, index, state):
        return state[index]


class PackedMask(ConstantMask):
    """The constant mask at one bit per weight: weight j is bit j mod 8 of byte j div 8.

    [S] §3.3's "1-bit quantization" packs each step's own m; with its forward nothing needs storing.
    """

    def prepare(self, weight, stream):
        mask = super().prepare(weight, stream)
        packed = torch.zeros((mask.numel() + 7) // 8, dtype=torch.uint8, device=mask.device)
        for bit in range(8):
            column = mask[bit::8].to(torch.uint8)
            packed[: column.numel()] |= column << bit
        return packed

    @staticmethod
    def mask(theta, index, state):
        return (state[index >> 3] >> (index & 7) & 1).bool()


class RandomMask(Rule):
    """R-MeZO ([S] Table 1): a random mask, constant over the run, regenerated and never stored.

    Weight j moves when a uniform 32-bit word of its own is below density · 2³². (Comparing a
    *normal* draw with the density, as one code base does, turns 0.5 into 0.69.)
    """

    static = True

    def __init__(self, density: float, seed: int = 0):
        super().__init__(density)
        self.seed = seed

    def prepare(self, weight, stream):
        bound = int(self.density * 2**32)
        return torch.tensor([self.seed, zo.MAX_STREAMS + stream, bound], device=weight.device)

    @staticmethod
    def mask(theta, index, state):
        seed, stream, bound = state[0], state[1], state[2]
        return zo.random_words(seed, stream, index)[0] < bound


@torch.no_grad()
def active_count(rule: Rule, flat: Tensor, state: Tensor) -> int:
    """How many elements of a flattened weight are inside the mask now."""
    chunk = 1 << 22  # bounds the temporaries: 32 MB of indices
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), chunk):
        theta = flat[start : start + chunk]
        index = torch.arange(start, start + theta.numel(), device=flat.device)
        total += torch.count_nonzero(rule.mask(theta, index, state))
    return int(total)


METHODS = ("s-mezo", "mezo", "r-mezo", "sensitive", "senszoq")
FEW = ("sensitive", "senszoq")  # [Q]: an index says which weights move, dense in 16 or 4 bits
S_KINDS = ("dynamic", "constant", "packed")  # of s-mezo's mask, [S] §3.2; packed: at one bit
KINDS = ("sensitive", "random", "largest", "smallest")  # of [Q]'s masks, all of one size


def make_rule(method: str, density: float, *, kind="dynamic", refresh_every=0, seed=0) -> Rule:
    """The rule of a method of [S]; `kind` is s-mezo's, one of S_KINDS."""
    if method == "mezo":
        return Everything()
    if method == "r-mezo":
        return RandomMask(density, seed)
    if kind == "dynamic":
        return SmallWeights(density, refresh_every)
    return {"constant": ConstantMask, "packed": PackedMask}[kind](density)


# ------------------------------------------------------------------ making [Q]'s mask


def text_losses(windows: Tensor) -> list:
    """Per row of [samples, length] token ids, the language-model loss."""

    def loss(ids, model):
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1].float(), ids[1:])

    return [partial(loss, row) for row in windows]


def task_losses(tokenizer, examples, classification: bool, max_length: int = 2048) -> list:
    """Per example, the loss that train.py would train it with."""
    import scoring

    def loss(example, model):
        batch = scoring.collate(
            tokenizer,
            [example],
            score="all" if classification else "right",
            max_length=max_length,
            device=model.device,
        )
        logits = model(**batch.inputs(model), use_cache=False).logits
        return (scoring.classification_loss if classification else scoring.lm_loss)(logits, batch)

    return [partial(loss, example) for example in examples]


def compute(args, data=None) -> tuple[dict[str, Tensor], dict]:
    """(index, provenance) for the command line's settings; bad ones fail before a model loads.

    `data`: the task's examples where the caller has them, with a split of its own.
    """
    import transformers
    from tqdm import tqdm

    import loading

    at_least = {"samples": 1, "length": 2, "max_length": 2, "groups": 1, "seed": 0}
    for name, least in at_least.items():
        if not least <= getattr(args, name) < zo.MAX_RUN_SEED:
            raise UserError(f"--{name} {getattr(args, name)}: at least {least}, less than 2^24")
    task = args.task or args.train_file
    if bool(args.text) + bool(task) + (args.kind != "sensitive") > 1:
        raise UserError("give one of --text, --task and --kind random, largest or smallest")
    if args.data_dir and not args.task:
        raise UserError(f"--data-dir {args.data_dir}: the folder of a task; give --task")
    folder = Path(args.out).absolute().parent
    if not os.access(folder, os.W_OK) or Path(args.out).exists():
        raise UserError(f"--out {args.out}: a new file in a folder that can be written to")
    if args.text:
        loading.check_text(args.text)
    settings = loading.Settings(
        model=args.model, task=args.task, data_dir=args.data_dir, train_file=args.train_file
    )
    if args.train_file:
        settings.num_validation, settings.test_file = 0, args.train_file  # all of it is used
    if task:
        loading.check(settings)
    device, trust = loading.choose_device(args.device, args.device_map), args.trust_remote_code
    tokenizer, config = loading.load_tokenizer(args.model, trust)
    scores_on = args.scores_device and loading.choose_device(args.scores_device)
    how_many(decoder_linears(loading.skeleton(config, trust)), args.density)
    made = {"model": args.model, "kind": args.kind, "density": args.density, "seed": args.seed}
    length, longest = (loading.usable_length(n, config) for n in (args.length, args.max_length))
    losses = []
    if task:
        data = loading.load_data(settings) if data is None else data
        examples = data.train[: args.samples]
        losses = task_losses(tokenizer, examples, data.classification, longest)
        made |= {"source": f"{task}, {data.source}", "data": data.fingerprint}
    elif args.kind == "sensitive":
        tiny = loading.is_tiny(args.model)
        text = args.text or (loading.locate("tiny/data/c4.jsonl") if tiny else None)
        texts = loading.read_texts(text)
        windows = loading.text_windows(tokenizer, texts, args.samples, length, args.seed)
        losses = text_losses(windows)
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
        made |= {"source": text or loading.C4, "length": length, "data": digest}
    dtype = args.dtype
    if dtype == "auto" and device != "cpu" and losses:
        dtype = "bfloat16"  # also where the checkpoint is fp16, whose gradients underflow
    model = loading.load_model(args.model, dtype, device, trust, device_map=args.device_map)
    weights = decoder_linears(model)
    if args.kind == "sensitive":
        made |= {"statistic": args.statistic, "samples": len(losses)}
        how = {"statistic": args.statistic, "groups": args.groups, "device": scores_on}
        bar = partial(tqdm, desc="scoring", unit=" samples")
        index = sensitive_index(model, losses, args.density, progress=bar, **how)
    elif args.kind == "random":
        index = random_index(weights, args.density, args.seed)
    else:
        index = {"largest": largest, "smallest": smallest}[args.kind](weights, args.density)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made |= {"dtype": str(model.dtype).removeprefix("torch."), **versions}
    return index, made | {"matrices": signature(weights)}


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python masks.py`; train.py goes through it, too."""
    import loading

    parser = loading.Parser(description="Compute a mask of [Q] and write it to a file.")
    add = parser.add_argument
    add("--model", default=loading.Settings.model, help="hub name or local folder")
    add("--out", required=True, help="new file, such as mask.safetensors")
    add("--text", help='.txt or .jsonl of {"text": …}; default C4; tiny/model has its own')
    add("--task", help="instead of text: the training loss of this task")
    add("--data-dir", help="folder with the task's official files")
    add("--train-file", help="a task of your own, as for train.py")
    add("--kind", choices=KINDS, default="sensitive", help="the others are for comparison")
    add("--statistic", choices=STATISTICS, default=STATISTICS[0], help="mean of squares (default)")
    add("--density", type=float, default=0.001, help="share of each matrix (default 0.001)")
    add("--samples", type=int, default=100, help="texts or examples (default 100)")
    add("--length", type=int, default=512, help="tokens of a text (default 512)")
    add("--max-length", type=int, default=2048, help="with --task: tokens of a prompt")
    add("--seed", type=int, default=0, help="of the texts drawn and of --kind random")
    add("--groups", type=int, default=1, help="score 1/n of the matrices at a time, in n passes")
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
        save_mask(args.out, index, provenance)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        memory = "--groups 8, or --scores-device cpu where that is not enough"
        raise SystemExit(fail("masks.py", error, memory)) from None
    except KeyboardInterrupt:
        print("\nmasks.py: stopped; nothing was written")
        raise SystemExit(130) from None
    chosen = sum(map(len, index.values()))
    print(f"{args.out}: {chosen:,} weights of {len(index)} matrices, {args.kind}")


if __name__ == "__main__":
    main()
