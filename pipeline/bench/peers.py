"""A peer's own code beside ours: `make bench-peers`.

torch-pruning (its dependency graph, its global group Taylor importance over 64 sequences) removes FFN units until the
decoder has lost as much as our run takes away. LoRA, by peft, then learns from KL to the intact model and cross
entropy: rank, projections, steps, batches and schedule are those of our run. Its learning rate is the best of the
`--rates`. Each row is a process of its own, so that time and peak memory are that row's alone; both end before scoring.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from nuteprune.bench.quality import Scorer, run_config
from nuteprune.config import Config
from nuteprune.data.batches import BatchStream
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import UserError
from nuteprune.exporting.card import RECORD
from nuteprune.exporting.folding import exported_parameters
from nuteprune.exporting.small import export_model
from nuteprune.masks.schedule import LORA_WARMUP
from nuteprune.model.loading import load_model, read_base
from nuteprune.parallel.distributed import discover
from nuteprune.runs.log import quiet_libraries
from nuteprune.stages import prune
from nuteprune.training.engine import LARGEST_NORM
from nuteprune.training.loop import peak_memory_gb

SEQUENCES = 64
OURS = "nuteprune"


def main(argv: list[str] | None = None) -> int:
    """Prune by each, score and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="directory of the intact model")
    parser.add_argument("--train", type=Path, required=True, help="training text")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="texts to score")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="of the peer's LoRA")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of 1,024 tokens that are scored")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/peers"))
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="a setting of both")
    args = parser.parse_args(argv)
    args.finetune = None
    for path in (args.train, *args.test):
        if not path.is_file():
            sys.stderr.write(
                f"bench-peers: {path} does not exist: give a text file (make bench-peers TRAIN=… TEST=…)\n"
            )
            return 2
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for rate in (0.0, *args.rates):
        # A new process a row: a peak of memory is never forgotten by the one that had it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                rows.append(pool.submit(measure, args, rate).result())
            except UserError as error:
                sys.stderr.write(f"bench-peers: {error}\n")
                return 2
        (args.out / "peers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(line(rows[-1]) + "\n")
        sys.stdout.flush()
    return 0


def measure(args: argparse.Namespace, rate: float) -> dict:
    """One row: ours, or the peer's at a learning rate."""
    quiet_libraries()
    config = run_config(args, args.model, "ours", args.sparsity, args.steps, args.seed)
    began = time.perf_counter()
    student: PreTrainedModel | str
    if rate:
        student, reached = torch_pruning(config, rate)
    else:
        shutil.rmtree(config.run_dir, ignore_errors=True)  # a finished run takes no time
        prune.run(config)
        exported = export_model(config)
        student, reached = str(exported), json.loads((exported / RECORD).read_text())["sparsity"]
    row = {
        "row": f"torch-pruning, LoRA at {rate:g}" if rate else OURS,
        "reached": reached,
        "seconds": round(time.perf_counter() - began),
        "peak_gb": round(peak_memory_gb(discover().device), 2),
    }
    scorer = Scorer(args.model, args.test, args.blocks)
    return row | scorer.score(student)


def line(row: dict) -> str:
    """A row of the table."""
    scores = (f"{text}: {value:.2f} / {row['kl'][text]:.3f}" for text, value in row["perplexity"].items())
    return f"{row['row']:<28} {row['reached']:.2%} {row['seconds']} s {row['peak_gb']} GB  " + "  ".join(scores)


def torch_pruning(config: Config, rate: float) -> tuple[PreTrainedModel, float]:
    """The student of torch-pruning and LoRA at a learning rate, in float32, and the share of the decoder removed."""
    torch.manual_seed(config.seed)
    device = discover().device
    base = read_base(config.model)
    teacher, student = load_model(base, device), load_model(base, device)
    blocks = TrainingText(config.run_dir, config.data, base).blocks()
    stream = BatchStream(blocks, config.train.batch_size, config.seed)
    before = exported_parameters(student)
    remove_units(student, stream, config.sparsity.target)
    reached = 1 - exported_parameters(student) / before
    return train_lora(student, teacher, stream, config, rate).float(), reached


def remove_units(model: PreTrainedModel, stream: BatchStream, sparsity: float) -> None:
    """Remove FFN units of least group Taylor importance over all layers, in place."""
    import torch_pruning as tp  # in an environment of its own: make bench-peers

    device, steps = model.device, -(-SEQUENCES // stream.batch_size)
    for step in range(steps):
        ids = stream.batch(step).to(device)
        (model(ids, labels=ids, use_cache=False).loss / steps).backward()
    ffn = [module for name, module in model.named_modules() if name.endswith(("gate_proj", "up_proj"))]
    prunable = 1.5 * sum(module.weight.numel() for module in ffn)  # down_proj goes with them
    wanted = sparsity * exported_parameters(model)
    if wanted >= prunable:
        raise UserError(f"FFN units alone cannot remove {sparsity:.0%} of the decoder of this model: lower --sparsity")
    pruner = tp.pruner.BasePruner(
        model, stream.batch(0)[:1].to(device), tp.importance.GroupTaylorImportance(), global_pruning=True,
        pruning_ratio=wanted / prunable,
        ignored_layers=[each for each in model.modules() if isinstance(each, nn.Linear) and each not in ffn],
        output_transform=lambda output: output.logits,
    )  # fmt: skip
    pruner.step()
    model.zero_grad()


def train_lora(
    student: PreTrainedModel, teacher: PreTrainedModel, stream: BatchStream, config: Config, rate: float
) -> PreTrainedModel:
    """The student with LoRA trained by KL to the teacher and cross entropy, merged."""
    rank = config.lora.rank
    lora = LoraConfig(r=rank, lora_alpha=rank * config.lora.scaling, target_modules=list(config.lora.targets))
    model, steps = get_peft_model(student, lora), config.train.steps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(LORA_WARMUP * steps), steps)
    for step in tqdm(range(steps), unit="step"):
        ids = stream.batch(step).to(student.device)
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits
        loss = distillation(model(ids, use_cache=False).logits, wanted, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        schedule.step()
    return model.merge_and_unload()


def distillation(logits: Tensor, wanted: Tensor, ids: Tensor) -> Tensor:
    """KL to the teacher's logits [B, T, V] and cross entropy of token ids [B, T], each a mean over tokens."""
    log_q, log_p = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    kl = F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean")
    return kl + F.nll_loss(log_q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


if __name__ == "__main__":
    sys.exit(main())
