#!/usr/bin/env bash
# An arm64 board on an x86 machine: Debian's arm64 programs and ExecuTorch's wheels in a folder.
#
#   scripts/arm64_root.sh FOLDER [COMMAND [ARGUMENT...]]
#
# Makes what FOLDER lacks, then runs COMMAND inside, by qemu-user. Run it again after a failure;
# steps that are done are skipped. It needs no root, a Debian of release 12 or newer with
# qemu-user-static, and Linux 6.7 or newer, where a user namespace has a binfmt_misc of its own.
# The wheel of torch for arm64 comes with CUDA: 2.5 GB are downloaded, 5 GB kept. An index of CPU
# wheels in PIP_EXTRA_INDEX_URL makes it much less.
#
# PYTHON    a Python with pip, of any version (default: python3)
# QEMU_CPU  the processor, as `qemu-aarch64-static -cpu help` lists it (default: cortex-a76)
#
# Inside, the caller is the user `board`, the folder for temporary files is the caller's, and
# /proc/cpuinfo is as an arm64 kernel writes it; older qemu-user shows that of the machine below.
set -euo pipefail

stop() {
  echo "arm64_root.sh: $1" >&2
  exit 2
}

[ $# -ge 1 ] || stop "expected the folder of the board"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
root=$folder/root
python=${PYTHON:-python3}
cpu=${QEMU_CPU:-cortex-a76}
temporary=${TMPDIR:-/tmp}
here=$(cd "$(dirname "$0")" && pwd)
binfmt=/usr/lib/binfmt.d/qemu-aarch64.conf
for tool in apt-get dpkg-deb unshare "$python"; do
  command -v "$tool" >/dev/null || stop "$tool: no such program; a Debian with Python is needed"
done
[ -f "$binfmt" ] || stop "$binfmt: no such file; apt-get install qemu-user-static"

# Packages are unpacked and not set up: their scripts would need emulation and other users' ids.
unpack_packages() {
  local apt=$folder/apt
  rm -rf "$apt" "$root"
  mkdir -p "$apt/lists/partial" "$apt/archives/partial"
  touch "$apt/status"
  local options=(
    -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=0
    -o Dir::State="$apt" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt"
    -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none
  )
  apt-get "${options[@]}" -qq update
  apt-get "${options[@]}" -qq -y --download-only install base-files bash coreutils dash grep \
    libgomp1 libstdc++6 openssh-server procps python3 sed util-linux
  mkdir -p "$root"
  local package
  for package in "$apt"/archives/*.deb; do
    dpkg-deb -x "$package" "$root"
  done
  rm -rf "$apt"
  printf '%s\n' root:x:0:0::/root:/bin/sh board:x:1000:1000::/home/board:/bin/sh \
    > "$root/etc/passwd"
  printf '%s\n' root:x:0: board:x:1000: > "$root/etc/group"
  mkdir -p "$root/home/board"
}

# Wheels of the root's Python; pip runs on this machine, as it is slow under emulation.
install_wheels() {
  local version target platforms=(--platform manylinux2014_aarch64)
  version=$(basename "$(readlink "$root/usr/bin/python3")")
  target=$root/usr/local/lib/$version/dist-packages
  for minor in {17..28}; do
    platforms+=(--platform "manylinux_2_${minor}_aarch64")
  done
  local pip=(
    "$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --no-compile
    --target "$target" --only-binary=:all: --implementation cp
    --python-version "${version#python}" "${platforms[@]}"
    -c "$here/../constraints.txt"
  )
  rm -rf "$target"
  # Most of what executorch asks for serves the export of models, which a board does not do.
  "${pip[@]}" --no-deps executorch
  rm -rf "$target/bin"  # tools for export, which pip would not replace
  "${pip[@]}" torch numpy
}

write_cpuinfo() {
  local features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm \
lrcpc dcpop asimddp"
  local number
  [ "$cpu" = cortex-a76 ] || features+=" sve sve2 i8mm bf16"
  for ((number = 0; number < $(nproc --all); number++)); do
    printf 'processor\t: %s\nBogoMIPS\t: 50.00\nFeatures\t: %s\nCPU implementer\t: 0x41\n' \
      "$number" "$features"
    printf 'CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n'
  done > "$1"
}

# Run by a shell that is process 1 of its own namespace: as process 1, a program that crashes would
# wait for the signal that the kernel withholds from it.
enter() {
  mount -t proc none "$root/proc"
  mount -t binfmt_misc none "$root/proc/sys/fs/binfmt_misc"
  grep '^:' "$binfmt" > "$root/proc/sys/fs/binfmt_misc/register"
  local cpuinfo
  cpuinfo=$(mktemp)
  write_cpuinfo "$cpuinfo"
  chmod 644 "$cpuinfo"
  mount --bind "$cpuinfo" "$root/proc/cpuinfo"
  rm "$cpuinfo"
  mount --rbind /sys "$root/sys"
  mount --rbind /dev "$root/dev"
  mkdir -p "$root$temporary"
  mount --rbind "$temporary" "$root$temporary"
  # Another namespace, without the privileges of the first: sshd would change to other users.
  cd /
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/home/board LANG=C.UTF-8 QEMU_CPU="$cpu" \
    unshare --user --map-user=1000 --map-group=1000 --root "$root" "$@"
}

[ -f "$folder/packages" ] || { unpack_packages && touch "$folder/packages"; }
pins=$(grep -E '^(executorch|torch)==' "$here/../constraints.txt")
if [ "$(cat "$folder/wheels" 2>/dev/null)" != "$pins" ]; then
  install_wheels
  echo "$pins" > "$folder/wheels"
fi
[ $# -gt 0 ] || set -- python3 -c 'import torch; from executorch.extension.pybindings import _C'
export -f enter write_cpuinfo
export folder root cpu temporary binfmt
unshare --user --map-root-user --mount true 2>/dev/null ||
  stop "unshare: this machine allows no user namespaces"
exec unshare --user --map-root-user --mount --pid --fork --kill-child \
  bash -euc 'enter "$@"; exit $?' bash "$@"
