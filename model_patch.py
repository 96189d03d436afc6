"""While a probe is open, a weight reads as θ + ε ẑ, ẑ = m(θ)⊙z. θ is never written ([S] §3.3).

    y⁽ⁱ⁾ = (θ⁽ⁱ⁾ + ε m(θ⁽ⁱ⁾) ⊙ z⁽ⁱ⁾) x⁽ⁱ⁾ + b⁽ⁱ⁾             [S] §3.3, for each layer i

    code                paper
    Patch.losses        l⁺ and l⁻
    Patch.update        θ ← θ + a m⊙z, with a = −η · proj_grad
    PerturbedWeight     θ + a m(θ)⊙z, made when a layer asks for its weight

How it works
    Algorithm 1 writes +ε ẑ, −2ε ẑ and +ε ẑ into the weights. Here a probe writes nothing. Every
    parameter that moves gets a `PerturbedWeight`, and `self.weight` of its layer becomes a property
    that asks it (quant.read_as). It answers θ while no probe is open, and θ + a m(θ)⊙z while one
    is, with a = +ε or −ε. The layer computes with the answer.

    So the mask of S-MeZO is made anew in every probe, from the θ_t that no probe touches, and again
    in the update. It is not stored, and cannot come from a perturbed weight.
    Here a layer is any module that owns weights, such as a linear layer or a norm. θ + ε ẑ
    exists for one layer at a time, from the moment that the layer reads its weight until the next
    layer reads its own. Tied weights are one parameter with one noise stream. Their copy stays for
    the whole probe, so that it is drawn once. Nothing here depends on the architecture.

    [Q] is the same on one parameter that moves as a whole: the k values of quant.DenseSparse. Its
    layers read the values from there, and values ± ε z stays for the whole probe.

What differs from Algorithm 1
    l⁻ is taken at θ − ε ẑ itself, not on the way back from θ + ε ẑ. The two agree up to rounding.

What it costs
    Memory: the model, the batch, and a copy of the weights of one layer and of tied ones. Time: the
    noise of every weight is drawn three times a step, for l⁺, l⁻ and the update. A batch in n parts
    takes n pairs of probes, and 2n + 1 draws. A probe with several forward passes draws in each,
    but tied weights and [Q]'s values once.
"""

import re
import threading
from collections import Counter
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn

import masks
import quant
import zo

ONE_READS = threading.RLock()  # a loss may run its passes in threads; copies are made under it


class PerturbedWeight:
    """One tensor that moves by a rule of masks.py: a parameter, or [Q]'s vector of k values."""

    def __init__(self, patch: "Patch", name: str, theta: Tensor, stream: int, owners: list):
        self.patch, self.name, self.stream = patch, name, stream
        self.owners = owners  # [(module, its name there)]; a tied weight has several
        self.layer = name.rpartition(".")[0]  # the path of its (first) owner
        self.parameter, self.shape = theta, theta.shape
        self.views = zo.Halves(theta)
        self.word = zo.word(stream)
        self.was_read = False
        self.state = patch.rule.prepare(self.theta, stream)  # such as [S]'s threshold h

    @property
    def theta(self) -> Tensor:
        """θ itself, whatever a probe lets the layer read."""
        return self.parameter.detach()

    @property
    def halves(self) -> zo.Halves:
        """Views of θ for zo.apply, made anew where θ is elsewhere now."""
        if not self.views.tensor.is_set_to(self.parameter):  # the model was moved, or copied
            self.views = zo.Halves(self.parameter)
        return self.views

    def mask(self) -> Tensor:
        """m(θ) as it is now, boolean, θ's shape."""
        rule, parts, start = self.patch.rule, [], 0
        for theta in self.theta.view(-1).split(1 << 22):  # bounds the temporaries
            element = torch.arange(theta.numel(), dtype=torch.int32, device=theta.device) + start
            parts.append(rule.mask(theta, element, self.state))
            start += theta.numel()
        return torch.cat(parts).view_as(self.theta)

    def __call__(self, theta: Tensor) -> Tensor:
        """What a layer gets when it asks for its weight."""
        assert theta is self.parameter, f"{self.name} was replaced after patching; patch anew"
        patch = self.patch
        self.was_read = True
        if patch.shift is None:
            return theta
        with ONE_READS:
            if self.layer != patch.reading:  # another layer reads: copies go, tied ones stay
                patch.copies = {w: copy for w, copy in patch.copies.items() if w.owners[1:]}
                patch.reading = self.layer
            if self not in patch.copies:  # a layer may ask several times, for a dtype or an expert
                scratch = patch.scratch(theta)
                self.add(patch.shift, out=scratch)
                patch.copies[self] = scratch.flat.view(theta.shape)  # a view: `is_free` counts it
            return patch.copies[self]

    def add(self, shift: zo.Shift, out: zo.Halves | None = None, stochastic: bool = False) -> None:
        """out ← θ + a m(θ)⊙z, or θ ← θ + a m(θ)⊙z."""
        zo.apply(
            self.halves, shift, self.word, self.patch.rule.mask, self.state,
            out=out, stochastic=stochastic, fused=self.patch.fused,
        )  # fmt: skip


class Patch:
    """A model whose weights can be probed and updated, until `remove`.

    patch = Patch(model, masks.SmallWeights(0.25))
    loss_plus, loss_minus = patch.losses(batch, loss_fn, seed)
    patch.update(seed, float(-lr * zo.projected_grad(loss_plus, loss_minus, patch.eps)))

    model: the whole one. A module outside of it reads a tied weight as θ.
    what_moves: a rule of masks.py ([S], MeZO), which is copied, or a quant.DenseSparse ([Q]).
    eps: ε, 1e-3 in [S].
    fused: noise, mask and add as one compiled loop (needs a C++ compiler, on a GPU Triton).
    select, of a rule alone: a regular expression. Only parameters whose name matches move, whatever
    their requires_grad.
    rounding, of a rule alone: of updates to 16-bit weights, "stochastic" or "nearest".
    """

    def __init__(
        self,
        model: nn.Module,
        what_moves: masks.Rule | quant.DenseSparse,
        *,
        eps: float = 1e-3,
        select: str = "",
        rounding: str = "stochastic",
        fused: bool = False,
    ):
        self.sparse = what_moves if isinstance(what_moves, quant.DenseSparse) else None
        if self.sparse and select:
            raise ValueError(f"select {select!r}: all values of a DenseSparse move")
        holder = self.sparse or model  # of the parameters that move
        known = PerturbedWeight if self.sparse else (PerturbedWeight, quant.Parts)
        modules = [*model.modules(), holder]
        there = {answer for module in modules for answer in quant.answers(module).values()}
        if any(isinstance(answer, known) for answer in there):
            raise ValueError(
                "this model is patched or split already; call remove() on that patch, or "
                "quant.join(model), first"
            )
        if any(module.training for module in model.modules()):
            raise ValueError("in training mode dropout drowns the probes; call model.eval() first")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding {rounding!r}: stochastic or nearest")
        self.model, self.eps, self.fused = model, eps, fused
        self.stochastic = rounding == "stochastic"
        self.shift: zo.Shift | None = None  # a probe is open while it is set
        self.reading: str | None = None  # the layer that reads
        self.copies: dict[PerturbedWeight, Tensor] = {}  # its perturbed weights, and tied ones
        self.buffers: list[Scratch] = []
        self.weights: list[PerturbedWeight] = []
        # a copy, as a rule may keep one model's thresholds
        self.rule = masks.Everything() if self.sparse else copy(what_moves)
        for name in self.sparse.index if self.sparse else ():
            if self.sparse.parts.get(name) not in there:
                raise ValueError(f"{name} is not split in this model: split(model, name) first")
        self._ask(holder, select)
        self.patched = self.sparse.parts if self.sparse else {w.name: w for w in self.weights}
        self.device = self.weights[0].theta.device
        self.modules = list(model.modules())  # to find them anew takes 4 ms at 7B, in every probe

    def _ask(self, holder: nn.Module, select: str) -> None:
        """Give every parameter that moves a `PerturbedWeight`, which its modules then ask."""
        owners = quant.owners(holder)
        strided = (p for p in owners if p is not None and p.layout == torch.strided)
        starts = Counter(p.data_ptr() for p in strided)
        for stream, (name, p) in enumerate(holder.named_parameters()):
            if not re.search(select, name) or not p.numel():
                continue  # it keeps its stream's number, so `select` changes no noise
            if not p.is_floating_point():
                raise ValueError(f"{name} ({p.dtype}) cannot move; load the model in 16 or 32 bits")
            quant.check_owners(owners[p], name, PerturbedWeight)
            if p.data_ptr() and starts[p.data_ptr()] > 1:  # 0: on no device
                raise ValueError(
                    f"{name} lies in the memory of another parameter; make them one nn.Parameter, "
                    "or give it memory of its own"
                )
            if not p.is_contiguous():
                p.data = p.data.contiguous()
            try:
                self.weights.append(PerturbedWeight(self, name, p, stream, owners[p]))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if not self.weights:
            raise ValueError(f"nothing moves: no parameter's name matches {select!r}")
        masks.check_moves(self.rule.density, self.moving())
        for weight in self.weights:
            for module, name in weight.owners:
                quant.read_as(module, name, weight)

    def scratch(self, like: Tensor) -> zo.Halves:
        """Memory for a perturbed copy of `like`: that of an earlier copy which nobody holds now.

        Fresh memory costs page faults, as much time as the noise.
        """
        for buffer in self.buffers:
            if buffer.fits(like) and buffer.is_free():
                return buffer.first(like.numel())
        held = [buffer for buffer in self.buffers if not buffer.is_free()]  # free ones do not fit
        self.buffers = [*held, Scratch(like)]
        return self.buffers[-1].first(like.numel())

    # ------------------------------------------------------------------ probes

    @contextmanager
    def probe(self, seed: int, a: float):
        """Inside it the model computes at θ + a m⊙z. Afterwards at θ, whatever happened."""
        training = any(module.training for module in self.modules)
        assert not training, "the model was put into training mode after patching"
        assert self.shift is None, "a probe is open already"
        assert self.patched, "this patch was removed, or its model joined; make a new one"
        self.shift = zo.Shift.of(a, seed)
        try:
            yield
        finally:
            self.shift, self.reading, self.copies = None, None, {}

    @torch.no_grad()
    def losses(self, batch, loss_fn, seed: int) -> list:
        """[l⁺, l⁻] of [S] Algorithm 1 on one batch, whatever that is. θ is not written.

        `loss_fn(model, batch)`: a number, such as tasks.loss; it need not have a derivative.
        ValueError names a parameter that moves and that nothing has read yet.
        """
        losses = []
        for a in (+self.eps, -self.eps):
            with self.probe(seed, a):
                losses.append(own_number(loss_fn(self.model, batch)))
        if unread := [name for name, part in self.patched.items() if not part.was_read]:
            way_out = "its mask cannot be of use" if self.sparse else "leave it out with --select"
            raise ValueError(
                f"no forward reads {unread[0]} ({len(unread)} such in all), so only noise would "
                f"move it; {way_out}"
            )
        return losses

    @torch.no_grad()
    def update(self, seed: int, a: float) -> None:
        """[S] Algorithm 1's last loop, θ ← θ + a m⊙z in place, with a = −η · proj_grad.

        `seed` is the probes' own. The sum is rounded once, to θ's dtype: 16 bits stochastically,
        unless `rounding` is nearest.
        """
        assert abs(a) < float("inf"), f"an update of {a} leaves no weight finite; skip the step"
        assert self.patched, "this patch was removed, or its model joined; make a new one"
        shift = zo.Shift.of(a, seed)
        for weight in self.weights:
            weight.add(shift, stochastic=self.stochastic)
        torch.clear_autocast_cache()  # inside torch.autocast it has casts of the weights of before

    def refresh(self, step: int) -> None:
        """To be called before each step, from 0 on: every `refresh_every` steps h is taken anew."""
        if self.rule.refresh_every and step and step % self.rule.refresh_every == 0:
            for weight in self.weights:
                weight.state = self.rule.refresh(weight.theta, weight.stream)

    # ------------------------------------------------------------------ what one may want to know

    def moving(self) -> list[Tensor]:
        """The tensors that an update writes: [Q]'s values, or the parameters of the rule."""
        return [weight.theta for weight in self.weights]

    def active(self) -> tuple[int, int]:
        """(how many weights are inside the mask now, of how many in the tensors that move)."""
        inside = sum(int(weight.mask().count_nonzero()) for weight in self.weights)
        return inside, sum(part.shape.numel() for part in self.patched.values())

    def active_density(self) -> float:
        """Share of the weights of moving tensors that are inside the mask now."""
        inside, whole = self.active()
        return inside / whole

    @property
    def total(self) -> int:
        """How many weights the model has. bitsandbytes packs two of 4 bits into a byte."""
        parts = self.sparse.parts.values() if self.sparse else ()
        shapes = [getattr(p, "quant_state", p).shape for p in self.model.parameters()]
        shapes += [part.shape for part in parts if part.packed is not None]
        return sum(shape.numel() for shape in shapes)

    def __str__(self):
        move, tensors = self.active()[0], len(self.patched)
        rest = f"; the rest of these is in {self.sparse}" if self.sparse else ""
        return f"{move:,} of {self.total:,} weights move, in {tensors} tensors{rest}"

    def remove(self) -> None:
        """An ordinary model again, with the weights as they are now. [Q]'s: see quant.join."""
        for weight in self.weights:
            for module, _ in weight.owners:
                quant.read_plainly(module)
        self.weights, self.patched, self.buffers, self.modules = [], {}, [], []
        self.sparse = None


def own_number(loss):
    """A loss in fp64: a copy, as l⁺ and l⁻ may be one tensor, and never an unsigned integer."""
    return loss.to(torch.float64, copy=True) if isinstance(loss, Tensor) else float(loss)


class Scratch:
    """Memory for perturbed copies, and what zo.apply needs to write to its first n elements."""

    def __init__(self, like: Tensor):
        with torch.inference_mode(False):  # or only another inference mode could write to it
            self.memory = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        self.storage = self.memory.untyped_storage()
        self.halves: dict[int, zo.Halves] = {}
        self.alone = self.holders()

    def fits(self, like: Tensor) -> bool:
        """Whether a copy of `like` has room here, in its dtype and on its device."""
        same = self.memory.dtype == like.dtype and self.memory.device == like.device
        return same and self.memory.numel() >= like.numel()

    def first(self, n: int) -> zo.Halves:
        """Its first n elements. Call it only while it is free, as it counts anew."""
        if n not in self.halves:
            self.halves[n] = zo.Halves(self.memory[:n])
            self.alone = self.holders()
        return self.halves[n]

    def is_free(self) -> bool:
        """Whether nobody holds a copy, or a view of one."""
        return self.holders() == self.alone

    def __deepcopy__(self, memo):
        return Scratch(self.memory)  # with counts of its own

    def holders(self) -> int:
        """How many tensors use the memory, those here included."""
        return torch._C._storage_Use_Count(self.storage._cdata)
