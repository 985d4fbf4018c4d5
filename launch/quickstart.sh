#!/usr/bin/env bash
# From nothing to a recommender on real data: sets up .venv, then prepares MovieLens-100K, trains a vocabulary and
# a small T5 on retrieval + MIM + MLM, evaluates it next to popularity and SASRec, and writes recommendations and a
# report.
#   ./launch/quickstart.sh [RUN_DIR]     (default: quickstart_run; a second call goes on where the first stopped)
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment ""
export PATH="$PWD/.venv/bin:$PATH"
run=${1:+$(cd "$here" && realpath -m -- "$1")}
run=${run:-quickstart_run}
export RECALIGN_DATA_DIR="$run/data"
mkdir -p "$run"
start=$SECONDS
say() { printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" $((SECONDS - start)); }

say "1/7 MovieLens-100K"
if [ ! -e "$run/data/movielens/corpus.json" ]; then
  python launch/fetch_movielens.py --output "$run/raw"
  recalign prepare --source movielens --input "$run/raw" --corpus movielens
fi
recalign inspect --corpus movielens

say "2/7 a vocabulary of 1,000 pieces"
vocabulary="$run/data/vocabularies/movielens_1000.model"
[ -e "$vocabulary" ] || recalign vocab --corpus movielens --size 1000 --output "$vocabulary"

say "3/7 training a small T5: retrieval + MIM + MLM"
recalign train --gin_file gin_configs/experiments/quickstart.gin \
  --gin.VOCABULARY="$vocabulary" --gin.MODEL_DIR="$run/model"

say "4/7 evaluation on the test split, all items ranked"
recalign eval --gin_file gin_configs/models/t5_tiny_tied.gin --gin_file gin_configs/runs/eval.gin \
  --gin.TASK_NAME=movielens_retrieval_token --gin.VOCABULARY="$vocabulary" \
  --gin.CHECKPOINT_PATH="$run/model" --gin.OUTPUT_DIR="$run/model/evaluation" --json | tail -n 1 > "$run/eval.json"
recalign baseline --corpus movielens --method popularity --output_dir "$run/popularity" --json | tail -n 1 > "$run/popularity.json"
recalign baseline --corpus movielens --method sasrec --gin_file gin_configs/experiments/baselines_movielens.gin \
  --model_dir "$run/sasrec" --output_dir "$run/sasrec/evaluation" --json | tail -n 1 > "$run/sasrec.json"

say "5/7 top-10 recommendations"
recalign infer --gin_file gin_configs/models/t5_tiny_tied.gin --gin_file gin_configs/runs/infer.gin \
  --gin.TASK_NAME=movielens_retrieval_token --gin.VOCABULARY="$vocabulary" --gin.SPLIT=all --gin.MAX_USERS=5 \
  --gin.CHECKPOINT_PATH="$run/model" --gin.OUTPUT_DIR="$run/recommendations"

say "6/7 a report"
recalign report --runs "$run" --output "$run/report.html"

say "7/7 what came out"
python launch/compare.py "$run/eval.json" "$run/recommendations/recommendations.jsonl" "$run/popularity.json" "$run/sasrec.json"
printf '\nDone in %d s after installation. The model is in %s/model; open %s/report.html in a browser.\n' $((SECONDS - start)) "$run" "$run"
printf 'Next: README.md, "On your own data".\n'
