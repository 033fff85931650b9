"""The quality benchmark fills its table: a run, a rung below it, and both fine-tuned."""

import json

from nuteprune.bench import quality


def test_rows_of_a_run_its_rungs_and_fine_tuning(model_dir, text_file, tmp_path, capsys):
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"prompt": f"The {n}", "completion": " river"} for n in range(8)]))
    settings = ["gates.importance_batches=1", "tracking.progress=false", "train.micro_batch=4", "finetune.steps=1",
                "finetune.seq_len=32", "finetune.batch_size=1", "data.seq_len=32"]  # fmt: skip
    arguments = ["--model", model_dir, "--train", text_file, "--test", text_file, "--sparsities", "0.4", "--variants",
                 "ours", "--steps", "30", "--blocks", "1", "--out", tmp_path / "out", "--finetune", records, "--ladder",
                 "0.2", "0.6"]  # fmt: skip
    assert quality.main([*map(str, arguments), *(f"--set={s}" for s in settings)]) == 0
    rows = json.loads((tmp_path / "out" / "quality-30.json").read_text())["rows"]
    assert [(r["variant"], r["sparsity"]) for r in rows] == [
        ("intact", 0.0), ("ours", 0.4), ("ours, tuned", 0.4), ("ours, rung", 0.2), ("ours, rung, tuned", 0.2)
    ]  # fmt: skip
    assert len({r["perplexity"] for r in rows}) == 5
    assert "ours, rung, tuned" in capsys.readouterr().out
