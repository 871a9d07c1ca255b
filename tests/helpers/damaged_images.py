"""Writes damaged files in place of images."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("truncated png", "truncated jpeg", "a flipped bit", "a huge claim", "a pipe", "a broken link", "a folder")
KINDS += ("float", "int32", "dark 16 bits", "empty", "text", "postscript", "another format")


def damaged(path: Path, kind: str) -> None:
    """Writes one of `KINDS`."""
    random = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    if kind in ("truncated png", "truncated jpeg", "a flipped bit"):
        Image.fromarray(random).save(path, "JPEG" if "jpeg" in kind else "PNG")
        content = bytearray(path.read_bytes())
        if "truncated" in kind:
            del content[len(content) // 2 :]
        else:
            content[40] ^= 255
        path.write_bytes(content)
    elif kind == "a huge claim":
        Image.fromarray(random).save(path, "PNG")
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", 30000, 30000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a broken link":
        path.symlink_to("nowhere")
    elif kind == "a folder":
        path.mkdir()
    elif kind in ("float", "int32"):
        Image.fromarray(random[..., 0].astype(kind) * 100).save(path, "TIFF")
    elif kind == "another format":
        Image.fromarray(random).save(path, "PCX")
    elif kind == "dark 16 bits":
        Image.fromarray(random[..., 0].astype(np.uint16)).save(path, "PNG")
    else:
        path.write_bytes({"empty": b"", "text": b"<!DOCTYPE html>", "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n"}[kind])
