#!/bin/sh
# Edit the values below or set the variables in the environment. Without MODEL_PATH the embedded
# model is used.
HERE=$(cd "$(dirname "$0")" && pwd -P)  # resolves links

MODEL_PATH="${MODEL_PATH-}"
PROMPT="${PROMPT-How many circles?}"
IMAGE_FILE_PATH="${IMAGE_FILE_PATH-$HERE/../../pictures/drawn.png}"
MAX_TOKENS_TO_GENERATE="${MAX_TOKENS_TO_GENERATE-100}"
TEMPERATURE="${TEMPERATURE-0.8}"
TOP_P="${TOP_P-0.9}"
DO_SAMPLE="${DO_SAMPLE-False}"
ONLY_CPU="${ONLY_CPU-False}"

PYTHON="${PYTHON-$(command -v python || command -v python3)}"

PROGRAM="$HERE/../inference.py"
[ -f "$PROGRAM" ] || PROGRAM="$HERE/inference.py"  # in a copied dev folder

exec "$PYTHON" "$PROGRAM" \
    --model_path="$MODEL_PATH" \
    --prompt="$PROMPT" \
    --image_file_path="$IMAGE_FILE_PATH" \
    --max_tokens_to_generate="$MAX_TOKENS_TO_GENERATE" \
    --temperature="$TEMPERATURE" \
    --top_p="$TOP_P" \
    --do_sample="$DO_SAMPLE" \
    --only_cpu="$ONLY_CPU" \
    "$@"
