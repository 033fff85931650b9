"""docs/monitoring.md defines every scalar that a run logs, and no other."""

import json
import re
from pathlib import Path

from nuteprune.config import LossConfig, load_config
from nuteprune.model.losses import TERMS
from nuteprune.runs.directories import distill_directory
from nuteprune.stages import distill, evaluate, export, finetune, prune, recover
from nuteprune.training import blocks

PAGE = Path(__file__).parents[2] / "docs/monitoring.md"
ON = [f"loss.{name}_weight=1" for name in TERMS]
OFF = {f"{name}_loss" for name in TERMS if not getattr(LossConfig(), f"{name}_weight")}
"""Terms that a run has only if it is asked for them, as one of `prune` is here."""
TABLE = re.compile(r"^(?P<stages>[^|\n][^\n]*)\n\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)


def defined() -> dict[str, set[str]]:
    """The names in the page's tables, by each stage that the line above a table names."""
    names: dict[str, set[str]] = {}
    section = PAGE.read_text(encoding="utf-8").split("## What is logged")[1].split("\n## ")[0]
    for table in TABLE.finditer(section):
        first = [row.split("|")[1] for row in table["rows"].splitlines()[2:]]
        found = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
        for stage in re.findall(r"`(prune|recover|finetune|distill|evaluate)`", table["stages"]):
            names[stage] = names.get(stage, set()) | found
    return names


def logged(run_dir: Path, prefix: str) -> set[str]:
    """The names below a prefix that a run logged."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {name.removeprefix(prefix) for line in lines for name in line if name.startswith(prefix)}


def test_what_is_logged_is_defined_and_what_is_defined_is_logged(
    run_dir, settings, text_file, records, model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "STEPS", 30)
    prune.run(load_config(None, ["recipe=paper", *settings, *ON, f"run_dir={tmp_path / 'paper'}", "train.steps=1"]))
    config = load_config(run_dir, [
        "recover.ladder=[0.2]", "recover.steps=1", f"finetune.data={records}", "finetune.steps=1",
        "finetune.distill=1", "distill.steps=1",
        "finetune.seq_len=32", "finetune.batch_size=1", f"evaluate.models=[{model_dir},{model_dir}]",
        f"evaluate.text=[{text_file}]", "evaluate.window=32", "evaluate.blocks=2", "evaluate.tasks=[local_mc]",
        "evaluate.task_limit=1", "evaluate.prompts=1", "evaluate.prompt_tokens=8", "evaluate.new_tokens=2",
    ])  # fmt: skip
    (recovered,) = recover.run(config)
    export.run(config)
    distill.run(config)
    tuned = finetune.run(config)
    (model,) = {entry["name"] for entry in evaluate.run(config)["models"]}
    results = {re.sub(r"batch_\d+", "batch_N", name) for name in logged(run_dir, f"eval/{model}/")}
    results = {name.replace("/train.txt", "/TEXT") for name in results}
    assert {stage: names if stage == "prune" else names - OFF for stage, names in defined().items()} == {
        "prune": logged(run_dir, "prune/") | logged(tmp_path / "paper", "prune/"),
        "recover": logged(recovered.parent, "recover/"),
        "finetune": logged(tuned.parent, "finetune/"),
        "distill": logged(distill_directory(run_dir), "distill/"),
        "evaluate": {re.sub(r"tasks/local_mc/.*", "tasks/TASK/METRIC", name) for name in results},
    }
