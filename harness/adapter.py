"""Adapters: a few new tensors move, and every weight of the model stands still. peft makes them.

    --adapter lora                    θ = θ_0 + α/r B A          MeZO-LoRA, [S] Table 1
    --adapter lora --method s-mezo    θ = θ_0 + m ⊙ (α/r B A)    S-MeZO-LoRA, [S]'s reply below
    --adapter prefix                  keys and values of five tokens before the prompt, per layer
    … --bits 4                        θ_0 in NF4: ZO-LoRA and ZO-prefix, which [Q] compares with

A step is Algorithm 1 on the tensors of the adapter, all of them and in fp32. --seed draws them, on
the CPU, so the log of a run rebuilds them. B begins at 0, so a run begins at θ_0. A prefix begins,
as MeZO's, as the keys and values of random tokens: the model answers as if those stood in front.

[S] was asked for LoRA in a review: "Sparse-MeZO can indeed be integrated with LoRA by applying the
masking mechanism to the weight matrices: θ = θ_0 + m ⊙ (AB)". It does not say what m is taken from.
Here it is S-MeZO's own mask of θ_0, the small weights, which no step changes. A weight reads as the
sum, in its own dtype; so in 16 bits a product far below θ_0's spacing is lost as it is read.
"""

import importlib.util
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import masks
import quant
import tasks
import zo
from harness.config import first_line
from harness.loading import DTYPES

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}  # as MeZO's
TOKENS = 5  # of a prefix, as MeZO's
MOVES = r"\.lora_[AB]\.|^prompt_encoder\."  # the names of an adapter's parameters


def check(config, shapes: nn.Module) -> None:
    """ValueError where a model has no place for the adapter. `shapes`: it without its weights."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--adapter needs peft, which is not installed: pip install peft")
    linears = {n: m for n, m in shapes.named_modules() if isinstance(m, nn.Linear)}
    if config.adapter == "lora":
        if lacks := set(LORA["target_modules"]) - {name.rpartition(".")[2] for name in linears}:
            raise ValueError(
                f"--adapter lora: {config.model} has no {min(lacks)} that LoRA could stand beside; "
                "use --adapter prefix"
            )
    odd = [name for name, m in linears.items() if m.in_features % quant.BLOCK]
    if config.bits == 4 and odd:
        raise ValueError(
            f"--bits 4: the rows of {odd[0]} are no multiple of {quant.BLOCK}, which bitsandbytes' "
            "CPU kernels get wrong; use --bits 16"
        )


def attach(model, config):
    """The model with its adapter, in eval mode: peft's, but for S-MeZO's mask."""
    import peft

    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # peft asks for what is old
    with torch.random.fork_rng(devices=[]):  # what is drawn is drawn on the CPU
        torch.manual_seed(config.seed)
        if config.adapter == "prefix":
            return _with_prefix(model, config)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    if config.method == "s-mezo":
        for layer in [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]:
            sum_ = MaskedProduct(layer, config.density)
            parametrize.register_parametrization(layer.base_layer, "weight", sum_, unsafe=True)
            layer.merged_adapters.append("default")  # so peft itself adds nothing
    return model.eval()


class MaskedProduct(nn.Module):
    """θ_0 + m ⊙ (α/r B A): what a layer with S-MeZO's LoRA gets when it asks for its weight."""

    def __init__(self, layer, density: float):
        super().__init__()
        self.layer = (layer,)  # in a tuple: it has the weight, not the weight it
        self.h = masks.threshold(layer.base_layer.weight, density)

    def forward(self, theta: Tensor) -> Tensor:
        product = self.layer[0].get_delta_weight("default")  # A and B as a probe has them read
        return zo.shifted(theta, 1, masks.get_mask(theta, self.h), product).to(theta.dtype)


@torch.no_grad()
def _with_prefix(model, config):
    """ValueError unless the model answers with the prefix as with the prefix's tokens in front."""
    import peft
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    known = model.get_input_embeddings().num_embeddings
    tokens, ids = torch.randint(known, (2, TOKENS)).to(model.device)[:, None]
    mask, padding = torch.ones_like(ids), torch.zeros_like(ids)
    try:
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        whole = tasks.model_inputs(model, torch.cat([tokens, ids], 1), torch.cat([mask, mask], 1))
        want = model(**whole, use_cache=False).logits[0, TOKENS:].float()
        settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
        model = peft.get_peft_model(model, settings).eval()
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        padded = tasks.model_inputs(model, torch.cat([ids, ids], 1), torch.cat([padding, mask], 1))
        got = model(**padded, use_cache=False).logits[0, TOKENS:].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no keys and values to speak of: whatever the model or peft raises
        raise ValueError(f"--adapter prefix: {config.model}: {first_line(error)}") from error
    if (moved := float((got - want).square().mean().sqrt() / want.std())) > DTYPES[model.dtype]:
        raise ValueError(
            f"--adapter prefix: {config.model} does not read it as it reads its tokens (logits "
            f"differ by {moved:.1%}); use --adapter lora"
        )
    return model


def merged(model):
    """An ordinary model where S-MeZO's mask is in the way of an ordinary adapter; else the same."""
    held = [m for m in model.modules() if hasattr(m, "parametrizations")]
    for module in held:
        whole = nn.Parameter(module.weight.detach(), requires_grad=False)
        quant.unparametrize(module, {"weight": whole})
    return model.unload() if held else model
