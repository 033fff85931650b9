"""Tiny real models of every family, made here, without any download."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

SENTENCES = [
    f"{who} {verb} {what} {where}."
    for who in ("The engineer", "A teacher", "My neighbour", "The old model")
    for verb in ("prunes", "measures", "remembers", "repairs")
    for what in ("a small network", "seven layers", "the wide river", "her own work")
    for where in ("in the evening", "near the harbour", "without losing anything", "for hours")
]
VOCAB = 300
QUIET = ("tracking.progress=false", "tracking.report_to=[]")
"""Settings of a run whose curves nobody looks at: drawing them for TensorBoard takes longer than the steps."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6,
    "num_hidden_layers": 3, "vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama-mha-tied": (LlamaConfig, {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"hidden_size": 26, "sliding_window": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "granite": (GraniteConfig, {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3,
                                "logits_scaling": 2.0, "tie_word_embeddings": True}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2}),
    "phi3": (Phi3Config, {"sliding_window": 16}),
    "phi3-partial": (Phi3Config, {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}, "initializer_range": 0.1}),
    "olmo2": (Olmo2Config, {}),
    "olmo2-mha": (Olmo2Config, {"num_key_value_heads": 6}),
    "olmo3": (Olmo3Config, {"sliding_window": 16, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 30,
                                  "tie_word_embeddings": True}),
    "qwen3_moe": (Qwen3MoeConfig, {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 24}),
}  # fmt: skip


def tiny_config(name: str, **changes):
    """The transformers configuration of a tiny model by the names in `CONFIGS`."""
    cls, facts = CONFIGS[name]
    return cls(**{**SIZES, **facts, **changes})


def tiny_model(name: str, seed: int = 0, **changes):
    """A random tiny model in which no bias is zero and no norm weight is one, so that no mistake hides behind them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB` tokens, trained on the sentences; with `bos` it puts `<bos>` first."""
    special = ["<eos>", "<bos>"][: 1 + bos]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(SENTENCES, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing("<bos> $0", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>" if bos else None
    )
