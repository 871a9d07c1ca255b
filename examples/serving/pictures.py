"""Pictures as a model sees them, with Pillow alone: what timm's transform computes from the same settings."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGEST = 50_000_000
"""Pixels of the largest picture: a small file can hold a picture that fills the memory."""


def decode(data: bytes) -> Image.Image:
    """Returns an RGB picture of 8 bits; raises ValueError with the reason for what is none."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width} × {image.height} pixels, at most {LARGEST} are read")
            sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode in ("I", "F") and not sixteen:
                raise ValueError("its pixels have 32 bits: save them in 8 bits")
            if sixteen:
                return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(
                    "RGB"
                )
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # a damaged file makes the reader fail halfway, with any kind of error
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def prepare(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """Resizes, crops the centre and normalizes: float32 (3, H, W)."""
    _, height, width = settings["input_size"]
    size = _size(image, height, width, settings)
    if size[0] * size[1] > LARGEST:
        raise ValueError(f"{image.width} × {image.height} pixels are too long a strip")
    image = image.resize(size, Image.Resampling[settings["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    mean, std = (np.array(settings[key], np.float32) for key in ("mean", "std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)


def _size(image: Image.Image, height: int, width: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Width and height before the crop: the shorter side fits, or both do where the picture is squashed."""
    target_height, target_width = (math.floor(side / settings["crop_pct"]) for side in (height, width))
    mode = settings.get("crop_mode", "center")
    if mode == "squash":
        return target_width, target_height
    if mode != "center" or height != width:
        raise ValueError(f"crop mode {mode!r} of {height} × {width} pixels: only squares are cut, from the centre")
    short = min(image.width, image.height)
    return int(target_width * image.width / short), int(target_height * image.height / short)
