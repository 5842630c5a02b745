#!/usr/bin/env bash
# AIME 2024 and 2025 for a trained checkpoint, in bf16 and in NVFP4: eval_offline.sh CHECKPOINT [option of eval_offline.py...]
#
# CHECKPOINT is a folder global_step_N of verl, or one that transformers reads. From the environment:
#   OUT         results and converted checkpoints (default: eval/NAME); a run that was broken off goes on there
#   K           answers to each problem, 32                TEMPERATURE, TOP_P  of sampling: 0.6, 1.0
#   MAX_TOKENS  of an answer, 20480                        TP  GPUs of an engine, 1
#   PRECISIONS  "bf16 nvfp4"                               DATA_DIR  where prepare_dapo_data.sh has written
#   IGNORE      patterns that stay in bf16 in NVFP4, besides the defaults: as the checkpoint was trained,
#               IGNORE='re:.*self_attn.*' for FFN_only
#   NVFP4_MODEL a checkpoint in NVFP4, instead of the one that is exported here
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"

if [[ $# -lt 1 || ! -d "$1" ]]; then
  echo "usage: $0 CHECKPOINT [option...], where CHECKPOINT is a folder; see the head of this file" >&2
  exit 2
fi
checkpoint="$(cd "$1" && pwd)"
shift
out="${OUT:-eval/$(basename "$(dirname "$checkpoint")")-$(basename "$checkpoint")}"
precisions="${PRECISIONS:-bf16 nvfp4}"

run() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then printf '%s\n' "$*"; else "$@"; fi
}

# What lies in a folder is used again: only for the checkpoint, and the export, that it was made of.
source_of="$checkpoint, IGNORE='${IGNORE:-}', NVFP4_MODEL='${NVFP4_MODEL:-}'"
if [[ -e "$out/made-of" && "$(<"$out/made-of")" != "$source_of" ]]; then
  echo "$out was made of $(<"$out/made-of"), not of $source_of: choose another OUT" >&2
  exit 2
fi
run mkdir -p "$out"
[[ "${DRY_RUN:-0}" == 1 ]] || printf '%s\n' "$source_of" >"$out/made-of"

# verl's shards become one model; under its name once it is complete.
model="$checkpoint"
if [[ ! -e "$checkpoint/config.json" ]]; then
  model="$out/merged"
  if [[ ! -d "$model" ]]; then
    run rm -rf "$model.partial"
    run "$PYTHON" -m verl.model_merger merge --backend fsdp --local_dir "$checkpoint/actor" --target_dir "$model.partial"
    run mv "$model.partial" "$model"
  fi
fi

if [[ " $precisions " == *" nvfp4 "* && -z "${NVFP4_MODEL:-}" ]]; then
  NVFP4_MODEL="$out/nvfp4"
  if [[ ! -d "$NVFP4_MODEL" ]]; then
    read -ra patterns <<<"${IGNORE:-}"
    ignore=()
    for pattern in ${patterns[@]+"${patterns[@]}"}; do ignore+=(--ignore "$pattern"); done
    run "$PYTHON" -m nvfp4_qat export --model "$model" --out "$NVFP4_MODEL" ${ignore[@]+"${ignore[@]}"}
  fi
  run "$PYTHON" -m nvfp4_qat verify "$NVFP4_MODEL"
fi

for precision in $precisions; do
  case "$precision" in
    bf16) evaluated="$model" ;;
    nvfp4) evaluated="$NVFP4_MODEL" ;;
    *) echo "PRECISIONS: $precision is neither bf16 nor nvfp4" >&2; exit 2 ;;
  esac
  run "$PYTHON" "$RECIPES/eval_offline.py" run --model "$evaluated" --precision "$precision" --out "$out" \
    --data "$DATA_DIR/aime-2024.parquet" "$DATA_DIR/aime-2025.parquet" \
    --samples "${K:-32}" --temperature "${TEMPERATURE:-0.6}" --top-p "${TOP_P:-1.0}" \
    --max-tokens "${MAX_TOKENS:-20480}" --tensor-parallel "${TP:-1}" "$@"
done
run "$PYTHON" "$RECIPES/eval_offline.py" summary "$out"
