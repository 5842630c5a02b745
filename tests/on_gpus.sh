#!/usr/bin/env bash
# The tests that need GPUs, side by side on a machine with four: tests/on_gpus.sh [FOLDER FOR LOGS]
# Two minutes on four H200. Those that need vLLM besides: python -m pytest -m vllm
set -u
cd "$(dirname "$0")/.."
logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=2
pids=()

run() { # NAME GPUS ARGUMENTS...
  local name=$1 gpus=$2
  shift 2
  (
    CUDA_VISIBLE_DEVICES=$gpus python3 -m pytest -q -p no:cacheprovider "$@" >"$logs/$name.log" 2>&1
    status=$?
    echo "$name: $(tail -n 1 "$logs/$name.log")"
    exit $status
  ) &
  pids+=($!)
}

many=tests/test_multigpu.py # a group of processes for each of these
run gpu 0 -m gpu -n 4
run others 0,1,2,3 -m multigpu -n 4 --dist loadfile --ignore "$many"
run replicas 0,1,2,3 -m multigpu "$many" -k test_replicas
for name in gpu features states own_gather; do run "two-$name" 0,1 -m multigpu "$many" -k "test_$name"; done
for name in training traffic safety; do run "two-$name" 2,3 -m multigpu "$many" -k "test_$name"; done

failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
grep -h "^FAILED\|^ERROR" "$logs"/*.log
echo "logs are in $logs"
exit $failed
