"""The server of docs/production.md, driven by a real client over the loopback address."""

from __future__ import annotations

import base64
import importlib.util
import io
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttalight.adapters import Tent

pytest.importorskip("fastapi", reason="needs the extra: pip install ttalight[serve]")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "serve.py"


def picture(draws: np.random.Generator) -> str:
    file = io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "serve", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, stride=4), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(6, 10),
    ).eval()  # fmt: skip
    return Tent(lr=0.1, reset="never", on_bad_batch="source").wrap(network)


@pytest.fixture
def client(serve, adapted, tmp_path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    app = serve.make_app(adapted, tmp_path / "states")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as session:
        yield session
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


def predict(client, seed, count=8, **options):
    draws = np.random.default_rng(seed)
    answer = client.post("/predict", json={"images": [picture(draws) for _ in range(count)], **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_it_adapts_saves_restores_and_rolls_back(client, adapted):
    first = predict(client, 0)
    assert len(first["classes"]) == 8
    assert all(0 < value <= 1 for value in first["confidence"])
    assert client.post("/save/first").json() == {"saved": "first"}
    expected = predict(client, 5, adapt=False)
    for seed in range(1, 4):
        predict(client, seed)
    assert client.get("/status").json() == {
        "batches": 4, "updates": 4, "missed": 0, "bad_batches": 0, "snapshots": 1,
    }  # fmt: skip
    assert predict(client, 5, adapt=False) != expected
    assert client.post("/restore/first").json()["batches"] == 1
    assert predict(client, 5, adapt=False) == expected
    predict(client, 1)
    assert client.post("/rollback").json()["batches"] == 1
    assert predict(client, 5, adapt=False) == expected
    assert client.post("/rollback").status_code == 409
    assert client.post("/reset").status_code == 200


def test_metrics_are_text_for_prometheus(client):
    predict(client, 0)
    assert 'ttalight_batches_total{method="Tent"} 1' in client.get("/metrics").text


def test_bad_requests_are_refused_and_change_nothing(client, adapted):
    predict(client, 0)
    before = adapted.state_dict()["tensors"]
    for images in (["no base64!"], [base64.b64encode(b"no image").decode()], []):
        assert client.post("/predict", json={"images": images}).status_code == 422
    assert client.post("/restore/missing").status_code == 404
    assert client.post("/save/..%2Fescape").status_code in (404, 422)
    after = adapted.state_dict()["tensors"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert client.get("/status").json()["batches"] == 1


def test_concurrent_requests_are_adapted_to_one_at_a_time(client, adapted):
    threads = [threading.Thread(target=predict, args=(client, seed)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.get("/status").json()["updates"] == 6
    assert torch.cat([p.flatten() for p in adapted.parameters()]).isfinite().all()


def test_the_app_of_the_page_starts(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"/predict", "/rollback", "/save/{name}"} <= {route.path for route in serve.app().routes}
