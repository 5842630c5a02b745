#!/usr/bin/env bash
# Makes the data of the recipes in DATA_DIR: dapo-math-17k.parquet, aime-2024.parquet and aime-2025.parquet.
# What is there already is not made again. Options go to prepare_dapo_data.py: --help lists them.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/common.sh"
exec "$PYTHON" "$RECIPES/prepare_dapo_data.py" --out "$DATA_DIR" "$@"
