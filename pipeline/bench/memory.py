"""Memory of each rank under ZeRO-3, measured and planned: `make bench-memory`, or torchrun … -m nuteprune.bench.memory.

Counted bytes of the frozen weights and of LoRA with its optimizer stand beside the planner's; and the peak of the
process's resident memory while loading and training, above what the interpreter, its libraries and the modelling code
take, beside the sum of the rank's share, the largest layer, the embedding and the activations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from nuteprune.__main__ import quiet_libraries
from nuteprune.bench.comm import partitioned_run
from nuteprune.kernels.api import into_grad
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import connected, discover
from nuteprune.parallel.sizes import layer_tensors, total_parameters
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.planning.footprint import lora_memory, memory
from nuteprune.planning.job import Cluster, Job, Layout
from nuteprune.training.engine import Engine

MB = 1e6


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="from the third on DeepSpeed prefetches")
    args = parser.parse_args(argv)
    quiet_libraries()
    world = discover()
    config, base = partitioned_run(args.model, args.tokens, world)
    spec = base.spec
    settings = zero_settings(config, spec, world)
    job = Job(spec, config, Cluster(1, world.size))
    with connected(world, config.train.rank_timeout):
        import deepspeed  # noqa: F401  its import is the interpreter's own memory, not the model's

        with init_empty_weights():  # imports the modelling code
            AutoModelForCausalLM.from_config(base.config)
        before = Peak()
        model = load_paired(base, config.lora, world, settings)
        loading = before.since()
        schedule = Schedule(args.steps, config.train, config.gates, config.sparsity)
        masks = MaskSet(spec, config.gates).to(world.device)
        engine = Engine(model, masks, None, schedule, world, bool(config.deepspeed))
        generator = torch.Generator().manual_seed(world.rank)
        ids = torch.randint(0, spec.vocab, (1, args.tokens), generator=generator).to(world.device)
        teacher = build_view(spec, None, {}, model.scaling, model.dtype)
        for step in range(args.steps):
            student = model.student(None)
            with into_grad():
                losses = model(ids, student, teacher, config.loss)
            engine.backward(losses.total)
            engine.step(step)
        training = before.since()
        peaks = world.gather((loading, training))
    if world.is_main:
        sys.stdout.write("\n".join(lines(job, model, engine, peaks)) + "\n")
    return 0


class Peak:
    """Peak of the resident memory of this process from now on (Linux), without further code pages of libraries."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._read()

    def since(self) -> int:
        """Bytes of the peak above the start."""
        return self._read() - self.start

    def _read(self) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak, files = (int(status[key].split()[0]) for key in ("VmHWM", "RssFile"))
        return (peak - files) * 1024


def lines(job: Job, model: PairedModel, engine: Engine, peaks: list[tuple[int, int]]) -> list[str]:
    """The report, in MB of 1e6 bytes."""
    spec, ranks = job.spec, job.cluster.ranks
    layout = Layout(3, 1)
    plan = memory(job, layout)
    weights = sum(plan.resident[name] for name in (f"frozen weights (1/{ranks})", "small tensors kept whole"))
    sizes = lora_memory(job, layout)
    planned = sum(sizes[name] for name in ("LoRA weights", "LoRA gradient", "LoRA moments"))
    whole, layer = total_parameters(spec) * job.itemsize, sum(layer_tensors(spec)) * job.itemsize
    embedding = spec.vocab * spec.hidden * job.itemsize
    head = plan.phases["the output loss runs"]
    activations = head["activations of the student"] + head["logits of one KL chunk"]
    bound = whole / ranks + layer + embedding
    loading, training = (max(values) for values in zip(*peaks, strict=True))
    return [
        f"{ranks} ranks, base model {whole / MB:.1f} MB",
        f"frozen weights of a rank {frozen_bytes(model) / MB:.1f} MB (planner {weights / MB:.1f})",
        f"LoRA, gradient, moments of a rank {lora_bytes(engine) / MB:.1f} MB (planner {planned / MB:.1f})",
        f"peak while loading {loading / MB:.0f} MB (share + layer + embedding {bound / MB:.0f})",
        f"peak while training {training / MB:.0f} MB (share + layer + embedding + activations "
        f"{(bound + activations) / MB:.0f}; with LoRA {(bound + activations + planned) / MB:.0f}; "
        f"planner's peak {plan.peak / MB:.0f})",
    ]


def frozen_bytes(model: PairedModel) -> int:
    """Bytes of the frozen weights that this rank holds between steps: its shards, and small tensors that are whole."""
    return sum(p.nbytes if p.ds_persist else p.ds_tensor.nbytes for p in model.parameters())


def lora_bytes(engine: Engine) -> int:
    """Bytes of LoRA, its gradient and this rank's AdamW moments."""
    optimizer = engine.optimizers["lora"]
    optimizer = getattr(optimizer, "optim", optimizer)  # the shard's own, where it is spread over the ranks
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.nbytes for t in [*engine.lora, *(p.grad for p in engine.lora), *moments])


if __name__ == "__main__":
    sys.exit(main())
