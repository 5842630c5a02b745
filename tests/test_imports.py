"""What `import nvfp4_qat` may cost: torch, and nothing that is somebody else's choice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import nvfp4_qat

# The public names of the library. A name that is added joins the list; a name that goes needs a line in CHANGELOG.md.
PUBLIC = (
    "QATConfig",
    "apply_qat",
    "refresh",
    "amax",
    "global_scale",
    "quantize",
    "fake_quantize",
    "PackedNVFP4",
    "QuantPlan",
    "QATLinear",
    "QATExperts",
    "QATQuantizer",
    "packed_weights",
    "save_checkpoint",
    "load_checkpoint",
    "verify_checkpoint",
    "Rollout",
    "SyncReport",
    "rollout_metrics",
    "UserError",
    "MismatchError",
    "StaleWeightsError",
)

# transformers and the engines take seconds to import or initialise a device; the rest belongs to single features.
FORBIDDEN = (
    "transformers",
    "compressed_tensors",
    "vllm",
    "verl",
    "trl",
    "peft",
    "accelerate",
    "tokenizers",
    "huggingface_hub",
    "matplotlib",
    "tensorboard",
    "gguf",
)


def in_fresh_interpreter(code: str):
    """The JSON that ``code`` prints as its last line, run in a new Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_and_every_public_name_are_lean_and_leave_the_gpu_alone():
    loaded, initialized = in_fresh_interpreter(
        "import json, sys, nvfp4_qat\n"
        "values = [getattr(nvfp4_qat, name) for name in nvfp4_qat.__all__]\n"
        "import torch\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(json.dumps([sorted(roots), torch.cuda.is_initialized()]))"
    )
    assert not initialized
    assert not set(loaded) & set(FORBIDDEN)


def test_all_names_add_little_to_torch():
    # Measured 0.05 to 0.15 s on two loaded cores; the bound is for noticing a heavy module, not for timing.
    (seconds,) = in_fresh_interpreter(
        "import json, time, torch\n"
        "start = time.perf_counter()\n"
        "import nvfp4_qat\n"
        "values = [getattr(nvfp4_qat, name) for name in nvfp4_qat.__all__]\n"
        "print(json.dumps([time.perf_counter() - start]))"
    )
    assert seconds < 2.0


def test_the_command_line_starts_without_torch():
    loaded = in_fresh_interpreter(
        "import json, sys\n"
        "from nvfp4_qat.cli import build_parser\n"
        "build_parser().format_help()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert "torch" not in loaded


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_resolve(name):
    assert getattr(nvfp4_qat, name).__module__.startswith("nvfp4_qat")
    assert name in nvfp4_qat.__all__
    assert name in dir(nvfp4_qat)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nvfp4_qat.no_such_name


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert nvfp4_qat.__version__ == version("nvfp4-qat")
