"""`nuteprune trim`: fewer tokens, the same model."""

import json

import numpy as np
import pytest
import torch
from tiny import QUIET, SENTENCES, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nuteprune.__main__ import main
from nuteprune.config import FinetuneConfig, load_config
from nuteprune.data.instructions import packed_windows
from nuteprune.errors import UserError
from nuteprune.model.loading import read_base
from nuteprune.stages import export, prune
from nuteprune.stages.trim import split_share

RARE = "Quixotic jazz zephyrs vex bumblebees hourly, quoth Kafka."
STRANGE = "naïve Ωmega 模型 🙂\n\tx"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<end_of_turn>"]
ROWS = 640
"""Of the models below; their tokenizers have fewer tokens."""


def bpe(fallback: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's, or as SentencePiece's with bytes to fall back on, its special tokens not at the start."""
    raw = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>" if fallback else None))
    alphabet = [] if fallback else pre_tokenizers.ByteLevel.alphabet()
    if fallback:
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>"] if fallback else []
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*SENTENCES, *[RARE] * 200], trainer)
    content = json.loads(raw.to_str())
    vocab = content["model"]["vocab"]
    for byte in range(256 * fallback):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    raw = Tokenizer.from_str(json.dumps(content))
    raw.add_special_tokens(SPECIAL)
    bos = raw.token_to_id("<bos>")
    raw.post_processor = processors.TemplateProcessing("<bos> $0", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def saved(directory, family: str, fallback: bool) -> PreTrainedTokenizerFast:
    """Writes a tiny model with such a tokenizer, and a chat's end beside its own."""
    tokenizer = bpe(fallback)
    ids = dict(zip(("pad", "eos", "bos", "turn"), tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    turn = ids.pop("turn")
    model = tiny_model(family, vocab_size=ROWS, **{f"{kind}_token_id": number for kind, number in ids.items()})
    model.generation_config.eos_token_id = [ids["eos"], turn]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


FAMILIES = [("llama", True), ("gemma3", True), ("qwen2", False), ("qwen3", False)]


@pytest.mark.parametrize(("family", "fallback"), FAMILIES)
def test_the_same_model_with_the_tokens_of_the_text(family, fallback, text_file, tmp_path, capsys):
    old = saved(tmp_path / "model", family, fallback)
    out = tmp_path / "small"
    assert main(["trim", str(tmp_path / "model"), "--data", str(text_file), "--out", str(out), "data.seq_len=32"]) == 0
    told = capsys.readouterr().out
    new, record = AutoTokenizer.from_pretrained(out), json.loads((out / "vocabulary.json").read_text())
    kept = record["kept"]
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "model", out))
    assert f"{ROWS} -> {len(kept)} tokens" in told
    assert len(kept) == after.config.vocab_size < len(old) < ROWS
    assert len(kept) % 64 == 0
    # Text that was counted is read as before, and what follows is predicted as before.
    for sentence in SENTENCES[:20]:
        ids = new(sentence)["input_ids"]
        assert [kept[number] for number in ids] == old(sentence)["input_ids"]
        with torch.no_grad():
            small, whole = after(torch.tensor([ids])).logits, before(torch.tensor([old(sentence)["input_ids"]])).logits
        torch.testing.assert_close(small, whole[..., kept], rtol=0, atol=0)
    # Any other text can still be read and written, in more tokens.
    for text in (RARE, STRANGE):
        assert new.decode(new(text)["input_ids"], skip_special_tokens=True) == text
    assert len(new(RARE)["input_ids"]) > len(old(RARE)["input_ids"])
    # The special tokens are the same ones.
    assert [new.pad_token, new.eos_token, new.bos_token] == SPECIAL[:3]
    ends = new.convert_ids_to_tokens(after.generation_config.eos_token_id)
    assert (ends, new.convert_ids_to_tokens(after.config.bos_token_id)) == (["<eos>", "<end_of_turn>"], "<bos>")
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == (
        before.get_input_embeddings().weight is before.get_output_embeddings().weight
    )


def test_the_most_frequent_tokens_stay(text_file, tmp_path, capsys):
    saved(tmp_path / "model", "llama", False)
    command = ["trim", str(tmp_path / "model"), "--data", str(text_file), "data.seq_len=32"]
    sizes = []
    for tokens in (0, 383, 320):
        assert main([*command, "--out", str(tmp_path / "small"), "--tokens", str(tokens)]) == 0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
        sizes.append((read_base(load_config(None, [f"model.path={tmp_path / 'small'}"]).model).spec.vocab,
                      len(tokenizer(SENTENCES[0])["input_ids"])))  # fmt: skip
    assert [size for size, _ in sizes[1:]] == [320, 320]
    assert sizes[0][1] <= sizes[1][1]
    capsys.readouterr()
    for words, told in (
        (["--out", str(tmp_path / "x"), "--tokens", "64"], "--tokens 64 is too few: its special tokens, alphabet"),
        ([], "--out is missing"),
        (["--out", str(tmp_path / "model")], "holds files that are no earlier result"),
        (["--out", str(tmp_path / "x"), "model.path=" + str(tmp_path / "none")], "there is no such directory"),
    ):
        assert main([*command, *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert told in lines[-1]
        assert not (tmp_path / "x").exists()


def test_a_tokenizer_of_another_kind_is_refused(text_file, tmp_path, capsys):
    saved(tmp_path / "model", "llama", False)
    words = {**{word: number for number, word in enumerate({*" ".join(SENTENCES).split()})}, "<unk>": 200}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path / "model")
    out = tmp_path / "x"
    assert main(["trim", str(tmp_path / "model"), "--data", str(text_file), "--out", str(out), "data.seq_len=32"]) == 2
    assert "its tokenizer is a WordLevel, and only a BPE tokenizer's" in capsys.readouterr().err
    assert not out.exists()


def test_the_result_is_pruned_and_exported(text_file, tmp_path):
    saved(tmp_path / "model", "gemma3", True)
    facts = json.loads((tmp_path / "model/config.json").read_text())
    facts["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}  # a file that Phi-3 has, and the result has not
    (tmp_path / "model/config.json").write_text(json.dumps(facts))
    (tmp_path / "model/README.md").write_text("---\nlicense: gemma\n---\n# Base\n")
    out, run = tmp_path / "small", tmp_path / "run"
    assert main(["trim", str(tmp_path / "model"), "--data", str(text_file), "--out", str(out), "data.seq_len=32"]) == 0
    settings = load_config(None, [f"run_dir={run}", f"model.path={out}", f"data.source={text_file}", "data.seq_len=32",
                                  "train.steps=4", "train.batch_size=4", "gates.importance_tokens=128",
                                  *QUIET, "gates.ffn_multiple=1"])  # fmt: skip
    prune.run(settings)
    exported = export.run(settings)
    text = AutoTokenizer.from_pretrained(exported).decode(AutoTokenizer.from_pretrained(out)(RARE)["input_ids"][1:])
    assert text == RARE
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert (out / "README.md").read_text() == "---\nlicense: gemma\n---\n"
    assert "license: gemma" in (exported / "README.md").read_text().splitlines()


def test_an_added_token_without_an_embedding_is_none_of_the_models(text_file, tmp_path, capsys):
    """Gemma 3's tokenizers have one for images, behind the last row of the text models."""
    tokenizer = saved(tmp_path / "model", "gemma3", True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("gemma3", vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path / "model")
    command = ["trim", str(tmp_path / "model"), "--out", str(tmp_path / "small"), "data.seq_len=32", "--data"]
    assert main([*command, str(text_file)]) == 0
    base = read_base(load_config(None, [f"model.path={tmp_path / 'small'}"]).model)
    assert base.tokenizer(SENTENCES[0], return_tensors="pt")["input_ids"].max() < base.spec.vocab
    told = f"gives id {len(tokenizer) - 1} but the model has {len(tokenizer) - 1} embeddings"
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "<image_soft_token>" * 32, "prompt": "<image_soft_token>", "completion": "a"}))
    assert main([*command, str(text)]) == 2
    assert told in capsys.readouterr().err
    with pytest.raises(UserError, match=told):
        packed_windows(FinetuneConfig(data=str(text), seq_len=32), tokenizer, len(tokenizer) - 1)


def test_the_share_that_is_split_counts_what_was_not_seen_too():
    assert split_share(np.array([5, 1, 3, 1, 0]), [0, 1]) == pytest.approx((3 + 1 + 1) / 10)


def test_the_current_directory_is_not_replaced(settings, model_dir, text_file, tmp_path, capsys, monkeypatch):
    config = load_config(None, [*settings, "train.steps=5"])
    prune.run(config)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trimming = ["trim", str(model_dir), "--data", str(text_file), "data.seq_len=32", "--out", "."]
    for command, told in ((trimming, "--out"), (["export", config.run_dir, "export.output=."], "export.output")):
        assert main(command) == 2
        assert f"{told} . cannot be replaced as a whole: name a directory below" in capsys.readouterr().err
