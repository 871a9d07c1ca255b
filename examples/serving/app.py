"""A server over an ONNX file: a picture in, likeliest classes out; pictures that come together run as one batch.

MODEL=model.onnx uvicorn app:app
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pictures
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

MODEL = os.environ.get("MODEL", "model.onnx")
CLASSES = os.environ.get("CLASSES")  # a JSON list of names, for files that have none
TOP, MOST_TOGETHER, WAIT, LARGEST = 5, 16, 0.004, 20_000_000  # classes, pictures, seconds, bytes

options = onnxruntime.SessionOptions()
cpu = Path("/proc/cpuinfo")
if not (cpu.exists() and "vnni" in cpu.read_text()):  # its fastest sums of int8 products overflow there
    options.add_session_config_entry("session.x64quantprecision", "1")
if library := os.environ.get("LIBRARY"):  # the operators of files made with --runtime custom
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(MODEL, options)
metadata = session.get_modelmeta().custom_metadata_map
if "ptq4vm.preprocessing" not in metadata:
    raise SystemExit(f"{MODEL} does not say how pictures become its input: export it from a model that timm knows")
settings = json.loads(metadata["ptq4vm.preprocessing"])
names = json.loads(Path(CLASSES).read_text()) if CLASSES else json.loads(metadata.get("ptq4vm.classes", "null"))
queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue(maxsize=256)


def probabilities(batch: list[np.ndarray]) -> np.ndarray:
    logits = session.run(None, {session.get_inputs()[0].name: np.stack(batch)})[0]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


probabilities(
    [pictures.prepare(Image.new("RGB", (64, 64)), settings)]
)  # the first run is slow, and tells what is amiss


async def answer() -> None:
    """Runs the pictures of the queue, all that are there at once."""
    while True:
        waiting = [await queue.get()]
        await asyncio.sleep(WAIT)
        waiting += [queue.get_nowait() for _ in range(min(queue.qsize(), MOST_TOGETHER - 1))]
        try:
            rows = await asyncio.to_thread(probabilities, [pixels for pixels, _ in waiting])
        except Exception as error:
            rows = [error] * len(waiting)
        for (_, future), row in zip(waiting, rows, strict=True):
            if not future.done():  # its client may have left
                future.set_result((row, len(waiting)))


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(answer())
    yield
    task.cancel()


app = FastAPI(title="Visual Mamba in int8", lifespan=lifespan)


@app.post("/classify", openapi_extra={"requestBody": {"content": {"image/*": {"schema": {"format": "binary"}}}}})
async def classify(request: Request) -> dict[str, Any]:
    """Takes the bytes of a picture; returns its likeliest classes, and how many pictures were run with it."""
    data = bytearray()
    async for part in request.stream():
        if len(data := data + part) > LARGEST:
            raise HTTPException(413, f"a picture may have {LARGEST} bytes")
    try:
        pixels = await asyncio.to_thread(lambda: pictures.prepare(pictures.decode(bytes(data)), settings))
    except ValueError as error:
        raise HTTPException(422, f"the body is no picture that can be read: {error}") from error
    future = asyncio.get_running_loop().create_future()
    try:
        queue.put_nowait((pixels, future))
    except asyncio.QueueFull:
        raise HTTPException(503, "too many pictures are waiting, try again later") from None
    row, together = await future
    if isinstance(row, Exception):
        raise HTTPException(500, "the model failed on this batch") from row
    best = np.argsort(-row, kind="stable")[:TOP]
    classes = [{"name": names[i] if names else str(i), "probability": float(row[i])} for i in best]
    return {"classes": classes, "together": together}
