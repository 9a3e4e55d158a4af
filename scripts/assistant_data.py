"""Write the data of the quickstart's task as ordinary files: `python scripts/assistant_data.py runs/assistant`.

demonstrations.jsonl, prompts.jsonl and heldout.jsonl, as the quickstart has them in memory, for recipes such as
recipes/loop.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accord.data.convert import writing
from accord.demos.quickstart import task_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    corpus = task_corpus(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("demonstrations", corpus.sft), ("prompts", corpus.prompts), ("heldout", corpus.evaluation)):
        with writing(args.folder / f"{name}.jsonl") as write:
            for group in part.groups:
                write(group)
        print(f"{args.folder / name}.jsonl: {len(part.groups):,} rows")


if __name__ == "__main__":
    main()
