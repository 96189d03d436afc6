"""[Q]'s sensitive weights: scores, the k highest of a matrix, and what is measured of them.

    code              paper
    fisher            diagonal of the empirical Fisher, the mean over samples of (∂ℓ/∂w_j)²
    sensitive         m: per weight matrix, the k = density · numel weights with the highest score
    coverage          c = ‖m ⊙ ∇L‖² / ‖∇L‖²; convergence wants a small k / c (derived in our tests)
    concentration     share of the squared gradient in its own top fraction, per matrix
    overlap           |A ∩ B| / k, by chance k / d
    random_index, largest, smallest                       masks of the same size to compare with

A mask here is an index: {name of a matrix: sorted flat int32 positions}. The same k per matrix for
every kind, so that kinds differ only in which weights they take. In a program of your own:

    windows = make_mask.text_windows(tokenizer, texts, samples=100, length=512, seed=0)
    index = sensitive(fisher(model, make_mask.text_losses(windows)), 0.001)
    handle = model_patch.Patch(model, index)  # 16 bits; for 4, first quant.quantise each matrix

Deviations, and what is open: we had [Q]'s summary and reviews, not its full text or code; a public
code base is close to it. [Q] defines the score as a mean of squares; that code squares the mean
gradient, which gives another mask: `statistic="of-mean"`. Ranking per matrix, not over all of them,
and the choice of matrices are that code's. Its mask of the largest weights negates indices where it
should negate magnitudes, which makes it a second random mask.
"""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import masks
import zo
from errors import UserError
from snapshot import load_tensors, save_tensors


def decoder_blocks(model) -> list[nn.Module]:
    """The repeated layers: the members of the ModuleList that holds the most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


def decoder_linears(model) -> dict[str, nn.Parameter]:
    """The weights that [Q] masks and quantises: the linear layers' in the decoder blocks, in order.

    By type (nn.Linear, GPT-2's Conv1D) and place, not by name. Embeddings, head, norms and biases
    stay out, and so do experts and routers that are no nn.Linear. UserError if none is left.
    """
    from transformers.pytorch_utils import Conv1D

    inside = [module for block in decoder_blocks(model) for module in block.modules()]
    linear = {id(module.weight) for module in inside if isinstance(module, nn.Linear | Conv1D)}
    found = {name: p for name, p in model.named_parameters() if id(p) in linear}
    if not found or not all(w.dim() == 2 and w.is_floating_point() for w in found.values()):
        raise UserError(f"{type(model).__name__} has no decoder blocks of 16- or 32-bit linears")
    return found


@contextmanager
def _only_gradients_of(wanted: dict[str, Tensor], model, receive):
    """Inside, backward passes call `receive(name, gradient)` and keep no gradient themselves.

    Each block is checkpointed: its activations are computed again when its gradients are due.
    Hugging Face's own switch works in train mode only, where OPT would drop out a tenth; wrapping
    `forward` works in eval mode. All is as before afterwards, also after an exception.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    blocks = [(block, vars(block).get("forward")) for block in decoder_blocks(model)]
    hooks = []

    def hand_over(name, parameter):
        receive(name, parameter.grad)
        parameter.grad = None

    try:
        model.eval()
        for p, _, _ in parameters:
            p.grad = None
            p.requires_grad_(False)
        for name, p in wanted.items():
            p.requires_grad_(True)
            hooks.append(p.register_post_accumulate_grad_hook(partial(hand_over, name)))
        for block, _ in blocks:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for block, forward in blocks:
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for module, training in modes:
            module.training = training


STATISTICS = ("per-sample", "of-mean")


def fisher(model, losses, *, statistic="per-sample", weights=None, device=None, progress=iter):
    """[Q]'s score of every decoder linear, {name: fp32 tensor}: the empirical Fisher diagonal.

    `losses`: one function per sample, loss(model) → scalar, called with use_cache=False inside.
    per-sample: the mean of the samples' squared gradients. of-mean: the square of their mean.
    Squares are taken in fp32: in fp16 a gradient of 1e-4 squares to zero. `weights` restricts it to
    some of `decoder_linears`, `device` is where scores are kept. `progress` wraps `losses`.

    Peak memory: the model, 4 bytes per scored weight, the gradient of one matrix as it comes and in
    fp32, one block's activations, every block's input, the logits. Llama-2-7B in bf16 at 512
    tokens, by count: 13.5 + 25.9 + 0.3 + under 1 GB. The 25.9 go to the CPU with `device`, or
    become 3.2 with `sensitive_index(groups=8)`.
    """
    if statistic not in STATISTICS:
        raise UserError(f"statistic {statistic!r}: {' or '.join(STATISTICS)}")
    if not losses:
        raise UserError("no samples to take gradients of")
    weights = decoder_linears(model) if weights is None else weights
    scores = {
        name: torch.zeros(w.shape, dtype=torch.float32, device=device or w.device)
        for name, w in weights.items()
    }

    def receive(name, gradient):
        if not torch.isfinite(gradient).all():
            raise UserError(f"the gradient of {name} is not finite; use float32 or bfloat16")
        g = gradient.to(scores[name].device, torch.float32)
        scores[name].addcmul_(g, g) if statistic == "per-sample" else scores[name].add_(g)

    with _only_gradients_of(weights, model, receive):
        for loss in progress(losses):
            loss(model).backward()
    for name, score in scores.items():
        score /= len(losses)
        if statistic == "of-mean":
            score.square_()
        if not score.any():
            raise UserError(f"no gradient reaches {name}: a ranking of zeros means nothing")
    return scores


# ------------------------------------------------------------------ masks of one size


def how_many(weights: dict[str, Tensor], density: float) -> dict[str, int]:
    """k = round(density · numel) per matrix; UserError where that leaves no weight to move."""
    if not 0 < density <= 1:
        raise UserError(f"density {density} is outside (0, 1]: the share of weights that move")
    name, least = min(((n, w.numel()) for n, w in weights.items()), key=lambda pair: pair[1])
    if not round(density * least):
        raise UserError(
            f"density {density:g} takes none of the {least} weights of {name}; the smallest that "
            f"takes one of every matrix is {0.51 / least:.3g}"
        )
    return {name: round(density * w.numel()) for name, w in weights.items()}


def top(values: Tensor, k: int) -> Tensor:
    """Where the k largest are: sorted flat int32 indices, exactly k, of equal ones the first."""
    flat = values.detach().flatten()
    h = masks.kth_smallest(flat.clone(), flat.numel() - k + 1)
    above, equal = (flat > h).nonzero(), (flat == h).nonzero()
    chosen = torch.cat([above, equal[: k - len(above)]]).flatten()
    return chosen.sort().values.to("cpu", torch.int32)


def sensitive(scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """[Q]'s mask: per matrix the k highest scores, as `top` gives them."""
    return {name: top(scores[name], k) for name, k in how_many(scores, density).items()}


def sensitive_index(model, losses, density: float, *, groups: int = 1, **how) -> dict[str, Tensor]:
    """`sensitive(fisher(model, losses, **how), density)`; only one of `groups` parts of the scores
    is ever in memory, for as many passes over the samples."""
    weights, index = decoder_linears(model), {}
    how_many(weights, density)  # before the work
    names, size = list(weights), -(-len(weights) // groups)
    for first in range(0, len(names), size):
        part = {name: weights[name] for name in names[first : first + size]}
        index |= sensitive(fisher(model, losses, weights=part, **how), density)
    return index


def largest(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Baseline of the same size: per matrix the k largest |w|."""
    return {name: top(weights[name].abs(), k) for name, k in how_many(weights, density).items()}


def smallest(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Baseline of the same size: per matrix the k smallest |w|, [S]'s choice."""
    return {name: top(-weights[name].abs(), k) for name, k in how_many(weights, density).items()}


def random_index(weights: dict[str, Tensor], density: float, seed: int = 0) -> dict[str, Tensor]:
    """Baseline of the same size: per matrix k weights drawn without replacement, from Philox."""
    index = {}
    for stream, (name, k) in enumerate(how_many(weights, density).items()):
        words = torch.empty(weights[name].numel(), dtype=torch.int32)
        for start, part in zip(range(0, len(words), 1 << 16), words.split(1 << 16), strict=True):
            element = torch.arange(start, start + len(part))
            part.copy_(zo.random_words(seed, zo.MAX_STREAMS + stream, element)[0] - (1 << 31))
        index[name] = top(words, k)
    return index


# ------------------------------------------------------------------ what [Q] measures of masks


def _inside(scores: dict[str, Tensor], index: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per matrix, the sum of the scores in the mask."""
    assert all(i.dtype in (torch.int32, torch.int64) for i in index.values()), "positions, not bits"
    return {name: scores[name].flatten()[i.long()].double().sum() for name, i in index.items()}


def concentration(scores: dict[str, Tensor], density: float) -> dict[str, float]:
    """Per matrix, the share of the squared gradient in its own top fraction."""
    inside = _inside(scores, sensitive(scores, density))
    return {name: float(inside[name] / scores[name].double().sum()) for name in inside}


def coverage(scores: dict[str, Tensor], index: dict[str, Tensor]) -> float:
    """c: the share of one gradient's square, over all matrices, inside a mask (another's, mostly).

    A random mask has c = k/d, the density, on average.
    """
    inside = sum(_inside(scores, index).values())
    return float(inside / sum(score.double().sum() for score in scores.values()))


def overlap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|A ∩ B| / k over all matrices, for masks of one size. By chance: k/d, the density."""
    assert {n: len(i) for n, i in a.items()} == {n: len(i) for n, i in b.items()}, "other sizes"
    both = sum(int(torch.isin(a[name], b[name]).sum()) for name in a)
    return both / sum(len(i) for i in a.values())


# ------------------------------------------------------------------ a mask as a file


def signature(weights: dict[str, Tensor]) -> dict:
    """What tells one model from another: names, shapes and eight values of each matrix.

    Compared to within a 16-bit rounding, so a mask of the fp32 model fits the same model in bf16
    or fp16, on any device, which no hash would.
    """
    return {name: {"shape": list(w.shape), "sample": _sample(w)} for name, w in weights.items()}


def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach().flatten()
    return [float(f"{v:.6g}") for v in flat[:: max(1, flat.numel() // 8)][:8].float().tolist()]


def save_mask(path, index: dict[str, Tensor], provenance: dict) -> None:
    """Write {name: positions} and where they come from ("matrices" is `signature`'s answer).

    A file of that name is replaced by a complete one or not at all.
    """
    save_tensors(Path(path), index, {"provenance": json.dumps(provenance)})


def read_mask(path) -> tuple[dict[str, Tensor], dict]:
    """(index, provenance) of a file, no model needed; UserError where it is no mask."""
    try:
        index, about = load_tensors(path)
        provenance = json.loads(about["provenance"])
        if set(index) != set(provenance["matrices"]) or not {"model"} <= set(provenance):
            raise ValueError("its provenance is of other matrices")
        for name, i in index.items():
            if i.dtype != torch.int32:
                raise ValueError(f"{name} is of {i.dtype}, not int32")
            masks.check_places(i, zo.MAX_ELEMENTS, name)
    except FileNotFoundError as error:
        raise UserError(f"no mask file {path}; python masks.py makes one") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        why = (f"{type(error).__name__}: {error}").splitlines()[0]
        raise UserError(
            f"{path} is no complete mask file ({why}); make it again with python masks.py"
        ) from error
    return index, provenance


def check_mask(path, index, provenance: dict, weights: dict[str, Tensor]) -> None:
    """UserError unless names and shapes of the mask are those of `weights`, the `decoder_linears`.

    Meta tensors will do, so that it can be said before anything is loaded; `check_values` does the
    rest for each matrix as it comes.
    """
    made_for = provenance["matrices"]
    found = {name: list(w.shape) for name, w in weights.items()}
    for name in [n for n in found if n not in made_for] + list(made_for):
        ours, theirs = found.get(name), made_for.get(name, {}).get("shape")
        if ours != theirs:
            why = f"{name} is {theirs or 'missing'} there and {ours or 'missing'} here"
            raise _another_model(path, provenance, why)
        if index[name][-1] >= weights[name].numel():
            raise UserError(
                f"{path}: {name} has {weights[name].numel()} weights, no {index[name][-1]}"
            )


def check_values(path, provenance: dict, name: str, weight: Tensor) -> None:
    """UserError unless `weight` has the values that the mask file remembers, to 16-bit rounding."""
    theirs = torch.tensor(provenance["matrices"][name]["sample"])
    if not torch.allclose(torch.tensor(_sample(weight)), theirs, rtol=2**-8, atol=1e-7):
        raise _another_model(path, provenance, f"{name} holds other values")


def _another_model(path, provenance, why: str) -> UserError:
    return UserError(
        f"{path} was made for {provenance['model']}, not for this model: {why}; give that model, "
        "or make a mask for this one with python masks.py"
    )
