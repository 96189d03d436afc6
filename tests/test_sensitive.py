"""sensitivity.py and python masks.py: scores, masks and files against brute force and counting."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, WORDS, build, write_model
from safetensors.torch import load_file, save_file
from torch import nn

import loading
import make_mask
import masks
import scoring
import sensitivity
import snapshot
import tasks
from errors import UserError
from sensitivity import decoder_linears, fisher, sensitive, sensitive_index

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(masks.__file__).resolve().parent
WINDOWS = torch.randint(3, 96, (5, 8), generator=torch.Generator().manual_seed(0))
LINEARS = {  # what the papers mask, spelled out for one block
    "llama": [f"self_attn.{x}_proj" for x in "qkvo"]
    + [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    "opt": [f"self_attn.{x}_proj" for x in "kvq"] + ["self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}  # fmt: skip
LINEARS["opt-350m"] = LINEARS["opt"]


def brute_force(model, losses):
    """One autograd call per sample, no hook, no checkpoint: [samples, ...] per matrix."""
    weights = decoder_linears(model)
    rows = [torch.autograd.grad(loss(model), list(weights.values())) for loss in losses]
    return {name: torch.stack(g) for name, g in zip(weights, zip(*rows, strict=True), strict=True)}


def planted(gradients):
    """A loss whose gradient is known: Σ w · gradient over the matrices named."""

    def loss(model):
        weights = dict(model.named_parameters())
        return sum((weights[name].float() * g).sum() for name, g in gradients.items())

    return loss


def gradients_like(model, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linears = decoder_linears(model).items()
    return {n: scale * torch.randn(w.shape, generator=generator) for n, w in linears}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ which matrices


@pytest.mark.parametrize("name", LINEARS)
def test_the_decoder_linears_are_those_of_the_paper(name):
    """Exactly the blocks' matrices, in the model's order: no embedding, projection, head, norm."""
    found = list(decoder_linears(build(name)))
    assert len(found) == 2 * len(LINEARS[name])
    for block in (0, 1):
        mine = [n for n in found if f".{block}." in n]
        assert [n.split(f".{block}.")[1].removesuffix(".weight") for n in mine] == LINEARS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_decoder_linears(name):
    """Two-dimensional weights of the model itself, no vector, embedding or head among them."""
    model = build(name)
    parameters = dict(model.named_parameters())
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for n, weight in decoder_linears(model).items():
        assert parameters[n] is weight and weight.dim() == 2 and id(weight) not in outside


def test_a_model_without_decoder_linears_is_refused():
    """No blocks, blocks without a linear, quantised weights: an error, not an empty mask."""
    bytes_only = nn.ModuleList([nn.Linear(2, 2)])
    bytes_only[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    for model in (nn.Linear(2, 2), nn.ModuleList([nn.LayerNorm(2)]), nn.Sequential(bytes_only)):
        with pytest.raises(UserError, match="no decoder blocks"):
            decoder_linears(model)


# ------------------------------------------------------------------ the scores


@pytest.mark.parametrize("statistic", sensitivity.STATISTICS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt-neox", "gemma3"])
def test_fisher_is_brute_force_autograd(name, statistic):
    """Mean of per-sample squares, or square of the mean gradient, of every decoder linear."""
    model, losses = build(name), make_mask.text_losses(WINDOWS)
    rows = brute_force(model, losses)
    scores = fisher(model, losses, statistic=statistic)
    assert list(scores) == list(decoder_linears(model))
    for n, g in rows.items():
        want = g.square().mean(0) if statistic == "per-sample" else g.mean(0).square()
        assert scores[n].dtype == torch.float32
        torch.testing.assert_close(scores[n], want, rtol=1e-4, atol=1e-5 * float(want.max()))


def test_the_statistics_give_different_masks():
    """A mean of squares is not the square of a mean: gradients that cancel count in one only."""
    model = build("llama")
    g = gradients_like(model)
    losses = [planted(g), planted({n: -x for n, x in g.items()})]
    scores = fisher(model, losses)
    assert all(torch.allclose(scores[n], g[n].square()) for n in g)
    with pytest.raises(UserError, match="no gradient reaches"):
        fisher(model, losses, statistic="of-mean")


class Twice(nn.Module):
    """One block, whose linear is used twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(linear := nn.Linear(4, 4), nn.Tanh(), linear)])

    def forward(self, x):
        return self.layers[0](x)


def test_a_weight_used_twice_has_the_square_of_its_whole_gradient():
    """The hook sees the sum over uses, once: (g₁ + g₂)², not g₁² + g₂²."""
    model, x = Twice(), torch.randn(3, 4)
    losses = [lambda m: m(x).square().sum()]
    (name,) = decoder_linears(model)
    want = brute_force(model, losses)[name][0].square()
    torch.testing.assert_close(fisher(model, losses)[name], want)


def test_the_tasks_own_loss_can_be_the_source(folder):
    """task_losses is the training loss of train.py on one example, and has a Fisher of its own."""
    tokenizer, _ = loading.load_tokenizer(str(folder / "model"))
    model = loading.load_model(str(folder / "model"))
    examples = [
        tasks.Example("a red b ?", (" red", " blue"), 0),
        tasks.Example("c ?", (" a b", " c"), 1),
    ]
    for classification, score in ((True, "all"), (False, "right")):
        losses = make_mask.task_losses(tokenizer, examples, classification)
        for loss, example in zip(losses, examples, strict=True):
            batch = scoring.collate(tokenizer, [example], score=score)
            logits = model(**batch.inputs(model)).logits
            fn = scoring.classification_loss if classification else scoring.lm_loss
            torch.testing.assert_close(loss(model), fn(logits, batch))
        rows = brute_force(model, losses)
        for n, found in fisher(model, losses).items():
            want = rows[n].square().mean(0)
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.max()))


def test_squares_are_fp32_where_fp16_would_underflow():
    """At |g| ~ 1e-4 most fp16 squares are zero and rank nothing; ours rank as |g| does."""
    model = build("llama", torch.float16)
    g = {n: x.half() for n, x in gradients_like(model, 1e-4).items()}
    scores = fisher(model, [planted({n: x.float() for n, x in g.items()})])
    exact = {n: x.float().abs() for n, x in g.items()}
    assert all(torch.equal(scores[n], exact[n].square()) for n in g)
    in_half = {n: (x * x).float() for n, x in g.items()}
    zeros = torch.cat([x.flatten() == 0 for x in in_half.values()])
    assert zeros.double().mean() > 0.8
    mask = sensitive(scores, 0.1)
    assert equal(mask, sensitive(exact, 0.1))
    assert sensitivity.overlap(mask, sensitive(in_half, 0.1)) < 0.9


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    """NaN in one matrix's gradient names that matrix."""
    model = build("llama")
    g = gradients_like(model)
    name = "model.layers.1.mlp.up_proj.weight"
    g[name][3, 4] = math.nan
    with pytest.raises(UserError, match=name):
        fisher(model, [planted(g)])


def test_a_matrix_that_no_gradient_reaches_is_refused_by_name():
    """All-zero scores would make the mask the first k weights."""
    model = build("llama")
    g = gradients_like(model)
    name = "model.layers.0.self_attn.k_proj.weight"
    g[name] *= 0
    with pytest.raises(UserError, match=name):
        fisher(model, [planted(g)])
    with pytest.raises(UserError, match="no samples"):
        fisher(model, [])
    with pytest.raises(UserError, match="per-sample or of-mean"):
        fisher(model, [planted(g)], statistic="median")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    """Mode, requires_grad, gradients, hooks, forward and noise: as before, also after an error."""
    model = build("opt").train()  # OPT drops out a tenth in train mode
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    before = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    noise = torch.get_rng_state()
    losses = make_mask.text_losses(WINDOWS)
    if fails:
        with pytest.raises(ZeroDivisionError):
            fisher(model, [*losses, lambda model: 1 / 0])
    else:
        scores = fisher(model, losses)
    assert torch.equal(noise, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    for p, (requires_grad, grad, values) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == requires_grad and p.grad is grad and torch.equal(p, values)
        assert not p._post_accumulate_grad_hooks
    assert not any("forward" in vars(module) for module in model.modules())
    if not fails:
        want = fisher(model.eval(), losses)
        assert all(torch.equal(scores[n], want[n]) for n in want)


def test_blocks_are_computed_again_instead_of_kept():
    """Checkpointing is really on, in eval mode: each block's forward runs twice per sample."""
    model, calls = build("opt"), []
    handles = [
        block.fc1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        for block in sensitivity.decoder_blocks(model)
    ]
    fisher(model, make_mask.text_losses(WINDOWS[:1]))
    assert len(calls) == 2 * len(handles)


def test_groups_of_matrices_give_the_same_mask(monkeypatch):
    """Whatever the number of groups, the same index; scores of one group at a time."""
    model, losses, sizes = build("llama"), make_mask.text_losses(WINDOWS), []
    want = sensitive(fisher(model, losses), 0.05)
    original = sensitivity.fisher

    def spy(*args, **how):
        sizes.append(len(how["weights"]))
        return original(*args, **how)

    monkeypatch.setattr(sensitivity, "fisher", spy)
    for groups, parts in ((1, [14]), (3, [5, 5, 4]), (99, [1] * 14)):
        sizes.clear()
        assert equal(sensitive_index(model, losses, 0.05, groups=groups, device="cpu"), want)
        assert sizes == parts


# ------------------------------------------------------------------ the k highest


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.data())
def test_top_is_exactly_k_also_where_values_tie(values, data):
    """The k largest of a stable sort: equal values in the order in which they stand."""
    k = data.draw(st.integers(1, len(values)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32):
        tensor = torch.tensor(values, dtype=dtype)
        found = sensitivity.top(tensor, k)
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert found.tolist() == sorted(order[:k]) and found.dtype == torch.int32
        assert tensor.tolist() == values


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_kth_smallest_is_that_of_the_sorted_values(sign, dtype, device):
    """Of magnitudes, counted where they have 16 bits, and of negative ones; zeros, ties, tiny."""
    values = (torch.randn(1001) * 10.0 ** torch.randint(-9, 4, (1001,))).to(dtype).abs() * sign
    values = torch.cat([values, values[:300], torch.zeros(30, dtype=dtype)]).to(device)
    for k in (1, 2, 30, 31, 500, 1330, 1331):
        found = masks.kth_smallest(values.clone(), k)
        assert found.dtype == dtype and found.dim() == 0 and found.device == values.device
        assert found == values.sort().values[k - 1]
    zeros = -torch.zeros(5, dtype=dtype, device=device)
    assert masks.kth_smallest(zeros, 3) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 1.0))
def test_every_kind_has_the_same_k_per_matrix(rows, columns, density):
    """k = round(density · numel) of each matrix for sensitive, random, largest and smallest."""
    weights = {"a": torch.randn(rows, columns), "b": 100 * torch.randn(columns, 50)}
    try:
        k = sensitivity.how_many(weights, density)
    except UserError:
        assert not all(round(density * w.numel()) for w in weights.values())
        return
    scores = {name: w.square() for name, w in weights.items()}
    for index in (
        sensitive(scores, density),
        sensitivity.random_index(weights, density, 1),
        sensitivity.largest(weights, density),
        sensitivity.smallest(weights, density),
    ):
        assert {name: len(i) for name, i in index.items()} == k
        for name, i in index.items():
            assert k[name] == round(density * weights[name].numel())
            assert (i.diff() > 0).all() and 0 <= i[0] and i[-1] < weights[name].numel()


@pytest.mark.parametrize("numel", [1, 9, 1000, 4096 * 11008])
def test_a_density_that_takes_nothing_names_the_matrix_and_one_that_works(numel):
    """The smallest density given works, and little less does not."""
    weights = {"large": torch.empty(10**9, device="meta"), "w": torch.empty(numel, device="meta")}
    with pytest.raises(UserError, match="of w; the smallest that takes one .* is ") as error:
        sensitivity.how_many(weights, 0.49 / numel)
    works = float(str(error.value).split()[-1])
    assert sensitivity.how_many(weights, works)["w"] == 1 and works * numel < 0.53
    for bad in (0, -1, 1.1, math.nan):
        with pytest.raises(UserError, match="outside"):
            sensitivity.how_many(weights, bad)


def test_largest_and_smallest_rank_values_not_places():
    """Trap 6: an overlap with the true set at chance level is what negated indices give."""
    weights = {"w": torch.randn(50, 40, generator=torch.Generator().manual_seed(0))}
    order = weights["w"].flatten().abs().argsort()
    for kind, want in (("largest", order[-100:]), ("smallest", order[:100])):
        found = getattr(sensitivity, kind)(weights, 0.05)["w"]
        assert torch.equal(found.long(), want.sort().values)


def test_masks_sit_on_their_own_matrices():
    """Trap 11: what is planted in q, k and v is found in q, k and v."""
    model = build("opt")  # q, k and v have one shape, in another order than their names
    g = {n: 0.01 * x for n, x in gradients_like(model).items()}
    want = {}
    for stream, (name, x) in enumerate(g.items()):
        places = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(stream))[:10]
        x.view(-1)[places] = 1.0 + stream
        want[name] = places.sort().values.int()
    names = [f"model.decoder.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    index = sensitive(fisher(model, [planted(g)]), 10 / 1024)
    assert all(torch.equal(index[name], want[name]) for name in names)


def test_ranking_is_per_matrix():
    """A matrix with gradients a thousand times smaller still has its k weights: not global."""
    scores = {"small": 1e-6 * torch.rand(100), "large": torch.rand(100)}
    index = sensitive(scores, 0.1)
    assert len(index["small"]) == len(index["large"]) == 10


def test_the_random_mask_is_uniform_and_its_own():
    """Every place equally often; the same again from its seed; another for seed and matrix."""
    weights = {"a": torch.empty(20, 10), "b": torch.empty(20, 10)}
    counts = torch.zeros(2, 200)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for seed in range(1000):
        index = sensitivity.random_index(weights, 0.1, seed)
        for row, i in zip(counts, index.values(), strict=True):
            row[i.long()] += 1
    assert torch.equal(state, torch.get_rng_state())
    chi_square = ((counts - 100) ** 2 / (100 * 0.9)).sum(1)  # 199 degrees of freedom
    assert (abs(chi_square - 199) < 6 * (2 * 199) ** 0.5).all()
    first = sensitivity.random_index(weights, 0.1, 7)
    torch.manual_seed(1)
    assert equal(first, sensitivity.random_index(weights, 0.1, 7))
    assert not torch.equal(first["a"], first["b"])
    assert not equal(first, sensitivity.random_index(weights, 0.1, 8))


# ------------------------------------------------------------------ measurements


def test_concentration_and_coverage_of_a_known_answer():
    """Shares counted by hand; coverage weighs matrices by their gradient."""
    scores = {"a": torch.tensor([[6.0, 1], [2, 1]]), "b": torch.tensor([10.0, 10, 10, 60])}
    assert sensitivity.concentration(scores, 0.25) == {"a": 0.6, "b": pytest.approx(2 / 3)}
    assert sensitivity.concentration(scores, 1.0) == {"a": 1.0, "b": 1.0}
    index = {
        "a": torch.tensor([1, 2], dtype=torch.int32),
        "b": torch.tensor([0], dtype=torch.int32),
    }
    assert sensitivity.coverage(scores, index) == pytest.approx(13 / 100)


def test_no_mask_of_its_size_covers_a_gradient_better_than_its_own():
    """The sensitive mask is the argmax of ‖m ⊙ g‖² per matrix, [Q]'s definition; random has k/d."""
    model = build("llama")
    g = {n: x.square() for n, x in gradients_like(model).items()}
    weights = decoder_linears(model)
    own = sensitivity.coverage(g, sensitive(g, 0.1))
    random = [sensitivity.coverage(g, sensitivity.random_index(weights, 0.1, s)) for s in range(9)]
    assert abs(sum(random) / 9 - 0.1) < 0.01
    for index in (sensitivity.largest(weights, 0.1), sensitivity.smallest(weights, 0.1)):
        assert sensitivity.coverage(g, index) < own
    assert max(random) < own


def test_overlap_of_a_known_answer_and_of_chance():
    """|A ∩ B| / k: 1 with itself, 0 if disjoint, k/d for two random masks."""
    a = {"w": torch.tensor([0, 2, 5]), "v": torch.tensor([1])}
    b = {"w": torch.tensor([2, 3, 5]), "v": torch.tensor([0])}
    assert sensitivity.overlap(a, a) == 1 and sensitivity.overlap(a, b) == 0.5
    weights, density = {"w": torch.empty(300, 400)}, 0.1
    one, two = (sensitivity.random_index(weights, density, seed) for seed in (1, 2))
    k = len(one["w"])
    spread = (density * (1 - density) ** 2 / k) ** 0.5  # of a hypergeometric draw
    assert abs(sensitivity.overlap(one, two) - density) < 6 * spread


# ------------------------------------------------------------------ files


def load_mask(path, model):
    index, provenance = sensitivity.read_mask(path)
    weights = decoder_linears(model)
    sensitivity.check_mask(path, index, provenance, weights)
    for name, weight in weights.items():
        sensitivity.check_values(path, provenance, name, weight)
    return index, provenance


@pytest.fixture
def saved(tmp_path):
    """A model, a mask of it, and the file."""
    model = build("llama")
    weights = decoder_linears(model)
    index = sensitivity.random_index(weights, 0.05, 1)
    made = {"model": "some/llama", "matrices": sensitivity.signature(weights)}
    sensitivity.save_mask(tmp_path / "mask.safetensors", index, made)
    return model, index, tmp_path / "mask.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_file_comes_back_in_every_dtype(saved, dtype):
    """Indices and provenance as they were; a mask of fp32 weights fits the same in 16 bits."""
    model, index, path = saved
    found, made = load_mask(path, model.to(dtype))
    assert equal(found, index) and made["model"] == "some/llama"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_mask_can_be_checked_before_the_weights_exist(saved):
    """Names and shapes against a skeleton, values as they come: what a loader needs."""
    model, index, path = saved
    found, made = sensitivity.read_mask(path)
    weights = decoder_linears(model)
    meta = {name: w.to("meta") for name, w in weights.items()}
    sensitivity.check_mask(path, found, made, meta)
    for name, w in weights.items():
        sensitivity.check_values(path, made, name, w)
    with pytest.raises(UserError, match="holds other values"):
        sensitivity.check_values(path, made, name, w + 0.01)


@pytest.mark.parametrize("other", ["opt", "values", "shape"])
def test_a_mask_for_another_model_is_refused_and_says_for_which(saved, other):
    """Other names, other shapes, other weights: the error names the model the mask is for."""
    model, _, path = saved
    if other == "values":
        model = build("llama", seed=1)
    elif other == "shape":
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(32, 48))
    else:
        model = build("opt")
    with pytest.raises(UserError, match="was made for some/llama, not for this model") as error:
        load_mask(path, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    ["truncated", "garbage", "empty", "missing", "folder", "no metadata", "int64", "order"],
)
def test_a_file_that_is_no_mask_is_refused_in_one_line(saved, damage):
    """Truncated, garbage, missing, of another kind: one line that names the file."""
    model, index, path = saved
    made = {"provenance": json.dumps(sensitivity.read_mask(path)[1])}
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        path.write_bytes(b"not a mask at all, but longer than eight bytes")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    elif damage == "no metadata":
        save_file(index, path)
    elif damage == "int64":
        save_file({name: i.long() for name, i in index.items()}, path, made)
    elif damage == "order":
        save_file({name: i.flip(0) for name, i in index.items()}, path, made)
    with pytest.raises(UserError, match="mask.safetensors") as error:
        load_mask(path, model)
    assert "\n" not in str(error.value)


def test_an_index_beyond_its_matrix_is_refused(saved):
    """A position that the matrix does not have is an error, not a crash of a kernel."""
    model, index, path = saved
    name = next(iter(index))
    index[name][-1] = 1024
    sensitivity.save_mask(path, index, sensitivity.read_mask(path)[1])
    with pytest.raises(UserError, match=f"{name} has 1024 weights, no 1024"):
        load_mask(path, model)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    """A mask is replaced by a complete one or not at all, and nothing is left beside it."""
    model, index, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(snapshot.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sensitivity.save_mask(path, {n: i[:1] for n, i in index.items()}, {"model": "x"})
    with pytest.raises(OSError, match="cannot write /proc/none"):
        sensitivity.save_mask("/proc/none", index, {"model": "x"})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


# ------------------------------------------------------------------ text


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text, verbose):
        return {"input_ids": [ord(c) for c in text]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 99))
def test_windows_come_from_documents_long_enough(samples, length, seed):
    """Each window is a piece of one long document, every document before any comes twice."""
    texts = [chr(97 + i) * (length - 1) for i in range(5)]
    texts += [chr(65 + i) + chr(91 + i) * 12 * length for i in range(6)]
    windows = make_mask.text_windows(Letters(), texts, samples, length, seed)
    assert windows.shape == (samples, length)
    strings = ["".join(map(chr, w)) for w in windows.tolist()]
    assert all(any(w in text for text in texts[5:]) for w in strings)
    owners = [next(i for i, text in enumerate(texts) if w in text) for w in strings]
    assert len(set(owners)) == min(samples, 6)
    again = make_mask.text_windows(Letters(), texts, samples, length, seed)
    assert torch.equal(windows, again)


def test_short_documents_are_joined():
    """Where the long documents do not suffice, windows come from all of them in a row."""
    texts = ["abc", "defg", "hij", "klmnopqrst"]
    windows = make_mask.text_windows(Letters(), texts, 50, 8, 0)
    assert len({"".join(map(chr, w)) for w in windows.tolist()}) > 3
    with pytest.raises(UserError, match="has 20 tokens, less than one sample of --length 21"):
        make_mask.text_windows(Letters(), texts, 1, 21, 0)
    assert make_mask.text_windows(Letters(), texts, 2, 20, 0).shape == (2, 20)


def test_texts_of_every_form(tmp_path):
    """.txt is divided at blank lines, .jsonl has one {"text"} per line, U+2028 divides nothing."""
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert make_mask.read_texts(str(tmp_path / "a.txt")) == ["one\ntwo", "three\n"]
    rows = [{"text": "one\u2028two"}, {"text": "three", "url": "x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert make_mask.read_texts(str(tmp_path / "b.jsonl")) == ["one\u2028two", "three"]
    for line in ("{", "[]", '{"texts": ""}', '{"text": 3}'):
        (tmp_path / "c.jsonl").write_text(lines[1] + "\n" + line + "\n")
        with pytest.raises(UserError, match="c.jsonl:2 is not a line"):
            make_mask.read_texts(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        make_mask.read_texts(str(tmp_path / "d.txt"))


# ------------------------------------------------------------------ python masks.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random LLaMA with a word tokenizer, and a text."""
    path = tmp_path_factory.mktemp("model")
    write_model(path / "model")
    text = [" ".join(WORDS[(i * j) % 14] for j in range(9, 40)) for i in range(1, 30)]
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
    (path / "short.txt").write_text("a b c")
    return path


def command(folder, out, *flags):
    """`python masks.py` on the model in `folder`; of text, samples of 16 tokens."""
    length = ["--length=16"] * any(flag.startswith("--text") for flag in flags)
    make_mask.main([f"--model={folder}/model", f"--out={out}", "--density=0.01", *length, *flags])
    return sensitivity.read_mask(out)


def test_the_command_writes_the_mask_that_the_functions_compute(folder, tmp_path, capsys):
    """Text to file, end to end: the index is the brute-force one, the file says how it was made."""
    out = tmp_path / "mask.safetensors"
    flags = [f"--text={folder}/text.jsonl", "--samples=7", "--seed=3"]
    index, made = command(folder, out, *flags)
    chosen = sum(map(len, index.values()))
    assert capsys.readouterr().out == f"{out}: {chosen} weights of 14 matrices, sensitive\n"
    tokenizer, _ = loading.load_tokenizer(f"{folder}/model")
    texts = make_mask.read_texts(f"{folder}/text.jsonl")
    windows = make_mask.text_windows(tokenizer, texts, 7, 16, 3)
    model = loading.load_model(f"{folder}/model")
    rows = brute_force(model, make_mask.text_losses(windows))
    want = sensitive({n: g.square().mean(0) for n, g in rows.items()}, 0.01)
    assert sensitivity.overlap(index, want) > 0.99
    facts = {"kind": "sensitive", "statistic": "per-sample", "samples": 7, "length": 16, "seed": 3}
    facts |= {"density": 0.01, "dtype": "float32", "torch": torch.__version__}
    assert made.items() >= facts.items()
    assert made["source"] == f"{folder}/text.jsonl" and made["model"] == f"{folder}/model"
    assert equal(load_mask(out, model)[0], index)
    again, _ = command(folder, tmp_path / "b", *flags, "--groups=4", "--scores-device=cpu")
    assert equal(index, again)
    assert not equal(index, command(folder, tmp_path / "c", *flags, "--statistic=of-mean")[0])


def test_the_other_kinds_need_no_text(folder, tmp_path):
    """random, largest and smallest are what the functions give, and carry their kind."""
    weights = decoder_linears(loading.load_model(f"{folder}/model"))
    for kind in ("random", "largest", "smallest"):
        function = getattr(sensitivity, "random_index" if kind == "random" else kind)
        index, made = command(folder, tmp_path / kind, f"--kind={kind}", "--dtype=float32")
        assert made["kind"] == kind and equal(index, function(weights, 0.01))


def test_the_offline_default_makes_masks_of_text_and_of_a_task(tmp_path):
    """Without a model the tiny one, its text or its tasks: nothing to download."""
    found = []
    for flags in (
        ["--length=64"],
        ["--task=copa"],
        ["--text", str(ROOT / "tiny/data/other.jsonl")],
    ):
        out = tmp_path / f"mask{len(found)}.safetensors"
        make_mask.main([f"--out={out}", "--density=0.01", "--samples=8", *flags])
        index, made = sensitivity.read_mask(out)
        found.append(index)
        assert len(index) == 21 and made["samples"] == 8
    assert not equal(found[0], found[1]) and not equal(found[0], found[2])


def test_real_weights_and_real_text(shared, tmp_path):
    """A real small LLaMA on real C4: its mask covers its own gradient far above chance."""
    model, text = shared / "models/tinystories656k", shared / "data/text/c4_sample.jsonl"
    out = tmp_path / "mask.safetensors"
    flags = ["--samples=6", "--length=128", "--density=0.001"]
    make_mask.main([f"--model={model}", f"--text={text}", f"--out={out}", *flags])
    loaded = loading.load_model(str(model))
    index, _ = load_mask(out, loaded)
    tokenizer, _ = loading.load_tokenizer(str(model))
    texts = make_mask.read_texts(str(shared / "data/text/tinystories_sample.txt"))
    windows = make_mask.text_windows(tokenizer, texts, 6, 128, 0)
    other = fisher(loaded, make_mask.text_losses(windows), statistic="of-mean")
    assert sensitivity.coverage(other, index) > 5 * 0.001


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text=nowhere.txt"], "a .txt or .jsonl file that exists"),
        (["--text="], "a .txt or .jsonl file that exists"),
        (["--text={folder}/short.txt"], "4 tokens, less than one sample of --length 16"),
        (["--text={folder}/model/config.json"], "a .txt or .jsonl file that exists"),
        (
            ["--text={folder}/text.jsonl", "--density=0.0001"],
            "the smallest that takes one of every",
        ),
        (["--text={folder}/text.jsonl", "--density=2"], "outside (0, 1]"),
        (["--text={folder}/text.jsonl", "--samples=0"], "--samples 0: at least 1"),
        (["--text={folder}/text.jsonl", "--length=1"], "--length 1: at least 2"),
        (["--text={folder}/text.jsonl", "--groups=0"], "--groups 0: at least 1"),
        (["--text={folder}/text.jsonl", "--density=0"], "--density 0.0: outside (0, 1]"),
        (["--text={folder}/text.jsonl", "--task=rte"], "give one of --text, --task"),
        (["--text={folder}/text.jsonl", "--kind=random"], "give one of --text, --task"),
        (["--task=rte", "--train-file=x.jsonl"], "give one of --text, --task"),
        (["--train-file=nowhere.jsonl"], "nowhere.jsonl"),
        (["--task=rte", "--length=16"], "a task has no use for --length"),
        (["--text={folder}/text.jsonl", "--max-length=9"], "text has no use for --max-length"),
        (["--kind=largest", "--groups=2"], "--kind largest has no use for --groups"),
        (["--kind=random", "--data-dir=/none"], "the folder of a task; give --task"),
        (["--text={folder}/text.jsonl", "--device=tpu"], "--device tpu"),
        (["--text={folder}/text.jsonl", "--scores-device=tpu"], "--scores-device tpu"),
        (["--task=ret"], "did you mean rte?"),
        (["--task=rte", "--data-dir=nowhere"], "nowhere"),
        (["--text={folder}/text.jsonl", "--out={folder}/no/where"], "a folder that can be written"),
        (["--text={folder}/text.jsonl", "--out={folder}"], "a folder that can be written"),
        (["--text={folder}/text.jsonl", "--out={folder}/text.jsonl"], "text.jsonl: a new file"),
        (["--text={folder}/text.jsonl", "--model={folder}"], "without config.json"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, capsys, flags, message
):
    """Exit code 2, one line that says what to do, no model loaded, nothing written."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    out = tmp_path / "mask.safetensors"
    with pytest.raises(SystemExit) as stopped:
        command(folder, out, *[flag.format(folder=folder) for flag in flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith("masks.py: error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_without_a_network_c4_is_an_error_that_says_so(folder, tmp_path, monkeypatch, capsys):
    """The default text comes from the hub; where that fails, --text is the way."""
    import datasets

    def offline(*args, **how):
        assert how["revision"] == make_mask.C4_COMMIT and how["streaming"]
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SystemExit):
        command(folder, tmp_path / "mask")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give --text FILE" in error


def test_the_file_holds_int32_and_nothing_else(folder, tmp_path):
    """Any reader of safetensors can use the mask: one sorted int32 tensor per matrix."""
    out = tmp_path / "mask"
    command(folder, out, "--kind=random")
    assert all(i.dtype == torch.int32 and i.dim() == 1 for i in load_file(out).values())
