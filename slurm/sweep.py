"""Entries of a sweep: a YAML list of settings, such as `- {sparsity.target: 0.3, seed: 1}`.

`python sweep.py FILE count` prints how many there are; `python sweep.py FILE NUMBER` prints one of them,
counted from 0: a line `key.sub=value` for each setting.
"""

import json
import sys

import yaml


def main(path: str, wanted: str) -> str:
    """What to print; raises `SystemExit` with one line where the file is no such list."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file)
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) and e for e in entries):
        raise SystemExit(f"{path} must be a YAML list of settings, such as `- {{sparsity.target: 0.3}}`")
    if wanted == "count":
        return str(len(entries))
    return "\n".join(f"{key}={json.dumps(value)}" for key, value in entries[int(wanted)].items())


if __name__ == "__main__":
    sys.stdout.write(main(*sys.argv[1:]) + "\n")
