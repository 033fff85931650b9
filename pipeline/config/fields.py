"""Every setting of a run as frozen dataclasses; each field carries its meaning and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Unit = Literal["heads", "kv_groups", "ffn", "hidden", "attn_sublayers", "ffn_sublayers", "layers", "experts"]
Shape = Literal["uniform", "per_layer_ffn", "per_layer"]
DEFAULT_UNITS: dict[Shape, list[Unit]] = {
    "uniform": ["ffn"], "per_layer_ffn": ["attn_sublayers", "ffn"], "per_layer": ["kv_groups", "ffn"],
}  # fmt: skip
"""What is gated by default in a shape, as measured (docs/results.md)."""
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Dtype = Literal["float32", "bfloat16", "float16"]
ExportShape = Literal[Shape, "as_trained"]


class ConfigError(ValueError):
    """A mistake in the user's input, told in one line; the command line prints it and exits with 2."""


def opt(default: Any, help: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None,
        lt: float | None = None) -> Any:  # fmt: skip
    """A dataclass field with its meaning and bounds (ge/gt: lower, le/lt: upper) kept as metadata."""
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    path: str = opt("", "Directory or hub id of the pretrained causal language model.")
    dtype: Dtype = opt("float32", "Type the frozen base weights are held in.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = opt("sdpa", "Attention implementation of transformers.")


@dataclass(frozen=True)
class DataConfig:
    source: str = opt("c4", "`c4` (streamed from the hub), or a path: .jsonl, .txt, .parquet, or a directory of those.")
    documents: int = opt(20_000, "Read at most this many documents (0: all).", ge=0)
    text_field: str = opt("text", "Name of the text column of JSONL and parquet files.")
    seq_len: int = opt(512, "Tokens per packed block.", ge=8)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = opt(0, "Optimizer steps; 0 takes `epochs` passes over the data.", ge=0)
    epochs: float = opt(7.0, "Passes over the data when `steps` is 0.", gt=0)
    batch_size: int = opt(16, "Sequences per optimizer step over all ranks.", ge=1)
    micro_batch: int = opt(
        0, "Sequences per forward pass on one rank; halved where the device runs out of memory, with the same losses "
        "(not under ZeRO-3). 0 begins with the whole batch.", ge=0
    )  # fmt: skip
    lora_lr: float = opt(2e-3, "Peak learning rate of the LoRA weights.", gt=0)
    lora_optimizer: Literal["scaled", "adamw"] = opt(
        "scaled", "`scaled`: AdamW on gradients of each LoRA factor that are scaled by the other factor, so that all "
        "directions of their product are learned alike, and B at four times the rate of A; `adamw`: as in the paper."
    )  # fmt: skip
    lora_schedule: Literal["constant", "cosine", "linear"] = opt(
        "cosine", "LoRA learning rate after its warm-up: `cosine` falls to a tenth, `linear` (the paper) to 0."
    )
    lora_warmup: float = opt(0.03, "Share of the steps over which the LoRA learning rate rises from 0.", ge=0, le=1)
    beta2: float = opt(0.999, "Second-moment decay of AdamW for LoRA.", gt=0, lt=1)
    weight_decay: float = opt(0.0, "AdamW weight decay of LoRA.", ge=0)
    grad_clip: float = opt(1.0, "Largest norm of the LoRA gradient; 0 turns clipping off.", ge=0)
    activation_checkpointing: bool = opt(False, "Recompute each layer in the backward pass to save memory.")
    ranks: int = opt(0, "Refuse to start on another number of ranks, as a typo in a hostfile gives; 0: any.", ge=0)
    rank_timeout: int = opt(600, "Seconds that a rank waits for the others before the run ends.", ge=10)
    deterministic: bool = opt(False, "Only deterministic algorithms on a GPU, and tile sizes that are not measured, so "
                              "that two runs give the same bits there too (docs/determinism.md).")  # fmt: skip
    max_bad_steps: int = opt(10, "Stop after this many steps in a row with a NaN or infinite loss or gradient.", ge=1)


@dataclass(frozen=True)
class GateConfig:
    units: list[Unit] = opt([], "What may be removed: heads, kv_groups, ffn, hidden, attn_sublayers, ffn_sublayers, "
                            "layers, experts; empty: ffn, and in the shape `per_layer_ffn` attn_sublayers too, in "
                            "`per_layer` kv_groups.")  # fmt: skip
    shape: Shape = opt(
        "per_layer_ffn", "`per_layer_ffn`: the same attention in each layer that has one, an FFN width of its own; "
        "`uniform`: the same counts in every layer, a stock architecture; `per_layer`: free counts."
    )  # fmt: skip
    init: Literal["importance", "drop_rate"] = opt(
        "importance", "Start of log-alpha: from first-order Taylor importance, or one drop rate for all."
    )
    init_drop_rate: float = opt(0.01, "Initial probability that a unit is dropped (init: drop_rate).", gt=0, lt=1)
    init_spread: float = opt(2.0, "Standard deviation of the initial log-alpha (init: importance).", gt=0)
    importance_tokens: int = opt(
        65536, "Tokens over which the Taylor importance is summed (init: importance); never more than the text has.",
        ge=1,
    )  # fmt: skip
    optimizer: Literal["adam", "sgd"] = opt(
        "sgd", "`sgd`: momentum on gradients per parameter of a unit, divided by their root mean square, so that units "
        "move in proportion to what they matter; `adam`: AdamW as in the paper."
    )  # fmt: skip
    lr: float = opt(
        2.5, "Learning rate of log-alpha; for `sgd` divided by the steps until the gates settle, so that a unit moves "
        "as far in a run of any length: under a constant gradient, with momentum 0.9, 8 to 10 times this.", ge=0
    )  # fmt: skip
    temperature: float = opt(0.1, "Temperature of the hard-concrete distribution (the paper: 2/3).", gt=0)
    noise: float = opt(0.1, "Scale of the sampling noise at the start (1: hard concrete as published).", ge=0, le=1)
    noise_end: float = opt(0.02, "Scale of the sampling noise when the gates settle (geometric path).", ge=0, le=1)
    clamp: float = opt(0.0, "Clamp log-alpha to [-clamp, clamp] after each step; 0: no clamp.", ge=0)
    settle: float = opt(0.45, "Share of the steps after which the gates become exactly 0 or 1 and stay; 1: never.",
                        gt=0, le=1)  # fmt: skip
    ffn_multiple: int = opt(
        128, "Settled FFN widths (not in the per_layer shape) are multiples of this, halved where the target would be "
        "missed.", ge=1
    )  # fmt: skip
    hidden_multiple: int = opt(64, "The settled hidden size is a multiple of this, halved where it would miss.", ge=1)
    tensor_parallel: int = opt(
        1, "KV groups and FFN widths (not in the per_layer shape) can be split evenly over this many GPUs.", ge=1
    )

    def __post_init__(self):
        if not self.units:
            object.__setattr__(self, "units", list(DEFAULT_UNITS[self.shape]))


@dataclass(frozen=True)
class SparsityConfig:
    target: float = opt(0.2, "Share of the prunable parameters (decoder projections) to remove.", gt=0, lt=1)
    schedule: Literal["linear", "cubic"] = opt("cubic", "How the target rises from 0 during the warm-up.")
    warmup: float = opt(0.4, "Share of the steps over which the target rises.", gt=0, le=1)
    constraint: Literal["projection", "lagrangian"] = opt(
        "projection", "`projection` holds the schedule by construction; `lagrangian` is the paper's."
    )
    multiplier_lr: float = opt(0.1, "Ascent rate of the Lagrangian's multipliers (constraint: lagrangian).", gt=0)


@dataclass(frozen=True)
class LoraConfig:
    targets: list[Projection] = opt(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Projections that get LoRA; none: gates are learned alone.",
    )
    rank: int = opt(16, "LoRA rank.", ge=1)
    alpha: float = opt(16.0, "LoRA alpha; the update is scaled by alpha / rank.", gt=0)
    refit: int = opt(
        112, "Ranks of a further pair on down_proj, which is not trained: by least squares on the text, the FFN units "
        "that stay make up for those that leave. 0 where no FFN units leave or down_proj has no LoRA; not where a "
        "layer has experts.", ge=0
    )  # fmt: skip

    def rank_of(self, projection: str) -> int:
        """All ranks of a projection's update, those of `refit` too."""
        return self.rank + (self.refit if projection == "down_proj" else 0)


@dataclass(frozen=True)
class TeacherConfig:
    mode: Literal["numerous", "intact", "none"] = opt(
        "numerous", "Earlier snapshots, the intact model, or none (plain language-model loss)."
    )
    interval: float = opt(0.01, "Sparsity between two recorded snapshots.", gt=0, lt=1)
    lag: int = opt(
        20, "Intervals the teacher is behind the student while sparsity rises, at least (the paper: 10); until the "
        "student is so far, the intact model teaches.", ge=1
    )  # fmt: skip
    share: float = opt(
        0.4, "A teacher's sparsity is at most this share of the student's; 1 (the paper): no such limit.", gt=0, le=1
    )


@dataclass(frozen=True)
class LossConfig:
    layer_weight: float = opt(0.9, "Weight of the layer term.", ge=0)
    layer: Literal["normalized", "raw"] = opt(
        "normalized", "Layer term: squared error over the teacher's mean square, per token; or the paper's raw MSE."
    )
    layer_reduction: Literal["sum", "mean"] = opt("mean", "Sum (the paper) or mean of the layer terms over layers.")
    kl_weight: float = opt(
        1.0, "Weight of the KL term per token (the paper's 0.1 at 512 tokens is 51.2): a higher one keeps the student "
        "nearer to the model, a lower one nearer to the text.", ge=0
    )  # fmt: skip
    label_weight: float = opt(
        1.0, "Weight of the cross entropy of the text's next token beside a teacher (the paper: 0).", ge=0
    )
    temperature: float = opt(1.0, "Softmax temperature T of the KL term, which is scaled by T squared.", gt=0)
    chunk: int = opt(256, "Tokens whose full-vocabulary logits exist at once.", ge=1)


@dataclass(frozen=True)
class FinetuneConfig:
    data: str = opt(
        "", "Records (.json, .jsonl, .parquet) with instruction, input, output; or messages; or prompt, completion."
    )
    template: Literal["auto", "chat", "alpaca"] = opt(
        "auto", "Wording of a prompt: the tokenizer's chat template, Alpaca's, or (auto) the first where there is one."
    )
    unusable: Literal["refuse", "drop"] = opt("refuse", "What happens to empty answers and records beyond the window.")
    seq_len: int = opt(1024, "Tokens of a window into which whole records are packed.", ge=8)
    pack: bool = opt(True, "Several records in a window; false (the authors): each in its own, padded.")
    steps: int = opt(0, "Optimizer steps; 0 takes `epochs` passes over the windows.", ge=0)
    epochs: float = opt(2.0, "Passes over the windows when `steps` is 0.", gt=0)
    batch_size: int = opt(16, "Windows per optimizer step over all ranks.", ge=1)
    micro_batch: int = opt(1, "Windows per forward pass on one rank, as train.micro_batch.", ge=0)
    lr: float = opt(1e-4, "Peak learning rate.", gt=0)
    lora_rank: int = opt(0, "LoRA rank, at least the pruned student's, whose update is trained on; 0: the same.", ge=0)
    distill: float = opt(
        0.0, "Weight per answer token of the KL from the intact model, beside the cross entropy.", ge=0
    )
    sparsity: float = opt(0.0, "Fine-tune the run's snapshot at this sparsity; 0: the final student.", ge=0, lt=1)


@dataclass(frozen=True)
class RecoverConfig:
    ladder: list[float] = opt([], "Sparsities whose snapshots of the run are trained on, their gates fixed.")
    steps: int = opt(0, "Optimizer steps for each; 0: 0.4 of the run's.", ge=0)
    lr: float = opt(0.0, "Peak learning rate; 0: the run's train.lora_lr.", ge=0)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = opt(200, "Steps between checkpoints (0: only the final one and on a signal).", ge=0)
    keep: int = opt(2, "Checkpoints kept.", ge=1)
    resume: Literal["auto", "never"] = opt("auto", "`auto` goes on from the newest checkpoint that verifies.")


@dataclass(frozen=True)
class TrackingConfig:
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = opt(
        ["tensorboard"], "Where metrics go beside metrics.jsonl; empty: nowhere. wandb and trackio where installed."
    )
    progress: bool = opt(True, "Show progress bars.")
    log_every: int = opt(1, "Steps between two log entries.", ge=1)
    image_every: int = opt(50, "Steps between two pictures of the kept units.", ge=1)


@dataclass(frozen=True)
class ExportConfig:
    output: str = opt("", "Directory of the exported model; empty: `export` below the run directory.")
    shape: ExportShape = opt("as_trained", "Shape of the exported model; `as_trained` takes `gates.shape` of the run.")
    sparsity: float = opt(0.0, "Export the run's snapshot at this sparsity; 0: the final student.", ge=0, lt=1)
    source: Literal["newest", "pruned", "finetuned"] = opt(
        "newest", "The student as pruned, as fine-tuned, or (newest) fine-tuned where that is finished."
    )
    ladder: list[float] = opt([], "Export a model at each of these sparsities and compare them with the intact one.")
    ladder_per_layer: bool = opt(
        False, "Export each rung in the `per_layer` shape too, to tell what the uniform shape costs in perplexity."
    )
    ffn_multiple: int = opt(0, "FFN widths are rounded to this multiple; 0: gates.ffn_multiple of the run.", ge=0)
    hidden_multiple: int = opt(0, "The hidden size is rounded to this multiple; 0: as in the run.", ge=0)
    tensor_parallel: int = opt(0, "GPUs over which the model can be split; 0: as in the run.", ge=0)
    dtype: Literal["as_base", Dtype] = opt("as_base", "Type of the exported weights.")
    gguf: Literal["none", "f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m"] = opt(
        "none", "Write model.gguf for llama.cpp beside the model, its matrices in this type. llama.cpp itself makes "
                "those with a k: pip install llama-cpp-py-sync."
    )  # fmt: skip
    push_to_hub: str = opt(
        "", "Repository of the Hugging Face hub (user/name) that the model is uploaded to; empty: none."
    )
    hub_private: bool = opt(True, "A repository that has to be made is private.")
    shard_size: str = opt("5GB", "Largest safetensors file.")
    check_tokens: int = opt(512, "Tokens of real text on which logits are compared before the export finishes.", ge=8)


@dataclass(frozen=True)
class EvaluateConfig:
    protocol: Literal["own", "published"] = opt(
        "own",
        "`published`: WikiText-2 as papers score it, in windows of 2,048 and of 128 tokens, and tasks zero-shot on all "
        "examples, whatever window, stride, blocks, fewshot and task_limit say; `evaluate.text` names its raw test set "
        "(empty: the hub's).",
    )
    models: list[str] = opt([], "Directories to evaluate; empty: the base model and the run's export.")
    text: list[str] = opt(
        [],
        "Texts for perplexity (.txt, .jsonl, .parquet), e.g. WikiText-2 and PTB; empty: the data source of training.",
    )
    text_field: str = opt("text", "Text column of JSONL and parquet files.")
    window: int = opt(2048, "Tokens per perplexity window, the one that the tokenizer puts first among them.", ge=8)
    stride: int = opt(0, "Tokens between two windows; 0: the window itself.", ge=0)
    blocks: int = opt(0, "Windows to score; 0: all.", ge=0)
    tasks: list[str] = opt(
        [], "lm-eval tasks: names on the hub, `paper` (the paper's seven), `local_mc`, or a YAML file of your own."
    )
    task_limit: int = opt(0, "Examples per task; 0: all.", ge=0)
    fewshot: int = opt(0, "Few-shot examples per task.", ge=0)
    speed: bool = opt(True, "Measure prefill and decode speed.")
    prompt_tokens: int = opt(256, "Prompt length of the speed measurement.", ge=1)
    new_tokens: int = opt(64, "Tokens decoded in the speed measurement.", ge=1)
    batch_sizes: list[int] = opt([1, 8], "Sequences at once in the speed measurement, one measurement each.")
    prompts: int = opt(
        32,
        "Prompts from the text that are continued greedily, of which three are shown: how many continuations loop, "
        "repeat themselves, and agree with the first model's; 0: none.",
        ge=0,
    )
    trust_remote_code: bool = opt(
        False, "Run Python that comes with a model (auto_map) or a task file; only as an override, never from a file."
    )
    output: str = opt(
        "", "Directory of report.html, report.md and report.json; empty: `evaluate` below the run directory."
    )


@dataclass(frozen=True)
class Config:
    recipe: str = opt("default", "Base settings: the name of a recipe (paper, taylor, llama2-13b, …) or a YAML file.")
    run_dir: str = opt("", "Directory of the run: configuration, checkpoints, logs, results.")
    seed: int = opt(0, "Seed of data order, gate samples and LoRA initialisation.", ge=0)
    deepspeed: str = opt(
        "", "How several ranks share the memory: zero2, zero3, zero3_hpz, zero3_offload, zero3_nvme, or a DeepSpeed "
        "JSON file; empty: every rank holds everything."
    )  # fmt: skip
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


ASKED_EACH_TIME = (("evaluate", "trust_remote_code"),)
"""Fields that no file can set: a recipe or a run directory of someone else's must not allow itself to run code."""

STAGE_SECTIONS = {
    "prepare": ["model", "data", "finetune"],
    "prune": ["model", "data", "train", "gates", "sparsity", "lora", "teacher", "loss", "checkpoint", "tracking"],
    "recover": ["model", "recover", "train", "export", "checkpoint", "tracking"],
    "finetune": ["model", "finetune", "train", "loss", "export", "checkpoint", "tracking"],
    "export": ["model", "export"],
    "evaluate": ["model", "data", "export", "evaluate", "tracking"],
}
"""The sections each stage reads; `--help` of a stage lists these."""
