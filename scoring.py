"""How likely is each option: tokens, batches, log-probabilities, losses.

A zeroth-order step needs one number per forward pass, the loss. Here it is made.

    x, y_c              prompt, option c, as tokens                  `encode`, `collate`
    score_c             mean over t of log p(y_c,t | x, y_c,<t)      `option_scores`  (not the sum)
    classification      -log softmax(score)[label]                   `classification_loss`
    language modelling  -mean over the batch's right tokens, log p   `lm_loss`, COPA and WinoGrande
    prediction          argmax_c score_c                             `correct`

What it costs. Only positions that predict an option token become logits; `Batch.keep` counts them
from the right, hence left padding. 16 prompts of 256 tokens give [16, 1, 32000] logits, 1 MB in
fp16, not 262 MB. Options with equal inputs share a row: where each is one token (Yes/No), that is
one row per example, half of MeZO's work and the same numbers.

What differs from MeZO (princeton-nlp/MeZO, large_models/{utils,run}.py).
* Which tokens are the option's: MeZO subtracts token counts, `encode` looks at character spans.
  Equal for Llama's tokenizer, and right also where a piece spans the prompt's end and the option.
* The last token of an option is not fed to the model: nothing is predicted from it.
* Log-probabilities are fp32 whatever the model computes in. An fp16 loss near 0.7 moves in steps of
  4.9e-4, so (l+ - l-) / 2 eps at eps = 1e-3 moves in steps of 0.24.
"""

import inspect
from dataclasses import dataclass, replace
from os.path import commonprefix  # of any sequences, not only of paths

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from tasks import Example


def encode(tokenizer, example: Example, max_length: int = 2048) -> list[tuple[list[int], int]]:
    """Per option: (token ids of prompt + option, how many at the end are the option's).

    As MeZO's `encode_prompt`, outer spaces are stripped, and too long a prompt loses its beginning
    but keeps BOS. The option's tokens are the pieces that begin in it, and one that begins before
    but reaches beyond its leading space: "was " stays with the prompt, "?Yes" goes with the option.
    Raises UserError where an option has no token or no room, or the tokenizer has no spans.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} has no character spans; load the fast one")
    out = []
    for option in example.options:
        full = (example.prompt + option).lstrip()
        text = full.rstrip(" ")
        first = max(0, len(full) - len(option))  # where the option begins,
        word = max(0, len(full) - len(option.lstrip(" ")))  # and its first letter
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        length = sum(end > (word if begin < first else first) for begin, end in spans)
        if max((end for _, end in spans), default=0) < len(text.rstrip()):
            # The vocabulary lacks a character and dropped it (BPE without <unk> or bytes), which
            # shifts later spans: here an option token is one that the prompt does not begin with.
            prompt = tokenizer(text[:word], verbose=False)["input_ids"]
            length = len(ids) - len(commonprefix([prompt, ids]))
        elif spans[-1][1] == 0:
            ids = ids[:-1]  # an EOS that the tokenizer adds is no part of the option
        bos = int(ids[:1] == [tokenizer.bos_token_id])
        ids = ids[:bos] + ids[max(bos, len(ids) - max_length + bos) :]
        if not 0 < length < len(ids):  # < : the first option token, too, is predicted from one
            raise UserError(
                f"option {option!r} of ...{example.prompt[-60:]!r} has {length} of "
                f"{len(ids)} tokens; it needs 1, and 1 before it ({max_length=})"
            )
        out.append((ids, length))
    return out


@dataclass(frozen=True)
class Batch:
    """R rows of T tokens, and the list of the n log-probabilities to read from them.

    The i-th is that of token[i], read at row[i], position[i]. It counts weight[i] in the score of
    slot[i] = example * num_options + option.
    """

    input_ids: Tensor  # [R, T] int64, padded on the left, T a multiple of 8
    attention_mask: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64; explicit, as models differ in how they count padding
    row: Tensor  # [n] int64
    position: Tensor  # [n] int64, within the last `keep`
    token: Tensor  # [n] int64
    slot: Tensor  # [n] int64
    weight: Tensor  # [n] fp32, 1 / number of the option's tokens
    labels: Tensor  # [B] int64
    valid: Tensor  # [B, C] bool: the options that exist and are scored
    keep: int  # logits_to_keep: positions, from the right, that are read at all
    num_examples: int  # B
    num_options: int  # C, the largest number of options in the batch
    score: str  # "all" options, or only the "right" ones

    def inputs(self, model) -> dict:
        """What this model's forward takes of the batch; logits only where an option is scored."""
        wanted = {k: getattr(self, k) for k in ("input_ids", "attention_mask", "position_ids")}
        wanted["logits_to_keep"] = self.keep
        known = inspect.signature(model.forward).parameters
        return {name: value for name, value in wanted.items() if name in known}

    def loss(self, logits: Tensor) -> Tensor:
        """Scalar, that of training, of logits [R, keep, V]: `classification_loss` where all options
        are scored, else `lm_loss`."""
        return (classification_loss if self.score == "all" else lm_loss)(logits, self)

    def to(self, device: str | torch.device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(
    tokenizer, examples: list[Example], *, max_length: int = 2048, score: str = "all", device="cpu"
) -> Batch:
    """A batch that scores "all" options, or only the "right" ones (all that `lm_loss` reads)."""
    if score not in ("all", "right"):
        raise UserError(f"score {score!r} must be 'all' or 'right'")
    num_options = max(len(e.options) for e in examples)
    valid = torch.zeros(len(examples), num_options, dtype=torch.bool)
    rows, reads = [], []  # reads: (row, places before its end, token, slot, option's length)
    for b, example in enumerate(examples):
        shared = {}  # equal inputs, one row
        for c, (ids, length) in enumerate(encode(tokenizer, example, max_length)):
            if score == "right" and c != example.label:
                continue
            valid[b, c] = True
            row = shared.setdefault(tuple(ids[:-1]), len(rows))
            rows += [ids[:-1]] if row == len(rows) else []
            for back, token in zip(range(length, 0, -1), ids[-length:], strict=True):
                reads.append((row, back, token, b * num_options + c, length))
    row, back, token, slot, length = map(torch.tensor, zip(*reads, strict=True))
    keep, T = int(back.max()), -(-max(map(len, rows)) // 8) * 8
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([[pad] * (T - len(r)) + r for r in rows])  # [R, T]
    mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows])  # [R, T]
    labels = torch.tensor([e.label for e in examples])
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), row, keep - back, token, slot,
                 1 / length.float(), labels, valid, keep, len(examples), num_options,
                 score).to(device)  # fmt: skip


# Scores and losses: functions of logits [R, keep, V], of any dtype, and the batch; all fp32.


def _log_probs(logits: Tensor, batch: Batch) -> Tensor:
    """[n]. Only the positions that are read are upcast, and before the log-softmax."""
    read = logits[:, -batch.keep :][batch.row, batch.position].float()  # [n, V]
    return -F.cross_entropy(read, batch.token, reduction="none")


def option_scores(logits: Tensor, batch: Batch) -> Tensor:
    """[B, C]: mean log-probability of each option's tokens; -inf where there is no option.

    MeZO run.py, `one_step_pred`. A masked sum, as CUDA's index_add_ adds in no fixed order.
    """
    slots = torch.arange(batch.valid.numel(), device=logits.device)[:, None]  # [B*C, 1]
    scores = torch.where(slots == batch.slot, batch.weight * _log_probs(logits, batch), 0.0).sum(1)
    return scores.view_as(batch.valid).masked_fill(~batch.valid, -torch.inf)


def classification_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Scalar: cross-entropy over the options' scores (MeZO's train_as_classification)."""
    if batch.score == "right":  # among one option the loss is 0, and so is every gradient
        raise UserError("classification_loss needs all options; collate with score='all'")
    return F.cross_entropy(option_scores(logits, batch), batch.labels)


def lm_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Scalar: mean negative log-probability of all the right options' tokens in the batch."""
    right = batch.slot % batch.num_options == batch.labels[batch.slot // batch.num_options]  # [n]
    return -torch.where(right, _log_probs(logits, batch), 0.0).sum() / right.sum()


def correct(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Two of [B] bool: is the most likely option the right one; and is every score a finite number?

    Where not, the answer is not right: `argmax` takes the first NaN, often the commonest label.
    """
    scores = option_scores(logits, batch)
    finite = (scores.isfinite() | ~batch.valid).all(1)
    return (scores.argmax(1) == batch.labels) & finite, finite


def check_examples(tokenizer, examples: list[Example], max_length: int) -> int:
    """How many prompts lose their beginning. UserError as in `encode`, before hours of training,
    and where two options are the same tokens: then no step would ever see a slope."""
    cut = 0
    for example in examples:
        whole = encode(tokenizer, example, 1 << 30)
        if len({tuple(ids) for ids, _ in whole}) < len(whole):
            raise UserError(f"two of the options {example.options} are the same to this tokenizer")
        if any(length >= max_length for _, length in whole):
            encode(tokenizer, example, max_length)  # raises
        cut += any(len(ids) > max_length for ids, _ in whole)
    return cut
