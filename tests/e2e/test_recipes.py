"""The recipes for TL;DR and HH run from end to end on files in the published layouts, smaller than they are."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accord.config import Recipe, load_recipe
from accord.data.templates import Template
from accord.data.tokenise import tokenise_groups
from accord.methods.context import Context
from accord.methods.corpus import read_corpus, split_holdout
from accord.methods.named import check_names
from accord.methods.online import prompt_indices
from accord.methods.plan import check_sizes, stages_of
from accord.methods.roles import model_scorer
from accord.models.load import load_reward_model
from accord.models.scratch_tokenizer import train_tokenizer
from accord.pipeline import run_stages
from accord.records import ScoreRequest
from accord.rewards.scorers import values_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "model.scratch": "{hidden_size: 16, layers: 1, heads: 2, vocab_size: 400, max_positions: 512}",
    "data.max_tokens": 400, "data.max_prompt_tokens": 340, "sft.epochs": 1, "reward.epochs": 1,
    "ppo.episodes": 8, "ppo.prompts_per_step": 2, "ppo.samples_per_prompt": 2, "ppo.max_new_tokens": 6,
    "evaluate.max_new_tokens": 6, "threads": 1,
}  # fmt: skip


def recipe(name: str, out: Path, **changes: Any) -> Recipe:
    settings = SMALL | {"out": out} | changes
    return load_recipe(ROOT / f"recipes/{name}.yaml", [f"{key}={value}" for key, value in settings.items()])


def run(found: Recipe) -> dict[str, dict[str, Any]]:
    return run_stages(found, read_corpus(found.data), stages_of(found), Console(file=io.StringIO()))


def tldr_files(folder: Path) -> dict[str, Any]:
    """Forty posts and their comparisons, by the script that the recipe names."""
    spec = importlib.util.spec_from_file_location("tldr_sample", ROOT / "scripts/tldr_sample.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    paragraph = "On day {0} the {1} horse went out to the field and met another one there. It ran, and " + "it ran " * 8
    text = "\n\n".join((paragraph.format(i, "brown" if i % 2 else "grey") + ".") * 1 for i in range(40))
    (folder / "horses.txt").write_text(text)
    script.main([str(folder / "horses.txt"), "--out", str(folder / "tldr")])
    posts, pairs = folder / "tldr/posts.jsonl", folder / "tldr/comparisons.jsonl"
    return {"data.sft": posts, "data.prompts": posts, "data.preferences": pairs, "sft.rouge.max_new_tokens": 6}


@pytest.fixture(scope="module")
def tldr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, dict[str, Any]]]:
    """The TL;DR recipe, run: its settings, and the summaries of its stages."""
    folder = tmp_path_factory.mktemp("tldr")
    found = recipe("tldr", folder / "out", **tldr_files(folder))
    return found, run(found)


def test_tldr_runs_and_judges_by_preference_and_by_overlap(tldr: Any) -> None:
    _, summaries = tldr
    assert {row["name"] for row in summaries["sft"]["headline"]} >= {"eval/rouge_1", "eval/rouge_2", "eval/rouge_l"}
    verdicts = {row["name"] for row in summaries["evaluate"]["comparisons"]}
    assert verdicts == {"ppo over sft", "sft over reference answers", "ppo over reference answers"}
    told = " ".join(summaries["evaluate"]["account"])
    assert re.search(r"ROUGE-L .* is 0\.\d+ for ppo and 0\.\d+ for sft: a difference of", told)
    assert "ROUGE is expected to fall" in told
    rouge = {(row["model"], row["name"]): row for row in summaries["evaluate"]["headline"] if "rouge" in row["name"]}
    assert {model for model, _ in rouge} == {"sft", "ppo"}
    assert all({"low", "high", "n"} <= row.keys() for row in rouge.values())


def test_the_tldr_reward_is_the_score_less_the_human_summarys(tldr: Any) -> None:
    """Asked of the saved reward model directly: the mean reward is the mean score less the mean score of the human
    summaries of the posts, less the penalty of answers cut by length, less the price of KL, 0 in the first step."""
    found, _ = tldr
    rows = [json.loads(line) for line in (found.root / "ppo/metrics.jsonl").read_text().splitlines()]
    corpus = read_corpus(found.data)
    context = Context(found, corpus, Console(file=io.StringIO()))
    folder = found.root / "reward/model"
    scorer = model_scorer(context, *load_reward_model(folder), 8192, folder)
    groups, _ = split_holdout(corpus.all_prompts().groups, found.data.holdout)
    assert found.ppo is not None
    for row in rows:
        asked = [groups[i] for i in prompt_indices(row["step"], found.ppo, len(groups), found.seed, "ppo")]
        human = values_of(scorer, [ScoreRequest(g.prompt, g.reference or "", True, g.prompt_id) for g in asked])
        expected = row["rollout/score/mean"] - sum(human) / len(human) - row["rollout/truncated_fraction"]
        assert row["rollout/reference_term/mean"] == pytest.approx(-sum(human) / len(human), abs=1e-6)
        if row["rollout/kl_per_sequence_nats"] == 0:  # nothing else is paid yet
            assert row["rollout/reward/mean"] == pytest.approx(expected, abs=1e-6)
    assert rows[0]["rollout/kl_per_sequence_nats"] == 0


def test_tldr_text_is_laid_out_to_the_letter(tldr: Any) -> None:
    """T1, T2, T4: no space after "TL;DR:", one in front of the summary in demonstrations and comparisons alike, the end
    token last; a post that is too long loses its end, never what asks for the summary."""
    found, _ = tldr
    corpus = read_corpus(found.data)
    groups = [*corpus.demonstrations().groups, *corpus.comparisons().groups]
    texts = [m.content for g in groups for m in (*g.prompt, *(m for c in g.completions for m in c.messages))]
    template = Template.of(train_tokenizer(texts, vocab_size=400), found.model.template)
    for limit in (400, 40):
        limits: dict[str, Any] = {"max_tokens": 400, "max_prompt_tokens": limit, "loss_on": "assistant"}
        result = tokenise_groups(groups, template, **limits)
        assert bool(result.cuts) == (limit == 40)
        for tokens, source in zip(result.groups, result.sources, strict=True):
            prompt = template.tokenizer.decode(tokens.prompt_ids)
            assert re.fullmatch(r"SUBREDDIT: r/horses\n\nTITLE: .*\n\nPOST: .*\n\nTL;DR:", prompt, re.DOTALL)
            for completion, written in zip(tokens.completions, groups[source].completions, strict=True):
                assert completion.ids[-1] == template.stop_ids[0]
                text = template.tokenizer.decode(completion.ids[:-1])
                assert text == written.text and re.match(r" \S", text)


def test_hh_runs_on_transcripts(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"\n\nHuman: Is {i} a number?\n\nAssistant: Yes, it is.",
         "rejected": f"\n\nHuman: Is {i} a number?\n\nAssistant: No no no."} for i in range(60)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = run(recipe("hh", tmp_path / "out", **{"data.preferences": tmp_path / "train.jsonl"}))
    assert list(summaries) == ["sft", "reward", "ppo", "evaluate"]
    assert "ppo over sft" in {row["name"] for row in summaries["evaluate"]["comparisons"]}
    metrics = json.loads((tmp_path / "out/ppo/metrics.jsonl").read_text().splitlines()[0])
    assert "rollout/reference_term/mean" in metrics


@pytest.mark.shared
def test_hh_reads_the_published_file(shared_data: Path) -> None:
    found = load_recipe(
        ROOT / "recipes/hh.yaml", [f"data.preferences={shared_data}/preference/hh_harmless_transcripts.jsonl.gz"]
    )
    corpus = read_corpus(found.data)
    stages = stages_of(found)
    check_names(found, stages)
    check_sizes(found, corpus, stages)
    assert sum("8 rows left out" in note for note in corpus.comparisons().notes) == 1
