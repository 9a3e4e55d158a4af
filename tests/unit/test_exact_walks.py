"""Exact evaluation on randomwalks: against closed forms, the tilted optimum, full enumeration, and plain sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from accord.evaluation.exact_walks import WalksEvaluation, best_of_n_evaluation, exact_evaluation
from accord.measures.selection import best_of_n_kl_bound
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.tasks.randomwalks import ALPHABET, RandomWalks

W1000, W1002 = RandomWalks(1000), RandomWalks(1002)
LETTER_IDS = tuple(range(20, -1, -1))  # a = 20, ..., u = 0: tokens must not be taken for nodes
EOS, BOS, VOCAB = 21, 22, 23


class HistoryModel(nn.Module):
    """Stands in for a language model: its next-token probabilities are any function of the tokens so far, (R, T) to
    (R, V). It keeps the tokens in the cache, as a model keeps keys."""

    config = PretrainedConfig(num_hidden_layers=1)
    device = torch.device("cpu")

    def __init__(self, probabilities: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._probabilities = probabilities

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: DynamicCache, use_cache: bool
    ) -> CausalLMOutputWithPast:
        piece = input_ids[:, None, :, None].double()
        history = past_key_values.update(piece, piece, 0)[0][:, 0, :, 0].long()
        assert attention_mask.shape == history.shape
        # 1e-300 keeps the logarithm finite; nothing sees so small a probability.
        return CausalLMOutputWithPast(logits=self._probabilities(history).clamp(min=1e-300).log()[:, None])


def _markov(table: Tensor) -> HistoryModel:
    """Next-token probabilities (V, V) by the last token."""
    return HistoryModel(lambda history: table[history[:, -1]])


def _random_walk(walks: RandomWalks, leak: float = 0.0) -> Tensor:
    """(V, V): edges equally often, end after the goal; with probability `leak` any of the V tokens."""
    table = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    transitions = torch.from_numpy(walks.random_walk())
    for node, token in enumerate(LETTER_IDS):
        table[token, list(LETTER_IDS)] = transitions[node]
    table[LETTER_IDS[0]] = 0.0
    table[[LETTER_IDS[0], EOS, BOS], EOS] = 1.0
    return (1 - leak) * table + leak / VOCAB


def _evaluate(policy: object, reference: object, walks: RandomWalks, **options: object) -> WalksEvaluation:
    settings = {"prefix_ids": (BOS,), "kl_coef": 0.1, "num_samples": 64, "key": ("test", 0), **options}
    return exact_evaluation(policy, reference, walks, letter_ids=LETTER_IDS, eos_id=EOS, **settings)  # type: ignore[arg-type]


def _gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_embd=8,
            n_head=2,
            vocab_size=VOCAB,
            n_positions=16,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@pytest.mark.parametrize(
    ("seed", "kl_coef", "optimality", "optimum"),
    [
        (1000, 0.1, 0.34623, 0.8208),
        (1000, 0.3, 0.34623, 0.6012),
        (1000, 0.0, 0.34623, 1.0),
        (1002, 0.1, 0.78517, 0.9250),
        (1002, 0.3, 0.78517, 0.8584),
    ],
)
def test_the_random_walk_has_its_published_score_and_optimum(
    seed: int, kl_coef: float, optimality: float, optimum: float
) -> None:
    walks = {1000: W1000, 1002: W1002}[seed]
    model = _markov(_random_walk(walks))
    found = _evaluate(model, model, walks, kl_coef=kl_coef)
    assert found.optimality == found.reference_optimality == pytest.approx(optimality, abs=5e-6)
    assert found.objective == found.optimality
    assert found.kl == 0
    assert found.optimum == pytest.approx(optimum, abs=5e-5)
    assert found.off_path_mass == pytest.approx(0, abs=1e-12)
    assert [p.prompt for p in found.prompts] == list(walks.prompts)


def _text(tokens: list[int]) -> str:
    """Tokens after BOS as the benchmark sees them; a BOS in the middle is an unknown character."""
    return "".join("" if token == EOS else "?" if token == BOS else ALPHABET[20 - token] for token in tokens)


def _stays_legal(walks: RandomWalks, tokens: list[int]) -> bool:
    text = _text(tokens)
    return "?" not in text and all(a != "a" and b in walks.next_letters(a) for a, b in pairwise(text))


def _tilted(walks: RandomWalks, reference: Tensor, kl_coef: float) -> Callable[[Tensor], Tensor]:
    """The optimal policy: pi*(token | history) ~ reference(token | history) * E_ref[exp(optimality / kl_coef) | token].

    The expectation is 1 wherever the optimality is settled at 0, exp(o / kl_coef) once the goal is reached, and
    otherwise the recursion over the next token; plain Python over strings, independent of the code under test.
    """
    memory: dict[tuple[str, int, str], float] = {}

    def worth(start: str, letters: int, last: str) -> float:
        """Of having walked legally from `start` over `letters` letters to `last`."""
        if last == "a":
            return math.exp(walks.path_optimality(start, letters) / kl_coef)
        if letters == 10:
            return 1.0
        state = (start, letters, last)
        if state not in memory:
            row = reference[LETTER_IDS[ALPHABET.index(last)]]
            steps = {a: row[LETTER_IDS[ALPHABET.index(a)]].item() for a in walks.next_letters(last)}
            memory[state] = 1 - sum(steps.values()) + sum(p * worth(start, letters + 1, a) for a, p in steps.items())
        return memory[state]

    def probabilities(history: Tensor) -> Tensor:
        weights = reference[history[:, -1]].clone()
        for row, tokens in zip(weights, history[:, 1:].tolist(), strict=True):
            text = _text(tokens)
            if _stays_legal(walks, tokens) and "a" not in text and EOS not in tokens:
                for letter in walks.next_letters(text[-1]):
                    row[LETTER_IDS[ALPHABET.index(letter)]] *= worth(text[0], len(text) + 1, letter)
        return weights / weights.sum(dim=1, keepdim=True)

    return probabilities


@pytest.mark.parametrize("kl_coef", [0.1, 0.3, 1.0])
def test_the_tilted_policy_attains_the_optimum(kl_coef: float) -> None:
    """The reference leaks 0.3 of its mass at every token, so the tree has ways out; beyond them pi* is the reference
    itself and adds no KL, which makes every number exact."""
    reference = _random_walk(W1002, leak=0.3)
    policy = HistoryModel(_tilted(W1002, reference, kl_coef))
    found = _evaluate(policy, _markov(reference), W1002, kl_coef=kl_coef, num_samples=8)
    assert found.objective == pytest.approx(found.optimum, abs=1e-9)
    for prompt in found.prompts:
        assert prompt.objective == pytest.approx(prompt.optimum, abs=1e-9)
    assert found.kl > 0.05
    assert found.off_path_mass > 0.1
    assert found.off_path_kl == pytest.approx(0, abs=1e-12)


@torch.no_grad()
def _sequences(model: GPT2LMHeadModel, prompt: str, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """All prefixes of 0 to `num_tokens` new tokens that had not ended before, by length: tokens, log-probability."""
    levels = [(torch.tensor([[BOS, 20 - ALPHABET.index(prompt)]]), torch.zeros(1, dtype=torch.float64))]
    for _ in range(num_tokens):
        tokens, logprob = levels[-1]
        going = tokens[:, -1] != EOS
        tokens, logprob = tokens[going], logprob[going]
        step = model(tokens).logits[:, -1].double().log_softmax(-1)
        added = torch.arange(VOCAB).repeat(len(tokens))[:, None]
        levels.append((torch.cat([tokens.repeat_interleave(VOCAB, 0), added], 1), (logprob[:, None] + step).flatten()))
    return levels


def test_every_number_agrees_with_enumerating_all_sequences() -> None:
    """Up to 3 tokens of a vocabulary of 23, legal or not: 23 + 22 * 23 + 22^2 * 23 sequences for each prompt, scored
    as strings by the benchmark itself. KL = sum of p log(p / q) over whole sequences. Only the KL beyond the tree is
    sampled: 4 standard errors."""
    policy, reference = _gpt2(1).eval(), _gpt2(2).eval()
    found = _evaluate(policy, reference, W1000, max_new_tokens=3, num_samples=512, kl_coef=0.2)
    kls = []
    for prompt in found.prompts:
        levels = list(zip(*(_sequences(model, prompt.prompt, 3) for model in (policy, reference)), strict=True))
        whole = [(level == 3) | (tokens[:, -1] == EOS) for level, ((tokens, _), _) in enumerate(levels)]
        p, q = (torch.cat([pair[i][1][end] for pair, end in zip(levels, whole, strict=True)]) for i in (0, 1))
        assert p.exp().sum().item() == pytest.approx(1, abs=1e-6)
        kls.append((p.exp() * (p - q)).sum().item())
        if prompt.prompt not in "djn":
            continue
        tokens = [row for ((ids, _), _), end in zip(levels, whole, strict=True) for row in ids[end, 1:].tolist()]
        scores = torch.tensor([W1000.optimality(_text(row)) for row in tokens], dtype=torch.float64)
        legal = torch.tensor([_stays_legal(W1000, row) for row in tokens])
        assert (scores > 0).any()
        assert prompt.optimality == pytest.approx((p.exp() * scores).sum().item(), abs=1e-6)
        assert prompt.reference_optimality == pytest.approx((q.exp() * scores).sum().item(), abs=1e-6)
        assert prompt.optimum == pytest.approx(0.2 * math.log((q + scores / 0.2).exp().sum().item()), abs=1e-6)
        assert prompt.off_path_mass == pytest.approx(p[~legal].exp().sum().item(), abs=1e-6)
    assert found.off_path_kl > 0.3 * found.kl
    assert found.off_path_kl_error < 0.02 * found.off_path_kl
    assert abs(found.kl - np.mean(kls)) < 4 * found.off_path_kl_error
    for name in ("optimality", "kl", "objective", "optimum", "off_path_mass", "off_path_kl", "reference_optimality"):
        assert getattr(found, name) == pytest.approx(np.mean([getattr(p, name) for p in found.prompts]), abs=1e-12)
    assert found.objective == pytest.approx(found.optimality - 0.2 * found.kl, abs=1e-12)


def _best_of(model: object, walks: RandomWalks, n: int, kl_coef: float = 0.1, **options: int) -> WalksEvaluation:
    return best_of_n_evaluation(
        model, walks, n, prefix_ids=(BOS,), letter_ids=LETTER_IDS, eos_id=EOS, kl_coef=kl_coef, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seed", "n", "expected"),
    [
        (1000, 1, 0.34623), (1000, 4, 0.7527), (1000, 16, 0.9671), (1000, 32, 0.9904), (1000, 64, 0.9974),
        (1000, 100, 0.9992), (1000, 128, 0.9997), (1002, 4, 0.9509), (1002, 16, 0.9958), (1002, 32, 0.9996),
    ],
)  # fmt: skip
def test_the_best_of_n_random_walks_has_its_exact_score_within_the_bound_and_the_frontier(
    seed: int, n: int, expected: float
) -> None:
    """The distance is at most ln n - (n - 1)/n, and no trade of optimality for KL beats the optimum at any price."""
    walks = {1000: W1000, 1002: W1002}[seed]
    model = _markov(_random_walk(walks))
    found = _best_of(model, walks, n)
    assert found.optimality == pytest.approx(expected, abs=5e-5)
    assert found.reference_optimality == pytest.approx(_evaluate(model, model, walks).optimality, abs=1e-12)
    for prompt in found.prompts:
        assert -1e-12 <= prompt.kl <= best_of_n_kl_bound(n) + 1e-9
    for kl_coef in (0.02, 0.1, 0.3, 1.0):
        for prompt in _best_of(model, walks, n, kl_coef).prompts:
            assert prompt.objective == pytest.approx(prompt.optimality - kl_coef * prompt.kl, abs=1e-12)
            assert prompt.objective <= prompt.optimum + 1e-9


def test_the_best_of_n_agrees_with_enumerating_all_sequences() -> None:
    """Each sequence's probability of being the best of 5, by the definition: all are at most as good, less all are
    worse, shared among equals as the policy shares it. KL = sum of p log(p / q) over whole sequences."""
    model = _gpt2(1).eval()
    found = {prompt.prompt: prompt for prompt in _best_of(model, W1000, 5, max_new_tokens=3).prompts}
    for letter in "djn":
        levels = _sequences(model, letter, 3)
        whole = [(level == 3) | (tokens[:, -1] == EOS) for level, (tokens, _) in enumerate(levels)]
        q = torch.cat([logprob[end] for (_, logprob), end in zip(levels, whole, strict=True)]).exp()
        rows = [row for (ids, _), end in zip(levels, whole, strict=True) for row in ids[end, 1:].tolist()]
        scores = torch.tensor([W1000.optimality(_text(row)) for row in rows], dtype=torch.float64)
        legal = torch.tensor([_stays_legal(W1000, row) for row in rows])
        p = torch.zeros_like(q)
        for score in scores.unique():
            worse, equal = q[scores < score].sum(), scores == score
            p[equal] = q[equal] / q[equal].sum() * ((worse + q[equal].sum()) ** 5 - worse**5)
        assert p.sum().item() == pytest.approx(1, abs=1e-6)
        assert found[letter].optimality == pytest.approx((p * scores).sum().item(), abs=1e-6)
        assert found[letter].kl == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
        assert found[letter].off_path_mass == pytest.approx(p[~legal].sum().item(), abs=1e-6)
        assert found[letter].optimality > 2 * found[letter].reference_optimality > 0


def test_the_kl_of_an_echo_has_its_closed_form() -> None:
    """Whatever came before, the policy repeats the prompt's letter s with probability .7, ends with .2, and writes any
    other token with .1 / 21. The reference does the same, except right after an s, where it is uniform. So a prefix
    contributes k = KL(policy || uniform) if it ends in s, else 0. The prompt does; token t = 1 to 8 is an s with
    probability .8^(t-1) .7, the earlier ones not having ended the sequence: KL = k (1 + .7 (1 - .8^8) / .2).
    Beyond the tree this needs each draw's own history, fresh randomness at every token, and ends that end it."""

    def policy(history: Tensor) -> Tensor:
        p = torch.full((len(history), VOCAB), 0.1 / 21, dtype=torch.float64)
        p[:, EOS] = 0.2
        return p.scatter(1, history[:, 1:2], 0.7)

    def reference(history: Tensor) -> Tensor:
        return torch.where(history[:, -1:] == history[:, 1:2], 1 / VOCAB, policy(history))

    found = _evaluate(HistoryModel(policy), HistoryModel(reference), W1002, num_samples=512)
    k = 0.7 * math.log(0.7 * VOCAB) + 0.2 * math.log(0.2 * VOCAB) + 0.1 * math.log(0.1 / 21 * VOCAB)
    assert found.off_path_kl > 0.5 * found.kl
    assert found.off_path_kl_error < 0.03 * found.kl
    assert abs(found.kl - k * (1 + 0.7 * (1 - 0.8**8) / 0.2)) < 4 * found.off_path_kl_error


def test_the_numbers_agree_with_plain_sampling() -> None:
    """100 whole samples of 9 tokens per prompt: mean optimality and mean log-ratio within 4 standard errors. The policy
    leaks 2% a token, so both sides of the tree matter."""
    policy = _markov(_random_walk(W1002, leak=0.02))
    reference = _markov(_random_walk(W1002, leak=0.3))
    found = _evaluate(policy, reference, W1002)
    rng = np.random.default_rng(0)
    tables = [_random_walk(W1002, leak).numpy() for leak in (0.02, 0.3)]
    scores, ratios = [], []
    for prompt in W1002.prompts * 100:
        tokens, ratio = [20 - ALPHABET.index(prompt)], 0.0
        while len(tokens) < 10 and tokens[-1] != EOS:
            token = int(rng.choice(VOCAB, p=tables[0][tokens[-1]]))
            ratio += math.log(tables[0][tokens[-1], token] / tables[1][tokens[-1], token])
            tokens.append(token)
        scores.append(W1002.optimality(_text(tokens)))
        ratios.append(ratio)
    for exact, samples, error in ((found.optimality, scores, 0.0), (found.kl, ratios, found.off_path_kl_error)):
        assert abs(np.mean(samples) - exact) < 4 * math.hypot(np.std(samples) / math.sqrt(len(samples)), error)


def test_the_native_sampler_agrees_with_the_exact_optimality_and_kl() -> None:
    """The two halves of Accord that a training run compares: 30 samples per prompt of a random GPT-2, 4 errors."""
    policy, reference = _gpt2(3), _gpt2(4).eval()
    found = _evaluate(policy, reference, W1000, num_samples=32)
    prompts = [PromptTokens((BOS, 20 - ALPHABET.index(letter)), i) for i, letter in enumerate(W1000.prompts)]
    groups = NativeSampler(policy, pad_id=BOS).generate(prompts, 30, Sampling(9, stop_ids=(EOS,)), ("brute",))
    ratios = []
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            with torch.no_grad():
                logprobs = reference(torch.tensor([prompt.ids + sample.ids])).logits[0, 1:-1].log_softmax(-1)
            ratios.append(sum(sample.logprobs) - logprobs.gather(1, torch.tensor(sample.ids)[:, None]).sum().item())
    error = math.hypot(np.std(ratios) / math.sqrt(len(ratios)), found.off_path_kl_error)
    assert abs(np.mean(ratios) - found.kl) < 4 * error
    assert error < 0.1 * found.kl


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 4), st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_no_policy_beats_the_optimum(seed: int, noise: float, kl_coef: float) -> None:
    """Random tables around leaky random walks. The sampled part of the KL is allowed 4 standard errors."""
    draw = torch.Generator().manual_seed(seed)
    base = _random_walk(W1002, leak=0.1).log()
    policy, reference = (
        _markov((base + noise * torch.randn(VOCAB, VOCAB, generator=draw, dtype=torch.float64)).softmax(-1))
        for _ in range(2)
    )
    found = _evaluate(policy, reference, W1002, kl_coef=kl_coef, num_samples=8)
    assert found.objective <= found.optimum + 4 * kl_coef * found.off_path_kl_error + 1e-12
    assert 0 <= found.optimality <= 1
    assert 0 <= found.off_path_mass <= 1
    assert found.kl >= found.off_path_kl >= -1e-12


def test_randomness_comes_from_the_key_and_touches_the_sampled_part_only() -> None:
    policy, reference = _gpt2(1), _gpt2(2)
    first, again, other = (
        _evaluate(policy, reference, W1002, num_samples=8, key=key) for key in (("a", 1), ("a", 1), ("a", 2))
    )
    assert first == again
    assert first.off_path_kl != other.off_path_kl
    assert first.kl - first.off_path_kl == pytest.approx(other.kl - other.off_path_kl, abs=1e-12)
    assert (first.optimality, first.optimum, first.off_path_mass) == (
        other.optimality,
        other.optimum,
        other.off_path_mass,
    )


def test_dropout_is_off_and_the_modes_come_back() -> None:
    policy, reference = _gpt2(1).train(), _gpt2(2).eval()
    found = _evaluate(policy, reference, W1002, num_samples=2)
    assert found == _evaluate(policy, reference, W1002, num_samples=2)
    assert (policy.training, reference.training) == (True, False)


@pytest.mark.parametrize(
    ("option", "value"), [("num_samples", 1), ("kl_coef", -0.1), ("max_new_tokens", 0), ("max_new_tokens", 10)]
)
def test_an_option_out_of_range_is_named(option: str, value: float) -> None:
    model = _markov(_random_walk(W1002))
    with pytest.raises(ValueError, match=f"^{option} is {value}"):
        _evaluate(model, model, W1002, **{option: value})


def test_letters_that_share_a_token_are_refused() -> None:
    model = _markov(_random_walk(W1002))
    with pytest.raises(ValueError, match=r"^letter_ids and eos_id are"):
        exact_evaluation(
            model,
            model,
            W1002,
            letter_ids=range(21),
            eos_id=20,
            kl_coef=0.1,
            num_samples=2,
            key=("x",),  # type: ignore[arg-type]
        )
