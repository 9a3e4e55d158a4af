"""Every number Accord logs, declared once: the log refuses other names, and docs and report tooltips come from here.

Names read `<group>/<quantity>[_<unit>][/<reduction>]`. Groups: train rollout eval time system. A line of
`metrics.jsonl` belongs to one `step`; how several values inside that step become one number is the reduction. A mean
is always sum / count over the whole step and all processes, never a mean of means. To add a metric, add one entry.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from accord.errors import AccordError

__all__ = ["FAMILIES", "GROUPS", "METRICS", "REDUCTIONS", "Direction", "Metric", "Reduction", "UnknownMetric", "check"]

Direction = Literal["up", "down", "neutral"]
Reduction = Literal[
    "token mean", "sequence mean", "pair mean", "prompt mean", "update mean", "max", "std", "sum", "total", "last"
]

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "train": "What the optimiser saw while it updated the weights.",
        "rollout": "Completions sampled from the policy while it trains, before it is updated on them.",
        "eval": "Held-out data: nothing here was trained on.",
        "time": "Where the seconds went.",
        "system": "Throughput and memory.",
    }
)

REDUCTIONS: Mapping[Reduction, str] = MappingProxyType(
    {
        "token mean": "mean over the tokens that count",
        "sequence mean": "mean over completions",
        "pair mean": "mean over comparisons",
        "prompt mean": "mean over prompts, after the mean over each prompt's completions",
        "update mean": "mean over the optimiser updates of the step",
        "max": "largest value in the step",
        "std": "standard deviation over the step's values",
        "sum": "sum over the step",
        "total": "running total since the start of the run",
        "last": "the value at the end of the step",
    }
)


@dataclass(frozen=True, slots=True)
class Metric:
    """What a logged number is. `unit` is "" for plain numbers; `direction` says which way is better, if either is."""

    name: str
    unit: str
    reduction: Reduction
    direction: Direction
    formula: str
    meaning: str

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def title(self) -> str:
        """The name as words: "rollout/kl_per_sequence_nats" is "KL per sequence"."""
        quantity, _, reduction = self.name.partition("/")[2].rpartition("/")
        if not quantity:
            quantity, reduction = reduction, ""
        quantity = quantity.replace("/", " ")
        words = f"{reduction} {quantity.removesuffix('_nats').replace('_', ' ')}".strip()
        words = " ".join("KL" if word == "kl" else word for word in words.split())
        return words[0].upper() + words[1:]


class UnknownMetric(AccordError, LookupError):
    """A metric name that nobody declared."""


# fmt: off
_DECLARED = (
    Metric("train/loss", "nats", "token mean", "down", "-sum(mask * logprob) / sum(mask); pairs: -log sigmoid(margin)",
           "What the optimiser minimises. For language modelling, nats per token; for a reward model, nats per pair."),
    Metric("train/policy_loss", "", "update mean", "neutral", "-mean(min(r A, clip(r, 1 - eps, 1 + eps) A))",
           "The clipped surrogate objective. Its size says little: advantages are re-centred at every step."),
    Metric("train/value_loss", "", "update mean", "down", "mean(max((V - R)^2, (clip(V) - R)^2)) / 2",
           "How far the value model is from the returns. It may rise while the policy finds higher rewards."),
    Metric("train/kl_loss", "", "update mean", "down", "sum of token weight * k3 (or k2) of log(policy / reference)",
           "The KL in the loss (`kl_in`) before kl_coef, weighted as the tokens of the policy loss are."),
    Metric("train/ptx_loss", "nats per token", "token mean", "down", "-mean log p over the mixed-in demonstrations",
           "What the policy still knows of the demonstrations (`ppo.ptx_coef`), before its weight."),
    Metric("train/entropy_nats", "nats per token", "token mean", "neutral", "-sum_v p(v) log p(v)",
           "How undecided the policy is. A slow fall is learning; a fall towards 0 is collapse."),
    Metric("train/clip_fraction", "fraction", "token mean", "neutral",
           "tokens (rloo, reinforce: completions) where clipping changed the loss / all of them",
           "Tokens whose update was cut off. 0 means tiny steps; above about 0.3 the steps are too large."),
    Metric("train/value_clip_fraction", "fraction", "token mean", "neutral",
           "tokens where clipping changed the loss / tokens", "Value predictions whose update was cut off."),
    Metric("train/approx_kl", "nats per token", "token mean", "down", "mean(r - 1 - log r), r = p_new / p_old",
           "How far this step's updates moved the policy from the one that sampled. Above about 0.05 expect trouble."),
    Metric("train/ratio_mean", "", "token mean", "neutral", "mean(r), r = p_new / p_old",
           "Stays near 1; a steady drift means the sampler and the trainer disagree about probabilities."),
    Metric("train/ratio_max_deviation", "", "max", "down", "max |r - 1| before the first update of a rollout",
           "Nothing has moved yet, so sampler and trainer must agree: more than rounding means they do not."),
    Metric("train/grad_norm", "", "update mean", "neutral", "l2 norm of all gradients before clipping",
           "Spikes point at bad batches or a learning rate that is too high."),
    Metric("train/value_grad_norm", "", "update mean", "neutral", "l2 norm of the value model's gradients",
           "The same as the gradient norm, for the value model."),
    Metric("train/learning_rate", "", "last", "neutral", "schedule(step)", "The step size the optimiser used."),
    Metric("train/value_learning_rate", "", "last", "neutral", "schedule(step)", "The value model's step size."),
    Metric("train/explained_variance", "", "token mean", "up", "1 - Var(R - V) / Var(R)",
           "How much of the returns the value model predicts: 1 all of it, 0 nothing, below 0 worse than a constant."),
    Metric("train/advantage_mean", "", "token mean", "neutral",
           "mean(A) before whitening; ilql: mean(min of the target Q - V)",
           "How much better the samples, or the data's tokens, were than what they are compared with: the value model, "
           "or the mean of the other samples."),
    Metric("train/advantage_std", "", "std", "neutral", "std(A) before whitening",
           "The spread of the learning signal. Near 0 there is nothing left to learn from."),
    Metric("train/return_mean", "", "token mean", "up", "mean(A + V)", "What the value model is asked to predict."),
    Metric("train/kl_coef", "", "last", "neutral", "beta in reward = score - beta * KL",
           "The price of leaving the reference model, constant or steered by a controller."),
    Metric("train/q_loss", "", "token mean", "down", "sum over the two heads of (Q - (reward + gamma * next V))^2",
           "How far Q is from the reward plus the value of what follows (ILQL). It rises for a while as values form."),
    Metric("train/expectile_loss", "", "token mean", "down", "|tau - [u < 0]| * u^2, u = min of the target Q - V",
           "How far V is from the chosen expectile of Q (ILQL)."),
    Metric("train/cql_loss", "nats", "token mean", "down", "sum over the two heads of log sum_v exp Q(v) - Q(token)",
           "How little Q prefers the data's tokens to all others (ILQL). 2 ln V when it knows nothing."),
    Metric("train/awac_loss", "nats per token", "token mean", "down", "-exp(awac_beta * advantage) * log p(token)",
           "ILQL's imitation of the data; at awac_beta 0, the loss of plain SFT."),
    Metric("train/value_mean", "", "token mean", "neutral", "mean(V)",
           "The return that ILQL's value head expects, in standardised units if returns are standardised."),
    Metric("train/updates", "updates", "sum", "neutral", "minibatches of the rollout that were learned from",
           "Fewer than update_epochs * minibatches where `update_kl_stop` ended the update of a rollout early."),
    Metric("train/span_loss", "nats", "prompt mean", "down",
           "mean over the tokens from where the answers part of -log sigmoid(score(chosen) - score(rejected))",
           "What the divergence-span loss of a reward model minimises. train/loss is that of whole answers."),
    Metric("train/length_correlation", "", "last", "neutral", "Pearson r of score and length over the step's answers",
           "What length decorrelation pushes to 0."),
    Metric("train/length_head_correlation", "", "last", "up",
           "Pearson r of the length head's score and length over the step's answers",
           "How well the head that is dropped after training takes length upon itself."),
    Metric("train/skipped_updates", "updates", "total", "down", "updates with a non-finite loss or gradient",
           "Updates thrown away because a number was not finite. Anything but 0 deserves a look."),
    Metric("train/accuracy", "fraction", "pair mean", "up",
           "share of pairs with score(chosen) > score(rejected), equal counting half",
           "How often the model agrees with the annotators on pairs it is training on: a reward model by its score, a "
           "policy by its implicit reward. For answers marked one by one: the share on its mark's side of the point "
           "they are compared with."),
    Metric("train/margin/mean", "", "pair mean", "up", "mean(score(chosen) - score(rejected))",
           "How far apart the scores, or the implicit rewards, of the two answers are. Growth without accuracy is "
           "overconfidence."),
    Metric("train/chosen_reward/mean", "", "pair mean", "up",
           "mean of beta log(policy / reference); without a reference beta log policy; orpo: log odds",
           "Implicit reward of the chosen answers. Below 0 they are less likely than they were to the reference."),
    Metric("train/rejected_reward/mean", "", "pair mean", "down", "the same, of the rejected answers",
           "Implicit reward of the rejected answers."),
    Metric("train/chosen_logprob/mean", "nats per completion", "pair mean", "up", "mean of log policy(chosen)",
           "How likely the chosen answers are. The margin may grow while they get less likely: then the probability "
           "goes to answers that nobody compared."),
    Metric("train/rejected_logprob/mean", "nats per completion", "pair mean", "down", "mean of log policy(rejected)",
           "How likely the rejected answers are."),
    Metric("train/imitation_loss", "nats per token", "token mean", "down",
           "-mean log p over the best answers' tokens; orpo: mean over pairs of the chosen answer's mean",
           "The SFT part of a preference loss, before its weight."),
    Metric("train/odds_ratio_loss", "nats", "pair mean", "down",
           "-log sigmoid(log odds(chosen) - log odds(rejected))", "ORPO's preference part, before its weight."),
    Metric("train/desirable_reward/mean", "", "sequence mean", "up", "mean of beta log(policy / reference)",
           "Implicit reward of answers marked desirable."),
    Metric("train/undesirable_reward/mean", "", "sequence mean", "down", "mean of beta log(policy / reference)",
           "Implicit reward of answers marked undesirable."),
    Metric("train/desirable_logprob/mean", "nats per completion", "sequence mean", "up",
           "mean of log policy(desirable)",
           "How likely desirable answers are. It should not fall far."),
    Metric("train/undesirable_logprob/mean", "nats per completion", "sequence mean", "down",
           "mean of log policy(undesirable)", "How likely undesirable answers are."),
    Metric("train/kto_reference_point", "nats per completion", "last", "neutral",
           "max(0, mean over mismatched pairs of log(policy / reference))",
           "What KTO compares answers with: an estimate of how far the policy is from the reference. Often 0."),
    Metric("train/bco_reward_shift", "", "last", "neutral", "mean of all implicit rewards so far",
           "What BCO compares answers with."),
    Metric("train/score/mean", "", "sequence mean", "neutral", "mean(score)",
           "The reward model's average score. Only differences carry meaning, so the level is free to drift."),
    Metric("train/tokens", "tokens", "total", "neutral", "sum(mask) so far", "Tokens learned from so far."),
    Metric("train/sequences", "completions", "total", "neutral", "completions so far",
           "Completions learned from so far."),
    Metric("train/epoch", "epochs", "last", "neutral", "completions seen / completions in the data",
           "How many times the data has been gone through."),

    Metric("rollout/score/mean", "", "sequence mean", "up", "mean(score [+ rewards of the environment])",
           "What the reward model (the proxy) thinks of the samples. Training raises this number; only held-out "
           "judgement tells whether the answers got better."),
    Metric("rollout/score/std", "", "std", "neutral", "std(score)",
           "How much the samples differ in score. Near 0 the policy says the same thing everywhere."),
    Metric("rollout/reward/mean", "", "sequence mean", "up",
           "mean(score + reward terms - kl_coef * KL)",
           "What is maximised: the score less the price of leaving the reference, where that is paid in the reward."),
    Metric("rollout/reference_term/mean", "", "sequence mean", "neutral", "mean(change by shaping.reference)",
           "What comparing scores with those of the reference answers changes. With `par`, the reward is in [0, 1]."),
    Metric("rollout/running_term/mean", "", "sequence mean", "neutral", "mean(change by shaping.running)",
           "What dividing by the spread of all scores so far changes."),
    Metric("rollout/clip_term/mean", "", "sequence mean", "neutral", "mean(clip(score) - score)",
           "What clipping changes. Away from 0 the scores lie beyond the clip, and climbing further earns nothing."),
    Metric("rollout/length_term/mean", "", "sequence mean", "up", "mean(-length_penalty * tokens beyond length_free)",
           "What length costs."),
    Metric("rollout/overlong_term/mean", "", "sequence mean", "up",
           "mean(-overlong_penalty * share of the buffer that is used)", "What coming near the longest length costs."),
    Metric("rollout/repetition_term/mean", "", "sequence mean", "up", "mean(-repetition_penalty * repetition)",
           "What repeating itself costs a completion."),
    Metric("rollout/diversity_term/mean", "", "sequence mean", "up",
           "mean(diversity_bonus * 2-grams that the prompt's other samples lack / 2-grams)",
           "What being different from the prompt's other samples earns."),
    Metric("rollout/truncation_term/mean", "", "sequence mean", "up", "mean(change by shaping.truncation)",
           "What being cut by length costs."),
    Metric("rollout/environment_term/mean", "", "sequence mean", "up", "mean(sum of the environment's rewards)",
           "What the environment gave for the answers of a conversation. It is part of the score."),
    Metric("rollout/ensemble_std", "", "sequence mean", "down", "mean of the members' std on a completion",
           "How far the members of an ensemble disagree. A rise says that the policy goes where they know little."),
    Metric("rollout/failed_scores", "completions", "sum", "down", "completions that could not be scored",
           "Failures of the scorer. Nothing is learned from their prompts in this step; samples.jsonl names them."),
    Metric("rollout/left_out_prompts", "prompts", "sum", "down", "prompts with a completion that could not be scored",
           "Prompts of this step from which nothing was learned."),
    Metric("rollout/kl_per_sequence_nats", "nats per completion", "sequence mean", "down",
           "mean over completions of sum_t log(policy / reference)",
           "How far the policy has moved from the reference model. The budget that buys reward."),
    Metric("rollout/kl_per_token_nats", "nats per token", "token mean", "down", "mean_t log(policy / reference)",
           "The same distance for one token; does not grow with length."),
    Metric("rollout/sampler_deviation", "", "max", "down", "max |p_sampler / p_trainer - 1|",
           "How far sampler and trainer disagree about a token's probability. Rounding gives about 1e-5 in fp32."),
    Metric("rollout/sampler_weight/mean", "", "token mean", "neutral",
           "mean(min(p_trainer / p_sampler, cap)); rloo, reinforce: of completions",
           "What sampled actions weigh in the policy loss (`sampler_correction`). Near 1 as long as the two agree."),
    Metric("rollout/sampler_weight_capped_fraction", "fraction", "token mean", "down",
           "share of those weights that the cap cut",
           "Actions that count too little because of `sampler_correction_cap`. Much above 0.01, mend the sampler."),
    Metric("rollout/entropy_nats", "nats per token", "token mean", "neutral", "mean_t -log policy(sampled token)",
           "How varied the sampling is. A fall towards 0 is collapse."),
    Metric("rollout/completion_tokens/mean", "tokens", "sequence mean", "neutral", "mean(tokens the policy wrote)",
           "Length of the samples. Reward models often like length: watch it when the score rises."),
    Metric("rollout/finished_fraction", "fraction", "sequence mean", "up", "share of completions ended by a stop token",
           "Completions the model ended itself."),
    Metric("rollout/truncated_fraction", "fraction", "sequence mean", "down", "share cut by max_new_tokens",
           "Completions that ran out of room. A rise usually means rambling."),
    Metric("rollout/turns/mean", "answers", "sequence mean", "neutral", "mean(answers of the policy in a conversation)",
           "How often the policy speaks in a conversation with an environment."),
    Metric("rollout/out_of_turns_fraction", "fraction", "sequence mean", "down", "share ended by max_turns",
           "Conversations that the environment would have continued after the last answer allowed."),
    Metric("rollout/out_of_room_fraction", "fraction", "sequence mean", "down", "share ended for want of room",
           "Conversations that ended because another answer might not have fitted into data.max_tokens, or into the "
           "model's positions."),
    Metric("rollout/repetition", "fraction", "sequence mean", "down", "1 - distinct 3-grams / 3-grams of a completion",
           "How much a completion repeats itself."),
    Metric("rollout/distinct_2", "fraction", "last", "up", "distinct 2-grams / 2-grams over all samples",
           "Variety over the whole batch. A steady fall means all answers become alike."),
    Metric("rollout/self_similarity", "fraction", "prompt mean", "neutral",
           "mean ROUGE-2 F1 of neighbouring samples of a prompt",
           "How alike the samples of one prompt are. Towards 1 the policy has one answer left for it."),
    Metric("rollout/duplicate_fraction", "fraction", "sequence mean", "down",
           "samples that another prompt got word for word / samples",
           "Stock answers: the same text whatever was asked."),
    Metric("rollout/word_rise", "fraction", "last", "down",
           "max over words of share of samples holding it - the same share before training",
           "The word that took over. Reward models pay for single words; a rise may also be good style."),
    Metric("rollout/length_correlation", "", "last", "neutral", "Pearson r of score and tokens over the samples",
           "Whether the reward pays for length within this rollout."),
    Metric("rollout/ceiling_fraction", "fraction", "sequence mean", "down",
           "samples with the rollout's highest score, or a clipped one / samples",
           "Scores at the top cannot tell good from better: nothing is left to learn there."),
    Metric("rollout/outlier_fraction", "fraction", "sequence mean", "down",
           "samples whose hidden state in the reward model lies outside 99% of those before training / samples",
           "0.01 is expected. More means that the reward model judges text unlike what it knew."),
    Metric("rollout/holdout_score/mean", "", "sequence mean", "up", "mean(score) of the hold-out reward model",
           "A second judge that is never trained on. When it falls while the score rises, the reward is being gamed."),
    Metric("rollout/tied_fraction", "fraction", "prompt mean", "down",
           "prompts whose samples all score alike / prompts",
           "Comparing such samples teaches nothing: the prompt is too easy, too hard, or has too few of them. Online "
           "DPO has no pair there."),
    Metric("rollout/selection_quantile", "", "last", "neutral", "start + (end - start) * (step - 1) / (steps - 1)",
           "Rejection sampling keeps what reaches this quantile of its prompt's scores. It rises within a cycle."),
    Metric("rollout/kept_fraction", "fraction", "sequence mean", "neutral", "samples selected / samples",
           "Share of the samples that rejection sampling selects, repeats included. Below 1 - quantile some prompts "
           "are dropped; above it scores tie."),
    Metric("rollout/kept_distinct_fraction", "fraction", "last", "up", "different selected samples / selected samples",
           "Repeats are imitated once. A fall towards 0 means that the policy says the same thing again and again."),
    Metric("rollout/kept_score/mean", "", "prompt mean", "up", "mean(score) of the samples selected",
           "How good what is imitated is: what the policy moves towards."),
    Metric("rollout/dropped_prompts", "prompts", "sum", "down", "prompts whose samples all score the same",
           "Where all samples tie there is nothing to choose, and nothing is learned from the prompt."),
    Metric("rollout/prompts", "prompts", "total", "neutral", "prompts so far", "Prompts answered so far."),
    Metric("rollout/samples", "completions", "total", "neutral", "completions so far", "Completions sampled so far."),
    Metric("rollout/gold_utility/mean", "", "sequence mean", "up", "mean(true utility)",
           "What the simulated annotators truly value. Hidden from training; known only where a simulator exists."),
    Metric("rollout/gold_utility/std", "", "std", "neutral", "std(true utility)",
           "How much the samples differ in true utility."),

    Metric("eval/loss", "nats", "token mean", "down", "train/loss on held-out data",
           "When it rises while the training loss falls, the model memorises."),
    Metric("eval/perplexity", "", "last", "down", "exp(eval/loss)",
           "The number of equally likely tokens the model hesitates between."),
    Metric("eval/accuracy", "fraction", "pair mean", "up",
           "share of new pairs with score(chosen) > score(rejected), equal counting half",
           "How often a reward model, or a policy's implicit reward, agrees with annotators on new pairs. Annotator "
           "disagreement sets a ceiling."),
    Metric("eval/margin/mean", "", "pair mean", "up", "mean(score(chosen) - score(rejected)) on held-out pairs",
           "How far apart the scores, or the implicit rewards, of new pairs are."),
    Metric("eval/chosen_reward/mean", "", "pair mean", "up", "train/chosen_reward/mean on held-out pairs",
           "Implicit reward of new chosen answers."),
    Metric("eval/rejected_reward/mean", "", "pair mean", "down", "train/rejected_reward/mean on held-out pairs",
           "Implicit reward of new rejected answers."),
    Metric("eval/chosen_logprob/mean", "nats per completion", "pair mean", "up", "mean of log policy(chosen)",
           "How likely new chosen answers are: the place to notice that the policy drifts away from all answers."),
    Metric("eval/rejected_logprob/mean", "nats per completion", "pair mean", "down", "mean of log policy(rejected)",
           "How likely new rejected answers are."),
    Metric("eval/imitation_loss", "nats per token", "token mean", "down", "train/imitation_loss on held-out answers",
           "The SFT part of a preference loss on new answers."),
    Metric("eval/odds_ratio_loss", "nats", "pair mean", "down", "train/odds_ratio_loss on held-out pairs",
           "ORPO's preference part on new pairs."),
    Metric("eval/desirable_reward/mean", "", "sequence mean", "up", "mean of beta log(policy / reference)",
           "Implicit reward of new answers marked desirable."),
    Metric("eval/undesirable_reward/mean", "", "sequence mean", "down", "mean of beta log(policy / reference)",
           "Implicit reward of new answers marked undesirable."),
    Metric("eval/desirable_logprob/mean", "nats per completion", "sequence mean", "up",
           "mean of log policy(desirable)",
           "How likely new desirable answers are. It should not fall far."),
    Metric("eval/undesirable_logprob/mean", "nats per completion", "sequence mean", "down",
           "mean of log policy(undesirable)", "How likely new undesirable answers are."),
    Metric("eval/kto_reference_point", "nats per completion", "last", "neutral",
           "max(0, mean over mismatched pairs of log(policy / reference))",
           "What KTO compares new answers with: an estimate of how far the policy is from the reference. Often 0."),
    Metric("eval/bco_reward_shift", "", "last", "neutral", "mean of all implicit rewards so far",
           "What BCO compares new answers with."),
    Metric("eval/head_accuracy/min", "fraction", "last", "up", "eval/accuracy of the head that agrees least",
           "The worst of a reward model's heads by itself. The accuracy of their mean should lie above it."),
    Metric("eval/head_accuracy/max", "fraction", "last", "up", "eval/accuracy of the head that agrees most",
           "The best of a reward model's heads by itself."),
    Metric("eval/head_disagreement/mean", "", "sequence mean", "neutral",
           "mean over answers of the standard deviation (over heads) of the score",
           "How far apart the heads of a reward model are on new answers, in score units. Where it is large, the score "
           "is a guess."),
    Metric("eval/calibration_error", "fraction", "pair mean", "down",
           "sum over bins of share(bin) * |predicted - observed|",
           "Expected calibration error: how far predicted preference probabilities are from what annotators chose."),
    Metric("eval/return_correlation", "", "sequence mean", "up", "Pearson r of the last token's Q and the return",
           "Whether ILQL's Q tells good held-out answers from bad ones. At 0, sampling with it steers by noise."),
    Metric("eval/q_loss", "", "token mean", "down", "train/q_loss on held-out data", "Errors of Q on new answers."),
    Metric("eval/expectile_loss", "", "token mean", "down", "train/expectile_loss on held-out data",
           "Errors of V on new answers."),
    Metric("eval/cql_loss", "nats", "token mean", "down", "train/cql_loss on held-out data",
           "How little Q prefers the tokens of new answers to all others."),
    Metric("eval/awac_loss", "nats per token", "token mean", "down", "train/awac_loss on held-out data",
           "The imitation loss on new answers; when it rises while train/awac_loss falls, the policy memorises."),
    Metric("eval/length_correlation", "", "sequence mean", "neutral", "Pearson r of score and completion length",
           "Whether the reward model simply likes long answers. Near 0 is best; above about 0.4 is suspicious."),
    Metric("eval/score/mean", "", "prompt mean", "up", "mean(score) on held-out prompts",
           "What the reward model thinks of answers to prompts that PPO never saw."),
    Metric("eval/gold_utility/mean", "", "prompt mean", "up", "mean(true utility) on held-out prompts",
           "What the simulated annotators truly value, on new prompts."),
    Metric("eval/win_rate", "fraction", "prompt mean", "up", "(wins + ties / 2) / comparisons",
           "How often a blind judge prefers this model's answer over the other's. 50% means no difference."),
    Metric("eval/kl_per_sequence_nats", "nats per completion", "prompt mean", "down",
           "mean of sum_t log(policy / reference) on held-out prompts",
           "Distance from the reference model on new prompts."),
    Metric("eval/kl_bound_nats", "nats per completion", "last", "down", "ln n - (n - 1) / n",
           "Best-of-n is at most this far from the policy it samples from; less where answers score the same."),
    Metric("eval/completion_tokens/mean", "tokens", "prompt mean", "neutral", "mean(tokens per completion)",
           "Length of the answers to new prompts."),
    Metric("eval/completion_words/mean", "words", "prompt mean", "neutral", "mean(words per completion)",
           "Length of the answers to new prompts, as a reader counts."),
    Metric("eval/finished_fraction", "fraction", "prompt mean", "up", "share of completions ended by a stop token",
           "Answers to new prompts that the model ended itself."),
    Metric("eval/rouge_1", "fraction", "prompt mean", "up", "F1 of the words in common (Chinese: characters)",
           "Word overlap with a reference answer. Preference training often lowers it while people like answers more."),
    Metric("eval/rouge_2", "fraction", "prompt mean", "up", "F1 of the pairs of words in common (Chinese: characters)",
           "Overlap of word pairs with a reference answer."),
    Metric("eval/rouge_l", "fraction", "prompt mean", "up", "F1 of the longest common subsequence of words",
           "Word overlap with a reference answer. Says nothing about correctness."),
    Metric("eval/distinct_2", "fraction", "last", "up", "distinct 2-grams / 2-grams over all answers",
           "Variety of the answers to new prompts."),
    Metric("eval/repetition", "fraction", "prompt mean", "down", "1 - distinct 3-grams / 3-grams of a completion",
           "How much an answer repeats itself."),

    Metric("time/step_seconds", "seconds", "sum", "down", "wall clock of the step", "One whole step."),
    Metric("time/step_cpu_seconds", "seconds", "sum", "down", "CPU time of the process during the step",
           "All threads together; less than the wall clock where the step waited for others."),
    Metric("time/compile_seconds", "seconds", "sum", "down", "wall clock of compiling passes during the step",
           "Part of the step's seconds; only in steps that met a new kind of pass (`model.compile`, "
           "`model.compile_sampling`)."),
    Metric("time/generate_seconds", "seconds", "sum", "down", "wall clock of sampling", "Writing completions."),
    Metric("time/score_seconds", "seconds", "sum", "down", "wall clock of scoring", "Reward, reference, value passes."),
    Metric("time/update_seconds", "seconds", "sum", "down", "wall clock of the updates", "Forward, backward, step."),
    Metric("time/eval_seconds", "seconds", "sum", "down", "wall clock of evaluation", "Measuring on held-out data."),

    Metric("system/tokens_per_second", "tokens per second", "last", "up", "tokens of the step / step seconds",
           "Throughput, prompts and completions together."),
    Metric("system/peak_memory_mb", "MB", "max", "down", "peak memory of the process or the GPU / 10^6",
           "The most memory held at once."),
)

# One metric for each thing that a recipe names: `*` stands for the name.
_FAMILIES = (
    Metric("rollout/scorer/*/mean", "", "sequence mean", "up", "mean(score of this judge, before its weight)",
           "What one of the judges in `scorers` thinks of the samples. One that rises while the others fall is gamed."),
)
# fmt: on

METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _DECLARED})
FAMILIES: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _FAMILIES})


def check(name: str) -> Metric:
    """The declaration of `name`. Raises UnknownMetric, with the nearest declared name, for anything else."""
    metric = METRICS.get(name) or _of_family(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "see docs/metrics.md for the declared names."
        raise UnknownMetric(f"unknown metric `{name}`: {hint} A new metric needs one entry in accord/metrics.py.")
    return metric


def _of_family(name: str) -> Metric | None:
    """The member of a family that `name` is, or None."""
    for pattern, metric in FAMILIES.items():
        front, _, back = pattern.partition("*")
        inner = name.removeprefix(front).removesuffix(back)
        if re.fullmatch(r"[a-z][a-z0-9_]*", inner) and name == f"{front}{inner}{back}":
            return replace(metric, name=name)
    return None
