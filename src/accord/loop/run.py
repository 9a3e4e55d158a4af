"""`accord loop`: sample, label, refit the reward model, train the policy; round after round, until it stops improving.

The run's folder has one folder a round with the ordinary stage folders inside, so every stage resumes and reports as it
does elsewhere. Nothing else is kept between rounds: what has happened is read from the finished stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.config import Recipe
from accord.loop.labellers import labeller_of
from accord.loop.lineage import Round, rate_of, write_story
from accord.loop.plan import check_loop, fixed_prompts, left_out, online_stage
from accord.loop.rule import Standing, standing
from accord.loop.stages import Policy, Sheet, labels_of, run_label, run_sample
from accord.methods.context import Context, base_folder
from accord.methods.corpus import Corpus, Part
from accord.pipeline import STAGES
from accord.records import Interval, content_id
from accord.rewards.scorers import RewardFunction

__all__ = ["run_loop"]


def run_loop(
    recipe: Recipe, corpus: Corpus, console: Console, functions: Mapping[str, RewardFunction] | None = None
) -> dict[str, Any]:
    """Run (or continue, or find finished) a recipe's loop; returns the content of the root's summary.json.

    Raises: ConfigError, DataError for what cannot work; LabelsWanted when people have to label first; whatever a stage
        raises.
    """
    check_loop(recipe, corpus, functions or {})
    root = Context(recipe, corpus, console, functions or {})
    for name in left_out(recipe):
        root.say(f"the {name} stage of the recipe is no part of the loop and is left out")
    return _Loop(root).run()


class _Loop:
    """The rounds of one run, and the policies that they have made."""

    def __init__(self, root: Context) -> None:
        assert root.recipe.loop is not None
        self._root, self._config = root, root.recipe.loop
        self._corpus, self._online = fixed_prompts(root.corpus), online_stage(root.recipe)
        self._labeller = labeller_of(root)
        self._given = root.corpus.comparisons() if root.corpus.preferences.groups else Part()
        self._labels: list[Part] = []
        self._policies: list[Policy] = []
        self._rounds: list[Round] = []
        self._rates: list[Interval] = []

    def run(self) -> dict[str, Any]:
        self._policies.append(self._first())
        for number in range(1, self._config.rounds + 1):
            where = self._folder(f"round-{number}", number)
            done = self._sheet(where, number, teach=True)
            if done.standing.stop:
                break
            self._rounds[-1] = self._train(where, number, done)
            self._tell(finished=False)
        else:
            number = self._config.rounds + 1
            self._sheet(self._folder(f"after-round-{number - 1}", number), number, teach=False)
        return self._tell(finished=True)

    def _first(self) -> Policy:
        """Policy 0: the SFT stage's model, or the one everything starts from."""
        recipe = self._root.recipe
        if recipe.sft is not None:
            STAGES["sft"](self._root)
            folder = recipe.root / "sft"
        elif recipe.model.scratch is not None:
            folder = base_folder(self._root).parent
        else:
            return Policy(0, None, base_folder(self._root))
        return Policy(0, folder, folder / "model")

    def _folder(self, name: str, number: int) -> Context:
        """The context of a round: its folder, its seed, the data so far, and policy 0 in the SFT stage's place."""
        seed = content_id(["round", self._root.seed, number]) % 2**31
        recipe = self._root.recipe.model_copy(update={"out": str(self._root.root / name), "seed": seed})
        return replace(self._root, recipe=recipe, corpus=self._corpus, elsewhere=_as_sft(self._policies[0]))

    def _sheet(self, where: Context, number: int, *, teach: bool) -> Round:
        """Have answers of the newest policy labelled, and know whether it is better than the best before it."""
        newest = self._policies[-1]
        best = self._policies[self._standing().best] if number > 1 else None
        sheet = Sheet(number, teach, newest, best)
        self._root.console.rule(f"round {number}" if teach else f"after round {number - 1}", align="left")
        # Answers and labels are drawn with the loop's own seed: their keys hold the round.
        drawn = replace(where, recipe=where.recipe.model_copy(update={"seed": self._root.seed}))
        sampled = run_sample(drawn, self._online, sheet)
        old = self._rounds[-1].folder / "reward" / "model" if self._rounds and teach else None
        labelled = run_label(drawn, self._online, sheet, self._labeller, old)
        if teach:
            self._labels.append(labels_of(where.root, f"labels of round {number}"))
        rate = rate_of(labelled)
        self._rates += [] if rate is None else [rate]
        self._rounds.append(Round(number, where.root, newest, best, sampled, labelled, self._standing()))
        return self._rounds[-1]

    def _train(self, where: Context, number: int, done: Round) -> Round:
        """Refit the reward model on all labels so far and train the next policy against it."""
        groups = tuple(group for part in (self._given, *self._labels) for group in part.groups)
        sources = {name: content for part in (self._given, *self._labels) for name, content in part.sources.items()}
        corpus = replace(self._corpus, preferences=Part(groups, sources, self._given.notes))
        reward = STAGES["reward"](replace(where, corpus=corpus))
        start = self._policies[done.standing.best if self._config.start_from == "best" else 0]
        policy = STAGES[self._online](replace(where, elsewhere=_as_sft(start)))
        folder = where.root / self._online
        self._policies.append(Policy(number, folder, folder / "model"))
        return replace(done, start=start, reward=reward, policy=policy)

    def _standing(self) -> Standing:
        return standing(self._rates, self._config.patience)

    def _tell(self, *, finished: bool) -> dict[str, Any]:
        return write_story(self._root, self._online, self._policies, self._rounds, self._standing(), finished=finished)


def _as_sft(policy: Policy) -> dict[str, Path]:
    return {} if policy.stage is None else {"sft": policy.stage}
