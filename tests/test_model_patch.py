"""model_patch.py against the literal Algorithm 1, on tiny random models of many architectures."""

import copy
import re
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, batch, build, literal_step, loss_fn
from torch import nn

import masks
import zo
from errors import UserError
from model_patch import Patch

SEED, EPS, LR = zo.step_seed(3, 14), 1e-3, 1e-2
RULES = {
    "mezo": masks.Everything(),
    "s-mezo": masks.SmallWeights(0.3),
    "constant": masks.ConstantMask(0.3),
    "packed": masks.PackedMask(0.3),
    "r-mezo": masks.RandomMask(0.3, seed=2),
}


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def masks_by(rule, model):
    """get_masks for the literal algorithm: prepared once on the original weights."""
    kept = [rule.prepare(p.detach(), i) for i, p in enumerate(model.parameters())]

    def get_masks(theta):
        found = []
        for t, state in zip(theta, kept, strict=True):
            flat = t.reshape(-1)
            found.append(rule.mask(flat, torch.arange(flat.numel()), state).view_as(t))
        return found

    return get_masks


def compare(model, rule, inputs, *, vectors="masked", one_pass=True):
    """One step of the patch beside one of the literal Algorithm 1 on a copy."""
    literal = copy.deepcopy(model)
    handle = Patch(model, rule, eps=EPS, vectors=vectors)
    handle.one_pass = one_pass
    before = bits(model)
    plus, minus = handle.losses(inputs, loss_fn, SEED)
    assert same(before, bits(model)), "a probe wrote to θ"
    want_plus, want_minus, grad = literal_step(
        literal, masks_by(rule, literal), inputs, lr=LR, eps=EPS, seed=SEED
    )
    assert plus.item() == want_plus  # the same arithmetic, so the same bits
    # l⁻: Algorithm 1 reaches θ − ε ẑ through θ + ε ẑ and rounds twice
    assert minus.item() == pytest.approx(want_minus, rel=1e-6)
    handle.update(SEED, -LR * grad)
    for (name, p), q in zip(model.named_parameters(), literal.parameters(), strict=True):
        # the literal θ also carries the rounding of +ε, −2ε, +ε
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)
    return handle


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_pass_equals_the_literal_algorithm_1(name):
    """l⁺ bit for bit, l⁻ and the update to rounding, in one pass, on every architecture."""
    handle = compare(build(name), RULES["s-mezo"], batch())
    assert handle.one_pass, "fell back to two passes"


@pytest.mark.parametrize("name", ["llama-tied", "opt", "mixtral"])
def test_two_passes_equal_the_literal_algorithm_1(name):
    """The fallback, one probe after the other, gives the same numbers."""
    compare(build(name), RULES["s-mezo"], batch(), one_pass=False)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_the_literal_algorithm_1(rule):
    """Masks as stored, packed, random or re-taken are the same inside forward as outside."""
    compare(build("llama-tied"), RULES[rule], batch())


def test_a_batch_with_as_many_rows_as_tokens():
    """Shapes that could be confused (2B = T, 2B = d) are told apart."""
    for rows, tokens in ((4, 8), (16, 32), (16, 16)):
        compare(build("gpt2"), RULES["mezo"], batch(rows, tokens))


def test_tied_weights_are_perturbed_alike():
    """Trap 8: the tied head and embedding move by the same noise, and once."""
    model = build("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    handle = compare(model, RULES["mezo"], batch())
    assert len(handle.moving) == len(list(model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_keep_their_bits_through_100_probes(dtype):
    """Trap 1: θ is bit-identical after 100 probe pairs, in fp16 and bf16 too."""
    model = build("llama", dtype)
    handle, before, inputs = Patch(model, RULES["s-mezo"]), bits(model), batch()
    for step in range(100):
        plus, minus = handle.losses(inputs, loss_fn, zo.step_seed(0, step))
        assert torch.isfinite(plus) and plus != minus
    assert same(before, bits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype):
    """Probes and update of a 16-bit weight are fp32 arithmetic on it, rounded to nearest once."""
    layer = nn.Linear(40, 30, bias=False).to(dtype).eval()
    theta = layer.weight.detach().clone()
    handle = Patch(layer, masks.Everything(), eps=EPS, rounding="nearest")
    z = zo.gaussian(SEED, 0, theta.shape)
    x = torch.eye(40, dtype=dtype)
    with torch.no_grad(), handle._open(SEED, doubled=(80, 0)):
        plus, minus = layer(torch.cat([x, x])).tensor_split(2)
    assert torch.equal(plus.T, (theta.float() + EPS * z).to(dtype))
    assert torch.equal(minus.T, (theta.float() - EPS * z).to(dtype))
    handle.update(SEED, 0.01)
    assert torch.equal(layer.weight, (theta.float() + torch.tensor(0.01) * z).to(dtype))


def test_probe_and_update_use_the_same_noise_and_mask():
    """Trap 4: update by a = ε is the very weight that the plus probe computed with."""
    model, inputs = build("qwen3"), batch()
    handle = Patch(model, RULES["s-mezo"], eps=EPS)
    plus, _ = handle.losses(inputs, loss_fn, SEED)
    handle.update(SEED, EPS)
    handle.remove()
    with torch.no_grad():
        again = loss_fn(model(**inputs, use_cache=False).logits)
    assert again == plus


def test_the_update_goes_downhill():
    """Trap 5: with a = −η g the loss of the batch falls."""
    model, inputs = build("llama"), batch()
    handle = Patch(model, masks.Everything(), eps=EPS)
    losses = []
    for step in range(30):
        seed = zo.step_seed(1, step)
        plus, minus = (loss.item() for loss in handle.losses(inputs, loss_fn, seed))
        handle.update(seed, -1e-3 * zo.projected_grad(plus, minus, EPS))
        losses.append((plus + minus) / 2)
    assert losses[-1] < losses[0] - 0.05


def test_equal_shapes_have_noise_of_their_own():
    """Trap 3: the k and v projections of a layer move differently, layers too."""
    model = build("llama")
    layers = model.model.layers
    pairs = [layers[0].self_attn.k_proj, layers[0].self_attn.v_proj, layers[1].self_attn.k_proj]
    before = [m.weight.detach().clone() for m in pairs]
    Patch(model, masks.Everything()).update(SEED, 0.1)
    moved = [m.weight - b for m, b in zip(pairs, before, strict=True)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        cosine = nn.functional.cosine_similarity(moved[i].flatten(), moved[j].flatten(), dim=0)
        assert abs(cosine) < 6 / moved[i].numel() ** 0.5


class Odd(nn.Module):
    """A causal LM in outline, with something unusual in the middle."""

    def __init__(self, middle):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(96, 8), middle, nn.Linear(8, 96)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        out = self.head(self.middle(self.embed(input_ids)))
        return type("Output", (), {"logits": out})()


class MixesRows(nn.Module):
    """Sorts all tokens of the batch before a linear layer, as some expert routers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        chosen = flat[:, 0] > flat[:, 0].median()
        out = flat.clone()
        out[chosen] = self.linear(flat[chosen])
        return out.view_as(x)


class Nested(nn.Module):
    """Owns a parameter and, inside, a module that owns others."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) * self.scale, {"extra": x}


class First(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


def test_a_module_that_mixes_rows_costs_a_second_pass_not_an_error():
    """Where rows of the probes cannot be told apart, one warning, and the literal numbers."""
    torch.manual_seed(0)
    model = Odd(MixesRows()).eval()
    literal, rule = copy.deepcopy(model), RULES["s-mezo"]
    handle, inputs = Patch(model, rule, eps=EPS), batch()
    with pytest.warns(UserWarning, match="one after the other"):
        plus, minus = handle.losses(inputs, loss_fn, SEED)
    want = literal_step(literal, masks_by(rule, literal), inputs, lr=LR, eps=EPS, seed=SEED)
    assert plus.item() == want[0] and minus.item() == pytest.approx(want[1], rel=1e-6)


def test_modules_inside_modules_that_own_parameters():
    """A module with parameters around another one: each probe stays with its half."""
    torch.manual_seed(0)
    compare(Odd(First(Nested())).eval(), RULES["s-mezo"], batch())


def test_a_parameter_that_forward_never_used_is_named():
    """Pure noise would move it, so it is an error with its name."""
    model = Odd(nn.Linear(8, 8)).eval()
    model.spare = nn.Linear(3, 3).eval()
    handle = Patch(model, masks.Everything())
    with pytest.raises(UserError, match=r"never used spare\.weight, spare\.bias"):
        handle.losses(batch(), loss_fn, SEED)
    handle.remove()
    handle = Patch(model, masks.Everything(), select="^(?!spare)")
    handle.losses(batch(), loss_fn, SEED)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_probe_leaves_an_ordinary_model(error):
    """Out of memory or Ctrl-C in the middle of forward: θ and the forward are as before."""
    model, inputs = build("llama"), batch()
    with torch.no_grad():
        before, plain = bits(model), model(**inputs, use_cache=False).logits
    handle = Patch(model, RULES["s-mezo"])
    norm = model.model.norm

    def interrupt(*args):
        raise error("in the middle")

    hook = norm.register_forward_pre_hook(interrupt)
    inner = model.model.layers[1].mlp.down_proj.register_forward_hook(interrupt)
    with pytest.raises(error):
        handle.losses(inputs, loss_fn, SEED)
    hook.remove(), inner.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, plain)
    assert same(before, bits(model))
    owned = [p for module in model.modules() for p in module._parameters.values()]
    assert all(p is None or isinstance(p, nn.Parameter) for p in owned)
    first, _ = handle.losses(inputs, loss_fn, SEED)  # and the handle still works
    again, _ = handle.losses(inputs, loss_fn, SEED)
    assert first == again


def test_remove_gives_an_ordinary_model_back(tmp_path):
    """After `remove` the model saves and reloads as an ordinary Hugging Face checkpoint."""
    from transformers import AutoModelForCausalLM

    model, inputs = build("llama-tied"), batch()
    handle = Patch(model, masks.Everything())
    handle.update(SEED, 0.01)
    handle.remove()
    assert not any("forward" in m.__dict__ for m in model.modules())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_somebody_elses_wrapper_survives():
    """A forward that was already replaced (as accelerate does) is put back by `remove`."""
    model = build("llama")
    head = model.lm_head
    own, calls = head.forward, []
    head.forward = lambda x: calls.append(1) or own(x)
    theirs = head.forward
    handle = Patch(model, masks.Everything())
    handle.losses(batch(), loss_fn, SEED)
    assert calls == [1, 1]
    handle.remove()
    assert head.forward is theirs


def test_what_cannot_be_meant_is_refused():
    """Another rounding than the two, an ε that is no distance, an update that is NaN."""
    model = build("llama")
    for more in ({"rounding": "neerest"}, {"eps": 0.0}, {"eps": float("nan")}):
        with pytest.raises(UserError, match=next(iter(more))):
            Patch(model, masks.Everything(), **more)
    for which in (masks.SmallWeights, "mask.safetensors"):
        with pytest.raises(UserError, match="give a rule, SmallWeights.* or an index"):
            Patch(model, which)
    handle = Patch(model, masks.Everything())
    before = {name: flat.clone() for name, flat in handle.tensors().items()}
    with pytest.raises(AssertionError, match="skip the step"):
        handle.update(SEED, float("nan"))
    assert all(torch.equal(flat, before[name]) for name, flat in handle.tensors().items())


def test_eps_can_be_changed_between_steps():
    """handle.eps is the ε of the probes and of the slope: as a handle made with it."""
    model, inputs = build("llama"), batch()
    handle = Patch(model, RULES["s-mezo"], eps=EPS)
    before = handle.losses(inputs, loss_fn, SEED)
    handle.eps = 30 * EPS
    found = handle.losses(inputs, loss_fn, SEED)
    handle.remove()
    assert (
        before != found == Patch(model, RULES["s-mezo"], eps=30 * EPS).losses(inputs, loss_fn, SEED)
    )


def cast(model):
    model.to(torch.bfloat16)


def assign(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize("swap", [cast, assign, replace])
def test_weights_that_are_replaced_after_patching_are_noticed(swap):
    """Updates would go to memory that the model does not have any more."""
    model, inputs = build("llama"), batch()
    handle = Patch(model, masks.Everything())
    handle.losses(inputs, loss_fn, SEED)
    swap(model)
    with pytest.raises(UserError, match="another tensor than when it was patched"):
        handle.losses(inputs, loss_fn, SEED)


def test_a_copy_of_a_patched_model_is_a_model_of_its_own():
    """deepcopy keeps the best weights; it neither follows the original nor its probes."""
    model, inputs = build("llama"), batch()
    handle = Patch(model, masks.Everything(), eps=EPS)
    plain = model(**inputs, use_cache=False).logits
    copied = copy.deepcopy(model)
    handle.update(SEED, 0.1)
    assert torch.equal(copied(**inputs, use_cache=False).logits, plain)
    assert not torch.equal(model(**inputs, use_cache=False).logits, plain)
    again = Patch(copied, masks.Everything(), eps=EPS)
    handle.remove()
    plus, minus = again.losses(inputs, loss_fn, SEED)
    assert plus != minus
    again.remove()
    assert torch.equal(copied(**inputs, use_cache=False).logits, plain)


def test_one_handle_per_model_and_none_after_remove():
    """A second handle, or a removed one, would probe nothing; a model can be patched again."""
    model, inputs = build("llama"), batch()
    handle = Patch(model, masks.Everything())
    with pytest.raises(UserError, match="patched already"):
        Patch(model, masks.Everything())
    handle.remove()
    for use in (lambda: handle.losses(inputs, loss_fn, SEED), lambda: handle.update(SEED, 0.1)):
        with pytest.raises(AssertionError, match="removed"):
            use()
    Patch(model, masks.Everything()).losses(inputs, loss_fn, SEED)


@pytest.mark.parametrize("seed", [-1, 1 << 48])
def test_a_seed_beyond_48_bits_is_refused(seed):
    """Its noise could not be drawn again from the log."""
    handle = Patch(build("llama"), masks.Everything())
    with pytest.raises(AssertionError, match="48 bits"):
        handle.losses(batch(), loss_fn, seed)


def test_training_mode_is_refused():
    """Trap 9: dropout would drown the probes, before patching and after."""
    model = build("opt")
    with pytest.raises(UserError, match="training mode"):
        Patch(model.train(), masks.Everything())
    handle = Patch(model.eval(), masks.Everything())
    model.train()
    with pytest.raises(AssertionError, match="training mode"):
        handle.losses(batch(), loss_fn, SEED)


def test_vectors_masked_free_or_frozen():
    """One-dimensional tensors are masked like the rest, move whole, or do not move."""
    for vectors in ("masked", "free", "frozen"):
        model = build("opt")
        before = bits(model)
        handle = Patch(model, masks.SmallWeights(0.3), vectors=vectors)
        handle.losses(batch(), loss_fn, SEED)
        handle.update(SEED, 1.0)
        for p, old in zip(model.parameters(), before, strict=True):
            share = (p != old).double().mean().item()
            if p.dim() > 1 or vectors == "masked":
                assert share == pytest.approx(0.3, abs=0.05)
            else:
                assert share == (1.0 if vectors == "free" else 0.0)


def test_select_moves_only_what_it_names():
    """A regular expression picks the tensors; the streams of the others do not shift."""
    model, whole = build("llama"), build("llama")
    Patch(model, masks.Everything(), select=r"norm").update(SEED, 1.0)
    Patch(whole, masks.Everything()).update(SEED, 1.0)
    start = build("llama").state_dict()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q if "norm" in name else start[name])
    with pytest.raises(UserError, match="no parameter moves"):
        Patch(build("llama"), masks.Everything(), select="nothing-like-this")


def test_the_threshold_stays_or_is_refreshed():
    """h is fixed before training; with refresh_every = k it is taken again every k steps."""
    fixed = Patch(build("llama"), masks.SmallWeights(0.3))
    refreshed = Patch(build("llama"), masks.SmallWeights(0.3, refresh_every=4))
    for handle in (fixed, refreshed):
        for p in handle.moving:
            p.weight.mul_(2)
    for step in range(4):
        fixed.refresh(step), refreshed.refresh(step)
    assert fixed.active_density() < 0.2 and refreshed.active_density() < 0.2
    fixed.refresh(4), refreshed.refresh(4)
    assert fixed.active_density() < 0.2
    assert refreshed.active_density() == pytest.approx(0.3, abs=0.02)


def test_the_active_density_is_the_share_inside_the_mask():
    """Counted over all moving tensors; after an update it is counted again."""
    model = build("llama")
    handle = Patch(model, masks.SmallWeights(0.25))
    count = sum(int((p.abs() <= masks.threshold(p, 0.25)).sum()) for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert handle.active_density() == count / total
    assert f"{count:,} of {total:,} weights move" in handle.report()
    handle.update(SEED, 10.0)
    assert handle.active_density() < 0.05


def test_noise_does_not_depend_on_the_global_generator():
    """Reseeding torch between probe and update changes nothing."""
    losses = []
    for reseed in (0, 1):
        model = build("gpt-neox")
        torch.manual_seed(reseed)
        losses.append(Patch(model, RULES["s-mezo"]).losses(batch(), loss_fn, SEED))
    assert losses[0] == losses[1]


def test_scratch_is_two_copies_of_the_largest_weight():
    """Memory above the weights: two buffers of the largest weight's size, for all layers."""
    model = build("llama")
    handle = Patch(model, masks.Everything())
    handle.losses(batch(), loss_fn, SEED)
    (buffers,) = handle._scratch.values()
    assert [b.numel() for b in buffers] == [model.lm_head.weight.numel()] * 2


def test_compiled_probes_equal_eager_ones():
    """Fusing noise, mask and add changes the losses by rounding only."""
    eager, fused = build("llama-tied"), build("llama-tied")
    handles = [Patch(m, RULES["s-mezo"], compiled=c) for m, c in ((eager, False), (fused, True))]
    found = [torch.stack(h.losses(batch(), loss_fn, SEED)) for h in handles]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    for handle in handles:
        handle.update(SEED, -0.01)
    assert handles[1].sweep.compiled
    for p, q in zip(eager.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_quantised_weights_are_refused():
    """An integer parameter cannot move: an error that names it, not rewritten codes."""
    model = Odd(nn.Linear(8, 8)).eval()
    codes = torch.zeros(64, 1, dtype=torch.uint8)
    model.middle.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(UserError, match=r"middle\.weight \(torch\.uint8\) cannot move"):
        Patch(model, masks.Everything())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_on_a_gpu_the_step_equals_the_literal_algorithm_1(dtype, compiled, rule):
    """On CUDA too: θ keeps its bits in a probe, and the step is that of Algorithm 1."""
    model = build("llama-tied", dtype).cuda()
    inputs = {k: v.cuda() for k, v in batch().items()}
    before = bits(model)
    handle = Patch(model, RULES[rule], eps=EPS, compiled=compiled)
    wanted = masks_by(RULES[rule], model)([p.detach() for p in model.parameters()])
    plus, minus = handle.losses(inputs, loss_fn, SEED)
    assert same(before, bits(model)) and handle.sweep.compiled == compiled
    literal = copy.deepcopy(build("llama-tied", dtype)).cuda()
    losses = []
    for sign in (+1, -1):
        for i, (p, old) in enumerate(zip(literal.parameters(), before, strict=True)):
            z = zo.gaussian(SEED, i, old.shape, device="cuda")
            p.data = zo.shifted(old, sign * EPS, wanted[i], z).to(dtype)
        with torch.no_grad():
            losses.append(loss_fn(literal(**inputs, use_cache=False).logits))
    assert plus.item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert (plus - minus).item() == pytest.approx((losses[0] - losses[1]).item(), rel=0.1)
    handle.update(SEED, 0.01)
    for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        z = zo.gaussian(SEED, i, old.shape, device="cuda")
        want = zo.shifted(old, 0.01, wanted[i], z).to(dtype)
        assert torch.equal(p == old, want == old) or dtype != torch.float32
        torch.testing.assert_close(p.detach(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5,
                                   atol=1e-5)  # fmt: skip
    z = zo.gaussian(SEED, 5, (1000,), device="cuda").cpu()
    torch.testing.assert_close(z, zo.gaussian(SEED, 5, (1000,)), rtol=1e-5, atol=1e-5)


def test_a_rule_of_ones_own_is_counted_again_every_time():
    """The rule of masks.py's docstring, whose mask follows θ: active density is the share now."""

    class LargeWeights(masks.Rule):
        def prepare(self, weight, stream):
            return masks.threshold(weight, 1 - self.density)

        @staticmethod
        def mask(theta, index, state):
            return theta.abs() > state

    handle = Patch(build("llama"), LargeWeights(0.25))
    assert handle.active_density() == pytest.approx(0.25, abs=0.01)
    handle.update(zo.step_seed(0, 0), 0.05)
    inside = sum(int((p.flat.abs() > p.state).sum()) for p in handle.moving)
    share = inside / sum(p.size for p in handle.moving)
    assert handle.active_density() == share and abs(share - 0.25) > 0.01


def test_the_loop_of_the_readme_trains(monkeypatch, capsys):
    """The README's loop of one's own, as printed: the loss falls, the model is ordinary again."""
    root = Path(__file__).parent.parent
    (loop,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(root)
    names = {}
    exec(loop, names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 50 and losses[-1] < losses[0] / 2
    model = names["model"]
    assert not any("forward" in module.__dict__ for module in model.modules())
