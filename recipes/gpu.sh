#!/usr/bin/env bash
# All that a GPU has to prove, in one go: the tests that need one, what a step costs, CIFAR-10 with base, SAM and RWP on
# complete schedules. Started again after a cut it goes on where it was.
#
#     recipes/gpu.sh --dataset uoft-cs/cifar10          # or --data_dir FOLDER; --epochs 200 --name cifar10_resnet18_200
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m gpu
[ -e recipes/results/benchmark/gpu.jsonl ] || python recipes/benchmark.py --output recipes/results/benchmark/gpu.jsonl
python recipes/compare.py --config recipes/configs/compare/cifar10_resnet18.yaml "$@"
python recipes/report.py
