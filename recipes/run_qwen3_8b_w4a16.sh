#!/usr/bin/env bash
# Qwen3-8B-Base, trained and sampled with 4-bit weights (NVFP4, W4A16).
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
train qwen3-8b-w4a16 Qwen/Qwen3-8B-Base "${W4A16[@]}" "$@"
