#!/usr/bin/env bash
# All that a GPU has to prove, in one go: the tests that need one, those of sharded weights (a second GPU adds HSDP; what
# was left out for want of one is said), what a step costs, CIFAR-10 with base, SAM and RWP on complete schedules.
# Started again after a cut it goes on where it was.
#
#     recipes/gpu.sh --dataset uoft-cs/cifar10          # or --data_dir FOLDER; --epochs 200 --name cifar10_resnet18_200
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
results=$root/recipes/results/benchmark/gpu.jsonl
status=0
sharded=tests/engines/test_gpu_sharded.py
(cd "$root" && python -m pytest -m gpu --ignore="$sharded") || status=1
(cd "$root" && python -m pytest -m gpu -rsP "$sharded") || status=1
[ -e "$results" ] || python "$root/recipes/benchmark.py" --output "$results" || status=1
python "$root/recipes/compare.py" --config "$root/recipes/configs/compare/cifar10_resnet18.yaml" "$@" || status=1
python "$root/recipes/report.py" || status=1
exit $status
