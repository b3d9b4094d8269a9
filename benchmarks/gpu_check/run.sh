#!/usr/bin/env bash
# One portion of the check on a GPU: run.sh PORTION OUT [DATA]. README.md says what is in each.
#
# Each step has a time limit and writes its output to a file under OUT as it comes. log.txt has a line for each step that
# has ended. The exit status is 1 if a step failed.
set -u
portion=$1
mkdir -p "$2"
out=$(realpath "$2")
data=$(realpath "${3:-cifar10-jpeg.npz}")
cd "$(dirname "$0")/../.." || exit
read -ra python <<< "${PYTHON:-python3}" # more than a word: what comes before python's own arguments, too
toolkit=${CUDA_HOME:-/usr/local/cuda}
PATH=$PATH:$(dirname "$(command -v "${python[0]}")"):$toolkit/bin:$toolkit/compute-sanitizer:$(printf '%s:' /opt/nvidia/nsight-compute/*)
export PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
failed=0

step() { # NAME FILE SECONDS COMMAND...
  local name=$1 file=$out/$2.txt seconds=$3 start=$SECONDS code=0 how=passed
  shift 3
  printf '\n=== %s: %s\n' "$name" "$*" >> "$file"
  timeout --kill-after 5 "$seconds" "$@" < /dev/null >> "$file" 2>&1 || code=$?
  if [ $code != 0 ]; then
    failed=1
    how="FAILED with status $code"
    case $code in 124 | 137) how="CUT OFF" ;; esac
    tail -n 20 "$file" | cut -c -300
  fi
  echo "$name: $how, $((SECONDS - start)) s: $(tail -n 1 "$file" | cut -c -150)" | tee -a "$out/log.txt"
}

# A command whose output has what PATTERN says, and by "strictly" ends with status 0 as well.
finds='"${@:2}" 2>&1 | tee -a /dev/stderr | grep -E -- "$1" > /dev/null'
strictly=(bash -o pipefail -c "$finds" finds)
somehow=(bash -c "$finds" finds)

sanitize() { # TOOL: torchlars' kernels alone. Loading torch's takes long under it, and so it must not give up waiting.
  # Without caching each tensor is an allocation, and what lies beyond its end is no other tensor.
  local command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=torchlars)
  command+=(--print-limit 20 --launch-timeout 0 --error-exitcode 1)
  if [ "$1" = memcheck ]; then command+=(--report-api-errors no); fi # torch tries calls that may fail
  command+=("${python[@]}" -m benchmarks.gpu_check.cases)
  step "$1" sanitizers 150 "${strictly[@]}" 'SUMMARY: 0 (errors|hazards)' "${command[@]}"
  case $1 in memcheck | initcheck) # or a filter that fits no kernel would report nothing
    step "a fault planted for $1" sanitizers 75 "${somehow[@]}" '^=+ +at .*torchlars::cuda::' "${command[@]}" --plant "$1" ;;
  esac
}

step_time() { # NAME SECONDS ARGUMENTS...: tables in step_time.txt, the times of all rounds in step_time.tar
  step "$1" step_time "$2" "${python[@]}" -m benchmarks.step_time.main --device cuda --rounds 7 --min-time 0.03 \
    --out "$reports" --name "$1" "${@:3}"
  tar -cf "$out/step_time.tar" -C "$reports" .
}

build() { # unless what was built elsewhere can be loaded, and is for this GPU
  local architecture about
  architecture=$("${python[@]}" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  about=$("${python[@]}" -m torchlars)
  printf '%s, %s, commit %s\n%s\n' "$(date -u +%F)" "$(nvidia-smi -L)" "$(git rev-parse HEAD)" "$about" >> "$out/log.txt"
  [[ $about =~ CUDA\ +loaded$'\n' && $about =~ " for ".*"$architecture" ]] && return
  step build cases 300 env TORCHLARS_CUDA=1 TORCH_CUDA_ARCH_LIST="$architecture" \
    "${python[@]}" setup.py build_ext --inplace
  return $failed
}

portion_1() { # it is right, and how fast it is
  local xdist=() fused="LARS(torchlars.optim.SGD)"
  "${python[@]}" -c 'import xdist' 2> /dev/null && xdist=(-n 6)
  step cases cases 60 "${python[@]}" -m benchmarks.gpu_check.cases
  step tests tests 200 "${python[@]}" -m pytest -q -p no:cacheprovider "${xdist[@]}" --maxfail 30 --durations 5 tests \
    -k cuda --ignore-glob '*test_cuda_on_host*' --ignore tests/test_install.py
  step waits waits 100 "${python[@]}" -m benchmarks.gpu_check.steps
  step_time resnet50 110 --sets resnet50 --no-compile
  step bandwidth bandwidth 45 "${python[@]}" -m benchmarks.gpu_check.bandwidth
  step_time llama_7b_bf16 70 --sets llama_7b_bf16 --contestants "$fused" --rounds 5 --no-compile # all need more memory
  step_time vit_b_16 60 --sets vit_b_16 --no-compile
  sanitize memcheck
  sanitize racecheck
}

portion_2() { # it trains
  step accuracy accuracy 570 "${python[@]}" -m benchmarks.cifar10_accuracy.main --data "$data" --batches 16384 256 \
    --arms "LARS, tuned" "SGD, tuned" "SGD, linear scaling" --trials 3 --seeds "${SEEDS:-1}" --workers 4 --minutes 9 \
    --results "$out/runs.jsonl"
}

portion_3() { # what is left
  local ours=("LARS(SGD fused)" "LARS(torchlars.optim.SGD)") section sections=()
  sanitize initcheck
  sanitize synccheck
  step_time runs 90 --sets resnet50 vit_b_16 --run-mb 12 24 40 --contestants "${ours[@]}" --no-compile
  for section in SpeedOfLight {Memory,Compute}WorkloadAnalysis LaunchStats Occupancy SchedulerStats WarpStateStats; do
    sections+=(--section "$section")
  done
  # By default ncu matches names without their namespaces.
  step profile profile 90 "${strictly[@]}" '^==PROF== Profiling' ncu --kernel-name-base demangled \
    --kernel-name regex:torchlars::cuda:: --profile-from-start off --launch-count 16 --clock-control none \
    "${sections[@]}" "${python[@]}" -m benchmarks.gpu_check.steps --profile
  step_time lamb 120 --optimizer lamb --sets resnet50 vit_b_16 --no-compile
  step_time one_100m 45 --sets one_100m --no-compile
  step_time tiny 150 --sets tiny --no-compile
  step_time compiled 300 --sets resnet50 --contestants "${ours[@]}" \
    "torch.compile of LARS + SGD fused" "torch.compile of a whole LARS-SGD"
}

build && "portion_$portion"
exit $failed
