"""Uses exported models as their users do: public packages only, this project not importable. Run with `python -I`.

Arguments: a file of torch.save((jobs, ids, long_ids)), where jobs are [(directory, trust_remote_code, checks)], and
where to write {directory: what the checks gave}.
"""

import importlib.util
import sys
from pathlib import Path

OURS = ("nuteprune",)
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [entry for entry in sys.path if not any((Path(entry) / name).is_dir() for name in OURS)]
assert all(importlib.util.find_spec(name) is None for name in OURS)

# Imported behind the block above, so that none of them can bring this project in.
import gguf  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
          "return_dict_in_generate": True}  # fmt: skip

NAMED = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def load(directory, trust, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust, dtype=torch.float32, **options)
    return model.eval()


def close(got, wanted):
    assert float((got - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def generates(model, ids):
    """With the cache as without, and a row of a left-padded batch as the row alone."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    cached, plain = (model.generate(ids, attention_mask=mask, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))
    alone = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **GREEDY)
    close(torch.stack(alone.logits)[:, 0], torch.stack(cached.logits)[:, 1])


def engine_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **_):
    """As an engine computes it: heads as the layer's configuration says, the mask its own."""
    layer = module.config.per_layer_config[module.layer_idx]
    assert attention_mask is None
    assert (query.shape[1], key.shape[1]) == (layer.num_attention_heads, layer.num_kv_heads)
    back = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    seen = (back >= 0) & (back < (sliding_window or len(back)))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def serves_as_in_vllm(directory, model, ids):
    """What vLLM's transformers backend does: the base model by AutoModel, attention by the name "vllm", head by itself.

    Absent attention calls none; of experts it must know nothing, for its own are alike in all layers.
    """
    AttentionInterface.register("vllm", engine_attention)
    base = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32, attn_implementation="vllm")
    assert base.config._attn_implementation == "vllm"
    assert not any(getattr(layer, "num_experts", 0) for layer in base.config.per_layer_config)
    with torch.no_grad():
        hidden = base.eval()(ids, use_cache=False).last_hidden_state
        close(model.lm_head(hidden) * base.config.logit_scale, model(ids).logits)


def compiles(model, ids):
    """As one graph: with `fullgraph=True` torch raises where it would make two. Experts are one product, no loop."""
    torch.compiler.reset()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="eager")(ids).logits, model(ids).logits)


def trains_a_new_lora(directory, trust, ids, targets):
    """peft's own LoRA on the pruned model: only it learns, and it does."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load(directory, trust), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert losses[-1] < 0.8 * losses[0], losses


def write_gguf(model, path):
    """The model as GGUF of llama.cpp's architecture `llama`, float32, without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:  # llama.cpp rotates neighbours, transformers halves
            halves = array.reshape(heads, 2, config.head_dim // 2, -1)
            array = numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_logits(model, directory, ids):
    """Logits of the model after a trip through a GGUF file."""
    path = Path(directory) / "model.gguf"
    write_gguf(model, path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(directory, gguf_file=path.name, dtype=torch.float32).eval()
        return again(ids).logits


def main():
    jobs, ids, long_ids = torch.load(sys.argv[1])
    out = {}
    for directory, trust, checks in jobs:
        model = load(directory, trust)
        assert AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)("ac")["input_ids"] == [3, 5]
        with torch.no_grad():
            out[directory] = {"logits": model(ids).logits}
            if "long" in checks:
                out[directory]["long"] = model(long_ids).logits
        if trust:
            serves_as_in_vllm(directory, model, ids)
        compiles(model, ids)
        generates(model, long_ids if "long" in checks else ids)
        if "lora" in checks:
            for targets in ("all-linear", NAMED):
                trains_a_new_lora(directory, trust, ids, targets)
        if "gguf" in checks:
            out[directory]["gguf"] = gguf_logits(model, directory, ids)
    torch.save(out, sys.argv[2])


main()
