"""The tensors that move: which they are, and what is known of each.

    choose_by_rule  all parameters, or those that `select` and `vectors` leave: [S], MeZO
    choose_few      k places of certain matrices, named by an index: [Q], the sensitive weights

Every matrix and vector has a noise stream of its own, a number. Tied parameters are one tensor.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

import masks
import quant
import zo
from errors import UserError

VECTORS = ("masked", "free", "frozen")
ROUNDING = ("stochastic", "nearest")


@dataclass(eq=False)
class Moving:
    """One tensor that a sweep goes through: its noise stream, its rule and what the rule keeps."""

    name: str
    weight: Tensor  # shares the parameter's memory; updates write through it
    flat: Tensor  # the same, as one dimension
    stream: Tensor  # on the weight's device, 0-dim int64; or one for each element
    rule: masks.Rule
    state: Tensor
    size: int  # elements of the whole weight
    active: int = -1  # how many elements are inside the mask; −1: not counted
    used: bool = False  # has a probe gone through it?
    index: Tensor | None = None  # of `flat` in the noise; None: all elements, in their order

    @property
    def whole(self) -> "Moving":
        """What is swept for it."""
        return self

    def settle(self) -> None:
        """Called when `flat` has changed, and after a probe."""


@dataclass(eq=False)
class Few:
    """[Q]: the k places `index` of one matrix move; `flat` holds their values, in fp32.

    An fp16 copy would lose most updates of size 1e-6. `index` and `flat` are slices of `whole`, the
    concatenation over a device's matrices: alone, each (at most 45,000 values in Llama-2-7B) is
    less work than a kernel's launch, 224 times.

    `weight` is the 16-bit matrix itself: at its k places it is scratch, rewritten from `flat`
    whenever it is read. In 4 bits there is no such matrix (None): the layer unpacks one.
    """

    name: str
    weight: Tensor | None
    layer: quant.DenseSparseLinear | None
    stream: int
    size: int  # elements of the whole matrix
    index: Tensor  # int64
    flat: Tensor
    whole: Moving | None = None
    span: slice | None = None  # which part of it
    used: bool = False

    def settle(self):
        if self.weight is not None:
            self.weight.view(-1)[self.index] = self.flat.to(self.weight.dtype)


def check_still(p: Moving | Few, parameter: Tensor | None) -> None:
    """UserError unless a module's `parameter` is the memory that updates write to; 4-bit layers,
    which have none, pass."""
    if p.weight is None:
        return
    if parameter is None or parameter.data_ptr() != p.weight.data_ptr():
        raise UserError(
            f"{p.name} is another tensor than when it was patched (by .to, .half, "
            "load_state_dict(assign=True)?), so updates would not reach it; patch it again"
        )


def selected(model, vectors: str, select: str) -> list:
    """[(stream, name, parameter)] of the unique parameters that move; UserError where none does.

    The stream is the parameter's number in the model, whichever others move.
    """
    if vectors not in VECTORS:
        raise UserError(f"vectors is {vectors!r}; it can be masked, free or frozen")
    found = [
        (stream, name, p)
        for stream, (name, p) in enumerate(model.named_parameters())
        if re.search(select, name) and (p.dim() > 1 or vectors != "frozen")
    ]
    if not found:
        raise UserError(f"no parameter moves: none matches {select!r} with vectors={vectors!r}")
    return found


def choose(model, which, vectors: str, select: str) -> dict[int, Moving] | dict[int, Few]:
    """By a rule or an index; UserError where the model cannot be patched or nothing would move."""
    for module in model.modules():
        if module.training:
            raise UserError("in training mode dropout drowns the probes; call model.eval() first")
        patched = getattr(vars(module).get("forward"), "patched", None)  # set by model_patch.py
        if patched is module:
            raise UserError("this model is patched already; call remove() on that handle first")
        if patched is not None:
            del module.forward  # what a deepcopy brought along
    if isinstance(which, dict):
        return choose_few(model, which)
    if isinstance(which, masks.Rule):
        return choose_by_rule(model, which, vectors, select)
    raise UserError(f"{type(which).__name__}: give a rule, SmallWeights(0.25), or an index")


def choose_by_rule(model, rule, vectors: str, select: str) -> dict[int, Moving]:
    """{id(parameter): Moving} of the parameters that move."""
    if quant.packed(model):
        raise UserError("in 4 bits only the places of an index move; a rule needs 16 or 32 bits")
    chosen, free = {}, masks.Everything()
    for stream, name, parameter in selected(model, vectors, select):
        assert stream < zo.MAX_STREAMS, f"parameter {stream} exceeds {zo.MAX_STREAMS} noise streams"
        if not (parameter.is_floating_point() and parameter.is_contiguous()):
            raise UserError(
                f"{name} ({parameter.dtype}) cannot move: only contiguous floating-point weights "
                "can, so a quantised checkpoint must be loaded in 16 or 32 bits"
            )
        weight = parameter.detach()
        its = free if weight.dim() < 2 and vectors == "free" else rule
        try:
            state = its.prepare(weight, stream)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        number = torch.tensor(stream, device=weight.device)
        flat = weight.view(-1)
        chosen[id(parameter)] = Moving(name, weight, flat, number, its, state, flat.numel())
    return chosen


def choose_few(model, index: dict[str, Tensor]) -> dict[int, Few]:
    """{id(parameter or 4-bit layer): Few}; streams are numbered by name, alike in 16 and 4 bits."""
    assert 0 < len(index) <= zo.MAX_STREAMS, f"{len(index)} matrices; 1 to {zo.MAX_STREAMS}"
    four_bits = {f"{path}.weight": layer for path, layer in quant.packed(model).items()}
    known, found = dict(model.named_parameters()), {}
    for stream, (name, places) in enumerate(sorted(index.items())):
        if (layer := four_bits.get(name)) is not None:
            if not torch.equal(layer.index, places.to(layer.index)):
                raise UserError(f"{name} was quantised with another index than this one")
            key, weight, size, places, values = layer, None, layer.size, layer.index, layer.values
        else:
            if (key := known.get(name)) is None or not key.is_contiguous():
                raise UserError(f"{name} is no contiguous parameter of this model")
            weight, size = key.detach(), key.numel()
            masks.check_places(places, size, name)
            places = places.to(weight.device, torch.int64)
            values = weight.view(-1)[places].float()
        if not torch.isfinite(values).all():
            raise UserError(f"{name}: the weight holds NaN or infinity")
        found[id(key)] = Few(name, weight, layer, stream, size, places, values)
    for device in dict.fromkeys(p.flat.device for p in found.values()):
        _stand_together([p for p in found.values() if p.flat.device == device])
    return found


def _stand_together(few: list[Few]) -> None:
    """The `whole` of these matrices; each keeps a part of it."""
    flat, index = torch.cat([p.flat for p in few]), torch.cat([p.index for p in few])
    counts, start = torch.tensor([len(p.flat) for p in few]), 0
    streams = torch.tensor([p.stream for p in few], dtype=torch.int16).repeat_interleave(counts)
    name, stream, rule = f"{few[0].name} …", streams.to(flat.device), masks.Everything()
    state, size = rule.prepare(flat, 0), sum(p.size for p in few)
    whole = Moving(name, flat, flat, stream, rule, state, size, index=index)
    for p in few:
        p.whole, p.span = whole, slice(start, start := start + len(p.flat))
        p.flat, p.index = flat[p.span], index[p.span]
        if p.layer is not None:
            p.layer.values, p.layer.index = p.flat, p.index
