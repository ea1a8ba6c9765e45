# SPDX-License-Identifier: Apache-2.0
from .images import decode_image as decode_image
from .images import encode_jpeg as encode_jpeg
from .joint_states import JointSelector as JointSelector
from .joint_states import JointStream as JointStream
from .stamps import Clock as Clock
from .stamps import Stream as Stream
from .stamps import header_stamp_ns as header_stamp_ns
