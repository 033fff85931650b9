"""model.gguf beside an export: sizes per layer, types, the same logits; and what llama.cpp cannot hold is one line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from exporting import FAMILIES, PLAIN, assert_close, base_model, loaded, masked_logits, some_gates, some_ids, trained
from test_trim import RARE, STRANGE, bpe
from tiny import SENTENCES
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nuteprune.__main__ import main
from nuteprune.arch import read_spec
from nuteprune.errors import UserError
from nuteprune.exporting import gguf_vocab
from nuteprune.exporting.gguf_families import ARCHITECTURES, CHECKED
from nuteprune.exporting.gguf_model import gguf_architecture
from nuteprune.exporting.gguf_vocab import vocabulary, write_vocabulary
from nuteprune.masks import Gates
from nuteprune.runs.checkpoint import verify
from nuteprune.stages import export

SHAPES = ("uniform", "per_layer_ffn", "per_layer")


def exported(tmp_path, family, shape, quantisation="f32", **options):
    """An export with a GGUF file, and the masked model's logits."""
    size = 40 if family == "llama" else 37

    def gates_of(spec):
        gates = some_gates(spec, shape, hidden=size)
        return Gates(ffn=gates.ffn) if family in ("olmo2", "olmo3") else gates

    config, model, gates, lora = trained(
        tmp_path, family, gates_of, base=base_model(family, **options),
        **{"gates.shape": shape, "export.gguf": quantisation},
    )  # fmt: skip
    return export.run(config), masked_logits(model, gates, lora, some_ids())


def facts(reader, name):
    """A value, or list of values, of a GGUF file."""
    return reader.get_field(name).contents()


def test_uniform_llama_is_read_back_by_transformers(tmp_path):
    directory, wanted = exported(tmp_path, "llama", "uniform")
    verify(directory)  # the manifest knows the file
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close(model(some_ids()).logits, wanted)


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_sizes_of_each_layer(tmp_path, family, shape):
    directory, _ = exported(tmp_path, family, shape)
    reader, config = gguf.GGUFReader(directory / "model.gguf"), loaded(directory).config
    assert facts(reader, "general.architecture") == "deci"
    sizes = [config.layer_sizes(index) for index in range(config.num_hidden_layers)]
    heads, kv, ffn = (facts(reader, f"deci.{name}") for name in (
        "attention.head_count", "attention.head_count_kv", "feed_forward_length"))  # fmt: skip
    # The first layer has no attention, which llama.cpp cannot have: one head of zeros.
    assert heads == [1] + [sum(groups) for groups, _ in sizes[1:]]
    # Layer 2 has attention only, the last one nothing: FFNs of zeros there; the others in whole blocks.
    assert all(width % 32 for _, width in sizes[:2])
    assert ffn == [32] * len(sizes)
    for (groups, _), h, k in zip(sizes[1:], heads[1:], kv[1:], strict=True):
        assert h % k == 0 if k else not groups
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert not np.any(tensors["blk.0.attn_output.weight"].data)
    assert not np.any(tensors["blk.3.ffn_down.weight"].data)
    assert "blk.3.attn_q.weight" not in tensors


@pytest.mark.parametrize(("family", "heads", "architecture"), [("qwen2", 6, "llama"), ("qwen3", 6, "qwen3"),
                                                               ("mistral", 6, "llama")])  # fmt: skip
def test_architecture_of_uniform_exports(tmp_path, family, heads, architecture):
    plain = {"attention_bias": False} if family == "qwen3" else {}
    directory, _ = exported(tmp_path, family, "uniform", **plain)
    reader = gguf.GGUFReader(directory / "model.gguf")
    assert facts(reader, "general.architecture") == architecture
    assert facts(reader, f"{architecture}.attention.key_length") == 8


def test_no_window_is_named_where_no_layer_has_one(tmp_path):
    directory, _ = exported(tmp_path, "gemma3_text", "uniform", layer_types=["full_attention"] * 4)
    names = gguf.GGUFReader(directory / "model.gguf").fields
    assert not [name for name in names if "window" in name or "swa" in name]


@pytest.mark.parametrize(("quantisation", "kind"), [("f16", "F16"), ("q8_0", "Q8_0")])
def test_matrices_are_stored_in_the_type_that_is_asked_for(tmp_path, quantisation, kind):
    directory, _ = exported(tmp_path, "llama", "uniform", quantisation, head_dim=16)
    reader, state = gguf.GGUFReader(directory / "model.gguf"), loaded(directory).state_dict()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = tensors["blk.1.attn_output.weight"]
    assert found.tensor_type.name == kind
    wanted = state["model.layers.1.self_attn.o_proj.weight"]
    assert_close(torch.from_numpy(gguf.dequantize(found.data, found.tensor_type)), wanted, 5e-3)
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    # 27 units are filled up to a block; rows of the hidden size, 40, are no blocks.
    down, wanted = tensors["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"]
    assert down.tensor_type.name == kind
    assert_close(torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))[:, :27], wanted, 5e-3)
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "F16"


@pytest.mark.parametrize(
    ("family", "shape"), [(f, s) for f in (*CHECKED, *ARCHITECTURES) for s in SHAPES if s == "uniform" or f in CHECKED]
)
def test_llama_cpp_computes_the_same(tmp_path, family, shape):
    pytest.importorskip("llama_cpp_py_sync", reason="pip install llama-cpp-py-sync")
    sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
    from llamacpp_alone import TOLERANCE, compare

    plain = {"head_dim": 32, "rms_norm_eps": 1e-3, **PLAIN.get(family, {})}
    if family in ("olmo2", "olmo3"):  # its heads stay as wide as the hidden size
        plain |= {"hidden_size": 192}
    directory, _ = exported(tmp_path, family, shape, **plain)
    *_, apart, greedy, _ = compare(str(directory))  # its tokenizer has letters only
    assert apart <= TOLERANCE
    assert greedy <= TOLERANCE


def refused(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 2
    (line,) = (row for row in capsys.readouterr().err.splitlines() if row.startswith("nuteprune: "))
    return line


def test_what_llama_cpp_cannot_hold_is_one_line_and_nothing_is_written(tmp_path, capsys):
    trained(tmp_path, "qwen3", lambda s: some_gates(s, "per_layer"), **{"gates.shape": "per_layer"})
    run = tmp_path / "run"
    line = refused(capsys, f"run_dir={run}", "--gguf", "q4_0")
    assert "export.gguf: expected none | f32 | f16 | q8_0 | q6_k | q5_k_m | q4_k_m | q3_k_m, got 'q4_0'" in line
    assert "use export.shape=uniform" in refused(capsys, f"run_dir={run}", "--gguf", "f16")
    assert not (run / "export").exists()
    assert not list(run.glob(".export*"))


def test_qwen3_with_a_bias_on_o_proj_is_refused(tmp_path):
    with pytest.raises(UserError, match="no bias on o_proj"):
        exported(tmp_path, "qwen3", "uniform")


def test_scaled_rope_that_llama_cpp_lacks_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}
    with pytest.raises(UserError, match="rope_type dynamic"):
        exported(tmp_path, "llama", "uniform", rope_parameters=rope)


@pytest.mark.parametrize(("family", "options"), [("llama", {"hidden_act": "gelu"}),
                                               ("gemma3_text", {"hidden_activation": "silu"})])  # fmt: skip
def test_an_activation_that_llama_cpp_does_not_compute_is_refused(family, options):
    config = base_model(family, **options).config
    with pytest.raises(UserError, match=r"another activation in its FFN than this model's (gelu|silu): export without"):
        gguf_architecture(read_spec(config), "uniform", config)


def fast(pre, merges=(("a", "b"),), first="$0", bos_token=None, **options):
    words = {word: i for i, word in enumerate(["a", "b", "ab", "<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(words, list(merges), **options))
    tokenizer.pre_tokenizer = pre
    tokenizer.post_processor = processors.TemplateProcessing(first, special_tokens=[("<s>", 4), ("</s>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos_token, eos_token="</s>")


def vocabulary_file(folder, tokenizer):
    """A GGUF file of nothing but a tokenizer, with some embeddings that have no token."""
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    write_vocabulary(writer, tokenizer, len(tokenizer) + 3)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return folder / "vocabulary.gguf"


def byte_level(steps, ignore_merges, texts):
    """A tokenizer of bytes that splits text in such steps, as `gguf_vocab` names them; its tokens join whatever may be
    joined in other steps."""

    def made(step):
        if step == "digits":
            return pre_tokenizers.Digits(individual_digits=True)
        if isinstance(step, str):
            return pre_tokenizers.Split(Regex(step), "isolated")
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step[1])

    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.pre_tokenizer = made(("ByteLevel", False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    raw.train_from_iterator(texts, trainer)
    content = json.loads(raw.to_str())
    if ignore_merges:
        del content["model"]["merges"][::5]  # there are words that no merge makes
    raw = Tokenizer.from_str(json.dumps(content))
    raw.pre_tokenizer = pre_tokenizers.Sequence(list(map(made, steps)))
    raw.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("steps", "ignore_merges"), [*gguf_vocab._PRE_TOKENIZERS, ((), False)])
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, steps, ignore_merges):
    pytest.importorskip("llama_cpp_py_sync", reason="pip install llama-cpp-py-sync")
    sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
    from llamacpp_alone import TEXT, LlamaCpp

    texts = [TEXT, STRANGE, RARE, Path(gguf_vocab.__file__).read_text()]
    own = byte_level(steps, ignore_merges, texts) if steps else bpe(fallback=True)
    engine = LlamaCpp(str(vocabulary_file(tmp_path, own)))
    for text in (*texts, *map(str.swapcase, texts), *SENTENCES[::10]):
        assert engine.tokenize(text) == own(text)["input_ids"]


@pytest.mark.parametrize(("template", "bos_token", "wanted"), [
    ("<s> $0", "<s>", (4, True, False)),
    ("$0", "<s>", (4, False, False)),  # it knows a bos, and puts it nowhere
    ("$0", None, (None, False, False)),
    ("<s> $0", None, (4, True, False)),  # it puts one there that it calls nothing
    ("<s> $0 </s>", "<s>", (4, True, True)),
])  # fmt: skip
def test_the_first_token_is_that_of_the_tokenizer(tmp_path, template, bos_token, wanted):
    tokenizer = fast(pre_tokenizers.ByteLevel(add_prefix_space=False), first=template, bos_token=bos_token)
    reader = gguf.GGUFReader(vocabulary_file(tmp_path, tokenizer))
    found = [reader.get_field(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "add_bos_token", "add_eos_token")]
    assert tuple(field and field.contents() for field in found) == wanted


def test_several_chat_templates_are_all_written(tmp_path):
    tokenizer = fast(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    reader = gguf.GGUFReader(vocabulary_file(tmp_path, tokenizer))
    assert facts(reader, "tokenizer.chat_template") == "{{ messages }}"
    assert facts(reader, "tokenizer.chat_template.tool_use") == "{{ tools }}"


def test_several_first_tokens_are_refused():
    with pytest.raises(UserError, match="begins a sequence with several tokens"):
        vocabulary(fast(pre_tokenizers.ByteLevel(add_prefix_space=False), first="<s> </s> $0"))


def test_a_family_that_nobody_checked_is_refused():
    config = base_model("llama").config
    with pytest.raises(UserError, match="unheard_of was never held against llama"):
        gguf_architecture(replace(read_spec(config), family="unheard_of"), "uniform", config)
    assert {*CHECKED, *ARCHITECTURES} <= {*FAMILIES}


def test_pre_tokenizers_by_what_they_do():
    level, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
    assert vocabulary(fast(level))["pre"] == "gpt-2"
    assert vocabulary(fast(pre_tokenizers.Sequence([digits, level])))["pre"] == "smollm"
    assert vocabulary(fast(None, byte_fallback=True, unk_token="<unk>"))["model"] == "llama"
    for unknown in (pre_tokenizers.Sequence([level, digits]), pre_tokenizers.Whitespace(), None):
        with pytest.raises(UserError, match="no GGUF can be written of this model: its pre-tokenizer is none of"):
            vocabulary(fast(unknown))
