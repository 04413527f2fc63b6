#!/usr/bin/env bash
# Decode steps at a model's shape, 8K context, 1,024 live tokens a head: ours, transformers' and FastDMS's, on one GPU.
#
#   scripts/benchmarks/small_batches.sh OUT [FASTDMS]      OUT: a folder; FASTDMS: a clone of github.com/shisa-ai/FastDMS
#   MODEL=qwen3_8b BATCHES="1 8" scripts/benchmarks/small_batches.sh OUT
set -euo pipefail
out=${1:?a folder for the results} fastdms=${2:-}
model=${MODEL:-llama3.2_1b} batches=${BATCHES:-1 8 256}
mkdir -p "$out"

# All heads equally long, as FastDMS's are here.
python -m scripts.benchmarks.bench_decode --model "$model" --spread 1 --out "$out/decode_$model.json" \
    --cells $(printf '%sx8192x8 ' $batches) --steps 64
python -m scripts.benchmarks.decode_peers --model "$model" --out "$out/decode_peers_$model.json" --steps 8 --rounds 2 \
    --modes graph --cells $(printf '%sx8192 ' $batches) ${fastdms:+--fastdms "$fastdms"}
