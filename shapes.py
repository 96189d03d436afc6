"""Models of published shapes with random weights, for bench.py: time and memory need no others.

They are built without ever standing in memory twice: on torch's meta device first, then one tensor
after the other where and as it is needed, in 4 bits too.
"""

import torch
from torch import nn

import quant
import sensitivity

SHAPES = {  # name: (model type, what makes its shape)
    "tiny": ("llama", dict(hidden_size=96, intermediate_size=256, layers=3, heads=3, vocab=155)),
    "134m": ("llama", dict(hidden_size=768, intermediate_size=2048, layers=12, heads=12)),
    "1b": ("llama", dict(hidden_size=2048, intermediate_size=5632, layers=22, heads=32, kv=4)),
    "7b": ("llama", dict(hidden_size=4096, intermediate_size=11008, layers=32, heads=32)),
    "13b": ("llama", dict(hidden_size=5120, intermediate_size=13824, layers=40, heads=40)),
    "30b": ("llama", dict(hidden_size=6656, intermediate_size=17920, layers=60, heads=52)),
    "opt-13b": ("opt", dict(hidden_size=5120, intermediate_size=20480, layers=40, heads=40)),
    "opt-30b": ("opt", dict(hidden_size=7168, intermediate_size=28672, layers=48, heads=56)),
    "opt-66b": ("opt", dict(hidden_size=9216, intermediate_size=36864, layers=64, heads=72)),
}
SENSITIVE = 0.001  # [Q]'s density


def build(shape: str, dtype: torch.dtype, device: str, four_bits: bool = False):
    """A causal LM of this shape with random weights, made once, where and as it is needed.

    four_bits: one matrix after the other is drawn in `dtype`, quantised and dropped.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kind, size = SHAPES[shape]
    config = AutoConfig.for_model(
        kind,
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        ffn_dim=size["intermediate_size"],  # OPT's name for it
        word_embed_proj_dim=size["hidden_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size.get("kv", size["heads"]),
        vocab_size=size.get("vocab", 50272 if kind == "opt" else 32000),
        max_position_embeddings=2048,
    )
    with torch.device(device), init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # on the meta device each use had a tensor of its own

    def draw(like):
        drawn = torch.empty(like.shape, dtype=dtype, device=device)
        return drawn.normal_(0, 0.02) if like.dim() > 1 else drawn.fill_(0.5)

    with torch.no_grad():
        if four_bits:
            for number, (name, parameter) in enumerate(sensitivity.decoder_linears(model).items()):
                weight = draw(parameter)
                quant.quantise(model, name, weight, places(weight, number), double_quant=True)
        drawn = {}  # tied weights once
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if parameter not in drawn:
                        drawn[parameter] = nn.Parameter(draw(parameter), requires_grad=False)
                    module._parameters[name] = drawn[parameter]
    return model.eval()


def places(weight: torch.Tensor, number: int) -> torch.Tensor:
    """A random 0.1 % of one matrix, for rows whose time does not depend on which."""
    k = round(SENSITIVE * weight.numel())
    generator = torch.Generator().manual_seed(number)
    return torch.randint(weight.numel(), (k,), generator=generator).unique()
