# SPDX-License-Identifier: Apache-2.0
"""ROS image messages to RGB arrays, the same from a bag and from a live topic; and RGB arrays to JPEG."""

import logging
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from clp_ros.errors import ClpError

_logger = logging.getLogger(__name__)

# encoding -> (bytes a pixel, OpenCV's conversion to RGB). ROS names a Bayer pattern by its first 2x2 cell, OpenCV by
# the second and third pixel of the second row: bayer_rggb8 is OpenCV's BayerBG.
_ENCODINGS: dict[str, tuple[int, str | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, "COLOR_BGR2RGB"),
    "rgba8": (4, "COLOR_RGBA2RGB"),
    "bgra8": (4, "COLOR_BGRA2RGB"),
    "mono8": (1, "COLOR_GRAY2RGB"),
    "bayer_rggb8": (1, "COLOR_BayerBG2RGB"),
    "bayer_bggr8": (1, "COLOR_BayerRG2RGB"),
    "bayer_gbrg8": (1, "COLOR_BayerGR2RGB"),
    "bayer_grbg8": (1, "COLOR_BayerGB2RGB"),
    "yuv422": (2, "COLOR_YUV2RGB_UYVY"),
    "yuv422_yuy2": (2, "COLOR_YUV2RGB_YUY2"),
}
JPEG_FORMAT = "rgb8; jpeg compressed bgr8"
"""A CompressedImage's ``format`` in image_transport's way: the source's encoding, the codec, the encoding inside."""

_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_PNG_END = b"IEND\xae\x42\x60\x82"
_PNG_DEPTH_AT = 24  # the signature, the header chunk's length and name, width and height come before it


def decode_image(msg: Any, topic: str | None = None) -> np.ndarray:
    """Decodes a ``sensor_msgs/Image`` or ``sensor_msgs/CompressedImage``.

    Raw images: rgb8, bgr8, rgba8, bgra8, mono8, bayer_{rggb,bggr,gbrg,grbg}8, yuv422 (UYVY) and yuv422_yuy2, with or
    without padding at the rows' ends; alpha is left out. Compressed images: JPEG and PNG of 8 bits.

    Args:
        msg: The message, from either bag backend or a live rclpy subscription.
        topic: Where it came from, for the error.

    Returns:
        (height, width, 3) uint8 RGB, contiguous, its own memory.

    Raises:
        ClpError: Unknown encoding or format, sizes that contradict each other, data cut off or not decodable. (A bit
            error in the middle of a JPEG's coded data decodes to a wrong picture, and cannot be told.)
    """
    data = np.frombuffer(msg.data, np.uint8) if len(msg.data) else np.empty(0, np.uint8)
    if hasattr(msg, "format"):
        return _decode_compressed(data, msg.format, topic)
    return _decode_raw(data, msg, topic)


def encode_jpeg(picture: np.ndarray, quality: int = 80) -> np.ndarray:
    """A picture as the data of a ``sensor_msgs/CompressedImage`` with :data:`JPEG_FORMAT`.

    Args:
        picture: (height, width, 3) uint8 RGB.
        quality: 1 to 100.

    Returns:
        (bytes,) uint8.
    """
    import cv2

    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return jpeg


def _decode_raw(data: np.ndarray, msg: Any, topic: str | None) -> np.ndarray:
    encoding, height, width, step = msg.encoding, msg.height, msg.width, msg.step
    if encoding not in _ENCODINGS:
        raise _fault(f"image encoding {encoding!r} is not one that can be read", topic, f"use {', '.join(_ENCODINGS)}")
    channels, conversion = _ENCODINGS[encoding]
    row = width * channels
    # Every chroma sample of 4:2:2 spans two pixels; a Bayer cell is two by two.
    odd = (channels == 2 and width % 2) or ("bayer" in encoding and (width < 2 or height < 2))
    if not height or not width or step < row or data.size != height * step or odd:
        raise _fault(
            f"{encoding} image of {width}x{height} with step {step} cannot hold {data.size} bytes",
            topic,
            "check the camera driver: data must be height * step bytes, step at least a row's",
        )
    pixels = np.ascontiguousarray(data.reshape(height, step)[:, :row])
    if conversion is None:
        return pixels.reshape(height, width, 3).copy()
    pixels = pixels.reshape((height, width) if channels == 1 else (height, width, channels))
    return np.ascontiguousarray(_converter()(pixels, encoding))


def _decode_compressed(data: np.ndarray, image_format: str, topic: str | None) -> np.ndarray:
    import cv2

    coded = data.tobytes()
    kind = _compressed_kind(image_format)
    if kind is None or (kind == "PNG" and coded[_PNG_DEPTH_AT : _PNG_DEPTH_AT + 1] == b"\x10"):
        depth = " of 16 bits" if kind else ""
        raise _fault(
            f"compressed image format {image_format!r}{depth} is not one that can be read",
            topic,
            "use jpeg or png of 8 bits",
        )
    whole = _is_whole(kind, coded)
    picture = None
    if whole:
        try:
            picture = cv2.imdecode(data, cv2.IMREAD_COLOR)  # BGR of 8 bits, of grey and alpha too
        except cv2.error as error:
            _logger.debug("OpenCV: %s", error)
    if picture is None:
        raise _fault(
            f"the {kind} data of {data.size} bytes is {'damaged' if whole else 'cut off'} (format {image_format!r})",
            topic,
            "leave the frame out, or check the camera driver and the network",
        )
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _compressed_kind(image_format: str) -> str | None:
    # compressed_image_transport writes "rgb8; jpeg compressed bgr8"; "16UC1; compressedDepth png" is not a picture.
    words = image_format.lower().replace(";", " ").split()
    if "compresseddepth" in words:
        return None
    if "jpeg" in words or "jpg" in words:
        return "JPEG"
    return "PNG" if "png" in words else None


def _is_whole(kind: str, coded: bytes) -> bool:
    if kind == "PNG":
        return _PNG_END in coded[-64:]
    if coded.endswith(_JPEG_END):
        return True
    # Some cameras pad a JPEG, so its end need not be last; but where it was cut off there is none after the last scan,
    # and not every OpenCV release refuses it then: some fill what is missing with grey.
    return coded.rfind(_JPEG_END) > coded.rfind(_JPEG_SCAN) >= 0


@cache
def _converter() -> Callable[[np.ndarray, str], np.ndarray]:
    """The function from (pixels, encoding) to RGB: cv_bridge's where it works, else OpenCV's own."""
    try:
        return _cv_bridge_converter()
    # A cv_bridge built for another NumPy or OpenCV fails in any of these ways, some only at the first conversion.
    except (ImportError, AttributeError, SystemError, RuntimeError, TypeError, ValueError) as error:
        _logger.debug("cv_bridge is not used: %s", error)
        return _opencv_converter


def _opencv_converter(pixels: np.ndarray, encoding: str) -> np.ndarray:
    import cv2

    return cv2.cvtColor(pixels, getattr(cv2, _ENCODINGS[encoding][1]))


def _cv_bridge_converter() -> Callable[[np.ndarray, str], np.ndarray]:
    from cv_bridge import CvBridge

    bridge = CvBridge()

    def convert(pixels: np.ndarray, encoding: str) -> np.ndarray:
        # Always rows without padding: cv_bridge shears rows whose step is no multiple of the pixel size.
        height, width = pixels.shape[:2]
        image = SimpleNamespace(
            encoding=encoding, height=height, width=width, step=pixels.nbytes // height, is_bigendian=0, data=pixels
        )
        return bridge.imgmsg_to_cv2(image, "rgb8")

    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    if not np.array_equal(convert(pixels, "bgr8"), pixels[..., ::-1]):
        raise RuntimeError("it converts bgr8 wrongly")
    return convert


def _fault(what: str, topic: str | None, fix: str) -> ClpError:
    return ClpError(what, where=topic, fix=fix)
