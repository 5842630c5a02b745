"""Engines of this process after a sync: of which weights their answers are, and whether requests wait."""

from __future__ import annotations

from standin_vllm import of_seed, whole

import nvfp4_qat as nq
from nvfp4_qat import rollout

OF_SEED = {seed: of_seed(seed) for seed in range(5)}
STAYS = "stays paused and its requests wait; the next complete sync makes it whole"


def answered(llm, prompts=("a", "b")):
    """Of which seed's weights all answers of an engine are."""
    seeds = {seed for steps in llm.generate(prompts) for seed in whole(steps, OF_SEED)}
    assert len(seeds) == 1
    return seeds.pop()


def waits(llm):
    """Whether an engine is paused, so that a request waits; it does so from now on."""
    answer = llm.core.add("waits")
    return llm.core.paused and not answer.done(), answer


def worker(llm, method, *args):
    return llm.core.do(llm.core.rpc, method, args)[0]


class Failing:
    """Weights of a model that break off after some tensors."""

    def __init__(self, monkeypatch, after, error):
        def stream(*args, **options):
            for i, pair in enumerate(nq.packed_weights(*args, **options)):
                if i == after:
                    raise error
                yield pair

        monkeypatch.setattr(rollout, "packed_weights", stream)
