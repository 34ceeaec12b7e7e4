#!/usr/bin/env bash
# Begins a sweep or a training under a name, or goes on with the one that has it: what a scheduler can start again and again.
#     STORAGE=/shared/runs ray_configs/begin_or_resume.sh NAME experiments/tune.py ray_configs/tune.yaml data.train=...
# STORAGE is resources.storage, an absolute path that every node sees. Other paths start at the repository's folder. MIRROR, if it is
# set, is resources.mirror, an address from which a sweep or training comes that STORAGE does not have.
# slurm.sbatch and kuberay/rayjob.yaml call this.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 script=$2
shift 2
words=("$@" "resources.storage=$STORAGE" ${MIRROR:+"resources.mirror=$MIRROR"})
begun() { # whether there is a sweep of this name, here or in the mirror
    [[ -e $STORAGE/sweeps/$name/settings.yaml ]] && return
    [[ -n ${MIRROR:-} ]] && python - "$MIRROR" "sweeps/$name" << 'END'
import sys

from umbrella.shared_store import SharedStore

sys.exit("settings.yaml" not in SharedStore(sys.argv[1], "resources.mirror").names(sys.argv[2]))
END
}
if [[ $script == *tune.py ]] && begun; then
    resources=() # the rest are the sweep's own
    for word in "${words[@]}"; do
        if [[ $word == resources.*=* ]]; then resources+=("$word"); fi
    done
    exec python "$script" --resume "$name" "${resources[@]}"
fi
exec python "$script" "${words[@]}" "name=$name" # train.py goes on by its name alone
