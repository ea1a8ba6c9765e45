# SPDX-License-Identifier: Apache-2.0
"""Measures how often the scripted experts solve the simulated tasks.

    python benchmarks/simulated_tasks.py [--starts 100] [--first 100000] [--robots ur5 …] [--perturb 0.03]

Each robot does each of its tasks from the same seeded starts, without images. The interval is Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from results import Table, add_output_argument, write_results
from scipy.stats import binomtest

from clp_ros.robots.embodiment import load_embodiment
from clp_ros.simulation.episode import ExpertPolicy, play_episode
from clp_ros.simulation.perturbation import Perturbation
from clp_ros.simulation.task_registry import tasks_for
from clp_ros.simulation.task_simulation import TaskSimulation

ROBOTS = ("ur5", "ur10e", "aloha_single", "aloha_bimanual")
GOAL = 0.95


def main() -> int:
    """Prints a Markdown table. Returns 1 if an expert is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=100, help="number of starts of each task (default: %(default)s)")
    parser.add_argument("--first", type=int, default=100000, help="seed of the first start (default: %(default)s)")
    parser.add_argument("--robots", nargs="+", default=ROBOTS, choices=ROBOTS)
    parser.add_argument("--speed", type=float, default=1.0, help="factor on the experts' speed")
    parser.add_argument("--perturb", type=float, default=0.0, metavar="M", help="push the tool, up to M metres")
    add_output_argument(parser)
    options = parser.parse_args()
    units = {"solved": None, "of": None, "interval": "%", "median time": "s", "longest": "s", "processor time": "s"}
    table = Table("robot, task", units)
    missed, unsolved = [], []
    for robot in options.robots:
        embodiment = load_embodiment(robot)
        for name, task in tasks_for(robot).items():
            simulation = TaskSimulation(embodiment, task)
            expert = ExpertPolicy(simulation, options.speed, Perturbation(options.perturb))
            begun, times, failed = time.process_time(), [], []
            for seed in range(options.first, options.first + options.starts):
                for _ in play_episode(simulation, expert, seed):
                    pass
                if simulation.success_s is None:
                    failed.append(seed)
                else:
                    times.append(simulation.success_s)
            spent = (time.process_time() - begun) / options.starts
            low, high = binomtest(len(times), options.starts).proportion_ci(method="wilson")
            table.rows[f"{robot}, {name}"] = {
                "solved": len(times),
                "of": options.starts,
                "interval": f"{100 * low:.1f} to {100 * high:.1f}",
                "median time": round(float(np.median(times)), 2) if times else None,
                "longest": round(max(times), 2) if times else None,
                "processor time": round(spent, 2),
            }
            print(
                f"| {robot}, {name} | " + " | ".join(map(str, table.rows[f"{robot}, {name}"].values())) + " |",
                flush=True,
            )
            if failed:
                unsolved.append(f"{robot}, {name}: not solved from the seeds {', '.join(map(str, failed))}.")
            if len(times) < GOAL * options.starts:
                missed.append(f"{robot}, {name} is below {100 * GOAL:.0f} %.")
    write_results(options.output, [table], [*missed, *unsolved])
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
