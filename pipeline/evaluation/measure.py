"""Measurements of a causal language model in memory: perplexity, greedy generation, sizes, and the machine.

Shape letters: n tokens of a text, T tokens of a window, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from nuteprune.config import ConfigError
from nuteprune.exporting.folding import exported_parameters

LOGIT_CHUNK = 256
"""Tokens whose full-vocabulary logits exist at once: 160 MB in fp32 for a vocabulary of 152k."""
SIZES = ("parameters", "parameters_non_embedding", "bytes")


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokens: torch.LongTensor, window: int, stride: int, blocks: int, progress: str | None = None
) -> dict:
    """Perplexity of a text: exp of the mean negative log-likelihood over the predicted tokens.

    Args:
        model: causal language model.
        tokens: token ids `[n]` of the text.
        window: tokens a forward pass sees.
        stride: tokens between the starts of two windows. Equal to `window` (or 0): blocks side by side, each predicting
            its last `window` - 1 tokens; a shorter rest is left out. Smaller: each token but the first is scored once,
            in the first window that holds it, which gives it at least `window` - `stride` tokens of context.
        blocks: windows to score from the start of the text; 0 takes all.
        progress: label of a progress bar on stderr; None shows none.

    Returns:
        `perplexity`, `nll` (nats per token), `tokens` (predicted), `window`, `stride`, `blocks` (scored).

    Raises:
        ConfigError: a stride beyond the window, a text shorter than one window, token ids without an embedding, or a
            model whose logits are not its output matrix times the last hidden state.
    """
    stride = stride or window
    spans = _spans(len(tokens), window, stride, blocks)
    rows = model.get_input_embeddings().num_embeddings
    if tokens.max() >= rows:
        raise ConfigError(f"the text has token id {tokens.max()} but the model {rows} embeddings: wrong tokenizer")
    _check_head(model, tokens[:16].to(model.device))
    total, count = 0.0, 0
    for begin, end, scored in tqdm(spans, desc=progress, unit="block", disable=progress is None):
        total += _nll_sum(model, tokens[begin:end].to(model.device), scored)
        count += scored
    nll = total / count
    # exp overflows beyond 709: a model that bad has no perplexity worth a number.
    value = math.exp(nll) if nll < 700 else math.inf
    return {"perplexity": value, "nll": nll, "tokens": count, "window": window, "stride": stride, "blocks": len(spans)}


def _spans(n: int, window: int, stride: int, blocks: int) -> list[tuple[int, int, int]]:
    """Windows over n tokens as (begin, end, scored): the last `scored` tokens of each are predicted."""
    if stride > window:
        raise ConfigError(f"evaluate.stride {stride} leaves out tokens: give at most evaluate.window ({window}), or 0")
    if n < window:
        raise ConfigError(
            f"the evaluation text has {n} tokens, less than one window of {window}: give more text or lower "
            "evaluate.window"
        )
    if stride == window:
        spans = [(begin, begin + window, window - 1) for begin in range(0, n - window + 1, window)]
    else:
        begins = range(0, n - window + stride, stride)
        ends = [min(begin + window, n) for begin in begins]
        # Token 0 has no context: the first window scores one token less than it holds.
        spans = [(b, end, end - done) for b, end, done in zip(begins, ends, [1, *ends], strict=False)]
    return spans[: blocks or None]


def _nll_sum(model: PreTrainedModel, ids: torch.Tensor, scored: int) -> float:
    """Summed negative log-likelihood of the last `scored` of the token ids `[T]`, log-softmax in fp32."""
    hidden_TD = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    head, total = model.get_output_embeddings(), 0.0
    pairs = zip(hidden_TD[-scored - 1 : -1].split(LOGIT_CHUNK), ids[-scored:].split(LOGIT_CHUNK), strict=True)
    for hidden, target in pairs:
        logits = head(hidden)  # of a model that is spread over devices: on the last one
        total += F.cross_entropy(logits.float(), target.to(logits.device), reduction="sum").item()
    return total


@torch.inference_mode()
def last_states(model: PreTrainedModel, tokens: torch.LongTensor, window: int, blocks: int) -> torch.Tensor:
    """Last hidden states [blocks, T, D] of the first blocks of a text, on the CPU: all that its logits come from.

    Args:
        model: causal language model whose logits are its output matrix times these.
        tokens: token ids `[n]` of the text.
        window: tokens T of a block; blocks stand side by side from the start of the text.
        blocks: how many; 0 takes all.
    """
    spans = _spans(len(tokens), window, window, blocks)
    _check_head(model, tokens[:16].to(model.device))
    ids = (tokens[None, begin:end].to(model.device) for begin, end, _ in spans)
    return torch.cat([model.base_model(input_ids=i, use_cache=False).last_hidden_state.cpu() for i in ids])


@torch.inference_mode()
def compare(
    intact: PreTrainedModel, wanted: torch.Tensor, model: PreTrainedModel, own: torch.Tensor, tokens: torch.LongTensor
) -> tuple[float, float]:
    """Perplexity of a model, and KL(intact ‖ model) of the next-token predictions in nats per token, in fp32.

    Args:
        intact, model: causal language models over the same vocabulary.
        wanted, own: the `last_states` [blocks, T, D] of each.
        tokens: token ids `[n]` of the text.
    """
    blocks, window, _ = own.shape
    targets = tokens[: blocks * window].view(blocks, window)
    nll = kl = 0.0
    for theirs, ours, ids in zip(wanted, own, targets, strict=True):
        for i in range(0, window, LOGIT_CHUNK):
            p, q = (
                m.get_output_embeddings()(h[i : i + LOGIT_CHUNK].to(m.device)).float().log_softmax(-1)
                for m, h in ((intact, theirs), (model, ours))
            )
            kl += float(F.kl_div(q, p.to(q.device), reduction="sum", log_target=True))
            following = ids[i + 1 : i + 1 + LOGIT_CHUNK].to(q.device)
            nll += float(F.nll_loss(q[: len(following)], following, reduction="sum"))
    return math.exp(nll / (blocks * (window - 1))), kl / (blocks * window)


def _check_head(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Hold that the output matrix alone turns hidden states into logits (no scale, no soft cap), on ids `[T]`."""
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
    plain, logits = model.get_output_embeddings()(hidden), model(input_ids=ids[None], use_cache=False).logits
    if not torch.allclose(
        plain.to(logits.device).float(), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())
    ):
        raise ConfigError(f"{type(model).__name__} scales or caps its logits, which perplexity does not support")


def generate(model: PreTrainedModel, ids: torch.Tensor, most: int, least: int = 0) -> torch.Tensor:
    """Greedy generation from ids `[B, T]`: the ids with `least` to `most` new ones behind them."""
    greedy = GenerationConfig(  # what is not set here comes from the model, a penalty for repeating itself too
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=most,
        min_new_tokens=least or None, pad_token_id=0, use_cache=True,
    )  # fmt: skip
    ids = ids.to(model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)


def sizes(model: PreTrainedModel, folder: Path) -> dict:
    """What a model weighs.

    Args:
        model: causal language model.
        folder: of its weight files.

    Returns:
        `parameters` (tied ones once), `parameters_non_embedding`, `parameters_prunable` (decoder projections),
        `parameters_read` (all that a token's forward pass reads: not the rows of an input embedding that is no output
        head) and `bytes` of the weight files.
    """
    total = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        "parameters": total,
        "parameters_non_embedding": total - sum(p.numel() for p in {embedding, head}),
        "parameters_prunable": exported_parameters(model),
        "parameters_read": total - (0 if embedding is head else embedding.numel()),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def environment(device: torch.device) -> dict:
    """What the numbers were measured with: versions, hardware, threads and the time (UTC)."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only; elsewhere the name above stands
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        **{package: version(package) for package in ("torch", "transformers", "lm_eval")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
