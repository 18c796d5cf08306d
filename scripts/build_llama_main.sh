#!/usr/bin/env bash
# Build ExecuTorch's llama_main for Android phones (arm64-v8a), the runner of device=android.
#
#   ANDROID_NDK=/path/to/ndk EXECUTORCH=/path/to/executorch scripts/build_llama_main.sh [OUTPUT]
#
# ANDROID_NDK   an unpacked Android NDK, r27 or newer
# EXECUTORCH    a checkout of ExecuTorch's sources at v1.5.1, the version that writes the programs,
#               with its submodules (git submodule update --init --recursive)
# OUTPUT        path of the binary (default: runs/llama_main)
# PYTHON        a Python with executorch's build requirements (default: python3)
# JOBS          number of parallel compilers (default: all cores)
#
# The binary contains XNNPACK, the optimized and quantized kernels and the custom attention
# operators. Pass it to the device as device.android.runner=OUTPUT.
set -euo pipefail

stop() {
  echo "build_llama_main.sh: $1" >&2
  exit 2
}

output=${1:-runs/llama_main}
python=${PYTHON:-python3}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
[ -n "${ANDROID_NDK:-}" ] || stop "ANDROID_NDK is not set; set it to the folder of an Android NDK"
[ -n "${EXECUTORCH:-}" ] || stop "EXECUTORCH is not set; set it to ExecuTorch's source folder at v1.5.1"
toolchain=$ANDROID_NDK/build/cmake/android.toolchain.cmake
[ -f "$toolchain" ] || stop "ANDROID_NDK=$ANDROID_NDK: has no build/cmake/android.toolchain.cmake"
example=$EXECUTORCH/examples/models/llama
[ -f "$example/main.cpp" ] || stop "EXECUTORCH=$EXECUTORCH: has no examples/models/llama/main.cpp"
[ -f "$EXECUTORCH/extension/llm/tokenizers/CMakeLists.txt" ] ||
  stop "EXECUTORCH=$EXECUTORCH: its submodules are missing; run git submodule update --init --recursive there"
command -v cmake >/dev/null || stop "cmake is not installed; install 3.24 or newer"

mkdir -p "$(dirname "$output")"
output=$(cd "$(dirname "$output")" && pwd)/$(basename "$output")
build=$EXECUTORCH/cmake-out-android
common=(
  -DCMAKE_TOOLCHAIN_FILE="$toolchain"
  -DANDROID_ABI=arm64-v8a
  -DANDROID_PLATFORM=android-26
  -DCMAKE_BUILD_TYPE=Release
  -DCMAKE_INSTALL_PREFIX="$build"
  -DCMAKE_FIND_ROOT_PATH="$build"
  -DPYTHON_EXECUTABLE="$python"
)

# Build the runtime with all parts of the "llm" preset: runner, tokenizers, custom operators, XNNPACK,
# optimized and quantized kernels.
cmake -S "$EXECUTORCH" -B "$build" --preset llm "${common[@]}" \
  -DEXECUTORCH_ENABLE_LOGGING=ON \
  -DEXECUTORCH_BUILD_XNNPACK=ON \
  -DEXECUTORCH_BUILD_KERNELS_OPTIMIZED=ON \
  -DEXECUTORCH_BUILD_KERNELS_QUANTIZED=ON \
  -DEXECUTORCH_BUILD_KERNELS_LLM=ON \
  -DEXECUTORCH_BUILD_TESTS=OFF
cmake --build "$build" --target install --config Release -j "$jobs"

# Tokenizers of the Qwen and Llama 3 families need look-ahead in regular expressions.
cmake -S "$example" -B "$build/examples/models/llama" "${common[@]}" \
  -DBUILD_TESTING=OFF \
  -DSUPPORT_REGEX_LOOKAHEAD=ON
cmake --build "$build/examples/models/llama" --config Release -j "$jobs"

cp "$build/examples/models/llama/llama_main" "$output"
echo "$output"
