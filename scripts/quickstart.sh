#!/usr/bin/env bash
# From nothing to a fine-tuned model: makes the environment, fine-tunes SmolLM2-135M in 4 bits with DoRA on 120 of 600 support tickets,
# shows what it learned on 60 it has not seen, and merges it. After installation about three minutes on two cores with AVX2 alone.
#   scripts/quickstart.sh [--steps 30] [--output runs/quickstart]
set -euo pipefail
cd "$(dirname "$0")/.."
steps=30
output=runs/quickstart
while [ $# -gt 0 ]; do
    case "$1" in
        --steps) steps="$2"; shift 2 ;;
        --output) output="$2"; shift 2 ;;
        *) echo "$1: unknown argument. Usage: scripts/quickstart.sh [--steps 30] [--output runs/quickstart]" >&2; exit 2 ;;
    esac
done
if [ -e "$output" ]; then
    echo "output=$output: exists already. Remove it, or choose another folder with --output." >&2
    exit 2
fi
source scripts/environment.sh

set -x
qlora finetune --model smollm2-135m --data scripts/data/tickets_train.jsonl --eval-fraction 0.015 --calibrate 2048 \
    --bits 4 --method dora --rank 16 --steps "$steps" --batch-size 4 --learning-rate 2e-3 --warmup 6 --max-tokens 256 --output "$output"
python scripts/compare_tickets.py --model smollm2-135m --adapter "$output/adapter" --data scripts/data/tickets_test.jsonl --at-least 0.9
qlora merge --adapter "$output/adapter" --output "$output/merged"
