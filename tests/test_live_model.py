"""Updates of a model that is up: complete, in place and as if started anew; or given up, and then healed."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from helpers_live import Bare, Up, bits, without
from standin_engine import Model, Stage, announced, checkpoint, fused, start
from standin_layers import ALONE, BF16, EXPERTS, HIDDEN, VOCAB, Embedding, Method, Place, fixed

from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_recipe import Incoming, Part

TOKENS = torch.arange(VOCAB)
OLD, NEW = checkpoint(1), checkpoint(2)
SPLIT = [Place(r, 2) for r in range(2)]
EXPERT_SPLIT = [Place(0, 1, r, 2) for r in range(2)] + [Place(1, 2, 1, 4)]


def up(place=ALONE, tied=True):
    return Up(partial(Model, place, tied), OLD if tied else checkpoint(1, False))


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


def test_rows_that_do_not_fit_or_come_again_are_refused_and_the_update_goes_on():
    engine, name = up(), "layers.0.down_proj.weight_packed"
    packed = NEW[name]
    engine.live.begin(announced(NEW))
    for first, rows in ((-1, packed[:2]), (31, packed[:2]), (0, packed[:, 1:]), (0, packed[:0]), (0, packed.int())):
        with pytest.raises(MismatchError, match=rf"{name} was announced as torch.uint8 \[32, 16\]; its rows from"):
            engine.live.load_rows(name, first, rows)
    engine.live.load_rows(name, 8, packed[8:20])
    for first, stop in ((0, 9), (19, 32), (10, 12), (8, 20)):
        with pytest.raises(MismatchError, match=f"some rows of {name} from {first} to {stop - 1} have come before"):
            engine.live.load_rows(name, first, packed[first:stop])
    with pytest.raises(MismatchError, match=f"some rows of {name} have come before"):
        engine.live.load([(name, packed)])
    engine.live.load(without(NEW, name).items())
    with pytest.raises(MismatchError, match=rf"1 tensors have not come: {name} \(not all of it\)"):
        engine.live.commit()
    engine.live.load_rows(name, 20, packed[20:])
    engine.live.load_rows(name, 0, packed[:8])
    with pytest.raises(MismatchError, match=f"{name} has come before"):
        engine.live.load_rows(name, 0, packed[:8])
    engine.live.commit()
    engine.check(NEW)


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


# Mistakes while an update goes on


def test_nothing_is_taken_before_an_update_begins():
    engine = up()
    for call in (lambda: engine.live.load([]), engine.live.commit):
        with pytest.raises(UserError, match="begin first"):
            call()
    engine.update(NEW)
    with pytest.raises(UserError, match="begin first"):
        engine.live.load(NEW.items())
    engine.check(NEW)


def test_tensors_that_are_not_those_announced_are_refused_and_the_update_goes_on():
    engine, first = up(), "layers.0.q_proj.weight_scale"
    scale, before = NEW[first], engine.everything()
    engine.live.begin(announced(NEW))
    for wrong, message in [
        ({"layers.0.new.weight": scale}, "layers.0.new.weight was not announced"),
        ({first: scale[:-1]}, rf"{first} was announced as torch.float8_e4m3fn \[32, 2\] and is .* \[31, 2\]"),
        ({first: scale.view(torch.uint8)}, f"{first} was announced as .* and is torch.uint8"),
        ({first: scale.float()}, f"{first} was announced as .* and is torch.float32"),
    ]:
        with pytest.raises(MismatchError, match=message):
            engine.live.load(wrong.items())
    assert engine.everything() == before and engine.live.updating
    engine.live.load([(first, scale)])
    with pytest.raises(MismatchError, match=f"{first} has come before"):
        engine.live.load([(first, scale)])
    with pytest.raises(MismatchError, match=f"{len(NEW) - 1} tensors have not come: .* and {len(NEW) - 21} more"):
        engine.live.commit()
    engine.live.load(without(NEW, first, "norm.weight").items())
    with pytest.raises(MismatchError, match="1 tensors have not come: norm.weight$"):
        engine.live.commit()
    assert not engine.live.whole and engine.live.updating
    engine.live.load([("norm.weight", NEW["norm.weight"])])
    engine.live.commit()
    engine.check(NEW)


@pytest.mark.parametrize("how", ["begin", "abandon", "refused"])
def test_an_update_that_is_given_up_leaves_a_mixture_and_the_next_one_heals(how):
    engine, names, third = up(), list(NEW), checkpoint(3)
    engine.live.begin(announced(NEW))
    assert engine.live.whole
    engine.live.load([(name, NEW[name]) for name in names[::2]])
    assert not engine.live.whole and engine.live.updating
    if how == "abandon":
        engine.live.abandon()
    elif how == "refused":
        with pytest.raises(MismatchError):
            engine.live.begin(announced(without(NEW, "norm.weight")))
    assert engine.live.updating == (how == "begin")
    if how != "begin":
        with pytest.raises(UserError):
            engine.live.commit()
    engine.live.begin(announced(third))
    engine.live.load([(name, third[name]) for name in names[1::2]])
    with pytest.raises(MismatchError, match="have not come"):
        engine.live.commit()
    assert not engine.live.whole
    engine.live.load([(name, third[name]) for name in names[::2]])
    engine.live.commit()
    engine.check(third)


def test_processing_that_gives_another_form_names_the_layer_and_ends_the_update():
    engine, name = up(), "layers.0.gate_up_proj"
    before, process = engine.everything(), engine.code.process
    widths = engine.model.get_submodule(name).widths

    def longer(twin):
        process(twin)
        if twin.widths is widths:
            twin.weight = fixed(torch.cat((twin.weight, twin.weight)))

    engine.code.process = longer
    parts = {n: t for n, t in NEW.items() if n.startswith(("layers.0.gate_proj", "layers.0.up_proj"))}
    engine.live.begin(announced(NEW))
    with pytest.raises(
        MismatchError, match=rf"{name} does not come out as .*weight was int32\[4, 80\] and is int32\[8"
    ):
        engine.live.load(parts.items())
    assert engine.everything() == before
    assert not engine.live.whole and not engine.live.updating
    with pytest.raises(UserError):
        engine.live.commit()
    engine.code.process = process
    engine.update(NEW)
    engine.check(NEW)


def test_attention_that_gives_another_form_is_named():
    engine = up()
    derive = engine.code.derive
    engine.code.derive = lambda layer: derive(layer) or setattr(layer, "w_uv", layer.w_uv[:, 1:])
    with pytest.raises(MismatchError, match="layers.0.attn does not come out .*w_uv was"):
        engine.update(NEW)
    assert not engine.live.whole and not engine.live.updating
    engine.code.derive = derive
    engine.update(NEW)
    engine.check(NEW)


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


def test_an_update_in_which_processing_raised_is_given_up():
    engine, failed = up(), []
    process = engine.code.process

    def out_of_memory(twin):
        if not failed and twin.quant_method.config is not None:
            failed.append(twin)
            raise torch.OutOfMemoryError("CUDA out of memory")
        process(twin)

    engine.code.process = out_of_memory
    engine.live.begin(announced(NEW))
    with pytest.raises(torch.OutOfMemoryError):
        engine.live.load(NEW.items())
    assert failed and not engine.live.whole and not engine.live.updating
    engine.update(NEW)
    engine.check(NEW)
