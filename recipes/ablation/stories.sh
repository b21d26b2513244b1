# Sourced by strong.sh, depth.sh, labels.sh and latent.sh, with their arguments: OUTPUT, then options of `echo-trainer
# ablate`. Sets `output` and `here`, and makes stories without events in OUTPUT/data, other ones than the quickstart's;
# STORIES: further options of make_data.py.
output=${1:?usage: $(basename "$0") OUTPUT [options]}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DATA=$output/data OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ! -f $DATA/train.jsonl ]]; then
    python "$here/../quickstart/make_data.py" --out "$DATA" --seed 71 --train 6200 --test 800 --events 0 0 ${STORIES:-}
fi
