"""Make a set with several labels a record of one with tags: which types of entity occur in a sentence.

    python examples/data/entity_types.py CONLL2003 FOLDER

The first folder holds train.jsonl, dev.jsonl and test.jsonl with ``tokens`` and ``tags``; the second gets as many
records of ``tokens`` and ``types``, a list that is empty where a sentence names nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Write each part of ``source`` anew into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = (
            json.dumps(
                {
                    "tokens": record["tokens"],
                    "types": sorted({tag.partition("-")[2] for tag in record["tags"]} - {""}),
                }
            )
            for record in records
        )
        (target / path.name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
