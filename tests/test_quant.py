"""quant.py: w = dense + sparse, in 4 and in 16 bits. Steps of [Q] are in test_model_patch.py."""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build, loss_fn, loss_of
from torch import nn

import masks
import quant
import zo
from harness import loading
from model_patch import Patch

EPS, SEED = 1e-3, zo.step_seed(5, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_weight(rows=64, columns=96, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def split_one(weight, places, bits=4):
    """(module, its Parts) of one matrix."""
    model = nn.Linear(*weight.shape[::-1], bias=False).to(weight.dtype).eval()
    model.weight.data.copy_(weight)
    sparse = quant.DenseSparse({"weight": places}, bits=bits)
    sparse.split(model, "weight")
    return model, sparse.parts["weight"]


def index_of(model, density=0.03):
    return masks.random_index(masks.decoder_linears(model), density)


def split(model, bits, index=None, codebooks=None):
    index = index_of(model) if index is None else index
    sparse = quant.DenseSparse(index, bits=bits, codebooks=codebooks)
    for name in sparse.index:
        sparse.split(model, name)
    return sparse


def bitwise(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def values(parameters):
    return {name: p.detach().clone() for name, p in parameters}


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


# ------------------------------------------------------------------ k-means


NOWHERE = torch.tensor([], dtype=torch.int32)


def fitted(weight, scores, places=NOWHERE):
    """The weights that codes and codebooks stand for."""
    return quant.Codebooks(*quant.Codebooks.fit(weight, scores, places), weight).decode()


def heavy(rows, columns, seed=0):
    """Scores as real ones are: a few of them hold most of the sum."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 4


def least_error(w, f, k=16):
    """Of one row, by dynamic programming over the ends of k runs of its sorted weights."""
    f = f[w.argsort()].double()
    w = w.sort().values.double()
    n, cost = len(w), torch.full((len(w) + 1, len(w) + 1), float("inf"), dtype=torch.float64)
    for start in range(n):
        mass, moment, square = (x[start:].cumsum(0) for x in (f, f * w, f * w * w))
        cost[start, start + 1 :] = square - moment**2 / mass
        cost[start, start] = 0
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[n])


def test_of_a_normal_row_the_levels_are_lloyd_and_maxs():
    """With equal weights k-means finds Max's table of 1960; NF4's scales are worth more there."""
    table = [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]
    w = torch.distributions.Normal(0, 1).icdf((torch.arange(1 << 16) + 0.5) / (1 << 16))[None]
    codes, levels = quant.kmeans(w, torch.ones_like(w), rounds=1000)
    want = torch.tensor([-x for x in reversed(table)] + table)
    torch.testing.assert_close(levels[0], want, atol=0.01, rtol=0)
    error = (w - levels.gather(1, codes.long())).square().mean()
    assert float(error) == pytest.approx(0.009497, rel=0.01)
    shuffled = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    nf4 = quant.nf4_decode(*quant.nf4_encode(shuffled)) - shuffled
    assert float(nf4.square().mean()) == pytest.approx(0.0085, rel=0.02)


@pytest.mark.parametrize("columns, outlier", [(40, None), (200, None), (600, None), (600, -30.0)])
def test_the_error_is_close_to_the_least(columns, outlier):
    """Σ F (w − level)² is in no row below the least there is, and in all 2 % more at most."""
    w, f = some_weight(24, columns), heavy(24, columns)
    if outlier is not None:
        w[:, 7] = outlier
    error = (f * (w - fitted(w, f)) ** 2).double().sum(1)
    least = torch.tensor([least_error(*row) for row in zip(w, f, strict=True)])
    assert (error > 0.999 * least).all() and error.sum() < 1.02 * least.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 300), (5, 21), (1, 7), (40, 1)])
def test_sixteen_different_weights_in_a_row_are_exact(shape, dtype):
    """Each row is met to the bit with levels of its own, also where its scores are 0."""
    generator = torch.Generator().manual_seed(1)
    choices = torch.randn(shape[0], 16, generator=generator).to(dtype)
    weight = choices.gather(1, torch.randint(16, shape, generator=generator))
    scores = heavy(*shape)
    scores[0] = 0
    scores[:, ::3] = 0
    assert bitwise(fitted(weight, scores), weight)
    assert bitwise(fitted(weight, torch.zeros(shape)), weight)


@pytest.mark.parametrize("apart", [50, 2])
def test_what_moves_counts_for_nothing(apart):
    """Whatever stands at the moving places, the rest gets the same levels and codes."""
    weight, scores, places = some_weight(), heavy(64, 96), torch.arange(0, 64 * 96, apart)
    rest = torch.ones(64 * 96, dtype=torch.bool)
    rest[places] = False
    once = fitted(weight, scores, places)
    weight.view(-1)[places] = 10.0
    assert bitwise(once.flatten()[rest], fitted(weight, scores, places).flatten()[rest])


def models_with_scores():
    for name in ("llama", "opt", "gpt2", "mixtral", "phi3"):
        losses = [
            partial(lambda i, m: loss_fn(m(**i, use_cache=False).logits), batch(seed=s))
            for s in range(8)
        ]
        yield build(name), losses
    model = loading.load_model(str(Path(quant.__file__).parent / "tiny/model"))
    rows = torch.randint(100, (8, 1, 32), generator=torch.Generator().manual_seed(0))
    yield model, [partial(lambda i, m: m(i, labels=i, use_cache=False).loss, row) for row in rows]


def test_kmeans_has_no_more_weighted_error_than_nf4():
    """Σ F (w − ŵ)² of what stands still is no more than NF4's, in every matrix of six models."""
    for model, losses in models_with_scores():
        scores = masks.fisher(model, losses)
        index = masks.sensitive(scores, 0.01)
        for name, places in index.items():
            w, f = model.get_parameter(name).detach(), scores[name].clone()
            layer, part = split_one(w, places)
            f.view(-1)[places.long()] = 0
            ours, nf4 = fitted(w, scores[name], places), part.dense(layer.weight)
            assert (f * (w - ours) ** 2).sum() <= (f * (w - nf4) ** 2).sum(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_model_in_codebooks_is_one_of_its_decoded_weights(name, dtype):
    """It computes, probes, updates and joins as the plain model with those weights does."""
    model, plain, inputs = build(name, dtype), build(name, dtype), batch()
    index, books = index_of(model), {}
    for number, (n, places) in enumerate(index.items()):
        w = plain.get_parameter(n).detach()
        codes, levels = books[n] = quant.Codebooks.fit(w, heavy(*w.shape, number), places)
        decoded, flat = quant.Codebooks(codes, levels, w).decode(), places.long()
        decoded.view(-1)[flat] = w.flatten()[flat]
        w.copy_(decoded)
        assert codes.nbytes == w.numel() / 2 and levels.shape == (len(w), 16)
    sparse, other = split(model, 4, index, books), split(plain, 16, index, books)
    patches = [Patch(model, sparse, eps=EPS), Patch(plain, other, eps=EPS)]
    assert str(patches[0]).endswith(f"the rest of these is in 4-bit k-means ({len(index)})")
    assert patches[0].total == patches[1].total
    losses = [patch.losses(inputs, loss_of, SEED) for patch in patches]
    assert losses[0] == losses[1]
    for patch in patches:
        patch.update(SEED, 0.1)
        patch.remove()
    quant.join(model), quant.join(plain)
    theirs = dict(plain.named_parameters())
    assert all(bitwise(p, theirs[n]) for n, p in model.named_parameters())


# ------------------------------------------------------------------ w = dense + sparse


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_plus_sparse_is_w_at_the_places(dtype, bits):
    """At a place of the index 4 bits hold an exact 0, and dense + sparse is w bit for bit."""
    weight = some_weight(dtype=dtype)
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))[:60]
    places = places.sort().values
    layer, part = split_one(weight, places.int(), bits)
    read = layer.weight.detach()
    assert bitwise(read.flatten()[places], weight.flatten()[places])
    if bits == 16:
        assert bitwise(read, weight)
        return
    assert (part.dense(None).flatten()[places] == 0).all()
    rest = torch.ones(weight.numel(), dtype=torch.bool)
    rest[places] = False
    error = (read - weight).flatten()[rest].float().norm() / weight.float().norm()
    assert 0.05 < error < 0.12  # 0.092 is what NF4 costs on normal weights


def test_blocks_that_straddle_rows_are_unpacked_rightly():
    """Of 96 columns, blocks of 64 cross the rows, and the matrix is what its blocks say."""
    weight = some_weight(64, 96)
    _, part = split_one(weight, torch.tensor([0]))
    weight[0, 0] = 0
    codes, scales = quant.nf4_encode(weight)
    assert torch.equal(part.packed.codes.flatten(), codes[0::2] << 4 | codes[1::2])
    # the scales went through 8 bits, which keeps each to 1 % of the largest
    want = quant.nf4_decode(codes, scales).view_as(weight)
    assert (part.dense(None) - want).abs().max() < 0.01 * scales.max()


def test_a_large_value_does_not_stretch_its_block():
    """Taken out before quantising, an outlier leaves its block's scale to the 63 others."""
    weight = some_weight()
    weight[3, 5] = 10.0  # place 293, of the block from 256 to 319
    errors = []
    for place in (293, 0):
        layer, _ = split_one(weight, torch.tensor([place]))
        errors.append((layer.weight - weight).flatten()[256:320].abs().median())
    assert errors[0] < 0.005 < 0.01 < errors[1]


def test_the_bytes_per_weight_are_those_of_the_docstring():
    """0.5159 bytes per weight in 4 bits, beside 8 bytes of position and 4 of value per place."""
    _, part = split_one(some_weight(512, 512), torch.arange(0, 512 * 512, 1000))
    scales = part.packed.scales.absmax.nbytes + part.packed.scales.state2.absmax.nbytes
    assert (part.packed.codes.nbytes + scales) / 512**2 == pytest.approx(0.5159, abs=1e-4)
    assert part.places.nbytes == 8 * len(part.places)
    assert part.sparse.values.nbytes == 4 * len(part.places)


@pytest.mark.parametrize(
    "places",
    [
        torch.ones(1536, dtype=torch.bool),  # a mask as [S] has it: places 0 and 1 would move
        torch.ones(48, 32, dtype=torch.bool),
        torch.rand(1536),  # scores
        torch.tensor([3, 2]),
        torch.tensor([2, 2]),
        torch.tensor([-1, 2]),
        torch.tensor([1, 1536]),
        torch.tensor([9, 2], dtype=torch.uint8),
        torch.tensor([], dtype=torch.int32),
    ],
)
def test_what_is_no_index_is_refused(places):
    """A mask, scores, places in disorder or beyond the matrix: one line that names the matrix."""
    model, name = build("llama"), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"^{name}: an index is .*") as error:
        quant.DenseSparse({name: places}).split(model, name)
    assert "\n" not in str(error.value)


def test_what_cannot_be_quantised_is_one_line():
    """NaN, and bits that there are not, are refused with a name or value."""
    weight = some_weight()
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="^weight holds NaN or infinity"):
        split_one(weight, torch.tensor([1]))
    with pytest.raises(ValueError, match="bits 8: 4, or 16"):
        quant.DenseSparse({}, bits=8)


# ------------------------------------------------------------------ loading, and back


@pytest.mark.parametrize("name", ["opt", "llama-tied", "gpt2", "gpt-neox", "phi3", "mixtral"])
def test_loading_splits_matrix_by_matrix(name, tmp_path):
    """Split as it is read, once each, a model is the one split after loading, Conv1D too."""
    build(name).save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    whole = loading.load_model(str(tmp_path), device="cpu")
    index, seen, inputs = index_of(whole), [], batch()
    here = quant.DenseSparse(index)

    def take(model, matrix, weight):
        assert torch.equal(weight, whole.get_parameter(matrix))
        seen.append(matrix)
        here.split(model, matrix, weight)

    got = loading.load_model(str(tmp_path), device="cpu", split=take, index=index)
    assert sorted(seen) == sorted(index)
    assert all(part.packed.codes.numel() for part in here.parts.values())
    assert got.num_parameters() < whole.num_parameters()  # no full matrix is left
    there = split(whole, 4, index)
    assert torch.equal(here.values, there.values)
    assert loss_of(got, inputs) == loss_of(whole, inputs)
    losses = [Patch(m, s).losses(inputs, loss_of, SEED) for m, s in ((got, here), (whole, there))]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux alone")
@pytest.mark.parametrize("bits", [4, 16])
def test_a_split_model_lets_its_checkpoint_go(bits, tmp_path):
    """In the file's own dtype, too, nothing of the file is mapped once all is split."""
    build("llama-tied").save_pretrained(tmp_path)
    index = index_of(build("llama-tied"))
    here, seen = quant.DenseSparse(index, bits), []

    def take(model, matrix, weight):
        seen.append(str(tmp_path) in Path("/proc/self/maps").read_text())
        here.split(model, matrix, weight)

    model = loading.load_model(str(tmp_path), "float32", "cpu", split=take, index=index)
    assert all(seen) and model.dtype == torch.float32
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_what_splitting_refuses_ends_loading_with_its_own_line(tmp_path):
    """The message of a refused matrix is the whole message, not transformers' account of it."""
    build("llama").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    index = {name: torch.tensor([3])}

    def refuse(model, matrix, weight):
        raise ValueError(f"{matrix} is not what it was")

    beyond = quant.DenseSparse({name: torch.tensor([5000])}).split
    for take, line in ((refuse, " is not what it was$"), (beyond, ": an index is .* below 1536$")):
        with pytest.raises(ValueError, match=f"^{name}{line}"):
            loading.load_model(str(tmp_path), device="cpu", split=take, index=index)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2"])
def test_join_gives_an_ordinary_model(name, bits, tmp_path):
    """The weights it stood for, under their old names: it computes the same, saves and reloads."""
    from transformers import AutoModelForCausalLM

    model, fresh, inputs = build(name), build(name), batch()
    sparse = split(model, bits)
    patch = Patch(model, sparse)
    patch.update(SEED, 0.05)
    patch.remove()
    want, copied = loss_of(model, inputs), copy.deepcopy(model)
    quant.join(model)
    assert loss_of(model, inputs) == want == loss_of(copied, inputs)
    found, plain = dict(model.named_parameters()), dict(fresh.named_parameters())
    assert found.keys() == plain.keys()
    for (n, module), (m, other) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert (n, type(module)) == (m, type(other))
    for n, p in found.items():
        moved = not torch.equal(p, plain[n])
        assert p.shape == plain[n].shape and moved == (n in sparse.index)
        if bits == 16 and moved:
            assert int((p != plain[n]).sum()) == len(sparse.index[n])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loss_of(again, inputs) == want
    Patch(model, masks.Everything()).losses(inputs, loss_of, SEED)  # it can move otherwise now
    quant.join(copied)
    assert loss_of(copied, inputs) == want


@pytest.mark.parametrize("bits", [4, 16])
def test_tied_matrices_are_split_and_joined_as_one(bits):
    """Two layers with one matrix read the same values, in a probe too, and are tied afterwards."""
    model = nn.ModuleList([nn.Linear(64, 8, bias=False), nn.Linear(64, 8)]).eval()
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    sparse = split(model, bits, {"0.weight": torch.tensor([3, 70, 200])})
    patch = Patch(model, sparse)
    with torch.no_grad(), patch.probe(SEED, 0.1):
        assert torch.equal(model[0].weight, model[1].weight)
        differ = (model[0].weight != before).flatten()
    assert differ[sparse.index["0.weight"]].all() and (bits == 4 or differ.sum() == 3)
    patch.update(SEED, 0.1)
    quant.join(model)
    assert model[0].weight is model[1].weight and isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight.flatten()[sparse.index["0.weight"]], sparse.values)
    assert sorted(dict(model.named_parameters())) == ["0.weight", "1.bias"]


# ------------------------------------------------------------------ what moves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 16])
def test_probes_change_nothing_and_updates_the_values_alone(bits, dtype):
    """30 probes leave every bit; 10 updates change the values, no matrix, code or scale."""
    model, inputs = build("llama", dtype), batch()
    sparse = split(model, bits)

    def stored():
        found = values(model.named_parameters())
        for name, part in sparse.parts.items():
            found[f"{name} places"] = part.places.clone()
            if bits == 4:
                found[f"{name} codes"] = part.packed.codes.clone()
                found[f"{name} scales"] = part.packed.scales.absmax.clone()
        return found

    before, start = stored(), sparse.values.clone()
    if bits == 16:
        plain = values(build("llama", dtype).named_parameters())
        for name in sparse.index:
            assert bitwise(plain[name], before[name])
    patch = Patch(model, sparse, eps=EPS)
    for step in range(30):
        plus, minus = patch.losses(inputs, loss_of, zo.step_seed(1, step))
        assert torch.isfinite(plus) and plus != minus
    assert bitwise(start, sparse.values)
    for step in range(10):
        patch.update(zo.step_seed(1, step), 0.01)
    assert (start != sparse.values).all()
    after = stored()
    assert after.keys() == before.keys()
    assert all(bitwise(after[name], before[name]) for name in before)


def test_small_updates_add_up_in_the_values():
    """An update of 1e-6, lost in bf16 weights, arrives in fp32, and the layer reads it rounded."""
    model = build("llama", torch.bfloat16)
    sparse = split(model, 16)
    patch, before = Patch(model, sparse), sparse.values.clone()
    for _ in range(1000):
        patch.update(SEED, 1e-6)
    z = zo.gaussian(SEED, 0, before.shape)
    torch.testing.assert_close(sparse.values - before, 1e-3 * z, atol=2e-5, rtol=0.01)
    for name, places in sparse.index.items():
        path, _, attribute = name.rpartition(".")
        read = getattr(model.get_submodule(path), attribute).flatten()[places.long()]
        assert bitwise(read, sparse.values[sparse.slices[name]].bfloat16())


def test_four_bits_and_sixteen_draw_the_same_noise():
    """One seed moves the same values by the same amounts, whatever the dense part is kept in."""
    index, vectors = index_of(build("llama")), []
    for bits in (4, 16):
        model = build("llama")
        total = sum(p.numel() for p in model.parameters())
        sparse = split(model, bits, dict(reversed(index.items())))  # in any order
        patch = Patch(model, sparse)
        patch.update(SEED, 0.1)
        vectors.append(sparse.values)
        k, linears = len(sparse.values), masks.decoder_linears(build("llama"))
        assert patch.active_density() == k / sum(w.numel() for w in linears.values())
        assert str(patch) == (
            f"{k:,} of {total:,} weights move, in {len(index)} tensors; "
            f"the rest of these is in {'4-bit NF4' if bits == 4 else 'float32'} ({len(index)})"
        )
    assert bitwise(*vectors)


@pytest.mark.parametrize("bits", [4, 16])
def test_an_exception_inside_a_probe_leaves_the_values(bits):
    """The layers read `values` again when the model has failed in the middle."""
    model, inputs = build("llama"), batch()
    patch = Patch(model, split(model, bits), eps=EPS)
    plain, want = loss_of(model, inputs), patch.losses(inputs, loss_of, SEED)
    hook = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch.losses(inputs, loss_of, SEED)
    hook.remove()
    assert loss_of(model, inputs) == plain
    assert patch.losses(inputs, loss_of, SEED) == want


def test_a_matrix_that_no_forward_reads_is_named():
    """Values that only noise would move are an error with the matrix's name."""
    model = build("llama")
    model.spare = nn.Linear(64, 4).eval()
    sparse = split(model, 4, {"spare.weight": torch.tensor([5]), **index_of(model)})
    with pytest.raises(ValueError, match=r"no forward reads spare\.weight \(1 such"):
        Patch(model, sparse).losses(batch(), loss_of, SEED)
