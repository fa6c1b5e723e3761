"""Trains several runs in one process group: the arguments of each as a JSON list of lists."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import load_config, run_program
from distributed import init_distributed, shut_down
from rocket import train


def main(arguments: list[str]) -> None:
    configs = [load_config(run, usage="")[0] for run in json.loads(arguments[0])]
    world = init_distributed(configs[0].train)
    try:
        for config in configs:
            train(config, False, world)
    finally:
        shut_down()


run_program(main)
