#!/usr/bin/env bash
# Starts a sweep or training with a name, or resumes it if it exists, so that a scheduler can run this command repeatedly.
#     STORAGE=/shared/runs ray_configs/begin_or_resume.sh NAME experiments/tune.py ray_configs/tune.yaml data.train=...
# STORAGE is resources.storage, an absolute path that every node sees. Other paths start at the repository's folder. UPLOAD, if it is
# set, is resources.upload, an address from which a sweep or training is downloaded that STORAGE does not have.
# slurm.sbatch and kuberay/rayjob.yaml call this.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 script=$2
shift 2
words=("$@" "resources.storage=$STORAGE" ${UPLOAD:+"resources.upload=$UPLOAD"})
begun() { # whether there is a sweep of this name, here or in the object store
    [[ -e $STORAGE/sweeps/$name/settings.yaml ]] && return
    [[ -n ${UPLOAD:-} ]] && python - "$UPLOAD" "sweeps/$name" << 'END'
import sys

from umbrella.file_storage import FileStorage

sys.exit(f"{sys.argv[2]}/settings.yaml" not in FileStorage(sys.argv[1], "resources.upload").list_files(sys.argv[2]))
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
