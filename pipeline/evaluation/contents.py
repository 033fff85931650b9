"""What a report says: rows of its tables and sentences about them, which each kind of page puts in its own form.

Cells are plain text. Sentences are plain text too, but for names between backticks (`words.code`).
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from nuteprune.evaluation.generation import CYCLES, LOOP_TOKENS, NEW_TOKENS, PROMPT_TOKENS
from nuteprune.evaluation.retention import METRICS
from nuteprune.runs.words import code, one_line

SHOWN = "acc_norm"
"""The metric of the tasks that the first sentence names."""

ROWS = {
    "parameters, million": "parameters",
    "  without embeddings": "parameters_non_embedding",
    "on disk, MB": "bytes",
}
SPEED_ROWS = {
    "prefill tokens/s": "prefill_tokens_per_s",
    "decode tokens/s": "decode_tokens_per_s",
    "peak memory, MB": "peak_memory_bytes",
}
GENERATION_ROWS = {
    "continuations that loop": "loops",
    "distinct 3-grams": "distinct",
    "agreement with the first model": "agreement",
}
"""Lines of the table: label and key of a model, of its speed at a number of sequences, of what it writes."""


def titles(report: dict) -> list[str]:
    """Column titles: before and after for a pair, the models' names otherwise."""
    names = [one_line(model["name"]) for model in report["models"]]
    return ["before", "after"] if len(names) == 2 else names


def headline(report: dict) -> str:
    """What came out, in one sentence: the last model beside the first."""
    first, last, ratio = report["models"][0], report["models"][-1], report["ratio"]
    text, score = next(iter(first["perplexity"].items()))
    perplexity = number(score["perplexity"])
    if not ratio:
        return f"{millions(first['parameters'])} million parameters, perplexity {perplexity} on {code(text)}."
    after = last["perplexity"][text]
    if report["same_tokens"]:
        change = (
            f"perplexity of {code(text)} goes from {perplexity} to {number(after['perplexity'])} "
            f"(ΔNLL {nats(after['delta_nll'])})"
        )
    else:
        own, intact = (bits(each["bits_per_byte"]) for each in (after, score))
        change = f"{code(text)} takes {own} bits a byte instead of {intact}"
    parts = [f"{ratio['parameters']:.1%} of the parameters are left", change]
    if "speed" in ratio:
        batch, faster = next(iter(ratio["speed"].items()))
        parts.append(f"decoding runs at {faster['decode_tokens_per_s']:.2f} times the speed (batch {batch})")
    if "generation" in last:
        loops = [f"{model['generation']['loops']:.0%}" for model in (last, first)]
        parts.append(f"{loops[0]} of greedy continuations end in a loop ({loops[1]} before)")
    if kept := last.get("retained", {}).get(SHOWN):
        parts.append(f"{_share(kept)} of the tasks' mean {code(SHOWN)} is retained")
    return f"{', '.join(parts[:-1])} and {parts[-1]}.{_caution(report, after)}"


def _caution(report: dict, after: dict) -> str:
    """Why the perplexity of the sentence before may be better than the model is; empty where nothing speaks for it."""
    if not report["held_out"]:
        return " The model was trained on this very text: held-out text tells what it lost (`evaluate.text`)."
    if report["same_tokens"] and after["delta_nll"] is not None and after["delta_nll"] < 0:
        return (
            " A loss below the intact model's is what training on this kind of text gives: the intact model would gain "
            "from it too, and text of another kind tells what was lost."
        )
    return ""


def made_lines(report: dict) -> list[str]:
    """How long training took, what measured and when, and the command."""
    made, environment, found = report.get("made", {}), report["environment"], []
    if seconds := made.get("seconds"):
        stages = ", ".join(f"{stage} {tqdm.format_interval(took)}" for stage, took in seconds.items())
        found.append(f"Training steps took {tqdm.format_interval(sum(seconds.values()))} ({stages}).")
    machine = environment.get("gpu") or environment.get("cpu")
    found.append(f"Measured on {one_line(str(machine))}, {environment.get('date', '')[:10]}.")
    if made.get("command"):
        found.append(f"Command: {code(made['command'])}")
    return found


def load_lines(report: dict) -> list[str]:
    """Python that loads the last model."""
    path = report["models"][-1]["path"]
    trust = ", trust_remote_code=True" * (Path(path) / "modeling_ragged.py").is_file()
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"path = {path!r}",
        f"model = AutoModelForCausalLM.from_pretrained(path{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(path{trust})",
    ]


def rows(report: dict) -> list[list[str]]:
    """The table's cells, its head first; rows that nothing was measured for are left out."""
    models, ratio = report["models"], report["ratio"]
    found = [["", *titles(report), *(["ratio"] if ratio else [])]]

    def add(label: str, cells: list[str], ratio: float | None = None, of_ratio: str = "-") -> None:
        share = [of_ratio if ratio is None else f"{ratio:.3f}"] if report["ratio"] else []
        found.append([label, *cells, *share])

    for label, key in ROWS.items():
        if key in models[0]:
            add(label, [millions(model[key]) for model in models], ratio.get(key))
    if models[0].get("accuracy"):
        kept = models[-1].get("retained", {})
        for metric in METRICS:
            share = _share(kept[metric]) if metric in kept else ""
            add(f"mean {metric} of the tasks", [percent(model["accuracy"][metric]) for model in models], of_ratio=share)
    for text in models[0]["perplexity"]:
        scores = [model["perplexity"][text] for model in models]
        values = [number(score["perplexity"]) for score in scores]
        add(f"perplexity of {one_line(text)}", values, ratio.get("perplexity", {}).get(text))
        if ratio:
            add("  its ΔNLL, nats a token", ["", *(nats(score["delta_nll"]) for score in scores[1:])], of_ratio="")
        if not report["same_tokens"]:
            add("  bits a byte", [bits(score["bits_per_byte"]) for score in scores], of_ratio="")
    for label, key in GENERATION_ROWS.items():
        shares = [model.get("generation", {}).get(key) for model in models]
        if any(share is not None for share in shares):
            add(label, ["" if share is None else percent(share) for share in shares], of_ratio="")
    for batch in models[0].get("speed", {}):
        for label, key in SPEED_ROWS.items():
            measured = [model["speed"][batch][key] for model in models]
            if measured[0] is not None:
                shown = millions if key == "peak_memory_bytes" else number
                faster = ratio.get("speed", {}).get(batch, {})
                values = [shown(value) for value in measured]
                if least_and_most := faster.get(f"{key}_range"):
                    least, most = least_and_most
                    add(f"{label}, batch {batch}", values, of_ratio=f"{faster[key]:.2f} ({least:.2f} to {most:.2f})")
                else:
                    add(f"{label}, batch {batch}", values, faster.get(key))
    return found


def millions(value: int) -> str:
    """Parameters in millions, or bytes in MB."""
    return f"{value / 1e6:,.1f}"


def percent(value: float) -> str:
    """A share."""
    return f"{value:.1%}"


def _share(kept: dict) -> str:
    return f"{percent(kept['value'])} ({percent(kept['low'])} to {percent(kept['high'])})"


def number(value: float | None) -> str:
    """A count or a measured number for a table; None stands for one that is not finite."""
    if value is None:
        return "infinite"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"


def nats(value: float | None) -> str:
    """A difference of losses; None stands for one that is not finite."""
    return "infinite" if value is None else f"{value:+.3f}"


def bits(value: float | None) -> str:
    """Bits a byte; None stands for a number that is not finite."""
    return "infinite" if value is None else f"{value:.4f}"


def task_rows(report: dict) -> list[list[str]]:
    """Cells of the tasks' table, its head first; empty without tasks."""
    models = report["models"]
    if not any("tasks" in model for model in models):
        return []
    found = [["task", "version", "few-shot", "examples", "metric", "chance", *titles(report)]]
    for name, task in models[0]["tasks"].items():
        for metric in task["metrics"]:
            scores = [model["tasks"][name]["metrics"][metric] for model in models]
            facts = [str(task[key]) if task[key] is not None else "-" for key in ("version", "fewshot", "examples")]
            chance = percent(task["chance"]) if "chance" in task and metric in METRICS else "-"
            found.append([one_line(name), *facts, one_line(metric), chance, *(_score(score) for score in scores)])
    if models[0].get("accuracy"):
        for metric in METRICS:
            own = [percent(model["accuracy"][metric]) for model in models]
            found.append(["mean", "", "", "", metric, percent(models[0]["accuracy"]["chance"]), *own])
            kept = [model["retained"].get(metric) for model in models[1:]]
            if all(kept) and kept:
                found.append(["  retained", "", "", "", metric, "", "", *map(_share, kept)])
    return found


def _score(score: dict) -> str:
    value = score["value"]
    if not isinstance(value, (int, float)):
        return str(value)
    shown = percent if 0 <= value <= 1 else number
    return shown(value) if score["stderr"] is None else f"{shown(value)} ± {shown(score['stderr'])}"


def task_conditions(report: dict) -> str:
    """How the tasks were scored, in sentences."""
    limit = f"the first {report['task_limit']} examples of each" if report["task_limit"] else "all examples"
    lines = [f"Score ± standard error by lm-eval {report['environment']['lm_eval']}, {limit}."]
    kept = report["models"][-1].get("retained", {})
    if kept:
        lines.append(
            "Retained: the mean over the tasks, over the first model's, with an interval of 95% (bootstrap over "
            f"examples, the same for both models). In {code('acc_norm')} a task without it counts by {code('acc')}."
        )
    above = [
        f"{percent(each['above_chance'])} in {code(metric)}" for metric, each in kept.items() if "above_chance" in each
    ]
    if above:
        lines.append(f"Of what is above chance the last model retains {' and '.join(above)}.")
    return " ".join(lines)


def conditions(report: dict) -> list[str]:
    """How everything but tasks was measured: a paragraph each of perplexity, of generation and of speed."""
    found = [_perplexity(report), _generation(report), _speed(report)]
    return [" ".join(lines) for lines in found if lines]


def _perplexity(report: dict) -> list[str]:
    first, lines = report["models"][0], []
    for text, score in first["perplexity"].items():
        window = f"of {score['window']} tokens side by side"
        if report["same_tokens"]:
            windows = f"{score['blocks']} window{'s' * (score['blocks'] > 1)} {window}"
            scored = f"{windows}, mean over {score['tokens']:,} predicted tokens"
        else:
            own = zip(titles(report), (model["perplexity"][text] for model in report["models"]), strict=True)
            scored = ", ".join([
                f"windows {window}",
                *(f"{code(title)} {each['blocks']} with {each['tokens']:,} predicted tokens of {each['bytes']:,} bytes"
                  for title, each in own),
            ])  # fmt: skip
        lines.append(f"Perplexity of {code(text)}: {scored}, weights in {report['dtype']}.")
    lines.append(_protocol(report["protocol"], " ".join(map(code, first["first_tokens"]))))
    if report["ratio"]:
        lines.append("ΔNLL is ln(after / before).")
    if not report["held_out"]:
        lines.append("This is the text the model was pruned on, not a held-out one.")
    if not report["same_tokens"]:
        lines.append(
            "The models' tokenizers differ: their bits a byte compare, as far as the same bytes were scored, their "
            "perplexities a token do not."
        )
    return lines


def _protocol(protocol: str, first: str) -> str:
    if protocol == "published":
        stands = f"after {first}, which stands once" if first else "without a first token"
        return (
            "Protocol `published`: all rows of the test set joined by blank lines and tokenised as one text, "
            f"{stands}, as the code of SparseGPT, Wanda, SliceGPT and FLAP does."
        )
    begins = f"each window begins with {first}, which is read, never scored" if first else "no token before a window"
    return f"Protocol `own`: {begins}, as the tokenizer begins a sequence."


def _generation(report: dict) -> list[str]:
    measured = report["models"][0].get("generation")
    if not measured:
        return []
    return [
        f"{measured['prompts']} prompts of {PROMPT_TOKENS} tokens, spread over the first text, are continued greedily "
        f"by at most {NEW_TOKENS}.",
        f"A loop: at the end an n-gram at least {CYCLES} times in a row, over at least {LOOP_TOKENS} tokens.",
        "Distinct 3-grams: the mean share of different ones in a continuation.",
        "Agreement: the share of the first model's tokens that a model ranks first too, after the same tokens.",
    ]


def _speed(report: dict) -> list[str]:
    first, lines = report["models"][0], []
    if "speed" in first:
        measured = next(iter(first["speed"].values()))
        lines.append(
            f"Speed: {measured['prompt_tokens']} prompt tokens, {measured['new_tokens']} greedy steps with the KV "
            f"cache, {' or '.join(first['speed'])} sequences at once, median of {measured['repeats']} rounds in which "
            f"the models took turns, on {measured['device']} (CPU threads: {measured['threads']}); in brackets the "
            "least and the largest ratio of a round. Peak memory: the weights and what generation adds to the process."
        )
        if report["environment"]["gpu"]:
            lines.append(
                "On a GPU, decoding one sequence is bound by kernel launches, not by the size of the weights, so its "
                "ratio understates what a smaller model gains at larger batches or from CUDA graphs."
            )
    if report.get("speed_missing"):
        lines.append(f"Speed was not measured: {report['speed_missing']}.")
    if "ceiling" in report["ratio"]:
        most = report["ratio"]["ceiling"]
        lines.append(
            f"Ceiling of the speed-up where time goes by the weights read: 1/(1 − p·s) = {most['speedup']:.2f} with "
            f"p = {most['prunable']:.1%} prunable of what a token reads, s = {most['sparsity']:.1%} removed."
        )
    return lines


def samples(report: dict) -> list[tuple[dict, ...]]:
    """What each model wrote, prompt by prompt, as far as all of them wrote something."""
    return list(zip(*(model.get("samples", []) for model in report["models"]), strict=False))


def model_lines(report: dict) -> list[str]:
    """Where each model lies."""
    return [f"{code(title)}: {code(model['path'])}" for title, model in
            zip(titles(report), report["models"], strict=True)]  # fmt: skip


def environment_lines(report: dict) -> list[str]:
    """What the numbers were measured with."""
    return [f"{key}: {value}" for key, value in report["environment"].items() if value is not None]
