"""zo.py: the noise against published answers, Algorithms 1 and 2 against lines written out here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zo

seeds = st.integers(0, 2**48 - 1)
streams = st.integers(0, 2 * zo.MAX_STREAMS - 1)


@pytest.mark.parametrize(
    "counter0, counter1, key, word0, word1",
    [
        (0, 0, 0, 0xFF1DAE59, 0x6CD10DF2),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x2C3F628B, 0xAB4FD7AD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0xDD7CE038, 0xF62A4C12),
    ],
)
def test_philox_gives_random123s_known_answers(counter0, counter1, key, word0, word1):
    """Philox-2x32-10 gives the three published vectors (Random123, kat_vectors)."""
    found = zo.philox(torch.tensor(counter0), torch.tensor(counter1), torch.tensor(key))
    assert tuple(int(word) for word in found) == (word0, word1)


def philox_in_python(counter0, counter1, key):
    """The same cipher on Python's unbounded integers."""
    for _ in range(10):
        product = counter0 * 0xD256D193
        counter0, counter1 = (product >> 32) ^ key ^ counter1, product & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return counter0, counter1


words = st.integers(0, 2**32 - 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(words, words, words)
def test_philox_wraps_like_unbounded_integers(counter0, counter1, key):
    """int64 products that overflow still give both exact halves."""
    found = zo.philox(torch.tensor(counter0), torch.tensor(counter1), torch.tensor(key))
    assert tuple(int(word) for word in found) == philox_in_python(counter0, counter1, key)


def test_noise_is_standard_normal():
    """Mean, variance, fourth moment and tails of 4 million draws: within 6 standard errors."""
    n = 4_000_000
    z = zo.gaussian(7, 3, (n,)).double()
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 6 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 6 * math.sqrt(96 / n)
    for bound, share in ((1, 0.317311), (2, 0.0455003), (3, 0.0026998), (4, 6.334e-5)):
        found = (z.abs() > bound).double().mean()
        assert abs(found - share) < 6 * math.sqrt(share * (1 - share) / n)
    assert z.abs().max() < math.sqrt(2 * 32 * math.log(2)) + 1e-3  # the tail ends at 6.66


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(seeds, streams), st.tuples(seeds, streams))
def test_no_two_tensors_steps_or_seeds_share_noise(a, b):
    """Different (seed, stream) give uncorrelated noise, equal ones the same, to the bit."""
    first, second = zo.gaussian(*a, (20_000,)), zo.gaussian(*b, (20_000,))
    if a == b:
        assert torch.equal(first, second)
    else:
        assert (first == second).double().mean() < 1e-3
        assert abs((first * second).mean()) < 6 / math.sqrt(20_000)


def test_neighbouring_seeds_and_streams_are_independent():
    """Seeds and streams that differ in one bit, any bit, have correlations within 6 σ."""
    n = 50_000
    base = zo.gaussian(0, 0, (n,))
    others = [zo.gaussian(1 << bit, 0, (n,)) for bit in range(48)]
    others += [zo.gaussian(0, 1 << bit, (n,)) for bit in range(16)]
    table = torch.stack([base, *others]) @ torch.stack([base, *others]).T / n
    off_diagonal = table - torch.diag(table.diagonal())
    assert off_diagonal.abs().max() < 6 / math.sqrt(n)


def test_step_seeds_are_one_to_one():
    """Seeds of all pairs (run, step) differ, and the bounds are kept."""
    runs, steps = (0, 1, 2, zo.MAX_RUN_SEED - 1), (0, 1, 2, 20_000, zo.MAX_STEP - 1)
    found = {zo.step_seed(run, step) for run in runs for step in steps}
    assert len(found) == len(runs) * len(steps) and max(found) < 2**48
    for run, step in ((-1, 0), (zo.MAX_RUN_SEED, 0), (0, zo.MAX_STEP)):
        with pytest.raises(AssertionError, match="is not in"):
            zo.step_seed(run, step)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seeds, streams, st.integers(1, 40), st.integers(1, 30), st.data())
def test_a_row_range_equals_the_slice_of_the_whole(seed, stream, rows, columns, data):
    """Rows drawn alone are the rows of the whole, to the bit, however the tensor is cut."""
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    whole = zo.gaussian(seed, stream, (rows, columns))
    part = zo.gaussian(seed, stream, (last - first, columns), start=first * columns)
    assert torch.equal(part, whole[first:last])


def test_elements_beyond_31_bits_have_noise_of_their_own():
    """The element index uses all 32 bits: a tensor of four billion weights does not repeat."""
    low = zo.gaussian(5, 1, (1000,))
    for start in (2**31, 2**32 - 1000):
        assert not torch.equal(zo.gaussian(5, 1, (1000,), start=start), low)
    with pytest.raises(AssertionError, match="exceeds 32 bits"):
        zo.gaussian(5, 1, (1000,), start=2**32 - 999)


def test_the_global_generator_is_untouched():
    """Drawing noise neither reads nor moves torch's generator."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = zo.gaussian(11, 2, (1000,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(zo.gaussian(11, 2, (1000,)), first)


# ------------------------------------------------------------------ Algorithms 1 and 2


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (7,), (5, 7), (3, 2, 4)]  # two of equal shape
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def masks_of(theta):
    return [t.abs() <= 0.8 for t in theta]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_perturb_parameters_is_algorithm_2(dtype):
    """θ_i ← θ_i + m_i ⊙ a z_i, rounded once; what is not in m keeps its bits."""
    theta, seed, a = parameters(dtype), 99, 0.125
    before, masks = [t.clone() for t in theta], masks_of(theta)
    zo.perturb_parameters(theta, a, seed, masks)
    for i, (old, new, mask) in enumerate(zip(before, theta, masks, strict=True)):
        z = zo.gaussian(seed, i, old.shape)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(new[mask], (old[mask].to(wide) + a * z[mask]).to(dtype))
        assert torch.equal(new[~mask], old[~mask])
    assert not torch.equal(theta[0] - before[0], theta[2] - before[2])  # a stream for each tensor


def test_sparse_mezo_step_is_algorithm_1():
    """One step equals the printed algorithm written out: l⁺, l⁻, proj_grad and θ − η g m ⊙ z."""
    theta, seed, lr, eps = parameters(), 1234, 0.05, 1e-3
    start, masks = [t.clone() for t in theta], masks_of(theta)

    def value(at):
        return sum((t**3 / 3 + t.sin()).sum() for t in at)

    z = [zo.gaussian(seed, i, t.shape).double() for i, t in enumerate(start)]
    moved = [
        [t + n * (s * eps) * m for t, m, n in zip(start, masks, z, strict=True)] for s in (1, -1)
    ]
    want_plus, want_minus = value(moved[0]), value(moved[1])
    want_grad = (want_plus - want_minus) / (2 * eps)

    plus, minus, grad = zo.sparse_mezo_step(
        theta, lambda: value(theta), masks_of, lr=lr, eps=eps, seed=seed
    )
    assert plus == pytest.approx(float(want_plus), rel=1e-12)
    assert minus == pytest.approx(float(want_minus), rel=1e-12)
    assert grad == pytest.approx(float(want_grad), rel=1e-8)
    for t, old, m, n in zip(theta, start, masks, z, strict=True):
        torch.testing.assert_close(t, old - n * (lr * want_grad) * m, rtol=1e-9, atol=1e-12)
        assert torch.equal(t[~m], old[~m])


def test_the_masks_are_taken_once_from_unperturbed_weights():
    """GetMask sees θ_t before the perturbation, once per step."""
    theta, seen = parameters(), []
    start = [t.clone() for t in theta]

    def get_masks(now):
        seen.append([t.clone() for t in now])
        return masks_of(now)

    zo.sparse_mezo_step(theta, lambda: theta[0].sum(), get_masks, lr=0.1, eps=0.5, seed=1)
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[0], start, strict=True))


def test_a_step_goes_downhill():
    """On a bowl, ten steps lower the loss: the update has the right sign."""
    theta = [torch.full((50,), 2.0, dtype=torch.float64)]

    def loss():
        return theta[0].square().sum() / 2

    before = float(loss())
    for step in range(10):
        zo.sparse_mezo_step(
            theta, loss, lambda now: [torch.ones_like(now[0], dtype=torch.bool)],
            lr=0.01, eps=1e-3, seed=zo.step_seed(0, step),
        )  # fmt: skip
    assert float(loss()) < 0.9 * before


@pytest.mark.parametrize("dtype, least", [(torch.float16, 0.2), (torch.bfloat16, 0.2)])
def test_in_place_probes_drift_in_half_precision(dtype, least):
    """Trap 1: +ε, −2ε, +ε in 16 bits does not restore θ. (§3.3's probes do: test_model_patch.)"""
    theta = [torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02]
    before, everything = theta[0].clone(), [torch.ones(10_000, dtype=torch.bool)]
    for a in (1e-3, -2e-3, 1e-3):
        zo.perturb_parameters(theta, a, 3, everything)
    assert (theta[0] != before).double().mean() > least


# ------------------------------------------------------------------ the kernel


def test_the_two_elements_of_a_draw_are_independent():
    """z of e and of e + 64, r cos φ and r sin φ of one draw: uncorrelated, also in powers."""
    z = zo.gaussian(zo.step_seed(3, 1), 2, (1 << 20,)).view(-1, 2, 64)
    first, second = z[:, 0].flatten(), z[:, 1].flatten()
    n = len(first)
    for a in (first, first**2 - 1, first**3):
        for b in (second, second**2 - 1, second**3):
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / n**0.5
    neighbours = torch.corrcoef(torch.stack([z.flatten()[:-1], z.flatten()[1:]]))[0, 1]
    assert abs(neighbours) < 5 / (2 * n) ** 0.5
