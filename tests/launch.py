"""Trains several runs in one process group: the arguments of each as a JSON list of lists.

A run that ends in a user's mistake says so on every rank that raised it, and the next one starts.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import UserError, load_config, run_program
from distributed import init_distributed, shut_down
from job import Signals
from rocket import train


def main(arguments: list[str]) -> None:
    configs = [load_config(run, usage="")[0] for run in json.loads(arguments[0])]
    world = init_distributed(configs[0])
    try:
        for index, config in enumerate(configs):
            try:
                train(config, False, Signals(), world)
            except UserError as error:
                # one write a line: the ranks share the pipe
                sys.stderr.write(f"run {index} rank {world.rank}: {error}\n")
    finally:
        shut_down()


run_program(main)
