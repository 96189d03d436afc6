"""sweep.py: the kernel, eager and compiled, against zo.py's lines; stochastic rounding."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import masks
import zo
from sweep import Sweep, round_stochastically


def small(theta, index, state):
    return theta.abs() <= state


def sweep_arguments(theta):
    return dict(
        theta=theta,
        seed=torch.tensor(zo.step_seed(3, 5)),
        stream=torch.tensor(9),
        mask=small,
        state=torch.tensor(0.5, dtype=theta.dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_eager_kernel_is_the_primitive_in_chunks(dtype):
    """Sweep in chunks equals θ + a m⊙z on the whole tensor, to the bit, for each of its outputs."""
    theta = torch.randn(3 * Sweep.CHUNK["cpu"][0] + 17).to(dtype)
    outs, a = [torch.empty_like(theta) for _ in range(2)], (0.25, -0.25)
    Sweep()(outs, [torch.tensor(x) for x in a], **sweep_arguments(theta))
    z = zo.gaussian(zo.step_seed(3, 5), 9, theta.shape)
    for out, x in zip(outs, a, strict=True):
        assert torch.equal(out, zo.shifted(theta, x, theta.abs() <= 0.5, z).to(theta.dtype))


def test_the_compiled_kernel_is_the_eager_one():
    """torch.compile changes z by a rounding (1e-6) and nothing else, and never the mask."""
    kernel = Sweep(compiled=True)
    for size in (1000, 4099):  # whole vectors and a tail
        theta = torch.randn(size)
        arguments = sweep_arguments(theta)
        eager, fused = torch.empty(2, size), torch.empty(2, size)
        coefficients = [torch.tensor(1.0), torch.tensor(-1.0)]
        kernel([fused[0].clone(), fused[1].clone()], coefficients, **arguments)
        outs = [torch.empty(size), torch.empty(size)]
        kernel(outs, coefficients, **arguments)
        Sweep()(list(eager), coefficients, **arguments)
        torch.testing.assert_close(torch.stack(outs), eager, rtol=1e-6, atol=2e-6)
        still = theta.abs() > 0.5
        assert all(torch.equal(out[still], theta[still]) for out in outs)
        rows = torch.arange(0, size, 3)  # an index of its own, as an embedding has
        some = [torch.empty(len(rows))]
        arguments = {**arguments, "theta": theta[rows]}
        kernel(some, coefficients[:1], **arguments, index=rows)
        torch.testing.assert_close(some[0], outs[0][rows], rtol=1e-6, atol=2e-6)
    assert kernel.compiled


def test_a_kernel_compiled_for_few_weights_runs_on_all_threads():
    """A tiny model's kernel is parallel too: from the compiler's cache a large model gets it."""
    kernel, theta = Sweep(compiled=True), torch.randn(128)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(
            kernel, [theta.clone()], [torch.tensor(1.0)], **sweep_arguments(theta)
        )
    assert code and all("#pragma omp parallel" in source for source in code)


def test_without_a_compiler_one_warning_then_eager(monkeypatch):
    """A backend that fails costs one warning, not the run."""

    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler here\nand a long traceback")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    kernel, theta, out = Sweep(compiled=True), torch.randn(10), [torch.empty(10)]
    with pytest.warns(UserWarning, match="running eager: no C.. compiler here$"):
        kernel(out, [torch.tensor(1.0)], **sweep_arguments(theta))
    eager = [torch.empty(10)]
    Sweep()(eager, [torch.tensor(1.0)], **sweep_arguments(theta))
    assert torch.equal(out[0], eager[0]) and not kernel.compiled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0001, -0.3, 3e-5, -7e-7, 0.0, 2.0, 1e4 + 0.3])
def test_stochastic_rounding_is_unbiased(dtype, value):
    """A value goes to one of its two neighbours in fp16 or bf16, and its mean is the value."""
    n = 1 << 18
    words = zo.random_words(zo.step_seed(1, 2), 3, torch.arange(n))
    got = round_stochastically(torch.full((n,), value), dtype, *words)
    assert got.dtype == dtype
    exact = torch.tensor(value, dtype=torch.float32)
    near = exact.to(dtype)
    found = set(got.unique().tolist())
    toward = torch.tensor(float("inf") if near.float() < exact else -float("inf"), dtype=dtype)
    neighbours = {near.item()} | (
        {near.nextafter(toward).item()} if near.float() != exact else set()
    )
    assert found <= neighbours and (len(found) == 2 or near.float() == exact or value == -7e-7)
    spread = max(neighbours) - min(neighbours)
    assert abs(got.double().mean().item() - exact.item()) <= 5 * spread / 2 / n**0.5 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_does_not_move_keeps_its_bits(dtype):
    """What dtype can hold is returned as it is, whatever the random bits; subnormals, too."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    value = bits.view(dtype)
    value = value[value.isfinite()]
    for number in (0, 1, 0x8000, 0xFFFE, 0xFFFF):
        high, low = (torch.full(value.shape, n) for n in (number >> 8, number & 0xFF))
        assert torch.equal(round_stochastically(value.float(), dtype, high, low), value)


def test_stochastic_rounding_does_not_see_the_noise():
    """Whether a weight is rounded up is uncorrelated with its z, so the mean update stays a z."""
    n = 1 << 20
    words = zo.random_words(zo.step_seed(4, 2), 0, torch.arange(n))
    z = zo.normal_pair(*words)[0]
    up = round_stochastically(torch.full((n,), 1 + 2**-9), torch.bfloat16, *words).float() - 1
    assert up.unique().numel() == 2
    for power in (1, 2, 3):
        correlation = torch.corrcoef(torch.stack([up, z**power]))[0, 1].item()
        assert abs(correlation) < 5 / n**0.5


def test_a_small_update_arrives_on_average():
    """bf16 weights of 1, updates of 1e-4: nearest loses all of them, stochastic none on average."""
    theta, moved = torch.ones(1 << 17, dtype=torch.bfloat16), {}
    for stochastic in (False, True):
        weight, kernel, total = theta.clone(), Sweep(), torch.zeros(1 << 17)
        for step in range(100):
            seed, a = torch.tensor(zo.step_seed(0, step)), torch.tensor(1e-4)
            state = torch.empty(0)
            kernel([weight], [a], weight, seed, torch.tensor(7), masks.Everything.mask, state,
                  stochastic=stochastic)  # fmt: skip
            total += 1e-4 * zo.gaussian(zo.step_seed(0, step), 7, (1 << 17,))
        moved[stochastic] = (weight.float() - 1, total)
    assert (moved[False][0] == 0).all()
    got, want = moved[True]
    slope = (got @ want / (want @ want)).item()
    assert slope == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("numel", [1, 63, 64, 127, 128, 129, 1000, 70000])
def test_a_sweep_draws_the_noise_of_its_elements(numel, compiled):
    """Whole blocks of 128, what is left of them and picked elements: always `gaussian`'s z."""
    if compiled and numel not in (129, 1000):
        pytest.skip("compiling takes seconds; two sizes stand for all")
    theta, out = torch.zeros(numel), torch.empty(numel)
    seed, stream, state = torch.tensor(zo.step_seed(2, 5)), torch.tensor(4), torch.empty(0)
    want = zo.gaussian(zo.step_seed(2, 5), 4, (numel,))
    kernel = Sweep(compiled)
    kernel([out], [torch.tensor(1.0)], theta, seed, stream, masks.Everything.mask, state)
    assert kernel.compiled == compiled
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6 if compiled else 0)
    picked = torch.arange(numel - 1, -1, -3)
    out = torch.empty(len(picked))
    kernel([out], [torch.tensor(1.0)], theta[picked], seed, stream, masks.Everything.mask, state,
          index=picked)  # fmt: skip
    torch.testing.assert_close(out, want[picked], rtol=1e-5, atol=1e-6 if compiled else 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_sweep_draws_for_several_tensors(compiled):
    """With a stream for each element, one sweep is to the bit a sweep of each tensor's elements."""
    kernel, state = Sweep(compiled), torch.empty(0)
    streams, picked = [2, 32767], [torch.tensor([0, 5, 63, 64, 700]), torch.tensor([1, 64, 9999])]
    seed, a = torch.tensor(zo.step_seed(3, 5)), torch.tensor(0.5)
    theta = torch.randn(8)
    each = torch.tensor(streams, dtype=torch.int16).repeat_interleave(torch.tensor([5, 3]))
    out = torch.empty(8)
    kernel([out], [a], theta, seed, each, masks.Everything.mask, state, torch.cat(picked))
    z = [
        zo.gaussian(zo.step_seed(3, 5), s, (10000,))[i]
        for s, i in zip(streams, picked, strict=True)
    ]
    assert kernel.compiled == compiled
    torch.testing.assert_close(
        out, theta + 0.5 * torch.cat(z), rtol=0, atol=1e-6 if compiled else 0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_compiled_kernel_rounds_stochastically_too(dtype):
    """Compiled and eager updates of 16-bit weights differ where z does in its last bit: hardly."""
    theta = (torch.randn(1 << 14) * 10.0 ** torch.randint(-7, 2, (1 << 14,))).to(dtype)
    kernels = Sweep(compiled=True), Sweep()
    outs = [torch.empty_like(theta) for _ in kernels]
    arguments = sweep_arguments(theta) | {"mask": masks.Everything.mask, "stochastic": True}
    for kernel, out in zip(kernels, outs, strict=True):
        kernel([out], [torch.tensor(1e-5)], **arguments)
    assert kernels[0].compiled and (outs[0] != theta).float().mean() > 0.1
    assert (outs[0] == outs[1]).float().mean() > 0.999
