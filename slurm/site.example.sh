# The settings of your lab: copy this file to slurm/site.sh (git ignores it) and edit the copy. The
# scripts source it on the login node before they submit, and again in their jobs. $script is the
# script that sources it: train, prepare, train_tokenizer, sample, pipeline, sweep or measure_gpu.

# sbatch also reads its flags from SBATCH_ variables (see `man sbatch`). These override the #SBATCH
# lines of the scripts; flags on the command line override both. `sbatch slurm/train.sh` does not
# read this file before it submits: source it first, or run slurm/train.sh, which submits itself.
export SBATCH_ACCOUNT=my-lab
export SBATCH_PARTITION=cpu

case $script in
    train | sweep)
        export SBATCH_PARTITION=gpu SBATCH_QOS=normal
        export SBATCH_GPUS_PER_NODE=4 SBATCH_CPUS_PER_GPU=8 SBATCH_TIMELIMIT=24:00:00
        ;;
    sample | measure_gpu) export SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=1 ;;
esac

# Python: there is nothing to do if `make` has built .venv in the repository. Do not load a CUDA
# module: torch brings its own CUDA and cuDNN. A module puts older ones before them
# (LD_LIBRARY_PATH), and attention is slower.
# module load python/3.11
# source /scratch/my-lab/venv/bin/activate

# The network between nodes, if torch picks the wrong one:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
