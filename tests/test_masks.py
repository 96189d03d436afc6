"""masks.py: thresholds and masks against sorting, counting and the papers' definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import masks
import zo
from errors import UserError
from sweep import Sweep


def weight(n=1000, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(rule, w, stream=0):
    return rule.mask(w, torch.arange(w.numel()), rule.prepare(w, stream))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.floats(1e-4, 1.0), st.integers(0, 99))
def test_the_threshold_lets_exactly_k_weights_move(n, density, seed):
    """|w| ≤ h holds for k = round(density · n) of n distinct weights, the k smallest."""
    w, k = weight(n, seed), max(1, round(density * n))
    mask = masks.get_mask(w, masks.threshold(w, density))
    smallest = w.abs().argsort()[:k]
    assert mask.sum() == k and mask[smallest].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("density", [0.001, 0.25, 1.0])
def test_the_threshold_is_the_kth_smallest_magnitude(dtype, density):
    """h is torch.kthvalue's answer, in the weight's dtype; the weight is not written."""
    w = weight(5000, 1, dtype).view(50, 100)
    before, k = w.clone(), max(1, round(density * 5000))
    h = masks.threshold(w, density)
    assert h.dtype == dtype and h.dim() == 0
    assert h == w.abs().flatten().kthvalue(k).values
    assert torch.equal(w, before)


def test_thresholds_of_more_than_2_to_the_24_elements():
    """Trap 15: torch.quantile refuses such tensors, `threshold` does not."""
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


def test_a_weight_that_is_not_finite_is_refused():
    """NaN or infinity in a weight is an error, not a threshold."""
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="NaN or infinity"):
            masks.threshold(torch.tensor([1.0, bad]), 0.5)


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan")])
def test_density_outside_its_range_is_refused(density):
    """A density is in (0, 1]."""
    with pytest.raises(UserError, match="outside"):
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
    """Trap 7: ZO-LLM compares a normal draw with the ratio, and 0.5 becomes 0.69."""
    n = 400_000
    found = mask_of(masks.RandomMask(density), torch.zeros(n)).double().mean()
    assert abs(found - density) < 6 * (density * (1 - density) / n) ** 0.5


def test_the_random_mask_is_regenerated_and_its_own():
    """Same seed and tensor: the same mask, chunk by chunk. Others, and the noise: independent."""
    w, n = torch.zeros(100_000), 100_000
    first = mask_of(masks.RandomMask(0.5, seed=1), w, stream=4)
    rule, index = masks.RandomMask(0.5, seed=1), torch.arange(500, 900)
    assert torch.equal(rule.mask(w[500:900], index, rule.prepare(w, 4)), first[500:900])
    for other in (mask_of(rule, w, 5), mask_of(masks.RandomMask(0.5, seed=2), w, 4)):
        agree = (first == other).double().mean()
        assert abs(agree - 0.5) < 6 * 0.5 / n**0.5
    z = zo.gaussian(zo.step_seed(0, 1), 4, (n,))
    assert abs(z[first].mean()) < 6 / first.sum() ** 0.5


@pytest.mark.parametrize(
    "rule",
    [
        masks.Everything(),
        masks.SmallWeights(0.3),
        masks.ConstantMask(0.3),
        masks.PackedMask(0.3),
        masks.RandomMask(0.3),
    ],
)
def test_every_rule_compiles_into_the_kernel(rule):
    """The fused kernel moves exactly what the rule's mask says, for every rule."""
    w, kernel = weight(4099), Sweep(compiled=True)
    state, numbers = rule.prepare(w, 3), [torch.tensor(n) for n in (zo.step_seed(1, 2), 3)]
    outs = [torch.empty(4099), torch.empty(4099)]
    kernel(outs, [torch.tensor(1.0), torch.tensor(-1.0)], w, *numbers, rule.mask, state)
    assert kernel.compiled
    mask = rule.mask(w, torch.arange(4099), state)
    for out in outs:
        assert torch.equal(out != w, mask)


def test_one_compilation_serves_every_density_seed_and_run():
    """A new rule of a known kind does not compile again; past eight, dynamo would go eager."""
    w, numbers = weight(4099), [torch.tensor(n) for n in (zo.step_seed(1, 2), 3)]
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(12):
        rule, kernel, out = (
            masks.RandomMask(0.1 + 0.05 * seed, seed),
            Sweep(True),
            torch.empty(4099),
        )
        state = rule.prepare(w, seed)
        kernel([out], [torch.tensor(1.0)], w, *numbers, rule.mask, state)
        assert kernel.compiled
        assert torch.equal(out != w, rule.mask(w, torch.arange(4099), state))
    # one for whole blocks and one for the three elements that are left
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


def test_everything_is_everything():
    """MeZO's mask is all ones."""
    assert mask_of(masks.Everything(), weight()).all()


def test_active_count_counts_over_chunks():
    """The count over chunks is the count of the whole mask, whatever the rule."""
    w = weight((1 << 22) + 5)
    for rule in (masks.SmallWeights(0.3), masks.PackedMask(0.3), masks.Everything()):
        state = rule.prepare(w, 2)
        whole = rule.mask(w, torch.arange(w.numel()), state).sum()
        assert masks.active_count(rule, w, state) == whole


def test_methods_by_name():
    """Each method of the command line is the rule that the paper describes."""
    rules = {
        ("mezo", "dynamic"): masks.Everything,
        ("s-mezo", "dynamic"): masks.SmallWeights,
        ("s-mezo", "constant"): masks.ConstantMask,
        ("s-mezo", "packed"): masks.PackedMask,
        ("r-mezo", "dynamic"): masks.RandomMask,
    }
    for (method, kind), rule in rules.items():
        assert type(masks.make_rule(method, 0.5, kind=kind)) is rule
    assert masks.make_rule("s-mezo", 0.5, refresh_every=7).refresh_every == 7
    assert masks.make_rule("r-mezo", 0.5, seed=9).seed == 9
