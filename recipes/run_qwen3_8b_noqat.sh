#!/usr/bin/env bash
# Qwen3-8B-Base, trained in bf16 and sampled with 4-bit weights: what happens to the mismatch without QAT.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
train qwen3-8b-noqat Qwen/Qwen3-8B-Base "${NOQAT[@]}" "$@"
