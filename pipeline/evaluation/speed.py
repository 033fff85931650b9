"""Speed and memory of generation: several models in turns, and the speed that their sizes allow at most."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nuteprune.evaluation.measure import generate

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: memory of this process, and the file that resets its peak (5: proc(5))."""


@torch.inference_mode()
def speed(
    models: list[PreTrainedModel], prompt_tokens: int, new_tokens: int, batch: int = 1, repeats: int = 5,
    firsts: Sequence[Sequence[int]] = (),
) -> list[dict]:  # fmt: skip
    """Speed of greedy generation, as the median of several repetitions after a warm-up that measures memory.

    The models take turns (A B, B A, A B, …), first in a prefill and then in decoding, so that a machine that slows down
    slows all of them; `speed_ratio` compares them.

    Args:
        models: on their devices.
        prompt_tokens: tokens of the (random) prompt; prefill is its one forward pass that fills the KV cache.
        new_tokens: steps with the cache that follow; decode is the time from the prefill's end to theirs.
        batch: sequences at once; rates are tokens of all of them.
        repeats: measured rounds.
        firsts: by model, token ids that its prompt begins with.

    Returns:
        Per model `prefill_tokens_per_s`, `decode_tokens_per_s`, their `…_rounds` (the rate of each round),
        `peak_memory_bytes` (weights, and what generation adds; None where it cannot be told), `prompt_tokens`,
        `new_tokens`, `batch`, `repeats`, `device` and `threads`.
    """
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models)
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompts = [_begun(prompt, first) for first in firsts or [()] * len(models)]
    peaks = [_peak_memory(*pair, new_tokens) for pair in zip(models, prompts, strict=True)]
    rates: list[dict[str, list[float]]] = [{key: [] for key in SPEEDS} for _ in models]
    for turn in range(repeats):
        order = range(len(models)) if turn % 2 == 0 else range(len(models) - 1, -1, -1)
        for index in order:
            seconds, _ = _time_generation(models[index], prompts[index], 0)
            rates[index]["prefill_tokens_per_s"].append(prompt.numel() / seconds)
        for index in order:
            _, seconds = _time_generation(models[index], prompts[index], new_tokens)
            rates[index]["decode_tokens_per_s"].append(batch * new_tokens / seconds)
    return [
        {
            **{key: statistics.median(rounds) for key, rounds in measured.items()},
            **{f"{key}_rounds": rounds for key, rounds in measured.items()},
            "peak_memory_bytes": peak,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch": batch,
            "repeats": repeats,
            "device": model.device.type,
            "threads": torch.get_num_threads(),
        }
        for model, measured, peak in zip(models, rates, peaks, strict=True)
    ]


def _begun(prompt: torch.Tensor, first: Sequence[int]) -> torch.Tensor:
    """A prompt `[B, T]` that begins with some token ids in place of its own."""
    prompt, size = prompt.clone(), min(len(first), prompt.shape[1])
    prompt[:, :size] = torch.tensor(first[:size], dtype=prompt.dtype)
    return prompt


def speed_ratio(before: dict, after: dict) -> dict:
    """How much faster `after` is than `before` (results of one `speed` call): the ratio of the medians.

    `…_range` has the least and the largest ratio of a round, whose two measurements are close in time.
    """
    found: dict = {key: after[key] / before[key] for key in SPEEDS}
    for key in SPEEDS:
        pairs = zip(before[f"{key}_rounds"], after[f"{key}_rounds"], strict=True)
        rounds = [b / a for a, b in pairs]
        found[f"{key}_range"] = [min(rounds), max(rounds)]
    return found


def ceiling(before: dict, after: dict) -> dict:
    """The speed-up that sizes allow where time goes by the weights that are read: 1 / (1 − p·s).

    Args:
        before, after: `measure.sizes` of the intact and the pruned model.

    Returns:
        `prunable` p, the prunable share of the weights read for a token; `sparsity` s, the removed share of those;
        `speedup`.
    """
    p = before["parameters_prunable"] / before["parameters_read"]
    s = 1 - after["parameters_prunable"] / before["parameters_prunable"]
    return {"prunable": p, "sparsity": s, "speedup": 1 / (1 - p * s)}


def _time_generation(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of the `new_tokens` decoding steps after it, for a prompt `[B, T]`."""
    # The prefill gives the first new token, so one more than the decoding steps is asked for.
    with _forward_times(model) as times:
        generate(model, prompt, new_tokens + 1, new_tokens + 1)
    assert len(times) == 2 * (new_tokens + 1), "generate() takes one forward pass per token"
    return times[1] - times[0], times[-1] - times[1]


@contextlib.contextmanager
def _forward_times(model: PreTrainedModel) -> Iterator[list[float]]:
    """Collect the time in seconds before and after each forward pass of a model: begin, end, begin, end, …"""
    times: list[float] = []

    def note(*_) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter())

    hooks = [model.register_forward_pre_hook(note), model.register_forward_hook(note)]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def _peak_memory(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> int | None:
    """Bytes of the model's weights and of what one generation adds at its peak; None where the system does not tell."""
    weights = sum(p.nbytes for p in model.parameters())
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        generate(model, prompt, new_tokens + 1, new_tokens + 1)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that is still held would be used again and hide the growth
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    before = _resident("VmRSS")
    generate(model, prompt, new_tokens + 1, new_tokens + 1)
    peak = _resident("VmHWM")
    return None if before is None or peak is None else weights + max(0, peak - before)


def _resident(entry: str) -> int | None:
    """Bytes of an entry of /proc/self/status."""
    with contextlib.suppress(OSError):
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(entry)), None)
    return None
