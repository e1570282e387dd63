"""Pixels to what a model takes: `--preprocess`, for folders of images, arrays of pixels and noise.

A channel of a pixel p, 0 to 255, becomes (p · scale − mean) / std.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from onnxprune.errors import OnnxPruneError
from onnxprune.inputs import Input, Inputs, Shape

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
CHANNELS = {3: "RGB", 1: "L", 4: "RGBA"}  # Pillow's modes, the likelier first where two axes may be channels
_KEYS = "size, resize, layout, order, scale, mean and std"


@dataclass(frozen=True)
class Preprocess:
    """scale, mean, std: see above, mean and std one number or one a channel.

    size: (height, width) of the picture, the model's own if None.  resize: `crop` (the shorter side becomes the size's, the middle
    is cut out), `stretch`, or a number: the shorter side becomes that, then the middle is cut out.  layout: `nchw` or `nhwc`,
    the model's own if None.  order: `rgb` or `bgr`.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    resize: str | int = "crop"
    layout: str | None = None
    order: str = "rgb"


PRESETS = {
    "raw": Preprocess(),
    "unit": Preprocess(scale=1 / 255),
    "tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "imagenet": Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


def read_preprocess(given: str | Mapping[str, Any] | None) -> Preprocess | None:
    """`imagenet`, `scale=1/255,mean=0.5`, `tf,size=224x160,order=bgr`, or the same keys as a mapping, `preset` for the first.

    Raises OnnxPruneError for what is neither a preset nor a key, and for values out of place.
    """
    if given is None:
        return None
    found = Preprocess()
    for place, item in enumerate(given.split(",") if isinstance(given, str) else given.items()):
        if isinstance(item, str):
            key, equals, value = (part.strip() for part in item.partition("="))
            key, value = (key, value) if equals else ("preset", key)
        else:
            key, value = item[0], item[1] if isinstance(item[1], str) else "/".join(map(str, np.ravel(item[1])))
        if key == "preset" and place:
            raise OnnxPruneError(f"--preprocess: '{value}' comes first, or is a key with its value ({_KEYS})")
        try:
            found = PRESETS[value] if key == "preset" else replace(found, **{key: _VALUES[key](value)})
        except KeyError:
            raise OnnxPruneError(
                f"--preprocess: there is no '{value if key == 'preset' else key}'; there are the presets {', '.join(PRESETS)}"
                f" and the keys {_KEYS}"
            ) from None
        except (ValueError, ZeroDivisionError):
            raise OnnxPruneError(f"--preprocess: '{key}={value}' cannot be; write it like {_EXAMPLES[key]}") from None
    return found


def _numbers(text: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in text.split("/"))
    if len(found) not in (1, 2, 3, 4) or not np.isfinite(found).all():
        raise ValueError
    return found


def _nonzero(text: str) -> tuple[float, ...]:
    if 0 in _numbers(text):
        raise ValueError
    return _numbers(text)


def _factor(text: str) -> float:
    over, _, under = text.partition("/")
    found = float(Fraction(over) / Fraction(under or "1"))
    if not found:
        raise ValueError
    return found


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.replace("/", "x").partition("x")
    return _positive(height), _positive(width or height)


def _resize(text: str) -> str | int:
    return text if text in ("crop", "stretch") else _positive(text)


def _one_of(*words: str) -> Any:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return read


_VALUES: dict[str, Any] = {
    "scale": _factor,
    "mean": _numbers,
    "std": _nonzero,
    "size": _size,
    "resize": _resize,
    "layout": _one_of("nchw", "nhwc"),
    "order": _one_of("rgb", "bgr"),
}
_EXAMPLES = {
    "scale": "scale=1/255",
    "mean": "mean=0.5 or mean=0.485/0.456/0.406",
    "std": "std=0.5 or std=0.229/0.224/0.225 (not 0)",
    "size": "size=224 or size=240x320 (height first)",
    "resize": "resize=crop, resize=stretch or resize=256",
    "layout": "layout=nchw or layout=nhwc",
    "order": "order=rgb or order=bgr",
}


@dataclass(frozen=True)
class Frame:
    """What an image input holds: channels first or last, how many, and its height and width, None where they are open."""

    first: bool
    channels: int
    size: tuple[int | None, int | None]


def frame(entry: Input, preprocess: Preprocess | None = None) -> Frame | None:
    """How an input with four axes holds images, 1, 3 or 4 channels at axis 1 or 3; None for inputs that do not seem to."""
    if entry.dims is None or len(entry.dims) != 4:
        return None
    asked = preprocess.layout if preprocess else None
    ends = {"nchw": entry.dims[1], "nhwc": entry.dims[3]}
    likely = [k for count in CHANNELS for k, n in ends.items() if n == count]
    layout = asked or next(iter(likely), None)
    if layout is None or (isinstance(ends[layout], int) and layout not in likely):
        return None
    channels, sizes = ends[layout], entry.dims[2:] if layout == "nchw" else entry.dims[1:3]
    height, width = (d if isinstance(d, int) else None for d in sizes)
    return Frame(layout == "nchw", channels if isinstance(channels, int) else 3, (height, width))


def image_input(inputs: Inputs, preprocess: Preprocess | None, where: str) -> tuple[Input, Frame]:
    """The one input, for pictures; raises OnnxPruneError where the model takes something else."""
    entries = inputs.needed
    found = frame(entries[0], preprocess) if len(entries) == 1 else None
    if found is None:
        hint = "; say layout=nchw or layout=nhwc in --preprocess" if len(entries) == 1 and len(entries[0].dims or ()) == 4 else ""
        raise OnnxPruneError(f"{where}: images need a model with one input of 1, 3 or 4 channels; this one takes {inputs}{hint}")
    return entries[0], found


def check_channels(view: Frame, preprocess: Preprocess, where: str) -> None:
    """Raises OnnxPruneError where mean and std are for another number of channels."""
    for numbers in (preprocess.mean, preprocess.std):
        if len(numbers) not in (1, view.channels):
            raise OnnxPruneError(
                f"{where}: --preprocess has {len(numbers)} numbers for mean or std, and the input {view.channels} channels"
            )


def scaled(pixels: np.ndarray, view: Frame, preprocess: Preprocess) -> np.ndarray:
    """Pixels (…, channels, height, width) or (…, height, width, channels) as the model takes them, float32."""
    if preprocess.order == "bgr":
        pixels = np.flip(pixels, axis=-3 if view.first else -1)
    values = pixels.astype(np.float32) * np.float32(preprocess.scale)
    mean, std = (np.asarray(n, np.float32).reshape((-1, 1, 1) if view.first else -1) for n in (preprocess.mean, preprocess.std))
    return np.asarray((values - mean) / std, np.float32)


def turned(shape: Shape, view: Frame) -> Shape:
    """The shape with the channels where the model has them, for an array that holds them at the other end."""
    if len(shape) not in (3, 4):
        return shape
    front, (high, middle, low) = shape[:-3], shape[-3:]
    if view.first and high != view.channels and low == view.channels:
        return (*front, low, high, middle)
    if not view.first and low != view.channels and high == view.channels:
        return (*front, middle, low, high)
    return shape


def turn(array: np.ndarray, view: Frame) -> np.ndarray:
    """The array with the channels where the model has them."""
    if turned(array.shape, view) == array.shape:
        return array
    return np.moveaxis(array, -1, -3) if view.first else np.moveaxis(array, -3, -1)


def check_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise OnnxPruneError("images are read with Pillow, which is not installed; pip install 'onnxprune[images]'") from None


def read_image(path: str | os.PathLike[str], entry: Input, view: Frame, preprocess: Preprocess) -> np.ndarray:
    """A picture as one sample of the input, (1, …), bilinear with antialiasing; raises OnnxPruneError where it cannot be read."""
    from PIL import Image, ImageOps

    height, width = _wanted(entry, view, preprocess, path)
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(_in_bytes(opened, path)).convert(CHANNELS[view.channels])
    except OnnxPruneError:
        raise
    except Exception as error:  # Pillow's readers raise of every kind on bad files
        raise OnnxPruneError(f"{path}: not an image that Pillow reads ({type(error).__name__}); take it out of the folder") from error
    if preprocess.resize != "stretch":
        across, down = image.size
        share = max(width / across, height / down)
        if isinstance(preprocess.resize, int):
            share = preprocess.resize / min(across, down)
        image = image.resize((max(width, round(across * share)), max(height, round(down * share))), Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(1, height, width, view.channels)
    values = np.moveaxis(pixels, -1, -3) if view.first else pixels
    if not entry.real:
        return values
    return scaled(values, view, preprocess)


def _in_bytes(image: Any, path: str | os.PathLike[str]) -> Any:
    """A Pillow image with 8 bits a channel: the upper ones of 16, which Pillow would clip; raises OnnxPruneError for any other depth."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OnnxPruneError(f"{path}: holds 32-bit numbers, whose range is not known; write it with 8 or 16 bits a channel")
    return image


def _wanted(entry: Input, view: Frame, preprocess: Preprocess, where: str | os.PathLike[str]) -> tuple[int, int]:
    sizes = [own or asked for own, asked in zip(view.size, preprocess.size or (None, None), strict=True)]
    height, width = sizes
    if height is None or width is None:
        raise OnnxPruneError(f"{where}: the model takes pictures of any size ({entry}); say which with --preprocess size=224")
    if preprocess.size is not None and (height, width) != preprocess.size:
        raise OnnxPruneError(f"--preprocess: the size {preprocess.size[0]}x{preprocess.size[1]} is not the model's, {height}x{width}")
    return height, width


def check_pictures(folder: os.PathLike[str], inputs: Inputs, preprocess: Preprocess | None) -> tuple[Input, Frame, Preprocess]:
    """What pictures of a folder become; raises OnnxPruneError where that is not said or cannot be."""
    entry, view = image_input(inputs, preprocess, str(folder))
    if preprocess is None and entry.real:
        raise OnnxPruneError(
            f"{folder}: how pixels become the model's numbers is not known; say it with --preprocess: {', '.join(PRESETS)},"
            " or such as scale=1/255,mean=0.5,std=0.5"
        )
    chosen = preprocess or Preprocess()
    if not entry.real and (chosen.scale, chosen.mean, chosen.std) != (1.0, (0.0,), (1.0,)):
        raise OnnxPruneError(f"--preprocess: '{entry.name}' takes {entry.dtype}: plain pixels, without scale, mean and std")
    check_pillow()
    check_channels(view, chosen, str(folder))
    _wanted(entry, view, chosen, folder)
    return entry, view, chosen
