"""Gather mode trains as module mode does: the same outputs, gradients and master weights, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from helpers_distributed import Env, case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import nvfp4_qat as nq
from distributed.instruments import Collectives, packing
from distributed.models import WIDTH, Decoder, decoder, uneven
from distributed.pair import (
    MIXED,
    ON,
    MakeOptimizer,
    Pair,
    Units,
    adamw,
    batch,
    full,
    layers,
    linears,
    loss_of,
    nothing,
    same,
    same_stream,
    shard,
)

BF16 = functools.partial(decoder, dtype=torch.bfloat16)
AMAX = nq.QATConfig(enable=True, global_scale="amax")


OUTPUT = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)


def root_casts_output(model: Decoder, units: Units, mp_policy: MixedPrecisionPolicy, **options: Any) -> nn.Module:
    """The root's output is cast, those of its layers are not: they would reach the head in fp32."""
    for unit in units(model):
        fully_shard(unit, mp_policy=MIXED, **options)
    return fully_shard(model, mp_policy=mp_policy, **options)


def grouped(model: Decoder) -> list[list[nn.Module]]:
    """One unit of two modules in each layer; the rest belongs to the root."""
    return [[layer.mlp, layer.self_attn] for layer in model.layers]


def attention_only(model: Decoder) -> list[nn.Module]:
    """The root holds quantized weights as well as its own."""
    return [layer.self_attn for layer in model.layers]


@case(
    2,
    setup={
        "fp32": {},
        "bf16": {"make": BF16},
        "mixed": {"policy": MIXED},
        "mixed-reduced-in-bf16": {"policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        "bf16-reduced-in-fp32": {"make": BF16, "policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)},
        "output-dtype": {"policy": OUTPUT, "wrap": root_casts_output},
        "inputs-not-cast": {"policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)},
        "bias": {"make": functools.partial(decoder, bias=True), "policy": MIXED},
        "amax-scales": {"config": AMAX, "policy": MIXED},
        "one-unit": {"units": nothing, "policy": MIXED},
        "unit-per-layer": {"units": linears},
        "units-of-two-modules": {"units": grouped, "policy": MIXED},
        "weights-at-the-root-too": {"units": attention_only},
        "reshard": {"reshard_after_forward": True},
        "never-reshard": {"reshard_after_forward": False, "policy": MIXED},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False), "policy": MIXED},
        "uneven": {"make": uneven},
        "uneven-bf16": {"make": functools.partial(uneven, dtype=torch.bfloat16)},
        "uneven-mixed": {"make": uneven, "policy": MIXED, "units": linears},
    },
)
def trains_as_module_mode(env: Env, **setup: object) -> None:
    pair = Pair(env, **setup)
    pair.compare_forward("output before the first step")
    for _ in range(3):
        pair.step()
    pair.compare_forward("output after the last step")


@case(1, setup={"fp32": {}, "bf16": {"make": BF16}, "mixed": {"policy": MIXED, "units": linears}})
def one_process(env: Env, **setup: object) -> None:
    """A group of one rank: nothing is sent, all the rest is the same."""
    trains_as_module_mode(env, **setup)
    pair = Pair(env, **setup)
    with Collectives() as seen:
        for _ in range(2):
            pair.step(micros=2)
    assert seen.gathered() == 0
    masters = pair.twin.model.state_dict()
    for name, tensor in get_model_state_dict(pair.model, options=StateDictOptions(full_state_dict=True)).items():
        assert type(tensor) is Tensor
        same(tensor, masters[name], name)
    single = decoder(dtype=pair.plain.norm.weight.dtype).to(env.device)
    single.load_state_dict(masters)
    nq.apply_qat(single, ON)
    same_stream(nq.packed_weights(pair.model), nq.packed_weights(single))


AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


@case(
    2,
    optimizer={
        "adamw-for-loop": functools.partial(AdamW, lr=2e-2, foreach=False),
        "adamw-foreach": functools.partial(AdamW, lr=2e-2, foreach=True),
        "adamw-fused": functools.partial(AdamW, lr=2e-2, fused=True),
        "sgd-for-loop": functools.partial(SGD, lr=1.0, momentum=0.9, foreach=False),
        "sgd-foreach": functools.partial(SGD, lr=1.0, foreach=True),
    },
)
def optimizers(env: Env, optimizer: object) -> None:
    pair = Pair(env, optimizer=optimizer)
    before = full(pair.parameters()["layers.0.mlp.up_proj.weight"])
    for _ in range(3):
        pair.step()
    assert not torch.equal(before, full(pair.parameters()["layers.0.mlp.up_proj.weight"]))


@case(2)
def global_scales_move(env: Env) -> None:
    """Weights grow and shrink by powers of two between steps, in one layer, in one rank's rows, and to zero."""
    pair = Pair(env, policy=MIXED)

    def write(change) -> None:
        with torch.no_grad():
            for parameters in (pair.parameters(), dict(pair.twin.model.named_parameters())):
                change(parameters)

    up, q = "layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_proj.weight"
    write(lambda p: p[up].mul_(64.0))
    pair.step()
    write(lambda p: p[up].mul_(1 / 1024))
    write(lambda p: p[q].mul_(3.7))
    pair.step()
    write(lambda p: p[q].zero_())
    pair.step()
    write(lambda p: [t.zero_() for name, t in p.items() if "self_attn" in name])
    pair.compare_forward("output with zero weights")
    pair.step()
    rows = torch.ones(48 * 2, 1, device=env.device)
    rows[:48] = 2.0**12  # those of rank 0: rank 1 learns of it by the reduction alone

    def one_rank(parameters: dict[str, Tensor]) -> None:
        p = parameters[up]
        local = p.to_local() if hasattr(p, "to_local") else p
        if env.rank == 0 or local is p:
            local[:48].mul_(2.0**12)

    write(one_rank)
    nq.refresh(pair.model)  # a write to one rank's shard is not a symmetric event: see safety.py
    pair.step()


@case(2, way={"each": {"way": "each"}, "last": {"way": "last"}, "is-last": {"way": "is-last"}})
def gradient_accumulation(env: Env, way: str) -> None:
    """Three micro-batches a step, reduced each, or once at the end, or with everything kept unsharded until the end."""
    for policy in (MIXED, MixedPrecisionPolicy()):
        pair = Pair(env, policy=policy)
        for _ in range(2):
            outputs = []
            for micro in range(3):
                pair.model.set_requires_gradient_sync(way == "each" or micro == 2)
                pair.model.set_is_last_backward(way == "each" or micro == 2)
                if way == "is-last":
                    pair.model.set_reshard_after_backward(micro == 2)
                out = pair.model(pair.inputs(micro)[env.rank])
                loss_of(out).backward()
                outputs.append(out.detach())
            if way == "each":
                expected, total = pair.expect([[0], [1], [2]])
            else:
                expected, total = accumulated(pair)
            for found, wanted in zip(outputs, expected, strict=True):
                same(found, wanted, "output of a micro-batch")
            pair.compare_gradients(total)
            pair.update()


def accumulated(pair: Pair) -> tuple[list[Tensor], dict[str, Tensor]]:
    """As `Pair.expect` for gradients reduced once: FSDP2 keeps what is not reduced yet in the reduce dtype."""
    outputs: list[Tensor] = []
    ranks: list[dict[str, Tensor]] = []
    dtype = pair.twin.policy.reduce_dtype
    for rank in range(pair.env.world):
        kept: dict[str, Tensor] = {}
        for micro in range(3):
            outs, grads = pair.twin.gradients([pair.inputs(micro)[rank]])
            outputs += outs if rank == pair.env.rank else []
            for name, grad in grads.items():
                grad = grad.to(dtype or grad.dtype)
                kept[name] = kept[name] + grad if name in kept else grad
        ranks.append(kept)
    return outputs, pair.twin.reduce(ranks)


@case(2, norm={"inf": {"norm": float("inf")}, "2": {"norm": 2.0}})
def gradient_clipping(env: Env, norm: float) -> None:
    pair = Pair(env, policy=MIXED, optimizer=functools.partial(SGD, lr=1.0, foreach=True))

    def clip() -> None:
        total = nn.utils.clip_grad_norm_(pair.model.parameters(), 1e-2, norm_type=norm)
        expected = nn.utils.clip_grad_norm_(pair.twin.model.parameters(), 1e-2, norm_type=norm)
        assert float(expected) > 2e-2, "nothing to clip"
        if norm == float("inf"):
            same(full(total), expected, "norm")  # the largest of all is the largest of the ranks' largest
            for name, p in pair.twin.model.named_parameters():
                same(full(pair.parameters()[name].grad), p.grad, f"clipped gradient of {name}")
        else:
            # A sum of n squares in fp32, added up in two halves: relative error below n · 2^-24 either way, and a root
            # halves it. n is 40,000; measured 1e-7.
            torch.testing.assert_close(full(total), expected, rtol=1e-5, atol=0.0)
            pair.twin.give({name: full(p.grad) for name, p in pair.parameters().items()})

    for _ in range(3):
        pair.step(before=clip)


@case(2)
def frozen_weights(env: Env) -> None:
    """Some quantized weights do not train; one layer as a whole does not."""

    def freeze(model: Decoder) -> None:
        model.layers[0].requires_grad_(False)
        for layer in model.layers:
            layer.mlp.gate_proj.weight.requires_grad_(False)
            layer.self_attn.v_proj.weight.requires_grad_(False)

    pair = Pair(env, policy=MIXED, prepare=freeze)
    assert not pair.parameters()["layers.0.mlp.up_proj.weight"].requires_grad
    for _ in range(3):
        pair.step()
    pair.parameters()["layers.1.mlp.gate_proj.weight"].requires_grad_(True)  # thawed in the middle
    pair.twin.model.layers[1].mlp.gate_proj.weight.requires_grad_(True)
    if pair.twin.compute is not pair.twin.model:
        pair.twin.compute.layers[1].mlp.gate_proj.weight.requires_grad_(True)
    pair.step()


@case(2)
def an_optimizer_for_a_part(env: Env) -> None:
    """Two optimizers, each for some weights of the same fusion groups, that step at different times."""

    class Both(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
            parameters = list(parameters)
            self.parts = [adamw(parameters[::2]), adamw(parameters[1::2])]
            self.turn = 0

        def step(self, closure: None = None) -> None:
            self.turn += 1
            self.parts[self.turn % 2].step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            for part in self.parts:
                part.zero_grad(set_to_none)

    pair = Pair(env, units=linears, optimizer=Both)
    for _ in range(4):
        pair.step()


@case(2, mode={"no_grad": {"mode": torch.no_grad}, "inference_mode": {"mode": torch.inference_mode}})
def evaluation_between_steps(env: Env, mode: type[torch.no_grad]) -> None:
    """The first forward after each step, the one that packs, runs without gradients.

    Not the first of all in inference mode: what FSDP2 allocates in that one cannot be trained with afterwards.
    """
    pair = Pair(env, policy=MIXED)
    for step in range(3):
        pair.model.eval()
        x = pair.inputs(micro=5)[env.rank]
        with mode() if step else torch.no_grad():
            found = pair.model(x)
        same(found.clone(), pair.twin(x).detach(), "output in evaluation")
        pair.model.train()
        pair.step(micros=2)


@case(2)
def nothing_but_inference(env: Env) -> None:
    pair = Pair(env, policy=MIXED)
    for _ in range(2):
        x = pair.inputs()[env.rank]
        with torch.inference_mode():
            found = pair.model(x)
        same(found.clone(), pair.twin(x).detach(), "output in inference mode")
        pair.count += 1


@case(2)
def a_policy_and_its_frozen_reference(env: Env) -> None:
    """Two models in gather mode in one process do not disturb each other."""
    policy, reference = Pair(env, policy=MIXED), Pair(env, policy=MIXED)
    for _ in range(2):
        policy.step()
        reference.compare_forward("output of the reference model")
    reference.step()
    policy.compare_forward()


@case(2)
def a_layer_used_twice(env: Env) -> None:
    class Twice(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.layers[0](x))

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Twice()

    pair = Pair(env, make=make, policy=MIXED, units=linears)
    for _ in range(2):
        pair.step()


def trainable_only(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return adamw([p for p in parameters if p.requires_grad])


@case(2, optimizer={"trainable": trainable_only, "all": adamw})
def adapters_on_a_frozen_base(env: Env, optimizer: MakeOptimizer) -> None:
    """LoRA attached before apply_qat: the base is packed once, whatever the adapters do and the optimizer was given."""
    from peft import LoraConfig, get_peft_model

    class Output(nn.Module):  # PEFT wants a model, not a function of one tensor only
        def __init__(self) -> None:
            super().__init__()
            self.model = decoder()
            self.config = {"model_type": "none"}

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        return get_peft_model(Output(), config)

    def units(model: nn.Module) -> list[nn.Module]:
        return list(model.base_model.model.model.layers)

    pair = Pair(env, make=make, units=units, optimizer=optimizer)
    assert pair.plan.quantized, "nothing is quantized"
    assert sum(p.requires_grad for p in pair.model.parameters()) == 2 * 3 * 2
    pair.compare_forward()
    with packing() as sizes:
        for _ in range(2):
            out = pair.model(pair.inputs()[env.rank])
            loss_of(out).backward()
            pair.optimizer.step()
            pair.optimizer.zero_grad()
    assert not sizes, f"a frozen base was packed again: {len(sizes)} times"
    trained = Pair(env, make=make, units=units, optimizer=optimizer)
    for _ in range(3):
        trained.step()


@case(2)
def weights_loaded_after_meta(env: Env) -> None:
    """apply_qat and fully_shard on the meta device, then to_empty and a load."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = Decoder()
    nq.apply_qat(model, ON, gather="nvfp4")
    shard(model, layers, mesh=env.mesh(), mp_policy=MIXED)
    model.to_empty(device=env.device)
    state = decoder(seed=3).to(env.device).state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if env.rank == 0 else {}, options=options)
    pair = Pair(env, make=functools.partial(decoder, seed=3), policy=MIXED)
    x = batch(env.rank, 0, env.device, (2, 5, WIDTH))
    same(model(x).detach(), pair.twin(x).detach(), "output after loading")
    loss_of(model(x)).backward()
    optimizer = adamw(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    pair.step()
    pair.model, pair.optimizer = model, optimizer
    pair.compare_masters()
    pair.step()
