"""One run of a work in which Accord's sampler writes and nothing is learned; it needs no more of Accord than that."""

from __future__ import annotations

import time
from pathlib import Path

import accord
from accord.models.load import load_policy
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.training.environment import peak_memory_mb
from benchmarks.speed.work import PAD, Timing, Work, groups_of

__all__ = ["run"]


def run(work: Work, folder: Path, apart: bool) -> Timing:
    """Calls of the sampler; nothing ends an answer early. In the run apart its tokens are compared, the likeliest ones.
    What is compiled is so by a call before."""
    (groups,) = groups_of(work)
    policy, _ = load_policy(folder / "policy")
    at_rest, started = peak_memory_mb(), time.perf_counter()
    sampler = NativeSampler(policy, pad_id=PAD, compiled=work.compiled)
    sampling = Sampling(len(groups[0].completions[0].ids), 0.0 if apart else 1.0, stop_ids=())
    prompts = [PromptTokens(group.prompt_ids, group.prompt_id) for group in groups]
    if work.compiled:
        sampler.generate(prompts, 1, sampling, ("speed", 0))
    once = time.perf_counter() - started
    seconds: list[float] = []
    learned: list[float] = []
    for number in range(1, work.calls(apart) + 1):
        before = time.perf_counter()
        written = sampler.generate(prompts, 1, sampling, ("speed", number))
        seconds.append(time.perf_counter() - before)
        if apart:
            learned += [float(i) for (sample,) in written for i in sample.ids]
    return Timing(once, seconds, learned, at_rest, peak_memory_mb(), accord.__version__)
