"""A task is a prompt and a few possible continuations. Its loss asks which of them is likely.

    x, y_c              prompt, option c, as tokens                  `encode`, `collate`
    score_c             mean over t of log p(y_c,t | x, y_c,<t)      `option_scores`  (not the sum)
    classification      −log softmax(score)[label]                   `classification_loss`
    language modelling  −mean over the batch's right tokens, log p   `lm_loss`, COPA and WinoGrande
    prediction          argmax_c score_c                             `correct`, `tally`
    perplexity          exp of `lm_loss` over all examples           `tally`, where C = 1
    text                −mean over a window's tokens, log p          `text_losses`, for [Q]'s mask

    [S]   Sparse-MeZO: appendix B, Table 5 (prompts); 1,000 training and 1,000 test examples
    MeZO  princeton-nlp/MeZO, large_models/{templates,tasks,run,utils}.py, which [S] builds on
    [Q]   SensZOQ: its appendix has ARC to AQuA, and how many examples of each
    [H]   EleutherAI/lm-evaluation-harness, lm_eval/tasks: their prompts, as [Q]'s are unknown

How it works
    A zeroth-order step needs one number per forward pass, the loss. This file computes it. The
    model is never asked for a class, only how likely each option is after the prompt. `TASKS` has
    one row per task; a new task is a new row. Rows of your own need no task (harness/dataset.py).

    An example with one option is a completion: of a prompt, of a conversation, or of a text's first
    token. Its loss is `lm_loss`, and its score is perplexity.

    A task whose answers are the same in every row is classification. Where rows bring options of
    their own, it is trained with `lm_loss` on the right one, as MeZO trains COPA. Which loss [Q]
    takes for ARC to AQuA is unknown; here they follow that rule.

What differs from MeZO
    BoolQ is SuperGLUE's, whose passages begin with a title that google/boolq's lack. WinoGrande is
    the xl set. To find the option's tokens, MeZO subtracts token counts; `encode` looks at
    character spans. For Llama's tokenizer the two agree. Spans are also right where one token
    covers the prompt's end and the option. Log-probabilities are fp32 whatever precision the model
    computes in: an fp16 loss near 0.7 moves in steps of 4.9e-4, so g at ε = 1e-3 would move in
    steps of 0.24.

What it costs
    Texts that fit into one row share it, and the attention mask keeps them apart (`pack_rows`).
    MeZO pads every text to the longest; of 16 sentences of SST-2 two thirds are padding. Options
    with equal inputs are one text: where each is one token (Yes, No), that is one text per example.
    But for rounding, neither changes the numbers.

    Only positions that predict an option token become logits (`Batch.keep`), equally many per row.
    16 prompts of 256 tokens give [16, 1, 32000] logits, 1 MB in fp16, not 262 MB.
"""

import inspect
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix  # of any sequences, not only of paths
from string import Formatter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Example:
    """The model reads prompt + options[c]; an option brings the space that precedes it.

    Prompt and option may be token ids, where text alone would be ambiguous.
    """

    prompt: str | tuple[int, ...]
    options: tuple[str | tuple[int, ...], ...]
    label: int  # index of the right option

    def __post_init__(self):
        if isinstance(self.prompt, str):
            "".join([self.prompt, *self.options]).encode()  # ValueError for half an emoji


@dataclass(frozen=True)
class Task:
    """One line of [S] Table 5 or of [Q]'s tables, and where its data are."""

    name: str
    hub: str  # repository:configuration
    folder: str  # of the official archive
    prompt: str
    options: tuple[str, ...]  # none: each row brings its own
    labels: tuple[str, ...] = ("false", "true")  # of official files; the hub has indices
    rows: Callable[[dict], list[dict]] = lambda row: [row]  # in the prompt's terms
    files: tuple[str, ...] = ("train.jsonl", "val.jsonl")  # training, test; validation if apart
    splits: tuple[str, ...] = ("train", "validation")  # the same on the hub
    classification: bool = True  # False: trained with `lm_loss` on the right option
    num_train: int = 1000
    num_validation: int = 500
    num_test: int = 1000
    batch_size: int = 16
    sizes: str = ""  # where these numbers are from, if not from [S] and MeZO

    def to_examples(self, row: dict) -> list[Example]:
        """The examples of one row, in official or hub form; a MultiRC passage holds many."""
        examples = []
        for r in self.rows(row):
            label = self.labels.index(r["label"]) if r["label"] in self.labels else r["label"]
            for _, name, *_ in Formatter().parse("".join([self.prompt, *self.options])):
                if name and not isinstance(r[name], str):
                    raise ValueError(f"{name} {r[name]!r} is no text")
            options = [o.format(**r) for o in self.options] or [" " + o for o in r["options"]]
            strange = isinstance(label, bool) and self.labels != ("false", "true")
            if strange or not isinstance(label, int) or not 0 <= label < len(options):  # -1: none
                raise ValueError(f"label {label!r} is neither of {self.labels} nor their index")
            examples.append(Example(self.prompt.format(**r), tuple(options), int(label)))
        return examples


def _boolq(row: dict) -> list[dict]:
    question = row["question"].removesuffix("?") + "?"
    return [{**row, "question": question[0].upper() + question[1:]}]


def _wsc(row: dict) -> list[dict]:
    spans = row.get("target", row)  # official files nest the spans, the hub has them flat
    return [{**row, "noun": spans["span1_text"], "pronoun": spans["span2_text"].lower()}]


def _multirc(row: dict) -> list[dict]:
    if "passage" not in row:
        return [row]  # the hub has a row per answer, official files a row per passage
    text, questions = row["passage"]["text"], row["passage"]["questions"]
    return [{"paragraph": text, "question": q["question"], "answer": a["text"], "label": a["label"]}
            for q in questions for a in q["answers"]]  # fmt: skip


def _copa(row: dict) -> list[dict]:
    row = {**row, "premise": row["premise"].rstrip().removesuffix(".")}
    for key in ("choice1", "choice2"):
        first, *rest = row[key].split(" ")
        row[key] = " ".join([first if first == "I" else first.lower(), *rest])
    return [{**row, "link": {"effect": "so", "cause": "because"}[row["question"]]}]


def _winogrande(row: dict) -> list[dict]:
    before, after = row["sentence"].split("_")
    return [{**row, "before": before.rstrip(" "), "after": after, "label": row["answer"]}]


def _exam(row: dict) -> list[dict]:
    """ARC and OpenBookQA: official files nest stem and choices, the hub has lists of them."""
    stem, choices = row.get("question_stem", row.get("question")), row.get("choices")
    if isinstance(stem, dict):
        stem, choices = stem["stem"], stem["choices"]
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    right = choices["label"].index(row["answerKey"].strip())
    return [{"question": stem, "options": choices["text"], "label": right}]


def _hellaswag(row: dict) -> list[dict]:
    def clean(text: str) -> str:  # [H] utils.py: WikiHow's brackets
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean(ending) for ending in row["endings"]]
    return [{"text": clean(text), "options": endings, "label": int(row["label"])}]


def _mmlu(row: dict) -> list[dict]:
    texts = dict(zip("ABCD", row["choices"], strict=True)) if "choices" in row else row
    return [{**texts, "question": row["question"].strip(), "label": row["answer"]}]


def _aqua(row: dict) -> list[dict]:
    options = ["(" + option for option in row["options"]]  # "A)32" to "(A)32", as AGIEval has them
    label = [option[1] for option in options].index(row["correct"])
    text = f"{row['question']} Answer Choices: {' '.join(options)}"
    return [{"text": text, "last": options[-1][1], "options": options, "label": label}]


_NO_YES = ("No", "Yes")
# [Q] "Dataset Splits" has 2051/200 for ARC-E and so on. The two are training and validation: their
# sum is the published training set, for each task but MMLU, which is a part of the auxiliary one.
_Q = {"num_validation": 200, "sizes": "[Q] appendix, dataset splits"}
_BY_ROW = {"labels": (), "classification": False, **_Q}  # each row has its own options
TASKS = {task.name: task for task in (
    Task("sst2", "nyu-mll/glue:sst2", "SST-2", "{sentence} It was", (" terrible", " great"),
         ("0", "1"), lambda row: [{**row, "sentence": row["sentence"].strip()}],
         ("train.tsv", "dev.tsv")),
    Task("rte", "aps/super_glue:rte", "RTE",
         '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
         ("Yes", "No"), ("entailment", "not_entailment")),
    Task("cb", "aps/super_glue:cb", "CB",
         'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
         ("Yes", "No", "Maybe"), ("entailment", "contradiction", "neutral"), num_validation=100),
    Task("boolq", "aps/super_glue:boolq", "BoolQ", "{passage} {question}\n", _NO_YES, rows=_boolq),
    Task("wsc", "aps/super_glue:wsc.fixed", "WSC",
         '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
         "Yes or No?\n", _NO_YES, rows=_wsc),
    Task("wic", "aps/super_glue:wic", "WiC",
         'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
         "{sentence1}\n{sentence2}\n", _NO_YES),
    Task("multirc", "aps/super_glue:multirc", "MultiRC",
         '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
         "Yes or No?\n", _NO_YES, rows=_multirc),
    Task("copa", "aps/super_glue:copa", "COPA", "{premise} {link}", (" {choice1}", " {choice2}"),
         ("0", "1"), _copa, classification=False, num_validation=100),
    Task("winogrande", "allenai/winogrande:winogrande_xl", "winogrande_1.1", "{before}",
         (" {option1}{after}", " {option2}{after}"), ("1", "2"), _winogrande,
         ("train_xl.jsonl", "dev.jsonl"), classification=False),
    Task("arce", "allenai/ai2_arc:ARC-Easy", "ARC-V1-Feb2018-2/ARC-Easy",  # [H] arc/arc_easy.yaml
         "Question: {question}\nAnswer:", (), rows=_exam, splits=("train", "test"),
         files=("ARC-Easy-Train.jsonl", "ARC-Easy-Test.jsonl"), num_train=2051, **_BY_ROW),
    Task("arcc", "allenai/ai2_arc:ARC-Challenge", "ARC-V1-Feb2018-2/ARC-Challenge",
         "Question: {question}\nAnswer:", (), rows=_exam, splits=("train", "test"),
         files=("ARC-Challenge-Train.jsonl", "ARC-Challenge-Test.jsonl"), num_train=919, **_BY_ROW),
    Task("hellaswag", "Rowan/hellaswag:default", "hellaswag", "{text}", (), rows=_hellaswag,
         files=("hellaswag_train.jsonl", "hellaswag_val.jsonl"),  # [H] hellaswag/hellaswag.yaml
         num_train=39705, **_BY_ROW),
    Task("piqa", "baber/piqa:default", "piqa", "Question: {goal}\nAnswer:",  # [H] piqa/piqa.yaml
         (" {sol1}", " {sol2}"), files=("train.jsonl", "valid.jsonl"), num_train=15913,
         **_BY_ROW | {"labels": ("0", "1")}),
    Task("obqa", "allenai/openbookqa:main", "OpenBookQA-V1-Sep2018/Data/Main", "{question}", (),
         rows=_exam, files=("train.jsonl", "test.jsonl"), splits=("train", "test"),
         num_train=4757, **_BY_ROW),  # [H] openbookqa/openbookqa.yaml
    Task("siqa", "lighteval/siqa:default", "socialiqa-train-dev", "Q: {context} {question}\nA:",
         (" {answerA}", " {answerB}", " {answerC}"), files=("train.jsonl", "dev.jsonl"),
         num_train=33210, **_BY_ROW | {"labels": ("1", "2", "3")}),  # [H] siqa/siqa.yaml
    Task("mmlu", "cais/mmlu:all", "data",  # [H] mmlu/default/_default_template_yaml
         "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:", (" A", " B", " C", " D"),
         ("A", "B", "C", "D"), _mmlu, ("auxiliary_train/*.csv", "test/*.csv"),
         ("auxiliary_train", "test"), num_train=20000, **_Q),
    Task("aqua", "deepmind/aqua_rat:raw", "AQuA",  # [H] agieval/aqua-rat.yaml, AGIEval's query
         "Q: {text}\nA: Among A through {last}, the answer is", (), rows=_aqua,
         files=("train.json", "test.json"), splits=("train", "test"), num_train=97267, **_BY_ROW),
    Task("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", "wikitext-2-raw", "", ("{text}",),
         rows=lambda row: [{**row, "label": 0}], splits=("train", "test", "validation"),
         files=("wiki.train.raw", "wiki.test.raw", "wiki.valid.raw"), classification=False,
         num_train=1_000_000, num_validation=1_000_000, num_test=1_000_000, batch_size=2,
         sizes="all blocks; [Q]'s numbers are unknown"),
)}  # fmt: skip
OWN = Task("own", "", "", "", ())  # of files of one's own


def get_task(name: str) -> Task:
    """A task by name; MeZO's spellings (SST2, BoolQ, WinoGrande) will do. Raises ValueError."""
    key = name.lower().replace("-", "")
    if key not in TASKS:
        raise ValueError(f"unknown task {name!r}: tasks are {', '.join(TASKS)}")
    return TASKS[key]


def with_demonstrations(example: Example, demos: list[Example]) -> Example:
    """In-context learning (MeZO utils.py, `encode_prompt`): solved demos, joined by blank lines."""
    solved = [(d.prompt + d.options[d.label]).strip() for d in demos]
    return replace(example, prompt="\n\n".join([*solved, example.prompt.lstrip(" ")]))


def minibatch(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of n training examples `step` sees: a pure function, so a run resumes anywhere.

    Each epoch is a new permutation, without replacement; its incomplete last batch is dropped.
    With fewer examples than batch_size every step sees them all.
    """
    if n < batch_size:
        return list(range(n))
    epoch, i = divmod(step, n // batch_size)
    order = np.random.RandomState([seed, epoch]).permutation(n)
    return order[i * batch_size : (i + 1) * batch_size].tolist()


# ------------------------------------------------------------------ how likely is each option


def encode(tokenizer, example: Example, max_length: int = 2048) -> list[tuple[list[int], int]]:
    """Per option: (token ids of prompt + option, how many at the end are the option's).

    As MeZO's `encode_prompt`, outer spaces are stripped, and too long a prompt loses its beginning
    but keeps BOS. The option's tokens are those that begin in it. A token across its start counts
    if it has a letter of it: "was " is the prompt's, "?Yes" the option's.
    ValueError where an option has no token or no room, or the tokenizer has no spans.
    """
    out = []
    for option in example.options:
        if isinstance(option, str):
            ids, length = option_tokens(tokenizer, (example.prompt + option).lstrip(), option)
        else:
            ids, length = [*example.prompt, *option], len(option)
        bos = int(ids[:1] == [tokenizer.bos_token_id])
        ids = ids[:bos] + ids[max(bos, len(ids) - max_length + bos) :]
        if not 0 < length < len(ids):  # < : the first option token, too, is predicted from one
            raise ValueError(
                f"option {option!r:.60} of ...{example.prompt[-60:]!r:.300} has {length} of "
                f"{len(ids)} tokens; it needs 1, and 1 before it ({max_length=})"
            )
        out.append((ids, length))
    return out


def option_tokens(tokenizer, full: str, option: str, special: bool = True) -> tuple[list[int], int]:
    """Token ids of a text that ends with the option, and how many are the option's.

    `special`: with the tokens that the tokenizer adds itself.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no character spans; load the fast one")
    text = full.rstrip(" ")
    first = max(0, len(full) - len(option))  # where the option begins,
    word = max(0, len(full) - len(option.lstrip(" ")))  # and its first letter
    tokenize = partial(tokenizer, add_special_tokens=special, verbose=False)
    encoded = tokenize(text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    length = sum(end > (first if begin >= first else word) for begin, end in spans)
    ends = [0, *(end for _, end in spans if end)]
    begins = [*(begin for begin, end in spans if end), len(text)]
    # an EOS that the tokenizer adds is no part of the option
    ids = ids[: max((i for i, (_, end) in enumerate(spans, start=1) if end), default=len(ids))]
    if any(text[end:begin].strip() for end, begin in zip(ends, begins, strict=True)):
        # The vocabulary lacks a character and dropped it (BPE without <unk> or bytes), which
        # shifts later spans: here an option token is one that the prompt does not begin with.
        prompt = tokenize(text[:word])["input_ids"]
        length = len(ids) - len(commonprefix([prompt, ids]))
    return ids, length


@dataclass(frozen=True)
class Batch:
    """R rows of T tokens, and the list of the n log-probabilities to read from them.

    The i-th is that of token[i], read at row[i], place[i]. It counts weight[i] in the score of
    slot[i] = example * C + option.
    """

    input_ids: Tensor  # [R, T] int64, padded on the left, T a multiple of 8
    position_ids: Tensor  # [R, T] int64, from 0 in each text; 0 where there is padding
    attention_mask: Tensor  # [R, T] int64; where texts share rows [R, 1, T, T] bool
    row: Tensor  # [n] int64
    place: Tensor  # [n] int64, of T
    kept: Tensor  # [n] int64, which of the places that `keep` asks for
    token: Tensor  # [n] int64
    slot: Tensor  # [n] int64
    weight: Tensor  # [n] fp32, 1 / number of the option's tokens
    labels: Tensor  # [B] int64
    valid: Tensor  # [B, C] bool: the options that exist and are scored, of at most C
    keep: int | Tensor  # logits_to_keep: K places at the end, or [R, K] int64 of each row
    scored: str  # "all" options, or only the "right" ones

    def inputs(self, model) -> dict:
        """What this model's forward takes of the batch; logits only where an option is scored."""
        return model_inputs(
            model, self.input_ids, self.attention_mask, self.position_ids, self.keep
        )

    @property
    def count(self) -> int:
        """How many terms `loss` is the mean of: its weight beside other batches' losses."""
        return len(self.labels if self.scored == "all" else self.token)


def model_inputs(model, input_ids, attention_mask, position_ids, keep=0) -> dict:
    """What this model's forward takes; logits where `keep` says (`Batch.keep`), 0: everywhere.

    Positions are explicit where they can be, as models differ in how they count padding. A boolean
    mask becomes what is added to scores, as eager attention cannot read it.
    """
    if attention_mask.dtype == torch.bool:
        added = torch.zeros_like(attention_mask, dtype=model.dtype)
        attention_mask = added.masked_fill(~attention_mask, torch.finfo(model.dtype).min)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    more = {"position_ids": position_ids, "logits_to_keep": keep}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wraps it
    known = inspect.signature(inner.forward).parameters
    return inputs | {name: value for name, value in more.items() if name in known}


def layout(model) -> dict:
    """How `collate` lays out this model's batches: its device, and how long a shared row may be.

    harness/loading.py finds that out (`pack`). The texts of other models have rows of their own.
    """
    return {"device": model.device, "pack": getattr(model, "pack", 0)}


def pack_rows(lengths: list[int], T: int) -> list[list[int]]:
    """Which texts stand in which row of T tokens: longest first, each in the first with room."""
    rows, room = [], []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((r for r, free in enumerate(room) if lengths[text] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(T)
        rows[row].append(text)
        room[row] -= lengths[text]
    return sorted(rows)  # so that texts which share none keep their order


def fill_rows(texts: list[tuple[int, ...]], rows: list[list[int]], T: int) -> tuple:
    """(input_ids, position_ids, attention_mask, {text: (its row, where it ends)}), [R, T] each."""
    ids, positions, mask, ends = [], [], [], {}
    for r, row in enumerate(rows):
        tokens = [token for text in row for token in texts[text]]
        free = T - len(tokens)
        # any token that the model knows will do for padding, as nothing reads it: the row's first
        ids.append(tokens[:1] * free + tokens)
        positions.append([0] * free + [i for text in row for i in range(len(texts[text]))])
        mask.append([0] * free + [1] * len(tokens))
        for text in row:
            free += len(texts[text])
            ends[text] = r, free
    return ids, positions, mask, ends


def packed_mask(position_ids: Tensor) -> Tensor:
    """[R, 1, T, T] bool: may the token of a row attend to another? To earlier ones of its text."""
    text = (position_ids == 0).cumsum(1)
    return (text[:, :, None] == text[:, None, :]).tril()[:, None]


def kept_places(row: Iterable[int], place: Iterable[int], R: int, T: int) -> tuple:
    """(keep, kept) of a `Batch` whose texts share rows: as many places in each, some twice."""
    found = [{} for _ in range(R)]  # of a row {place: its number}
    kept = [found[r].setdefault(p, len(found[r])) for r, p in zip(row, place, strict=True)]
    K = max(map(len, found))
    return ([(list(of) * K)[:K] for of in found], kept) if K < T else (T, place)


def collate(
    tokenizer, examples: list[Example], *, max_length: int = 2048, scored: str = "all",
    device="cpu", pack: int = 0,
) -> Batch:  # fmt: skip
    """A batch that scores "all" options, or only the "right" ones (all that `lm_loss` reads).

    Texts share rows as long as the longest, unless that is longer than `pack` tokens.
    """
    if scored not in ("all", "right"):
        raise ValueError(f"scored {scored!r} must be 'all' or 'right'")
    C = max(len(e.options) for e in examples)
    valid = torch.zeros(len(examples), C, dtype=torch.bool)
    texts = {}  # {(example, input tokens): its number}; equal inputs are one text
    reads = []  # (text, places before its end, token, slot, option's length)
    for b, example in enumerate(examples):
        for c, (ids, length) in enumerate(encode(tokenizer, example, max_length)):
            if scored == "right" and c != example.label:
                continue
            valid[b, c] = True
            text = texts.setdefault((b, tuple(ids[:-1])), len(texts))
            for back, token in zip(range(length, 0, -1), ids[-length:], strict=True):
                reads.append((text, back, token, b * C + c, length))
    texts = [ids for _, ids in texts]
    T = -(-max(map(len, texts)) // 8) * 8
    rows = [[i] for i in range(len(texts))] if pack < T else pack_rows(list(map(len, texts)), T)
    ids, positions, mask, ends = fill_rows(texts, rows, T)
    text, back, token, slot, length = zip(*reads, strict=True)
    weight, labels = 1 / torch.tensor(length).float(), [e.label for e in examples]
    row, end = zip(*(ends[t] for t in text), strict=True)
    place, keep = [e - b for e, b in zip(end, back, strict=True)], max(back)
    kept = [p - T + keep for p in place]
    if len(rows) < len(texts):
        mask = packed_mask(torch.tensor(positions, device=device))
    if pack:  # also with one text a row: an integer takes a slice, and of one that is not
        # contiguous torch.matmul makes a product per row, which on a CPU copies a 16-bit head
        keep, kept = kept_places(row, place, len(rows), T)
    tensors = ids, positions, mask, row, place, kept, token, slot, weight, labels, valid
    keep = keep if isinstance(keep, int) else torch.tensor(keep, device=device)
    return Batch(*(torch.as_tensor(x, device=device) for x in tensors), keep, scored)


# Scores and losses: functions of logits [R, K, V], of any dtype, and the batch; all fp32. A model
# that does not know logits_to_keep gives [R, T, V].


def _log_probs(logits: Tensor, batch: Batch) -> Tensor:
    """[n]. Only the positions that are read are upcast, and before the log-softmax."""
    place = batch.place if logits.shape[1] == batch.input_ids.shape[1] else batch.kept
    read = logits[batch.row, place].float()  # [n, V]
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
    if batch.scored == "right":  # among one option the loss is 0, and so is every gradient
        raise ValueError("classification_loss needs all options; collate with scored='all'")
    return F.cross_entropy(option_scores(logits, batch), batch.labels)


def lm_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Scalar: mean negative log-probability of all the right options' tokens in the batch."""
    C = batch.valid.shape[1]
    right = batch.slot % C == batch.labels[batch.slot // C]  # [n] bool
    return -torch.where(right, _log_probs(logits, batch), 0.0).sum() / right.sum()


def correct(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of [B]: 1.0 where the likeliest option is the right one, else 0.0; is every score finite?

    Of k options that are equally likely, each is right by 1/k: `argmax` would take the first, often
    one label. Without finite scores no answer is right.
    """
    scores = option_scores(logits, batch)
    finite = (scores.isfinite() | ~batch.valid).all(1)
    likeliest = scores == scores.amax(1, keepdim=True)
    right = likeliest.gather(1, batch.labels[:, None])[:, 0] / likeliest.sum(1)
    return torch.where(finite, right, 0.0), finite


class Score(NamedTuple):
    """Of n examples the share answered right, or of completions of n tokens the perplexity.

    That is exp of the mean over all tokens of −log p. Of `broken` examples a score was not finite.
    """

    value: float
    n: int
    broken: int = 0
    metric: str = "accuracy"

    def __str__(self):
        broken = f", {self.broken} of the examples without finite scores" if self.broken else ""
        if self.metric == "perplexity":
            return f"{self.value:.4g} (loss {np.log(self.value):.4f}, n = {self.n} tokens{broken})"
        error = math.sqrt(self.value * (1 - self.value) / self.n)  # as of n coin flips
        return f"{self.value:.3f} ± {error:.3f} (n = {self.n}{broken})"


@torch.no_grad()
def tally(model, tokenizer, examples, *, batch_size=16, max_length=2048) -> np.ndarray:
    """[Σ, n, how many examples have a score that is not finite], float64.

    Σ/n is accuracy: Σ examples answered right of n. Of completions it is the loss: Σ of −log p, of
    n tokens.
    """
    total = np.zeros(3)
    longest_first = sorted(examples, key=lambda e: len(e.prompt), reverse=True)  # little padding
    for start in tqdm(range(0, len(examples), batch_size), "evaluating", leave=False, delay=5):
        part = longest_first[start : start + batch_size]
        batch = collate(tokenizer, part, max_length=max_length, **layout(model))
        logits = model(**batch.inputs(model), use_cache=False).logits
        if batch.valid.shape[1] == 1:
            loss = -_log_probs(logits, batch)  # [n], and padding is not among them
            broken = len(batch.slot[~loss.isfinite()].unique())
            total += float(loss.sum()), len(loss), broken
        else:
            right, finite = correct(logits, batch)
            total += float(right.sum()), len(part), int((~finite).sum())
    return total


def check_examples(data, examples, max_length: int, model_config) -> int:
    """How many prompts lose their beginning. ValueError for what would spoil a run later.

    Which is: an option that `encode` refuses, a token that the model's vocabulary lacks, and two
    options of the same tokens, which a loss over scores cannot tell apart.
    """
    cut = 0
    for example in examples:
        whole = encode(data.tokenizer, example, 1 << 30)
        check_tokens(data.tokenizer, [token for ids, _ in whole for token in ids], model_config)
        if data.scored == "all" and len({tuple(ids) for ids, _ in whole}) < len(whole):
            raise ValueError(f"two of the options {example.options} are the same to this tokenizer")
        if any(length >= max_length for _, length in whole):
            encode(data.tokenizer, example, max_length)  # raises
        cut += any(len(ids) > max_length for ids, _ in whole)
    return cut


def check_tokens(tokenizer, ids: Iterable[int], model_config) -> None:
    """ValueError for a token that the model's vocabulary lacks."""
    vocabulary = model_config.get_text_config().vocab_size
    if (largest := max(ids)) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"the tokenizer makes token {largest} ({token!r}), but the model knows {vocabulary} "
            "tokens; get model and tokenizer of one version"
        )


def loss(model, batch: Batch) -> Tensor:
    """Scalar: the training loss of a batch, in one forward pass."""
    logits = model(**batch.inputs(model), use_cache=False).logits
    return (classification_loss if batch.scored == "all" else lm_loss)(logits, batch)


# ------------------------------------------------------------------ losses that score [Q]'s weights


def text_windows(tokenizer, texts: list[str], samples: int, length: int, seed: int) -> Tensor:
    """[samples, length] token ids: random windows, each from a random document long enough for it.

    As SqueezeLLM-gradients draws from C4, but without replacement while documents last. Where the
    long ones hold too few windows, these come from anywhere in all documents joined.
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
        raise ValueError(
            f"the text has {len(long[0])} tokens, less than one sample of --length {length}"
        )
    chosen = [long[i % len(long)] for i in range(samples)]
    starts = [rng.randrange(len(ids) - length + 1) for ids in chosen]
    return torch.tensor([ids[i : i + length] for ids, i in zip(chosen, starts, strict=True)])


def text_losses(windows: Tensor) -> list:
    """Per row of [samples, length] token ids a function of the model, the language-model loss."""

    def loss_of(ids, model):
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1].float(), ids[1:])

    return [partial(loss_of, row) for row in windows]


def task_losses(data, samples: int, max_length: int = 2048) -> list:
    """Of the first training examples, each: a function of the model, train.py's loss of it."""

    def loss_of(example, model):
        how = {"scored": data.scored, "max_length": max_length} | layout(model)
        return loss(model, collate(data.tokenizer, [example], **how))

    return [partial(loss_of, example) for example in data.train[:samples]]
