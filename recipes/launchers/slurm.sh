#!/bin/bash
# LISA-7B on two machines with Slurm, one task each:
#
#     sbatch --dependency=singleton recipes/launchers/slurm.sh --max_steps 5000
#
# Five minutes before its time limit, or when it is preempted, the job saves and exits. Submit it several times: each
# job resumes where the last one stopped. Arguments are passed on to train.py.
#SBATCH --job-name=lisa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=lisa.log
set -euo pipefail
mapfile -t MACHINES < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # `head` would break the pipe of scontrol
export MAIN=${MACHINES[0]}
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 # signals that torch's launcher forwards
export PET_SHUTDOWN_TIMEOUT=280                     # seconds it waits for the processes to end
# In single quotes: every machine has its own SLURM_NODEID.
srun bash -c 'accelerate launch --config_file recipes/accelerate/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_GPUS_ON_NODE * SLURM_NNODES)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" \
    recipes/train.py --config recipes/configs/lisa_7b.yaml --resume_from_checkpoint auto "$@"' -- "$@"
