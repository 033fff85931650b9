"""Instruction records: three forms, what is learned of them, packing, and one clear line for each mistake."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from tiny import SENTENCES, VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nuteprune.arch import read_spec
from nuteprune.config import FinetuneConfig, LoraConfig, LossConfig
from nuteprune.data.instructions import pack, packed_windows, worded
from nuteprune.errors import UserError
from nuteprune.masks import Gates
from nuteprune.model.layers import build_view
from nuteprune.model.losses import IGNORE
from nuteprune.model.pairing import Answers, PairedModel

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPACA = {"instruction": "Name a river.", "input": "", "output": "The wide river."}


def file_of(tmp_path, *rows):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chat(tokenizer):
    """The tiny tokenizer with a chat template."""
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    return with_template


def parts(tmp_path, tokenizer, row, **options):
    return next(worded(FinetuneConfig(data=file_of(tmp_path, row), **options), tokenizer))


def test_alpaca_is_worded_by_the_chat_template_or_alpacas_prompt(tmp_path, tokenizer, chat):
    assert parts(tmp_path, chat, ALPACA) == [
        ("<user>Name a river.<eos><assistant>", False), ("The wide river.<eos>", True)
    ]  # fmt: skip
    row = ALPACA | {"input": "In Europe."}
    assert parts(tmp_path, chat, row)[0][0] == "<user>Name a river.\n\nIn Europe.<eos><assistant>"
    for options in ({"template": "alpaca"}, {}):
        prompt, answer = parts(tmp_path, chat if options else tokenizer, row, **options)
        assert prompt[0].endswith("### Instruction:\nName a river.\n\n### Input:\nIn Europe.\n\n### Response:\n")
        assert answer == ("The wide river.<eos>", True)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_prompt_is_learned_as_it_is_asked(tmp_path, scheme):
    """Mistral's tokenizer puts a space before a text's first word, and none behind a `<s>` that stands in the text."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.train_from_iterator(SENTENCES, trainers.BpeTrainer(special_tokens=["<unk>", "<s>"], show_progress=False))
    raw.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    row = {"prompt": SENTENCES[0], "completion": SENTENCES[1]}
    config = FinetuneConfig(data=file_of(tmp_path, row), seq_len=64)
    ids, labels, _ = packed_windows(config, tokenizer, len(tokenizer))[0]
    assert ids[: (labels != IGNORE).nonzero()[0]].tolist() == tokenizer(SENTENCES[0])["input_ids"]


def test_every_answer_of_a_conversation_is_learned(tmp_path, chat):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "Bye.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert parts(tmp_path, chat, row) == [
        ("<system>Be brief.<eos><user>Hi<eos><assistant>", False), ("Yes?<eos>", True),
        ("<user>Bye<eos><assistant>", False), ("Bye.<eos>", True),
    ]  # fmt: skip


def test_prompt_and_completion_stand_as_they_are(tmp_path, chat):
    assert parts(tmp_path, chat, {"prompt": "2 + 2 =", "completion": " 4"}) == [("2 + 2 =", False), (" 4<eos>", True)]


def test_windows_hold_whole_records_and_only_answers_are_learned(tmp_path, tokenizer):
    rows = [{"prompt": f"Question {i} " * (1 + i % 4), "completion": f"answer {i} " * (1 + i % 7)} for i in range(40)]
    windows = packed_windows(FinetuneConfig(data=file_of(tmp_path, *rows), seq_len=128), tokenizer, VOCAB)
    assert windows.shape[1:] == (3, 128)
    found = []
    for ids, labels, positions in windows:
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in pairwise(starts):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if (labels[begin:end] != IGNORE).any():
                learned = labels[begin:end] != IGNORE
                assert torch.equal(labels[begin:end][learned], ids[begin:end][learned])
                found.append((tokenizer.decode(ids[begin:end]), tokenizer.decode(ids[begin:end][learned])))
    wanted = [(r["prompt"] + r["completion"] + "<eos>", r["completion"] + "<eos>") for r in rows]
    assert sorted(found) == sorted(wanted)


def test_a_padding_token_without_a_row_in_the_embedding_is_not_used(tmp_path, tokenizer):
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"pad_token": "[PAD]"})
    config = FinetuneConfig(data=file_of(tmp_path, ALPACA), seq_len=512)
    assert added.pad_token_id == VOCAB
    assert packed_windows(config, added, VOCAB)[:, 0].max() < VOCAB


def test_packing_fills_windows():
    lengths = [5, 9, 3, 10, 1, 2, 7, 8, 4, 6]
    windows = pack(lengths, 11)
    assert sorted(i for members in windows for i in members) == list(range(10))
    assert all(sum(lengths[i] for i in members) <= 11 for members in windows)
    assert len(windows) == 5  # 55 tokens: every window is full


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_records_give_the_loss_and_gradient_of_records_alone(name, attention, tmp_path, tokenizer):
    rows = [{"prompt": "one two three " * (1 + i % 3), "completion": "four five " * (1 + i % 4)} for i in range(9)]
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    spec = read_spec(model.config)
    paired = PairedModel(model, spec, LoraConfig(rank=2, alpha=2))
    gates = Gates(kv_groups=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    with torch.no_grad():
        for _, b in paired.lora().values():
            b.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))

    def losses(windows):
        for pair in paired.lora().values():
            for p in pair:
                p.grad = None
        ids, labels, positions = windows.unbind(1)
        view = build_view(spec, gates, paired.lora(), 1.0, torch.float32)
        teacher = build_view(spec, None, {}, 1.0, torch.float32)
        loss = LossConfig(kl_weight=0.5)
        out = paired(ids, view, teacher, loss, Answers(labels, positions))
        out.total.backward()
        return out, torch.cat([p.grad.flatten() for pair in paired.lora().values() for p in pair])

    config = FinetuneConfig(data=file_of(tmp_path, *rows), seq_len=128)
    packed = packed_windows(config, tokenizer, VOCAB)
    assert len(packed) < len(rows)
    together, gradient = losses(packed)
    total, summed, count = 0.0, 0.0, 0
    for row in rows:
        alone = packed_windows(FinetuneConfig(data=file_of(tmp_path, row), seq_len=128), tokenizer, VOCAB)
        n = int((alone[:, 1] != IGNORE).sum())
        own, slope = losses(alone)
        total, summed, count = total + n * own.total.item(), summed + n * slope, count + n
    assert together.total.item() == pytest.approx(total / count, rel=1e-5)
    assert together.total.item() > together.terms["label"].item() > 0  # the KL counts too
    assert torch.allclose(gradient, summed / count, rtol=1e-3, atol=1e-6)


MISTAKES = {
    "no file": (None, {}, "give an existing file of records"),
    "no form": ([{"text": "a"}], {}, "record 1 must have the keys instruction and output, or messages, or .* has text"),
    "missing key": ([ALPACA, ALPACA | {"output": None}], {}, "record 2 has no text in 'output'"),
    "no template": ([ALPACA], {"template": "chat"}, "tokenizer has no chat template; use finetune.template=alpaca"),
    "messages without template": ([{"messages": [{"role": "user", "content": "a"}]}], {}, "need a chat template"),
    "no records": ([], {}, "no records"),
    "nothing left": ([ALPACA | {"output": ""}], {}, "no record has an answer and fits"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(rows, options, message, tmp_path, tokenizer):
    data = "nowhere.json" if rows is None else file_of(tmp_path, *rows)
    with pytest.raises(UserError, match=message) as caught:
        packed_windows(FinetuneConfig(data=data, **options), tokenizer, VOCAB)
    assert "\n" not in str(caught.value)


def test_mistakes_in_conversations(tmp_path, chat):
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
    for messages, message in (
        ([user], "record 1 does not end with a message of the assistant"),
        ([{"role": "user"}, assistant], "record 1 has a message without text"),
    ):
        with pytest.raises(UserError, match=message):
            parts(tmp_path, chat, {"messages": messages})
    array = tmp_path / "records.json"
    pictured = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    array.write_text(json.dumps([{"messages": [first, assistant]} for first in (user, pictured)]))
    records = worded(FinetuneConfig(data=str(array)), chat)
    assert next(records) == parts(tmp_path, chat, {"messages": [user, assistant]})
    with pytest.raises(UserError, match="record 2 has a message without text"):
        next(records)
    chat.chat_template = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(UserError, match="record 1 is refused by the chat template: roles must alternate"):
        parts(tmp_path, chat, {"messages": [user, user, assistant]})
    chat.chat_template = "{{ messages|length }}: {{ messages[-1].content }}"
    with pytest.raises(UserError, match="record 1 is worded differently by the chat template"):
        parts(tmp_path, chat, {"messages": [user, assistant, user, assistant]})


def test_records_that_cannot_be_learned_are_left_out_and_counted(tmp_path, tokenizer, caplog):
    data = file_of(tmp_path, ALPACA, ALPACA | {"output": ""}, ALPACA | {"output": "word " * 99})
    windows = packed_windows(FinetuneConfig(data=data, seq_len=150), tokenizer, VOCAB)
    assert len(windows) == 1
    assert "1 of 3 records are left out, which have an empty answer, first record 2" in caplog.text
    assert "1 of 3 records are left out, which are longer than finetune.seq_len 150, first record 3" in caplog.text
