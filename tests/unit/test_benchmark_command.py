"""The benchmarks' command lines: what cannot be used is one sentence and exit code 2, before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import profile, scaling_cost, toolbox
from benchmarks.speed import __main__ as speed

OTHER = '[{"curve": "no such", "value": 1, "seconds": 1, "megabytes": 1}]'


def refusal(main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a benchmark says when it refuses these."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)  # type: ignore[operator]
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.startswith("benchmarks.") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (profile.main, ["--threads", "0"], "--threads: found '0', expected a whole number of at least 1"),
        (profile.main, ["--out", "/nodir/x.json"], "/nodir/x.json cannot be written"),
        (scaling_cost.main, ["--figure", "/nodir/x.svg"], "/nodir/x.svg cannot be written"),
        (scaling_cost.main, ["--up-to", "-1"], "--up-to: found '-1'"),
        (
            scaling_cost.main,
            ["--curves", "check", "--up-to", "5"],
            "no point of check is at most 5: the least is 10000",
        ),
        (toolbox.main, ["--repeats", "0"], "--repeats: found '0', expected a whole number of at least 1"),
        (toolbox.main, ["--steps", "2"], "--steps: found '2', expected a whole number of at least 3"),
        (toolbox.main, ["--only", "lora,other"], "no such option: other; there are plain,"),
        (toolbox.main, ["--out", "none.json", "--page", __file__], "cannot read none.json"),
        (speed.main, ["--page", "/nodir/x.md"], "there is no file /nodir/x.md"),
        (speed.main, ["--figure", "/nodir/x.svg"], "/nodir/x.svg cannot be written"),
        (speed.main, ["--later", "x.json"], "--later goes with --page or --figure"),
        (speed.main, ["--figure", "x.svg", "--out", "none.json"], "there are no results in none.json"),
        (speed.main, ["--figure", "x.svg", "--later", "none.json"], "cannot read none.json: No such file"),
    ],
)
def test_arguments_are_refused(
    main: object, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(main, arguments, capsys)


@pytest.mark.parametrize("content", ["{bad", "[1]", '{"rows": 3}', '[{"curve": "check"}]', OTHER])
def test_a_file_of_other_results_is_refused_and_stays(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_cost, "_apart", lambda *point: pytest.fail("measured"))
    out = tmp_path / "bad.json"
    out.write_text(content)
    assert str(out) in refusal(scaling_cost.main, ["--quick", "--out", str(out)], capsys)
    assert out.read_text() == content


@pytest.mark.parametrize("main", [speed.main, toolbox.main])
@pytest.mark.parametrize("content", ["{bad", "[1]", '{"machine": {}, "rows": [{"work": "no such"}]}'])
def test_results_of_something_else_are_not_published(
    main: object, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "bad.json", tmp_path / "page.md"
    out.write_text(content)
    page.write_text("as it was")
    assert str(out) in refusal(main, ["--out", str(out), "--page", str(page)], capsys)
    assert page.read_text() == "as it was"
