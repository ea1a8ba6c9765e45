# SPDX-License-Identifier: Apache-2.0
from .errors import ClpError as ClpError
from .errors import NotHereError as NotHereError
from .resources import resource_path as resource_path
from .settings import Settings as Settings
from .settings import load_settings as load_settings
