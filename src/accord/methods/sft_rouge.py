"""What an SFT policy writes to held-out prompts, measured by its ROUGE against the demonstrations.

Perplexity says how well the demonstrations are predicted word by word; this says how near the model's own answers come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accord.config import RougeConfig
from accord.data.convert import as_kind
from accord.errors import ConfigError
from accord.measures.overlap import rouge_intervals
from accord.methods.context import Context, LoadedPolicy, tokenised
from accord.methods.rollouts import Prompt
from accord.records import Group, Interval
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling

__all__ = ["RougeProbe", "rouge_account"]


@dataclass(frozen=True, slots=True)
class RougeProbe:
    """Held-out prompts with their demonstrations, and how the policy is asked. Equal weights give equal answers."""

    policy: LoadedPolicy
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    seed: int

    @classmethod
    def of(
        cls, context: Context, policy: LoadedPolicy, section: RougeConfig | None, held_out: Sequence[Group]
    ) -> RougeProbe | None:
        """None when none is wanted. Raises ConfigError when no held-out demonstration is one answer to a prompt."""
        if section is None:
            return None
        prompted = [group for group in held_out if group.prompt]
        asked = [g for g in as_kind(prompted, "prompts").groups if g.reference] if prompted else []
        if not asked:
            raise ConfigError(
                f"`sft.rouge` compares answers with held-out demonstrations, and none of the {len(held_out)} held out "
                "is one answer to a prompt: raise `data.holdout`, or leave `sft.rouge` out"
            )
        data = context.recipe.data
        room = data.max_tokens - section.max_new_tokens
        limit = min(room, data.max_prompt_tokens or room)
        prompts = tokenised(
            context, asked[: section.prompts], policy.template, "held-out prompts",
            max_tokens=room, max_prompt_tokens=limit,
        )  # fmt: skip
        sampling = Sampling(section.max_new_tokens, section.temperature, stop_ids=policy.template.stop_ids)
        return cls(policy, tuple(prompts), sampling, context.seed)

    def measure(self) -> dict[str, Interval]:
        """Each ROUGE of the policy as it is now, by metric name."""
        sampler = NativeSampler(self.policy.model, pad_id=self.policy.pad_id)
        wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in self.prompts]
        samples = sampler.generate(wanted, 1, self.sampling, ("sft-rouge", self.seed))
        texts = [self.policy.template.decode(answer.ids) for (answer,) in samples]
        references = [group.reference for group, _ in self.prompts]
        return rouge_intervals(texts, references, [tokens.prompt_id for _, tokens in self.prompts])


def rouge_account(rouge: dict[str, Interval]) -> str:
    """One sentence for the stage's account."""
    share = rouge["eval/rouge_l"]
    return (
        f"Its own answers to {share.n:,} held-out prompts share words with the demonstrations: ROUGE-L "
        f"{share.value:.3f} (95% interval {share.low:.3f} to {share.high:.3f}). It is expected to fall when the model "
        "is trained on preferences, while people like the answers more."
    )
