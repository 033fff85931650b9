"""What a step costs beside its kernels, on tiny layers with kernel launches stubbed.

Counted in the prune stage's own step, while gates are sampled and once they are settled: operations sent through
torch's dispatcher, launches of our own kernels, and places at which the host would wait for a card.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.data.batches import BatchStream
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.stages.prune import Pruning
from nuteprune.training.engine import Engine
from nuteprune.training.teachers import TEACHERS

STEPS = 1000
PHASES = {"sampled": 300, "settled": 700}
"""Steps of a run of `STEPS` that are measured, by phase: in the warm-up with noise, and after it."""
WAITING = (
    "_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "unique_dim", "masked_select", "equal",
    "bincount",
)  # fmt: skip
"""Operations whose result, or its size, the host has to wait for."""
KERNELS = {
    "triton_kernels.matmul": (6,), "triton_kernels.column_reduce": (), "triton_kernels.finish_reduce": (5,),
    "pointwise.rms_norm": (2,), "pointwise.rms_norm_backward": (3,), "pointwise.rotary": (4, 5),
    "pointwise.gated": (2,), "pointwise.gated_backward": (3, 4),
}  # fmt: skip
"""Which of their arguments the kernels write that others than these kernels read (LoRA gradients are sums)."""
BARS = {"sampled": 20, "settled": 10}
"""Host syncs that a step may take, at any depth."""


class OperationCounts(TorchDispatchMode):
    """Counts operations by name, launches of our own kernels, and operations for which the host waits."""

    def __init__(self):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __enter__(self):
        self._before = Counter(_Stub.launched)
        return super().__enter__()

    def __exit__(self, *error):
        self.launches = _Stub.launched - self._before
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.operations[name] += 1
        if name in WAITING or (name.startswith("index") and _has_mask(args)):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: tuple) -> bool:
    """Whether an indexing operation is given a mask: it has to find its places first."""
    lists = [a for a in args if isinstance(a, (list, tuple))]
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for entries in lists for t in entries)


@contextmanager
def counted_copies(counts: OperationCounts) -> Iterator[None]:
    """Count copies to the host that do not pass the dispatcher on a CPU."""
    before = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}

    def counting(name: str):
        def method(self, *args, **kwargs):
            counts.waits[name] += 1
            return before[name](self, *args, **kwargs)

        return method

    for name in before:
        setattr(Tensor, name, counting(name))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Tensor, name, method)


_zero = ctypes.memset


class _Stub:
    """A kernel that is counted and not launched: the outputs at these positions are zeros, past the dispatcher."""

    launched: ClassVar[Counter[str]] = Counter()

    def __init__(self, name: str, *outputs: int):
        self.name, self.outputs = name, outputs

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        self.launched[self.name] += 1
        for position in self.outputs:
            output = arguments[position]
            if output is not None:
                _zero(output.data_ptr(), 0, output.nbytes)


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """The triton path without its kernels."""
    from nuteprune.kernels import launch, masked_lora, rowwise, tuning

    changes: list[tuple[Any, str, Any]] = []
    for kernel, outputs in KERNELS.items():
        module, name = kernel.split(".")
        changes.append((import_module(f"nuteprune.kernels.{module}"), name, _Stub(name, *outputs)))
    changes += [(module, "INTERPRETING", True) for module in (launch, masked_lora, rowwise, tuning)]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    os.environ["NUTEPRUNE_KERNELS"] = "triton"
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        del os.environ["NUTEPRUNE_KERNELS"]


def trainer(layers: int, phase: str, batch: int = 1) -> Pruning:
    """The prune stage of a tiny random model, at the first step of a phase, taught by a snapshot."""
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=128,
            num_hidden_layers=layers,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).to(torch.bfloat16)
    spec = read_spec(hf_model.config)
    config = load_config(None, [
        f"train.steps={STEPS}", f"train.batch_size={batch}", "train.micro_batch=1", "model.dtype=bfloat16",
        "sparsity.target=0.5", "gates.units=[ffn]",  # no layer loses a sublayer: each costs the same
        "gates.ffn_multiple=1", "data.seq_len=16", "tracking.progress=false",
    ])  # fmt: skip
    model = PairedModel(hf_model, spec, config.lora)
    masks, world = MaskSet(spec, config.gates), World()
    schedule = Schedule.of(config, 0)
    engine = Engine(model, masks, None, schedule, world)
    stream = BatchStream(torch.randint(0, spec.vocab, (64, 16), dtype=torch.int32), batch, 0)
    teacher = TEACHERS[config.teacher.mode](spec, config.teacher, model.scaling, world.device, model.dtype)
    made = Pruning(config, world, model, engine, stream, schedule, masks=masks, teacher=teacher, refit=None)
    masks.restart({kind: torch.randn_like(la) for kind, la in masks.log_alpha.items()})
    for sparsity in (0.05, 0.1):
        masks.project(sparsity)
        teacher.record(0, sparsity + 1e-3, masks.deterministic(), masks.scores(), model.update.lora,
                       model.update.frozen)  # fmt: skip
    made.step = PHASES[phase]
    return made


def step(made: Pruning) -> None:
    """One step of the stage."""
    made.train_step()
    made.step += 1


def counts(layers: int, phase: str, batch: int = 1) -> OperationCounts:
    """What one step takes, after two that settle what is kept between steps."""
    made = trainer(layers, phase, batch)
    with stubbed_launches():
        for _ in range(2):
            step(made)
        with OperationCounts() as found, counted_copies(found):
            step(made)
    return found
