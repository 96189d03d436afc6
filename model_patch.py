"""§3.3 of [S]: mask and noise exist only inside forward, for Hugging Face causal LMs.

    y⁽ⁱ⁾ = (θ⁽ⁱ⁾ + ε m(θ⁽ⁱ⁾) ⊙ z⁽ⁱ⁾) x⁽ⁱ⁾ + b⁽ⁱ⁾             [S] §3.3, one layer at a time

Algorithm 1 adds +ε ẑ, −2ε ẑ and +ε ẑ to the weights. Here a probe never writes a weight. The
forward of every module that owns parameters is wrapped; while a probe is open, the wrapper draws
the module's noise, computes θ + ε ẑ and θ − ε ẑ in scratch memory, and runs the module's own
forward with them.

    code              paper                      code            paper
    losses(…, seed)   l⁺ and l⁻                  _perturbed      θ ± ε m(θ) ⊙ z, in scratch
    update(seed, a)   θ ← θ + a ẑ, a = −ηg       _linear, _run   ( … ) x + b

How it works. Both probes run in one pass: the batch is stacked twice, [x; x]; a wrapper splits
every tensor argument that holds the doubled batch, gives θ + ε ẑ the first half and θ − ε ẑ the
second, and joins the results. A step traverses the model once where MeZO does twice, draws z twice
(probes, update) and not four times, reads θ twice and not six times. An embedding draws the noise
of the looked-up rows alone. Tied weights agree: noise belongs to the parameter, not to the module.

There is no model-specific code: wrapped is whatever owns a parameter, be it Linear, Embedding,
norm, Conv1D or fused experts. The one condition is that a parameter is used by the forward of the
module that owns it; one that is not (Mamba reads its convolution's weight directly) is an error
that names it. Where a module's input has lost the batch dimension the probes run in turn.

[Q]'s layers (an index) are the same idea with few moving places: one matrix serves both probes,
value + ε z is written into its k places for the first half of the batch and value − ε z for the
second. In 4 bits that matrix is unpacked once per step, where two plain forwards unpack it twice;
in 16 bits it is the weight itself, whose k places are scratch during the forward and afterwards
rewritten from the values, which are fp32. (One dense product and a sparse one is slower.)

Why it matters. θ keeps its bits through any number of probes; in place it drifts per step by ten
times a typical update in fp16. The mask comes from the unperturbed θ by construction. It costs two
fused sweeps per step (sweep.py), and memory for the doubled batch and two copies of the largest
module's weights. What differs from Algorithm 1: l⁻ is taken at θ − ε ẑ, not on the way back.
"""

import contextlib
import functools
import types
import warnings

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import masks
import moving
import quant
import sweep
from errors import UserError
from moving import Few, Moving


class LostBatch(Exception):
    """A module's input does not show which rows belong to which probe."""


class Patch:
    """A model whose weights can be probed and updated; undone by `remove`.

    handle = Patch(model, which)
    loss_plus, loss_minus = handle.losses(inputs, loss_fn, seed)
    handle.update(seed, float(-lr * zo.projected_grad(loss_plus, loss_minus, handle.eps)))

    which: which weights move. A rule of masks.py ([S], MeZO), or [Q]'s index, {parameter name:
    sorted flat positions, (k,) int}. eps: ε, 1e-3 in both papers. compiled: fuse noise, mask and
    add (needs a C++ compiler, on a GPU Triton). With a rule only: vectors: norms and biases, of
    which [S] says nothing, are "masked" like the rest, "free" (all move) or "frozen". select: a
    regular expression, such as "self_attn": only parameters whose name has it move. rounding: of
    updates to 16-bit weights ([Q]'s are fp32).
    """

    def __init__(
        self,
        model: nn.Module,
        which: masks.Rule | dict[str, Tensor],
        *,
        eps: float = 1e-3,
        vectors: str = "masked",
        select: str = "",
        rounding: str = "stochastic",
        compiled: bool = False,
    ):
        if rounding not in moving.ROUNDING:
            raise UserError(f"rounding {rounding!r}: one of {moving.ROUNDING}")
        if not 0 < eps < float("inf"):
            raise UserError(f"eps {eps}: above 0 and finite")
        self.model, self.eps, self.sweep = model, eps, sweep.Sweep(compiled)
        self.stochastic = rounding == "stochastic"
        found = moving.choose(model, which, vectors, select)
        self.weights = list(found.values())  # what modules own
        self.moving = list(dict.fromkeys(p.whole for p in self.weights))  # what is swept
        self._devices = {p.flat.device for p in self.moving}
        self._seed: dict | None = None  # per device; a probe is open while it is set
        self._eps: dict = {}  # per device: (+ε, −ε)
        self._sign: int | None = None  # None: both probes at once; +1 or −1: that one alone
        self._doubled: tuple[int, int] = (0, 0)  # rows and rows · tokens of the doubled batch
        self._scratch: dict[tuple, list[Tensor]] = {}
        self._taken: dict[tuple, int] = {}
        self._drawn: dict[Moving, list[Tensor]] = {}  # [Q]: values ± ε z of an open probe
        self.one_pass = True
        self.wrapped: list[tuple[nn.Module, object]] = []
        for module in model.modules():
            own = module._parameters.items()
            owned = {name: found[id(p)] for name, p in own if id(p) in found}
            if id(module) in found:  # a 4-bit layer
                owned["weight"] = found[id(module)]
            if owned:
                self.wrapped.append((module, vars(module).get("forward")))
                module.forward = self._wrap(module, owned)

    def _wrap(self, module, owned):
        forward = module.forward
        ordinary = "forward" not in module.__dict__  # nobody else has wrapped it
        rows_only = ordinary and type(module) is nn.Embedding and module.max_norm is None
        linear = ordinary and type(module) in (nn.Linear, quant.DenseSparseLinear)

        @functools.wraps(forward)
        def probed(me, *args, **kwargs):
            if me is not module:  # a deepcopy of the model is a model of its own
                return type(me).forward(me, *args, **kwargs)
            if self._seed is None:
                return forward(*args, **kwargs)
            for name, p in owned.items():
                moving.check_still(p, module._parameters.get(name))
                p.used = True
            both = self._sign is None
            signs = (+1, -1) if both else (self._sign,)
            if linear and both:
                with self._perturbed(owned, signs) as weights:
                    return self._linear(module, weights, *args, **kwargs)
            calls = self._split((args, kwargs)) if both else [(args, kwargs)]
            if rows_only:
                outputs = [
                    self._rows(s, owned["weight"], *a, **k)
                    for s, (a, k) in zip(signs, calls, strict=True)
                ]
            else:
                with self._perturbed(owned, signs) as weights:
                    outputs = [
                        self._run(module, forward, w, s, a, k)
                        for s, w, (a, k) in zip(signs, weights, calls, strict=True)
                    ]
            return _join(*outputs) if both else outputs[0]

        probed.patched = module
        return types.MethodType(probed, module)

    # ------------------------------------------------------------------ inside a probe

    def _is_doubled(self, value) -> bool:
        """Does it hold the doubled batch: (rows, T, d), or flattened (rows · T, d)?"""
        rows, positions = self._doubled
        if not isinstance(value, Tensor) or value.dim() == 0:
            return False
        return value.shape[0] == positions or value.shape[0] == rows and value.dim() > 1

    def _split(self, arguments) -> list:
        """The arguments of each probe: the halves of every tensor that holds the doubled batch."""
        if not any(map(self._is_doubled, tree_leaves(arguments))):
            raise LostBatch

        def half(i: int, value):
            return value.tensor_split(2)[i] if self._is_doubled(value) else value

        return [tree_map(functools.partial(half, i), arguments) for i in (0, 1)]

    @contextlib.contextmanager
    def _perturbed(self, owned, signs):
        """For each sign, in turn, the module's parameters as θ + sign · ε ẑ, {name: tensor}."""
        if isinstance(few := owned.get("weight"), Few):
            try:
                yield self._scattered(few, signs)
            finally:
                few.settle()
            return
        before, copies = dict(self._taken), [{} for _ in signs]
        for name, p in owned.items():
            buffers = self._take(p)[: len(signs)]
            self._shift(p, buffers, [self._eps[p.flat.device][s < 0] for s in signs])
            for copy, buffer in zip(copies, buffers, strict=True):
                copy[name] = buffer.view_as(p.weight)
        try:
            yield copies
        finally:
            self._taken = before

    def _scattered(self, p: Few, signs):
        """One matrix for both probes, unpacked once: value + ε z goes into its k places, and when
        the next sign is asked for value − ε z. THE SAME TENSOR BOTH TIMES: use it, then go on."""
        if p.whole not in self._drawn:  # of all matrices at once
            both = self._drawn[p.whole] = [torch.empty_like(p.whole.flat) for _ in "+-"]
            self._shift(p.whole, both, self._eps[p.flat.device])
        weight = p.layer.dense() if p.weight is None else p.weight
        for sign in signs:
            weight.view(-1)[p.index] = self._drawn[p.whole][sign < 0][p.span].to(weight.dtype)
            yield {"weight": weight}

    def _take(self, p: Moving) -> list[Tensor]:
        """Two flat buffers of p's size, after those that outer modules hold; grown where needed."""
        key = p.weight.dtype, p.weight.device
        start = self._taken.get(key, 0)
        end = self._taken[key] = start + p.flat.numel()
        if key not in self._scratch or self._scratch[key][0].numel() < end:
            self._scratch.pop(key, None)  # free it first: the largest weights come in twos
            self._scratch[key] = [torch.empty(end, dtype=key[0], device=key[1]) for _ in range(2)]
        return [buffer[start:end] for buffer in self._scratch[key]]

    def _run(self, module, forward, weights: dict[str, Tensor], sign: int, args, kwargs):
        """`forward` with `weights` in place of the module's own; modules inside follow `sign`."""
        own = dict(module._parameters)
        outer, self._sign = self._sign, sign
        module._parameters.update(weights)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.clear()  # a 4-bit layer has no weight of its own
            module._parameters.update(own)
            self._sign = outer

    def _linear(self, module: nn.Linear, weights, input: Tensor) -> Tensor:
        """nn.Linear's forward on both halves, into one output: joining two would copy them."""
        if not self._is_doubled(input):
            raise LostBatch
        out = input.new_empty(*input.shape[:-1], module.out_features)
        for own, x, y in zip(weights, input.chunk(2), out.chunk(2), strict=True):
            w = (own["weight"] if "weight" in own else module.weight).T
            b = own.get("bias", module.bias)
            x, y = x.reshape(-1, module.in_features), y.view(-1, module.out_features)
            torch.mm(x, w, out=y) if b is None else torch.addmm(b, x, w, out=y)
        return out

    def _rows(self, sign: int, p: Moving, input: Tensor) -> Tensor:
        """nn.Embedding's forward at θ + sign · ε ẑ, for the token ids `input`."""
        columns = p.weight.shape[1]
        index = input[..., None] * columns + torch.arange(columns, device=input.device)
        theta = p.weight[input]
        out = torch.empty_like(theta)
        a = self._eps[p.flat.device][sign < 0]
        self._shift(p, [out.view(-1)], [a], theta.view(-1), index.view(-1))
        return out

    def _shift(self, p: Moving, outs, coefficients, theta=None, index=None, stochastic=False):
        """out ← θ + a m⊙z for each (out, a), of the whole tensor or of the elements at `index`."""
        theta, index = (p.flat, p.index) if theta is None else (theta, index)
        seed, state = self._seed[p.flat.device], p.state
        self.sweep(outs, coefficients, theta, seed, p.stream, p.rule.mask, state, index, stochastic)

    def _on_devices(self, number, dtype=torch.float32) -> dict:
        """{device: 0-dim tensor}; filled there, as a copy from the host would wait for the GPU."""
        return {d: torch.full((), number, dtype=dtype, device=d) for d in self._devices}

    @contextlib.contextmanager
    def _open(self, seed: int, *, sign: int | None = None, doubled=(0, 0)):
        """While open, wrapped modules compute at θ ± ε ẑ; closed again whatever happens inside."""
        assert self._seed is None, "a probe is already open"
        assert self.wrapped, "this handle was removed; patch the model again"
        assert not self.model.training, "the model was put into training mode after patching"
        assert 0 <= seed < 1 << 48, f"seed {seed} does not fit 48 bits; zo.step_seed makes them"
        plus, minus = self._on_devices(self.eps), self._on_devices(-self.eps)
        self._eps = {device: (plus[device], minus[device]) for device in self._devices}
        self._seed = self._on_devices(seed, torch.int64)
        self._sign, self._doubled, self._taken, self._drawn = sign, doubled, {}, {}
        try:
            yield
        finally:
            self._seed, self._sign, self._drawn = None, None, {}

    # ------------------------------------------------------------------ for the training loop

    @torch.no_grad()
    def losses(self, inputs: dict, loss_fn, seed: int) -> tuple[Tensor, Tensor]:
        """(l⁺, l⁻) of [S] Algorithm 1 on one batch, as 0-dim tensors. θ is not written.

        `inputs`: the model's keyword arguments, a dict of tensors of B rows, input_ids (B, T) among
        them, and plain values. `loss_fn`: the logits of B rows to a scalar, in fp32; called twice.
        UserError where a weight that moves was not used by forward, or was replaced.
        """
        if self.one_pass:
            rows, tokens = inputs["input_ids"].shape
            twice = {key: _join(value, value) for key, value in inputs.items()}
            try:
                with self._open(seed, doubled=(2 * rows, 2 * rows * tokens)):
                    logits = self.model(**twice, use_cache=False).logits
                losses = [loss_fn(half) for half in logits.tensor_split(2)]
            except LostBatch:
                self.one_pass = False
                why = "a module mixes the rows of a batch, so the probes run one after the other"
                warnings.warn(why, stacklevel=2)
        if not self.one_pass:
            losses = []
            for sign in (+1, -1):
                with self._open(seed, sign=sign):
                    losses.append(loss_fn(self.model(**inputs, use_cache=False).logits))
        if unused := [p.name for p in self.weights if not p.used]:
            raise UserError(
                f"forward never used {', '.join(unused[:3])} ({len(unused)} in all), so "
                "pure noise would move it; exclude it by `select`"
            )
        return losses[0], losses[1]

    @torch.no_grad()
    def update(self, seed: int, a: float) -> None:
        """[S] Algorithm 1's last loop, θ ← θ + a m⊙z in place, with a = −η · proj_grad.

        `seed` is the probes' own. Computed in fp32 and rounded once, to θ's dtype."""
        assert abs(a) < float("inf"), f"an update of {a} leaves no weight finite; skip the step"
        with self._open(seed):
            number = self._on_devices(a)
            for p in self.moving:
                self._shift(p, [p.flat], [number[p.flat.device]], stochastic=self.stochastic)
        for p in self.weights:
            p.settle()

    @torch.no_grad()
    def warm_up(self) -> bool:
        """Compile the probes' kernel now; False where that fails, and sweeps run eager."""
        p = max(self.moving, key=lambda p: p.flat.numel())
        with self._open(0):
            self._shift(p, [torch.empty_like(p.flat) for _ in "+-"], self._eps[p.flat.device])
        return self.sweep.compiled

    def refresh(self, step: int) -> None:
        """Before step `step`: take thresholds again where the rule says so ([S]'s ablation)."""
        for p in self.moving:
            if step and p.rule.refresh_every and step % p.rule.refresh_every == 0:
                p.state = p.rule.prepare(p.weight, int(p.stream))

    def tensors(self) -> dict[str, Tensor]:
        """{name: flat tensor} of all that training changes: what a snapshot holds. Not copies."""
        return {p.name: p.flat for p in self.weights}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put a snapshot's values back, bit for bit."""
        assert tensors.keys() == self.tensors().keys(), "a snapshot of other tensors"
        for p in self.weights:
            p.flat.copy_(tensors[p.name])
            p.settle()

    def active_density(self) -> float:
        """Share of the weights in moving tensors that are inside the mask now."""
        return self._active() / sum(p.size for p in self.moving)

    def _active(self) -> int:
        for p in self.moving:
            if p.active < 0 or not p.rule.static:
                p.active = masks.active_count(p.rule, p.flat, p.state)
        return sum(p.active for p in self.moving)

    def report(self) -> str:
        """What was patched, in one line."""
        packed, total = len(quant.packed(self.model)), quant.count_weights(self.model)
        move, four = self._active(), f"; {packed} matrices are in 4 bits" if packed else ""
        patched = f"patched {len(self.wrapped)} modules with {len(self.weights)} tensors"
        return f"{patched}; {move:,} of {total:,} weights move ({move / total:.2%}){four}"

    def remove(self) -> None:
        """An ordinary model again, with the weights as they are now (4 bits: see quant.unpack)."""
        for module, before in self.wrapped:
            del module.forward
            if before is not None:  # somebody else's wrapper, such as accelerate's
                module.forward = before
        self.wrapped, self._scratch = [], {}


def _join(first, second):
    """The outputs of the two probes, stacked: tensors, or tuples, lists and dicts of them."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return type(first)({key: _join(first[key], second[key]) for key in first})
    if isinstance(first, tuple | list):
        return type(first)(_join(a, b) for a, b in zip(first, second, strict=True))
    return first
