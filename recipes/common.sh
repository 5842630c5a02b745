# Sourced by the run scripts: train NAME MODEL OVERRIDE... starts verl with config/dapo_qat.yaml.
#
# From the environment, each with a default:
#   MODEL_PATH  directory or hub id of the model           NNODES  nodes of the Ray cluster
#   DATA_DIR    where prepare_dapo_data.sh has written     NGPUS   GPUs of a node
#   TRAIN_FILE  parquet of the prompts                     PYTHON  interpreter that has verl, vLLM and nvfp4-qat
#   TEST_FILE   parquet for validation, or a list [a,b]    DRY_RUN=1  print the command, an argument a line; run nothing
#   EXP_NAME    name in the logs
#   CKPTS_DIR   checkpoints; a run that finds some there goes on from the last

RECIPES="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-python3}"
DATA_DIR="${DATA_DIR:-$HOME/data/nvfp4-qat}"

# A path as a value in hydra's grammar, where spaces, commas and = have a meaning. A list stays a list.
value() {
  case "$1" in
    "["*) printf '%s' "$1" ;;
    *) printf "'%s'" "${1//\'/\\\'}" ;;
  esac
}

need() {
  case "$2" in
    "["* | *://*) return ;;
  esac
  if [[ ! -e "$2" ]]; then
    echo "$1: there is no $2; run recipes/prepare_dapo_data.sh, or set $1" >&2
    exit 1
  fi
}

# What a run trains and samples with.
W4A16=("actor_rollout_ref.actor.qat.quantization_config_path=$(value "$RECIPES/config/nvfp4_w4a16.json")")
FFN_ONLY=(
  "${W4A16[@]}"
  'actor_rollout_ref.actor.qat.ignore_patterns=["lm_head","embed_tokens","re:.*mlp.gate$","re:.*self_attn.*"]'
)
NOQAT=("actor_rollout_ref.actor.qat.quantization_config_path=$(value "$RECIPES/config/nvfp4_noqat.json")")
BF16=(actor_rollout_ref.actor.qat.enable=False)

train() {
  local name="${EXP_NAME:-$1}" model="${MODEL_PATH:-$2}"
  shift 2
  local train_file="${TRAIN_FILE:-$DATA_DIR/dapo-math-17k.parquet}"
  local test_file="${TEST_FILE:-$DATA_DIR/aime-2024.parquet}"
  local command=(
    "$PYTHON" -m verl.trainer.main_ppo --config-path "$RECIPES/config" --config-name dapo_qat
    "actor_rollout_ref.model.path=$(value "$model")"
    "data.train_files=$(value "$train_file")"
    "data.val_files=$(value "$test_file")"
    "trainer.experiment_name=$(value "$name")"
    "trainer.default_local_dir=$(value "${CKPTS_DIR:-$HOME/ckpts/nvfp4-qat/$name}")"
    "trainer.nnodes=${NNODES:-1}"
    "trainer.n_gpus_per_node=${NGPUS:-8}"
    "$@"
  )
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%s\n' "${command[@]}"
    return
  fi
  "$PYTHON" -m nvfp4_qat.integrations.verl
  need TRAIN_FILE "$train_file"
  need TEST_FILE "$test_file"
  exec "${command[@]}"
}
