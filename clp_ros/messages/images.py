# SPDX-License-Identifier: Apache-2.0
"""Converts ROS image messages, from a bag or a live topic, to RGB arrays; and RGB arrays to JPEG."""

import logging
import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError

_logger = logging.getLogger(__name__)

# encoding of 8 bits -> (bytes a pixel, OpenCV's conversion to RGB). ROS names a Bayer pattern by its first 2x2 cell,
# OpenCV by the second and third pixel of the second row: bayer_rggb8 is OpenCV's BayerBG.
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
# The same with 16 bits a channel.
_DEEP = {name[:-1] + "16": name for name in _ENCODINGS if name.endswith("8")}
# sensor_msgs' names since ROS 2 Iron, which deprecated the names above.
_RENAMED = {"uyvy": "yuv422", "yuyv": "yuv422_yuy2"}
# 4:2:0: a plane of luma, then half as many rows of chroma, interleaved (nv12, nv21) or as two planes (i420).
_SUBSAMPLED = {"nv12": "COLOR_YUV2RGB_NV12", "nv21": "COLOR_YUV2RGB_NV21", "i420": "COLOR_YUV2RGB_I420"}
_READABLE = (*_ENCODINGS, *_DEEP, *_RENAMED, *_SUBSAMPLED)
_DEPTH_OR_MATRIX = re.compile(r"(8|16|32|64)(u|s|f)(c\d*)?")
JPEG_FORMAT = "rgb8; jpeg compressed bgr8"
"""A CompressedImage's ``format`` in image_transport's way: the source's encoding, the codec, the encoding inside."""

_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_PNG_END = b"IEND\xae\x42\x60\x82"
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"RIFF": "WebP",
}
_CODECS = {"jpeg": "JPEG", "jpg": "JPEG", "mjpeg": "JPEG", "mjpg": "JPEG", "png": "PNG", "tiff": "TIFF", "webp": "WebP"}


def decode_image(msg: Any, topic: str | None = None) -> np.ndarray:
    """Decodes a ``sensor_msgs/Image`` or ``sensor_msgs/CompressedImage``.

    Raw images: rgb, bgr, rgba, bgra, mono and bayer_{rggb,bggr,gbrg,grbg}, of 8 or 16 bits in either byte order; uyvy
    (yuv422), yuyv (yuv422_yuy2), nv12, nv21, i420. Rows may be padded at their ends; alpha is left out; 16 bits are
    scaled to 8 as cv_bridge scales them.

    Compressed images: JPEG, PNG, TIFF and WebP of 8 or 16 bits, recognised by their content. The ``format`` is
    interpreted as by compressed_image_transport's subscriber: ``bayer_rggb8; png compressed `` is a Bayer image,
    ``rgb8; jpeg compressed rgb8`` has red and blue exchanged within the JPEG, and one word (``jpeg``) or nothing is a
    colour or grey image.

    Args:
        msg: The message, from either bag backend or a live rclpy subscription.
        topic: The message's topic, for errors.

    Returns:
        (height, width, 3) uint8 RGB, contiguous, in new memory.

    Raises:
        ClpError: The encoding or format is unknown, sizes contradict each other, or the data is truncated or damaged.
            (A bit error within a JPEG's coded data gives a wrong picture, and cannot be detected.)
    """
    data = np.frombuffer(msg.data, np.uint8) if len(msg.data) else np.empty(0, np.uint8)
    if hasattr(msg, "format"):
        return _decode_compressed(data, msg.format, topic)
    return _decode_raw(data, msg, topic)


def encode_jpeg(picture: np.ndarray, quality: int = 80) -> np.ndarray:
    """Encodes an image as the data of a ``sensor_msgs/CompressedImage`` with :data:`JPEG_FORMAT`.

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
    encoding = _RENAMED.get(msg.encoding, msg.encoding)
    if encoding not in _READABLE:
        colourless = ", because it does not name its channels" if _DEPTH_OR_MATRIX.fullmatch(encoding.lower()) else ""
        raise ClpError(
            f"image encoding {encoding!r} cannot be read{colourless}", where=topic, hint=f"use {', '.join(_READABLE)}"
        )
    height, width, step = msg.height, msg.width, msg.step
    _check_cells(encoding, msg.encoding, height, width, topic)
    if encoding in _SUBSAMPLED:
        return _decode_subsampled(data, encoding, height, width, step, topic)
    channels, _ = _ENCODINGS[_DEEP.get(encoding, encoding)]
    row = width * channels * (2 if encoding in _DEEP else 1)
    if not height or not width or step < row or data.size != height * step:
        raise _contradiction(data, encoding, height, width, step, topic)
    pixels = np.ascontiguousarray(data.reshape(height, step)[:, :row])
    if encoding in _DEEP:
        pixels = pixels.view(">u2" if msg.is_bigendian else "<u2").astype(np.uint16)
    return _to_rgb(pixels.reshape((height, width) if channels == 1 else (height, width, channels)), encoding)


def _decode_subsampled(
    data: np.ndarray, encoding: str, height: int, width: int, step: int, topic: str | None
) -> np.ndarray:
    import cv2

    rows = height + height // 2
    # Bytes of luma in a row. Some drivers give the bytes of a pixel times the width as step: their rows have no
    # padding.
    stride = step if encoding != "i420" and step >= width and data.size == step * rows else width
    if not height or not width or data.size != stride * rows:
        raise _contradiction(data, encoding, height, width, step, topic)
    pixels = np.ascontiguousarray(data.reshape(rows, stride)[:, :width])
    return cv2.cvtColor(pixels, getattr(cv2, _SUBSAMPLED[encoding]))


def _check_cells(encoding: str, name: str, height: int, width: int, topic: str | None) -> None:
    """Refuses odd sizes: a chroma sample covers two pixels, a Bayer cell two by two."""
    rule = ""
    if encoding in _SUBSAMPLED and (height % 2 or width % 2):
        rule = "width and height must be even"
    elif _ENCODINGS.get(encoding, (0, None))[0] == 2 and width % 2:
        rule = "the width must be even"
    elif "bayer" in encoding and min(height, width) < 2:
        rule = "width and height must be at least 2"
    if rule:
        what = f"an image of {width}x{height} in the encoding {name}, where {rule}"
        raise ClpError(what, where=topic, hint="check the camera driver")


def _contradiction(data: np.ndarray, encoding: str, height: int, width: int, step: int, topic: str | None) -> ClpError:
    return ClpError(
        f"an image of {width}x{height} in the encoding {encoding} with step {step} cannot have {data.size} bytes",
        where=topic,
        hint="check the camera driver: data must have height * step bytes (1.5 times as many for nv12, nv21 and i420), "
        "and step must be at least the bytes of a row",
    )


def _to_rgb(pixels: np.ndarray, encoding: str) -> np.ndarray:
    """Converts an array in one of ``_ENCODINGS`` or ``_DEEP`` to 8-bit RGB in new memory."""
    name = _DEEP.get(encoding, encoding)
    if _ENCODINGS[name][1] is None:
        pixels = pixels.copy()
    else:
        convert = _opencv_converter if encoding in _DEEP else _converter()
        pixels = convert(pixels, name)
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 becomes 255, as in cv_bridge
    return np.ascontiguousarray(pixels)


def _decode_compressed(data: np.ndarray, image_format: str, topic: str | None) -> np.ndarray:
    import cv2

    coded = data.tobytes()
    words = image_format.lower().replace(";", " ").split()
    kind = next((kind for magic, kind in _MAGIC.items() if coded.startswith(magic)), None)
    kind = kind or next((_CODECS[word] for word in words if word in _CODECS), None)
    if not coded and kind is None:
        kind = "image"
    if "compresseddepth" in words or kind is None:
        raise _unreadable(
            image_format, "it is a depth image" if "compresseddepth" in words else "no JPEG, PNG, TIFF or WebP", topic
        )
    whole = _is_whole(kind, coded)
    picture = None
    if whole:
        try:
            picture = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)  # like image_transport, without the EXIF rotation
        except cv2.error as error:
            _logger.debug("OpenCV: %s", error)
    if picture is None:
        raise ClpError(
            f"the {kind} data of {data.size} bytes is {'damaged' if whole else 'cut off'} (format {image_format!r})",
            where=topic,
            hint="leave the frame out, or check the camera driver and the network",
        )
    encoding, reason = _decoded_encoding(picture, kind, image_format)
    if encoding is None:
        raise _unreadable(image_format, reason, topic)
    return _to_rgb(picture, encoding)


def _decoded_encoding(picture: np.ndarray, kind: str, image_format: str) -> tuple[str | None, str]:
    """Returns the encoding of OpenCV's array of a compressed image; or None and why the encoding is unknown.

    The rules are those of compressed_image_transport (compressed_publisher.cpp, compressed_subscriber.cpp). OpenCV's
    array is BGR if the publisher compressed BGR, which "compressed bgr" after a colour encoding says.
    """
    source, semicolon, rest = (part.strip() for part in image_format.lower().partition(";"))
    target = found[1] if (found := re.search(r"compressed\s+(\w+)", rest)) else ""
    source = source if semicolon else ""
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    if picture.dtype not in (np.uint8, np.uint16) or channels not in (1, 3, 4):
        return None, f"its pixels have {channels} channels of {picture.dtype}"
    bits = picture.dtype.itemsize * 8
    if _DEPTH_OR_MATRIX.fullmatch(source) and not (source.startswith("8") and target):
        return None, "it does not name its channels"
    mosaic = source.startswith("bayer_") and (not target or target.startswith("bayer_"))
    if mosaic:
        name = f"{source[: len('bayer_rggb')]}{bits}"
        if channels != 1 or (name not in _ENCODINGS and name not in _DEEP) or min(picture.shape) < 2:
            return None, f"its pixels are {channels} x {bits} bits, which is not {source}"
        return name, ""
    if channels == 1:
        if source.startswith("bayer_") and not target.startswith("mono"):
            return None, f"the format says {target}, but the image has one channel"
        if bits == 16 and "mono16" not in (source, target):
            return None, "one channel of 16 bits may be grey or depth, and the format does not say mono16"
        return f"mono{bits}", ""
    exchanged = not target.startswith("bgr") and (
        target.startswith("rgb") or source in ("rgb8", "bgr8", "rgba8", "bgra8", "rgb16", "bgr16", "rgba16", "bgra16")
    )
    if exchanged and kind == "TIFF" and source.startswith("bgr") and not target:
        return None, "image_transport's publisher writes BGR here, but its subscriber reads RGB"
    return f"{'rgb' if exchanged else 'bgr'}{'a' if channels == 4 else ''}{bits}", ""


def _unreadable(image_format: str, reason: str, topic: str | None) -> ClpError:
    what = f"compressed image format {image_format!r} cannot be read: {reason}"
    return ClpError(what, where=topic, hint="use jpeg or png of a colour picture")


def _is_whole(kind: str, coded: bytes) -> bool:
    if kind == "PNG":
        return _PNG_END in coded
    if kind != "JPEG" or coded.endswith(_JPEG_END):
        return bool(coded)
    # Some cameras append padding, so the end marker need not be last. A truncated JPEG has no end marker after its last
    # scan. Some OpenCV releases do not refuse it, but fill the missing part with grey.
    return coded.rfind(_JPEG_END) > coded.rfind(_JPEG_SCAN) >= 0


@cache
def _converter() -> Callable[[np.ndarray, str], np.ndarray]:
    """Returns the function from (pixels, encoding) to RGB: cv_bridge's if it works, otherwise OpenCV's."""
    try:
        return _cv_bridge_converter()
    # A cv_bridge built for another NumPy or OpenCV raises any of these, sometimes only at the first conversion.
    except (ImportError, AttributeError, SystemError, RuntimeError, TypeError, ValueError) as error:
        _logger.debug("cv_bridge is not used: %s", error)
        return _opencv_converter


def _opencv_converter(pixels: np.ndarray, encoding: str) -> np.ndarray:
    import cv2

    return cv2.cvtColor(pixels, getattr(cv2, str(_ENCODINGS[encoding][1])))


def _cv_bridge_converter() -> Callable[[np.ndarray, str], np.ndarray]:
    from cv_bridge import CvBridge

    bridge = CvBridge()

    def convert(pixels: np.ndarray, encoding: str) -> np.ndarray:
        # Rows are passed without padding: cv_bridge shears an image whose step is not a multiple of the pixel size.
        height, width = pixels.shape[:2]
        image = SimpleNamespace(
            encoding=encoding, height=height, width=width, step=pixels.nbytes // height, is_bigendian=0, data=pixels
        )
        return bridge.imgmsg_to_cv2(image, "rgb8")

    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    if not np.array_equal(convert(pixels, "bgr8"), pixels[..., ::-1]):
        raise RuntimeError("it converts bgr8 wrongly")
    return convert
