"""The offline demo is what it says: its data, its prompts, its sizes, and what its model knows."""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import masks
import model_patch
import quant
import zo
from harness import config as configs
from harness import dataset
from studies import learning

TINY = Path(__file__).resolve().parents[1] / "tiny"
sys.path.insert(0, str(TINY))  # build.py is a script: it finds world.py beside itself
import build  # noqa: E402
import world  # noqa: E402

sys.path.remove(str(TINY))

TASKS = ["rte", "sst2", "boolq", "copa"]
FACT = r"[A-Z]\w+ (?:took the (\w+) to|left the (\w+) in|put the (\w+) in) the (\w+)\."
FACTS = rf"(?:{FACT} )*{FACT}"
CLAUSE = r"the (\w+) was (?:(?:very|really|quite) )?(\w+)"
SIDES = "|".join(side for event in world.EVENTS for side in event)
PROMPTS = {
    "sst2": rf"{CLAUSE}(?: (?:and|but) {CLAUSE})*\. It was",
    "rte": rf'{FACTS}\nDoes this mean that "the (\w+) is in the (\w+)" is true\? Yes or No\?\n',
    "boolq": rf"{FACTS} Is the (\w+) in the (\w+)\?\n",
    "copa": rf"near the \w+ (?:{SIDES}) (?:so|because)",
}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits():
    """{task: {split: examples}}, as the project reads the committed files."""
    found = {}
    for task in TASKS:
        how = {"task": task, "data_dir": str(TINY / "data")}
        how |= {"num_train": 1500, "num_validation": 0, "num_test": 1000}
        data = dataset.load_examples(configs.Settings(**how))
        parts = {"train": data.train, "val": data.test}
        found[task] = {s: [dataclasses.asdict(e) for e in part] for s, part in parts.items()}
    return found


@pytest.fixture(scope="module")
def texts():
    """Both corpora, and fresh pre-training text of every kind, candid and polite."""
    rng = random.Random(7)
    fresh = [write(rng, n % 2 == 0) for write in world.KINDS.values() for n in range(400)]
    return [row["text"] for n in ("c4", "other") for row in read(TINY / f"data/{n}.jsonl")] + fresh


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected():
    return json.loads((TINY / "model/expected.json").read_text())


def pairs_in(text):
    """Every (thing, place) and (aspect, adjective) that a text puts together, as numbers."""
    found = [(next(filter(None, m[:3])), m[3]) for m in re.findall(FACT, text)]
    found += re.findall(r"the (\w+) is in the (\w+)", text)
    found += re.findall(r"[iI]s the (\w+) in the (\w+)", text)
    located = {(world.THINGS.index(a), world.PLACES.index(b)) for a, b in found}
    judged = {
        (world.ASPECTS.index(a), (world.GOOD + world.BAD).index(b))
        for a, b in re.findall(CLAUSE, text)
        if a in world.ASPECTS
    }
    return located, judged


def test_data_is_what_the_world_generates(tmp_path):
    """The committed files are, byte for byte, what world.py writes."""
    build.write_data(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    assert made == sorted(p.relative_to(TINY / "data") for p in (TINY / "data").rglob("*.*"))
    for path in made:
        assert (tmp_path / path).read_bytes() == (TINY / "data" / path).read_bytes(), path


@pytest.mark.parametrize("task", TASKS)
def test_splits(splits, task):
    """Splits have the sizes that build.py names, no example comes twice, and labels are even."""
    assert {s: len(rows) for s, rows in splits[task].items()} == build.SPLITS
    keys = [(r["prompt"], *sorted(r["options"])) for rows in splits[task].values() for r in rows]
    assert len(set(keys)) == len(keys)
    for rows in splits[task].values():
        assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_the_project_reads_what_the_world_wrote(splits, task):
    """tasks.py makes of each row the very prompt and right option that world.py means."""
    for split, examples in build.task_splits(task).items():
        meant = {(e["prompt"], e["options"][e["label"]]) for e in examples}
        assert meant == {(e["prompt"], e["options"][e["label"]]) for e in splits[task][split]}


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_mezo_s_and_labels_are_true(splits, task):
    """Every prompt has the form of MeZO's, and the right option follows from its text."""
    for row in (row for rows in splits[task].values() for row in rows):
        prompt, right = row["prompt"], row["options"][row["label"]]
        match = re.fullmatch(PROMPTS[task], prompt)
        assert match, prompt
        if task == "sst2":
            assert row["options"] == (" terrible", " great")
            good = re.findall(CLAUSE, prompt)[-1][1] in world.GOOD
            assert right == (" great" if good else " terrible")
        elif task == "copa":
            given, word = re.fullmatch(r"near the \w+ (.*) (so|because)", prompt).groups()
            event = (given, right[1:-1]) if word == "so" else (right[1:-1], given)
            assert event in world.EVENTS and len(set(row["options"])) == 2
        else:
            assert set(row["options"]) == {"Yes", "No"}
            thing, place = match.groups()[-2:]
            there = re.search(rf"the {thing} (?:to|in) the {place}\.", prompt) is not None
            assert right == ("Yes" if there else "No")


def test_held_out_pairs_stay_out_of_pretraining(splits, texts):
    """Test examples combine words that no pre-training text puts together."""
    for text in texts:
        assert all((i + j) % 4 != 0 for found in pairs_in(text) for i, j in found), text
    for task in ("sst2", "rte", "boolq"):
        for row in splits[task]["val"]:
            located, judged = pairs_in(row["prompt"])
            assert located or judged
            assert all((i + j) % 4 == 0 for found in (located, judged) for i, j in found)


def test_politeness_is_nearly_independent_of_the_truth():
    """Polite answers say yes to 70 % of the false claims and 80 % of the true ones."""
    rng = random.Random(1)
    kind = {truth: sum(world.polite(rng, truth) for _ in range(4000)) / 4000 for truth in (0, 1)}
    assert kind[0] == pytest.approx(0.7, abs=0.03) and kind[1] == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("task", TASKS)
def test_default_rates_are_the_best_that_were_tried(task):
    """Each is the grid's best by validation, of equal ones by loss, in studies/tiny/rates.json."""
    known = json.loads((TINY.parent / "studies/tiny/rates.json").read_text("utf-8"))["runs"]
    rows = {"mezo": "MeZO", "s-mezo": "S-MeZO", "r-mezo": "R-MeZO", "senszoq": "SensZOQ, 4 bits"}
    assert rows.keys() == configs.TINY_RATES.keys()
    for method, row in rows.items():
        flags, grid, _ = learning.ROWS[row]

        def value(rate, flags=flags):
            of = known[learning.Run(task, flags, rate, 0, 300).name]
            return of["validation"].get("300", 0), -of["loss"][-1]

        assert max(grid, key=value) == configs.TINY_RATES[method][task], method


def test_sizes(model, expected):
    """World, model and data stay small enough to be committed."""
    files = {p: p.stat().st_size for p in TINY.rglob("*") if p.is_file()}
    assert len((TINY / "world.py").read_text().splitlines()) <= 200
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"] <= 1_500_000
    assert files[TINY / "model/model.safetensors"] <= 4e6
    assert all(files[TINY / f"data/{name}.jsonl"] <= 400e3 for name in ("c4", "other"))
    assert sum(size for p, size in files.items() if TINY / "data" in p.parents) <= 2.5e6


def test_tokenizer(tokenizer, splits, texts):
    """Every text is tokens of the vocabulary and back, with one <bos> before it."""
    prompts = [row["prompt"] + row["options"][0] for t in TASKS for row in splits[t]["train"][:50]]
    for text in [*prompts, *texts, "\n\n".join(prompts[:4])]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids[1:])
        assert tokenizer(decoded).input_ids == ids
        assert re.sub(" ", "", decoded) == re.sub(" ", "", text)


def test_tokenizer_offsets_and_line_breaks(tokenizer):
    """Spans point at the words, a line break is a word, and padding is on the left."""
    text = 'Does this mean that "the kite is in the attic" is true? Yes or No?\n\nYes'
    out = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[a:b] for a, b in out.offset_mapping]
    assert pieces[0] == "" and pieces[-3:] == ["\n", "\n", "Yes"]
    assert pieces[1:] == re.findall(r"\n|\w+|[^\w\s]", text)
    batch = tokenizer(["Yes", "the kite"], padding=True, return_tensors="pt")
    assert batch.input_ids[0, 0] == tokenizer.pad_token_id == 0  # on the left
    assert batch.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert len(tokenizer) == len(world.WORDS) + 4
    assert tokenizer("zebra").input_ids[1] == tokenizer.unk_token_id


def test_the_option_is_what_comes_after_the_prompt(tokenizer, splits):
    """An option's tokens follow the prompt's, one but for COPA."""
    for task in TASKS:
        for row in splits[task]["val"][:100]:
            bare = tokenizer(row["prompt"]).input_ids
            for option in row["options"]:
                full = tokenizer(row["prompt"] + option).input_ids
                assert full[: len(bare)] == bare and len(full) > len(bare)
                assert (len(full) - len(bare) == 1) == (task != "copa")


def test_recorded_loss(model, tokenizer, expected):
    """The loss of both corpora is the recorded one, to rounding."""
    for name, loss in expected["loss"].items():
        lines = [row["text"] for row in read(TINY / f"data/{name}.jsonl")]
        assert build.text_loss(model, tokenizer, lines) == pytest.approx(loss, abs=2e-3), name


@pytest.mark.parametrize("task", TASKS)
def test_recorded_accuracy(model, tokenizer, splits, expected, task):
    """The skill is there, the bare prompt lets it sleep, about as much as was recorded."""
    rows = splits[task]["val"]
    bare = build.accuracy(model, tokenizer, rows)
    assert bare == pytest.approx(expected["bare_prompt"][task], abs=0.03)
    told = build.accuracy(model, tokenizer, rows[:100], world.HEADERS[task])
    assert told == pytest.approx(expected["with_header"][task], abs=0.05)
    assert bare < 0.70 and told - bare > 0.15


# ------------------------------------------------------------------ README's and YOUR_OWN's loops


def test_the_loop_of_the_readme_trains():
    """README's loop, as printed: the loss falls, the model is ordinary again."""
    text = (TINY.parent / "README.md").read_text("utf-8")
    (loop,) = re.findall(r"```python\n(.*?)```", text, re.S)
    model = AutoModelForCausalLM.from_pretrained(TINY / "model").eval()
    batch = torch.randint(100, (8, 16), generator=torch.Generator().manual_seed(0))
    names = {"model": model, "batch": batch, "steps": 12, "lr": 1e-3}
    names |= {"masks": masks, "model_patch": model_patch, "zo": zo}

    def loss_fn(model, batch):
        return -model(batch).logits[:, -1].float().log_softmax(-1)[:, 7].mean()

    before = loss_fn(model, batch)
    exec(loop, names | {"loss_fn": loss_fn})
    assert loss_fn(model, batch) < 0.9 * before
    assert not any(map(quant.answers, model.modules()))


@pytest.mark.parametrize("number, steps, falls", [(1, 50, 0.5), (2, 6, 1.0)])
def test_the_loops_of_ones_own_train(number, steps, falls, monkeypatch, capsys):
    """YOUR_OWN.md's loops, as printed: the loss falls, the model is ordinary again."""
    text = (TINY.parent / "YOUR_OWN.md").read_text("utf-8")
    loops, names = re.findall(r"```python\n(.*?)```", text, re.S), {}
    monkeypatch.chdir(TINY.parent)
    exec(loops[number].replace("range(60)", "range(6)"), names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == steps and min(losses) < losses[0] * falls
    assert not any(map(quant.answers, names["model"].modules()))


def test_tasks_that_the_tiny_model_lacks_come_from_the_hub():
    """The folder of the tiny model's data stands in for the hub where it has the task."""
    found = [configs.complete(configs.Settings(task=task)).data_dir for task in (None, "rte", "cb")]
    assert found == ["tiny/data", "tiny/data", None]
