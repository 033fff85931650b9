"""Entries of a sweep for the shell: from a YAML list of settings, such as `- {sparsity.target: 0.3, seed: 1}`.

`python sweep.py FILE [--config RUN.yaml] [key.sub=value …]` prints a line for each entry: its stages, and its settings
as `key.sub=value`, with tabs between them. What follows FILE are the settings that all entries share, beside
which each is checked. No two may write to one directory.
"""

import json
import sys
from pathlib import Path

from nuteprune.config import load_config, read_entries
from nuteprune.errors import UserError
from nuteprune.stages.status import outputs

LONGEST = 255
"""Bytes of a file's name."""


def main(path: str, *shared: str) -> str:
    """What to print; raises `UserError` where the file is no such list, or an entry is wrong."""
    config, overrides = (shared[1], shared[2:]) if shared[:1] == ("--config",) else (None, shared)
    lines: list[str] = []
    taken: dict[tuple[str, str], int] = {}
    for number, entry in enumerate(read_entries(Path(path)), 1):
        words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in entry.items()]
        try:
            entry_config = load_config(config, [*overrides, *words])
        except UserError as error:
            raise UserError(f"{path}: entry {number}: {error}") from None
        name = ",".join(words).replace("/", "_")  # of its directory, see sweep.sbatch
        if len(name) > LONGEST:
            raise UserError(
                f"{path}: entry {number}: its settings name its directory, and have {len(name)} bytes where a name has "
                f"at most {LONGEST}: set what all entries share with --config or behind it"
            )
        outs = {"export.output": entry_config.export.output, "evaluate.output": entry_config.evaluate.output}
        for key, place in {"settings": name, **outs}.items():
            other = taken.setdefault((key, place), number) if place else number
            if other != number:
                raise UserError(f"{path}: entry {number} would write where entry {other} does: both have {key} {place}")
        stages = [stage for stage in outputs(entry_config) if stage != "prepare"]  # pruning does that too
        lines.append("\t".join([",".join(stages), *words]))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.stdout.write(main(*sys.argv[1:]) + "\n")
    except UserError as mistake:
        sys.stderr.write(f"submit.sh: {mistake}\n")
        sys.exit(2)
