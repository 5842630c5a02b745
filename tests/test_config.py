"""QATConfig: what loads, what is refused, and what it writes into a checkpoint's config.json."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nvfp4_qat.config import QATConfig
from nvfp4_qat.errors import UserError

DATA = Path(__file__).parent / "data"
JSON = DATA / "recipe" / "qat" / "config" / "nvfp4_w4a16.json"


def write(folder: Path, document: object, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(document) if name.endswith("json") else yaml.safe_dump(document))
    return path


def test_defaults_are_those_of_the_original_recipe():
    assert QATConfig() == QATConfig(
        enable=False,
        mode="w4a16",
        group_size=16,
        ignore_patterns=("lm_head", "embed_tokens", "re:.*mlp.gate$"),
        quantization_config_path=None,
        global_scale="pow2",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        QATConfig().mode = "w4a4"


def test_documented_yaml_blocks_load():
    full = QATConfig.from_yaml(DATA / "qat_full.yaml")
    assert full.enable and full.mode == "w4a16" and full.group_size == 16 and full.global_scale == "pow2"
    assert full.ignore_patterns == QATConfig().ignore_patterns
    assert Path(full.quantization_config_path) == JSON  # found beside the YAML, wherever the test runs
    ffn = QATConfig.from_yaml(str(DATA / "qat_ffn_only.yaml"))
    assert ffn.ignore_patterns == (*full.ignore_patterns, "re:.*self_attn.*")


def test_yaml_path_from_the_working_directory_comes_first(tmp_path, monkeypatch):
    (tmp_path / "recipe/qat/config").mkdir(parents=True)
    (tmp_path / "recipe/qat/config/nvfp4_w4a16.json").write_text(JSON.read_text())
    monkeypatch.chdir(tmp_path)
    assert QATConfig.from_yaml(DATA / "qat_full.yaml").quantization_config_path == "recipe/qat/config/nvfp4_w4a16.json"


@pytest.mark.parametrize(
    "document",
    [
        {"actor_rollout_ref": {"actor": {"qat": {"enable": True}}}},
        {"actor_rollout_ref": {"actor": {"fsdp_config": {"qat": {"enable": True}}, "qat": None}}, "trainer": {"n": 1}},
        {"qat": {"enable": True}},
        {"enable": True},
        {"qat": {"enable": True}, "actor_rollout_ref": {"actor": {"qat": {"enable": True, "mode": "w4a16"}}}},
        {"qat": {"enable": True, "_target_": "x.QATEngineConfig", "activation_observer": "static_minmax"}},
    ],
)
def test_yaml_places(tmp_path, document):
    assert QATConfig.from_yaml(write(tmp_path, document)) == QATConfig(enable=True)


def test_two_blocks_that_differ_are_refused(tmp_path):
    actor = {"qat": {"enable": True, "global_scale": "amax"}, "fsdp_config": {"qat": {"enable": False}}}
    path = write(tmp_path, {"actor_rollout_ref": {"actor": actor}})
    with pytest.raises(UserError, match=r"actor\.qat and .*fsdp_config\.qat differ in enable, global_scale"):
        QATConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no mapping"),
        ("- a\n- b\n", "no mapping"),
        ("a: [1", "not YAML"),
        ("trainer: {n: 1}\nactor_rollout_ref: {actor: {lr: 1}}\n", "no QAT block"),
        ("qat: 3\n", "must be a mapping"),
        ("enable: true\ngruop_size: 16\n", "unknown QAT config key 'gruop_size'.*did you mean 'group_size'"),
    ],
)
def test_yaml_that_says_nothing_useful(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        QATConfig.from_yaml(path)


def test_missing_yaml(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere.yaml"):
        QATConfig.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enable": "yes"}, "enable must be true or false"),
        ({"mode": "w4a4"}, "w4a4.*is not there yet"),
        ({"mode": "W4A4"}, "is not there yet"),
        ({"mode": "fp8"}, "mode must be \"w4a16\", got 'fp8'"),
        ({"mode": None}, 'mode must be "w4a16"'),
        ({"group_size": 32}, "group_size must be 16.*got 32"),
        ({"group_size": "16"}, "group_size must be 16"),
        ({"group_size": True}, "group_size must be 16"),
        ({"group_size": 16.0}, "group_size must be 16"),
        ({"global_scale": "max"}, "one of pow2, amax"),
        ({"global_scale": ["pow2"]}, "one of pow2, amax"),
        ({"ignore_patterns": "lm_head"}, "must be a list of strings"),
        ({"ignore_patterns": None}, "must be a list of strings"),
        ({"ignore_patterns": ["lm_head", 3]}, "holds 3"),
        ({"ignore_patterns": ["re:("]}, r"'re:\(' is not a regular expression"),
        ({"ignore_patterns": [""]}, "is empty"),
        ({"ignore_patterns": ["re:"]}, "is empty"),
        ({"quantization_config_path": 7}, "must be a path or null"),
        ({"quantization_config_path": ""}, "must be a path or null"),
        ({"enable": True, "quantization_config_path": "/nowhere/c.json"}, "cannot read /nowhere/c.json"),
        (
            {"modes": "w4a16"},
            "known keys: enable, mode, group_size, ignore_patterns, quantization_config_path, global_scale",
        ),
        ({"a": 1, "b": 2}, "unknown QAT config keys 'a', 'b'"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        QATConfig.from_dict(values)


def test_from_dict_wants_a_mapping():
    with pytest.raises(UserError, match="must be a mapping"):
        QATConfig.from_dict([("enable", True)])


def test_a_disabled_block_may_name_a_json_of_another_machine():
    config = QATConfig(quantization_config_path="/nowhere/c.json")
    with pytest.raises(UserError, match="cannot read"):
        config.to_compressed_tensors([])


def test_ignore_patterns_become_a_tuple():
    assert QATConfig(ignore_patterns=["a"]).ignore_patterns == ("a",)
    assert QATConfig(ignore_patterns=[]).ignore_patterns == ()


@pytest.mark.parametrize("path", [None, str(JSON)])
def test_compressed_tensors_reads_what_is_written(path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QATConfig(enable=True, quantization_config_path=path)
    document = config.to_compressed_tensors(["lm_head", "model.layers.0.mlp.gate"])
    assert document["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    json.dumps(document)
    parsed = QuantizationConfig.model_validate(document)
    (scheme,) = parsed.config_groups.values()
    assert scheme.targets == ["Linear"] and scheme.input_activations is None
    assert scheme.format == parsed.format == "nvfp4-pack-quantized"
    weights = scheme.weights
    assert (weights.num_bits, weights.type, weights.strategy) == (4, "float", "tensor_group")
    assert weights.group_size == 16 and weights.symmetric and not weights.dynamic
    assert parsed.quantization_status == "compressed"

    from transformers.utils.quantization_config import CompressedTensorsConfig

    assert ModelCompressor.from_compression_config(CompressedTensorsConfig(**document)) is not None


def test_both_sources_write_the_same_document():
    built = QATConfig().to_compressed_tensors(["lm_head"])
    read = QATConfig(enable=True, quantization_config_path=str(JSON)).to_compressed_tensors(["lm_head"])
    assert {**read, "kv_cache_scheme": None} == built


def test_a_new_document_each_time():
    config = QATConfig()
    first = config.to_compressed_tensors(["lm_head"])
    first["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    first["ignore"].append("x")
    assert config.to_compressed_tensors([])["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_a_quantized_head_is_a_target_by_name():
    group = QATConfig().to_compressed_tensors([], targets=("Linear", "lm_head"))["config_groups"]["group_0"]
    assert group["targets"] == ["Linear", "lm_head"]


def test_json_keeps_its_observer_and_unknown_notes(tmp_path):
    document = json.loads(JSON.read_text())
    document["config_groups"]["group_0"]["weights"]["observer"] = "memoryless_minmax"
    document["version"] = "0.13.0"
    config = QATConfig(enable=True, quantization_config_path=str(write(tmp_path, document, "c.json")))
    written = config.to_compressed_tensors([])
    assert written["version"] == "0.13.0" and written["quantization_status"] == "compressed"
    assert written["config_groups"]["group_0"]["weights"]["observer"] == "memoryless_minmax"


def _set(document: dict, path: str, value: object) -> dict:
    changed = copy.deepcopy(document)
    node = changed
    *parents, last = path.split("/")
    for key in parents:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "fp8", "quant_method is 'fp8'"),
        ("format", "pack-quantized", "format is 'pack-quantized'"),
        ("format", KeyError, "format is None"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is set"),
        ("sparsity_config", {"format": "dense"}, "sparsity_config is set"),
        ("transform_config", {"config_groups": {}}, "transform_config is set"),
        ("ignore", ["lm_head", "re:.*o_proj"], r"ignore list holds 're:\.\*o_proj'"),
        ("config_groups", KeyError, "exactly one group"),
        ("config_groups/group_1", {}, "exactly one group"),
        ("config_groups/group_0", 3, "no JSON object"),
        ("config_groups/group_0/targets", ["re:.*proj"], "targets is"),
        ("config_groups/group_0/format", "int-quantized", "the group's format"),
        ("config_groups/group_0/input_activations", {"num_bits": 4}, "does not quantize activations"),
        ("config_groups/group_0/weights", KeyError, "weights entry is missing"),
        ("config_groups/group_0/weights/num_bits", 8, "num_bits is 8, expected 4"),
        ("config_groups/group_0/weights/group_size", 32, "group_size is 32, expected 16"),
        ("config_groups/group_0/weights/type", "int", "type is 'int'"),
        ("config_groups/group_0/weights/strategy", "group", "strategy is 'group'"),
        ("config_groups/group_0/weights/symmetric", 1, "symmetric is 1, expected True"),
        ("config_groups/group_0/weights/dynamic", "local", "dynamic is 'local'"),
        ("config_groups/group_0/weights/actorder", "group", "actorder is set"),
    ],
)
def test_a_json_that_contradicts_the_config_is_refused(tmp_path, path, value, message):
    file = write(tmp_path, _set(json.loads(JSON.read_text()), path, value), "c.json")
    with pytest.raises(UserError, match=message):
        QATConfig(enable=True, quantization_config_path=str(file))


def test_a_json_may_leave_out_dynamic_and_repeat_ignored_patterns(tmp_path):
    document = _set(json.loads(JSON.read_text()), "config_groups/group_0/weights/dynamic", KeyError)
    document["ignore"] = ["lm_head"]
    QATConfig(enable=True, quantization_config_path=str(write(tmp_path, document, "c.json")))


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_a_json_that_is_none(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="no JSON object|is not JSON"):
        QATConfig(enable=True, quantization_config_path=str(path))


def test_config_needs_no_torch():
    # The package itself may import torch, so the module is loaded with a stand-in for its package.
    code = (
        "import sys, types, importlib\n"
        "package = types.ModuleType('nvfp4_qat'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['nvfp4_qat'] = package\n"
        "importlib.import_module('nvfp4_qat.config').QATConfig(enable=True)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    source = Path(sys.modules["nvfp4_qat.config"].__file__).parent
    subprocess.run([sys.executable, "-c", code, str(source)], check=True, timeout=60)
