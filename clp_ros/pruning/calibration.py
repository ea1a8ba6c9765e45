# SPDX-License-Identifier: Apache-2.0
"""The old name of :mod:`clp_ros.calibration.calibrate` and the old ``torchrun`` entry, for one release."""

import runpy
import sys
import warnings

from clp_ros.calibration.calibrate import (
    Calibrator,
    calibrate_bags,
    check_seed,
    draw_calibration_set,
    given_statistics,
    normalise_by_steps,
    prepare,
)

__all__ = [
    "Calibrator",
    "calibrate_bags",
    "check_seed",
    "draw_calibration_set",
    "given_statistics",
    "normalise_by_steps",
    "prepare",
]

if __name__ == "__main__":
    print(  # noqa: T201
        "warning: -m clp_ros.pruning.calibration is now -m clp_ros.cli calibrate; the old name ends in 0.3",
        file=sys.stderr,
    )
    sys.argv[1:1] = ["calibrate"]
    runpy.run_module("clp_ros.cli", run_name="__main__", alter_sys=True)
else:
    warnings.warn("clp_ros.pruning.calibration is now clp_ros.calibration.calibrate", DeprecationWarning, stacklevel=2)
