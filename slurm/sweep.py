"""Entries of a sweep for the shell: from a YAML list of settings, such as `- {sparsity.target: 0.3, seed: 1}`.

`python sweep.py FILE` prints a line for each entry, its settings as `key.sub=value` with tabs between them.
"""

import json
import sys

import yaml


def main(path: str) -> str:
    """What to print; raises `SystemExit` with one line where the file is no such list."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file)
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) and e for e in entries):
        raise SystemExit(f"{path} must be a YAML list of settings, such as `- {{sparsity.target: 0.3}}`")
    return "\n".join("\t".join(f"{key}={json.dumps(value)}" for key, value in entry.items()) for entry in entries)


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]) + "\n")
