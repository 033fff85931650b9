"""Tiny models, gates and LoRA on disk as a finished run, for the tests of export and of the models it writes."""

import random
import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nuteprune import arch
from nuteprune.arch import PROJECTIONS, ArchSpec, read_spec
from nuteprune.config import load_config
from nuteprune.exporting import folding
from nuteprune.masks import Gates, sparsity_of, unit_shape
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.runs.rundir import save_run

FAMILIES = tuple(arch.FAMILIES)
SHAPES = ("uniform", "per_layer_ffn", "per_layer")
EXPERTS = ("qwen3_moe", "mixtral")
FAMILY_SHAPES = [(f, s) for f in FAMILIES for s in SHAPES]
VOCAB, LAYERS = 61, 4
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rms_norm_eps": 0.1,  # large, so that a wrong epsilon shows
}  # fmt: skip
EXTRA = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"attention_bias": True},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3,
                "logits_scaling": 3.0, "mlp_bias": True},
    "smollm3": {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 7},
    "phi3": {"sliding_window": 7},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "sliding_window_pattern": 3, "query_pre_attn_scalar": 9},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 5, "sliding_window": 7},
}  # fmt: skip
PLAIN = {
    "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "qwen3": {"attention_bias": False},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None},
    "phi3": {"sliding_window": None}, "olmo2": {"attention_bias": False}, "mixtral": {"sliding_window": None},
}  # fmt: skip
"""In place of those, what llama.cpp has."""
BIASED_LLAMA = {"attention_bias": True, "mlp_bias": True}


def asked(request) -> tuple[str, ...]:
    """The families of the chosen tests that take this fixture (`-k FAMILY`); all, where one of them names none."""
    tests = [item for item in request.session.items if request.fixturename in getattr(item, "fixturenames", ())]
    calls = [getattr(item, "callspec", None) for item in tests]
    found = {call and call.params.get("family") for call in calls}
    return tuple(family for family in FAMILIES if None in found or family in found)


def base_model(family: str, tied: bool = False, seed: int = 0, **options) -> PreTrainedModel:
    """A tiny model whose every parameter is random: norms are not ones, biases not zeros."""
    config = AutoConfig.for_model(family, **{**SIZES, **EXTRA.get(family, {}), **options}, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.25)
    return model


def some_gates(spec: ArchSpec, shape: str, fractional: bool = True, hidden: int = 37, empty: bool = True) -> Gates:
    """Gates with zeros of every kind the shape allows; `hidden` dimensions stay (an odd number by default)."""
    if (spec.experts > 1 or (spec.hidden_divides and shape == "uniform")) and hidden % 8:
        hidden = 40  # a multiple of the four heads that stay, and of 8
    g = torch.Generator().manual_seed(1)
    heads, groups = torch.ones(unit_shape(spec, "heads")), torch.ones(unit_shape(spec, "kv_groups"))
    ffn, residual = torch.ones(unit_shape(spec, "ffn")), torch.zeros(spec.hidden)
    experts = torch.ones(unit_shape(spec, "experts"))
    residual[torch.randperm(spec.hidden, generator=g)[:hidden]] = 1
    sublayers = {}
    for layer in range(spec.layers):
        if shape == "uniform":
            groups[layer, layer % spec.kv_heads] = 0
            for expert in ffn[layer].view(spec.experts, spec.ffn):
                expert[torch.randperm(spec.ffn, generator=g)[: 13 if spec.experts == 1 else 16]] = 0
            if spec.experts > 1:
                experts[layer, torch.randperm(spec.experts, generator=g)[:2]] = 0
            continue
        if shape == "per_layer_ffn":
            groups[layer, layer % spec.kv_heads] = 0
        else:
            heads[layer] = (torch.rand(spec.heads, generator=g) > 0.4).float()
        if spec.experts == 1:
            ffn[layer] = (torch.rand(spec.ffn, generator=g) > 0.3).float()
            continue
        experts[layer, torch.randperm(spec.experts, generator=g)[: layer % 4]] = 0
        for expert in ffn[layer].view(spec.experts, spec.ffn):
            expert[torch.randperm(spec.ffn, generator=g)[: 8 * (layer % 3)]] = 0
    if shape == "per_layer":
        heads[1] = torch.tensor([1.0, 0, 1, 1, 0, 0])
    if shape != "uniform":
        sublayers = {"attn_sublayers": torch.ones(spec.layers), "ffn_sublayers": torch.ones(spec.layers)}
        if empty:  # the first layer without attention, a layer without FFN, one with neither
            sublayers["attn_sublayers"][[0, 3]] = 0
            sublayers["ffn_sublayers"][[2, 3]] = 0
        if spec.experts > 1:
            del sublayers["ffn_sublayers"]
    gates = {"heads": heads, "kv_groups": groups, "ffn": ffn, "hidden": residual, **sublayers}
    if spec.experts > 1:
        gates["experts"] = experts
    if fractional:
        gates = {k: z * (0.5 + 0.5 * torch.rand(z.shape, generator=g)) for k, z in gates.items()}
    return Gates(**gates)


def random_lora(model, rank: int = 3, skip: tuple[str, ...] = ("k_proj",)) -> dict:
    """LoRA pairs on all projections that can have them but those in `skip`."""
    g = torch.Generator().manual_seed(2)
    pairs = {}
    for index, layer in enumerate(model.model.layers):
        for name, (owner, attribute) in folding.projections(layer).items():
            if name in PROJECTIONS and name not in skip:
                n, k = getattr(owner, attribute).weight.shape
                pairs[f"{index}.{name}"] = (
                    torch.randn(rank, k, generator=g) * 0.2, torch.randn(n, rank, generator=g) * 0.2
                )  # fmt: skip
    return pairs


def run_config(tmp_path, **overrides):
    """A resolved configuration of a run over the files that `on_disk` writes."""
    keys = {"model.path": tmp_path / "base", "run_dir": tmp_path / "run", "data.source": tmp_path / "text.txt",
            "data.seq_len": 16, "lora.rank": 3, "lora.alpha": 6,
            "gates.ffn_multiple": 1, "gates.hidden_multiple": 1, "gates.shape": "uniform",
            **overrides}  # fmt: skip
    return load_config(None, [f"{k}={v}" for k, v in keys.items()])


def on_disk(tmp_path, model) -> None:
    """Write the base model with a tokenizer, and a text."""
    model.save_pretrained(tmp_path / "base")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *string.ascii_letters, "Ġ", "th"])}
    tokenizer = Tokenizer(models.BPE(words, [("t", "h")]))  # one token a letter, and one pair
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices(string.ascii_letters + " ", k=300)))


def trained(tmp_path, family: str, gates_of, snapshots=(), base=None, **overrides):
    """A finished run on disk; returns its configuration, the base model, gates and LoRA."""
    model = base or base_model(family)
    spec = read_spec(model.config)
    on_disk(tmp_path, model)
    gates = gates_of(spec)
    lora = random_lora(model)
    sparsity = sparsity_of(spec, gates)
    target = overrides.pop("sparsity.target", round(sparsity, 4))
    config = run_config(tmp_path, **{"sparsity.target": target}, **overrides)
    scores = {
        k: z + torch.rand(z.shape, generator=torch.Generator().manual_seed(4)) for k, z in gates.as_dict().items()
    }
    made = [s(spec, lora) for s in snapshots]
    save_run(tmp_path / "run", config, spec, gates, scores, lora, made, {"sparsity": sparsity, "steps": 5})
    return config, model, gates, lora


def masked_logits(model, gates: Gates, lora, ids, scaling: float = 2.0) -> torch.Tensor:
    """Logits of the masked model by the paired forward (wraps the model)."""
    spec = read_spec(model.config)
    paired = PairedModel(model, spec, load_config(None, ["lora.rank=3", "lora.alpha=6"]).lora)
    with torch.no_grad():
        return paired.logits(ids, build_view(spec, gates, lora, scaling, torch.float32))


def some_ids(batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def loaded(directory, **options):
    options = {"trust_remote_code": True, "dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
