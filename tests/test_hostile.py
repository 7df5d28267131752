"""Untrusted files: nothing runs, sizes are checked before memory is taken, errors are ours."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import ttalight
from ttalight.data.digit_files import read_idx
from ttalight.data.image_files import read_image
from ttalight.data.layout import read_npy
from ttalight.files.tensors import load_tensors
from ttalight.files.untrusted import check_archive, inflate
from ttalight.reporting import read_predictions, read_results
from ttalight.tasks.checkpoint import read_checkpoint

PACKAGE = Path(ttalight.__file__).parent

#: Calls that may run code or take any size, and the files that may make them.
FORBIDDEN = {
    "torch.load": {"tensors.py"},
    "pickle.load": set(),
    "pickle.loads": {"cifar.py"},
    "np.load": {"layout.py", "digits.py"},
    "np.fromfile": set(),
    "yaml.load": set(),
    "yaml.unsafe_load": set(),
    "eval": set(),
    "exec": set(),
    "os.system": set(),
    "gzip.decompress": set(),
    "gzip.open": set(),
    "bz2.decompress": set(),
    "zlib.decompress": set(),
    "joblib.load": set(),
    "shutil.unpack_archive": set(),
    "torch.hub.load": set(),
}
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def calls():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def test_readers_of_the_package_are_the_safe_ones():
    seen = set()
    for path, node, name in calls():
        assert not name.endswith((".extractall", ".extract")), f"{path}:{node.lineno} unpacks whatever is there"
        if name in FORBIDDEN:
            assert path.name in FORBIDDEN[name], f"{path}:{node.lineno} calls {name}"
            seen.add(name)
        if name in REQUIRED:
            keyword, value = REQUIRED[name]
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            assert given.get(keyword) is value, f"{path}:{node.lineno} calls {name} without {keyword}={value}"
        if name == "Image.open":
            assert "formats" in {word.arg for word in node.keywords}, f"{path}:{node.lineno} opens any format"
    assert {"torch.load", "pickle.loads", "np.load"} <= seen  # the search finds what is there


def member(name: str, content: bytes, kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.fixture
def little_memory():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


class TestSizes:
    pytestmark = pytest.mark.usefixtures("little_memory")

    @pytest.mark.parametrize("shape", ["(1000000000000,)", "(4611686018427387904, 8)", "(-1,)", "(True,)"])
    def test_an_array_that_claims_much(self, shape, tmp_path):
        path = tmp_path / "a.npy"
        path.write_bytes(header(shape) + bytes(99))
        with pytest.raises(ValueError, match=r"a\.npy is (cut short|not a \.npy file)"):
            read_npy(path)
        (tmp_path / "predictions.npz").write_bytes(member("position.npy", header(shape) + bytes(99)))
        with pytest.raises(ValueError, match="is not a file of predictions, or it is damaged"):
            read_predictions(tmp_path)

    def test_packed_members(self, tmp_path):
        bomb = member("archive/data.pkl", bytes(1 << 24), zipfile.ZIP_DEFLATED)
        (tmp_path / "a.ckpt").write_bytes(bomb)
        with pytest.raises(ValueError, match=r"its member 'archive/data\.pkl' is compressed or encrypted"):
            read_checkpoint(str(tmp_path / "a.ckpt"), "weights")
        (tmp_path / "predictions.npz").write_bytes(bomb)
        with pytest.raises(ValueError, match="is compressed or encrypted"):
            read_predictions(tmp_path)

    @pytest.mark.parametrize(
        "tensors",
        [
            [torch.zeros(1).expand(1 << 40)],
            [torch.zeros(1 << 14).as_strided((1 << 13, 1 << 13), (1, 1))],
            [torch.zeros(1 << 14).as_strided((100, 100, 1000), (1, 1, 1))],
            {index: torch.zeros(1 << 10).as_strided((900, 1000), (0, 1)) for index in range(40)},
        ],
        ids=["expanded", "overlapping", "three dimensions", "many"],
    )
    def test_tensors_larger_than_their_storage(self, tensors):
        file = io.BytesIO()
        torch.save({"a": tensors}, file)
        with pytest.raises(ValueError, match=r"is stored as one of fewer values|bytes that are stored in"):
            load_tensors(file.getvalue())

    def test_weights_may_be_shared(self):
        file, weight = io.BytesIO(), torch.zeros(1000, 1000)
        torch.save({"a": weight, "b": weight.T, "c": weight[::2], "d": torch.zeros(1).expand(10)}, file)
        assert load_tensors(file.getvalue())["b"].shape == (1000, 1000)

    @pytest.mark.parametrize(
        ("kind", "pack"), [("gzip", gzip.compress), ("bz2", bz2.compress), ("zlib", zlib.compress)]
    )
    def test_unpacking_has_a_limit(self, kind, pack):
        content = bytes(range(256)) * 5000
        assert inflate(pack(content), kind) == content
        with pytest.raises(ValueError, match="it unpacks to more than 1,000,000 bytes"):
            inflate(pack(content), kind, most=10**6)
        with pytest.raises((EOFError, ValueError)):
            inflate(pack(content)[:-20], kind)
        if kind != "zlib":
            assert inflate(pack(content) + pack(b"more"), kind) == content + b"more"

    def test_an_idx_file_that_unpacks_to_more(self, tmp_path, monkeypatch):
        monkeypatch.setattr(inflate, "__defaults__", (1000,))
        (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(2000)))
        with pytest.raises(ValueError, match="it unpacks to more than 1,000 bytes"):
            read_idx(tmp_path / "a.gz")


def test_a_changed_weight_is_seen():
    """PyTorch's own reader does not compare checksums."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, file)
    content = bytearray(file.getvalue())
    assert torch.equal(load_tensors(bytes(content))["a"], torch.zeros(1000))
    where = content.index(bytes(400)) + 100
    content[where] ^= 1
    torch.load(io.BytesIO(bytes(content)), weights_only=True)
    with pytest.raises(ValueError, match="does not fit its checksum"):
        load_tensors(bytes(content))


def test_member_larger_than_its_archive(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(member("a", bytes(100)).replace((100).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="claim more bytes than it has"):
        check_archive(path)


def test_pictures_that_start_programs_are_not_opened(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 20)).save(path, "EPS")
    with pytest.raises(ValueError, match="cannot read image"):
        read_image(path, 16)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1e999}', "NaN", '{"schema": 1, "a": "\\ud800"', "\x00"])
def test_results_that_are_none(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json (is not a result file|has schema)"):
        read_results(tmp_path)
