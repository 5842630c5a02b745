"""Updates of a model that is up: complete, in place and as if started anew."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from helpers_live import NEW, OLD, Bare, Up, bits, up, without
from standin_engine import Model, Stage, announced, checkpoint, fused, start
from standin_layers import ALONE, BF16, EXPERTS, HIDDEN, VOCAB, Embedding, Method, Place

from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_recipe import Incoming, Part

TOKENS = torch.arange(VOCAB)
SPLIT = [Place(r, 2) for r in range(2)]
EXPERT_SPLIT = [Place(0, 1, r, 2) for r in range(2)] + [Place(1, 2, 1, 4)]


def methods(model):
    return {name: layer.quant_method for name, layer in model.named_modules() if hasattr(layer, "quant_method")}


@pytest.mark.parametrize("together", [False, True], ids=["experts apart", "experts in one"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("place", [ALONE, *SPLIT], ids=str)
def test_an_update_gives_what_a_fresh_model_has_at_the_addresses_of_before(place, tied, together):
    engine, rng = up(place, tied), random.Random(1)
    for seed in (2, 3, 1, 4):
        weights = checkpoint(seed, tied)
        engine.update(*(fused(weights) if together else (weights,)), rng=rng)
        engine.check(weights)


@pytest.mark.parametrize("together", [False, True], ids=["experts apart", "experts in one"])
@pytest.mark.parametrize("number", range(2))
def test_pipeline_stages_take_the_layers_that_they_have(number, together):
    engine = Up(partial(Stage, number), checkpoint(1, False))
    for seed in (2, 3):
        weights = checkpoint(seed, False)
        engine.update(*(fused(weights) if together else (weights,)))
        engine.check(weights)
    mine = f"layers.{number}.norm.weight"
    for name, named in ((mine, f"{mine}: nothing brings it"), ("layers.2.bias", "layers.2.bias: the engine has no")):
        entries = [e for e in announced(weights) if e.name != name]
        entries += [Incoming(name, (3,), BF16, (Part(name),))] if name != mine else []
        with pytest.raises(MismatchError, match=named):
            engine.live.begin(entries)


@pytest.mark.parametrize("place", EXPERT_SPLIT, ids=str)
def test_ranks_take_their_experts_from_tensors_of_all(place):
    engine = up(place)
    for seed in (2, 3):
        engine.update(*fused(checkpoint(seed)))
        engine.check(checkpoint(seed))


@pytest.mark.parametrize("place", EXPERT_SPLIT, ids=str)
def test_ranks_take_their_experts_from_tensors_of_one(place):
    engine = up(place)
    for seed in (2, 3):
        engine.update(checkpoint(seed))
        engine.check(checkpoint(seed))


def test_captured_graphs_compute_with_the_new_weights():
    engine, fresh = up(), Model()
    start(fresh, NEW)
    before = engine.graph.replay(TOKENS)
    assert torch.equal(before, engine.model(TOKENS)) and not torch.equal(before, fresh(TOKENS))
    engine.update(NEW)
    assert torch.equal(engine.graph.replay(TOKENS), fresh(TOKENS))
    assert torch.equal(engine.model(TOKENS), fresh(TOKENS))


def test_every_operand_was_renewed_so_that_the_comparisons_say_something():
    engine = up(tied=False)
    before = {name: bits(t) for name, t in engine.model.operands().items()}
    engine.update(checkpoint(2, False))
    same = {name for name, t in engine.model.operands().items() if bits(t) == before[name]}
    inputs = [f"{part}_input_{kind}" for part in ("w13", "w2") for kind in ("scale", "global_scale")]
    assert same == {
        *(f"layers.1.experts:{name}" for name in ["expert_map", *inputs]),
        *(f"layers.{i}.attn:cache_scale" for i in range(2)),
    }


def test_locks_and_helper_objects_are_left_alone():
    engine = up()
    locks = {name: layer.workspace for name, layer in engine.model.named_modules() if hasattr(layer, "workspace")}
    helpers = {name: (method, method.config) for name, method in methods(engine.model).items()}
    assert len(locks) == 9
    for lock in locks.values():
        lock.fill_(7)
    engine.update(NEW)
    for name, lock in locks.items():
        assert engine.model.get_submodule(name).workspace is lock and lock.tolist() == [7] * 4
    for name, method in methods(engine.model).items():
        assert (method, method.config) == helpers[name] and method.config is helpers[name][1]


@pytest.mark.parametrize("rank", range(4))
def test_vocabularies_are_padded_with_zeros_also_where_a_rank_has_nothing_else(rank):
    engine = Up(lambda: Bare(embed=Embedding(Place(rank, 4))), {"embed.weight": OLD["embed.weight"]})
    for seed in (2, 3, 4):
        engine.model.embed.weight[-1] = 5.0
        weights = {"embed.weight": checkpoint(seed)["embed.weight"]}
        engine.update(weights)
        engine.check(weights)
        assert not engine.model.embed.weight[max(0, VOCAB - 8 * rank) :].any()


def inputs(more):
    """Optional scales of the experts' inputs."""
    parts = ("gate_proj", "up_proj", "down_proj")
    names = [f"layers.1.experts.{e}.{part}.input_global_scale" for e in range(EXPERTS) for part in parts]
    return {name: torch.tensor([more + i]) for i, name in enumerate(names)}


def test_optional_parameters_stay_what_they_were():
    engine, old, others = Up(Model, OLD | inputs(1.0)), inputs(1.0), inputs(20.0)
    for weights, now in ((NEW, NEW | old), (OLD | others, OLD | others), (NEW, NEW | others)):
        engine.update(weights)
        engine.check(now)
    engine.live.begin(announced(OLD | old))
    engine.live.load(old.items())
    engine.update(OLD)
    engine.check(OLD | others)


def test_tensors_are_taken_in_any_form_and_their_memory_may_be_used_again():
    engine, buffer = up(), torch.empty(1 << 16, dtype=torch.uint8)

    def stream():
        for i, (name, tensor) in enumerate(NEW.items()):
            if tensor.dim() > 1 and i % 2:  # every second element of something else
                yield name, torch.stack((tensor, tensor), -1)[..., 0]
                continue
            held = buffer[64 * i : 64 * i + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            yield name, held.copy_(tensor)
            buffer.fill_(0x55)

    engine.live.begin(announced(NEW))
    engine.live.load(stream())
    engine.live.commit()
    engine.check(NEW)


def test_tensors_are_found_in_buckets():
    engine, at, places = up(), 0, {}
    for name, tensor in NEW.items():
        places[name], at = at, at + -(-tensor.nbytes // 16) * 16
    bucket = torch.empty(at, dtype=torch.uint8)
    engine.live.begin(announced(NEW))
    for name, tensor in NEW.items():
        engine.live.view(name, bucket, places[name]).copy_(tensor)
    engine.live.load((name, engine.live.view(name, bucket, at)) for name, at in places.items())
    for name, byte in (("norm.weight", at), ("norm.weight", 8), ("new.weight", 0)):
        with pytest.raises(MismatchError, match=name):
            engine.live.view(name, bucket, byte)
    engine.live.commit()
    engine.check(NEW)
    with pytest.raises(UserError, match="begin first"):
        engine.live.view("norm.weight", bucket, 0)


def in_rows(live, weights, rng):
    """Tensors cut into ranges of rows, all of them in random order."""
    pieces = []
    for name, tensor in weights.items():
        cuts = sorted({0, *(rng.randrange(len(tensor)) for _ in range(3)), len(tensor)})
        pieces += [(name, a, tensor[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    rng.shuffle(pieces)
    for piece in pieces:
        live.load_rows(*piece)
    return len(pieces)


@pytest.mark.parametrize("together", [False, True], ids=["experts apart", "experts in one"])
@pytest.mark.parametrize("place", [ALONE, SPLIT[1], EXPERT_SPLIT[1], EXPERT_SPLIT[2]], ids=str)
def test_tensors_may_come_in_ranges_of_rows(place, together):
    engine, rng = up(place), random.Random(1)
    for seed in (2, 3):
        weights, entries = fused(checkpoint(seed)) if together else (checkpoint(seed), announced(checkpoint(seed)))
        engine.live.begin(entries)
        assert in_rows(engine.live, weights, rng) > 2 * len(weights)
        engine.live.commit()
        engine.check(checkpoint(seed))


def test_one_tensor_may_bring_weights_of_several_layers():
    names = [f"layers.{i}.norm.weight" for i in range(2)]
    entries = announced(without(NEW, *names))
    entries.append(Incoming("norms", (2, HIDDEN), BF16, (Part("layers.{}.norm.weight", 0, 2),)))
    engine = up()
    engine.update(without(NEW, *names) | {"norms": torch.stack([NEW[name] for name in names])}, entries)
    engine.check(NEW)


def test_numbers_are_converted_as_loaders_do_it():
    name, engine = "layers.1.router.weight", up()
    for seed in (2, 3):
        wide = checkpoint(seed)[name].float() * 1.001
        engine.update(checkpoint(seed) | {name: wide})
        engine.check(checkpoint(seed) | {name: wide.to(BF16)})


def test_loaders_run_for_the_first_update_only():
    engine, calls = up(), []
    load = engine.model.load_weights
    engine.model.load_weights = lambda weights: calls.append(1) or load(weights)
    for weights in (NEW, OLD):
        engine.update(weights)
        engine.check(weights)
        assert len(calls) == 1


def test_layers_whose_processing_does_nothing_are_loaded_directly():
    engine, processed = up(), []
    process = engine.code.process
    engine.code.process = lambda layer: processed.append(type(layer.quant_method)) or process(layer)
    engine.update(NEW)
    assert processed.count(Method) >= 3
    processed.clear()
    engine.update(OLD)
    engine.check(OLD)
    assert len(processed) == 9 + engine.live.quick.proved  # once more with made-up numbers
    assert Method not in processed

    engine.live.begin(announced(NEW))
    for name in ("embed.weight", "layers.1.router.weight", "layers.0.norm.weight"):
        engine.live.load([(name, NEW[name])])
        assert torch.equal(engine.model.get_parameter(name)[: len(NEW[name])], NEW[name])
    assert not engine.live.whole


def test_scales_of_the_kv_cache_stay_as_they_were_measured():
    """vLLM's attention sets them to 1 when it is loaded, and to what it measures on the first tokens."""
    engine, layer = up(), None
    for name in ("layers.0.attn", "layers.1.attn"):
        layer = engine.model.get_submodule(name)
        assert layer.cache_scale.item() == 1.0 == layer.cache_scale_float
        layer.cache_scale.fill_(0.25)
        layer.cache_scale_float = 0.25
    measured, scale = layer.cache_scale.data_ptr(), layer.cache_scale
    for weights in (NEW, OLD):
        engine.update(weights)
        assert engine.live.whole
        assert layer.cache_scale is scale and scale.data_ptr() == measured
        assert scale.item() == 0.25 == layer.cache_scale_float
