#!/usr/bin/env bash
# Qwen3-30B-A3B-Base, trained and sampled with 4-bit weights (NVFP4, W4A16).
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
train qwen3-30b-w4a16 Qwen/Qwen3-30B-A3B-Base "${W4A16[@]}" "$@"
