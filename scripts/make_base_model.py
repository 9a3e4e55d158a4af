"""Trains the tiny base model that ships inside the package; anyone can rerun it and get the same weights.

    python scripts/make_base_model.py [--out DIR]

It is an ordinary Accord run: a Llama-like model of about a million parameters learns next-token prediction on text from
the seeded generator of the assistant task (facts, tables, letters, dialogues of all qualities in another format than
the chat's), and is then given the chat template that fine-tuning will use. Threads are fixed because they change the
order of floating-point sums. It takes some minutes on two cores and can be killed and run again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from accord.config import recipe_from
from accord.methods.corpus import Corpus, Part
from accord.models.load import load_policy, save_model
from accord.models.scratch_tokenizer import SCRATCH_TEMPLATE
from accord.pipeline import run_stages
from accord.records import Completion, Group, Message
from accord.tasks.assistant import pretraining_texts
from accord.training.allocator import keep_freed_memory

ASSETS = Path(__file__).resolve().parents[1] / "src" / "accord" / "assets" / "quickstart"
NUM_TEXTS = 60_000
RECIPE = {
    "name": "quickstart base model",
    "seed": 0,
    "threads": 1,
    "model": {
        "scratch": {"hidden_size": 128, "layers": 4, "heads": 4, "vocab_size": 1024, "max_positions": 256},
        "template": "raw",
    },
    "data": {"holdout": 0.0, "max_tokens": 256},
    "sft": {
        "loss_on": "all",
        "epochs": 3,
        "batch_size": 96,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "warmup_fraction": 0.05,
        "checkpoint_every": 100,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/base-model"), help="folder for the run")
    parser.add_argument("--install", action="store_true", help="replace the model shipped in the package")
    arguments = parser.parse_args()
    keep_freed_memory()
    texts = pretraining_texts(NUM_TEXTS, seed=0)
    groups = [Group((), (Completion((Message("assistant", text),)),)) for text in texts]
    recipe = recipe_from({**RECIPE, "out": str(arguments.out)})
    run_stages(recipe, Corpus(sft=Part.of(groups, "pretraining texts")), ["sft"], Console())
    model, tokenizer = load_policy(arguments.out / "sft" / "model")
    tokenizer.chat_template = SCRATCH_TEMPLATE
    folder = save_model(model, tokenizer, arguments.out / "model")
    if arguments.install:
        shutil.rmtree(ASSETS, ignore_errors=True)
        shutil.copytree(folder, ASSETS)
    print(f"base model: {ASSETS if arguments.install else folder}")


if __name__ == "__main__":
    main()
