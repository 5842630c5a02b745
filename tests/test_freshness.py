"""Training never computes with a stale 4-bit copy: every way to change a weight, and the check behind them all."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import stack
from torch import nn

import nvfp4_qat as nq
from nvfp4_qat.core import pack_from_masters
from nvfp4_qat.qat_module import packed_weights_of

ON = nq.QATConfig(enable=True)


def assert_fresh(model) -> None:
    x = torch.randn(3, 32)
    assert torch.equal(model(x), model.reference(x))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("made", ["before", "after"])
def test_optimizer_steps(name, made):
    model = stack()
    make = OPTIMIZERS[name]
    optimizer = make(model.parameters()) if made == "before" else None
    nq.apply_qat(model, ON)
    optimizer = optimizer or make(model.parameters())
    for _ in range(3):
        old = model.blocks[0].down_proj.weight.detach().clone()
        model(torch.randn(4, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(old, model.blocks[0].down_proj.weight)
        assert_fresh(model)


def half_a_step(model):
    """A step of which half the weights are written when it raises."""
    parameters = list(model.parameters())
    middle = len(parameters) // 2
    groups = [{"params": parameters[:middle]}, {"params": parameters[middle:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    model(torch.randn(4, 32)).sum().backward()
    parameters[-1].grad = parameters[-1].grad.to_sparse()
    return optimizer, RuntimeError


def a_step_and_a_hook_that_raises(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(4, 32)).sum().backward()

    def fails(*_):
        raise KeyError("a hook of the user's")

    optimizer.register_step_post_hook(fails)
    return optimizer, KeyError


@pytest.mark.parametrize("begin", [half_a_step, a_step_and_a_hook_that_raises])
def test_a_step_that_raises_has_written_all_the_same(begin):
    model = stack()
    nq.apply_qat(model, ON)
    optimizer, error = begin(model)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error):
        optimizer.step()
    assert any(not torch.equal(old[name], p) for name, p in model.named_parameters())
    assert_fresh(model)
    list(pack_from_masters(model))


def test_a_hook_of_an_optimizer_sees_the_weights_after_its_step():
    model = stack()
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    called = []

    def pushes(*_):
        assert_fresh(model)
        called.append(dict(nq.packed_weights(model)))

    optimizer.register_step_post_hook(pushes)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert_fresh(model)
    (pushed,) = called
    for name, tensor in nq.packed_weights(model):
        assert torch.equal(tensor.view(torch.uint8), pushed[name].view(torch.uint8)), name


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("after", [1, 8])
def test_a_step_while_weights_are_read_is_an_error(noticed, fused, after):
    model = stack()
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    model(torch.randn(4, 32)).sum().backward()
    if noticed:
        optimizer.step()
    stream = nq.packed_weights(model)
    for _ in range(after):
        next(stream)
    optimizer.step()
    with pytest.raises(nq.MismatchError, match="while packed_weights was being read") as error:
        list(stream)
    assert not isinstance(error.value, nq.StaleWeightsError)
    assert_fresh(model)
    list(nq.packed_weights(model))


def test_a_model_that_moves_leaves_nothing_behind():
    model = stack()
    nq.apply_qat(model, ON)
    model(torch.randn(2, 32))
    model(torch.randn(2, 32))
    masters = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to("meta")
    gc.collect()
    assert all(weight.value is None for weight in packed_weights_of(model))
    assert not any(ref() is not None for ref in masters)
    model.to_empty(device="cpu").load_state_dict(state)
    assert_fresh(model)


def test_an_optimizer_for_some_weights_repacks_their_groups_only():
    model = stack()
    nq.apply_qat(model, ON)
    model(torch.randn(4, 32)).sum().backward()
    block, other = model.blocks
    generation = lambda layer: layer._qat_weights["weight"].generation  # noqa: E731
    before = {n: generation(m) for n, m in model.named_modules() if isinstance(m, nq.QATLinear)}
    torch.optim.SGD([block.gate_proj.weight], lr=0.5).step()
    assert_fresh(model)
    after = {n: generation(m) for n, m in model.named_modules() if isinstance(m, nq.QATLinear)}
    assert {n for n in after if after[n] != before[n]} == {"blocks.0.gate_proj", "blocks.0.up_proj"}


def edit_no_grad(model):
    with torch.no_grad():
        model.blocks[0].up_proj.weight[3] *= 2.0


def edit_data(model):
    model.blocks[0].up_proj.weight.data.mul_(2.0)


def edit_data_add(model):
    model.blocks[0].up_proj.weight.data += 1.0


def assign_data(model):
    model.blocks[0].up_proj.weight.data = torch.randn(48, 32)


def assign_parameter(model):
    model.blocks[0].up_proj.weight = nn.Parameter(torch.randn(48, 32))


def load(model):
    other = stack(seed=1)
    model.load_state_dict(other.state_dict())


def load_assign(model):
    model.load_state_dict(stack(seed=1).state_dict(), assign=True)


def load_layer(model):
    model.blocks[0].up_proj.load_state_dict(stack(seed=1).blocks[0].up_proj.state_dict())


def write_state_dict_alias(model):
    state = model.state_dict()
    state["blocks.0.up_proj.weight"].data.copy_(torch.randn(48, 32))  # what a checkpoint reader may do


def to_empty(model):
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        p.data.copy_(state[name] * 3)


def vector_to_parameters(model):
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat * 1.7, model.parameters())


def twice(model):
    edit_data(model)
    model(torch.randn(1, 32))
    edit_data(model)


EDITS = [
    edit_no_grad, edit_data, edit_data_add, assign_data, assign_parameter, load, load_assign, load_layer,
    write_state_dict_alias, to_empty, vector_to_parameters, twice,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_edits(edit):
    model = stack()
    nq.apply_qat(model, ON)
    assert_fresh(model)
    before = model(torch.ones(1, 32))
    edit(model)
    assert not torch.equal(before, model(torch.ones(1, 32)))
    assert_fresh(model)


def test_a_replaced_parameter_is_watched_like_the_first():
    model = stack()
    nq.apply_qat(model, ON)
    assign_parameter(model)
    assert_fresh(model)
    edit_data(model)
    assert_fresh(model)


def test_weights_may_be_loaded_after_apply_qat_on_meta():
    with torch.device("meta"):
        model = stack()
    nq.apply_qat(model, ON)
    model.load_state_dict(stack(seed=3).state_dict(), assign=True)
    assert_fresh(model)


def test_an_object_that_takes_the_place_of_another_is_never_taken_for_it():
    model = stack()
    nq.apply_qat(model, ON)
    layer = model.blocks[0].down_proj
    for i in range(50):  # ids, addresses and version numbers recur when a parameter is dropped before the next is made
        values = torch.full((32, 48), 0.01 * i)
        layer._parameters["weight"] = None
        layer._parameters["weight"] = nn.Parameter(values.clone())
        assert_fresh(model)


def test_weights_in_shared_memory_and_inference_tensors_are_compared_at_each_read():
    model = stack()
    model.share_memory()
    nq.apply_qat(model, ON)
    assert_fresh(model)
    model.blocks[0].up_proj.weight.detach().numpy()[:] *= 3  # as another process writes
    assert_fresh(model)
    with torch.inference_mode():
        model = stack()
        nq.apply_qat(model, ON)
        assert_fresh(model)
        model.blocks[0].up_proj.weight.mul_(3)
        assert_fresh(model)


def test_a_model_unpickled_in_another_process_is_watched_too(tmp_path):
    model = stack()
    nq.apply_qat(model, ON)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)\n"
        "for _ in range(2):\n"
        "    x = torch.randn(3, 32)\n"
        "    assert torch.equal(model(x), model.reference(x))\n"
        "    model(x).sum().backward()\n"
        "    optimizer.step()\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": path})


def test_copy_copy_leaves_the_original_watched():
    model = stack()
    nq.apply_qat(model, ON)
    copy.copy(model.blocks[0].down_proj)  # dies at once
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert_fresh(model)
    list(pack_from_masters(model))


def test_threads_that_meet_a_new_weight_pack_it_once():
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    for _ in range(5):
        torch.optim.SGD(model.parameters(), lr=1e-5).step()
        model.zero_grad()
        edit_no_grad(model)

        def work(_):
            y = model(x)
            y.sum().backward()
            return y.detach()

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(4)))
        assert all(torch.equal(r, model.reference(x)) for r in results)


def invisible_write(weight: torch.Tensor) -> None:
    """A write PyTorch cannot see, as a foreign optimizer's kernel makes it."""
    weight.detach().numpy()[:] *= 1.5


def test_an_invisible_write_is_an_error_at_the_next_export_and_names_every_weight():
    model = stack()
    nq.apply_qat(model, ON)
    model(torch.randn(2, 32))
    for layer in (model.blocks[0].up_proj, model.blocks[1].down_proj):
        invisible_write(layer.weight)
    with pytest.raises(nq.StaleWeightsError) as error:
        list(pack_from_masters(model))
    assert "blocks.0.up_proj.weight" in str(error.value) and "blocks.1.down_proj.weight" in str(error.value)
    assert "blocks.1.up_proj.weight" not in str(error.value)
    nq.refresh(model)
    list(pack_from_masters(model))
    assert_fresh(model)


def test_packing_again_agrees_with_training_and_leaves_it_fresh():
    model = stack()
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    sent = {entry.name: value for entry, value in pack_from_masters(model)}  # before any forward of the new weights
    kept = {w.name: w for m in model.modules() if isinstance(m, nq.QATLinear) for w in m._qat_weights.values()}
    assert sent.keys() == kept.keys() == {entry.name for entry in nq.qat_plan(model).quantized}
    generations = {name: w.generation for name, w in kept.items()}
    assert_fresh(model)
    for name, value in sent.items():
        assert kept[name].holds(value)
        assert kept[name].generation == generations[name], "packed twice for one optimizer step"
        assert (
            kept[name].value.packed.data_ptr() != value.packed.data_ptr()
        )  # later steps must not change what was sent


def test_a_replaced_or_lost_module_is_an_error_at_the_next_export():
    model = stack()
    nq.apply_qat(model, ON)
    model.blocks[0].gate_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(nq.MismatchError, match=r"blocks\.0\.gate_proj\.weight: its module was replaced"):
        list(pack_from_masters(model))


def test_nan_in_a_weight_names_the_tensor():
    model = stack()
    nq.apply_qat(model, ON)
    with torch.no_grad():
        model.blocks[1].up_proj.weight[2, 5] = float("nan")
    with pytest.raises(nq.UserError, match=r"blocks\.1\.up_proj\.weight holds NaN"):
        model(torch.randn(2, 32))
    with pytest.raises(nq.UserError, match=r"blocks\.1\.up_proj\.weight holds NaN"):
        list(pack_from_masters(model))
