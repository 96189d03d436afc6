"""masks.py: masks, scores and files against sorting, counting, autograd and the papers."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, build, needs_gpu
from torch import _inductor, nn

import masks
import tasks
import zo

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
    weights = masks.decoder_linears(model)
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
    linears = masks.decoder_linears(model).items()
    return {n: scale * torch.randn(w.shape, generator=generator) for n, w in linears}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ [S]: Algorithm 3


def weight(n=1000, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(rule, w, stream=0):
    return rule.mask(w, torch.arange(w.numel(), dtype=torch.int32), rule.prepare(w, stream))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.floats(1e-4, 1.0), st.integers(0, 99))
def test_the_threshold_lets_exactly_k_weights_move(n, density, seed):
    """|w| ≤ h holds for k = round(density · n) of n distinct weights, the k smallest."""
    w, k = weight(n, seed), max(1, round(density * n))
    mask = masks.get_mask(w, masks.threshold(w, density))
    smallest = w.abs().argsort()[:k]
    assert mask.sum() == k and mask[smallest].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_threshold_is_the_kth_smallest_magnitude(dtype):
    """h is torch.kthvalue's answer, in the weight's dtype; the weight is not written."""
    w = weight(5000, 1, dtype).view(50, 100)
    before = w.clone()
    for density in (0.0001, 0.001, 0.25, 0.9999):
        h, k = masks.threshold(w, density), max(1, round(density * 5000))
        assert h.dtype == dtype and h.dim() == 0
        assert h == w.abs().flatten().kthvalue(k).values
    assert torch.equal(w, before)


@pytest.mark.parametrize("rule", [masks.SmallWeights(1.0), masks.MagnitudeGroup(0.25, 0.75)])
def test_what_has_no_upper_bound_does_not_freeze(rule):
    """All weights, or the largest quarter, still move when they grow beyond the largest of θ_0."""
    w = weight(1000)
    state, element = rule.prepare(w, 0), torch.arange(1000, dtype=torch.int32)
    before = rule.mask(w, element, state)
    assert before.sum() == round(1000 * rule.density)
    assert rule.mask(w * 9, element, state)[before].all()


def test_thresholds_of_more_than_2_to_the_24_elements():
    """torch.quantile refuses such tensors, `threshold` does not."""
    w = torch.zeros(2**24 + 8, dtype=torch.float16)
    w[: 2**23] = 1
    assert masks.threshold(w, 0.25) == 0 and masks.threshold(w, 0.75) == 1


def test_get_mask_is_algorithm_3_with_the_absolute_value():
    """Density 0.25 selects 25 %; the printed θ ≤ h would select 62.5 %."""
    w = weight(100_000)
    h = masks.threshold(w, 0.25)
    assert masks.get_mask(w, h).double().mean() == 0.25
    assert (w <= h).double().mean() == pytest.approx(0.625, abs=0.01)


def test_small_weights_move_not_large_ones():
    """Density 0.25 is [S]'s sparsity 0.75: the smallest quarter, by value and not by index."""
    w = torch.tensor([0.1, -3.0, 2.0, -0.2, 5.0, 0.3, -4.0, 6.0])
    assert mask_of(masks.SmallWeights(0.25), w).tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def test_groups_by_magnitude_share_out_the_weights():
    """Four groups of a quarter have a quarter each, none twice, and the first is S-MeZO's."""
    weight = torch.randn(64, 50)
    groups = [masks.SmallWeights(0.25)]
    groups += [masks.MagnitudeGroup(0.25, above) for above in (0.25, 0.5, 0.75)]
    taken = [rule.mask(weight, None, rule.prepare(weight, 0)) for rule in groups]
    assert [int(mask.sum()) for mask in taken] == [800] * 4
    assert torch.equal(sum(mask.int() for mask in taken), torch.ones(64, 50, dtype=torch.int))
    for smaller, larger in itertools.pairwise(taken):
        assert weight[smaller].abs().max() <= weight[larger].abs().min()
    with pytest.raises(ValueError, match="above 0.8: more than 0, and with density 0.25 at most 1"):
        masks.MagnitudeGroup(0.25, 0.8)
    masks.MagnitudeGroup(0.9, 0.1)  # 1 − 0.9 is below 0.1


def test_a_weight_that_is_not_finite_is_refused():
    """NaN or infinity in a weight is an error, not a threshold."""
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            masks.threshold(torch.tensor([1.0, bad]), 0.5)


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan")])
def test_density_outside_its_range_is_refused(density):
    """A density is in (0, 1]."""
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        masks.SmallWeights(density)


def test_the_dynamic_mask_follows_the_weights_and_the_constant_one_does_not():
    """[S] §3.2: dynamic is re-taken with h fixed, constant stays that of before training."""
    w, index = weight(), torch.arange(1000)
    dynamic, constant = masks.SmallWeights(0.3), masks.ConstantMask(0.3)
    kept = [rule.prepare(w, 0) for rule in (dynamic, constant)]
    at_start = dynamic.mask(w, index, kept[0])
    assert torch.equal(at_start, constant.mask(w, index, kept[1]))
    w += 10  # everything walks out of the band
    assert not dynamic.mask(w, index, kept[0]).any()
    assert torch.equal(constant.mask(w, index, kept[1]), at_start)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.floats(0.01, 1.0), st.data())
def test_packed_bits_are_the_constant_mask(n, density, data):
    """[S] §3.3's 1-bit mask answers like the booleans, at any index, in an eighth of the room."""
    w = weight(n, 3)
    constant, packed = masks.ConstantMask(density), masks.PackedMask(density)
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    bits = packed.prepare(w, 0)
    assert bits.dtype == torch.uint8 and bits.numel() == (n + 7) // 8
    want = constant.mask(w[index], index, constant.prepare(w, 0))
    assert torch.equal(packed.mask(w[index], index, bits), want)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 0.99])
def test_the_random_mask_has_the_density_asked_for(density):
    """The share inside is right to 6 σ: a uniform word is compared, not a normal draw."""
    n = 400_000
    found = mask_of(masks.RandomMask(density), torch.zeros(n)).double().mean()
    assert abs(found - density) < 6 * (density * (1 - density) / n) ** 0.5


def test_the_random_mask_is_regenerated_and_its_own():
    """Any part of it is as in the whole; other seeds, other tensors and the noise are unrelated."""
    w, n = torch.zeros(100_000), 100_000
    first = mask_of(masks.RandomMask(0.5, seed=1), w, stream=4)
    rule, element = masks.RandomMask(0.5, seed=1), torch.arange(500, 900, dtype=torch.int32)
    assert torch.equal(rule.mask(w[500:900], element, rule.prepare(w, 4)), first[500:900])
    for other in (mask_of(rule, w, 5), mask_of(masks.RandomMask(0.5, seed=2), w, 4)):
        agree = (first == other).double().mean()
        assert abs(agree - 0.5) < 6 * 0.5 / n**0.5
    for seed in (0, zo.step_seed(1, 4), zo.step_seed(1, zo.MAX_STEP - 1)):
        z = zo.gaussian(seed, 4, (n,))
        assert abs(z[first].mean()) < 6 / first.sum() ** 0.5


@pytest.mark.parametrize(
    "kind", [masks.SmallWeights, masks.ConstantMask, masks.PackedMask, masks.RandomMask]
)
def test_compiled_masks_are_the_rules_own(kind, monkeypatch):
    """The fused loop moves what the rule says, and one loop serves all tensors and rules."""
    monkeypatch.setattr(zo, "_fused", functools.cache(zo._fused.__wrapped__))
    if kind in (masks.SmallWeights, masks.RandomMask):  # other tests compile these, for ten seconds
        monkeypatch.setattr(_inductor, "compile", lambda graph, *_: graph)
    for seed, n in enumerate((1003, 46, 4100)):
        w, rule = weight(n, seed), kind(0.1 + 0.3 * seed)
        rule.seed = (1 << 31) - 1 - seed
        state, element = rule.prepare(w, seed), torch.arange(n, dtype=torch.int32)
        moved, mask = w.clone(), rule.mask(w, element, state)
        where = zo.Halves(moved), zo.Shift.of(1.0, 7 + seed), zo.word(seed), rule.mask, state
        zo.apply(*where, fused=True)
        assert torch.equal(moved != w, mask) and 0 < mask.sum() < n
    assert zo._fused.cache_info().currsize == 1


# ------------------------------------------------------------------ which matrices


@pytest.mark.parametrize("name", LINEARS)
def test_the_decoder_linears_are_those_of_the_paper(name):
    """Exactly the blocks' matrices, in the model's order: no embedding, projection, head, norm."""
    found = list(masks.decoder_linears(build(name)))
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
    for n, weight in masks.decoder_linears(model).items():
        assert parameters[n] is weight and weight.dim() == 2 and id(weight) not in outside


def test_a_model_without_decoder_linears_is_refused():
    """No blocks, blocks without a linear, quantised weights: an error, not an empty mask."""
    bytes_only = nn.ModuleList([nn.Linear(2, 2)])
    bytes_only[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    for model in (nn.Linear(2, 2), nn.ModuleList([nn.LayerNorm(2)]), nn.Sequential(bytes_only)):
        with pytest.raises(ValueError, match="no decoder blocks"):
            masks.decoder_linears(model)


# ------------------------------------------------------------------ the scores


@pytest.mark.parametrize("statistic", ["per-sample", "of-mean"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt-neox", "gemma3"])
def test_fisher_is_brute_force_autograd(name, statistic):
    """Mean of per-sample squares, or square of the mean gradient, of every decoder linear."""
    model, losses = build(name), tasks.text_losses(WINDOWS)
    rows = brute_force(model, losses)
    scores = masks.fisher(model, losses, statistic=statistic)
    assert list(scores) == list(masks.decoder_linears(model))
    for n, g in rows.items():
        want = g.square().mean(0) if statistic == "per-sample" else g.mean(0).square()
        assert scores[n].dtype == torch.float32
        torch.testing.assert_close(scores[n], want, rtol=1e-4, atol=1e-5 * float(want.max()))


def test_the_statistics_give_different_masks():
    """A mean of squares is not the square of a mean: gradients that cancel count in one only."""
    model = build("llama")
    g = gradients_like(model)
    losses = [planted(g), planted({n: -x for n, x in g.items()})]
    scores = masks.fisher(model, losses)
    assert all(torch.allclose(scores[n], g[n].square()) for n in g)
    with pytest.raises(ValueError, match="no gradient reaches"):
        masks.sensitive_index(model, losses, 0.05, statistic="of-mean")


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
    (name,) = masks.decoder_linears(model)
    want = brute_force(model, losses)[name][0].square()
    torch.testing.assert_close(masks.fisher(model, losses)[name], want)


def test_squares_are_fp32_where_fp16_would_underflow():
    """At |g| ~ 1e-4 most fp16 squares are zero and rank nothing; ours rank as |g| does."""
    model = build("llama", torch.float16)
    g = {n: x.half() for n, x in gradients_like(model, 1e-4).items()}
    scores = masks.fisher(model, [planted({n: x.float() for n, x in g.items()})])
    exact = {n: x.float().abs() for n, x in g.items()}
    assert all(torch.equal(scores[n], exact[n].square()) for n in g)
    in_half = {n: (x * x).float() for n, x in g.items()}
    zeros = torch.cat([x.flatten() == 0 for x in in_half.values()])
    assert zeros.double().mean() > 0.8
    mask = masks.sensitive(scores, 0.1)
    assert equal(mask, masks.sensitive(exact, 0.1))
    assert masks.overlap(mask, masks.sensitive(in_half, 0.1)) < 0.9


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    """NaN in one matrix's gradient names that matrix; a loss may have none at all."""
    model = build("llama")
    g = gradients_like(model)
    name = "model.layers.1.mlp.up_proj.weight"
    g[name][3, 4] = math.nan
    with pytest.raises(ValueError, match=name):
        masks.fisher(model, [planted(g)])
    with pytest.raises(ValueError, match="no gradient"):
        masks.fisher(model, [lambda model: 0.5])


def test_a_matrix_that_no_gradient_reaches_is_left_out():
    """All-zero scores would make the mask the first k weights; if all are zero, there is none."""
    model = build("llama")
    g = gradients_like(model)
    name = "model.layers.0.self_attn.k_proj.weight"
    g[name] *= 0
    index = masks.sensitive_index(model, [planted(g)], 0.05)
    assert set(masks.decoder_linears(model)) - set(index) == {name}
    with pytest.raises(ValueError, match="no gradient reaches"):
        masks.sensitive_index(model, [], 0.05)
    with pytest.raises(ValueError, match="per-sample or of-mean"):
        masks.fisher(model, [planted(g)], statistic="median")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    """Mode, requires_grad, gradients, hooks, forward and noise: as before, also after an error."""
    model = build("opt").train()  # OPT drops out a tenth in train mode
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    linear = next(iter(masks.decoder_linears(model).values()))
    linear.grad = torch.ones_like(linear)  # of what the user did before
    before = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    noise = torch.get_rng_state()
    losses = tasks.text_losses(WINDOWS)
    if fails:
        with pytest.raises(ZeroDivisionError):
            masks.fisher(model, [*losses, lambda model: 1 / 0])
    else:
        scores = masks.fisher(model, losses)
    assert torch.equal(noise, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    for p, (requires_grad, grad, values) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == requires_grad and p.grad is grad and torch.equal(p, values)
        assert not p._post_accumulate_grad_hooks
    assert not any("forward" in vars(module) for module in model.modules())
    if not fails:
        model.zero_grad(set_to_none=True)
        want = masks.fisher(model.eval(), losses)
        assert all(torch.equal(scores[n], want[n]) for n in want)


def test_blocks_are_computed_again_instead_of_kept():
    """Checkpointing is really on, in eval mode: each block's forward runs twice per sample."""
    model, calls = build("opt"), []
    handles = [
        block.fc1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        for block in masks.decoder_blocks(model)
    ]
    masks.fisher(model, tasks.text_losses(WINDOWS[:1]))
    assert len(calls) == 2 * len(handles)


def test_groups_of_matrices_give_the_same_mask(monkeypatch):
    """Whatever the number of groups, the same index; scores of one group at a time."""
    model, losses, sizes = build("llama"), tasks.text_losses(WINDOWS), []
    scores = masks.fisher(model, losses)
    few = 0.4 / min(score.numel() for score in scores.values())  # none of some groups
    original = masks.fisher

    def spy(*args, **how):
        sizes.append(len(how["weights"]))
        return original(*args, **how)

    monkeypatch.setattr(masks, "fisher", spy)
    for groups, parts in ((1, [14]), (3, [5, 5, 4]), (99, [1] * 14)):
        for density in (0.05, few):
            sizes.clear()
            want = masks.sensitive(scores, density)
            assert equal(masks.sensitive_index(model, losses, density, groups=groups), want)
            assert sizes == parts
    assert 0 < len(want) < 14


# ------------------------------------------------------------------ the k highest


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.data())
def test_top_is_exactly_k_also_where_values_tie(values, data):
    """The k largest of a stable sort: equal values in the order in which they stand."""
    k = data.draw(st.integers(1, len(values)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32):
        tensor = torch.tensor(values, dtype=dtype)
        found = masks.top(tensor, k)
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert found.tolist() == sorted(order[:k]) and found.dtype == torch.int32
        assert tensor.tolist() == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_kth_smallest_is_that_of_the_sorted_values(sign, dtype, device="cpu"):
    """Of magnitudes, counted where they have 16 bits, and of negative ones; zeros, ties, tiny."""
    values = (torch.randn(1001) * 10.0 ** torch.randint(-9, 4, (1001,))).to(dtype).abs() * sign
    values = torch.cat([values, values[:300], torch.zeros(30, dtype=dtype)]).to(device)
    for k in (1, 2, 30, 31, 500, 1330, 1331):
        found = masks.kth_smallest(values.clone(), k)
        assert found.dtype == dtype and found.dim() == 0 and found.device == values.device
        assert found == values.sort().values[k - 1]
    both = torch.cat([values[:700], -values[700:]])
    words = both.float().view(torch.int32)
    for some in (both, words):
        assert masks.kth_smallest(some, 600) == some.sort().values[599]
    zeros = -torch.zeros(5, dtype=dtype, device=device)
    assert masks.kth_smallest(zeros, 3) == 0


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_kth_smallest_on_a_gpu(sign, dtype):
    """It is that of the sorted values there, too."""
    test_the_kth_smallest_is_that_of_the_sorted_values(sign, dtype, "cuda")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 1.0))
def test_every_kind_has_the_same_k_per_matrix(rows, columns, density):
    """k = round(density · numel) of each matrix for sensitive, random, largest and smallest."""
    weights = {"a": torch.randn(rows, columns), "b": 100 * torch.randn(columns, 50)}
    try:
        k = masks.how_many(weights, density)
    except ValueError:
        assert not any(round(density * w.numel()) for w in weights.values())
        return
    assert k == {name: n for name, w in weights.items() if (n := round(density * w.numel()))}
    scores = {name: w.square() for name, w in weights.items()}
    for index in (
        masks.sensitive(scores, density),
        masks.random_index(weights, density, 1),
        masks.largest(weights, density),
        masks.smallest(weights, density),
    ):
        assert {name: len(i) for name, i in index.items()} == k
        for name, i in index.items():
            assert k[name] == round(density * weights[name].numel())
            assert (i.diff() > 0).all() and 0 <= i[0] and i[-1] < weights[name].numel()


@pytest.mark.parametrize("numel", [1, 9, 1000, 4096 * 11008])
def test_a_density_that_takes_nothing_names_the_matrix_and_one_that_works(numel):
    """The smallest density given works, and little less does not."""
    weights = {"w": torch.empty(numel, device="meta"), "small": torch.empty(1, device="meta")}
    with pytest.raises(ValueError, match="nothing moves; give .* or more") as error:
        masks.how_many(weights, 0.49 / numel)
    works = float(str(error.value).split("give ")[1].split()[0])
    assert masks.how_many(weights, works)["w"] == 1 and works * numel <= 1.5


def test_largest_and_smallest_rank_values_not_places():
    """The largest and the smallest are those of sorted magnitudes."""
    weights = {"w": torch.randn(50, 40, generator=torch.Generator().manual_seed(0))}
    order = weights["w"].flatten().abs().argsort()
    for kind, want in (("largest", order[-100:]), ("smallest", order[:100])):
        found = getattr(masks, kind)(weights, 0.05)["w"]
        assert torch.equal(found.long(), want.sort().values)


def test_masks_sit_on_their_own_matrices():
    """What is planted in q, k and v is found in q, k and v."""
    model = build("opt")  # q, k and v have one shape, in another order than their names
    g = {n: 0.01 * x for n, x in gradients_like(model).items()}
    want = {}
    for stream, (name, x) in enumerate(g.items()):
        places = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(stream))[:10]
        x.view(-1)[places] = 1.0 + stream
        want[name] = places.sort().values.int()
    names = [f"model.decoder.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    index = masks.sensitive(masks.fisher(model, [planted(g)]), 10 / 1024)
    assert all(torch.equal(index[name], want[name]) for name in names)


def test_ranking_is_per_matrix():
    """A matrix with gradients a thousand times smaller still has its k weights: not global."""
    scores = {"small": 1e-6 * torch.rand(100), "large": torch.rand(100)}
    index = masks.sensitive(scores, 0.1)
    assert len(index["small"]) == len(index["large"]) == 10


def test_the_random_mask_is_uniform_and_its_own():
    """Every place equally often; the same again from its seed; another for seed and matrix."""
    weights = {"a": torch.empty(20, 10), "b": torch.empty(20, 10)}
    counts = torch.zeros(2, 200)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for seed in range(1000):
        index = masks.random_index(weights, 0.1, seed)
        for row, i in zip(counts, index.values(), strict=True):
            row[i.long()] += 1
    assert torch.equal(state, torch.get_rng_state())
    chi_square = ((counts - 100) ** 2 / (100 * 0.9)).sum(1)  # 199 degrees of freedom
    assert (abs(chi_square - 199) < 6 * (2 * 199) ** 0.5).all()
    first = masks.random_index(weights, 0.1, 7)
    torch.manual_seed(1)
    assert equal(first, masks.random_index(weights, 0.1, 7))
    assert not torch.equal(first["a"], first["b"])
    assert not equal(first, masks.random_index(weights, 0.1, 8))


# ------------------------------------------------------------------ measurements


def test_concentration_and_coverage_of_a_known_answer():
    """Shares counted by hand; coverage weighs matrices by their gradient."""
    scores = {"a": torch.tensor([[6.0, 1], [2, 1]]), "b": torch.tensor([10.0, 10, 10, 60])}
    assert masks.concentration(scores, 0.25) == {"a": 0.6, "b": pytest.approx(2 / 3)}
    assert masks.concentration(scores, 1.0) == {"a": 1.0, "b": 1.0}
    index = {
        "a": torch.tensor([1, 2], dtype=torch.int32),
        "b": torch.tensor([0], dtype=torch.int32),
    }
    assert masks.coverage(scores, index) == pytest.approx(13 / 100)


def test_no_mask_of_its_size_covers_a_gradient_better_than_its_own():
    """The sensitive mask is the argmax of ‖m ⊙ g‖² per matrix, [Q]'s definition; random has k/d."""
    model = build("llama")
    g = {n: x.square() for n, x in gradients_like(model).items()}
    weights = masks.decoder_linears(model)
    own = masks.coverage(g, masks.sensitive(g, 0.1))
    random = [masks.coverage(g, masks.random_index(weights, 0.1, s)) for s in range(9)]
    assert abs(sum(random) / 9 - 0.1) < 0.01
    for index in (masks.largest(weights, 0.1), masks.smallest(weights, 0.1)):
        assert masks.coverage(g, index) < own
    assert max(random) < own


def test_overlap_of_a_known_answer_and_of_chance():
    """|A ∩ B| / k: 1 with itself, 0 if disjoint, k/d for two random masks."""
    a = {"w": torch.tensor([0, 2, 5]), "v": torch.tensor([1])}
    b = {"w": torch.tensor([2, 3, 5]), "v": torch.tensor([0])}
    assert masks.overlap(a, a) == 1 and masks.overlap(a, b) == 0.5
    weights, density = {"w": torch.empty(300, 400)}, 0.1
    one, two = (masks.random_index(weights, density, seed) for seed in (1, 2))
    k = len(one["w"])
    spread = (density * (1 - density) ** 2 / k) ** 0.5  # of a hypergeometric draw
    assert abs(masks.overlap(one, two) - density) < 6 * spread


@pytest.mark.parametrize(
    "places",
    [
        torch.tensor([[1, 2]]),
        torch.tensor([1.0]),
        torch.ones(9, dtype=torch.bool),
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([-1, 2]),
        torch.tensor([2, 9]),
        torch.tensor([2, 2]),
        torch.tensor([3, 2]),
    ],
)
def test_places_that_a_matrix_does_not_have_are_refused(places):
    """An index has one dimension, is of int, ascends, and stays inside its matrix."""
    with pytest.raises(ValueError, match="w: an index is"):
        masks.check_places(places, 9, "w")
    masks.check_places(torch.tensor([0, 8]), 9, "w")
