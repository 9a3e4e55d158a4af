"""Real public files: each reads as the format it is, or is refused with one sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from accord.data.convert import as_kind
from accord.data.read import read_groups, scan
from accord.errors import DataError

pytestmark = pytest.mark.shared

# file: (format, rows, usable rows, groups by kind)
EXPECTED = {
    "preference/hh_harmless_transcripts.jsonl.gz": ("hh", 1513, 1505, {"pairs": 1505}),
    "preference/dpo_en_sharegpt.json": ("pairs", 217, 217, {"pairs": 217}),
    "preference/dpo_zh_sharegpt.json": ("pairs", 179, 179, {"pairs": 179}),
    "preference/dpo_content_blocks.jsonl": ("pairs", 5, 5, {"pairs": 5}),
    "preference/dpo_zh_conversations_str.jsonl": ("pairs", 294, 294, {"pairs": 294}),
    "preference/human_pairwise_5level_tulu.jsonl": ("verdict", 805, 804, {"pairs": 804}),
    "kto/human_acceptability_tulu.jsonl": ("prompt-completion", 1515, 1515, {"rated": 1515}),
    "kto/kto_en_messages.json": ("messages", 201, 201, {"rated": 201}),
    "kto/gsm8k_solutions_correctness.jsonl.gz": ("prompt-completion", 3336, 3336, {"rated": 3336}),
    "ranked/oasst_trees.jsonl": ("oasst", 63, 63, {"ranked": 91, "pairs": 40, "sft": 30}),
    "ranked/oasst_ranked_responses.jsonl": ("ranked", 130, 130, {"ranked": 90, "pairs": 40}),
    "ranked/alpacaeval_8models_scored.jsonl.gz": ("ranked", 545, 543, {"rated": 543}),
    "sft/alpaca_zh.json": ("alpaca", 727, 727, {"sft": 727}),
    "sft/sharegpt_toolcall_en.json": ("sharegpt", 227, 227, {"sft": 227}),
    "sft/messages_content_blocks.jsonl": ("messages", 381, 381, {"sft": 381}),
    "sft/messages_reasoning_tools.jsonl": ("messages", 35, 35, {"sft": 35}),
    "sft/sharegpt_zh.jsonl": ("sharegpt", 450, 448, {"sft": 448}),
    "sft/self_instruct_seed_tasks.jsonl": ("seed-tasks", 138, 138, {"sft": 138}),
    "sft/codegen_instruction_input_response.json": ("alpaca", 1200, 1200, {"sft": 1200}),
    "sft/gsm8k_question_answer.jsonl": ("prompt-completion", 3000, 3000, {"sft": 3000}),
    "prompts/arena_hard_v2_multilingual.jsonl": ("prompts", 250, 250, {"prompts": 250}),
    "prompts/mt_bench_questions.jsonl": ("prompts", 47, 47, {"prompts": 47}),
    "prompts/names.txt": ("prompts", 27128, 27128, {"prompts": 27128}),
    "offline_rl/sentence_polarity.jsonl": ("text", 8522, 8522, {"rated": 8522}),
    "eval/belle_zh_eval.json": ("prompt-completion", 636, 402, {"sft": 402}),
    "eval/truthfulqa.csv": ("pairs", 516, 516, {"pairs": 516}),
    "eval/xstest_prompts.csv": ("prompts", 246, 246, {"prompts": 246}),
    "judge/alpaca_eval/alpaca-7b.alpaca_eval_gpt4.json.gz": ("verdict", 805, 805, {"pairs": 805}),
    "judge/llmbar/LLMBar_Natural/dataset.json": ("verdict", 100, 100, {"pairs": 100}),
    "judge/pandalm/testset.json": ("verdict", 679, 647, {"pairs": 3 * 647}),
    "labelstudio/pairwise_multi_annotator.json": ("label-studio", 60, 56, {"pairs": 164}),
    "labelstudio/ranker_export.json": ("label-studio", 40, 30, {"ranked": 30}),
    "labelstudio/choices_thumbs_export.json": ("label-studio", 60, 60, {"rated": 60}),
    "labelstudio/textarea_sft_export.json": ("label-studio", 30, 30, {"sft": 30}),
}

REFUSED = {
    "judge/pandalm/gpt35_judgements.json": "columns are: idx, gpt_result",
    "judge/mt_bench/judge_prompts.jsonl": "columns are: name, type, system_prompt",
    "judge/llmbar/LLMBar_Natural/GPT-4_Vanilla.statistics.json": "columns are: correct_False",
    "labelstudio/config_pairwise.xml": "XML",
    "README.md": "cannot tell what this holds",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_file_reads_as_what_it_is(shared_data: Path, name: str) -> None:
    scanned = scan(shared_data / name)
    kinds = Counter(group.kind for group in scanned)
    assert (scanned.format, scanned.rows, scanned.usable, dict(kinds)) == EXPECTED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_real_file_of_another_kind_is_refused_in_one_sentence(shared_data: Path, name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]) as error:
        scan(shared_data / name)
    assert "\n" not in str(error.value)


def test_every_file_there_is_starts_to_read_or_is_refused(shared_data: Path) -> None:
    outcomes = Counter[str]()
    for path in sorted(shared_data.rglob("*.*")):
        try:
            next(iter(scan(path)), None)
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert outcomes["read"] > 80


def test_the_transcripts_that_cannot_be_used_are_the_known_ones(shared_data: Path) -> None:
    """Three rows differ before the last answer, two have Assistant twice in a row, three end with nothing said."""
    problems = read_groups(shared_data / "preference/hh_harmless_transcripts.jsonl.gz", lenient=True).problems
    reasons = Counter(
        next(word for word in ("differs", "in a row", "empty final") if word in problem.found) for problem in problems
    )
    assert reasons == {"differs": 3, "in a row": 2, "empty final": 3}


def test_the_trees_agree_with_the_lists_made_from_them(shared_data: Path) -> None:
    """The ranked lists were flattened from the same trees: every list must be among the groups read from the trees."""
    trees = as_kind(read_groups(shared_data / "ranked/oasst_trees.jsonl").groups, "pairs").groups
    lists = as_kind(read_groups(shared_data / "ranked/oasst_ranked_responses.jsonl").groups, "pairs").groups

    def asked(groups):
        return {(g.prompt[-1].content, g.completions[0].text, g.completions[1].text) for g in groups}

    assert len(asked(lists) & asked(trees)) == len(asked(lists)) > 400
