# SPDX-License-Identifier: Apache-2.0
"""LeRobot's private names, as lerobot 0.5.1 and 0.6.1 have them, unless a function says otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy

GROOT_MODEL = "_groot_model"
"""Attribute of a GR00T policy that holds NVIDIA's model; with a dot, the prefix of its tensors in a checkpoint."""


def groot_model(policy: PreTrainedPolicy) -> Any:
    """NVIDIA's model inside LeRobot's GR00T policy, which has no public attribute for it."""
    return policy.get_submodule(GROOT_MODEL)


def link_relative_actions(preprocessor: Any, postprocessor: Any) -> None:
    """Gives a loaded postprocessor the preprocessor's step that relative actions count from.

    ``make_pre_post_processors``, which does it too, also replaces the statistics of 0.5's GR00T.

    Args:
        preprocessor: LeRobot's pipeline.
        postprocessor: LeRobot's pipeline, changed in place.
    """
    from lerobot.policies.factory import _reconnect_relative_absolute_steps

    _reconnect_relative_absolute_steps(preprocessor, postprocessor)


def link_groot_n1_7_steps(preprocessor: Any, postprocessor: Any) -> None:
    """The same for GR00T N1.7, whose steps are its own (lerobot 0.6.1).

    Args:
        preprocessor: LeRobot's pipeline.
        postprocessor: LeRobot's pipeline, changed in place.
    """
    from lerobot.policies.groot.processor_groot import _reconnect_groot_n1_7_pack_decode_steps

    _reconnect_groot_n1_7_pack_decode_steps(preprocessor, postprocessor)


def relative_mask(step: Any, action_size: int) -> Sequence[bool]:
    """Which components of an action count from the state.

    0.6.1 has the public ``reanchor_relative_rtc_prefix`` around it, 0.5.1 has nothing.

    Args:
        step: LeRobot's RelativeActionsProcessorStep.
        action_size: Components of an action.
    """
    return step._build_mask(action_size)


def relative_state(step: Any) -> torch.Tensor:
    """The state, (batch, state_size), that relative actions count from: the last one the preprocessor saw.

    0.6.1 has the public ``get_cached_state``, 0.5.1 the attribute only.

    Args:
        step: LeRobot's RelativeActionsProcessorStep.
    """
    return step._last_state


def replace_video_encoder(writer: Any, make: Callable[[Any, Any, int | None], Any]) -> tuple[Any, Any]:
    """Replaces the encoder of a dataset's writer (lerobot 0.6).

    Args:
        writer: LeRobot's DatasetWriter, with streaming encoding. Changed in place.
        make: Returns the new encoder. Called with the settings of colour and of depth images, and the threads.

    Returns:
        The new encoder, and the settings of colour images.
    """
    given = writer._streaming_encoder
    writer._streaming_encoder = made = make(given._rgb_encoder, given._depth_encoder, given._encoder_threads)
    return made, given._rgb_encoder


def is_in_video_encoder() -> bool:
    """Whether the current thread is one of LeRobot's video encoder (lerobot 0.6)."""
    from lerobot.datasets.video_utils import _CameraEncoderThread

    return isinstance(threading.current_thread(), _CameraEncoderThread)


def is_video_queue_full(encoder: Any, camera: str) -> bool:
    """Whether pictures of a camera wait for LeRobot's StreamingVideoEncoder, as many as may (lerobot 0.6)."""
    if not encoder._episode_active:
        return False
    return encoder._frame_queues[camera].full() and encoder._threads[camera].is_alive()
