"""The evaluate stage on tiny random models with a real tokenizer: numbers against plain computations, files, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from nuteprune.arch import read_spec
from nuteprune.config import Config, EvaluateConfig, ModelConfig, TrackingConfig
from nuteprune.errors import UserError
from nuteprune.evaluation import compare, contents, head, measure, pictures, report, retention, speed
from nuteprune.evaluation.models import load_any, placement, weight_bytes
from nuteprune.evaluation.tasks import PAPER, lm_eval_tasks, load_tasks
from nuteprune.parallel.sizes import read_parameters
from nuteprune.runs import words
from nuteprune.runs.checkpoint import verify, write_manifest
from nuteprune.stages import evaluate

TEXT = "\n".join(f"Line {i}: the quick brown fox jumps over the lazy dog {i * i} times." for i in range(40))


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer of 300 tokens, trained here."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def save_llama(path, tokenizer, ffn: int, seed: int) -> str:
    """A random two-layer llama (grouped queries, tied embeddings) with its tokenizer in a directory."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=24, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    return save_llama(tmp_path_factory.mktemp("models") / "base", tokenizer, ffn=40, seed=0)


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.LongTensor:
    return torch.randint(300, (141,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def settings(tmp_path, base, tokenizer) -> Config:
    """A run directory with an export, metrics and a text, and the configuration that evaluates it."""
    run = tmp_path / "run"
    save_llama(run / "export", tokenizer, ffn=24, seed=1)
    (run / "export" / "README.md").write_text("# A card\n\n## Results\n\nof an earlier evaluation\n")
    (tmp_path / "held_out.txt").write_text(TEXT)
    steps = [
        {"step": i, "prune/loss": 3.0 - i / 10, "prune/expected_sparsity": i / 50, "prune/target_sparsity": i / 49}
        for i in range(10)
    ]
    (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, steps), '{"step": 10, "pru']))
    kept = {"kv_groups": [[0, 1], [0]], "heads": [[0, 1, 2, 3], [0, 1]], "ffn": [list(range(24))] * 2}
    original = {"heads": 4, "kv_heads": 2, "ffn": 40, "hidden": 24}
    (run / "export" / "nuteprune.json").write_text(json.dumps({"kept": kept, "layers": 2, "original": original}))
    write_manifest(run / "export")
    return Config(
        run_dir=str(run),
        model=ModelConfig(path=base),
        tracking=TrackingConfig(progress=False),
        evaluate=EvaluateConfig(
            text=[str(tmp_path / "held_out.txt")], batch_sizes=[1, 3], window=64, blocks=3,
            prompt_tokens=8, new_tokens=3, tasks=["local_mc"], task_limit=12,
        ),
    )  # fmt: skip


def changed(config: Config, **values) -> Config:
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **values))


@torch.no_grad()
def token_nll(model, context: torch.Tensor) -> float:
    """-log p(last token | those before it), computed the plain way in float64."""
    return -model(context[None]).logits[0, -2].double().log_softmax(-1)[context[-1]].item()


def scaled_and_capped(name):
    """A model of which the output matrix alone gives other logits than the model."""
    return tiny_model(name, **({"final_logit_softcapping": 2.0} if name == "gemma3" else {}))


@pytest.mark.parametrize("name", ["llama", "granite", "gemma3"])
@pytest.mark.parametrize("first", [(), (7,)])
def test_perplexity_of_blocks_equals_plain_computation(name, first, tokens, monkeypatch):
    monkeypatch.setattr(head, "LOGIT_ROWS", 7)  # chunks that do not divide the window
    model, text = scaled_and_capped(name), 32 - len(first)
    got = measure.perplexity(model, tokens, window=32, blocks=0, first=first)
    begin = torch.tensor(first, dtype=torch.int64)
    # Behind a first token each token of the text is predicted, without one all but the first of a block.
    nlls = [
        token_nll(model, torch.cat([begin, tokens[b : b + i + 1]]))
        for b in range(0, 4 * text, text) for i in range(1 - len(first), text)
    ]  # fmt: skip
    mean = sum(nlls) / len(nlls)
    assert got["nll"] == pytest.approx(mean, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    # 141 tokens hold four blocks; the remaining ones are left out.
    assert (got["tokens"], got["blocks"], got["window"]) == (4 * 31, 4, 32)


@torch.inference_mode()
def test_where_no_token_comes_first_perplexity_is_bit_for_bit_that_of_the_output_matrix():
    model = tiny_model("llama")
    ids = torch.randint(300, (1300,), generator=torch.Generator().manual_seed(1))
    total = 0.0
    for block in ids.split(640)[:2]:
        states = model.model(input_ids=block[None]).last_hidden_state[0, :-1]
        for hidden, target in zip(states.split(256), block[1:].split(256), strict=True):
            total += torch.nn.functional.cross_entropy(model.lm_head(hidden), target, reduction="sum").item()
    assert measure.perplexity(model, ids, 640, 0)["nll"] == total / (2 * 639)


def test_logits_of_a_large_vocabulary_are_few_at_a_time(model, monkeypatch):
    assert head.Head(model).rows == 256
    monkeypatch.setattr(head, "LOGIT_BYTES", 10 * 300 * 4)
    assert head.Head(model).rows == 10


def test_a_model_that_does_not_call_its_decoder_is_one_line():
    config = OPTConfig(vocab_size=300, hidden_size=24, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
                       word_embed_proj_dim=24)  # fmt: skip
    with pytest.raises(UserError, match="OPTForCausalLM does not call its base_model"):
        measure.perplexity(AutoModelForCausalLM.from_config(config).eval(), torch.arange(64), 32, 0)


def test_perplexity_scores_the_first_blocks_only(model, tokens):
    first = measure.perplexity(model, tokens[:64], 32, 0)
    limited = measure.perplexity(model, tokens, 32, 2)
    assert limited == first
    assert (limited["blocks"], limited["tokens"]) == (2, 62)


def test_speed_counts_and_leaves_no_hooks(model):
    first, second = speed.speed([model, model], prompt_tokens=16, new_tokens=4, batch=2, repeats=3)
    for result in (first, second):
        assert [result[key] for key in ("prompt_tokens", "new_tokens", "batch", "repeats")] == [16, 4, 2, 3]
        assert result["peak_memory_bytes"] >= sum(p.nbytes for p in model.parameters())
        for key in speed.SPEEDS:
            rounds = result[f"{key}_rounds"]
            assert len(rounds) == 3
            assert 0 < min(rounds) <= result[key] <= max(rounds)
    prompt = torch.full((2, 3), 9)
    assert speed._begun(prompt, (1, 2)).tolist() == [[1, 2, 9]] * 2
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_speed_ratio_is_that_of_the_medians_and_its_range_that_of_the_rounds():
    before, after = (dict.fromkeys(speed.SPEEDS, rate) | {f"{key}_rounds": rounds for key in speed.SPEEDS}
                     for rate, rounds in ((4, [1, 10, 4]), (5, [2, 5, 8])))  # fmt: skip
    ratio = speed.speed_ratio(before, after)
    assert {ratio[key] for key in speed.SPEEDS} == {1.25}
    assert {tuple(ratio[f"{key}_range"]) for key in speed.SPEEDS} == {(0.5, 2)}


def test_ceiling_is_that_of_the_weights_read():
    before = {"parameters_prunable": 80, "parameters_read": 100}
    after = {"parameters_prunable": 40, "parameters_read": 60}
    assert speed.ceiling(before, after) == {"prunable": 0.8, "sparsity": 0.5, "speedup": pytest.approx(100 / 60)}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_read_for_a_token_are_all_but_the_rows_of_an_untied_embedding(tied, tmp_path):
    got = measure.sizes(tiny_model("llama", tie_word_embeddings=tied), tmp_path)
    spec = read_spec(tiny_config("llama"))
    assert got["parameters_prunable"] == spec.prunable
    assert got["parameters_read"] == got["parameters_non_embedding"] + spec.vocab * spec.hidden


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_of_experts_a_token_reads_those_that_the_router_chooses(name, tmp_path):
    model, spec = tiny_model(name, tie_word_embeddings=True), read_spec(tiny_config(name, tie_word_embeddings=True))
    before = measure.sizes(model, tmp_path)
    assert before["parameters_prunable"] == spec.prunable_read < spec.prunable
    assert before["parameters_read"] == read_parameters(spec)
    for layer in model.model.layers:  # as many experts as are read are left, and a token reads as much
        experts = layer.mlp.experts
        for key, weight in dict(experts.named_parameters()).items():
            setattr(experts, key, torch.nn.Parameter(weight[: spec.top_k].detach()))
    after = measure.sizes(model, tmp_path)
    assert after["parameters"] < before["parameters"]
    assert speed.ceiling(before, after)["speedup"] == 1


def test_the_picture_of_what_is_kept_counts_removed_experts(tmp_path):
    file = tmp_path / "nuteprune.json"
    record = {"kept": {"ffn": [list(range(16)), list(range(40))]}, "original": {"ffn": 8, "experts": 10}}
    file.write_text(json.dumps(record))
    (axis,) = pictures.kept(file).axes
    assert axis.get_title(loc="left") == "FFN units: 28.0 of 80 kept on average"


def test_lm_eval_knows_the_papers_tasks_and_an_unknown_one_is_one_line(monkeypatch):
    made = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kw: made.append(TaskManager(**kw)) or made[-1])
    with pytest.raises(UserError, match="no task 'no_such_task'"):
        load_tasks(["no_such_task"])
    assert len(set(PAPER)) == 7
    assert set(PAPER) <= set(made[0].all_tasks)


def examples(right, norm=None, choices=4):
    """lm-eval's samples of one task, by the answers that are right."""
    rows = [{"acc": each, "filter": "none", "filtered_resps": [0.0] * choices} for each in right]
    return [row | {"acc_norm": each} for row, each in zip(rows, norm, strict=True)] if norm else rows


def test_examples_of_tasks_and_of_a_group_as_one():
    group = Group("both")
    for name in "ab":
        group.add(SimpleNamespace(task_name=name))
    one = retention.scored_examples({"samples": {"one": examples([1, 0], None, 1)}}, [SimpleNamespace(task_name="one")])
    assert one["one"]["chance"] == [0, 0]
    samples = {"a": examples([1, 0]), "b": examples([1, 1]), "alone": examples([0, 1], [1, 1], 2), "c": [{"bleu": 9}]}
    asked = [group, *(SimpleNamespace(task_name=name) for name in ("alone", "c"))]
    scored = retention.scored_examples({"samples": samples}, asked)
    assert scored == {
        "both": {"acc": [1, 0, 1, 1], "acc_norm": [1, 0, 1, 1], "chance": [0.25] * 4},
        "alone": {"acc": [0, 1], "acc_norm": [1, 1], "chance": [0.5] * 2},
    }
    assert retention.means(scored) == {"acc": 0.625, "acc_norm": 0.875, "chance": 0.375}
    assert retention.means({}) == {}


def test_what_is_retained_has_a_paired_interval():
    """Examples that both models answer alike do not widen it; those they answer differently do."""
    random = np.random.default_rng(3)
    right = (random.random(4000) < 0.6).astype(float)
    lost = right * (random.random(4000) < 0.95)
    before, after = (
        {"t": {"acc": list(each), "acc_norm": list(each), "chance": [0.25] * 4000}} for each in (right, lost)
    )
    kept = retention.retained(before, after)["acc"]
    assert kept["value"] == pytest.approx(lost.mean() / right.mean())
    error = math.sqrt(kept["value"] * (1 - kept["value"]) / right.sum())  # of a share of the right ones
    assert kept["high"] - kept["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert kept["above_chance"] == pytest.approx((lost.mean() - 0.25) / (right.mean() - 0.25))
    same = retention.retained(before, before)["acc_norm"]
    assert same == {"value": 1, "low": 1, "high": 1, "above_chance": 1}
    nothing = {"t": {"acc": [0.0], "acc_norm": [0.0], "chance": [0.25]}}
    assert retention.retained(nothing, nothing) == {}


@pytest.fixture(scope="module")
def beginning(tokenizer):
    """The tokenizer as one that puts a token first."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing("<eos> $0", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")


def test_generation_is_greedy_whatever_the_model_would_like(model, beginning, monkeypatch):
    tokenizer = beginning
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    assert ids[0, 0] == 0
    grown = ids
    with torch.no_grad():
        for _ in range(6):
            token = model(grown).logits[0, -1].argmax()
            grown = torch.cat([grown, token.view(1, 1)], 1)
            if token == tokenizer.eos_token_id:
                break
    assert torch.equal(measure.generate(model, ids, 6), grown)


def test_local_task_runs_and_matches_plain_scores(model, tokenizer, beginning):
    tasks, scored = lm_eval_tasks(model, beginning, load_tasks(["local_mc"]), limit=0, fewshot=0)
    task, right = tasks["local_mc"], []
    rows = [json.loads(line) for line in (Path(report.__file__).parent / "tasks/local_mc.jsonl").open()]
    for row in rows:
        prompt = [0, *tokenizer(f"Question: {row['question']}\nAnswer:").input_ids]
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([prompt + tokenizer(f" {choice}").input_ids])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(log_p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
        right.append(float(scores.index(max(scores)) == row["answer"]))
    assert (task["version"], task["fewshot"], task["examples"]) == (1.0, 0, 60)
    assert task["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 60)
    assert scored["local_mc"]["acc"] == right
    assert task["chance"] == 0.25
    assert task["metrics"]["acc"]["stderr"] > 0
    assert all(len(set(row["choices"])) == 4 and row["answer"] in range(4) for row in rows)


def test_what_a_tokenizer_puts_behind_a_text_is_in_no_task(model, beginning):
    ending = copy.deepcopy(beginning)
    around = processors.TemplateProcessing("<eos> $0 <eos>", special_tokens=[("<eos>", 0)])
    ending.backend_tokenizer.post_processor = around
    plain, other = (lm_eval_tasks(model, each, load_tasks(["local_mc"]), 0, 0) for each in (beginning, ending))
    assert other == plain
    assert ending("a").input_ids[-1] == 0


def test_task_file_of_the_user_and_limit(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text('{"q": "one?", "a": 0}\n{"q": "two?", "a": 1}\n')
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: acc}]\nmetadata: {version: 2}\n"
    )
    monkeypatch.chdir(tmp_path.parent)
    tasks = load_tasks([str(tmp_path / "mine.yaml")], trust=True)
    task = lm_eval_tasks(model, tokenizer, tasks, limit=1, fewshot=0)[0]["mine"]
    assert (task["version"], task["examples"]) == (2, 1)


def test_report_files(settings, base, caplog):
    result = evaluate.run(settings)
    folder = Path(settings.run_dir) / "evaluate"
    assert json.loads((folder / "report.json").read_text()) == result
    events = EventAccumulator(str(Path(settings.run_dir) / "tensorboard")).Reload()
    table = events.Tensors("eval/report/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table == report.results(result)
    assert events.Tags()["scalars"] == []
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == ["kept.png", "report.html", "report.json", "report.md", "training.png"]
    verify(folder)
    assert {file.name for file in folder.iterdir()} == {*files, "manifest.json"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in files if name.endswith("png"))
    assert "not metrics: 1" in caplog.text

    before, after = result["models"]
    # Per layer: q, o 24x24 each, k, v 24x12 each, three FFN matrices, two norms; then the final norm.
    assert before["parameters_non_embedding"] == 2 * (2 * 576 + 2 * 288 + 3 * 24 * 40 + 48) + 24
    assert before["parameters"] == before["parameters_non_embedding"] + 300 * 24
    assert before["bytes"] == (Path(base) / "model.safetensors").stat().st_size
    assert result["ratio"]["parameters"] == after["parameters"] / before["parameters"]
    assert result["ratio"]["speed"]["3"]["decode_tokens_per_s"] > 0
    assert result["ratio"]["ceiling"]["speedup"] > 1
    assert before["perplexity"]["held_out.txt"]["blocks"] == 3
    kept = after["retained"]["acc_norm"]
    assert kept["value"] == after["accuracy"]["acc_norm"] / before["accuracy"]["acc_norm"]
    assert kept["low"] <= kept["value"] <= kept["high"]
    assert before["tasks"]["local_mc"]["examples"] == 12
    assert result["held_out"]
    assert result["same_tokens"]

    card = (Path(after["path"]) / "README.md").read_text()
    assert card.startswith("# A card\n\n## Results\n\n| ")
    assert "earlier evaluation" not in card
    assert (
        f"| local_mc | 1.0 | 0 | 12 | acc | 25.0% | {before['tasks']['local_mc']['metrics']['acc']['value']:.1%}"
        in card
    )
    verify(Path(after["path"]))
    scores = [model["perplexity"]["held_out.txt"] for model in (before, after)]
    delta = math.log(scores[1]["perplexity"] / scores[0]["perplexity"])
    assert scores[1]["delta_nll"] == pytest.approx(delta)
    assert f"| its ΔNLL, nats a token |  | {delta:+.3f} |  |" in card
    assert f"| agreement with the first model |  | {after['generation']['agreement']:.1%} |  |" in card
    assert [len(model["samples"]) for model in (before, after)] == [3, 3]
    assert card.count("Behind `") == 3

    text = (folder / "report.md").read_text()
    assert "3 windows of 64 tokens side by side" in text
    assert all(f"]({name})" in text for name in ("kept.png", "training.png"))
    lines = report.table(result).splitlines()
    assert lines[0].split() == ["before", "after", "ratio"]
    speeds = ["prefill tokens/s", "decode tokens/s", "peak memory, MB"]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "parameters, million", "", "on disk, MB", "mean acc of the tasks", "mean acc_norm of the tasks",
        "perplexity of held_out.txt", "",
        "continuations that loop", "distinct 3-grams", "agreement with the first model",
        *(f"{label}, batch {batch}" for batch in (1, 3) for label in speeds),
    ]  # fmt: skip
    assert "the first 12 examples of each. Retained: " in text
    assert "is retained" in contents.headline(result)
    assert "| retained |" in text
    assert "1/(1 − p·s)" in text


def test_published_scores_the_whole_text_in_the_papers_windows(settings, base, tmp_path, model, tokenizer):
    (tmp_path / "long.txt").write_text(f"{TEXT}\n \n" * 4)
    config = changed(settings, protocol="published", models=[base], text=[str(tmp_path / "long.txt")], batch_sizes=[],
                     tasks=[], prompts=0, blocks=1)  # fmt: skip
    result = evaluate.run(config)
    rows = [*(f"{line}\n" for line in TEXT.splitlines()), ""] * 4
    ids = torch.tensor(tokenizer("\n\n".join(rows)).input_ids)
    scores = result["models"][0]["perplexity"]
    name = "long.txt (not WikiText-2), windows of"
    assert [score["window"] for score in scores.values()] == [2048, 128]
    wanted = {**measure.perplexity(model, ids, 128, 0), "delta_nll": 0.0}
    assert wanted.items() <= scores[f"{name} 128"].items()
    assert scores[f"{name} 128"]["blocks"] == len(ids) // 128
    text = report.markdown(result)
    assert "Protocol `published`: all rows of the test set joined by blank lines and tokenised as one text" in text


def test_models_of_different_tokenizers_compare_by_bits_a_byte(settings, base, tmp_path):
    other = json.loads((Path(base) / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:5]  # the same tokens, most of which are never made
    copied = shutil.copytree(base, tmp_path / "other")
    (copied / "tokenizer.json").write_text(json.dumps(other))
    result = evaluate.run(changed(settings, models=[base, str(copied)], batch_sizes=[], tasks=[], prompts=3))
    assert not result["same_tokens"]
    first, second = (model["perplexity"]["held_out.txt"] for model in result["models"])
    ids, decode = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"], AutoTokenizer.from_pretrained(base).decode
    # The first token of a window has nothing before it: neither it nor its bytes are scored.
    size = sum(len(decode(ids[begin + 1 : begin + 64])) for begin in range(0, 3 * 64, 64))
    assert first["bits_per_byte"] == pytest.approx(first["nll"] * 3 * 63 / math.log(2) / size)
    assert (first["bytes"], first["tokens"]) == (size, 3 * 63)
    scored = (f"`{title}` 3 with 189 predicted tokens of {score['bytes']:,} bytes"
              for title, score in (("before", first), ("after", second)))  # fmt: skip
    assert f"windows of 64 tokens side by side, {', '.join(scored)}, weights in" in contents.conditions(result)[0]
    assert second["bytes"] < size
    assert second["bits_per_byte"] > first["bits_per_byte"]
    assert "takes " in contents.headline(result)
    row = next(line for line in report.table(result).splitlines() if "bits a byte" in line)
    assert row.split() == ["bits", "a", "byte", *(f"{score['bits_per_byte']:.4f}" for score in (first, second))]
    second["bits_per_byte"] = math.nan
    written = report.write(result, tmp_path / "out", None)
    assert "takes infinite bits a byte instead of" in contents.headline(written)
    assert "infinite" in report.table(written)
    # Each continuation stands behind what its model has read; what only one has written is left out.
    marked, page = ((Path(settings.run_dir) / f"evaluate/report.{kind}").read_text() for kind in ("md", "html"))
    whole, small = ([sample["prompt"] for sample in model["samples"]] for model in result["models"])
    for longer, shorter in zip(whole, small, strict=True):
        assert longer.startswith(shorter)
        assert f"Behind {words.code(longer)}\n\n**before**" in marked
        assert f"**after**, behind {words.code(shorter)}" in marked
        assert f">{escape(shorter.strip())} …<" in page
    del result["models"][1]["samples"][1:]
    report.write(result, tmp_path / "out", None)
    assert (tmp_path / "out/report.md").read_text().count("Behind `") == 1


def test_windows_longer_than_the_model_reads_are_warned_of(settings, base, tmp_path, caplog):
    folder = shutil.copytree(base, tmp_path / "short")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 32}))
    evaluate.run(changed(settings, models=[str(folder), base], batch_sizes=[], tasks=[], prompts=0))
    assert caplog.text.count("perplexity in windows of 64 tokens, of which short reads 32 at most") == 1
    assert caplog.text.count("perplexity in windows") == 1


def test_one_model_without_speed_tasks_or_prompts(settings, base, tmp_path):
    config = changed(settings, models=[base], batch_sizes=[], tasks=[], prompts=0, output=str(tmp_path / "out"))
    result = evaluate.run(config)
    assert result["ratio"] == {}
    assert not {"speed", "tasks", "generation", "samples"} & set(result["models"][0])
    assert result["pictures"] == ["training.png"]
    assert "ratio" not in report.table(result)


def test_models_without_prunable_parameters_have_no_ceiling(settings, tokenizer, tmp_path):
    gpt2 = GPT2Config(vocab_size=300, n_embd=24, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    result = evaluate.run(changed(settings, models=[str(tmp_path / "gpt2")] * 2, batch_sizes=[1], tasks=[], prompts=0))
    assert result["models"][0]["parameters_prunable"] == 0
    assert set(result["ratio"]) == {*measure.SIZES, "perplexity", "speed"}


SHARED = {
    "same": ("a.txt", "./a.txt", True),
    "inside": ("texts/a.txt", "texts/", True),
    "around": ("texts", "texts/a.txt", True),
    "beside": ("texts2/a.txt", "texts", False),
    "hub": ("c4/a.txt", "c4", False),
    "none": ("a.txt", "", False),
}


@pytest.mark.parametrize(("text", "source", "shared"), SHARED.values(), ids=SHARED)
def test_training_text_is_known_however_its_path_is_spelled(text, source, shared):
    assert compare.shares_text(text, source) == compare.shares_text(str(Path(text).absolute()), source) == shared


def test_infinite_perplexity_is_written_as_valid_json(settings, tmp_path, base):
    result = evaluate.run(changed(settings, batch_sizes=[], models=[base, base]))
    # The same model twice scores the same twice, with the same task objects, and agrees with itself.
    assert result["models"][1]["generation"].pop("agreement") == 1
    assert result["models"][0] == result["models"][1]
    result["models"][1]["perplexity"]["held_out.txt"] |= {"perplexity": math.inf, "nll": math.nan}
    written = report.write(result, tmp_path / "out", None)
    assert json.loads((tmp_path / "out/report.json").read_text()) == written
    assert "infinite" in report.table(written)


ERRORS = {
    "no such model": ({"models": ["missing/dir/model"]}, "cannot load the model 'missing/dir/model'"),
    "short text": ({"window": 100_000}, "less than one window of 100000"),
    "no such task file": ({"tasks": ["none.yaml"]}, "task file 'none.yaml' not found"),
    "no such text": ({"text": ["none.txt"]}, "none.txt"),
}


@pytest.mark.parametrize(("values", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_one_line(settings, values, message):
    with pytest.raises(UserError) as caught:
        evaluate.run(changed(settings, **values))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (Path(settings.run_dir) / "evaluate" / "manifest.json").exists()


def test_a_mistake_in_the_second_model_or_text_costs_no_earlier_report(settings, base, tmp_path):
    quick = changed(settings, batch_sizes=[], tasks=[], prompts=0)
    evaluate.run(quick)
    folder, short = Path(settings.run_dir) / "evaluate", tmp_path / "short.txt"
    report = (folder / "report.json").read_bytes()
    short.write_text("The engineer.")
    for values, message in (
        ({"models": [base, "/nowhere"]}, "cannot load the model '/nowhere'"),
        ({"text": [*quick.evaluate.text, str(short)]}, "less than one window of 64"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.run(changed(quick, **values))
        verify(folder)
        assert (folder / "report.json").read_bytes() == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "24"}, "Validation error for field 'hidden_size'"),
        ({"pad_token_id": 300}, "Padding_idx must be within num_embeddings"),
        ({"dtype": "float9"}, "module 'torch' has no attribute 'float9'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "no 'spiral' in it"),
    ],
)
def test_a_model_that_transformers_cannot_build_is_one_line(settings, tmp_path, change, message):
    folder = shutil.copytree(settings.model.path, tmp_path / "broken")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | change))
    with pytest.raises(UserError, match=f"^cannot load the model '{folder}' for evaluation: {message}"):
        evaluate.run(changed(settings, models=[str(folder)], tasks=[]))


def test_the_tokenizer_of_each_model_is_read_once(settings, monkeypatch):
    read, real = [], AutoTokenizer.from_pretrained

    def counted(path, **options):
        read.append(path)
        return real(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    found = evaluate.run(changed(settings, batch_sizes=[], tasks=[], prompts=0))
    assert read == [model["path"] for model in found["models"]]


def test_an_added_token_in_the_text_that_has_no_embedding(settings, tokenizer, tmp_path, model):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    folder = shutil.copytree(settings.model.path, tmp_path / "more tokens")
    tokenizer.save_pretrained(folder)
    (tmp_path / "held_out.txt").write_text(f"{TEXT}<image_soft_token>")
    with pytest.raises(UserError, match="id 300 but the model has 300 embeddings: take the added token"):
        evaluate.run(changed(settings, models=[str(folder)], batch_sizes=[], tasks=[]))
    with pytest.raises(UserError, match="take the added token"):
        measure.last_states(model, torch.full((64,), 300), window=32, blocks=0)


def test_missing_export_names_the_stage(settings, tmp_path):
    with pytest.raises(UserError, match="run the export stage first"):
        evaluate.run(dataclasses.replace(settings, run_dir=str(tmp_path / "other")))


def test_unreachable_task_is_named(tmp_path):
    file = tmp_path / "gone.yaml"
    file.write_text("task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n"
                    "test_split: test\noutput_type: multiple_choice\n")  # fmt: skip
    with pytest.raises(UserError, match=r"gone.yaml' cannot be loaded") as caught:
        load_tasks([str(file)], trust=True)
    assert "\n" not in str(caught.value)


def test_own_modelling_file_is_run_where_it_is_trusted(settings, tokenizer, tmp_path, caplog):
    folder = tmp_path / "per_layer"
    save_llama(folder, tokenizer, ffn=24, seed=1)
    code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    facts = json.loads((folder / "config.json").read_text())
    facts["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(facts))
    with caplog.at_level("INFO"):
        loaded, _, _ = load_any(str(folder), settings.model, trust=True)
    assert type(loaded).__name__ == "Own"
    assert "code of its own" in caplog.text


def test_what_ends_the_run_costs_one_part(settings, monkeypatch):
    """An evaluation killed in the second model's tasks leaves the first one's numbers and the second's perplexity."""
    calls = []

    def tasks_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return lm_eval_tasks(*arguments)

    monkeypatch.setattr(compare, "lm_eval_tasks", tasks_once)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(settings)
    folder = Path(settings.run_dir) / "evaluate"
    draft = json.loads((folder / "report.json").read_text())
    assert draft["unfinished"]
    first, second = draft["models"]
    assert first["perplexity"]["held_out.txt"]["tokens"] == 3 * 63
    assert {"tasks", "accuracy", "generation", "samples"} <= set(first)
    assert second["perplexity"]
    assert "tasks" not in second
    assert not (folder / "manifest.json").exists()


def test_speed_that_does_not_fit_is_a_line_in_the_report(settings, monkeypatch):
    def small_card(models, prompt_tokens, new_tokens, batch, firsts):
        if batch == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return speed.speed(models, prompt_tokens, new_tokens, batch)

    monkeypatch.setattr(compare, "speed", small_card)
    result = evaluate.run(changed(settings, tasks=[]))
    folder = Path(settings.run_dir) / "evaluate"
    verify(folder)
    assert [set(model["speed"]) for model in result["models"]] == [{"1"}, {"1"}]
    assert result["ratio"]["perplexity"]
    line = "Speed was not measured: for more than 1 sequences the models and their caches do not fit on the device"
    assert line in (folder / "report.md").read_text()


def test_models_too_big_for_a_card_together_do_not_take_turns_there(monkeypatch, base):
    class Card:
        total_memory = 100_000

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    size = weight_bytes(base, ModelConfig(dtype="float32"))
    whole = sum(p.nbytes for p in load_any(base, ModelConfig())[0].parameters())
    assert whole <= size < whole + 8192  # the file's header besides
    assert weight_bytes(base, ModelConfig(dtype="bfloat16")) == size // 2
    assert compare.too_big_together([40_000, 40_000], cuda) == ""
    assert "0.0 GB fit" in compare.too_big_together([50_000, 50_000], cuda)
    assert compare.too_big_together([10**15], torch.device("cpu")) == ""


def test_weights_that_a_directory_holds_twice_count_once(base, model, tmp_path):
    folder = shutil.copytree(base, tmp_path / "original")
    size = (folder / "model.safetensors").stat().st_size
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert measure.sizes(model, folder)["bytes"] == weight_bytes(str(folder), ModelConfig(dtype="float32")) == size


def test_weights_of_a_type_that_is_not_named_take_what_their_files_do(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: facts[key] for key in facts if "dtype" not in key}))
    assert weight_bytes(str(folder), ModelConfig(dtype="bfloat16")) == (folder / "model.safetensors").stat().st_size


def test_a_model_beyond_one_card_is_spread(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    cuda = torch.device("cuda", 0)
    assert placement(26 * 10**9, cuda) == {"": cuda}
    assert placement(141 * 10**9, cuda) == "auto"
    # What torch keeps of a model that is gone counts as free: the next one of that size fits as well.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    assert placement(26 * 10**9, cuda) == {"": cuda}
    assert placement(141 * 10**9, torch.device("cpu")) is None


def test_a_spread_model_has_the_same_perplexity(base, model, tokens, tmp_path, monkeypatch):
    """Spread as accelerate does it: here between memory and disk, for want of a second device."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    spread = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map=parts, offload_folder=str(tmp_path)
    ).eval()
    assert any(p.is_meta for p in spread.parameters())
    assert measure.perplexity(spread, tokens, 32, 0) == measure.perplexity(model, tokens, 32, 0)
