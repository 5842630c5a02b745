#!/usr/bin/env bash
# Qwen3-8B-Base, trained and sampled in bf16: what the 4-bit runs are compared with.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
train qwen3-8b-bf16 Qwen/Qwen3-8B-Base "${BF16[@]}" "$@"
