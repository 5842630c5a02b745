#!/usr/bin/env bash
# Qwen3-8B-Base, the MLPs trained and sampled with 4-bit weights, attention in bf16.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
train qwen3-8b-w4a16-ffn-only Qwen/Qwen3-8B-Base "${FFN_ONLY[@]}" "$@"
