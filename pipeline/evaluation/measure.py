"""Measurements of a causal language model in memory: perplexity, greedy generation, sizes, and the machine.

Shape letters: n tokens of a text, T tokens of a window, D hidden, V vocabulary.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from nuteprune.data.sequences import check_ids
from nuteprune.errors import UserError
from nuteprune.evaluation.head import Head
from nuteprune.exporting.folding import exported_parameters
from nuteprune.model.hub import weight_files
from nuteprune.model.losses import IGNORE
from nuteprune.parallel.host import processor
from nuteprune.runs.log import no_bar

PASS_BYTES = 8 * 2**20
"""Of logits that are compared in one go: what is made of them stays in a CPU's cache."""
SIZES = ("parameters", "parameters_non_embedding", "bytes")


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokens: torch.LongTensor, window: int, blocks: int, progress: str | None = None,
    first: Sequence[int] = (),
) -> dict:  # fmt: skip
    """Perplexity of a text: exp of the mean negative log-likelihood over the predicted tokens.

    Args:
        model: causal language model.
        tokens: token ids `[n]` of the text.
        window: tokens a forward pass sees, `first` among them.
        blocks: windows to score, side by side from the start of the text; 0 takes all, a shorter rest is left out.
        progress: label of a progress bar on stderr; None shows none.
        first: token ids that each window begins with (`sequences.first_tokens`): read, never scored. Without any, the
            first token of a block has nothing before it and is not scored.

    Returns:
        `perplexity`, `nll` (nats per token), `tokens` (predicted), `window`, `blocks` (scored).

    Raises:
        UserError: a text shorter than one window, token ids without an embedding, or a
            model whose head is not known.
    """
    spans = window_spans(len(tokens), window, blocks, len(first))
    check_ids(int(tokens.max()), model.get_input_embeddings().num_embeddings)
    head, total, count = Head(model), 0.0, 0
    # What has nothing before it cannot be predicted.
    scored = window - max(1, len(first))
    for begin, end in tqdm(spans, desc=progress, unit="block", disable=no_bar(progress is not None)):
        total += _nll_sum(head, _window(first, tokens[begin:end], model.device), scored)
        count += scored
    nll = total / count
    # exp overflows beyond 709: a model that bad has no perplexity worth a number.
    value = math.exp(nll) if nll < 700 else math.inf
    return {"perplexity": value, "nll": nll, "tokens": count, "window": window, "blocks": len(spans)}


def window_spans(n: int, window: int, blocks: int, first: int = 0) -> list[tuple[int, int]]:
    """Where windows over n tokens begin and end, behind `first` others of each; `UserError` where there is none."""
    length = window - first
    if n < length or length < 2:
        raise UserError(
            f"the evaluation text has {n} tokens, less than one window of {window}: give more text or lower "
            "evaluate.window"
        )
    return [(begin, begin + length) for begin in range(0, n - length + 1, length)][: blocks or None]


def _window(first: Sequence[int], text: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Token ids [T] of a window on a device."""
    return torch.cat([torch.tensor(first, dtype=text.dtype), text]).to(device)


def _nll_sum(head: Head, ids: torch.Tensor, scored: int) -> float:
    """Summed negative log-likelihood of the last `scored` of the token ids `[T]`, log-softmax in fp32."""
    hidden_TD = head.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    pairs = zip(hidden_TD[-scored - 1 : -1].split(head.rows), ids[-scored:].split(head.rows), strict=True)
    return sum(_nll(head(hidden), target) for hidden, target in pairs)


def _nll(logits: torch.Tensor, target: torch.Tensor) -> float:
    return F.cross_entropy(logits, target.to(logits.device), reduction="sum").item()


@torch.inference_mode()
def last_states(
    model: PreTrainedModel, tokens: torch.LongTensor, window: int, blocks: int, first: Sequence[int] = ()
) -> torch.Tensor:
    """Last hidden states [blocks, T, D] of the first blocks of a text, on the CPU: all that its logits come from.

    Args:
        model: causal language model.
        tokens: token ids `[n]` of the text.
        window: tokens T of a block, `first` among them; blocks stand side by side from the start of the text.
        blocks: how many; 0 takes all.
        first: token ids that each block begins with, as in `perplexity`.
    """
    spans = window_spans(len(tokens), window, blocks, len(first))
    check_ids(int(tokens.max()), model.get_input_embeddings().num_embeddings)
    ids = (_window(first, tokens[begin:end], model.device)[None] for begin, end in spans)
    return torch.cat([model.base_model(input_ids=i, use_cache=False).last_hidden_state.cpu() for i in ids])


@torch.inference_mode()
def compare(
    intact: PreTrainedModel, wanted: torch.Tensor, model: PreTrainedModel, own: torch.Tensor, tokens: torch.LongTensor,
    first: Sequence[int] = (),
) -> tuple[float, float]:  # fmt: skip
    """Perplexity of a model, and KL(intact ‖ model) of the next-token predictions in nats per token, in fp32.

    The KL of the intact model with itself is 0 and is not computed.

    Args:
        intact, model: causal language models over the same vocabulary.
        wanted, own: the `last_states` [blocks, T, D] of each.
        tokens: token ids `[n]` of the text.
        first: token ids that each block begins with, as in `perplexity`.
    """
    blocks, window, _ = own.shape
    length, unread = window - len(first), max(0, len(first) - 1)  # before the last of `first` nothing is predicted
    targets = tokens[: blocks * length].view(blocks, length)[:, 0 if first else 1 :]
    heads = [Head(model)] if model is intact else [Head(model), Head(intact)]
    rows = min(head.rows for head in heads)
    nll = kl = predicted = 0.0
    for ours, theirs, following in zip(own[:, unread:], wanted[:, unread:], targets, strict=True):
        # The last position predicts what is in no block.
        target = F.pad(following, (0, 1), value=IGNORE)
        for cut in torch.arange(len(target)).split(rows):
            states = zip(heads, (ours[cut], theirs[cut]), strict=False)
            parts = _nll_and_kl(target[cut], *(head(each.to(model.device)) for head, each in states))
            nll, kl, predicted = nll + parts[0], kl + parts[1], predicted + len(cut)
    return math.exp(nll / targets.numel()), kl / predicted


def _nll_and_kl(target: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor | None = None) -> tuple[float, float]:
    """Summed negative log-likelihood of tokens [n] by logits [n, V], and KL of theirs from ours."""
    nll = kl = 0.0
    rows = max(1, PASS_BYTES // (4 * ours.shape[1]))
    for begin in range(0, len(target), rows):
        cut = slice(begin, begin + rows)
        log_q = ours[cut].log_softmax(-1)
        nll += float(F.nll_loss(log_q, target[cut].to(log_q.device), ignore_index=IGNORE, reduction="sum"))
        if theirs is not None:
            log_p = theirs[cut].to(log_q.device).log_softmax(-1)
            kl += float(torch.linalg.vecdot(log_p.exp(), log_p - log_q).sum())
    return nll, kl


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
        `parameters` (tied ones once), `parameters_non_embedding`, `parameters_read` (all that a token's forward pass
        reads: not the rows of an input embedding that is no output head, nor experts that the router does not choose),
        `parameters_prunable` (those of them that are decoder projections) and `bytes` of the weight files.
    """
    total = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    chosen = getattr(model.config, "num_experts_per_tok", 0)
    experts = [p for name, p in model.named_parameters() if chosen and ".mlp.experts." in name]
    unread = sum(p[0].numel() * max(0, len(p) - chosen) for p in experts)  # [experts, …]
    return {
        "parameters": total,
        "parameters_non_embedding": total - sum(p.numel() for p in {embedding, head}),
        "parameters_prunable": exported_parameters(model) - unread,
        "parameters_read": total - (0 if embedding is head else embedding.numel()) - unread,
        "bytes": sum(file.stat().st_size for file in weight_files(folder)),
    }


def environment(device: torch.device) -> dict:
    """What the numbers were measured with: versions, hardware, threads and the time (UTC)."""
    return {
        **{package: version(package) for package in ("torch", "transformers", "lm_eval")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor().get("model name") or platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
