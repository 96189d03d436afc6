"""zo.py: noise against published answers, Algorithms 1 and 2 written out, the loop against both."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

import masks
import zo

LAST = zo.step_seed(zo.MAX_RUN_SEED - 1, zo.MAX_STEP - 1)  # its words make every sum wrap
HALVES = [torch.float16, torch.bfloat16]

# ------------------------------------------------------------------ noise


def threefry(*words, rounds=13):
    """zo.threefry of numbers: two numbers in [0, 2³²)."""
    return tuple(int(w) & 0xFFFFFFFF for w in zo.threefry(*map(zo.word, words), rounds=rounds))


@pytest.mark.parametrize(
    "words, after_13, after_20",
    [
        ((0,) * 4, (0x9D1C5EC6, 0x8BD50731), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 4, (0xFD36D048, 0x2D17272C), (0x1CB996FC, 0xBB002BE7)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xBA3E4725, 0xF27D669E),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_threefry_gives_random123s_known_answers(words, after_13, after_20):
    """Threefry-2x32 gives the published vectors (Random123, kat_vectors), with 13 and 20 rounds."""
    assert threefry(*words) == after_13 and threefry(*words, rounds=20) == after_20


def threefry_in_python(counter0, counter1, key0, key1, rounds=13):
    """The same cipher on Python's unbounded integers, as the paper prints it."""
    word0, word1, limit = counter0 + key0, counter1 + key1, 1 << 32
    keys = (key0, key1, key0 ^ key1 ^ 0x1BD11BDA)
    for i in range(rounds):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        word0, word1 = (word0 + word1) % limit, word1 % limit
        word1 = (word1 << turn) % limit + (word1 >> 32 - turn) ^ word0
        if i % 4 == 3:
            j = i // 4 + 1
            word0, word1 = word0 + keys[j % 3], word1 + keys[(j + 1) % 3] + j
    return word0 % limit, word1 % limit


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), st.integers(1, 20))
def test_threefry_wraps_like_unbounded_integers(words, rounds):
    """Signed 32-bit sums, shifts and xors give the words of the cipher on unbounded integers."""
    assert threefry(*words, rounds=rounds) == threefry_in_python(*words, rounds)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, LAST), st.integers(0, 2**31 - 1), st.integers(1, 9))
def test_z_is_box_muller_of_the_words(seed, stream, n):
    """Element i of n is r cos φ of draw i, or r sin φ of draw i − ⌈n/2⌉, of the key (run, step)."""
    half, want = (n + 1) // 2, []
    for i in range(n):
        one, two = threefry_in_python(i % half, stream, seed >> 32, seed & 0xFFFFFFFF)
        r = math.sqrt(-2 * math.log(((one & 0x7FFFFFFF) + 0.5) / 2**31))
        angle = ((two & 0x3FFFFFFF) + 0.5) / 2**30 * math.pi / 2
        sign = (-1) ** (two >> 31 if i < half else two >> 30 & 1)
        want.append(sign * r * (math.cos(angle) if i < half else math.sin(angle)))
    # close to its end, ln u is as coarse as fp32's u
    torch.testing.assert_close(zo.gaussian(seed, stream, (n,)).tolist(), want, rtol=1e-5, atol=1e-3)


def test_logarithm_and_angles_are_right_to_3e_7():
    """The series of log, cos and sin equal float64 libraries over all of their arguments."""
    u = torch.cat([2.0 ** -torch.linspace(0, 32, 1_000_001), 1 - torch.arange(1, 999) * 2.0**-24])
    exact = u.double().log()
    error = (zo.minus_two_log(u) / -2 - exact).abs()
    assert (error <= 2e-7 * exact.abs().clamp(min=1)).all()
    number = torch.arange(0, 1 << 30, 1021, dtype=torch.int32)  # of the angle, between the signs
    middle = torch.full_like(number, 0x1B4E81B4)  # 2⁻¹·⁵⁵…, where r is about 1
    angle = (number.double() + 0.5) * (math.pi / 2 / 2**30)
    r = (-2 * math.log((0x1B4E81B4 + 0.5) / 2**31)) ** 0.5
    for found, function in zip(zo.normal_pair(middle, number), (torch.cos, torch.sin), strict=True):
        assert (found / r - function(angle)).abs().max() < 3e-7


def test_noise_is_standard_normal():
    """Mean, variance, fourth moment and tails of 4 million draws are right to 6 standard errors."""
    n = 4_000_000
    z = zo.gaussian(zo.step_seed(7, 1), 3, (n,)).double()
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 6 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 6 * math.sqrt(96 / n)
    for bound, share in ((1, 0.317311), (2, 0.0455003), (3, 0.0026998), (4, 6.334e-5)):
        for side in (z, -z):
            assert abs((side > bound).double().mean() - share / 2) < 6 * math.sqrt(share / 2 / n)
    words = torch.tensor([[0, -1], [0, 0]], dtype=torch.int32)  # the largest and the smallest r
    assert zo.normal_pair(*words)[0].tolist() == pytest.approx([64**0.5 * math.log(2) ** 0.5, 0])


def test_neighbouring_seeds_and_streams_are_independent():
    """Seeds and streams that differ in one bit, any bit, have correlations within 6 σ."""
    n, keys = 40_000, [(0, 0), *((1 << bit, 0) for bit in range(63))]
    keys += [(0, 1 << bit) for bit in range(31)]
    z = torch.stack([zo.gaussian(*key, (n,)) for key in keys])
    correlations = (z @ z.T / n).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(n)
    first, second = z.split(n // 2, dim=1)
    assert (first @ second.T / (n // 2)).abs().max() < 6 / math.sqrt(n // 2)


def test_the_two_elements_of_a_draw_are_independent():
    """The two elements of a draw, and neighbours, are uncorrelated, also in powers."""
    n = 1 << 20
    z = zo.gaussian(zo.step_seed(3, 1), 2, (n,))
    for one, two in ((z[: n // 2], z[n // 2 :]), (z[:-1], z[1:])):
        for a in (one, one**2, one**3):
            for b in (two, two**2, two**3):
                assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / len(a) ** 0.5


def test_step_seeds_are_one_to_one():
    """Seeds of all pairs (run, step) differ, and what does not fit is refused."""
    runs, steps = (0, 1, 2, zo.MAX_RUN_SEED - 1), (0, 1, 2, 20_000, zo.MAX_STEP - 1)
    found = {zo.step_seed(run, step) for run in runs for step in steps}
    assert len(found) == len(runs) * len(steps)
    for run, step in ((-1, 0), (zo.MAX_RUN_SEED, 0), (0, -1), (0, zo.MAX_STEP)):
        with pytest.raises(AssertionError, match="is not in"):
            zo.step_seed(run, step)
    for seed in (-1, zo.MAX_RUN_SEED << 32):
        with pytest.raises(AssertionError, match="use step_seed"):
            zo.gaussian(seed, 0, (1,))


def test_the_global_generator_is_untouched():
    """Drawing noise neither reads nor moves torch's generator."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = zo.gaussian(11, 2, (10, 100))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(zo.gaussian(11, 2, (10, 100)), first)


# ------------------------------------------------------------------ Algorithms 1 and 2


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (7,), (5, 7), (3, 2, 4)]  # two of equal shape
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def masks_of(theta):
    return [t.abs() <= 0.8 for t in theta]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_perturb_parameters_is_algorithm_2(dtype):
    """θ_i ← θ_i + m_i ⊙ a z_i, rounded once; what is not in m keeps its bits."""
    theta, seed, a = parameters(dtype), 99, 0.125
    before, mask = [t.clone() for t in theta], masks_of(theta)
    zo.perturb_parameters(theta, a, seed, mask)
    for i, (old, new, m) in enumerate(zip(before, theta, mask, strict=True)):
        z = zo.gaussian(seed, i, old.shape)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(new[m], (old[m].to(wide) + a * z[m]).to(dtype))
        assert torch.equal(new[~m], old[~m])
    assert not torch.equal(theta[0] - before[0], theta[2] - before[2])  # a stream for each tensor


def test_sparse_mezo_step_is_algorithm_1():
    """One step equals the printed algorithm written out: l⁺, l⁻, proj_grad and θ − η g m ⊙ z."""
    theta, seed, lr, eps = parameters(), 1234, 0.05, 1e-3
    start, mask = [t.clone() for t in theta], masks_of(theta)

    def value(at):
        return sum((t**3 / 3 + t.sin()).sum() for t in at)

    z = [zo.gaussian(seed, i, t.shape).double() for i, t in enumerate(start)]
    moved = [
        [t + n * (s * eps) * m for t, m, n in zip(start, mask, z, strict=True)] for s in (1, -1)
    ]
    want_plus, want_minus = value(moved[0]), value(moved[1])
    want_grad = (want_plus - want_minus) / (2 * eps)

    plus, minus, grad = zo.sparse_mezo_step(
        theta, lambda: value(theta), masks_of, lr=lr, eps=eps, seed=seed
    )
    assert plus == pytest.approx(float(want_plus), rel=1e-12)
    assert minus == pytest.approx(float(want_minus), rel=1e-12)
    assert grad == pytest.approx(float(want_grad), rel=1e-8)
    for t, old, m, n in zip(theta, start, mask, z, strict=True):
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
    """On a bowl, thirty steps lower the loss: the update has the right sign."""
    theta = [torch.full((50,), 2.0, dtype=torch.float64)]

    def loss():
        return theta[0].square().sum() / 2

    before, everything = float(loss()), [torch.ones(50, dtype=torch.bool)]
    for seed in range(30):
        zo.sparse_mezo_step(theta, loss, lambda _: everything, lr=0.01, eps=1e-3, seed=seed)
    assert float(loss()) < 0.9 * before


@pytest.mark.parametrize("dtype", HALVES)
def test_in_place_probes_drift_in_half_precision(dtype):
    """Adding ε ẑ, −2ε ẑ and ε ẑ in 16 bits does not restore a fifth of the weights."""
    theta = [torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02]
    before, everything = theta[0].clone(), [torch.ones(10_000, dtype=torch.bool)]
    for a in (1e-3, -2e-3, 1e-3):
        zo.perturb_parameters(theta, a, 3, everything)
    assert (theta[0] != before).double().mean() > 0.2


# ------------------------------------------------------------------ θ + a·m⊙z as one loop


def weight(n, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)


def small_thirds(theta, element, state):
    """A mask that depends on all that it is given."""
    return (theta.abs() <= state) & (element % 3 > 0)


def move(theta, a=1.0, seed=LAST, mask=small_thirds, *, out=None, **how):
    """`out`, which may be θ, or a new tensor."""
    h, stream = torch.tensor(0.5, dtype=theta.dtype), zo.word(zo.MASK_STREAM - 1)
    out = torch.empty_like(theta) if out is None else out
    into = None if out is theta else zo.Halves(out)
    zo.apply(zo.Halves(theta), zo.Shift.of(a, seed), stream, mask, h, out=into, **how)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("n", [1, 2, 7, 2 * zo.CHUNK, 5 * zo.CHUNK + 1])
def test_the_eager_loop_is_the_primitive_in_chunks(n, dtype):
    """In any number of chunks it is θ + a m⊙z to the bit: a new tensor, another, or θ itself."""
    theta, other = weight(n, dtype).view(1, n), torch.empty(1, n, dtype=dtype)
    before, z = theta.clone(), zo.gaussian(LAST, zo.MASK_STREAM - 1, (1, n))
    mask = small_thirds(theta, torch.arange(n), 0.5)
    want = zo.shifted(theta, -0.25, mask, z).to(dtype)
    assert torch.equal(move(theta, -0.25), want) and torch.equal(theta, before)
    assert torch.equal(move(theta, -0.25, out=other), want)
    assert torch.equal(move(theta, -0.25, out=theta), want)


@pytest.mark.parametrize("other", [torch.empty(8, dtype=torch.bfloat16), torch.empty(9)])
def test_the_result_has_the_dtype_and_size_of_the_tensor(other):
    """Where `out` is of another kind, a compiled loop would write where it must not."""
    with pytest.raises(AssertionError, match="not of θ's kind"):
        move(weight(8), out=other, fused=True)


def test_a_tensor_with_more_elements_than_the_noise_is_refused():
    """Beyond 2³¹ elements the draws of a tensor would not fit their word."""
    with pytest.raises(AssertionError, match="2147483649 elements"):
        move(torch.empty((1 << 31) + 1, device="meta", dtype=torch.float16))


def test_a_tensor_on_another_device_takes_its_numbers_from_the_cpu():
    """θ, h and z may be on any device, while seed, stream and a are 0-dim tensors on the CPU."""
    theta = torch.empty(33, device="meta", dtype=torch.bfloat16)
    shift, h = zo.Shift.of(1.0, LAST), theta[0]
    halves = zo.Halves(theta)
    zo.apply(halves, shift, zo.word(1), masks.SmallWeights.mask, h, stochastic=True)
    assert zo.gaussian(LAST, 1, (33,), device="meta").is_meta
    with torch.device("meta"):  # nor does torch's default device matter
        numbers = *shift, *zo.Shift.of(1.0, LAST), zo.word(1), zo.Halves(theta).half_word
    assert not any(number.device.type != "cpu" or number.dim() for number in numbers)


def test_the_fused_loop_is_one_on_all_threads(monkeypatch):
    """The longest, R-MeZO's, stores nothing between; a tiny tensor's is parallel for large ones."""
    theta, rule = weight(64, torch.bfloat16), masks.RandomMask(0.5)
    want, how = theta.clone(), (zo.Shift.of(1.0, LAST), zo.word(1), rule.mask)
    how = *how, rule.prepare(theta, 1)
    zo.apply(zo.Halves(want), *how, stochastic=True)
    monkeypatch.setattr(zo, "_fused", functools.cache(zo._fused.__wrapped__))  # or it is known
    _, (code,) = run_and_get_code(zo.apply, zo.Halves(theta), *how, stochastic=True, fused=True)
    assert code.count("#pragma omp parallel") == code.count("#pragma omp for") == 1
    assert "= empty_strided_cpu(" not in code and "tmpbuf" not in code
    assert (theta == want).double().mean() > 0.95 and (theta != weight(64, torch.bfloat16)).any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_fused_loop_is_the_eager_one(dtype):
    """Only z's last bits differ, in vectors and what is left of them, and after rounding."""
    for n in (1, 30, 1024, 8199, 4 * zo.CHUNK + 6):
        theta = weight(n, dtype)
        want, got = (move(theta, stochastic=True, fused=fused) for fused in (False, True))
        close = dict(rtol=3e-7, atol=6e-7)
        if dtype in HALVES:
            assert (got == want).double().mean() > 0.998
            close = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(got, want, **close)
        still = ~small_thirds(theta, torch.arange(n), 0.5)
        assert torch.equal(got[still], theta[still])
        move(theta, stochastic=True, fused=True, out=theta)
        assert torch.equal(theta, got)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("make", [masks.Everything, masks.SmallWeights, masks.RandomMask,
                                  masks.ConstantMask, masks.PackedMask])  # fmt: skip
def test_rows_give_the_bits_of_the_flat_tensor(make, dtype):
    """On a GPU the loop sees rows of 16 elements: noise, mask and rounding stay an element's."""
    rule, n = make(0.5), 20 * zo.ROW
    theta, shift = weight(n, dtype), zo.Shift.of(0.3, 7 << 32 | 9)
    state, found = rule.prepare(theta, 3), []
    for shape in ((n // 2,), (n // 2 // zo.ROW, zo.ROW)):
        halves = [half.view(shape) for half in theta.split(n // 2)]
        outs = [torch.empty_like(half) for half in halves]
        zo._apply(outs, halves, 0, n // 2, shift, zo.word(3), rule.mask, state, True)
        found.append(torch.cat([out.view(-1) for out in outs]))
    assert torch.equal(*found) and not torch.equal(found[0], theta)
    zo.apply(zo.Halves(theta), shift, zo.word(3), rule.mask, state, stochastic=True)
    assert torch.equal(found[0], theta)


def first_of_three(theta, element, state):
    """A mask that asks for the size of its state, and has a tensor of its own."""
    return theta.abs() <= (state[0] if len(state) == 3 else state[1]) * torch.tensor(1.0)


def asks_for_a_size(theta, element, state):
    return theta.abs() <= (state if theta.shape[0] > 50 else 0 * state)


def test_a_mask_that_asks_for_a_size_is_compiled_for_it_or_refused(monkeypatch):
    """A state of few numbers is known by its shape; nothing else that is asked could be kept."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_: graph)  # what it would get
    found, theta = [], weight(1001)
    for fused in (False, True):
        into = zo.Halves(torch.empty_like(theta))
        where = zo.Halves(theta), zo.Shift.of(1.0, LAST), zo.word(1), first_of_three
        zo.apply(*where, torch.tensor([0.5, 9.0, 9.0]), out=into, fused=fused)
        found.append(into.flat)
    torch.testing.assert_close(*found, rtol=3e-7, atol=6e-7)
    with pytest.raises(ValueError, match="may compute with a size, but not ask for one"):
        move(theta, mask=asks_for_a_size, fused=True)


def test_one_fused_loop_serves_every_step_and_tensor():
    """Seed, stream, size and a are arguments: no values of theirs, equal or not, have a loop."""

    def apply(n, a, stream, step):
        theta, h = weight(n, torch.bfloat16), torch.tensor(0.5, dtype=torch.bfloat16)
        shift = zo.Shift.of(a, zo.step_seed(0, step))
        how = {"out": zo.Halves(torch.empty_like(theta)), "stochastic": True, "fused": True}
        zo.apply(zo.Halves(theta), shift, zo.word(stream), small_thirds, h, **how)

    apply(128, 1.0, 7, 5)
    before = zo._fused.cache_info().currsize
    for n, stream, step in (
        (64, 0, 0),
        (64, 32, 32),
        (96, 3, 0),
        (128, 0, 64),
        (2, 1, 1),
        (3, 2, 0),
    ):
        apply(n, -0.5, stream, step)
    assert zo._fused.cache_info().currsize == before


# ------------------------------------------------------------------ stochastic rounding


def random_words(n):
    return zo.threefry(torch.arange(n, dtype=torch.int32), *map(zo.word, (3, 1, 2)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0001, -0.3, 3e-5, -7e-7, 0.0, 2.0, 1e4 + 0.3])
def test_stochastic_rounding_is_unbiased(dtype, value):
    """A value goes to one of its two neighbours in fp16 or bf16, and its mean is the value."""
    n = 1 << 18
    got = zo.round_stochastically(torch.full((n,), value), dtype, *random_words(n))
    assert got.dtype == dtype
    exact = torch.tensor(value)
    near = exact.to(dtype)
    toward = torch.tensor(math.inf if near.float() < exact else -math.inf, dtype=dtype)
    neighbours = {near.item()}
    if near.float() != exact:
        neighbours |= {near.nextafter(toward).item()}
    assert set(got.unique().tolist()) == neighbours
    spread = max(neighbours) - min(neighbours)
    # 16 random bits where bf16 cuts 16, and 13 where fp16 cuts 13
    assert abs(got.double().mean().item() - exact.item()) <= spread * (2.5 / n**0.5 + 2**-16)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_weight_that_does_not_move_keeps_its_bits(dtype):
    """What dtype can hold is returned as it is, whatever the random bits; subnormals, too."""
    value = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    value = value[value.isfinite()]
    for number in (0, 1, 0x8000, 0xFFFE, 0xFFFF, -1):
        words = (torch.full(value.shape, n, dtype=torch.int32) for n in (number >> 8, number))
        assert torch.equal(zo.round_stochastically(value.float(), dtype, *words), value)


def test_stochastic_rounding_does_not_see_the_noise():
    """Whether a weight is rounded up is uncorrelated with its z, so the mean update stays a z."""
    n = 1 << 20
    words = random_words(n)
    for z, bits in zip(zo.normal_pair(*words), (words, words[::-1]), strict=True):
        value = torch.full((n,), 1 + 2**-9)
        up = zo.round_stochastically(value, torch.bfloat16, *bits).float() - 1
        assert up.unique().numel() == 2
        for power in (1, 2, 3):
            correlation = torch.corrcoef(torch.stack([up, z**power]))[0, 1]
            assert abs(correlation) < 5 / n**0.5


def test_a_small_update_arrives_on_average():
    """bf16 weights of 1, updates of 1e-4: nearest loses all of them, stochastic none on average."""
    n, a, steps = 1 << 17, 1e-4, range(10)
    want = sum(a * zo.gaussian(step, zo.MASK_STREAM - 1, (n,)) for step in steps)
    for stochastic in (False, True):
        theta = torch.ones(n, dtype=torch.bfloat16)
        for seed in steps:
            move(theta, a, seed, masks.Everything.mask, stochastic=stochastic, out=theta)
        got = theta.float() - 1
        if stochastic:
            assert (got @ want / (want @ want)).item() == pytest.approx(1, abs=0.1)
        else:
            assert not got.any()
