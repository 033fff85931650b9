"""Flash attention by its package: a stand-in that computes as flash-attn does, for transformers to load as it."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import VOCAB, tiny_config, tiny_model
from transformers import AttentionInterface

from nuteprune.arch import read_spec
from nuteprune.config import LoraConfig, LossConfig, ModelConfig
from nuteprune.errors import UserError
from nuteprune.exporting.modeling_ragged import RaggedLlamaConfig, RaggedLlamaForCausalLM
from nuteprune.masks import Gates
from nuteprune.model.layers import build_view
from nuteprune.model.loading import read_base
from nuteprune.model.pairing import PairedModel

IDS = torch.arange(24).view(2, 12) * 7 % VOCAB


@pytest.fixture
def flash(monkeypatch):
    """The package `flash_attn` as far as transformers uses it; returns the calls it got."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        calls.append(q.shape)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = package.flash_attn_varlen_func = package.flash_attn_with_kvcache = flash_attn_func
    padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    loading = sys.modules["transformers.modeling_flash_attention_utils"]
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(loading, "_loaded_implementation", None)
    # What it checks besides: the package's version, and a card.
    base = transformers.PreTrainedModel
    monkeypatch.setattr(base, "_flash_attn_can_dispatch", lambda *_, **__: True)
    for facts in sys.modules["transformers.modeling_utils"].FLASH_ATTENTION_COMPATIBILITY_MATRIX.values():
        monkeypatch.setitem(facts, "general_availability_check", lambda: True)
    before = AttentionInterface()["flash_attention_2"]
    yield calls
    AttentionInterface.register("flash_attention_2", before)


def paired_loss(attention: str, gates: Gates) -> torch.Tensor:
    hf = tiny_model("llama").bfloat16()
    hf.set_attn_implementation(attention)
    spec = read_spec(hf.config)
    model = PairedModel(hf, spec, LoraConfig(rank=4))
    student, teacher = (build_view(spec, g, model.lora(), model.scaling, model.dtype) for g in (gates, None))
    return model(IDS, student, teacher, LossConfig()).total


def test_the_paired_model_computes_with_it(flash):
    heads = torch.ones(3, 6)
    heads[0, :2] = heads[1] = heads[2, 4] = 0  # unequal groups, and a layer without attention
    want = paired_loss("sdpa", Gates(heads=heads))
    got = paired_loss("flash_attention_2", Gates(heads=heads))
    assert len(flash) == 5  # three layers of the teacher, two of the student
    torch.testing.assert_close(got, want)
    assert torch.equal(got, paired_loss("flash_attention_2", Gates(heads=heads)))  # wrapped once


def test_a_per_layer_export_computes_with_it_beside_the_paired_model(flash):
    layers = [
        {
            "skip": [],
            "num_attention_heads": 5,
            "num_key_value_heads": 2,
            "heads_per_group": [2, 3],
            "intermediate_size": 9,
        },
        {"skip": ["attention"], "num_key_value_heads": 1, "intermediate_size": 5},
        {"skip": ["mlp"], "num_attention_heads": 1, "num_key_value_heads": 1},
    ]
    sizes = tiny_config("llama").to_diff_dict() | {"per_layer_config": dict(enumerate(layers))}
    logits = []
    for attention in ("sdpa", "flash_attention_2"):
        paired_loss(attention, Gates(heads=torch.ones(3, 6)))
        torch.manual_seed(0)
        config = RaggedLlamaConfig(**sizes, attn_implementation=attention)
        model = RaggedLlamaForCausalLM(config).bfloat16().eval()
        logits.append(model(IDS).logits)
    torch.testing.assert_close(*logits)
    hf = tiny_model("llama").bfloat16()  # a stock model is none the wiser
    want = hf(IDS).logits
    hf.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(hf(IDS).logits, want)


def test_float32_is_refused_in_one_line(model_dir):
    config = ModelConfig(path=str(model_dir), attention="flash_attention_2")
    with pytest.raises(UserError, match=r"set model\.dtype=bfloat16"):
        read_base(config)
