# SPDX-License-Identifier: Apache-2.0
from . import benchmark as benchmark
from . import calibrate as calibrate
from . import convert as convert
from . import demo as demo
from . import evaluate as evaluate
from . import inspect as inspect
from . import make_checkpoint as make_checkpoint
from . import prune as prune
from . import record as record
from . import verify as verify
from .progress import SILENT as SILENT
from .progress import Progress as Progress
from .request import Request as Request
from .request import Result as Result
