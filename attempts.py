"""The program that slurm/train.sh calls, also in the code of a run: slurm/attempts.py."""

from config import run_program
from slurm.attempts import main

if __name__ == "__main__":
    run_program(main)
