# SPDX-License-Identifier: Apache-2.0
from .hub import local_folder as local_folder
from .layer_stack import LayerStack as LayerStack
from .manifest import Manifest as Manifest
from .manifest import read_manifest as read_manifest
from .safetensors_header import TensorInfo as TensorInfo
from .safetensors_header import read_header as read_header
from .units import UnitKind as UnitKind
