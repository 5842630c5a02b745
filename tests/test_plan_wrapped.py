"""A wrapped model has the plan of the bare one, and adapters are left alone."""

import pytest
import torch
import torch.distributed as dist
from helpers_plan import DEFAULT, model, plan_of
from torch import nn

from nvfp4_qat.config import QATConfig
from nvfp4_qat.errors import UserError
from nvfp4_qat.plan import QuantPlan, canonical_name

pytestmark = pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")


@pytest.mark.parametrize(
    "wrapped",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "module.model.layers.0.self_attn.q_proj.weight",
        "_orig_mod.model.layers.0.self_attn.q_proj.weight",
        "module._orig_mod.base_model.model.model.layers.0._orig_mod.self_attn.q_proj.base_layer.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_canonical_name(wrapped):
    assert canonical_name(wrapped) == "model.layers.0.self_attn.q_proj.weight"
    plan = plan_of("qwen3")
    assert plan[wrapped].name == "model.layers.0.self_attn.q_proj.weight" and wrapped in plan


def test_canonical_name_of_the_root():
    assert canonical_name("") == canonical_name("module._orig_mod") == canonical_name("base_model.model") == ""
    assert canonical_name("model.module.weight") == "model.module.weight"  # DDP wraps at the top only


def same_plan(wrapped: nn.Module, architecture: str = "qwen3") -> QuantPlan:
    """The plan of a wrapped model, after checking that it is the plan of the bare one."""
    bare = plan_of(architecture)
    plan = QuantPlan.from_model(wrapped, QATConfig())
    assert plan.quantized == bare.quantized
    assert tuple(e for e in plan.skipped if e.kind != "adapter") == bare.skipped
    assert plan.checkpoint_slices == bare.checkpoint_slices
    assert (plan.parameters, plan.head) == (bare.parameters, bare.head)
    assert plan.ignore_list() == bare.ignore_list()
    return plan


def test_compiled_and_checkpoint_wrapped():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    same_plan(torch.compile(model("qwen3")))
    wrapped = model("qwen3_moe")
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = checkpoint_wrapper(layer)
    same_plan(torch.compile(wrapped), "qwen3_moe")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_distributed_wrappers(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    same_plan(nn.parallel.DistributedDataParallel(model("qwen3", "cpu")))
    sharded = model("qwen3", "cpu")
    fully_shard(sharded.lm_head)  # changes the class of an nn.Linear
    for layer in sharded.model.layers:
        fully_shard(layer.self_attn.o_proj)
        fully_shard(layer)
    same_plan(fully_shard(sharded))
    same_plan(FullyShardedDataParallel(model("qwen3", "cpu"), use_orig_params=True, device_id=torch.device("cpu")))
    with pytest.raises(UserError, match="before FSDP1 flattens them"):
        QuantPlan.from_model(
            FullyShardedDataParallel(model("qwen3", "cpu"), device_id=torch.device("cpu")), QATConfig()
        )


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_never_quantized():
    from peft import LoraConfig, PromptEncoderConfig, get_peft_model

    plan = same_plan(
        get_peft_model(model("qwen3", "cpu"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    )
    adapters = [e for e in plan.skipped if e.kind == "adapter"]
    assert len(adapters) == 2 * len(plan.quantized) and all(e.reason == "adapter" for e in adapters)
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in {e.name for e in adapters}
    dora = LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True, modules_to_save=["lm_head"])
    same_plan(get_peft_model(model("qwen3", "cpu"), dora))
    experts = LoraConfig(
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=["q_proj"]
    )
    same_plan(get_peft_model(model("qwen3_moe", "cpu"), experts), "qwen3_moe")
    with pytest.raises(UserError, match="prompt learning"):
        QuantPlan.from_model(
            get_peft_model(model("qwen3", "cpu"), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            QATConfig(),
        )


def test_an_adapter_is_no_member_of_a_pattern():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model("qwen3", "cpu"), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="lora_A.*matches no weight"):
        QuantPlan.from_model(wrapped, QATConfig(ignore_patterns=[*DEFAULT, "lora_A"]))
