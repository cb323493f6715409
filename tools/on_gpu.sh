#!/usr/bin/env bash
# All that a real GPU has to show, with one command: bash tools/on_gpu.sh [FOLDER OF DATA]
# An epoch takes an H200 13 minutes, by its rate, and there are two: STEPS=1000 before it for less.
# It needs requirements-dev.txt, wiki1m and senteval/ in the folder or from the Hub, and 10 GB of
# disk. Where bert-base-uncased is not to be had, random weights of its shape are as fast.
# What it prints is kept in runs/gpu/log.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/gpu
exec > >(tee runs/gpu/log.txt) 2>&1
[ $# = 0 ] || export MINCSE_DATA=$1
data=${MINCSE_DATA:+--data $MINCSE_DATA}

echo "== the machine"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'

echo "== the GPU tests"
python -m pytest -q tests/test_gpu.py

echo "== beside sentence-transformers; a million sentences, and the share of the matrix rate"
python -m tools.bench --device cuda $data

echo "== the papers beside SimCSE"
python -m tools.bench --device cuda --only methods --steps 20 $data

steps=${STEPS:-15625}
echo "== $steps steps of bert-base with dev scores and saves; an epoch has 15,625, goal 180 s"
encoder=bert-base-uncased
if ! python -c "from engine.hub import encoder_folder; encoder_folder('$encoder')"; then
    rm -rf runs/gpu/bert-base && encoder=runs/gpu/bert-base
    python -c "from pathlib import Path; from tools.bench import make_encoder
make_encoder('bert-base', Path('runs/gpu'))"
fi
flags="--encoder $encoder --corpus wiki1m --test stsb --steps $steps --device cuda $data"
python mincse.py $flags --dry-run
time python mincse.py $flags --out runs/gpu/epoch --overwrite

echo "== the same with --compile yes"
time python mincse.py $flags --compile yes --out runs/gpu/compiled --overwrite
