"""quant.py and the layers of [Q]: w = dense + sparse, in 4 and in 16 bits, inside a probe."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build, literal_step, loss_fn
from torch import nn

import loading
import masks
import model_patch
import quant
import zo
from errors import UserError

EPS, LR, SEED = 1e-3, 1e-2, zo.step_seed(5, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_weight(rows=64, columns=96, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def index_of(model, every=37, kind=nn.Linear):
    """{weight name: every 37th place} of the blocks' linears: any index will do here."""
    return {
        f"{name}.weight": torch.arange(i, module.weight.numel(), every)
        for i, (name, module) in enumerate(model.named_modules())
        if isinstance(module, kind) and "head" not in name
    }


def in_four_bits(model, index, double_quant=False):
    for name, places in index.items():
        quant.quantise(model, name, model.get_parameter(name), places, double_quant)
    return model


def bitwise(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------ NF4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_readable_nf4_is_bitsandbytes(dtype):
    """nf4_encode and nf4_decode give bitsandbytes' codes, scales and weights, bit for bit."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = some_weight(dtype=dtype).view(-1, 64)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = quant.nf4_encode(weight)
    assert torch.equal(packed.flatten(), codes[0::2] << 4 | codes[1::2])
    assert torch.equal(state.absmax, scales)
    want = dequantize_4bit(packed, state)
    assert bitwise(quant.nf4_decode(codes, scales).to(dtype).view_as(weight), want)
    assert list(quant.NF4) == state.code.tolist()


def test_the_levels_are_the_quantiles_of_a_normal_distribution():
    """NF4's table is that of Dettmers et al. (2023), appendix E: normal quantiles, an exact 0."""
    offset = 0.9677083  # (1 − 1/32 + 1 − 1/30) / 2, the outermost quantile
    normal = torch.distributions.Normal(0, 1)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    torch.testing.assert_close(levels / levels.max(), torch.tensor(quant.NF4), atol=1e-6, rtol=0)


def test_blocks_that_straddle_rows_are_unpacked_rightly():
    """A layer of 96 columns, whose blocks of 64 cross its rows, holds what NF4 says it holds."""
    weight = some_weight(64, 96)
    layer = quant.DenseSparseLinear(weight, torch.tensor([0]))
    weight.view(-1)[0] = 0
    assert bitwise(layer.dense().flatten(), quant.nf4_decode(*quant.nf4_encode(weight)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e3), zeros=st.integers(0, 3))
def test_packing_is_idempotent_and_zero_stays_zero(seed, scale, zeros):
    """pack(unpack(pack(w))) = pack(w); a 0 comes back as 0, a block of zeros too."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * scale
    weight[:zeros] = 0
    weight[:, ::5] = 0
    codes, scales = quant.nf4_encode(weight)
    once = quant.nf4_decode(codes, scales)
    again = quant.nf4_encode(once)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    assert (once.view_as(weight)[weight == 0] == 0).all()
    width = torch.tensor(quant.NF4).diff().max() / 2
    assert (once.view_as(weight) - weight).abs().max() <= width * weight.abs().max() * 1.001


# ------------------------------------------------------------------ w = dense + sparse


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_plus_sparse_is_w_at_the_sensitive_places(dtype, double_quant):
    """At a sensitive place dense is 0 and dense + sparse is the original weight, bit for bit."""
    weight = some_weight(dtype=dtype)
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))[:60]
    places = places.sort().values
    layer = quant.DenseSparseLinear(weight, places, double_quant=double_quant)
    assert (layer.dense().flatten()[places] == 0).all()
    assert bitwise(layer.weight.flatten()[places], weight.flatten()[places])
    rest = torch.ones(weight.numel(), dtype=torch.bool)
    rest[places] = False
    error = (layer.weight - weight).flatten()[rest].float().norm() / weight.float().norm()
    assert 0.05 < error < 0.12  # 0.092 is what NF4 costs on normal weights


def test_a_large_sensitive_weight_does_not_stretch_its_block():
    """Taken out before quantising, an outlier leaves its block's scale to the 63 others."""
    weight = some_weight()
    weight[3, 5] = 10.0
    place = torch.tensor([3 * 96 + 5])
    with_it = quant.DenseSparseLinear(weight, place)
    without = quant.DenseSparseLinear(weight, torch.tensor([0]))
    block = slice(3 * 96, 3 * 96 + 64)  # 288 is not a multiple of 64: blocks begin at 256 and 320
    errors = [
        (layer.weight - weight).flatten()[256:320].abs().median() for layer in (with_it, without)
    ]
    assert errors[0] < 0.005 < 0.01 < errors[1], (errors, block)


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.127)])
def test_the_bytes_per_weight_are_those_of_the_table(double_quant, bits):
    """4.5 bits per weight, 4.127 with double quantisation, and 12 bytes for each sparse value."""
    weight = some_weight(256, 256)
    layer = quant.DenseSparseLinear(weight, torch.arange(0, 65536, 1000), double_quant=double_quant)
    sparse = 12 * layer.index.numel()
    assert (layer.stored_bytes() - sparse) * 8 / weight.numel() == pytest.approx(bits, abs=0.02)


def test_a_matrix_that_does_not_fill_blocks_is_refused():
    """NF4 works in blocks of 64: a matrix of 63 weights is an error that says so."""
    with pytest.raises(UserError, match=r"0.weight \(7, 9\) does not fill blocks of 64"):
        quant.check_linears(nn.Sequential(nn.Linear(9, 7)), ["0.weight"])


def test_loading_quantises_matrix_by_matrix(tmp_path):
    """from_pretrained with our configuration equals quantising the loaded model, biases too."""
    from transformers import AutoModelForCausalLM

    build("opt").save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    load = AutoModelForCausalLM.from_pretrained
    index = index_of(model := load(tmp_path))
    want = in_four_bits(model, index).eval()
    got = load(tmp_path, quantization_config=quant.loading_config(index)).eval()
    assert sum(isinstance(m, quant.DenseSparseLinear) for m in got.modules()) == len(index) > 0
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(got(**inputs).logits, want(**inputs).logits)


def test_what_cannot_be_quantised_is_one_line_while_loading(tmp_path):
    """A refused matrix, or one that is no nn.Linear, ends loading with its own message."""
    build("gpt2").save_pretrained(tmp_path)
    name = "transformer.h.0.mlp.c_fc.weight"
    config = quant.loading_config({name: torch.tensor([1])})
    with pytest.raises(
        UserError, match="c_fc.weight is of a Conv1D; only nn.Linear goes into 4 bits"
    ):
        loading.load_model(str(tmp_path), device="cpu", four_bits=config)

    def check(name, weight):
        raise UserError(f"{name} is not what it was")

    build("llama").save_pretrained(tmp_path / "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    config = quant.loading_config({name: torch.tensor([1])}, check=check)
    with pytest.raises(UserError, match=f"^{name} is not what it was$"):
        loading.load_model(str(tmp_path / "llama"), device="cpu", four_bits=config)


# ------------------------------------------------------------------ inside a probe


def written_out(model, index, handle, a):
    """A plain model whose weights hold value + a z at the sensitive places."""
    plain = copy.deepcopy(model)
    for number, (name, places) in enumerate(sorted(index.items())):
        module = plain.get_submodule(name.removesuffix(".weight"))
        weight = module.weight.detach().clone()
        z = zo.gaussian(SEED, number, weight.shape).flatten()[places]
        values = handle.tensors()[name] + a * z
        weight.view(-1)[places] = values.to(weight.dtype)
        linear = nn.Linear(*weight.shape[::-1], bias=module.bias is not None, dtype=weight.dtype)
        linear.weight, linear.bias = nn.Parameter(weight), module.bias
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(plain.get_submodule(parent), child, linear)
    return plain


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("four_bits", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_both_halves_equal_plain_models_with_the_weights_written_out(name, four_bits, one_pass):
    """l⁺ and l⁻ are those of two ordinary models with value ± ε z at the sensitive places."""
    model = build(name)
    index, inputs = index_of(model), batch()
    if four_bits:
        in_four_bits(model, index)
    handle = model_patch.Patch(model, index, eps=EPS)
    handle.one_pass = one_pass
    losses = handle.losses(inputs, loss_fn, SEED)
    for loss, sign in zip(losses, (+1, -1), strict=True):
        plain = written_out(model, index, handle, sign * EPS)
        with torch.no_grad():
            want = loss_fn(plain(**inputs, use_cache=False).logits)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_16_bit_method_equals_the_literal_step_on_the_same_index(name):
    """`sensitive` is Algorithm 1 with the mask that is 1 at the index, losses and update."""
    model = build(name)
    kind = nn.Linear if name != "gpt2" else type(model.transformer.h[0].mlp.c_fc)
    index, inputs = index_of(model, kind=kind), batch()
    literal, order = copy.deepcopy(model), sorted(index)
    theta = [literal.get_parameter(name).detach() for name in order]
    wanted = []
    for weight, name in zip(theta, order, strict=True):
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[index[name]] = True
        wanted.append(mask.view_as(weight))

    def loss():
        return loss_fn(literal(**inputs, use_cache=False).logits)

    handle = model_patch.Patch(model, index, eps=EPS)
    plus, minus = handle.losses(inputs, loss_fn, SEED)
    found = zo.sparse_mezo_step(theta, loss, lambda _: wanted, lr=LR, eps=EPS, seed=SEED)
    assert plus.item() == pytest.approx(found[0], rel=1e-6)
    assert minus.item() == pytest.approx(found[1], rel=1e-6)
    handle.update(SEED, -LR * found[2])
    handle.remove()
    for (name, p), q in zip(model.named_parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)
    assert handle.report().endswith("%)") and "in 4 bits" not in handle.report()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("four_bits", [True, False])
def test_probes_change_nothing_and_updates_the_values_alone(four_bits, dtype):
    """100 probes leave every bit; 10 updates change the k values and no other stored bit."""
    model = build("llama", dtype)
    index, inputs = index_of(model), batch()
    if four_bits:
        in_four_bits(model, index)

    def stored():
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, quant.DenseSparseLinear):
                found[name], found[name + ".values"] = module.codes.clone(), module.values.clone()
                found[name + ".scales"] = module.state.absmax.clone()
        return found

    handle = model_patch.Patch(model, index, eps=EPS)
    before = stored()
    for step in range(100):
        handle.losses(inputs, loss_fn, zo.step_seed(1, step))
    assert all(bitwise(before[name], value) for name, value in stored().items())
    for step in range(10):
        handle.update(zo.step_seed(1, step), 0.01)
    for name, value in stored().items():
        if name in index:  # 16 bits: outside the index every bit is as it was
            rest = torch.ones(value.numel(), dtype=torch.bool)
            rest[index[name]] = False
            assert bitwise(value.flatten()[rest], before[name].flatten()[rest])
            assert not bitwise(value, before[name])
        else:
            assert bitwise(value, before[name]) != name.endswith(".values"), name


def test_small_updates_add_up_in_the_values():
    """An update of 1e-6, lost in bf16 weights, arrives in the fp32 values."""
    model = build("llama", torch.bfloat16)
    index = index_of(model)
    handle = model_patch.Patch(model, index)
    before = {name: v.clone() for name, v in handle.tensors().items()}
    for _ in range(1000):
        handle.update(SEED, 1e-6)
    for number, name in enumerate(sorted(index)):
        shape = model.get_parameter(name).shape
        z = zo.gaussian(SEED, number, shape).flatten()[index[name]]
        moved = handle.tensors()[name] - before[name]
        torch.testing.assert_close(moved, 1e-3 * z, atol=2e-5, rtol=0.01)
        held = model.get_parameter(name).detach().flatten()[index[name]]
        assert bitwise(held, handle.tensors()[name].bfloat16())


def test_four_bits_and_sixteen_draw_the_same_noise():
    """One seed moves the same values by the same amounts, whatever the dense part is kept in."""
    model = build("llama")
    index = index_of(model)
    handles = [
        model_patch.Patch(m, index)
        for m in (copy.deepcopy(model), in_four_bits(copy.deepcopy(model), index))
    ]
    for handle in handles:
        handle.update(SEED, 0.1)
    for name in index:
        assert bitwise(*(handle.tensors()[name] for handle in handles))
    report = handles[1].report()
    assert f"{len(index)} matrices are in 4 bits" in report
    total = sum(p.numel() for p in model.parameters())
    assert f"of {total:,} weights move" in report
    assert handles[0].active_density() == pytest.approx(1 / 37, rel=0.05)


def test_an_exception_inside_a_probe_leaves_the_16_bit_weight():
    """The k places, scratch inside a probe, hold their values again when the model fails."""
    model = build("llama")
    before = [p.detach().clone() for p in model.parameters()]
    handle = model_patch.Patch(model, index_of(model))
    act = model.model.layers[1].mlp.act_fn
    act.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        handle.losses(batch(), loss_fn, SEED)
    del act.forward
    assert all(bitwise(a, p.detach()) for a, p in zip(before, model.parameters(), strict=True))
    handle.losses(batch(), loss_fn, SEED)


def test_an_index_of_another_model_is_refused():
    """Places beyond a matrix, or a matrix that is not there, never write anywhere."""
    model = build("llama")
    with pytest.raises(UserError, match="layers.9.mlp.up_proj.weight is no contiguous parameter"):
        model_patch.Patch(model, {"model.layers.9.mlp.up_proj.weight": torch.arange(3)})
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match="from 0 to 1535"):
        model_patch.Patch(model, {name: torch.tensor([1, 1536])})


@pytest.mark.parametrize(
    "places",
    [
        torch.ones(1536, dtype=torch.bool),  # a mask as [S] has it
        torch.ones(48, 32, dtype=torch.bool),
        torch.rand(1536),  # scores
        torch.tensor([3, 2]),
        torch.tensor([2, 2]),
        torch.tensor([-1, 2]),
        torch.tensor([9, 2], dtype=torch.uint8),
        torch.tensor([], dtype=torch.int32),
    ],
)
def test_what_is_no_index_is_refused(places):
    """A boolean mask taken for positions would move places 0 and 1, and nothing would say so."""
    model, name = build("llama"), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match="an index is"):
        model_patch.Patch(model, {name: places})
    with pytest.raises(UserError, match="an index is"):
        quant.DenseSparseLinear(model.get_parameter(name), places)


def test_four_bits_keep_to_the_index_that_they_were_made_with():
    """Another index, or a rule, would be ignored by 4-bit layers: refused."""
    model, name = build("llama"), "model.layers.0.mlp.up_proj.weight"
    quant.quantise(model, name, model.get_parameter(name), torch.arange(9), False)
    with pytest.raises(UserError, match="quantised with another index"):
        model_patch.Patch(model, {name: torch.arange(1, 10)})
    with pytest.raises(UserError, match="only the places of an index move"):
        model_patch.Patch(model, masks.SmallWeights(0.25))
    model_patch.Patch(model, {name: torch.arange(9)}).remove()


def test_the_literal_step_helper_is_algorithm_1_too():
    """`models.literal_step`, which other tests compare with, moves by the same rule."""
    model = build("llama")
    plus, minus, grad = literal_step(
        model, lambda theta: [torch.ones_like(t) > 0 for t in theta], batch(), lr=0, eps=EPS, seed=1
    )
    assert grad == pytest.approx((plus - minus) / (2 * EPS))
