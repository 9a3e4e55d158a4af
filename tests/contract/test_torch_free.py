"""What must answer at once answers without torch, whose import alone takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHECKS = r"""
import contextlib, io, json, sys
from pathlib import Path

folder = Path(sys.argv[1])
loaded = {}

def check(name, action):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            result = action()
        except SystemExit as error:
            result = error.code
    loaded[name] = [result if isinstance(result, int) else None, sorted({"torch", "transformers"} & sys.modules.keys())]

def command(*arguments):
    from accord.cli.main import main
    return main(arguments)

def reports():
    from accord.report.overview import overview_report
    from accord.report.stage import stage_report
    stage_report(folder / "run" / "sft")
    overview_report(folder / "run", ["sft"])

check("import accord", lambda: __import__("accord"))
check("--help", lambda: command("--help"))
check("--version", lambda: command("--version"))
commands = ("run", "loop", "profile", "quickstart", "methods")
for verb in ("sft", "reward", "dpo", "orpo", "kto", "ppo", "evaluate", *commands):
    check(f"{verb} --help", lambda: command(verb, "--help"))
check("methods", lambda: command("methods"))
check("benchmark randomwalks --help", lambda: command("benchmark", "randomwalks", "--help"))
pairs, recipe = str(folder / "pairs.jsonl"), str(folder / "recipe.yaml")
check("data check", lambda: command("data", "check", pairs))
check("data stats", lambda: command("data", "stats", pairs))
check("data convert", lambda: command("data", "convert", pairs, str(folder / "sft.jsonl"), "--to", "sft"))
check("unknown key", lambda: command("ppo", "--set", "ppo.clip_rang=0.2"))
check("contradiction", lambda: command("ppo", recipe, "--set", "ppo.target_kl=3"))
check("profile of an unknown key", lambda: command("profile", recipe, "--set", "ppo.clip_rang=0.2"))
check("profile of no such stage", lambda: command("profile", recipe, "--stage", "evaluate"))
check("profile without data", lambda: command("profile", recipe, "--set", "data.preferences=nowhere.jsonl"))
check("missing data", lambda: command("sft", recipe, "--set", "data.sft=nowhere.jsonl"))
check("dry run of all stages", lambda: command("run", recipe, "--dry-run"))
for verb in ("sft", "reward", "dpo", "orpo", "kto", "ppo", "evaluate"):
    check(f"dry run of {verb}", lambda: command(verb, recipe, "--dry-run"))
check("dry run of a loop", lambda: command("loop", recipe, "--dry-run"))
check("reports", reports)
print(json.dumps(loaded))
"""

RECIPE = """\
model: {scratch: {hidden_size: 32, heads: 2, vocab_size: 300}}
data: {preferences: PAIRS, holdout: 0.2, max_tokens: 64}
sft: {}
reward: {}
ppo: {max_new_tokens: 8, prompts_per_step: 4}
evaluate: {max_new_tokens: 8}
loop: {comparisons: 10, holdout_pairs: 2}
"""


def test_nothing_that_only_reads_and_answers_imports_torch(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("PAIRS", str(pairs)))
    stage = tmp_path / "run" / "sft"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n')
    (stage / "summary.json").write_text('{"stage": "sft", "seconds": 1.0}')
    done = subprocess.run(
        [sys.executable, "-c", CHECKS, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: modules for name, (_, modules) in found.items() if modules} == {}
    wrong = {"unknown key", "contradiction", "missing data"}
    wrong |= {"profile of an unknown key", "profile of no such stage", "profile without data"}
    assert {name for name, (code, _) in found.items() if code == 2} == wrong
    assert all(code in (0, None) for name, (code, _) in found.items() if name not in wrong), found
    assert (stage / "report.html").exists() and (tmp_path / "run" / "report.html").exists()
