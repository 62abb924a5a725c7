#!/bin/bash
# A recipe under SLURM, over as many jobs as it takes. From the repository's root:
#
#   sbatch recipes/slurm.sh recipes.gpt2.pretrain fit --config recipes/gpt2/small_multi_gpu.yaml
#   sbatch --nodes 2 recipes/slurm.sh recipes.gpt2.pretrain fit --config recipes/gpt2/small_multi_gpu.yaml \
#     --trainer.num_nodes 2 --trainer.accumulate_grad_batches 1 --trainer.val_check_interval 2000
#
# Five minutes before its time is over every rank gets SIGUSR1: the run saves, puts the job back into the queue and ends. A
# job that is preempted gets SIGTERM: the run saves, SLURM puts it back. Either way the next start goes on from the newest whole
# checkpoint; so does `sbatch` with the same line after a failure. One rank that dies takes the others with it.
#
#SBATCH --job-name=slope
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slope-%j.log
export PATH="$PWD/.venv/bin:$PATH"
srun --kill-on-bad-exit=1 python -m "$@" --resume auto
