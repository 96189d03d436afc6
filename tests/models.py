"""Tiny random models of many architectures, a task for one, and the literal Algorithm 1 on them."""

import json

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import zo

VOCAB = 96
WORDS = [*"abcdefghij", "red", "blue", ".", "?"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA = {"num_key_value_heads": 4}
ARCHITECTURES = {  # name: (model type, what differs from SIZES)
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", MHA),
    "phi": ("phi", MHA),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def build(name: str, dtype=torch.float32, seed: int = 0):
    """A tiny random model in eval mode; its norms are perturbed, so that no weight is exactly 1."""
    model_type, changes = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def batch(rows: int = 3, tokens: int = 8, seed: int = 0) -> dict:
    """Left-padded input: row r has r padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, :row], ids[row, :row] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def loss_fn(logits):
    """Any smooth function of the last position's logits, in fp32."""
    return -torch.log_softmax(logits[:, -1].float(), -1)[:, 5].mean()


def literal_step(model, rule_masks, inputs, *, lr, eps, seed):
    """zo.sparse_mezo_step, Algorithm 1 in place, on all parameters of a model."""
    theta = [parameter.detach() for parameter in model.parameters()]
    with torch.no_grad():
        return zo.sparse_mezo_step(
            theta,
            lambda: loss_fn(model(**inputs, use_cache=False).logits),
            rule_masks,
            lr=lr,
            eps=eps,
            seed=seed,
        )


def write_model(path) -> None:
    """A tiny random LLaMA with a word tokenizer."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(path)
    build("llama-tied").save_pretrained(path)


def write_task(path) -> None:
    """Such a model, and a task for it: which of two words came first?"""
    write_model(path / "model")
    for name, count in (("train", 90), ("test", 40)):
        with open(path / f"{name}.jsonl", "w") as file:
            for i in range(count):
                label = i % 2
                words = [WORDS[(i * k + 3) % 10] for k in (1, 3, 7)]
                prompt = " ".join([("red", "blue")[label], *words, "?"])
                row = {"prompt": prompt, "options": [" red", " blue"], "label": label}
                file.write(json.dumps(row) + "\n")
