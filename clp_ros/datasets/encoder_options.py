# SPDX-License-Identifier: Apache-2.0
"""The options of LeRobot's video encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean


def encoder_options(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the options in texts such as ``vcodec=h264``.

    Raises:
        ClpError: A text is not of this form.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ClpError(f"{text!r} is not OPTION=VALUE", where="encoder", hint="write, for example, crf=23")
        options[name] = yaml.safe_load(value)
    return options


def encoder_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``LeRobotDataset.create`` for the options; none for LeRobot's defaults.

    Raises:
        ClpError: LeRobot has no such option, or refuses its value.
    """
    if not options:
        return {}
    try:
        from lerobot.configs import RGBEncoderConfig
    except ImportError as error:
        raise ClpError("encoder options need LeRobot 0.6", where="encoder", hint="leave them out") from error
    known = list(RGBEncoderConfig.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise ClpError(f"LeRobot's encoder has no option {name!r}", where="encoder", hint=did_you_mean(name, known))
    try:
        return {"rgb_encoder": RGBEncoderConfig(**options)}
    except (TypeError, ValueError) as error:
        raise ClpError(f"LeRobot refuses the options ({error})", where="encoder") from error
