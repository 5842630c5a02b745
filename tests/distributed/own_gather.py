"""The main cases once more, with an all-gather of our own.

Where a unit is large, its packed bytes do not pass through FSDP2's buffers but are gathered beside them
(`nvfp4_qat.gather_unit`). The models of these tests are small, so that is forced here; and in some cases, that what
FSDP2 gathers besides is too much to be copied. Others go FSDP2's general way, as in versions of torch that
`nvfp4_qat.gather_param` does not know.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from helpers_distributed import Env, again

from distributed import experts, features, hsdp, misuse, sync, traffic, training
from distributed.pair import keeping
from nvfp4_qat import gather_groups, gather_param, gather_unit

HERE = sys.modules[__name__]
OWN = "-own-gather"
APART = "-two-gathers"
GENERAL = "-general-protocol"
KEPT = "-kept"


def forced(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(env: Env, **arguments: Any) -> None:
        with mock.patch.object(gather_unit, "WORTH", 0):
            function(env, **arguments)

    return run


def apart(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(env: Env, **arguments: Any) -> None:
        with mock.patch.object(gather_unit, "WORTH", 0), mock.patch.object(gather_groups, "ROOM", 0):
            function(env, **arguments)

    return run


def general(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(env: Env, **arguments: Any) -> None:
        with mock.patch.object(gather_param, "COMPARED", ()):
            function(env, **arguments)

    return run


def kept(function: Callable[..., None]) -> Callable[..., None]:
    """What was gathered stays until the optimizer's step."""

    @functools.wraps(function)
    def run(env: Env, **arguments: Any) -> None:
        with keeping():
            function(env, **arguments)

    return run


def one_of(*names: str) -> Callable[[str], bool]:
    return lambda name: any(name == n or name.startswith(f"{n}[") for n in names)


TRAINING = {
    "fp32", "bf16", "mixed", "one-unit", "unit-per-layer", "units-of-two-modules", "weights-at-the-root-too", "reshard",
    "never-reshard", "offload", "uneven", "uneven-mixed",
}  # fmt: skip
again(
    training, 2, HERE, forced, OWN, lambda name: name in {f"trains_as_module_mode[{variant}]" for variant in TRAINING}
)
again(training, 2, HERE, forced, OWN, one_of("gradient_accumulation[last]", "global_scales_move", "frozen_weights"))
again(training, 2, HERE, forced, OWN, one_of("evaluation_between_steps", "a_policy_and_its_frozen_reference"))
again(features, 2, HERE, forced, OWN, one_of("explicit_unshard", "explicit_prefetching", "unshard_across_a_step"))
again(features, 2, HERE, forced, OWN, one_of("activation_checkpointing[wrapped-layers]", "custom_all_gather"))
again(features, 2, HERE, forced, OWN, one_of("memory_from_the_process_group"))
again(traffic, 2, HERE, forced, OWN, one_of("bytes_gathered[mixed]", "bytes_gathered[unit-per-layer]"))
again(traffic, 2, HERE, forced, OWN, one_of("nothing_unsharded_stays[mixed]", "steps_allocate_no_more_than_they_free"))
again(traffic, 2, HERE, forced, OWN, one_of("gathered_bytes_are_freed", "one_reduction_and_one_packing_a_step[plain]"))
again(misuse, 2, HERE, forced, OWN, one_of("a_bad_value_on_one_rank[nan-rank-1]", "an_error_inside_the_forward"))
again(experts, 2, HERE, forced, OWN, one_of("experts_implementations[grouped_mm-3]", "experts_in_units_of_their_own"))
again(sync, 2, HERE, forced, OWN, one_of("streams[mixed]", "a_stream_between_forward_and_backward"))
again(
    hsdp,
    4,
    HERE,
    forced,
    OWN,
    one_of("two_replicas_of_two_shards[mixed]", "four_shards[uneven]", "bytes_of_two_shards"),
)
again(training, 2, HERE, apart, APART, one_of("trains_as_module_mode[mixed]", "trains_as_module_mode[uneven]"))
again(
    training, 2, HERE, general, GENERAL, one_of("trains_as_module_mode[mixed]", "trains_as_module_mode[uneven-mixed]")
)
again(training, 2, HERE, general, GENERAL, one_of("gradient_accumulation[last]", "frozen_weights"))
again(features, 2, HERE, general, GENERAL, one_of("explicit_unshard", "activation_checkpointing[wrapped-layers]"))
again(traffic, 2, HERE, general, GENERAL, one_of("nothing_unsharded_stays[mixed]"))
again(features, 2, HERE, apart, APART, one_of("explicit_unshard[async]"))
again(training, 2, HERE, kept, KEPT, lambda name: name in {f"trains_as_module_mode[{variant}]" for variant in TRAINING})
again(training, 2, HERE, kept, KEPT, one_of("gradient_accumulation[last]", "global_scales_move", "frozen_weights"))
again(features, 2, HERE, kept, KEPT, one_of("optimizer_in_backward"))
again(training, 2, HERE, kept, KEPT, one_of("evaluation_between_steps", "a_policy_and_its_frozen_reference"))
again(features, 2, HERE, kept, KEPT, one_of("explicit_unshard", "explicit_prefetching", "unshard_across_a_step"))
again(
    features, 2, HERE, kept, KEPT, one_of("activation_checkpointing[wrapped-layers]", "memory_from_the_process_group")
)
again(traffic, 2, HERE, kept, KEPT, one_of("one_reduction_and_one_packing_a_step[plain]"))
again(misuse, 2, HERE, kept, KEPT, one_of("a_bad_value_on_one_rank[nan-rank-1]", "an_error_inside_the_forward"))
again(experts, 2, HERE, kept, KEPT, one_of("experts_implementations[grouped_mm-3]"))
again(sync, 2, HERE, kept, KEPT, one_of("a_stream_between_forward_and_backward"))
again(hsdp, 4, HERE, kept, KEPT, one_of("two_replicas_of_two_shards[mixed]", "four_shards[uneven]"))
