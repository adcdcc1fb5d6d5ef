#!/usr/bin/env bash
# Parity tests and the step benchmark on an accelerator, then one table.
#
#     benchmarks/gpu.sh [DEVICE] [PYTHON]        # default: cuda .venv/bin/python
#
# Ends with code 3 where the machine has no such device, so that a skipped run is never read as a passed one.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
python=${2:-.venv/bin/python}

"$python" - "$device" <<'CHECK' || exit 3
import sys
import torch

kind = sys.argv[1].split(":")[0]
found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
if found is None or found.type != kind:
    sys.exit(f"expected a device of kind {kind!r}, found {found}; nothing was run")
print(f"device: {torch.get_device_module(found).get_device_name(0)}   torch {torch.__version__}")
CHECK

status=0
"$python" -m pytest tests/parity -q -k "$device" || status=$?

for tokens in 128 512 2048 8192; do
    rm -f "benchmarks/results/step-$tokens-$device.json"  # a failed run must not show an older one
    "$python" benchmarks/step.py --device "$device" --layers 12 --width 1024 --tokens "$tokens" --micro-batches 4 --json \
        >/dev/null || status=$?
done

"$python" - "$device" <<'TABLE'
import json
import sys
from pathlib import Path

print(f"\nparity and speed on {sys.argv[1]}")
print(f"{'tokens':>7} {'resident s':>11} {'streamed s':>11} {'ratio':>6} {'bare I/O s':>11} {'floor ratio':>12} {'stalled s':>10}")
for tokens in (128, 512, 2048, 8192):
    path = Path(f"benchmarks/results/step-{tokens}-{sys.argv[1]}.json")
    if path.exists():
        row = json.loads(path.read_text())
        print(
            f"{tokens:>7} {row['resident_s']:>11.3f} {row['streamed_s']:>11.3f} {row['ratio']:>6.2f} "
            f"{row['bare_io_s']:>11.3f} {row['floor_ratio']:>12.2f} {row['stalled_s']:>10.3f}"
        )
    else:
        print(f"{tokens:>7} no result")
TABLE
exit "$status"
