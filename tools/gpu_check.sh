#!/bin/sh
# gpu_check.sh [--only tests|bench|models|sanitize] [OUTPUT]: what a machine with a GPU is for.
#
# Takes a finished build (make install with nvcc on the PATH) and runs the CUDA tests, a subset under
# compute-sanitizer, the bench suites and whole models. OUTPUT (default gpu-check) gets one JSON file
# per part, summary.json and summary.txt.
set -u
only=all
output=gpu-check
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=$2; shift 2 ;;
    *) output=$1; shift ;;
  esac
done
case $only in all|tests|bench|models|sanitize) ;; *)
  echo "gpu_check.sh: --only takes tests, bench, models or sanitize" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.." || exit 2
bin=${VENV:-.venv}/bin
mkdir -p "$output"
: > "$output/parts"

"$bin/python" -c "
import torch
assert torch.cuda.is_available(), 'torch sees no GPU'
import torchops._cuda as cuda, torchops
assert cuda.available, 'libtorchops_cuda.so is not built or was not loaded'
print(torch.cuda.get_device_name(), 'torch', torch.__version__, *sorted(cuda.available))
" > "$output/device.txt" || exit 1

# part NAME COMMAND...: runs it, keeps its output and its exit status.
part() {
  name=$1; shift
  "$@" > "$output/$name.txt" 2>&1
  status=$?
  echo "$name $status" | tee -a "$output/parts"
}
wanted() { [ "$only" = all ] || [ "$only" = "$1" ]; }

if wanted tests; then
  part tests "$bin/python" -m pytest -q -m cuda --junitxml="$output/tests.xml"
  part verify "$bin/torchops" verify --device cuda
fi
if wanted sanitize; then
  for tool in memcheck racecheck initcheck synccheck; do
    part "sanitize-$tool" compute-sanitizer --tool $tool --error-exitcode 9 \
      "$bin/torchops" verify --device cuda
  done
fi
# Dense and grouped convolutions are left out: backend("auto") gives them to native.
if wanted bench; then
  ops="batch_norm pooling depthwise --device cuda --quick"
  # shellcheck disable=SC2086  # several words
  part bench-bfloat16 "$bin/torchops" bench $ops --suite all --dtype bfloat16 \
    --layout contiguous,channels_last --json "$output/bench-bfloat16.json"
  # shellcheck disable=SC2086
  part bench-float32 "$bin/torchops" bench $ops --suite all --dtype float32 \
    --layout channels_last --json "$output/bench-float32.json"
  # A compiled peer takes seconds a row: one network.
  # shellcheck disable=SC2086
  part bench-compile "$bin/torchops" bench $ops --suite resnet50 --dtype bfloat16 \
    --layout channels_last --vs eager,compile --json "$output/bench-compile.json"
fi
if wanted models; then
  part models "$bin/python" bench/models.py --device cuda --dtype bfloat16 --batch 256 \
    --layout channels_last --json "$output/models.json"
fi

"$bin/python" - "$output" <<'PYTHON'
import json, pathlib, sys
output = pathlib.Path(sys.argv[1])
parts = dict(line.split() for line in (output / "parts").read_text().splitlines())
summary = {
    "device": (output / "device.txt").read_text().strip(),
    "parts": {name: int(status) for name, status in parts.items()},
    "results": {
        path.stem: json.loads(path.read_text())
        for path in sorted(output.glob("*.json"))
        if path.stem != "summary"
    },
}
(output / "summary.json").write_text(json.dumps(summary, indent=1))
lines = [summary["device"], ""]
for name, status in summary["parts"].items():
    lines += [f"{name:20} {'ok' if status == 0 else f'FAILED ({status})'}"]
    lines += ["    " + line for line in (output / f"{name}.txt").read_text().splitlines()[-40:]]
(output / "summary.txt").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
sys.exit(any(summary["parts"].values()))
PYTHON
