"""Which weights made which tokens: what `Rollout.token_versions` says, and what an engine's steps were made with."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from standin_async import AsyncLLM
from standin_runner import First, Second
from standin_server import Server
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, Worker, of_seed, whole

from nvfp4_qat.errors import UserError
from nvfp4_qat.live_in_flight import UPDATES
from nvfp4_qat.rollout import Rollout

OF_VERSION = {None: of_seed(0), **{v: of_seed(v) for v in range(1, 4)}}
"""Version v is made of seed v."""


class SecondWorker(Worker):
    runner = Second


def run(core, steps):
    """Let an engine make some steps."""
    core.do(setattr, core, "budget", steps)
    end = time.monotonic() + 20
    while core.budget and (core.running or core.waiting or core.ended):
        assert time.monotonic() < end
        time.sleep(0.001)
    core.do(setattr, core, "budget", 0)


class Setup:
    def __init__(self, worker=Worker, served=False, tp=1, **options):
        self.model, plan = trainer(0)
        self.llm = LLM(packed(0), tp, worker=worker)
        self.core, self.version = self.llm.core, 0
        self.core.do(setattr, self.core, "budget", 0)
        self.server = Server(self.llm) if served else None
        self.of = {None: of_seed(0, tp), **{v: of_seed(v, tp) for v in range(1, 4)}}
        engine = self.server.url if served else self.llm
        self.rollout = Rollout.connect(engine, plan, **{"in_flight": "keep", "timeout": 20, **options})

    def sync(self):
        self.version += 1
        perturb(self.model, self.version)
        assert self.rollout.sync(self.model).version == self.version

    def made(self, answer):
        """By the engine's own account: each step's digest is that of one version's weights."""
        return whole(answer.result(20), self.of)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("worker", [Worker, SecondWorker])
@pytest.mark.parametrize("served", [False, True])
def test_each_token_has_the_version_that_made_it(worker, served, tp):
    s = Setup(worker, served, tp)
    asked = {"long": s.core.add("a", "long", 14), "short": s.core.add("b", "short", 3)}
    for steps, new in ((4, "second"), (5, "third"), (2, "fourth")):
        run(s.core, steps)
        asked[new] = s.core.add(new, new, 7)  # waits while the engine is paused
        s.sync()
    run(s.core, 20)
    for name in ("long", "second", "third"):
        made = s.made(asked[name])
        assert s.rollout.token_versions(name, len(made)) == made, name
        assert s.rollout.token_versions(name, 2) == made[:2]
    assert s.made(asked["long"]) == [None] * 4 + [1] * 5 + [2] * 2 + [3] * 3
    assert s.made(asked["fourth"]) == s.rollout.token_versions("fourth", 7, ended=3) == [3] * 7
    assert s.made(asked["short"]) == s.rollout.token_versions("short", 3, ended=None) == [None] * 3
    if s.server:
        s.server.close()


def test_a_request_that_no_update_found_needs_more_than_its_id():
    s = Setup()
    first = s.core.add("a", "r0")
    run(s.core, 9)
    assert s.rollout.token_versions("r0", 4) == s.made(first) == [None] * 4
    s.sync()
    second = s.core.add("a", "r1")
    run(s.core, 9)
    s.sync()
    s.sync()
    with pytest.raises(UserError, match=r"'r1' was in flight at none of the last 3 updates of the engine.*with ended="):
        s.rollout.token_versions("r1", 4)
    assert s.rollout.token_versions("r1", 4, ended=1) == s.made(second) == [1] * 4
    assert s.rollout.token_versions("r1", 4, ended=None) == [None] * 4
    with pytest.raises(UserError, match="got or left version 7 is not known"):
        s.rollout.token_versions("r1", 4, ended=7)


def output(name, tokens, times=None, index=0, more=()):
    metrics = None if times is None else SimpleNamespace(first_token_ts=times[0], last_token_ts=times[1])
    completions = [SimpleNamespace(index=i, token_ids=[0] * n) for i, n in ((index, tokens), *more)]
    return SimpleNamespace(request_id=name, outputs=completions, metrics=metrics)


def test_an_output_s_times_tell():
    s, moments = Setup(), [time.monotonic()]
    for _ in range(3):
        s.sync()
        moments.append(time.monotonic())
    for version, moment in zip((None, 1, 2, 3), moments, strict=True):
        assert s.rollout.token_versions(output("r", 5, (moment, moment))) == [version] * 5
    with pytest.raises(UserError, match="the tokens 0 to 4 of 'r' is not known"):
        s.rollout.token_versions(output("r", 5, (moments[1], moments[2])))
    assert s.rollout.token_versions(output("r", 2, (0.0, 0.0)), ended=2) == [2, 2]
    with pytest.raises(UserError, match="no RequestOutput of vLLM with a choice 1"):
        s.rollout.token_versions(output("r", 5), choice=1)
    with pytest.raises(UserError, match="how many tokens came of 'r'"):
        s.rollout.token_versions("r")
    with pytest.raises(UserError, match="there is no engine 1: 1 were connected"):
        s.rollout.token_versions("r", 1, engine=1)


@pytest.mark.parametrize(
    ("internal", "asked", "choice"),
    [
        ("7", "7", 0),
        ("1_7", "7", 1),
        ("cmpl-ab-0", "cmpl-ab", 0),
        ("cmpl-ab-2", "cmpl-ab", 2),
        ("2_cmpl-ab-0", "cmpl-ab", 2),
        ("1_cmpl-ab-3", "cmpl-ab-3", 1),
        ("chatcmpl-ab", "chatcmpl-ab", 0),
        ("3_chatcmpl-ab", "chatcmpl-ab", 3),
    ],
)
def test_vllm_s_names_for_requests(internal, asked, choice):
    s = Setup()
    other = s.core.add("b", f"x{internal}", 9)
    answer = s.core.add("a", internal, 9)
    run(s.core, 4)
    s.sync()
    run(s.core, 9)
    assert s.rollout.token_versions(asked, 9, choice=choice) == s.made(answer) == [None] * 4 + [1] * 5
    given = output(asked, 9, (1.0, 2.0), choice, more=[(choice + 1, 4)])
    assert s.rollout.token_versions(given, choice=choice) == s.made(other)


def test_requests_of_the_same_name_cannot_be_told_apart():
    s = Setup()
    for _ in range(2):
        s.core.add("a", "same", 9)
    run(s.core, 4)
    s.sync()
    with pytest.raises(UserError, match=r"several requests 'same' lately \(same-.*, same-.*\): give each an id"):
        s.rollout.token_versions("same", 9)


@pytest.mark.parametrize("worker", [Worker, SecondWorker])
def test_a_request_that_waits_after_a_preemption(worker):
    """The second runner does not list it; while it waits it gets no tokens, which tells when it is taken up again."""
    s = Setup(worker)
    answer = s.core.add("a", "r", 12)
    run(s.core, 3)
    s.sync()
    run(s.core, 2)
    s.core.do(s.core.preempt, "r")
    other = s.core.add("b", "other", 12)
    s.core.do(setattr, s.core, "room", 1)
    s.core.do(s.core.waiting.reverse)
    run(s.core, 1)  # another one is taken up
    s.sync()
    run(s.core, 4)
    s.sync()
    run(s.core, 20)
    made = s.made(answer)
    assert made[:5] == [None] * 3 + [1] * 2 and set(made[5:]) <= {2, 3}
    assert s.rollout.token_versions("other", 12) == s.made(other)
    if worker is Worker:
        assert s.rollout.token_versions("r", 12) == made
    else:
        assert s.rollout.token_versions("r", 3) == made[:3]
        with pytest.raises(UserError, match=r"made the tokens 3 to \d+ of 'r' is not known: .* did not list this"):
            s.rollout.token_versions("r", 12)


def test_a_request_that_waited_and_had_no_token_since_is_known():
    """As after an update, when all contexts are computed anew but not all at once."""
    s = Setup(SecondWorker)
    answers = {name: s.core.add(name, name, 10) for name in ("a", "b")}
    run(s.core, 2)
    s.sync()
    s.core.do(setattr, s.core, "room", 1)
    run(s.core, 1)  # the first is taken up again, and the second is forgotten
    s.core.do(setattr, s.core, "room", None)
    assert len(s.llm.core.workers[0].model_runner.req_states.req_id_to_index) == 1
    s.sync()
    run(s.core, 3)
    s.sync()
    run(s.core, 20)
    for name, answer in answers.items():
        assert s.rollout.token_versions(name, 10) == s.made(answer)
    assert s.made(answers["b"]) == [None] * 2 + [2] * 3 + [3] * 5


def test_requests_that_were_aborted_keep_the_version_of_their_tokens():
    s = Setup(in_flight="abort")
    answer = s.core.add("a", "r", 12)
    run(s.core, 3)
    s.sync()
    assert answer.result(20) == "aborted" and s.rollout.token_versions("r", 3) == [None] * 3


def test_another_trainer_goes_on_and_knows_what_was_in_flight():
    s = Setup()
    answer = s.core.add("a", "r", 12)
    run(s.core, 3)
    s.sync()
    run(s.core, 3)
    other = Rollout.connect(s.llm, s.rollout.plan, in_flight="keep")
    perturb(s.model, 2)
    other.sync(s.model)
    run(s.core, 20)
    assert other.token_versions("r", 12) == s.made(answer) == [None] * 3 + [1] * 3 + [2] * 6
    assert s.rollout.versions == [2] and s.rollout.token_versions("r", 12) == s.made(answer)


def test_an_engine_that_was_started_anew_has_other_requests():
    s = Setup(served=True)
    s.core.add("a", "r", 12)
    run(s.core, 3)
    s.sync()
    s.server.llm = LLM(packed(0))
    perturb(s.model, 1)
    assert s.rollout.sync(s.model).version == 1
    with pytest.raises(UserError, match="'r' was in flight at none of the last 1 updates"):
        s.rollout.token_versions("r", 3)
    s.server.close()


def test_what_a_worker_cannot_tell_is_said_and_hinders_no_update():
    class Speculative(Worker):
        runner = type("Runner", (First,), {"num_spec_tokens": 3})

    s = Setup(Speculative)
    s.core.add("a", "r", 12)
    run(s.core, 3)
    s.sync()
    with pytest.raises(UserError, match=r"with ended= \(with speculative decoding .* counts too late\)"):
        s.rollout.token_versions("r", 3)
    s.llm.core.workers[0].model_runner = None
    s.sync()
    with pytest.raises(UserError, match="does not see requests; start vLLM with the worker extension"):
        s.rollout.token_versions("r", 3)


def test_requests_are_forgotten_when_many_updates_did_not_find_them():
    from nvfp4_qat.live_tokens import TokenVersions

    tokens = TokenVersions("engine")

    def update(version, **requests):
        counts = {name: [count, count] for name, count in requests.items()}
        told = {"version": version, "before": version - 1 or None, "at": float(version), "why": ""}
        tokens.take([{"rank": 0, "updates": [{**told, "tokens": counts, "preempted": True}]}])

    update(1, short=2, long=2)
    for version in range(2, UPDATES + 1):
        update(version, long=2 * version)
    assert tokens.of("short", 4) == [None] * 2 + [1] * 2
    update(UPDATES + 1, long=40)
    with pytest.raises(UserError, match="was in flight at none"):
        tokens.of("short", 4)
    with pytest.raises(UserError, match="got or left version 1 is not known: it has had 2 to 17 since"):
        tokens.of("short", 4, ended=1)
    found = tokens.of("long", 41)
    assert found[:4] == [None, None, 1, 1] and found[32:] == [UPDATES] * 8 + [UPDATES + 1]


def test_the_last_stage_of_a_pipeline_counts():
    from nvfp4_qat.live_tokens import TokenVersions

    tokens = TokenVersions("engine")
    told = {"version": 1, "before": None, "at": 1.0, "why": "", "preempted": True}
    updates = [{"rank": rank, "updates": [{**told, "tokens": {"r": [n, n]}}]} for rank, n in ((1, 7), (0, 6))]
    tokens.take(updates)
    assert tokens.of("r", 8) == [None] * 7 + [1]


def test_the_clock_of_an_update_is_that_of_the_scheduler_s_machine():
    from nvfp4_qat.live_tokens import TokenVersions

    tokens = TokenVersions("engine")
    told = {"version": 1, "before": None, "why": "", "preempted": True, "tokens": {}}
    tokens.take([{"rank": rank, "updates": [{**told, "at": at}]} for rank, at in ((1, 5.0), (0, 100.0))])
    assert tokens.of("r", 2, times=(98.0, 99.0)) == [None] * 2
    assert tokens.of("r", 2, times=(101.0, 102.0)) == [1] * 2


def test_an_engine_in_this_process_is_asked_for_what_its_scheduler_took():
    """Its last step may be under way when it is paused; what that samples is dropped."""
    s = Setup()
    s.core.add("a", "r", 12)
    s.core.add("b", "s", 12)
    run(s.core, 3)
    requests = {r.name: SimpleNamespace(num_output_tokens=2) for r in s.core.running if r.name.startswith("r")}
    inner = SimpleNamespace(scheduler=SimpleNamespace(requests=requests))

    class InProcess(LLM):
        @property
        def llm_engine(self):
            return SimpleNamespace(**vars(super().llm_engine), engine_core=SimpleNamespace(engine_core=inner))

    s.llm.__class__ = InProcess
    s.sync()
    assert s.rollout.token_versions("r", 4) == [None] * 2 + [1] * 2
    assert s.rollout.token_versions("s", 4) == [None] * 3 + [1]


def test_a_coroutine_asks_while_its_loop_goes_on():
    model, plan = trainer(1)

    async def main():
        llm = AsyncLLM(packed(0))
        rollout = await Rollout.connect_async(llm, plan, in_flight="keep", timeout=20)
        llm.core.do(setattr, llm.core, "budget", 3)
        answer = await llm._do("add", llm.core.add_now, "a", "r", 8)
        while llm.core.budget:
            await asyncio.sleep(0.001)
        await rollout.sync_async(model)
        llm.core.do(setattr, llm.core, "budget", None)
        made = whole(await asyncio.wait_for(asyncio.wrap_future(answer), 20), OF_VERSION)
        assert rollout.token_versions("r", 8) == made == [None] * 3 + [1] * 5

    asyncio.run(main())
