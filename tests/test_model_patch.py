"""model_patch.py against the literal Algorithm 1, on tiny random models of many architectures."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, batch, build, loss_of, needs_gpu
from torch import nn

import masks
import quant
import zo
from model_patch import Patch, PerturbedWeight

SEED, EPS, LR = zo.step_seed(3, 14), 1e-3, 1e-2


class LargeWeights(masks.Rule):
    """A rule of one's own, as in YOUR_OWN.md."""

    def prepare(self, weight, stream):
        return masks.threshold(weight, 1 - self.density)

    @staticmethod
    def mask(theta, element, state):
        return theta.abs() > state


RULES = {
    "mezo": masks.Everything(),
    "s-mezo": masks.SmallWeights(0.3),
    "constant": masks.ConstantMask(0.3),
    "packed": masks.PackedMask(0.3),
    "r-mezo": masks.RandomMask(0.3, seed=2),
    "one's own": LargeWeights(0.3),
}
SMALL = RULES["s-mezo"]


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def masks_by(rule, theta):
    """get_masks for the literal algorithm: prepared once, on the original weights."""
    kept = [rule.prepare(t, i) for i, t in enumerate(theta)]

    def get_masks(theta):
        elements = [torch.arange(t.numel(), dtype=torch.int32, device=t.device) for t in theta]
        three = zip(theta, elements, kept, strict=True)
        return [rule.mask(t.view(-1), e, state).view_as(t) for t, e, state in three]

    return get_masks


def moved(model, get_masks, a):
    """An ordinary model at θ + a m⊙z, computed in fp32 and rounded once."""
    model = copy.deepcopy(model)
    theta = [p.detach() for p in model.parameters()]
    for i, (t, mask) in enumerate(zip(theta, get_masks(theta), strict=True)):
        t.copy_(zo.shifted(t, a, mask, zo.gaussian(SEED, i, t.shape, device=t.device)))
    return model


def compare(model, rule, inputs, **how):
    """One step of a patch beside one of the literal Algorithm 1 on a copy."""
    # torch.matmul rounds otherwise where a tensor requires gradients; a perturbed one does not
    literal, before = copy.deepcopy(model).requires_grad_(False), bits(model)
    theta = [p.detach() for p in literal.parameters()]
    get_masks = masks_by(rule, theta)
    minus_model = moved(literal, get_masks, -EPS)
    patch = Patch(model, rule, eps=EPS, rounding="nearest", **how)
    plus, minus = patch.losses(inputs, loss_of, SEED)
    assert all(torch.equal(w.theta, before[w.name]) for w in patch.weights), "a probe wrote to θ"
    assert minus == loss_of(minus_model, inputs)  # it is θ − ε ẑ, rounded once
    old = copy.deepcopy(literal)
    want_plus, want_minus, grad = zo.sparse_mezo_step(
        theta, lambda: loss_of(literal, inputs), get_masks, lr=LR, eps=EPS, seed=SEED
    )
    assert plus.item() == want_plus  # the same arithmetic, so the same bits
    # Algorithm 1 reaches θ − ε ẑ by way of θ + ε ẑ and rounds each time, to θ's dtype
    unit = 4 * torch.finfo(theta[0].dtype).eps
    assert minus.item() == pytest.approx(want_minus, rel=max(unit, 1e-6))
    patch.update(SEED, -LR * grad)
    patch.remove()
    assert list(bits(model)) == list(before)
    assert same(bits(model), bits(moved(old, get_masks, -LR * grad)))
    for (name, p), q in zip(model.named_parameters(), theta, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=unit, atol=unit, msg=name)
    return plus, minus


# ------------------------------------------------------------------ one step is Algorithm 1's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_equals_the_literal_algorithm_1(name, dtype):
    """l⁺ to the bit, l⁻ and the update to rounding, on every architecture."""
    plus, minus = compare(build(name, dtype), SMALL, batch())
    assert plus != minus


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_the_literal_algorithm_1(rule):
    """Masks as stored, packed, random or taken again are the same inside forward as outside."""
    compare(build("llama-tied"), RULES[rule], batch())


def dense_sparse(model, bits, density=0.03):
    """The model split by a random index of its linears."""
    index = masks.random_index(masks.decoder_linears(model), density)
    sparse = quant.DenseSparse(index, bits=bits)
    for name in index:
        sparse.split(model, name)
    return sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("four", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_q_equals_the_literal_algorithm_1_on_k_values(name, four, dtype):
    """[Q]'s step is Algorithm 1 on one vector, with all else as it is, in 4 bits and in 16."""
    model, inputs = build(name, dtype), batch()
    literal = copy.deepcopy(model).requires_grad_(False)
    sparse = dense_sparse(model, 4 if four else 16)
    for name, part in sparse.parts.items():
        if four:
            literal.get_parameter(name).detach().copy_(part.dense(None))
    before, values = bits(model), sparse.values.clone()

    def loss():
        for name, places in sparse.index.items():
            flat = literal.get_parameter(name).detach().view(-1)
            flat[places.long()] = values[sparse.slices[name]].to(dtype)
        return loss_of(literal, inputs)

    patch = Patch(model, sparse, eps=EPS)
    plus, minus = patch.losses(inputs, loss_of, SEED)
    assert torch.equal(sparse.values, values)
    ones = [torch.ones_like(values, dtype=torch.bool)]
    want = zo.sparse_mezo_step([values], loss, lambda _: ones, lr=LR, eps=EPS, seed=SEED)
    assert plus.item() == want[0]
    # the literal values are off by a rounding in fp32, which 16-bit weights may round on
    assert minus.item() == pytest.approx(want[1], rel=1e-6 if dtype == torch.float32 else 1e-3)
    patch.update(SEED, -LR * want[2])
    torch.testing.assert_close(sparse.values, values, rtol=0, atol=1e-6)
    assert loss_of(model, inputs) == pytest.approx(loss().item(), rel=1e-3)
    patch.remove()
    assert same(before, bits(model))  # nothing but the values has moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_keep_their_bits_through_100_probes(dtype, device="cpu"):
    """θ is bit-identical after 100 pairs of probes, in fp16 and bf16 too."""
    model = build("llama", dtype).to(device)
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    before, inputs = bits(model), {key: tensor.to(device) for key, tensor in batch().items()}
    patch = Patch(model, SMALL)
    for step in range(100):
        plus, minus = patch.losses(inputs, loss_of, zo.step_seed(0, step))
        assert torch.isfinite(plus) and plus != minus
    patch.remove()
    assert same(before, bits(model))


def test_probe_and_update_use_the_same_noise_and_mask():
    """An update by a = ε gives the very weights that l⁺ was computed with."""
    model, inputs = build("qwen3").requires_grad_(False), batch()
    patch = Patch(model, SMALL, eps=EPS)
    plus, _ = patch.losses(inputs, loss_of, SEED)
    patch.update(SEED, EPS)
    patch.remove()
    assert loss_of(model, inputs) == plus


def test_a_mask_in_parts_is_the_whole_mask():
    """Of a weight that is larger than a part, each element has its own m, whatever the rule."""
    layer = torch.nn.Linear(1, (1 << 22) + 5, bias=False).eval()
    element = torch.arange(layer.weight.numel(), dtype=torch.int32)
    for rule in (masks.SmallWeights(0.3), masks.PackedMask(0.3), masks.RandomMask(0.3)):
        patch = Patch(layer, rule)
        (weight,) = patch.weights
        whole = rule.mask(weight.theta.view(-1), element, weight.state)
        assert torch.equal(weight.mask().view(-1), whole)
        assert patch.active_density() == int(whole.sum()) / whole.numel()
        patch.remove()


def test_tied_weights_move_once_and_stay_tied():
    """A tied head and embedding are one parameter: alike in a probe, updated once, and tied."""
    model = build("llama-tied")
    head, embedding = model.lm_head, model.model.embed_tokens
    start = head.weight.detach().clone()
    patch = Patch(model, masks.Everything())
    assert [w.name for w in patch.weights].count("model.embed_tokens.weight") == 1
    with patch.probe(SEED, EPS):
        assert torch.equal(head.weight, embedding.weight) and not torch.equal(head.weight, start)
        assert head.weight is head.weight  # a layer that asks twice gets one copy
    patch.update(SEED, 0.1)
    patch.remove()
    assert head.weight is embedding.weight
    z = zo.gaussian(SEED, 0, start.shape)
    assert torch.equal(head.weight, zo.shifted(start, torch.tensor(0.1), torch.tensor(True), z))


def test_a_weight_that_lies_transposed_moves_like_any_other():
    """How a parameter lies in memory changes nothing about its noise."""
    model, other = build("llama"), build("llama")
    other.lm_head.weight.data = other.lm_head.weight.data.T.contiguous().T
    for which in (model, other):
        patch = Patch(which, SMALL)
        patch.losses(batch(), loss_of, SEED)
        patch.update(SEED, 0.1)
        patch.remove()
    assert same(bits(model), bits(other))


@pytest.mark.parametrize("order", [torch.t, lambda w: w.view(4, 6)])
def test_two_parameters_in_one_memory_are_refused(order):
    """Each would be masked and moved by itself, and the second from what the first became."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).eval()
    model[1].weight = nn.Parameter(order(model[0].weight.detach()))
    with pytest.raises(ValueError, match=r"^0\.weight lies in the memory of another"):
        Patch(model, SMALL)


def test_columns_of_one_matrix_share_no_element():
    """Parameters that begin at different places of one memory move like any other."""
    both = torch.randn(6, 11)  # columns of one matrix share no element
    parts = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)).eval()
    parts[0].weight, parts[1].weight = nn.Parameter(both[:, :4]), nn.Parameter(both[:, 4:10])
    Patch(parts, SMALL).update(SEED, 0.1)
    z = zo.gaussian(SEED, 0, (6, 4))
    patch = masks.get_mask(both[:, :4], masks.threshold(both[:, :4], SMALL.density))
    want = zo.shifted(both[:, :4], torch.tensor(0.1), patch, z)
    assert torch.equal(parts[0].weight, want)


def test_small_updates_of_16_bit_weights_arrive_by_stochastic_rounding():
    """An update below half the spacing moves some weights by one unit, and none if to nearest."""
    shares = []
    for rounding in ("stochastic", "nearest"):
        model = build("llama", torch.bfloat16)
        before = bits(model)
        patch = Patch(model, masks.Everything(), select="mlp", rounding=rounding)
        patch.update(SEED, 1e-6)
        patch.remove()
        after = bits(model)
        large = [name for name in before if "mlp" in name]
        away = torch.cat([(after[n] != before[n])[before[n].abs() > 0.01] for n in large])
        shares.append(away.double().mean().item())
    assert shares[0] > 0.001 and shares[1] == 0


def test_noise_does_not_depend_on_the_global_generator():
    """Reseeding torch changes nothing, and a step leaves the generator where it was."""
    losses = []
    for reseed in (0, 1):
        model = build("gpt-neox")
        torch.manual_seed(reseed)
        state = torch.get_rng_state()
        patch = Patch(model, SMALL)
        losses.append(patch.losses(batch(), loss_of, SEED))
        patch.update(SEED, 0.01)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]


def test_fused_probes_equal_eager_ones():
    """One compiled loop for noise, mask and add differs from the lines as written by rounding."""
    patches = [Patch(build("llama-tied"), SMALL, fused=fused) for fused in (False, True)]
    eager, fused = (torch.stack(patch.losses(batch(), loss_of, SEED)) for patch in patches)
    torch.testing.assert_close(fused, eager, rtol=1e-6, atol=0)


# ------------------------------------------------------------------ scratch memory


class Toy(nn.Module):
    """A causal LM in outline, with something unusual in the middle."""

    def __init__(self, middle):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(96, 8), middle, nn.Linear(8, 96)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.middle(self.embed(input_ids))
        return type("Output", (), {"logits": self.head(hidden)})()


class Middle(nn.Module):
    """Three linears, an own weight and four experts, for the ways of reading them below."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.own = nn.Parameter(torch.randn(8, 8))
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
        self.listed = nn.ParameterList(torch.randn(8, 8) for _ in range(4))
        self.stacked = nn.Parameter(torch.randn(4, 8, 8))

    def everything_in_turn(self, x):
        """Reads all that the ways below do not, each dropped at once."""
        for layer in (self.a, self.b, self.c, *self.experts):
            x = x + layer(x)
        for weight in (self.own, *self.listed, *self.stacked):
            x = x + x @ weight
        return x.tanh()


class Concatenates(Middle):
    """Reads two children's weights and computes with both."""

    def forward(self, x):
        weight = torch.cat([self.a.weight, self.b.weight])
        both = torch.stack([self.b.weight, self.own, self.c.weight]).sum(0)
        return self.everything_in_turn(x @ weight.T[:, :8] + x @ weight.T[:, 8:] + x @ both)


class KeepsAView(Middle):
    """Holds parts of weights, not the tensors that it read, while others compute."""

    def forward(self, x):
        row, column, own = self.a.weight[3], self.b.weight.T[:, :2], self.own.view(-1)[8:16]
        y = self.everything_in_turn(x)
        return y * row + (x @ column).sum(-1, keepdim=True) + y * own


class ReadsOneOften(Middle):
    """Reads one weight many times, between reads of its neighbours, and keeps what it got."""

    def forward(self, x):
        got = []
        for other in (self.b, self.c, *self.experts):
            got += [self.a.weight, other.weight, self.own, self.a.weight]
        y = self.everything_in_turn(x)
        return y + sum(x @ weight for weight in got) / len(got)


class LoopsOverExperts(Middle):
    """Experts one after the other: modules, members of a list, slices of a stacked parameter."""

    def forward(self, x):
        kept, y = [], x
        for i, expert in enumerate(self.experts):
            y = y + expert(y) + y @ self.listed[i] + y @ self.stacked[i]
            kept += [expert.weight, self.listed[i], self.stacked[i]]
        return self.everything_in_turn(y + sum(x @ weight for weight in kept))


class WrapsAnother(Middle):
    """Reads a weight of its own before its children compute, and uses it after."""

    def forward(self, x):
        own, bias = self.own, self.a.bias
        return self.everything_in_turn(x) @ own + bias


@pytest.mark.parametrize(
    "middle", [Concatenates, KeepsAView, ReadsOneOften, LoopsOverExperts, WrapsAnother]
)
def test_weights_that_are_alive_at_once_share_no_memory(middle):
    """However a module reads and keeps its weights, a step is the literal Algorithm 1's."""
    torch.manual_seed(0)
    model = Toy(middle()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.2)
    compare(model, masks.Everything(), batch())


HOLD = [  # ways of keeping a weight's memory
    lambda w: w,
    lambda w: w.t(),
    lambda w: w.view(-1)[1:],
    lambda w: w.detach(),
    lambda w: w.data[-1:],
    lambda w: w.expand(2, *w.shape),
    lambda w: w.view(torch.uint8),
    lambda w: w.numpy(),
    lambda w: nn.Parameter(w),
]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_read_ever_overwrites_what_somebody_holds(data):
    """Any sequence of reads, in and after probes: what was read stays what it was, while kept."""
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in ((4, 6), (6, 4), (3, 5), (8, 8), (1, 2))]
    layers += [nn.Linear(4, 6).half(), nn.Linear(2, 2).double()]
    layers[1].tied = layers[0].weight
    model = nn.ModuleList(layers).eval()
    patch = Patch(model, masks.Everything())
    names = [(layer, n) for layer in layers for n in ("weight", "bias")] + [(layers[1], "tied")]
    streams = {id(w.parameter): (w.parameter.detach(), w.stream) for w in patch.weights}
    originals = [streams[id(layer._parameters[n])] for layer, n in names]
    held = []
    for a in data.draw(st.lists(st.sampled_from([EPS, -EPS]), min_size=1, max_size=3)):
        with patch.probe(SEED, a), torch.no_grad():
            for _ in range(data.draw(st.integers(1, 12))):
                which = data.draw(st.integers(0, len(names) - 1))
                (layer, name), (theta, stream) = names[which], originals[which]
                keep = data.draw(st.sampled_from(HOLD))
                z = zo.gaussian(SEED, stream, theta.shape)
                want = zo.shifted(theta, torch.tensor(a), torch.tensor(True), z).to(theta.dtype)
                held.append((keep(getattr(layer, name)), keep(want)))
                if data.draw(st.booleans()):
                    del held[data.draw(st.integers(0, len(held) - 1))]
                for got, want in held:
                    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


def test_a_probe_draws_every_weight_once(monkeypatch):
    """Also a tied one, whose layers are the model's first and its last."""
    patch, drawn = Patch(build("llama-tied"), SMALL), []
    add = PerturbedWeight.add
    monkeypatch.setattr(
        PerturbedWeight, "add", lambda self, *a, **k: drawn.append(self.name) or add(self, *a, **k)
    )
    patch.losses(batch(), loss_of, SEED)
    assert sorted(drawn) == sorted([w.name for w in patch.weights] * 2)


def test_a_loss_may_run_its_passes_in_threads():
    """l⁺ and l⁻ are those of the same passes one after the other."""
    patch, parts = Patch(build("llama"), SMALL), [batch()] * 8

    def in_threads(model, parts):
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(lambda part: float(loss_of(model, part)), parts))

    want = patch.losses(parts, lambda m, parts: sum(float(loss_of(m, p)) for p in parts), SEED)
    for _ in range(2):
        assert patch.losses(parts, in_threads, SEED) == want


def test_a_loss_may_write_to_one_place():
    """l⁺ is kept where a loss function puts l⁻ into the same tensor."""
    patch, place = Patch(build("llama"), SMALL), torch.zeros((), dtype=torch.float64)
    want = patch.losses(batch(), loss_of, SEED)
    assert patch.losses(batch(), lambda m, b: place.copy_(loss_of(m, b)), SEED) == want


@pytest.mark.parametrize("kind", [np.uint64, np.int64, int, lambda n: torch.tensor(n).byte()])
def test_a_loss_may_be_an_integer(kind):
    """The slope of counts is theirs, also where l⁺ is below l⁻ and neither has a sign."""
    patch, counts = Patch(build("llama"), SMALL), iter([3, 5])
    losses = patch.losses(batch(), lambda m, b: (m(**b), kind(next(counts)))[1], SEED)
    assert float(zo.projected_grad(*losses, 1.0)) == -1


def test_a_loop_inside_autocast_sees_its_updates():
    """autocast keeps 16-bit casts of weights, which an update in place makes old."""
    model = build("llama")
    patch = Patch(model, SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        loss_of(model, batch())
        patch.update(SEED, 1.0)
        inside = loss_of(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert loss_of(model, batch()) == inside


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "gpt2"])
def test_copies_do_not_pile_up(name):
    """The copies never fill more than twice the largest layer's weights, and the tied ones."""
    model, sizes = build(name), []
    tied = model.lm_head.weight if name != "llama" else torch.empty(0)
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    patch = Patch(model, masks.Everything())

    def count(*_):
        sizes.append(sum(buffer.memory.numel() for buffer in patch.buffers))

    for module in model.modules():
        module.register_forward_hook(count)
    patch.losses(batch(), loss_of, SEED)
    assert 0 < max(sizes) <= 2 * max(layers) + tied.numel()


# ------------------------------------------------------------------ what is around a step


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_probe_leaves_an_ordinary_model(error):
    """The model computes at θ again, and the next probe is as if nothing had happened."""
    model, inputs = build("llama"), batch()
    plain = loss_of(model, inputs)
    patch = Patch(model, SMALL)
    want = patch.losses(inputs, loss_of, SEED)

    def fails(model, batch):
        raise error

    hook = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: fails(0, 0))
    for loss in (loss_of, fails):  # in the middle of forward, and after it
        with pytest.raises(error):
            patch.losses(inputs, loss, SEED)
        hook.remove()
        assert loss_of(model, inputs) == plain
    assert patch.losses(inputs, loss_of, SEED) == want


def test_values_that_cannot_be_made_leave_no_probe_open(monkeypatch):
    """Where memory is short for [Q]'s values, the next probe is as if nothing had happened."""
    model, inputs = build("llama"), batch()
    patch = Patch(model, dense_sparse(model, 4))
    plain, want = loss_of(model, inputs), patch.losses(inputs, loss_of, SEED)
    with monkeypatch.context() as short, pytest.raises(torch.OutOfMemoryError):
        short.setattr(patch, "scratch", fails_for_memory)
        patch.losses(inputs, loss_of, SEED)
    assert loss_of(model, inputs) == plain and patch.losses(inputs, loss_of, SEED) == want


def fails_for_memory(like):
    raise torch.OutOfMemoryError


def test_remove_gives_an_ordinary_model_back(tmp_path):
    """Names, their order, classes and ties are as before, and the model saves and reloads."""
    from transformers import AutoModelForCausalLM

    for name in ("llama-tied", "opt", "mamba"):
        model, fresh, inputs = build(name), build(name), batch()
        patch = Patch(model, masks.Everything(), select="weight")  # of two parameters the first
        patch.update(SEED, 0.01)
        updated = loss_of(model, inputs)
        patch.remove()
        assert list(model.state_dict()) == list(fresh.state_dict())
        for (n, module), (m, other) in zip(
            model.named_modules(), fresh.named_modules(), strict=True
        ):
            assert (n, type(module)) == (m, type(other))
            assert list(vars(module)) == list(vars(other))
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert loss_of(again, inputs) == loss_of(model, inputs) == updated
        compare(model, SMALL, inputs)  # and can be patched again


def test_a_copy_of_a_patched_model_is_a_model_of_its_own():
    """deepcopy follows neither updates, probes nor `remove` of the original; a patch copies too."""
    model, inputs = build("llama-tied"), batch()
    plain = loss_of(model, inputs)
    patch = Patch(model, masks.Everything(), eps=EPS)
    want = patch.losses(inputs, loss_of, SEED)
    copied, other = copy.deepcopy(model), copy.deepcopy(patch)
    assert other.buffers and all(buffer.is_free() for buffer in other.buffers)
    assert other.losses(inputs, loss_of, SEED) == want
    with patch.probe(SEED, 0.1):
        assert loss_of(copied, inputs) == plain != loss_of(model, inputs)
    patch.update(SEED, 0.1)
    assert loss_of(copied, inputs) == plain != loss_of(model, inputs)
    patch.remove()
    assert loss_of(copied, inputs) == plain
    other.update(SEED, 0.1)
    assert loss_of(other.model, inputs) == loss_of(model, inputs)
    other.remove()
    assert same(bits(other.model), bits(model))


def test_the_modes_and_models_that_cannot_be_patched_are_refused():
    """Training mode, a second patch, a rule on a split model, another's split, a nested probe."""
    model = build("opt")
    with pytest.raises(ValueError, match="training mode"):
        Patch(model.train(), masks.Everything())
    patch = Patch(model.eval(), masks.Everything())
    for second in (masks.Everything(), quant.DenseSparse({}, bits=16)):
        with pytest.raises(ValueError, match="patched or split already; call remove"):
            Patch(model, second)
    for part in (model, model.model.decoder.layers[1]):
        part.train()
        with pytest.raises(AssertionError, match="training mode"):
            patch.losses(batch(), loss_of, SEED)
        model.eval()
    with patch.probe(SEED, 1e-3), pytest.raises(AssertionError, match="open already"):
        patch.probe(SEED, 1e-3).__enter__()
    split = build("llama")
    sparse = dense_sparse(split, 4)
    with pytest.raises(ValueError, match="reads a weight as another already"):
        sparse.split(split, min(sparse.index))
    with pytest.raises(ValueError, match="patched or split already"):
        Patch(split, masks.Everything())
    for other in (build("llama"), copy.deepcopy(split)):  # their layers do not read its values
        with pytest.raises(ValueError, match="is not split in this model"):
            Patch(other, sparse)
    patch = Patch(split, sparse)
    with pytest.raises(ValueError, match="patched or split already"):
        Patch(split, sparse)
    quant.join(split)
    for step in (lambda: patch.losses(batch(), loss_of, SEED), lambda: patch.update(SEED, 0.1)):
        with pytest.raises(AssertionError, match="or its model joined"):
            step()
    with pytest.raises(ValueError, match="all values of a DenseSparse move"):
        Patch(split, sparse, select="up_proj")


def test_a_module_with_a_parametrization_of_its_own_keeps_it():
    """A probe reads what that makes of the perturbed tensors, and `remove` leaves it in place."""
    model = build("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.bias = nn.Parameter(torch.zeros(48))
    nn.utils.parametrizations.weight_norm(layer, "weight")
    literal, before = copy.deepcopy(model.eval()), bits(model)
    theta = [p.detach() for p in literal.parameters()]
    zo.perturb_parameters(theta, EPS, SEED, [torch.ones_like(t, dtype=torch.bool) for t in theta])
    patch = Patch(model, masks.Everything(), eps=EPS)
    assert patch.losses(batch(), loss_of, SEED)[0] == loss_of(literal, batch())
    patch.remove()
    assert same(bits(model), before) and nn.utils.parametrize.is_parametrized(layer, "weight")


def test_a_tied_weight_that_one_layer_reads_in_another_way_is_left_alone():
    """The second layer is looked at before the first is changed, by a patch and by a split."""
    model = build("llama-tied")
    quant.read_as(model.lm_head, "weight", lambda theta: 2 * theta)
    before, name = bits(model), "model.embed_tokens.weight"
    sparse = quant.DenseSparse({name: torch.arange(3, dtype=torch.int32)})
    for change in (lambda: Patch(model, masks.Everything()), lambda: sparse.split(model, name)):
        with pytest.raises(ValueError, match=f"{name}: its module reads a weight as another"):
            change()
        assert [m for m in model.modules() if quant.answers(m)] == [model.lm_head]
        assert same(bits(model), before)


def test_a_layer_that_reads_a_weight_in_another_way_is_not_patched():
    """Neither way of reading may replace the other, nor be undone with it."""
    model = build("llama")
    layer, inputs = model.model.layers[1].mlp.up_proj, batch()
    quant.read_as(layer, "weight", lambda theta: 2 * theta)
    before = loss_of(model, inputs)
    with pytest.raises(ValueError, match="up_proj.weight: its module reads a weight as another"):
        Patch(model, masks.Everything())
    with pytest.raises(ValueError, match="reads a weight as another"):
        quant.read_as(layer, "weight", lambda theta: 3 * theta)
    assert loss_of(model, inputs) == before
    quant.read_plainly(layer)
    assert type(layer) is nn.Linear and loss_of(model, inputs) != before


def test_a_parameter_that_was_replaced_is_not_read():
    """The patch has the old one: a probe of it would be another model's."""
    model = build("llama")
    patch = Patch(model, masks.Everything())
    model.load_state_dict(build("llama").state_dict(), assign=True)
    with pytest.raises(AssertionError, match="embed_tokens.weight was replaced after patching"):
        patch.losses(batch(), loss_of, SEED)


def test_an_error_of_a_rule_is_not_hidden():
    """Not even an AttributeError, after which nn.Module would look for the parameter itself."""

    class Typo(masks.Everything):
        @staticmethod
        def mask(theta, element, state):
            return theta.abss() < 1

    patch = Patch(build("llama"), Typo())
    with pytest.raises(RuntimeError, match="weight: 'Tensor' object has no attribute 'abss'"):
        patch.losses(batch(), loss_of, SEED)


def test_weights_that_cannot_move_are_refused_by_name():
    """Integer codes, NaN, and a parameter that no forward reads: one line with the name."""
    model = Toy(nn.Linear(8, 8)).eval()
    model.middle.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^middle\.weight \(torch\.uint8\) cannot move"):
        Patch(model, masks.Everything())
    model.middle = nn.Linear(8, 8)
    model.middle.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"^middle\.bias: .*NaN"):
        Patch(model.eval(), SMALL)
    model.middle = nn.Linear(8, 8)
    model.spare = nn.Linear(3, 3)
    patch = Patch(model.eval(), masks.Everything())
    with pytest.raises(ValueError, match=r"no forward reads spare\.weight \(2 such"):
        patch.losses(batch(), loss_of, SEED)
    patch.remove()
    patch = Patch(model, masks.Everything(), select="^(?!spare)")
    patch.losses(batch(), loss_of, SEED)


def test_numbers_that_cannot_be_meant_never_reach_the_weights():
    """An update that is NaN or infinite, and a seed that does not fit, are refused."""
    model = build("llama")
    before, patch = bits(model), Patch(model, masks.Everything())
    for a in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(AssertionError, match="skip the step"):
            patch.update(SEED, a)
    for seed in (-1, 1 << 63):
        with pytest.raises(AssertionError, match="does not fit"):
            patch.losses(batch(), loss_of, seed)
    patch.remove()
    assert same(before, bits(model))
    with pytest.raises(AssertionError, match="was removed"):  # its two losses would be equal
        patch.losses(batch(), loss_of, SEED)
    with pytest.raises(AssertionError, match="was removed"):
        patch.update(SEED, 1.0)
    with pytest.raises(ValueError, match="stochastic or nearest"):  # or it would mean nearest
        Patch(model, masks.Everything(), rounding="stochasitc")


def test_select_moves_only_what_it_names():
    """A regular expression picks the tensors; the streams of the others do not shift."""
    model, whole, start = build("llama"), build("llama"), bits(build("llama"))
    for which, select in ((model, "norm"), (whole, "")):
        patch = Patch(which, masks.Everything(), select=select)
        patch.update(SEED, 1.0)
        patch.remove()
    moved = bits(whole)
    assert same(bits(model), {n: moved[n] if "norm" in n else start[n] for n in start})
    with pytest.raises(ValueError, match="no parameter's name matches 'nothing-like-this'"):
        Patch(build("llama"), masks.Everything(), select="nothing-like-this")


def test_a_constant_mask_stays_or_is_taken_again_by_the_same_threshold():
    """With refresh_every = k it is taken every k steps, by the threshold of before training."""
    for kind, every in itertools.product((masks.ConstantMask, masks.PackedMask), (0, 4)):
        patch = Patch(build("llama"), kind(0.3, refresh_every=every))
        weight = patch.weights[0]
        before, theta = weight.mask(), weight.parameter.data
        h = masks.threshold(theta, 0.3)
        theta.copy_(torch.randn_like(theta))
        patch.refresh(3)
        assert torch.equal(weight.mask(), before)
        patch.refresh(4)
        assert torch.equal(weight.mask(), masks.get_mask(theta, h) if every else before)


def test_models_that_share_a_rule_have_thresholds_of_their_own():
    """A second model with the same rule, and larger weights, does not change the first's mask."""
    for kind in (masks.ConstantMask, masks.PackedMask):
        rule, large = kind(0.3, refresh_every=4), build("llama")
        patch = Patch(build("llama"), rule)
        before = patch.active()
        for p in large.parameters():
            p.data.mul_(10)
        Patch(large, rule)
        patch.refresh(4)
        assert patch.active() == before


def test_the_threshold_stays_or_is_refreshed():
    """h is fixed before training; with refresh_every = k it is taken again every k steps."""
    fixed = Patch(build("llama"), masks.SmallWeights(0.3))
    refreshed = Patch(build("llama"), masks.SmallWeights(0.3, refresh_every=4))
    for patch in (fixed, refreshed):
        for weight in patch.weights:
            weight.parameter.data.mul_(2)
        for step in range(4):
            patch.refresh(step)
        assert patch.active_density() < 0.2
        patch.refresh(4)
    assert fixed.active_density() < 0.2
    assert refreshed.active_density() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("rule", [masks.SmallWeights(0.25), LargeWeights(0.25)])
def test_the_active_density_is_the_share_inside_the_mask_now(rule):
    """Counted over all moving tensors from the weights of now, and said by str(patch)."""
    model = build("llama")
    patch, theta = Patch(model, rule), [p.detach() for p in model.parameters()]
    get_masks, total = masks_by(rule, theta), sum(t.numel() for t in theta)
    for a in (0.0, 0.05):
        patch.update(SEED, a)
        count = sum(int(mask.sum()) for mask in get_masks(theta))
        assert patch.active_density() == count / total
        assert str(patch) == f"{count:,} of {total:,} weights move, in {len(theta)} tensors"
    assert abs(count / total - 0.25) > 0.01


# ------------------------------------------------------------------ on a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_on_a_gpu_a_step_equals_the_literal_algorithm_1(rule, dtype):
    """On CUDA too: l⁺ to the bit, l⁻ and the update to rounding."""
    inputs = {key: tensor.cuda() for key, tensor in batch().items()}
    compare(build("llama-tied", dtype).cuda(), RULES[rule], inputs)
    z = zo.gaussian(SEED, 5, (1001,), device="cuda").cpu()
    torch.testing.assert_close(z, zo.gaussian(SEED, 5, (1001,)), rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_weights_keep_their_bits(dtype):
    """θ is bit-identical after 100 pairs of probes on CUDA, too."""
    test_weights_keep_their_bits_through_100_probes(dtype, "cuda")


@needs_gpu
def test_on_a_gpu_a_probe_needs_one_layer_more():
    """The peak of a probe is that of a plain forward and a copy of the largest tensors."""
    model, inputs = build("llama").cuda(), {key: value.cuda() for key, value in batch().items()}
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    patch = Patch(model, SMALL)
    peaks = []
    for step in (lambda: loss_of(model, inputs), lambda: patch.losses(inputs, loss_of, SEED)):
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated())
    eager = 12 * 4 * 2**16 * 2  # its temporaries: no tensor of this model is longer
    assert peaks[1] <= peaks[0] + 2 * largest + eager


@needs_gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_on_a_gpu_fused_equals_eager(rule, dtype, rounding):
    """The Triton loop probes and updates as the lines as written do, to the last bit of z."""
    inputs = {key: tensor.cuda() for key, tensor in batch().items()}
    models, losses = [build("llama-tied", dtype).cuda() for _ in range(2)], []
    for model, fused in zip(models, (False, True), strict=True):
        before = bits(model)
        patch = Patch(model, RULES[rule], eps=EPS, rounding=rounding, fused=fused)
        losses.append(torch.stack(patch.losses(inputs, loss_of, SEED)))
        assert all(torch.equal(w.parameter, before[w.name]) for w in patch.weights)
        patch.update(SEED, 0.01)
        patch.remove()
    unit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(*losses, rtol=max(unit, 1e-5), atol=0)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=unit, atol=max(unit / 100, 1e-6))


@needs_gpu
@pytest.mark.parametrize("four", [True, False])
def test_on_a_gpu_q_is_the_literal_step_on_k_values(four):
    """Values move by a z, and the layers compute with them, in 4 bits and in 16."""
    if four:
        pytest.importorskip("bitsandbytes")
    model, inputs = build("llama", torch.bfloat16).cuda(), batch()
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
    index = masks.random_index(masks.decoder_linears(model), 0.03)
    sparse = quant.DenseSparse(index, bits=4 if four else 16, device="cuda")
    for name in index:
        sparse.split(model, name)
    patch, start = Patch(model, sparse, eps=EPS), sparse.values.clone()
    plus, minus = patch.losses(inputs, loss_of, SEED)
    z = zo.gaussian(SEED, 0, start.shape, device="cuda")
    for loss, a in ((plus, EPS), (minus, -EPS)):
        sparse.values.copy_(start + a * z)
        assert loss_of(model, inputs) == loss
    sparse.values.copy_(start)
    patch.update(SEED, 0.1)
    torch.testing.assert_close(sparse.values, start + 0.1 * z)
