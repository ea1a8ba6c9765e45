# SPDX-License-Identifier: Apache-2.0
from .calibrate import Calibrator as Calibrator
from .calibrate import calibrate_bags as calibrate_bags
from .calibration_file import Calibration as Calibration
from .distances import AdjacentDistances as AdjacentDistances
from .similarity import LinearCKA as LinearCKA
