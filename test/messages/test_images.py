# SPDX-License-Identifier: Apache-2.0
import importlib
import io
import subprocess
import sys
from array import array
from pathlib import Path

import bag_tools
import cv2
import numpy as np
import pytest
from PIL import Image as pillow

from clp_ros.bags.reader import open_bag
from clp_ros.core.errors import ClpError
from clp_ros.messages import images
from clp_ros.messages.images import decode_image

HEIGHT, WIDTH = 22, 34


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth_picture() -> np.ndarray:
    """What survives chroma and JPEG compression: slow gradients, another in each channel."""
    y, x = np.mgrid[0:96, 0:128]
    return np.stack([x * 2, 255 - y * 2, (x + y)], axis=-1).clip(0, 255).astype(np.uint8)


def check(result: np.ndarray, shape: tuple[int, int]) -> None:
    assert result.shape == (*shape, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("rgb8", lambda p: p),
        ("bgr8", lambda p: p[..., ::-1]),
        ("rgba8", lambda p: np.dstack([p, picture(9)[..., :1]])),
        ("bgra8", lambda p: np.dstack([p[..., ::-1], picture(9)[..., :1]])),
    ],
)
@pytest.mark.parametrize("padding", [0, 1, 2, 6])
@pytest.mark.parametrize("is_bigendian", [0, 1])
def test_colour_orders_exactly(encoding, encode, padding, is_bigendian):
    pixels = picture()
    rows = encode(pixels).reshape(HEIGHT, -1)
    rows = np.hstack([rows, np.full((HEIGHT, padding), 77, np.uint8)])
    result = decode_image(bag_tools.image(rows, encoding, width=WIDTH, is_bigendian=is_bigendian))
    check(result, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(result, pixels)


def test_result_is_not_the_messages_memory():
    message = bag_tools.image(picture(), "rgb8")
    result = decode_image(message)
    result[:] = 0
    np.testing.assert_array_equal(decode_image(message), picture())


@pytest.mark.parametrize("padding", [0, 3])
def test_mono8(padding):
    grey = picture()[..., 0]
    rows = np.hstack([grey, np.full((HEIGHT, padding), 77, np.uint8)])
    np.testing.assert_array_equal(
        decode_image(bag_tools.image(rows, "mono8", width=WIDTH)), np.repeat(grey[..., None], 3, axis=2)
    )


BAYER = {"bayer_rggb8": "RGGB", "bayer_bggr8": "BGGR", "bayer_gbrg8": "GBRG", "bayer_grbg8": "GRBG"}


def mosaic(pixels: np.ndarray, pattern: str) -> np.ndarray:
    """What a sensor under ``pattern`` (first row's two filters, second row's two) sees of an RGB picture."""
    seen = np.empty(pixels.shape[:2], np.uint8)
    for index, colour in enumerate(pattern):
        row, column = divmod(index, 2)
        seen[row::2, column::2] = pixels[row::2, column::2, "RGB".index(colour)]
    return seen


@pytest.mark.parametrize(("encoding", "pattern"), BAYER.items())
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40)])
def test_bayer_flat_colour(encoding, pattern, colour):
    pixels = np.full((HEIGHT, WIDTH, 3), colour, np.uint8)
    result = decode_image(bag_tools.image(mosaic(pixels, pattern), encoding))
    check(result, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(result, pixels)


@pytest.mark.parametrize(("encoding", "pattern"), BAYER.items())
def test_bayer_keeps_what_each_pixel_saw(encoding, pattern):
    # Random content: bilinear interpolation leaves the sampled colour of an inner pixel as it is, and makes the
    # others from that colour's neighbours.
    pixels = picture()
    seen = mosaic(pixels, pattern)
    rows = np.hstack([seen, np.full((HEIGHT, 5), 77, np.uint8)])
    result = decode_image(bag_tools.image(rows, encoding, width=WIDTH)).astype(int)
    for y, x in np.random.default_rng(2).integers(1, [HEIGHT - 1, WIDTH - 1], (80, 2)):
        own = "RGB".index(pattern[y % 2 * 2 + x % 2])
        assert result[y, x, own] == seen[y, x]
        for other in {0, 1, 2} - {own}:
            near = [
                int(seen[b, a])
                for b in (y - 1, y, y + 1)
                for a in (x - 1, x, x + 1)
                if "RGB".index(pattern[b % 2 * 2 + a % 2]) == other
            ]
            assert abs(result[y, x, other] - np.mean(near)) <= 1


@pytest.mark.parametrize(
    ("encoding", "order"), [("yuv422", "UYVY"), ("uyvy", "UYVY"), ("yuv422_yuy2", "YUYV"), ("yuyv", "YUYV")]
)
@pytest.mark.parametrize("padding", [0, 6])
def test_yuv422(encoding, order, padding):
    # ITU-R BT.601, studio range, written out: every byte random, within the range that maps into 0..255.
    rng = np.random.default_rng(5)
    luma = rng.integers(90, 160, (HEIGHT, WIDTH))
    u, v = rng.integers(108, 148, (2, HEIGHT, WIDTH // 2))
    rows = np.empty((HEIGHT, WIDTH * 2), np.uint8)
    if order == "UYVY":
        rows[:, 0::4], rows[:, 1::2], rows[:, 2::4] = u, luma, v
    else:
        rows[:, 0::2], rows[:, 1::4], rows[:, 3::4] = luma, u, v
    rows = np.hstack([rows, np.full((HEIGHT, padding), 77, np.uint8)])
    y, cb, cr = (np.float64(plane) for plane in (luma - 16, u.repeat(2, 1) - 128, v.repeat(2, 1) - 128))
    expected = np.stack([1.164 * y + 1.596 * cr, 1.164 * y - 0.813 * cr - 0.391 * cb, 1.164 * y + 2.018 * cb], -1)
    result = decode_image(bag_tools.image(rows, encoding, width=WIDTH))
    check(result, (HEIGHT, WIDTH))
    assert np.abs(result - expected).max() <= 1.5


@pytest.mark.parametrize("encoding", ["nv12", "nv21", "i420"])
@pytest.mark.parametrize("layout", ["packed", "padded", "step is a pixel's bytes"])
def test_yuv420(encoding, layout):
    rng = np.random.default_rng(8)
    luma = rng.integers(90, 160, (HEIGHT, WIDTH), dtype=np.uint8)
    u, v = rng.integers(108, 148, (2, HEIGHT // 2, WIDTH // 2), dtype=np.uint8)
    if encoding == "i420":
        chroma = np.concatenate([u.ravel(), v.ravel()]).reshape(HEIGHT // 2, WIDTH)
    else:
        chroma = np.stack([u, v] if encoding == "nv12" else [v, u], axis=-1).reshape(HEIGHT // 2, WIDTH)
    rows = np.vstack([luma, chroma])
    if layout == "padded":
        rows = np.hstack([rows, np.full((len(rows), 6), 77, np.uint8)])
    message = bag_tools.image(rows, encoding, width=WIDTH)
    message.height = HEIGHT
    message.step = WIDTH * 3 // 2 if layout == "step is a pixel's bytes" else rows.shape[1]
    if (encoding, layout) == ("i420", "padded"):
        with pytest.raises(ClpError, match="image of 34x22 in the encoding i420 with step 40 cannot have"):
            decode_image(message)
        return
    y, cb, cr = (np.float64(plane) for plane in (luma - 16.0, *(p.repeat(2, 0).repeat(2, 1) - 128.0 for p in (u, v))))
    expected = np.stack([1.164 * y + 1.596 * cr, 1.164 * y - 0.813 * cr - 0.391 * cb, 1.164 * y + 2.018 * cb], -1)
    result = decode_image(message)
    check(result, (HEIGHT, WIDTH))
    assert np.abs(result - expected).max() <= 1.5
    message.data = message.data[:-1]
    with pytest.raises(ClpError, match=f"image of .* encoding {encoding} .* cannot have"):
        decode_image(message)


@pytest.mark.parametrize("encoding", ["rgb16", "bgr16", "rgba16", "bgra16", "mono16"])
@pytest.mark.parametrize("is_bigendian", [0, 1])
def test_16_bits(encoding, is_bigendian):
    values = np.random.default_rng(3).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    values[0, :2] = [[0, 1, 128, 129], [65535, 65407, 65406, 256]]
    expected = np.rint(values[..., :3] * (255 / 65535))
    if encoding == "mono16":
        rows, expected = values[..., 0], expected[..., :1].repeat(3, -1)
    else:
        order = [0, 1, 2] if encoding.startswith("rgb") else [2, 1, 0]
        rows = values[..., order + ([3] if "a" in encoding else [])]
    rows = rows.astype(">u2" if is_bigendian else "<u2").reshape(HEIGHT, -1).view(np.uint8)
    rows = np.hstack([rows, np.full((HEIGHT, 3), 77, np.uint8)])  # odd padding
    result = decode_image(bag_tools.image(rows, encoding, width=WIDTH, is_bigendian=is_bigendian))
    check(result, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(result, expected)


def coded(pixels: np.ndarray, codec: str) -> bytes:
    """An RGB or grey array as Pillow, which is not what reads it, writes it."""
    stream = io.BytesIO()
    pillow.fromarray(pixels).save(stream, codec, **({"quality": 95, "subsampling": 0} if codec == "JPEG" else {}))
    return stream.getvalue()


# What compressed_image_transport's subscriber makes of each. It looks for "compressed bgr": without it, a colour image
# was compressed as it was, as if it were BGR, so that the file's red and blue are exchanged.
PLAIN = [
    *("jpeg", "jpg", "JPEG", "png", "", "bgr8", "rgb8; jpeg compressed bgr8", "bgr8; png compressed bgr8"),
    *(
        "rgb16; png compressed bgr16",
        "rgba8; png compressed bgr8",
        "bgra8; png compressed bgra8",
        "RGB8; JPEG COMPRESSED BGR8",
    ),
    *(
        "bayer_rggb8; jpeg compressed bgr8",
        "yuyv; jpeg compressed bgr8",
        "yuv422_yuy2; jpeg compressed ",
        "8UC3; png compressed bgr8",
    ),
    "jpeg; compressed bgr8",
]
EXCHANGED = [
    *(
        "rgb8; jpeg compressed rgb8",
        "bgr8; jpeg compressed rgb8",
        "bgr8; png compressed rgb8",
        "rgb16; png compressed rgb16",
    ),
    *(
        "rgb8; png compressed ",
        "bgr8; jpeg compressed ",
        "rgba8; png compressed",
        "rgb8; tiff compressed ",
        "uyvy; png compressed rgb8",
    ),
]


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("image_format", "exchanged"), [*((name, False) for name in PLAIN), *((name, True) for name in EXCHANGED)]
)
def test_colours_of_every_format(image_format, exchanged, codec):
    pixels = smooth_picture()
    message = bag_tools.compressed_image(coded(pixels[..., ::-1] if exchanged else pixels, codec), image_format)
    result = decode_image(message)
    check(result, pixels.shape[:2])
    assert np.abs(result.astype(int) - pixels).mean() < (0.1 if codec == "PNG" else 4)


def test_tiff():
    pixels = picture()
    for data, image_format in ((pixels, "bgr8; tiff compressed bgr8"), (pixels[..., ::-1], "rgb8; tiff compressed ")):
        result = decode_image(bag_tools.compressed_image(coded(data, "TIFF"), image_format))
        np.testing.assert_array_equal(result, pixels)


@pytest.mark.parametrize("codec", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "image_format",
    [
        *("mono8; jpeg compressed mono8", "mono8; png compressed ", "mono16; jpeg compressed mono8", "jpeg", ""),
        *("rgb8; x compressed bgr8", "bayer_rggb8; jpeg compressed mono8", "yuv422; jpeg compressed mono8"),
    ],
)
def test_grey_formats(image_format, codec):
    grey = smooth_picture()[..., 0]
    result = decode_image(bag_tools.compressed_image(coded(grey, codec), image_format))
    check(result, grey.shape)
    assert np.abs(result.astype(int) - grey[..., None]).mean() < 2


@pytest.mark.parametrize(("encoding", "pattern"), BAYER.items())
@pytest.mark.parametrize("deep", [False, True])
def test_a_bayer_png_is_a_mosaic(encoding, pattern, deep):
    pixels = np.full((HEIGHT, WIDTH, 3), (200, 120, 40), np.uint8)
    seen = mosaic(pixels, pattern)
    name = encoding[:-1] + "16" if deep else encoding
    data = coded(seen.astype(np.uint16) * 257 if deep else seen, "PNG")
    for image_format in (
        f"{name}; png compressed ",
        f"{name.upper()}; PNG compressed",
        f"{name}; png compressed {name}",
    ):
        result = decode_image(bag_tools.compressed_image(data, image_format))
        check(result, (HEIGHT, WIDTH))
        np.testing.assert_array_equal(result, pixels)
    if not deep:  # ROS 1's publisher wrote JPEGs of mosaics
        message = bag_tools.compressed_image(coded(seen, "JPEG"), f"{name}; jpeg compressed ")
        assert np.abs(decode_image(message).astype(int) - pixels).mean() < 8


def test_16_bit_png():
    values = np.random.default_rng(4).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    expected = np.rint(values * (255 / 65535))
    colour = cv2.imencode(".png", values[..., ::-1])[1].tobytes()  # Pillow has no 16-bit colour
    for image_format in ("rgb16; png compressed bgr16", "png"):
        np.testing.assert_array_equal(decode_image(bag_tools.compressed_image(colour, image_format)), expected)
    grey = bag_tools.compressed_image(coded(values[..., 0], "PNG"), "mono16; png compressed ")
    np.testing.assert_array_equal(decode_image(grey), expected[..., :1].repeat(3, -1))


@pytest.mark.parametrize(
    ("image_format", "array", "codec", "reason"),
    [
        ("16UC1; png compressed ", np.full((8, 8), 40000, np.uint16), "PNG", "it does not name its channels"),
        ("png", np.full((8, 8), 40000, np.uint16), "PNG", "may be grey or depth"),
        ("mono8; png compressed ", np.full((8, 8), 40000, np.uint16), "PNG", "may be grey or depth"),
        ("8UC3; png compressed ", picture(), "PNG", "it does not name its channels"),
        ("32FC1; tiff compressed ", np.zeros((8, 8), np.float32), "TIFF", "1 channels of float32"),
        ("bgr8; tiff compressed ", picture(), "TIFF", "its subscriber reads RGB"),
        ("bayer_rggb8; jpeg compressed ", picture(), "JPEG", "pixels are 3 x 8 bits, which is not bayer_rggb8"),
        ("bayer_rggb8; jpeg compressed bgr8", picture()[..., 0], "JPEG", "says bgr8, but the image has one channel"),
        ("bayer_xyz8; png compressed ", picture()[..., 0], "PNG", "1 x 8 bits, which is not bayer_xyz8"),
        ("16UC1; compressedDepth png", np.full((8, 8), 40000, np.uint16), "PNG", "it is a depth image"),
    ],
)
def test_refused_formats(image_format, array, codec, reason):
    message = bag_tools.compressed_image(coded(array, codec), image_format)
    with pytest.raises(ClpError, match=rf"/cam: .*format {image_format!r} cannot be read: .*{reason}.* \(hint: use"):
        decode_image(message, "/cam")


def test_exif_orientation_changes_nothing():
    # As in image_transport: the robot's camera is mounted as it is.
    stream, exif = io.BytesIO(), pillow.Exif()
    exif[0x0112] = 6
    pillow.fromarray(smooth_picture()).save(stream, "JPEG", exif=exif)
    assert decode_image(bag_tools.compressed_image(stream.getvalue())).shape == smooth_picture().shape


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_grey_and_alpha_become_rgb(suffix):
    grey = smooth_picture()[..., 0]
    message = bag_tools.compressed_image(cv2.imencode(suffix, grey)[1].tobytes(), suffix[1:])
    result = decode_image(message)
    check(result, grey.shape)
    assert np.abs(result.astype(int) - grey[..., None]).mean() < 3
    if suffix == ".png":
        pixels = picture()
        data = cv2.imencode(".png", np.dstack([pixels[..., ::-1], pixels[..., :1]]))[1].tobytes()
        np.testing.assert_array_equal(decode_image(bag_tools.compressed_image(data, "png")), pixels)


def test_padded_jpeg():
    data = cv2.imencode(".jpg", smooth_picture())[1].tobytes()
    whole = decode_image(bag_tools.compressed_image(data))
    np.testing.assert_array_equal(decode_image(bag_tools.compressed_image(data + bytes(100))), whole)


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".png", "PNG")])
def test_damaged_compressed_image(suffix, kind, capfd):
    data = cv2.imencode(suffix, smooth_picture())[1].tobytes()
    for length in [0, 1, 10, 200, len(data) // 2, len(data) - 20, len(data) - 1]:
        with pytest.raises(ClpError, match=rf"/cam: .*{kind} data of {length} bytes is cut off"):
            decode_image(bag_tools.compressed_image(data[:length], suffix[1:]), "/cam")
    with pytest.raises(ClpError, match="the image data of 0 bytes is cut off"):
        decode_image(bag_tools.compressed_image(b"", ""))
    with pytest.raises(ClpError, match=f"{kind} data .* is damaged"):
        decode_image(bag_tools.compressed_image(b"\0" * 30 + data[30:], suffix[1:]))


@pytest.mark.parametrize("image_format", ["", "av1", "16UC1; compressedDepth png", "32FC1; compressedDepth", "h264"])
def test_unknown_compressed_format(image_format):
    with pytest.raises(ClpError, match=rf"/cam: .*format {image_format!r} cannot be read"):
        decode_image(bag_tools.compressed_image(b"abc", image_format), "/cam")


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1", "8UC3", "", "RGB8", "nv24", "yuv444"])
def test_unknown_encoding(encoding):
    with pytest.raises(ClpError, match=rf"/cam: .*encoding {encoding!r} cannot be read.*rgb8, bgr8"):
        decode_image(bag_tools.image(picture(), encoding), "/cam")


@pytest.mark.parametrize(
    ("field", "value"),
    [("height", HEIGHT + 1), ("height", HEIGHT - 1), ("height", 0), ("width", 0), ("width", WIDTH + 1), ("step", 5)],
)
def test_contradicting_sizes(field, value):
    message = bag_tools.image(picture(), "rgb8")
    setattr(message, field, value)
    with pytest.raises(ClpError, match=r"/cam: .*image of .* encoding rgb8 .* cannot have \d+ bytes"):
        decode_image(message, "/cam")


def test_empty_and_odd_images():
    message = bag_tools.image(picture(), "rgb8")
    message.data = message.data[:0]
    with pytest.raises(ClpError, match="cannot have 0 bytes"):
        decode_image(message)
    for encoding, rows, width, said in (
        ("yuv422", (4, 10), 5, "an image of 5x4 in the encoding yuv422, where the width must be even"),
        ("yuyv", (4, 10), 5, "an image of 5x4 in the encoding yuyv, where the width must be even"),
        ("nv12", (3, 8), 8, "an image of 8x3 in the encoding nv12, where width and height must be even"),
        (
            "bayer_rggb8",
            (1, 8),
            8,
            "an image of 8x1 in the encoding bayer_rggb8, where width and height must be at least 2",
        ),
    ):
        with pytest.raises(ClpError, match=said):
            decode_image(bag_tools.image(np.zeros(rows, np.uint8), encoding, width=width))


def test_live_rclpy_messages():
    pytest.importorskip("rclpy", reason="no ROS 2")
    from sensor_msgs.msg import CompressedImage, Image

    pixels = picture()
    raw = Image(height=HEIGHT, width=WIDTH, encoding="bgr8", step=WIDTH * 3)
    raw.data = array("B", pixels[..., ::-1].tobytes())
    np.testing.assert_array_equal(decode_image(raw), pixels)
    compressed = CompressedImage(format="png")
    compressed.data = array("B", cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    np.testing.assert_array_equal(decode_image(compressed), pixels)


def test_recorded_bayer_camera(shared_data):
    with open_bag(shared_data / "bags" / "wx200_pr2_composite") as bag:
        frames = [message.data for message in bag.messages(["/camera/image_raw"])]
    assert len(frames) == 19
    for frame in frames:
        result = decode_image(frame)
        check(result, (480, 640))
        seen = np.frombuffer(frame.data, np.uint8).reshape(480, 640)
        inner = np.s_[2:-2:2, 2:-2:2]
        np.testing.assert_array_equal(result[..., 2][inner], seen[inner])  # BGGR: even rows and columns are blue
        np.testing.assert_array_equal(result[..., 0][3:-2:2, 3:-2:2], seen[3:-2:2, 3:-2:2])


BROKEN = {
    "absent": "import nothing_of_this_name",
    "other numpy": "class CvBridge:\n def imgmsg_to_cv2(self, m, e): raise AttributeError('_ARRAY_API not found')",
    "wrong colours": "class CvBridge:\n def imgmsg_to_cv2(self, m, e): return m.data.copy()",
}


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_cv_bridge_that_does_not_work_is_passed_over(tmp_path, source):
    # A real cv_bridge comes with ROS 2 only; these fail as one built for another NumPy or OpenCV does.
    (tmp_path / "cv_bridge.py").write_text(source)
    script = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import bag_tools, numpy as np\n"
        "from clp_ros.messages.images import decode_image\n"
        "pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)\n"
        "for _ in range(3): assert (decode_image(bag_tools.image(pixels, 'bgr8')) == pixels[..., ::-1]).all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("cv_bridge is not used") == 1


@pytest.mark.skipif(importlib.util.find_spec("cv_bridge") is None, reason="cv_bridge comes with ROS 2 only")
@pytest.mark.parametrize("encoding", [e for e, (_, conversion) in images._ENCODINGS.items() if conversion])
def test_cv_bridge_agrees_with_opencv(encoding):
    channels = images._ENCODINGS[encoding][0]
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    pixels = np.random.default_rng(6).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(
        images._cv_bridge_converter()(pixels, encoding), images._opencv_converter(pixels, encoding)
    )
