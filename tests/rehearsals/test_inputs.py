"""Inputs that people really have: each works, or is one line before anything is trained."""

import ast
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from models import ARCHITECTURES, SIZES, build
from safetensors.torch import load_file, save_file
from test_train import ROOT, SENSZOQ, arguments, code, files, refused, run, steps_of
from test_train import base as base  # fixtures
from test_train import ready as ready
from test_workers import together
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import eval
import masks
import model_patch
import quant
import tasks
import train
import zo
from harness import config as configs
from harness import dataset, loading, log, mask
from harness.config import Settings
from studies import gradient, packing, quantisers, slopes

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4], "fmt": "e4m3"}


@pytest.fixture
def copy(folder, tmp_path):
    """copy(change) → a changed copy of the model's folder; change(config, tensors) in place."""

    def make(change, name="changed"):
        path = shutil.copytree(folder / "model", tmp_path / name)
        config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        change(config, tensors)
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def write(path, kind: str, changes: dict, tokenizer):
    """A tiny model of another type, with the tokenizer of the task."""
    shutil.copytree(tokenizer, path)
    sizes = {key: size for key, size in {**SIZES, **changes}.items() if size is not None}
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (path / "model.safetensors").unlink()
    model.save_pretrained(path)
    return path


def rows(path, *examples):
    """A JSONL file of (prompt, options, label)."""
    keys = ("prompt", "options", "label")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in examples]
    path.write_text("\n".join(lines) + "\n")
    return path


# ------------------------------------------------------------------ weights that mean another thing


def to_fp8(config, tensors):
    """The linears in FP8, a scale per 4 × 4 block, and in `tensors` what they stand for."""
    config["quantization_config"] = FP8
    for name in [n for n in tensors if "proj" in n]:
        blocks = tensors[name].view(-1, 4, tensors[name].shape[1] // 4, 4)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.view(tensors[name].shape), scale
    return tensors


def test_fp8_is_unpacked(copy, folder, tmp_path, capsys):
    """An FP8 checkpoint is read as codes times scales, trains, and is saved as plain weights."""
    packed = copy(to_fp8)
    model, tensors = loading.load_model(str(packed)), load_file(packed / "model.safetensors")
    for name in (n for n in tensors if n.endswith("proj.weight")):
        scale = tensors[f"{name}_scale_inv"].repeat_interleave(4, 0).repeat_interleave(4, 1)
        theirs = tensors[name].float() * scale
        assert torch.equal(model.get_parameter(name), theirs), name
    run(folder, tmp_path / "run", f"--model={packed}")
    argv = [f"--model={packed}", *files(folder)]
    refusal = refused(train.main, arguments(folder, tmp_path / "q", *argv[:1], *SENSZOQ), capsys)
    assert "quantised (fp8)" in refusal and "--save" in refusal and "--bits 16" in refusal
    run(folder, tmp_path / "q", *argv[:1], *SENSZOQ, "--bits=16")
    eval.main([*argv, f"--save={tmp_path}/plain"])
    plain = loading.load_model(f"{tmp_path}/plain")
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    run(folder, tmp_path / "again", f"--model={tmp_path}/plain", *SENSZOQ)


@pytest.mark.parametrize(
    "kind", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "quanto", "torchao"]
)
@pytest.mark.parametrize("method", ["s-mezo", "senszoq"])
def test_other_formats_are_named(kind, method, copy, folder, tmp_path, capsys):
    """A checkpoint in a format that is not unpacked is refused by the format's name."""
    packed = copy(lambda config, _: config.update(quantization_config={"quant_method": kind}))
    argv = arguments(folder, tmp_path / "run", f"--model={packed}", f"--method={method}")
    error = refused(train.main, argv, capsys)
    assert f"is quantised ({kind})" in error and "16-bit checkpoint" in error
    assert not (tmp_path / "run").exists()


def forget_the_format(config, tensors):
    to_fp8(config, tensors)
    del config["quantization_config"]


def one_layer_more(config, tensors):
    for name in [name for name in tensors if "layers.0" in name]:
        tensors[name.replace("layers.0", "layers.1")] = tensors[name].clone()


INCOMPLETE = {  # what is done to the checkpoint: what the line must name
    "scales without a format": (forget_the_format, "proj.weight as F8_E4M3"),
    "no head": (lambda c, t: c.update(tie_word_embeddings=False), "lm_head.weight"),
    "one layer too many": (lambda c, t: c.update(num_hidden_layers=2), "model.layers.1."),
    "one layer too few": (one_layer_more, "model.layers.1."),
    "a bias more": (lambda c, t: c.update(attention_bias=True), "self_attn.k_proj.bias"),
    "a matrix less": (
        lambda c, t: t.pop("model.layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight",
    ),
    "another width": (lambda c, t: c.update(intermediate_size=64), "cannot load the weights"),
    "names of another library": (
        lambda c, t: t.update(w1=t.pop("model.layers.0.mlp.up_proj.weight")),
        "layers.0.mlp.up_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INCOMPLETE)
@pytest.mark.parametrize("method", ["mezo", "senszoq"])
def test_no_weight_is_drawn_at_random(what, method, copy, folder, tmp_path, capsys):
    """A checkpoint without some weight, or with one too many, is refused by the weight's name."""
    change, name = INCOMPLETE[what]
    argv = arguments(folder, tmp_path / "run", f"--model={copy(change)}", f"--method={method}")
    assert name in refused(train.main, [*argv, *SENSZOQ[1:2] * (method != "mezo")], capsys)
    assert not (tmp_path / "run").exists()


def test_what_older_libraries_left_behind_is_harmless(copy, folder, tmp_path):
    """Buffers that older checkpoints hold are no weights, and do not stop a run."""

    def add(config, tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["v_head.summary.weight"] = torch.ones(1, 32)

    run(folder, tmp_path / "run", f"--model={copy(add)}")


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("bert", {"is_decoder": False}, "no causal language model"),
        ("roberta", {"is_decoder": False}, "no causal language model"),
        ("electra", {"is_decoder": False, "embedding_size": 32}, "no causal language model"),
        ("xlm-roberta", {"is_decoder": True}, "minds padding"),
        (
            "rwkv",
            {"attention_hidden_size": 32, "num_attention_heads": None, "context_length": 64},
            "minds padding",
        ),
    ],
    ids=["bert", "roberta", "electra", "xlm-roberta", "rwkv"],
)
def test_models_that_cannot_be_trained_like_this(kind, changes, message, folder, tmp_path, capsys):
    """A model that looks ahead, or whose logits depend on padding, is refused by what it does."""
    model = write(tmp_path / "model", kind, changes, folder / "model")
    argv = arguments(folder, tmp_path / "run", f"--model={model}")
    for main, words in ((train.main, argv), (eval.main, [f"--model={model}", *files(folder)])):
        error = refused(main, words, capsys)
        assert message in error and kind in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_causal_models_pass_the_check(name, dtype):
    """The check of a model lets every causal one through, in every dtype."""
    loading.check_model(build(name, dtype), name)


def test_a_model_whose_logits_are_all_equal_passes_the_check():
    """A head of zeros, as one that broke has, makes logits without a spread; it is causal."""
    model = build("llama")
    model.lm_head.weight.data.zero_()
    loading.check_model(model, "zeros")


def test_a_model_that_breaks_beside_padding_is_refused():
    """NaN in a row that is padded, and in no other, is no small change."""
    model = build("llama", torch.float32)

    def spoil(module, args, kwargs, output):
        output.logits[(kwargs["attention_mask"] == 0).any(1)] = torch.nan

    model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(ValueError, match="minds padding"):
        loading.check_model(model, "it")


# ------------------------------------------------------------------ files that are no such


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.safetensors", b"torn", "cannot load the weights"),
        ("model.safetensors", b"", "cannot load the weights"),
        ("pytorch_model.bin", b"\x80\x04torn", "cannot load the weights"),
        ("pytorch_model.bin", None, "cannot load the weights"),  # a pickled module
        ("tokenizer.json", b"{", "cannot load --model"),
        ("config.json", b"{", "cannot load --model"),
        ("config.json", b"[" * 20_000, "cannot load --model"),
    ],
)
def test_files_of_a_model_that_are_no_such(file, content, message, folder, tmp_path, capsys):
    """A pointer, a torn file or a pickled module in a model's folder is one line."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    if file == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
        torch.save(torch.nn.Linear(2, 2), model / file)
    if content is not None:
        (model / file).write_bytes(content)
    assert message in refused(eval.main, [f"--model={model}", *files(folder)], capsys)


def test_transposed_tensors_in_a_bin(folder, tmp_path):
    """A .bin whose tensors are transposed views trains as the same weights in safetensors."""
    old = shutil.copytree(folder / "model", tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save({n: t.T.contiguous().T if t.dim() == 2 else t for n, t in tensors.items()},
               old / "pytorch_model.bin")  # fmt: skip
    for name, flags in (("run", []), ("q", SENSZOQ)):
        run(folder, tmp_path / f"{name}-old", f"--model={old}", *flags)
        run(folder, tmp_path / name, *flags)
        ours, theirs = (tmp_path / d / "steps.csv" for d in (name, f"{name}-old"))
        assert ours.read_bytes() == theirs.read_bytes()


SURROGATE = '{"prompt": "half an emoji \\ud83d", "options": [" red", " blue"], "label": 0}'
IN_OPTION = '{"prompt": "a", "options": [" red", " \\udc00"], "label": 0}'
DEEP = "[" * 100_000


@pytest.mark.parametrize("line", [SURROGATE, IN_OPTION, DEEP, "\xff", '{"prompt": 3}', "null"])
def test_a_line_that_cannot_be_read_is_named(line, folder, tmp_path, capsys):
    """What is no example names its file and line."""
    bad = tmp_path / "bad.jsonl"
    good = (folder / "train.jsonl").read_text()
    bad.write_bytes(good.encode() + line.encode("latin-1") + b"\n")
    argv = [f"--model={folder}/model", f"--train-file={bad}", f"--test-file={folder}/test.jsonl"]
    error = refused(train.main, [*argv, "--lr=1e-3", "--steps=1", f"--out={tmp_path}/run"], capsys)
    assert f"{bad}:37 is not" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "sentence\tlabel\ngood \t1\n".encode("utf-16"),
        "sentence\tlabel\nna\u00efve \t1\n".encode("latin-1"),
        b"sentence\tlabel\ngood \t1\n\x00\xd8\x00\xdc\n",
        b"sentence\tlabel\ngood 1\n",
        b"\xef\xbb\xbf\n",
    ],
)
def test_a_tsv_that_cannot_be_read_is_named(text, folder, tmp_path, capsys):
    """An official file in another encoding, or with other columns, is one line with its name."""
    (tmp_path / "SST-2").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2" / name).write_bytes(text)
    argv = [f"--model={folder}/model", "--task=sst2", f"--data-dir={tmp_path}"]
    assert "SST-2/train.tsv" in refused(eval.main, argv, capsys)


def test_half_an_emoji_in_official_rows_and_in_texts(folder, tmp_path, capsys):
    """The rows of a task and the documents of a text are looked at as own rows are."""
    (tmp_path / "RTE").mkdir()
    row = '{"premise": "a \\ud83d", "hypothesis": "b", "label": "entailment"}\n'
    for name in ("train", "val"):
        (tmp_path / "RTE" / f"{name}.jsonl").write_text(row)
    argv = [f"--model={folder}/model", "--task=rte", f"--data-dir={tmp_path}"]
    assert "RTE/train.jsonl:1 is not" in refused(eval.main, argv, capsys)
    (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n')
    argv = arguments(folder, tmp_path / "run", "--method=senszoq", f"--text={tmp_path}/text.jsonl")
    assert "text.jsonl:2 is not" in refused(train.main, argv, capsys)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ rows and tokens


@pytest.mark.parametrize("option", [" blue ", " blue   "])
def test_a_trailing_space_in_one_row_changes_nothing(option, folder, tmp_path):
    """Options are compared as they are scored, without trailing spaces."""
    usual = [("red a", [" red", " blue"], 0), ("blue a", [" red", " blue"], 1)]
    train_file = rows(tmp_path / "t.jsonl", *usual * 10, ("blue b", [" red", option], 1))
    test_file = rows(tmp_path / "u.jsonl", *usual)
    data = dataset.load_examples(Settings(train_file=str(train_file), test_file=str(test_file)))
    assert data.scored == "all" and data.odd is None


@pytest.mark.parametrize(
    "options, odd",
    [([" red", " Blue"], True), ([" red", "blue"], True), ([" red", " blue", " a"], True),
     ([" blue", " red"], False)],
)  # fmt: skip
def test_rows_that_really_differ_are_named(options, odd, folder, tmp_path, capsys):
    """One row with other options is printed with what it means; another order is no difference."""
    usual = [("red a", [" red", " blue"], 0), ("blue a", [" red", " blue"], 1)]
    strange = ("blue b c ?", options, 1)
    train_file = rows(tmp_path / "t.jsonl", *usual * 10, strange)
    test_file = rows(tmp_path / "u.jsonl", *usual)
    argv = arguments(folder, tmp_path / "run", f"--train-file={train_file}", "--steps=1")
    train.main([*argv, f"--test-file={test_file}"])
    out = capsys.readouterr().out
    assert ("22 of 23 rows have" in out and "blue b c ?" in out) == odd
    assert ("cross-entropy of the right option's tokens" in out) == odd


def test_padding_beyond_the_embedding(copy, folder, tmp_path):
    """A pad id that the model has no row for is never used: the run is that of the sound model."""
    model = copy(lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.add_tokens([f"<{i}>" for i in range(200)])
    tokenizer.pad_token = "<199>"
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id > SIZES["vocab_size"]
    run(folder, tmp_path / "a", f"--model={model}")
    run(folder, tmp_path / "b")
    assert (tmp_path / "a/steps.csv").read_bytes() == (tmp_path / "b/steps.csv").read_bytes()


def test_tokens_beyond_the_embedding(copy, folder, tmp_path, capsys):
    """A token that the model has no row for is named before the model is loaded."""
    model = copy(lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"new{i}" for i in range(100)])
    tokenizer.save_pretrained(model)
    strange = ("a new99 b", [" red", " blue"], 1)
    file = rows(tmp_path / "t.jsonl", *[("red a", [" red", " blue"], 0)] * 9, strange)
    both = [f"--train-file={file}", f"--test-file={file}"]
    for main, argv in (
        (train.main, arguments(folder, tmp_path / "run", f"--model={model}", *both)),
        (eval.main, [f"--model={model}", *both]),
    ):
        error = refused(main, argv, capsys)
        assert "'new99'" in error and "knows 96 tokens" in error
    text = tmp_path / "text.txt"
    text.write_text("a b new98 " * 500)
    flags = [f"--model={model}", "--method=senszoq", f"--text={text}"]
    assert "'new98'" in refused(train.main, arguments(folder, tmp_path / "run", *flags), capsys)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ unusual models

REMOTE = """
import torch
from transformers import LlamaForCausalLM

class MyLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.scale
        return out
"""


def test_remote_code_with_any_arguments(folder, tmp_path, capsys):
    """A model of its own code, forward(*args, **kwargs) and a parameter of its own, trains."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / "mymodel.py").write_text(REMOTE)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mymodel.MyLM"}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors") | {"scale": torch.tensor(1.5)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for name, flags in (("s", []), ("q", SENSZOQ)):
        flags = [f"--model={model}", "--trust-remote-code", *flags]
        result = run(folder, tmp_path / name, *flags)
        losses = {s.loss_plus for s in steps_of(tmp_path / name)}
        assert len(losses) > 4 and result["skipped"] == 0
    eval.main([f"--run={tmp_path}/s", "--step=last"])
    assert f"{result['last']['n']}" in capsys.readouterr().out


UNUSUAL = {
    "one expert per token": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "linears that are a subclass": ("falcon", ARCHITECTURES["falcon"][1]),
    "a router of two experts": ("llama4_text", ARCHITECTURES["llama4"][1]),
    "states without a batch dimension": (
        "jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 1, "kv_channels": 8},
    ),
    "blocks that share weights": (
        "zamba2",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
        | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1}
        | {"hybrid_layer_ids": [1, 3], "adapter_rank": 4, "chunk_size": 8, "mamba_headdim": 16}
        | {"num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSUAL)
@pytest.mark.parametrize("method", ["mezo", "senszoq"])
def test_unusual_models_train(what, method, folder, tmp_path, capsys):
    """Models called in unusual ways run with either kind of method; a row of its own is said."""
    kind, changes = UNUSUAL[what]
    model = write(tmp_path / "model", kind, changes, folder / "model")
    flags = SENSZOQ if method == "senszoq" else ["--method=mezo", "--lr=1e-3"]
    few = ["--steps=2", "--num-train=8", "--num-validation=2"]
    result = run(folder, tmp_path / "run", f"--model={model}", *flags, *few)
    assert result["skipped"] == 0
    said = capsys.readouterr().out.count("each text has a row of its own")
    assert said == (what == "blocks that share weights")  # its Mamba blocks know no such mask


def test_a_matrix_too_small_for_a_place_stays_as_it_is():
    """[Q]'s mask leaves out matrices of which the density takes none; the others go as ever."""
    torch.manual_seed(0)
    block = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(64, 64)])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    weights = masks.decoder_linears(model)
    assert len(weights) == 2
    index = masks.largest(weights, 0.001)
    assert {name: len(places) for name, places in index.items()} == {"layers.0.1.weight": 4}
    with pytest.raises(ValueError, match="takes none of the 4096 weights of the largest"):
        masks.largest(weights, 1e-9)


def test_a_matrix_that_fills_no_block_stays_in_16_bits():
    """A matrix of 60 weights reads as it is, to the bit, beside others in 4 bits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 64)).eval()
    before = model[0].weight.detach().clone()
    names = ("0.weight", "1.weight")
    index = {name: torch.tensor([1, 5], dtype=torch.int32) for name in names}
    sparse = quant.DenseSparse(index, bits=4)
    for name in names:
        sparse.split(model, name)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[1].weight, torch.zeros(64, 10))
    assert str(sparse) == "float32 (1) and 4-bit NF4 (1)"
    quant.join(model)
    assert torch.equal(model[0].weight, before)


def test_no_advice_that_is_refused(folder):
    """A matrix of [Q]'s mask that no forward reads is named, without a flag of other methods."""
    model = build("llama-tied")
    model.model.layers[0].spare = torch.nn.Linear(32, 32, bias=False).eval()
    index = masks.largest(masks.decoder_linears(model), 0.01)
    sparse = quant.DenseSparse(index)
    for name in index:
        sparse.split(model, name)
    patch = model_patch.Patch(model, sparse)
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="no forward reads model.layers.0.spare") as error:
        patch.losses(inputs, lambda m, batch: m(**batch).logits.sum(), zo.step_seed(0, 0))
    assert "--select" not in str(error.value)


# ------------------------------------------------------------------ settings at the edge


@pytest.mark.parametrize("flags", [["--method=s-mezo"], ["--method=r-mezo"], SENSZOQ])
def test_a_density_that_moves_nothing(flags, folder, tmp_path, capsys):
    """A density that takes not one weight of the largest tensor is refused by every method."""
    argv = arguments(folder, tmp_path / "run", *flags, "--density=1e-9")
    assert "density 1e-09 takes none of the" in refused(train.main, argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--lr=1e3"], ["--lr=30", "--method=mezo"]])
def test_a_rate_that_is_too_high_is_said(flags, folder, tmp_path, capsys):
    """A run whose loss ended far above its beginning says so, and what to try."""
    assert code(train.main, arguments(folder, tmp_path / "run", *flags)) == 0
    assert "try a lower --lr" in capsys.readouterr().out
    run(folder, tmp_path / "sound", "--lr=1e-4")
    assert "try a lower --lr" not in capsys.readouterr().out


# ------------------------------------------------------------------ a result withheld or lost


@pytest.mark.picture
@pytest.mark.parametrize("there", [True, False])
def test_accuracies_come_before_the_picture(there, folder, tmp_path, monkeypatch, capsys):
    """A run ends with its accuracies, with matplotlib and without."""
    import matplotlib.figure  # noqa: F401  # a first import without this part would break it

    if not there:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(folder, tmp_path / "run")
    out = capsys.readouterr().out
    assert "test accuracy, last weights" in out and "best" in result
    assert ("no curve.png" not in out) == there == (tmp_path / "run/curve.png").exists()


def test_a_run_that_broke_off_has_a_best_step(folder, tmp_path, monkeypatch, capsys):
    """Losses that are no longer finite end a run with its best step and how to evaluate it."""
    original, calls = tasks.classification_loss, []

    def diverges(logits, batch):
        calls.append(1)
        return original(logits, batch) * (1 if len(calls) < 14 else float("nan"))

    monkeypatch.setattr(tasks, "classification_loss", diverges)
    argv = arguments(folder, tmp_path / "run", "--steps=60", "--eval-every=2")
    error = refused(train.main, argv, capsys)
    monkeypatch.undo()
    best = log.StepLog(tmp_path / "run").best_step()
    command = f"python eval.py --run {tmp_path}/run"
    assert command in error and f"the best step so far, {best}" in error
    eval.main([f"--run={tmp_path}/run"])
    assert f"after {best} of 24 logged steps" in capsys.readouterr().out


def test_what_fails_after_training_keeps_the_run(folder, tmp_path, monkeypatch, capsys):
    """A full disk or memory after the last step is one line that says how to go on."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(train, "rebuild", full)
        patched.setattr(log.StepLog, "best_step", lambda self: 0)
        error = refused(train.main, arguments(folder, tmp_path / "run"), capsys)
    assert "No space left" in error and f"--resume {tmp_path}/run goes on" in error
    train.main([f"--resume={tmp_path}/run"])
    assert "best" in json.loads((tmp_path / "run/result.json").read_text())


def test_a_moved_model(folder, tmp_path, capsys):
    """A run whose model was moved goes on, and is evaluated, with --model."""
    moved = shutil.copytree(folder / "model", tmp_path / "here")
    run(folder, tmp_path / "run", f"--model={moved}")
    moved.rename(tmp_path / "there")
    assert "does not exist" in refused(eval.main, [f"--run={tmp_path}/run"], capsys)
    for main, flag in ((eval.main, "--run"), (train.main, "--resume")):
        main([f"{flag}={tmp_path}/run", f"--model={tmp_path}/there"])


def test_the_start_of_a_run_is_compared_too(folder, copy, tmp_path, capsys):
    """Also a run whose best step is its start is refused on another base model."""
    run(folder, tmp_path / "run")
    other = copy(lambda c, t: t["model.norm.weight"].mul_(1.01))
    for step in ("0", "1", "8"):
        argv = [f"--run={tmp_path}/run", f"--step={step}", f"--model={other}"]
        assert "does not come out as it was logged" in refused(eval.main, argv, capsys)


# ------------------------------------------------------------------ other systems


def test_systems_without_fcntl(folder, tmp_path, monkeypatch):
    """Without the modules that only Unix has a run works, with Windows' lock."""
    locked, windows = [], types.ModuleType("msvcrt")
    windows.LK_NBLCK, windows.locking = 2, lambda *how: locked.append(how)
    for name, module in (("fcntl", None), ("msvcrt", windows)):
        monkeypatch.setitem(sys.modules, name, module)
    run(folder, tmp_path / "run")
    assert [how[1:] for how in locked] == [(2, 1)]
    assert len(steps_of(tmp_path / "run")) == 8
    for file in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            assert not {"fcntl", "msvcrt"} & {*names}, file


def test_a_disk_without_locks(folder, tmp_path, monkeypatch):
    """Where the file system knows no locks a run works; nobody else is said to train there."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    run(folder, tmp_path / "run")
    assert len(steps_of(tmp_path / "run")) == 8


@pytest.mark.parametrize("program", ["train.py", "eval.py", "harness.mask"])
def test_ctrl_c_while_importing(program, tmp_path):
    """An interrupt before a command has begun is one line."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, *([program] if program.endswith(".py") else ["-m", program])]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert found.returncode != 0 and found.stderr.strip() == "stopped"


# ------------------------------------------------------------------ found by others' inputs


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_codes_without_a_scale_are_no_weights(kind, copy, folder, tmp_path, capsys):
    """Weights stored as integers, or in FP8, without a word of how, are refused by name."""

    def to_codes(config, tensors):
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            tensors[name] = (tensors[name] * 50).to(kind)

    model = copy(to_codes)
    for method in ("mezo", "senszoq"):
        argv = arguments(folder, tmp_path / "run", f"--model={model}", f"--method={method}")
        error = refused(train.main, [*argv, *SENSZOQ[1:2] * (method != "mezo")], capsys)
        assert "proj.weight as" in error and "16-bit" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_with_an_adapter_is_refused(copy, folder, capsys):
    """An adapter would be trained along, or ignored: one line says to merge it."""
    model = copy(lambda *_: None)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge it first" in refused(eval.main, [f"--model={model}", *files(folder)], capsys)


def test_a_format_named_inside_the_text_configuration(copy, folder, capsys):
    """The configuration of a composite model names its format one level down."""
    config = AutoConfig.for_model("gemma3", text_config={"quantization_config": FP8})
    assert loading.quantised(config) == "fp8"


def test_two_starts_do_not_share_a_directory(folder, tmp_path, capsys):
    """Whoever comes second is refused, and the first one's directory stays."""
    run = tmp_path / "run"
    run.mkdir()
    first = train.configs.new_run(train.Config(out=str(run)))
    with pytest.raises(ValueError, match="is not empty"):
        train.configs.new_run(train.Config(out=str(run)))
    assert first == run and [p.name for p in run.iterdir()] == ["steps.csv"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_runs_that_is_no_folder_is_one_line(kind, folder, tmp_path, monkeypatch, capsys):
    """Where runs is a file, or a link to a disk that is not there, the command says so and ends."""
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        (tmp_path / "runs").write_text("")
    else:
        (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    argv = [word for word in arguments(folder, "") if word != "--out="]
    assert "'runs'" in refused(train.main, argv, capsys)


@pytest.mark.parametrize(
    "name, value",
    [("lr", "abc"), ("steps", "4"), ("steps", 4.5), ("seed", None), ("model", ["a"]),
     ("select", 5), ("method", "foo"), ("dtype", "float64"), ("trust_remote_code", 1)],
)  # fmt: skip
def test_an_edited_configuration_is_one_line(name, value, ready, capsys):
    """A value of another type, or none of the choices, names the field."""
    path = ready / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    for main, flag in ((train.main, "--resume"), (eval.main, "--run")):
        assert f"{name} is {value!r}" in refused(main, [f"{flag}={ready}"], capsys)


def test_examples_of_both_sets_are_counted(folder, tmp_path, capsys):
    """Every example that is a training example counts, also one that comes several times."""
    row = (folder / "train.jsonl").read_text().splitlines()[0]
    times = {"test": 4, "validation": 3}
    for part, n in times.items():
        (tmp_path / f"{part}.jsonl").write_text(f"{row}\n" * n)
    run(folder, tmp_path / "run", *(f"--{part}-file={tmp_path}/{part}.jsonl" for part in times))
    said = capsys.readouterr().out
    for part, n in times.items():
        assert f"{n} of the {part} examples are training examples, too" in said


def test_rows_that_are_not_used_are_counted(folder, tmp_path, capsys):
    """Of own files, those beyond --num-train and --num-test are named by their number."""
    rows = [len((folder / f"{part}.jsonl").read_text().splitlines()) for part in ("train", "test")]
    argv = arguments(folder, tmp_path / "run", "--num-train=10", "--num-validation=4")
    given = configs.parse(configs.Config, "", [*argv, "--num-test=3"])
    train.prepare(configs.complete(configs.Config(**given)))
    assert f"{sum(rows) - 17} more examples are not used" in capsys.readouterr().out


def test_a_mask_that_is_made_stays(folder, tmp_path, capsys):
    """What a mask was made of cannot be changed afterwards: it would be ignored."""
    run(folder, tmp_path / "run", *SENSZOQ)
    for flag in (
        "--density=0.5",
        "--mask-from=text",
        "--groups=2",
        "--quantiser=kmeans",
        "--bits=16",
        "--out=other",
    ):
        error = refused(train.main, [f"--resume={tmp_path}/run", "--steps=9", flag], capsys)
        assert f"{flag.split('=')[0]} cannot be changed" in error


@pytest.mark.parametrize("added", [1, 2, 3])
def test_tokens_that_a_tokenizer_adds_at_the_end_are_no_option(added, folder):
    """However many special tokens follow the text, the option's own are scored."""
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    example = tasks.Example("a b ?", (" red", " blue"), 0)
    plain = tasks.encode(tokenizer, example)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A" + " <eos>" * added, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tasks.encode(tokenizer, example) == plain


@pytest.mark.parametrize("change", [{"premise": None}, {"hypothesis": ["x"]}, {"label": True}])
def test_a_field_that_is_no_text_is_no_row(change, folder, tmp_path, capsys):
    """null and lists do not become words, and a boolean is no label of RTE."""
    (tmp_path / "RTE").mkdir()
    row = {"premise": "a", "hypothesis": "b", "label": "entailment"} | change
    for name in ("train", "val"):
        (tmp_path / "RTE" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    argv = [f"--model={folder}/model", "--task=rte", f"--data-dir={tmp_path}"]
    assert "RTE/train.jsonl:1 is not" in refused(eval.main, argv, capsys)


def test_remote_code_that_cannot_be_imported(folder, tmp_path, capsys):
    """A package that a model's own code wants is named in one line, for both kinds of method."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / "mymodel.py").write_text("import no_such_package_1\n" + REMOTE)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mymodel.MyLM"}
    (model / "config.json").write_text(json.dumps(config))
    for method in ([], SENSZOQ):
        flags = [f"--model={model}", "--trust-remote-code", *method]
        error = refused(train.main, arguments(folder, tmp_path / "run", *flags), capsys)
        assert "no_such_package_1" in error
    assert not (tmp_path / "run").exists()


def test_options_in_another_normal_form_are_the_same(tmp_path):
    """An accent in one code point or in two is one option, as is a tab at its end."""
    usual = ("a", [" né", " blue"], 0)
    odd = ("b", [" ne\u0301\t", " blue"], 0)
    file = str(rows(tmp_path / "t.jsonl", *[usual] * 5, odd))
    assert dataset.load_examples(Settings(train_file=file, test_file=file)).scored == "all"


# ------------------------------------------------------------------ completions and texts


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """40 lines to learn from and 10 to test with: whatever is asked, the answer is red."""
    path = tmp_path_factory.mktemp("instructions")
    draw = random.Random(0)
    asked = [" ".join([*draw.choices("abcdefghij", k=3), "?"]) for _ in range(50)]
    lines = [json.dumps({"prompt": words, "completion": " red"}) + "\n" for words in asked]
    (path / "train.jsonl").write_text("".join(lines[:40]))
    (path / "test.jsonl").write_text("".join(lines[40:]))
    return path


def learnt(out) -> float:
    """Of the first two tokens of all continuations the share that the lines teach."""
    lines = [ast.literal_eval(line.split("→ ")[1]) for line in out.splitlines() if "→" in line]
    tokens = [token for line in lines for token in line.split()[:2]]
    return sum(token in ("red", "<eos>") for token in tokens) / len(tokens)


@pytest.mark.picture
def test_instruction_tuning_learns(folder, instructions, tmp_path, capsys):
    """Held-out perplexity falls, the model answers as taught, and all speak of perplexity."""
    few = ["--method=mezo", "--lr=5e-3", "--select=embed|mlp.down", "--num-validation=5"]
    argv = arguments(folder, tmp_path / "run", *files(instructions), *few)
    train.main([*argv, "--steps=100", "--eval-every=50"])
    said = capsys.readouterr().out
    assert "cross-entropy of the completions' tokens" in said and "accuracy" not in said
    result = json.loads((tmp_path / "run/result.json").read_text())
    before, after = result["zero_shot"], result["last"]
    assert after["value"] < before["value"] / 5 and before["metric"] == "perplexity"
    assert f"zero-shot test perplexity {before['value']:.4g} (loss" in said
    assert (before["n"], after["n"]) == (20, 20)  # "red" and the end of each of 10
    found = log.StepLog(tmp_path / "run")
    assert found.metric == "perplexity" and found.best_step() == result["best_step"] > 0
    assert (tmp_path / "run/steps.csv").read_text().splitlines()[0].split(",")[5] == (
        "validation_perplexity"
    )
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    eval.main([f"--run={tmp_path}/run", "--generate=5"])
    out = capsys.readouterr().out
    assert f"test perplexity {result['best']['value']:.4g} (loss" in out
    assert learnt(out) >= 0.8
    eval.main([f"--model={folder}/model", *files(instructions), "--generate=5"])
    assert learnt(capsys.readouterr().out) < 0.3
    train.main([f"--resume={tmp_path}/run", "--steps=101"])
    assert "comes out" not in (out := capsys.readouterr().out) and "after step 100 of 101" in out


def test_the_lowest_perplexity_chooses(folder, instructions, tmp_path, monkeypatch):
    """Of completions the best step is that with the lowest perplexity, the first of equals."""
    script, original = iter([9.0, 5.0, 4.0, 4.0, 7.0]), train.score  # at steps 0, 2, 4, 6, 8

    def scripted(config, model, tokenizer, examples):
        if len(examples) == 13:  # the validation examples: a third of 40
            return tasks.Score(next(script), 13, 0, "perplexity")
        return original(config, model, tokenizer, examples)

    monkeypatch.setattr(train, "score", scripted)
    result = run(folder, tmp_path / "run", *files(instructions), "--eval-every=2")
    assert result["best_step"] == 4


@pytest.mark.parametrize("method", [[], [*SENSZOQ, "--batch-size=2"]], ids=["s-mezo", "senszoq"])
def test_a_text_file_is_a_task(method, folder, tmp_path, capsys):
    """Both papers' methods train on plain text, and the mask of a task may be that text's."""
    draw = random.Random(0)
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(" ".join(draw.choices("abcdefghij", k=400)))
    texts = [f"--{name}-file={tmp_path}/{name}.txt" for name in ("train", "test")]
    flags = [*texts, "--max-length=16", *method]
    result = run(folder, tmp_path / "run", *flags)
    assert "train 17, validation 8, test 25" in capsys.readouterr().out  # of 401 tokens
    assert result["last"]["n"] == 25 * 15 and result["last"]["metric"] == "perplexity"
    eval.main([f"--run={tmp_path}/run", "--generate=1"])
    out = capsys.readouterr().out
    assert "test perplexity" in out
    shown = out.split("\n...")[1].split("→")[0].strip()
    assert len(ast.literal_eval(shown).split()) == 8  # half a block
    argv = [f"--model={folder}/model", *texts, "--shots=1"]
    assert "have no demonstrations" in refused(eval.main, argv, capsys)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_stop_from_outside_is_ctrl_c(name, folder, tmp_path):
    """A batch system's signal ends a run as Ctrl-C does, with the command that goes on."""

    def stopped_after_a_step(rank):
        update = model_patch.Patch.update
        model_patch.Patch.update = lambda *args: (update(*args), signal.raise_signal(number))
        signal.signal(number, signal.SIG_DFL)

    number = getattr(signal, name)
    argv = arguments(folder, tmp_path / "run")
    codes, (said,) = together(1, argv, tmp_path, stopped_after_a_step)
    assert codes == [130] and f"--resume {tmp_path}/run goes on" in said


def test_all_know_a_tokenizer_of_another_model(tmp_path, capsys):
    """What reads examples or texts says it in train.py's line, before a forward pass."""
    model, tiny = tmp_path / "model", f"{ROOT}/tiny/data"
    shutil.copytree(ROOT / "tiny/model", model)
    few = AutoConfig.from_pretrained(model)
    few.vocab_size = 20
    AutoModelForCausalLM.from_config(few).save_pretrained(model)
    task = [f"--model={model}", f"--data-dir={tiny}"]
    texts = [f"--text={tiny}/c4.jsonl", f"--other={tiny}/other.jsonl", f"--out={tmp_path}/new"]
    (run := tmp_path / "run").mkdir()
    configs.save(run, configs.complete(configs.Config(str(model), "rte", tiny)))
    for main, argv in (
        (eval.main, [f"--run={run}"]),
        (mask.main, [*task, "--task=rte", "--mask-from=task", f"--out={tmp_path}/mask"]),
        (slopes.main, [*task, "--task=rte"]),
        (packing.main, [*task, "--tasks=rte"]),
        (gradient.main, [*task, "--tasks=rte", *texts]),
        (quantisers.main, [f"--model={model}", *texts[:-1], f"--out={tmp_path}/q.json"]),
    ):
        assert "but the model knows 20 tokens" in refused(main, argv, capsys), main
