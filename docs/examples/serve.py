"""A server whose network adapts to the images that it is sent: one process, one network.

    uvicorn serve:app --factory --workers 1

An app that predicts and adapts, keeps snapshots to roll back to, and saves and restores its state. ``make_app`` takes
the adapted network; ``app`` makes one of timm's to begin with.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field
from torch import Tensor, nn

import ttalight  # noqa: F401  (before timm and torchvision)
from ttalight.adapters import Tent
from ttalight.adapters.wrapper import AdaptedNetwork
from ttalight.monitoring import Watch

#: Requests that are larger are refused before anything is decoded: images, and characters of an encoded one.
MOST_IMAGES, LONGEST = 256, 2_000_000
#: Batches between two snapshots, and how many are kept.
EVERY, KEPT = 20, 5


class Request(BaseModel):
    """Images as base64 of JPEG or PNG files."""

    images: list[str] = Field(min_length=1, max_length=MOST_IMAGES)
    adapt: bool = True


def decode(texts: list[str], size: int) -> Tensor:
    """Return images as float in [0, 1], (B, 3, size, size).

    Raises:
        HTTPException: With code 422 if one is no image.
    """
    found = []
    for index, text in enumerate(texts):
        try:
            if len(text) > LONGEST:
                raise ValueError("too large")
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("JPEG", "PNG")) as file:
                pixels = np.asarray(file.convert("RGB").resize((size, size)))
        except (ValueError, OSError, binascii.Error, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise HTTPException(422, f"image {index} cannot be read ({error}): send base64 of JPEG or PNG") from None
        found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 255


def make_app(adapted: AdaptedNetwork, folder: Path, size: int = 32) -> FastAPI:
    """Return the app.

    Args:
        adapted: The network; the app is the only one that calls it.
        folder: Where states are saved.
        size: Side of the images in pixels.
    """
    app = FastAPI(title="An adapted network")
    snapshots: deque[dict[str, Any]] = deque(maxlen=KEPT)
    lock = threading.Lock()  # endpoints run in threads: a snapshot belongs to its batch

    def file_of(name: str) -> Path:
        if not re.fullmatch(r"[\w-]{1,60}", name):
            raise HTTPException(422, "a name has letters, digits, '-' and '_'")
        return folder / f"{name}.pt"

    @app.post("/predict")
    def predict(request: Request) -> dict[str, Any]:
        images = decode(request.images, size)
        with lock:
            probs = adapted(images, adapt=request.adapt).softmax(dim=1)
            engine = adapted.engine
            if request.adapt and engine.batches % EVERY == 1 and not engine.is_missed:
                snapshots.append(adapted.state_dict())
        confidence, classes = probs.max(dim=1)
        return {"classes": classes.tolist(), "confidence": confidence.tolist()}

    @app.get("/status")
    def status() -> dict[str, int]:
        engine = adapted.engine
        return {
            "batches": engine.batches,
            "updates": engine.updates,
            "missed": engine.missed,
            "bad_batches": engine.bad_batches,
            "snapshots": len(snapshots),
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        return adapted.report().prometheus()

    @app.post("/rollback")
    def rollback() -> dict[str, int]:
        with lock:
            if not snapshots:
                raise HTTPException(409, "there is no snapshot yet: use /reset for the source weights")
            adapted.load_state_dict(snapshots.pop())
        return status()

    @app.post("/reset")
    def reset() -> dict[str, int]:
        with lock:
            adapted.reset()
            snapshots.clear()
        return status()

    @app.post("/save/{name}")
    def save(name: str) -> dict[str, str]:
        path = file_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            torch.save(adapted.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # never half a file
        return {"saved": name}

    @app.post("/restore/{name}")
    def restore(name: str) -> dict[str, int]:
        path = file_of(name)
        if not path.is_file():
            raise HTTPException(404, f"there is no saved state {name}")
        with lock:
            try:
                adapted.load_state_dict(torch.load(path, weights_only=True))
            except ValueError as error:  # of another method or network: nothing has changed
                raise HTTPException(409, str(error)) from None
        return status()

    return app


class Normalized(nn.Module):
    """A network that takes images in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network((images - 0.5) / 0.5)
        return logits


def app() -> FastAPI:
    """Return an app with a network of random weights: put your own in its place."""
    network = Normalized(timm.create_model("test_resnet", num_classes=10)).eval()
    adapted = Tent(reset="never", on_bad_batch="source", max_milliseconds=200).wrap(network, window=64)
    return make_app(adapted.watch(Watch("rollback")), Path("states"))
