"""How much memory packing and export need beside the model.

Each case runs in a process of its own: it makes a model of at least 1 GB from random weights, applies QAT, and then
packs every weight (dropping the result) or saves a checkpoint. What counts is the peak of resident memory above the
model, against the size of the model's largest layer plus that layer's packed copy. Linux only: the peak comes from
``/proc/self``, where it can be reset just before.

    python benchmarks/bench_memory.py                      # all cases, a row each in benchmarks/results/memory.jsonl
    python benchmarks/bench_memory.py --case dense-bf16    # one of them

"Layer" is taken in the narrowest sense: one module with the parameters it owns itself, that is one linear layer, one
embedding, or the fused experts of one block. Written pages of the checkpoint are the kernel's cache and do not count.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
CASES = ("dense-bf16", "dense-fp32", "moe-bf16")
ACTIONS = ("pack", "export")


def make_model(case: str) -> Any:
    """A Qwen3 or Qwen3-MoE of random weights, more than 1 GB in its dtype."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
    from transformers.initialization import no_init_weights

    common: dict[str, Any] = {
        "vocab_size": 4096, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    kind, dtype = case.split("-")
    if kind == "dense":
        layers = 12 if dtype == "bf16" else 6
        config: Any = Qwen3Config(**common, intermediate_size=6144, num_hidden_layers=layers)
    else:
        config = Qwen3MoeConfig(**common, moe_intermediate_size=768, num_experts=32, num_hidden_layers=4)
    with no_init_weights():  # transformers' own initialisation would take longer than what is measured
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Make the peak the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes of this process in memory since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def act(action: str, model: Any, directory: Path) -> int:
    """Pack or export; returns the bytes that came out."""
    import nvfp4_qat as nq

    if action == "export":
        nq.save_checkpoint(model, directory)
        return sum(file.stat().st_size for file in directory.iterdir())
    sent = 0
    for _, tensor in nq.packed_weights(model):
        sent += tensor.nbytes
        del tensor
    return sent


def measure(case: str, action: str) -> dict[str, Any]:
    """Run one case in this process."""
    import torch

    import nvfp4_qat as nq
    from nvfp4_qat import ops
    from nvfp4_qat.models import load_model

    config = nq.QATConfig(enable=True)
    small = load_model("tiny-moe" if case.startswith("moe") else "tiny").model
    nq.apply_qat(small, config)
    with tempfile.TemporaryDirectory() as scratch:
        act(action, small, Path(scratch) / "warm")  # what libraries load and keep is not an allocation per model
        model = make_model(case)
        plan = nq.apply_qat(model, config)
        before = resident()
        reset_peak()
        start = time.perf_counter()
        written = act(action, model, Path(scratch) / "out")
        seconds = time.perf_counter() - start
        above = peak() - before
    quantized = {entry.module for entry in plan.quantized}
    layer, name = max(
        (sum(p.nbytes for p in module.parameters(recurse=False)), name) for name, module in model.named_modules()
    )
    elements = sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False))
    packed = elements * 9 // 16 if name in quantized else 0
    return {
        "case": case,
        "action": action,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "largest_layer": name,
        "largest_layer_bytes": layer,
        "its_packed_bytes": packed,
        "bound_bytes": layer + packed,
        "peak_above_model_bytes": above,
        "within_bound": above <= layer + packed,
        "output_bytes": written,
        "chunk_elements": ops.CHUNK,
        "seconds": round(seconds, 2),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} x {platform.machine()}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be given several times")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file the rows are appended to")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "ACTION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return 0
    ok = True
    print(f"{'case':<11} {'action':<7} {'model':>7} {'largest layer + packed':>23} {'peak above model':>17}  MB")
    for case in args.case or CASES:
        for action in ACTIONS:
            command = [sys.executable, __file__, "--child", case, action]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bound = f"{row['largest_layer_bytes'] / 1e6:.0f} + {row['its_packed_bytes'] / 1e6:.0f}"
            peak_mb, verdict = row["peak_above_model_bytes"] / 1e6, "ok" if row["within_bound"] else "TOO MUCH"
            print(f"{case:<11} {action:<7} {row['model_bytes'] / 1e6:>7.0f} {bound:>23} {peak_mb:>17.1f}  {verdict}")
            ok = ok and row["within_bound"]
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
