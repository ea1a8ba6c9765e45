# SPDX-License-Identifier: Apache-2.0
"""``python -m clp_ros.cli``, and ``torchrun -m clp_ros.cli calibrate``: calibration in several processes."""

import sys

from clp_ros.cli import main
from clp_ros.core import processes

if __name__ == "__main__":
    with processes.process_group():
        sys.exit(main())
