"""harness/adapter.py: LoRA and prefixes that move by Algorithm 1, on weights that stand still."""

import copy
import json
import shutil
import sys

import pytest
import torch
from models import SIZES, batch, build, loss_of
from test_train import arguments, contents, equal, files, refused, run
from test_train import trained as trained  # a fixture
from transformers import AutoConfig, AutoModelForCausalLM

import eval
import masks
import tasks
import train
import zo
from harness import adapter, dataset, loading
from harness import config as configs
from harness.config import Config
from model_patch import Patch

peft = pytest.importorskip("peft")
SEED, EPS, LR = zo.step_seed(3, 4), 1e-2, 1e-2
KINDS = {  # name: settings of a run
    "mezo-lora": ["--adapter=lora", "--method=mezo"],
    "mezo-prefix": ["--adapter=prefix", "--method=mezo"],
    "s-mezo-lora": ["--adapter=lora", "--method=s-mezo", "--density=0.3"],
    "mezo-lora-nf4": ["--adapter=lora", "--method=mezo", "--bits=4"],
    "mezo-prefix-nf4": ["--adapter=prefix", "--method=mezo", "--bits=4"],
}


def attached(name, kind, seed=0):
    """(a tiny model, the same with an adapter that is no longer at its start)."""
    settings = configs.parse(Config, "", KINDS[kind])
    model = build(name)
    changed = adapter.attach(copy.deepcopy(model), Config(**settings, model=name, seed=seed))
    with torch.no_grad():
        for key, p in changed.named_parameters():
            if "lora_B" in key:
                p.copy_(
                    0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key)))
                )
    return model, changed


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    """A model whose rows are whole blocks of 64, and the flags that name it."""
    path = shutil.copytree(folder / "model", tmp_path_factory.mktemp("wide") / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "torch_dtype": "float32"}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES | sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return f"--model={path}"


# ------------------------------------------------------------------ what moves, and how


@pytest.mark.parametrize("kind", ["mezo-lora", "mezo-prefix", "s-mezo-lora"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "qwen3"])
def test_a_step_is_algorithm_1_on_the_adapters_tensors(name, kind):
    """l⁺, l⁻ and the update are the literal ones with a mask of the adapter's tensors alone."""
    _, model = attached(name, kind)
    literal, inputs = copy.deepcopy(model), batch()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    patch = Patch(model, masks.Everything(), eps=EPS, select=adapter.MOVES)
    plus, minus = patch.losses(inputs, loss_of, SEED)
    patch.update(SEED, float(-LR * zo.projected_grad(plus, minus, EPS)))
    patch.remove()

    names = [key for key, _ in literal.named_parameters()]
    mine = [any(part in key for part in ("lora_A", "lora_B", "prompt_encoder")) for key in names]
    theta = [p.detach() for p in literal.parameters()]
    ones = [torch.full(p.shape, moves) for p, moves in zip(theta, mine, strict=True)]
    want = zo.sparse_mezo_step(
        theta, lambda: loss_of(literal, inputs), lambda _: ones, lr=LR, eps=EPS, seed=SEED
    )
    assert any(mine) and plus != minus
    torch.testing.assert_close([float(plus), float(minus)], list(want[:2]), rtol=1e-5, atol=1e-5)
    for (key, p), q, moves in zip(model.named_parameters(), theta, mine, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5, msg=key)
        assert torch.equal(p, before[key]) != moves, key


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_s_mezo_lora_is_theta_0_plus_m_times_the_product(name):
    """The model answers as a plain one with the written-out weight, and `merged` is that one."""
    plain, model = attached(name, "s-mezo-lora")
    inputs, parameters = batch(), dict(model.named_parameters())
    for key, theta in plain.named_parameters():
        if key.endswith(("q_proj.weight", "v_proj.weight")):
            path = f"base_model.model.{key.removesuffix('.weight')}"
            a, b = (parameters[f"{path}.lora_{x}.default.weight"].detach() for x in "AB")
            k = round(0.3 * theta.numel())
            m = theta.abs() <= theta.detach().abs().flatten().sort().values[k - 1]
            whole = torch.where(m, theta.detach() + 16 / 8 * b @ a, theta.detach())
            read = model.get_submodule(path).base_layer.weight
            torch.testing.assert_close(read, whole, rtol=1e-6, atol=1e-7)
            assert torch.equal(read[~m], theta[~m]) and int(m.sum()) == k
            theta.data.copy_(whole)
    want = plain(**inputs, use_cache=False).logits
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, want)
    ordinary = adapter.merged(model)
    assert [key for key, _ in ordinary.named_parameters()] == [
        key for key, _ in plain.named_parameters()
    ] or name == "opt"  # whose biases stand before their weights now
    torch.testing.assert_close(ordinary(**inputs, use_cache=False).logits, want)


@pytest.mark.parametrize("kind", ["mezo-lora", "s-mezo-lora"])
def test_lora_begins_at_the_model(kind):
    """Before the first step B is 0 and every logit has the bits of the model without LoRA."""
    model = build("llama")
    want = model(**batch(), use_cache=False).logits
    config = Config(**configs.parse(Config, "", KINDS[kind]), model="x")
    assert torch.equal(adapter.attach(model, config)(**batch(), use_cache=False).logits, want)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gemma3", "phi", "gpt-neox"])
def test_a_prefix_begins_as_five_tokens_in_front(name):
    """The logits are those of a prompt that begins with the tokens of the seed, padding or not."""
    plain, model = attached(name, "mezo-prefix", seed=7)
    draw = torch.Generator().manual_seed(7)
    front = torch.randint(SIZES["vocab_size"], (2, 5), generator=draw)[:1]
    for ids, mask in zip(*(batch()[key] for key in ("input_ids", "attention_mask")), strict=True):
        positions = (mask[None].cumsum(1) - 1).clamp(min=0)
        padded = tasks.model_inputs(model, ids[None], mask[None], positions)
        assert "position_ids" in padded and "logits_to_keep" in padded
        whole = torch.cat([front, ids[None, mask.bool()]], dim=1)
        got = model(**padded, use_cache=False).logits[:, -int(mask.sum()) :]
        want = plain(input_ids=whole, use_cache=False).logits[:, 5:]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_score(kind, wide):
    """Options scored in a batch of prompts of several lengths are those of each alone."""
    config = Config(**configs.parse(Config, "", [*KINDS[kind], wide]))
    tokenizer, _ = loading.load_tokenizer(config.model)
    model = adapter.attach(loading.load_model(config.model, nf4=config.bits == 4), config)
    prompts = ["red ?", "red a b c d e f ?", " ".join("abcdefghij") + " ?"]
    examples = [tasks.Example(p, [" red", " blue a"], 0) for p in prompts]

    def scores(some):
        batch = tasks.collate(tokenizer, some)
        return tasks.option_scores(model(**batch.inputs(model), use_cache=False).logits, batch)

    alone = torch.cat([scores([example]) for example in examples])
    torch.testing.assert_close(scores(examples), alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("kind", ["mezo-lora-nf4", "mezo-prefix", "s-mezo-lora"])
def test_a_run_is_its_log_and_what_is_saved_is_what_it_rebuilds(
    kind, wide, folder, tmp_path, trained, capsys
):
    """A cut log goes on to the same bytes; peft reads the saved folder to the same logits."""
    few = ["--steps=3", "--eval-every=3", "--num-test=8", "--num-validation=0", "--batch-size=4"]
    run(folder, tmp_path / "run", wide, *KINDS[kind], *few)
    weights = [w.clone() for w in trained]
    whole = (tmp_path / "run/steps.csv").read_bytes()
    shutil.copytree(tmp_path / "run", cut := tmp_path / "cut")
    (cut / "steps.csv").write_bytes(b"".join(whole.splitlines(keepends=True)[:4])[:-4])
    train.main([f"--resume={cut}"])
    assert (cut / "steps.csv").read_bytes() == whole and equal(trained, weights)

    capsys.readouterr()
    eval.main([f"--run={tmp_path}/run", "--step=last", f"--save={tmp_path}/saved"])
    test = json.loads((tmp_path / "run/result.json").read_text())["last"]["value"]
    assert f"test accuracy {test:.3f}" in capsys.readouterr().out
    config, _, data = dataset.load(configs.load(tmp_path / "run", {}))
    steps = train.log.StepLog(tmp_path / "run").steps
    rebuilt = train.rebuild(config, tmp_path / "run", data, steps, 3)
    if kind == "s-mezo-lora":
        assert not (tmp_path / "saved/adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        same = equal(model.parameters(), adapter.merged(copy.deepcopy(rebuilt)).parameters())
    else:
        assert not (tmp_path / "saved/model.safetensors").exists()
        base = loading.load_model(config.model, nf4=config.bits == 4)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
        tensors = [peft.get_peft_model_state_dict(m) for m in (model, rebuilt)]
        same = tensors[0].keys() == tensors[1].keys() and equal(*(t.values() for t in tensors))
    inputs = tasks.collate(data.tokenizer, data.test[:4]).inputs(model)
    with torch.no_grad():
        got, want = (m.eval()(**inputs, use_cache=False).logits for m in (model, rebuilt))
    assert same
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mezo-lora", "mezo-prefix"])
def test_an_adapter_is_of_the_seed_alone(kind):
    """Equal seeds draw equal adapters, another seed another one, and no other draw notices."""
    drawn = []
    for seed in (1, 1, 2):
        config = Config(**configs.parse(Config, "", KINDS[kind]), model="x", seed=seed)
        model, state = build("llama"), torch.get_rng_state()
        model = adapter.attach(model, config)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(seed)
        moving = [p for n, p in model.named_parameters() if p.requires_grad and "lora_B" not in n]
        drawn.append(torch.cat([p.detach().flatten() for p in moving]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_weights_under_an_adapter_in_4_bits_are_bitsandbytes(wide):
    """The linears of the blocks, and they alone, are in NF4, and the count is of weights."""
    config = Config(**configs.parse(Config, "", [*KINDS["mezo-lora-nf4"], wide]))
    plain, packed = (loading.load_model(config.model, nf4=four) for four in (False, True))
    index = masks.decoder_linears(plain)
    four = {n for n, p in packed.named_parameters() if hasattr(p, "quant_state")}
    assert four == set(index)
    patch = Patch(adapter.attach(packed, config), masks.Everything(), select=adapter.MOVES)
    moving = sum(theta.numel() for theta in patch.moving())
    assert patch.total == plain.num_parameters() + moving


@pytest.mark.parametrize("load", [train.prepare, dataset.load], ids=["train", "eval"])
@pytest.mark.parametrize("asked", [[], ["--max-length=10000"]])
def test_a_longest_prompt_leaves_room_for_the_prefix(load, asked, folder):
    """Of the positions that a model has, five are the prefix's, in training and evaluation."""
    argv = [f"--model={folder}/model", *files(folder), *KINDS["mezo-prefix"], *asked]
    config, *_ = load(Config(**configs.parse(Config, "", argv)))
    assert config.max_length == SIZES["max_position_embeddings"] - 5


def test_a_long_prompt_is_continued_behind_a_prefix(folder, capsys):
    """eval.py --generate leaves the prefix its positions, in a model that has no more of them."""
    _, model = attached("opt", "mezo-prefix")
    tokenizer, _ = loading.load_tokenizer(f"{folder}/model")
    long = tasks.Example(tuple(5 + i % 40 for i in range(3000)), ((7,),), 0)
    longest = SIZES["max_position_embeddings"] - adapter.TOKENS
    eval.show_continuations(model, tokenizer, [long], longest)
    assert capsys.readouterr().out.count("→") == 1


# ------------------------------------------------------------------ settings


def test_mezos_values_and_their_sources():
    """Rate, ε, r, α and the number of tokens are of MeZO's tables."""
    for kind, (rates, eps) in {
        "mezo-lora": ((1e-4, 5e-5), 1e-2),
        "mezo-prefix": ((1e-2, 1e-3), 1e-1),
    }.items():
        said = Config(**configs.parse(Config, "", KINDS[kind]), model="x", task="rte")
        config, sources = configs.fill_in(said, "llama")
        assert config.lr in rates and config.eps == eps and config.steps == 20_000
        assert "MeZO" in sources["lr"] and "MeZO" in sources["eps"]
    assert (adapter.LORA["r"], adapter.LORA["lora_alpha"], adapter.TOKENS) == (8, 16, 5)
    config = Config(method="s-mezo", adapter="lora", model="x", task="rte")
    _, sources = configs.fill_in(config, "llama")
    assert sources["density"].startswith("[S] Table 8")


BAD = {  # what the user types: what the one line must say
    "--adapter=lora --method=senszoq": "is for --method mezo, s-mezo, not for senszoq",
    "--adapter=lora --method=r-mezo": "is for --method mezo, s-mezo, not for r-mezo",
    "--adapter=prefix": "is for --method mezo, not for s-mezo",
    "--adapter=ia3": "invalid choice",
    "--adapter=lora --bits=4": "--bits is for --method senszoq, mezo --adapter lora",
    "--adapter=lora --mask-kind=constant": "is for --method s-mezo, not for s-mezo --adapter lora",
    "--adapter=lora --refresh-every=3": "is for --method s-mezo, not for",
    "--adapter=lora --above=0.1": "is for --method s-mezo, not for",
    "--adapter=lora --method=mezo --select=q_proj": "--select is for --method mezo, s-mezo, r-mezo",
    "--adapter=lora --method=mezo --rounding=nearest": "--rounding is for --method mezo, s-mezo",
    "--adapter=lora --method=mezo --density=0.5": "mezo moves all weights",
    "--adapter=lora --method=s-mezo --density=1e-6": "nothing moves",
    "--adapter=lora --method=mezo --text=x": "is for --method senszoq, not for mezo --adapter lora",
    "--adapter=lora --method=mezo --bits=4 --eps=1": "no whole blocks of 64",
    "--adapter=lora --method=mezo --eps=0": "above 0 and finite",
}


@pytest.mark.parametrize("typed", BAD)
def test_what_makes_no_sense_is_one_line(typed, folder, tmp_path, capsys, monkeypatch):
    """It is refused before a model is loaded."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    argv = [f"--model={folder}/model", *files(folder), f"--out={tmp_path}/run", *typed.split()]
    assert BAD[typed] in refused(train.main, argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("gpt2", "mezo-lora", "has no q_proj"),
        ("mamba", "mezo-prefix", "--adapter prefix: "),
        ("deepseek-v3", "mezo-prefix", "--adapter prefix: "),
        # padding takes places of its window of 8, and so drives the prefix out
        ("mistral", "mezo-prefix", "with a prefix (mistral) minds padding"),
    ],
)
def test_models_without_a_place_for_an_adapter(name, kind, says, folder, tmp_path, capsys):
    """What LoRA or a prefix cannot stand beside is said in one line."""
    path = shutil.copytree(folder / "model", tmp_path / "model")
    build(name).save_pretrained(path)
    argv = arguments(folder, tmp_path / "run", f"--model={path}", *KINDS[kind], "--eps=0.1")
    before = contents(path)
    assert says in refused(train.main, argv, capsys)
    assert contents(path) == before and not (tmp_path / "run").exists()


def test_without_peft_is_one_line(folder, tmp_path, monkeypatch, capsys):
    """Where peft is missing, only adapters need it, and the line says how to install it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = arguments(folder, tmp_path / "run", *KINDS["mezo-lora"])
    assert "pip install peft" in refused(train.main, argv, capsys)
