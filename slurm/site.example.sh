# The lab's own settings: copy to slurm/site.sh (git ignores it) and edit. The scripts source it on the
# login node before they submit, and again in their jobs. $script is the name of the one that asks:
# train, prepare, train_tokenizer, sample, pipeline, sweep or measure_gpu.

# sbatch reads its flags from SBATCH_ variables too (see `man sbatch`). They win over the #SBATCH lines
# of the scripts; flags on the command line win over them. `sbatch slurm/train.sh` does not read this
# file before it submits: source it, or let slurm/train.sh submit itself.
export SBATCH_ACCOUNT=my-lab
export SBATCH_PARTITION=cpu

case $script in
    train | sweep)
        export SBATCH_PARTITION=gpu SBATCH_QOS=normal
        export SBATCH_GPUS_PER_NODE=4 SBATCH_CPUS_PER_GPU=8 SBATCH_TIMELIMIT=24:00:00
        ;;
    sample | measure_gpu) export SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=1 ;;
esac

# Python: nothing to do where `make` has built .venv in the repository. No CUDA module: torch brings its
# own CUDA and cuDNN, and a module puts older ones before them (LD_LIBRARY_PATH), with slower attention.
# module load python/3.11
# source /scratch/my-lab/venv/bin/activate

# The network between nodes, where torch picks the wrong one:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
