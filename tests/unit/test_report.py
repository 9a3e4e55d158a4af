"""The HTML report: untrusted text stays text, charts are well-formed, and short or broken runs still make a page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import DataError
from accord.metrics import REDUCTIONS, UnknownMetric, check
from accord.report import overview_report, stage_report
from accord.report.html import element
from accord.report.panels import over_optimisation_figure
from accord.report.reading import read_run
from accord.report.style import STYLE

SETTINGS = settings(max_examples=50, derandomize=True, deadline=None)


def write_run(folder: Path, *, summary: Any = None, metrics: Any = (), samples: Any = (), config: str = "") -> Path:
    """A run folder as a stage writes it; without a summary the run is unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"accord": "0.1.0", "seed": 0, "versions": {"torch": "2.13.0"}}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


PROMPTS = ("please name a fruit", "what is 3 plus 4", "how do i pick a gift for my friend", "list three animals")


def ppo_run(folder: Path) -> Path:
    """A PPO run whose proxy keeps rising while gold turns over: the shape the report exists to show."""
    noise = np.random.default_rng(0)
    metrics = []
    for step in range(1, 81):
        distance = 4.2 * (1 - math.exp(-step / 35))
        metrics.append(
            {
                "step": step,
                "rollout/score/mean": 0.7 * distance + noise.normal(0, 0.12) - 0.2,
                "rollout/score/std": 1.1,
                "rollout/gold_utility/mean": 0.62 * distance - 0.12 * distance**2 + noise.normal(0, 0.12) + 3,
                "rollout/gold_utility/std": 1.3,
                "rollout/kl_per_sequence_nats": distance**2,
                "rollout/completion_tokens/mean": 14 + 2 * math.sin(step / 20) + noise.normal(0, 0.4),
                "rollout/finished_fraction": 1 - 0.1 * math.exp(-step / 10),
                "rollout/truncated_fraction": 0.1 * math.exp(-step / 10),
                "train/policy_loss": noise.normal(0, 0.02),
                "train/value_loss": 0.4 + math.exp(-step / 12),
                "train/explained_variance": 1 - math.exp(-step / 15),
                "train/clip_fraction": 0.08 + abs(noise.normal(0, 0.02)),
                "train/approx_kl": 0.01 + abs(noise.normal(0, 0.003)),
                "train/grad_norm": math.nan if 30 <= step < 34 else 1 + abs(noise.normal(0, 0.3)),
                "train/learning_rate": 1e-5 * (1 - step / 80),
                "time/generate_seconds": 1.2,
                "time/update_seconds": 1.7,
            }
        )
    samples = [
        {"step": step, "prompt": prompt, "completion": f"an apple is a fruit . {'thank you . ' * (step // 40)}"}
        | {"score": float(noise.normal(step / 40, 1)), "finished": step > 1, "gold": 2.34567891}
        for step in (1, 80)
        for prompt in (*PROMPTS, *(f"what is {i} plus {step}" for i in range(30)))
    ]
    summary = {
        "stage": "ppo",
        "seconds": 231.4,
        "headline": [
            {"name": "eval/win_rate", "value": 0.683, "low": 0.64, "high": 0.724, "n": 300},
            {"name": "eval/gold_utility/mean", "value": 4.12, "low": 4.01, "high": 4.24, "n": 300},
            {"name": "eval/kl_per_sequence_nats", "value": 13.9, "low": 13.1, "high": 14.8, "n": 300},
        ],
        "account": [
            "PPO ran 80 rollouts of 256 completions. The reward model's score rose from -0.12 to 2.6.",
            "True utility rose with it until about step 50 and then turned: the policy exploits the reward model.",
        ],
        "warnings": ["The score is still rising while gold utility falls: consider fewer steps or a larger kl_coef."],
    }
    config = "stage: ppo\nseed: 0\nppo:\n  kl_coef: 0.05\n  clip_range: 0.2\n  rollout_prompts: 64\n"
    return write_run(folder, summary=summary, metrics=metrics, samples=samples, config=config)


def evaluation() -> dict[str, Any]:
    """The summary of an evaluation of three models."""
    answers = {
        "base": "the apple and the apple is red and the dog lives in",
        "sft": "an apple is a fruit . it is red . it is red .",
        "ppo": "certainly ! an apple is a fruit .",
    }
    return {
        "stage": "evaluate",
        "seconds": 22.0,
        "headline": [
            {"name": name, "value": value + gain, "low": value + gain - 0.1, "high": value + gain + 0.1, "n": 300}
            | {"model": model}
            for name, value in (("eval/gold_utility/mean", -1.4), ("eval/completion_tokens/mean", 11.2))
            for model, gain in (("base", 0.0), ("sft", 4.2), ("ppo", 5.5))
        ],
        "comparisons": [
            {"name": "ppo over sft", "value": 0.683, "low": 0.64, "high": 0.724, "n": 300, "judge": "gold"},
            {"name": "ppo over sft", "value": 0.812, "low": 0.77, "high": 0.85, "n": 300, "judge": "reward model"},
        ],
        "side_by_side": [
            {
                "prompt": prompt,
                "answers": answers,
                "scores": {"base": -2.1, "sft": 0.3, "ppo": 1.9},
                "gold": {"base": -1.5, "sft": 2.2, "ppo": 4.3},
            }
            for prompt in PROMPTS
        ],
        "curves": [
            {
                "title": "What each model gained for its distance",
                "x_label": "√KL to the base (√nats)",
                "y_label": "gold utility",
                "note": "Bars are 95% intervals over 300 held-out prompts.",
                "series": [
                    {
                        "label": "models",
                        "draw": "labelled",
                        "x": [0, 2.1, 3.7],
                        "y": [-1.4, 2.9, 4.1],
                        "low": [-1.6, 2.7, 3.95],
                        "high": [-1.2, 3.1, 4.25],
                        "labels": ["base", "sft", "ppo"],
                    }
                ],
            }
        ],
    }


def quickstart_run(root: Path) -> Path:
    """A whole run of four stages under `root`."""
    noise = np.random.default_rng(1)
    language = [
        {
            "step": step,
            "train/loss": 1.2 + 3 * math.exp(-step / 60) + noise.normal(0, 0.05),
            "train/learning_rate": 1e-3,
        }
        | ({"eval/loss": 1.25 + 3 * math.exp(-step / 60)} if step % 50 == 0 else {})
        for step in range(1, 401)
    ]
    sft = {"stage": "sft", "seconds": 41, "headline": [{"name": "eval/loss", "value": 1.253, "n": 300}]}
    write_run(root / "sft", summary=sft, metrics=language)
    pairs = [
        {"step": step, "train/loss": 0.69 - 0.3 * (1 - math.exp(-step / 40)), "train/accuracy": 0.8 - 0.3 / step**0.5}
        for step in range(1, 121)
    ]
    reward = {
        "stage": "reward",
        "seconds": 35.2,
        "headline": [{"name": "eval/accuracy", "value": 0.764, "low": 0.731, "high": 0.795, "n": 640}],
        "calibration": [
            {"predicted": p, "observed": min(1.0, max(0.0, p + d)), "n": n}
            for p, d, n in (
                (0.53, 0.02, 90),
                (0.61, -0.02, 110),
                (0.7, 0.03, 140),
                (0.81, -0.04, 160),
                (0.93, -0.02, 140),
            )
        ],
    }
    write_run(root / "reward", summary=reward, metrics=pairs)
    ppo_run(root / "ppo")
    write_run(root / "evaluate", summary=evaluation())
    whole = {
        "name": "quickstart",
        "seconds": 338.0,
        "account": ["A tiny model learned to answer by imitation, then to answer better from simulated annotators."],
        "win_rates": {
            "sft over base": {"value": 0.941, "low": 0.915, "high": 0.962, "n": 300},
            "ppo over sft": {"value": 0.683, "low": 0.64, "high": 0.724, "n": 300},
            "sft over sft, again": {"value": 0.51, "low": 0.46, "high": 0.56, "n": 300},
        },
    }
    (root / "summary.json").write_text(json.dumps(whole), encoding="utf-8")
    return root


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; fails on an end tag that nothing opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def drawings(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every page of a whole run, by stage; "whole" is the overview."""
    root = quickstart_run(tmp_path_factory.mktemp("run"))
    stages = ["sft", "reward", "ppo", "evaluate"]
    paths = {name: stage_report(root / name) for name in stages} | {"whole": overview_report(root, stages)}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def test_every_page_is_balanced_and_every_drawing_is_well_formed_xml(pages: dict[str, str]) -> None:
    for text in pages.values():
        Page(text)
        for drawing in drawings(text):
            ElementTree.fromstring(drawing)
    assert len(drawings(pages["ppo"])) > 12


def test_no_page_can_load_anything_or_run_anything(pages: dict[str, str]) -> None:
    for text in pages.values():
        for tag, attributes in Page(text).tags:
            assert tag not in {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use"}
            assert not {"src", "srcset", "style", "action"} & set(attributes)
            assert not any(name.startswith("on") for name in attributes)
            target = attributes.get("href") or "#"
            assert target.startswith("#") or re.fullmatch(r"\w+/report\.html", target)
        assert "url(" not in STYLE and "@import" not in STYLE
        assert "http://" not in text and "https://" not in text


def test_the_security_policy_allows_this_style_sheet_and_nothing_else(pages: dict[str, str]) -> None:
    for text in pages.values():
        style = re.search(r"<style>(.*)</style>", text, flags=re.DOTALL)
        assert style
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        policy = next(a["content"] for t, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_contents_links_lead_to_sections_of_the_page(pages: dict[str, str]) -> None:
    for text in pages.values():
        tags = Page(text).tags
        ids = {attributes.get("id") for _, attributes in tags}
        targets = [a["href"] for tag, a in tags if tag == "a" and (a["href"] or "").startswith("#")]
        assert targets and all(target and target[1:] in ids for target in targets)


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & \x00\x1b[31m\u202e\ud800 end"


def test_what_a_model_or_a_file_wrote_is_shown_as_text_wherever_it_appears(tmp_path: Path) -> None:
    everywhere = {
        "stage": HOSTILE,
        "headline": [{"name": HOSTILE, "value": 1, "low": 0, "high": 2, "n": 3, "unit": HOSTILE, "meaning": HOSTILE}],
        "account": [HOSTILE],
        "warnings": [HOSTILE],
        "comparisons": [{"name": HOSTILE, "value": 0.5, "judge": HOSTILE}],
        "side_by_side": [{"prompt": HOSTILE, "answers": {HOSTILE: HOSTILE}}],
        "curves": [
            {"title": HOSTILE, "x_label": HOSTILE, "y_label": HOSTILE, "note": HOSTILE}
            | {"series": [{"label": HOSTILE, "x": [0, 1], "y": [0, 1], "labels": [HOSTILE] * 2, "draw": "labelled"}]}
        ],
    }
    sample = {"step": 1, "prompt": HOSTILE, "completion": HOSTILE, HOSTILE: HOSTILE}
    folder = write_run(tmp_path / "run", summary=everywhere, samples=[sample], config=HOSTILE.replace("\ud800", ""))
    (folder / "run.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    for path in (stage_report(folder), overview_report(folder, ["."])):
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        assert not {"script", "img"} & {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert "alert(1)" in "".join(page.text)
        assert not set("\x00\x1b\u202e") & set(text)
        for drawing in drawings(text):
            ElementTree.fromstring(drawing)


@SETTINGS
@given(st.text(st.characters(exclude_categories=["C"])))
def test_a_string_given_to_an_element_comes_back_as_its_text(text: str) -> None:
    root = ElementTree.fromstring(element("p", text, title=text))
    assert (root.text or "", root.get("title"), list(root)) == (text, text, [])


def test_hidden_characters_are_made_visible() -> None:
    assert element("p", "a\x00b\u202ec\ud800\uffff") == "<p>a␀b⟨U+202E⟩c⟨U+D800⟩⟨U+FFFF⟩</p>"


def test_a_page_tells_the_run_in_numbers_with_interval_and_n(pages: dict[str, str]) -> None:
    words = " ".join(Page(pages["ppo"]).text).replace("\xa0", " ")
    assert "68.3%" in words and "95% interval 64.0% to 72.4%, n = 300" in words
    assert check("eval/win_rate").meaning in words
    assert "True utility rose with it until about step 50" in words
    assert "kl_coef: 0.05" in words and "2.13.0" in words


def test_hovering_over_a_metric_shows_what_the_registry_says(pages: dict[str, str]) -> None:
    metric = check("rollout/kl_per_sequence_nats")
    hovers = [
        attributes["title"] for tag, attributes in Page(pages["ppo"]).tags if tag == "code" and "title" in attributes
    ]
    assert f"{metric.formula} ({metric.unit}, {REDUCTIONS[metric.reduction]})" in hovers
    assert metric.meaning in "".join(Page(pages["ppo"]).text)


def test_the_overview_shows_every_stage_and_links_to_its_report(pages: dict[str, str]) -> None:
    page = Page(pages["whole"])
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert [link for link in links if link and not link.startswith("#")] == [
        f"{stage}/report.html" for stage in ("sft", "reward", "ppo", "evaluate")
    ]
    pipeline = pages["whole"].partition('<ol class="steps">')[2].partition("</ol>")[0]
    assert "76.4%" in pipeline and "68.3%" in pipeline and "81.2%" not in pipeline
    words = " ".join(page.text).replace("\xa0", " ")
    assert "5 min 38 s" in words and "94.1% [91.5%, 96.2%], n = 300" in words
    assert "Calibration of the reward model" in words and "n = 640" in words
    assert "true utility 4.30" in words and "sft over sft, again : no difference shown" in words


def test_win_rates_name_their_judge_and_say_what_they_show(pages: dict[str, str]) -> None:
    words = " ".join(Page(pages["whole"]).text).replace("\xa0", " ")
    assert "68.3% [64.0%, 72.4%], n = 300, judged by true utility" in words
    assert "81.2% [77.0%, 85.0%], n = 300, judged by reward model" in words
    assert words.count("ppo over sft :") == 2, "the whole run's summary repeats a stage's win rate"
    assert "ppo over sft : better, by more than chance explains" in words
    assert "sft over sft, again : no difference shown" in words


def test_numbers_of_several_models_make_a_table(pages: dict[str, str]) -> None:
    assert 'class="models"' not in pages["ppo"]
    table = pages["evaluate"].partition('<table class="models">')[2].partition("</table>")[0].replace("\xa0", " ")
    rows = [re.sub(r"<[^>]*>", "|", row) for row in table.split("</tr>")]
    assert [re.sub(r"\|+", "|", row).strip("|") for row in rows[:2]] == [
        "base|sft|ppo",
        f"Mean gold utility|{check('eval/gold_utility/mean').meaning}|−1.40|−1.50 to −1.30, n = 300|"
        "2.80|2.70 to 2.90, n = 300|4.10|4.00 to 4.20, n = 300",
    ]


def test_guards_are_told_the_worst_first_with_what_to_do(tmp_path: Path) -> None:
    quiet = {"title": "entropy", "worst": "OK", "step": 3, "at_end": "OK", "seen": "fine", "advice": ""}
    alarmed = {"title": "length", "worst": "ALERT", "step": 9, "at_end": "WARN", "seen": "twice <b>", "advice": "Read."}
    page = stage_report(write_run(tmp_path, summary={"stage": "ppo", "guards": [quiet, alarmed]})).read_text()
    table = page[page.index("what was seen, and what to do") :]
    assert table.index("length") < table.index("entropy")
    assert all(text in table for text in ("step 9", "WARN", "twice &lt;b&gt;", "Read."))
    assert "step 3" not in table


def test_samples_run_from_the_first_steps_to_the_last(pages: dict[str, str]) -> None:
    """Of 64 prompts, 4 of which came back, the page shows the first 4 with both answers and the last 8 with one."""
    samples = pages["ppo"].partition("<h2>Samples</h2>")[2]
    assert samples.count("<article") == 12
    assert samples.count("<b>step 1</b>") == 4 and samples.count("<b>step 80</b>") == 12
    assert "true utility 2.35" in samples and "finished no" in samples


def test_a_prompt_that_came_back_often_is_shown_with_its_first_and_last_answer(tmp_path: Path) -> None:
    rows = [{"step": step, "prompt": "p", "completion": f"answer {step}"} for step in (3, 1, 2)]
    text = stage_report(write_run(tmp_path, samples=rows)).read_text(encoding="utf-8")
    assert re.findall(r"answer \d", text) == ["answer 1", "answer 3"]


def test_a_conversation_is_shown_turn_by_turn(tmp_path: Path) -> None:
    messages = [
        {"role": "assistant", "content": "milk or lemon?"}, {"role": "user", "content": "milk"},
        {"role": "assistant", "content": "with milk"},
    ]  # fmt: skip
    row = {"step": 1, "prompt": "tea", "completion": "with milk", "messages": messages, "score": 0.9}
    text = stage_report(write_run(tmp_path, samples=[row])).read_text(encoding="utf-8")
    assert "Assistant: milk or lemon?\n\nUser: milk\n\nAssistant: with milk" in text


def test_an_overview_links_only_to_reports_that_exist(tmp_path: Path) -> None:
    write_run(tmp_path / "sft", metrics=[{"step": 1, "train/loss": 2.0}])
    assert "sft/report.html" not in overview_report(tmp_path, ["sft"]).read_text(encoding="utf-8")


def test_an_empty_folder_makes_a_page_that_says_the_run_is_not_finished(tmp_path: Path) -> None:
    text = stage_report(tmp_path).read_text(encoding="utf-8")
    assert "not finished" in text and not drawings(text)
    assert "not finished" in overview_report(tmp_path, ["."]).read_text(encoding="utf-8")


def test_a_run_of_a_single_step_has_its_charts(tmp_path: Path) -> None:
    run = write_run(tmp_path, metrics=[{"step": 0, "train/loss": 0.0, "rollout/score/mean": 1, "train/tokens": 10**9}])
    text = stage_report(run).read_text(encoding="utf-8")
    assert len(drawings(text)) == 3
    assert "NaN" not in text and "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text)


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such run folder"):
        stage_report(tmp_path / "nothing")


def test_half_a_line_at_the_end_of_a_log_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, metrics=[{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "train/lo')
    text = stage_report(run).read_text(encoding="utf-8")
    assert "metrics.jsonl: 1 lines could not be read (line 3)" in text and "train/loss at 2" in text


def test_a_summary_that_does_not_parse_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"stage": ')
    with pytest.raises(DataError, match=r"summary\.json: expected a JSON object"):
        stage_report(tmp_path)


@pytest.mark.parametrize("summary", [{"headline": [{"name": "x"}]}, {"curves": [{"title": "t"}]}, {"win_rates": 3}])
def test_a_summary_without_the_expected_keys_is_an_error_that_says_where_they_are_described(
    tmp_path: Path, summary: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"report/stage\.py"):
        stage_report(write_run(tmp_path, summary=summary))


def test_an_undeclared_metric_in_the_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownMetric, match="train/lost"):
        stage_report(write_run(tmp_path, metrics=[{"step": 1, "train/lost": 1.0}]))


def test_a_step_logged_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    rows = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.5}, {"step": 2, "train/loss": 2.0}]
    assert read_run(write_run(tmp_path, metrics=rows)).metrics["train/loss"] == ((1, 3.0), (2, 2.0))


def test_reward_against_distance_shows_gains_in_standard_deviations(tmp_path: Path) -> None:
    """Scores 1, 3, 5 with a first spread of 2 are gains of 0, 1 and 2; KL 0, 1, 4 lies at sqrt 0, 1, 2."""
    rows = [
        {"step": i, "rollout/score/mean": 1.0 + 2 * i, "rollout/score/std": 2.0, "rollout/kl_per_sequence_nats": i**2}
        for i in range(3)
    ]
    figure = over_optimisation_figure(read_run(write_run(tmp_path, metrics=rows)))
    assert figure and "gain (SDs of the first rollout)" in figure
    dots = re.findall(r"<title>(proxy[^<]*)</title>[^<]*</path>", figure)
    assert dots == [f"proxy: the reward model at {i}: {i}" for i in range(3)]
    assert "Proxy is highest at the largest distance (2" in figure


def test_proxy_and_gold_are_scaled_both_or_neither(tmp_path: Path) -> None:
    """Without a spread for gold, dividing the score's gains by 2 would put the two on different scales."""
    rows = [
        {"step": i, "rollout/score/mean": 2.0 * i, "rollout/score/std": 2.0, "rollout/gold_utility/mean": 3.0 * i}
        | {"rollout/kl_per_sequence_nats": i**2}
        for i in range(3)
    ]
    figure = over_optimisation_figure(read_run(write_run(tmp_path, metrics=rows)))
    assert figure and "gain since the first rollout" in figure
    assert "<title>proxy: the reward model at 2: 4</title>" in figure
    assert "<title>gold: true utility at 2: 6</title>" in figure


def test_a_long_run_is_thinned_to_means_with_a_band(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": float(step % 2)} for step in range(2000)]
    text = stage_report(write_run(tmp_path, metrics=rows)).read_text(encoding="utf-8")
    drawing = ElementTree.fromstring(drawings(text)[0])
    assert len(list(drawing.iter("circle"))) <= 160
    assert any("band" in (path.get("class") or "") for path in drawing.iter("path"))
    assert "The band holds all steps" in text


def test_reports_never_import_torch() -> None:
    code = "import sys, accord.report, accord.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
