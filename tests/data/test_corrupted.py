"""CIFAR-10-C: reading the public layout, making it in memory, and fetching the archive."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from ttalight.data import CIFARDataModule, CorruptedDataModule, CorruptedFolder
from ttalight.data import corrupted as module
from ttalight.data.corruptions import COMMON, EXTRA, corrupt
from ttalight.data.download import fetch, unpack

COUNT = 40  # images a severity in the twins


def published(index):
    """Images of one corruption as the public files have them: (5 * COUNT, 32, 32, 3)."""
    return np.random.default_rng(index).integers(0, 256, (5 * COUNT, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def layout(tmp_path):
    """A twin of CIFAR-10-C with three corruptions."""
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    for index, name in enumerate(("fog", "frost", "snow")):
        np.save(folder / f"{name}.npy", published(index))
    np.save(folder / "labels.npy", np.tile(np.arange(COUNT) % 10, 5))
    return folder


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """A twin of CIFAR-10's test set in the same data folder."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(9).integers(0, 256, (COUNT, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": pixels, "labels": (np.arange(COUNT) % 10).tolist()})
    (folder / "test_batch").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
    monkeypatch.setattr(CIFAR10, "train_list", [])
    return tmp_path / "data"


def domains_of(data):
    data.setup("test")
    return {domain.name: part for domain, part in zip(data.stream.domains, data._stream_set.domains, strict=True)}


class TestReading:
    @pytest.mark.parametrize("severity", [1, 3, 5])
    def test_rows_are_those_of_the_severity(self, layout, severity):
        data = CorruptedDataModule(root=str(layout.parent), domains=["snow", "fog"], severity=severity)
        read = domains_of(data)
        rows = slice((severity - 1) * COUNT, severity * COUNT)
        assert list(read) == ["snow", "fog"]
        for name, index in (("snow", 2), ("fog", 0)):
            assert np.array_equal(read[name].images.permute(0, 2, 3, 1).numpy(), published(index)[rows])
            assert read[name].labels.tolist() == (np.arange(COUNT) % 10).tolist()
        assert [(domain.name, domain.severity) for domain in data.stream.domains] == [
            ("snow", severity),
            ("fog", severity),
        ]

    def test_root_is_the_layout_or_the_variable(self, layout, monkeypatch):
        monkeypatch.setenv("TTALIGHT_DATA", str(layout.parent))
        for root in (None, str(layout)):
            assert torch.equal(
                domains_of(CorruptedDataModule(root=root, domains=["fog"]))["fog"].images[0],
                torch.from_numpy(published(0)[4 * COUNT]).permute(2, 0, 1),
            )

    @pytest.mark.parametrize("domain", ["fog", "clean"])
    def test_some_classes(self, domain, layout, clean):
        data = CorruptedDataModule(root=str(layout.parent), domains=[domain], classes=[7, 2], limit=30)
        whole = CorruptedDataModule(root=str(layout.parent), domains=[domain], limit=30)
        part, images = domains_of(data)[domain], domains_of(whole)[domain].images
        assert part.labels.tolist() == [1, 0] * 3
        assert torch.equal(part.images, images[[2, 7, 12, 17, 22, 27]])
        assert data.num_classes == 2
        assert data.protocol() == {"classes": [7, 2]}
        for classes in ([3], [1, 1], [0, 10]):
            with pytest.raises(ValueError, match="classes must be two numbers or more from 0 to 9, each once"):
                CorruptedDataModule(classes=classes)

    def test_scaled_images(self, layout):
        data = CorruptedDataModule(root=str(layout.parent), domains=["fog"], resize=48)
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        images[0] = 51
        scaled, labels = data.on_after_batch_transfer((images, torch.arange(2)), 0)
        assert scaled.shape == (2, 3, 48, 48)
        torch.testing.assert_close(scaled[0], torch.full((3, 48, 48), 0.2))
        assert labels.tolist() == [0, 1]
        assert data.protocol() == {"resize": 48, "interpolation": "bicubic"}
        with pytest.raises(ValueError, match="resize must be at least 1 pixel, got 0"):
            CorruptedDataModule(resize=0)

    def test_fifteen_domains_by_default(self):
        assert CorruptedDataModule().domains == COMMON

    def test_limit_copies_no_more_than_it_needs(self, layout):
        read = domains_of(CorruptedDataModule(root=str(layout), domains=["fog"], limit=7))["fog"]
        assert np.array_equal(read.images.permute(0, 2, 3, 1).numpy(), published(0)[4 * COUNT : 4 * COUNT + 7])
        assert read.images.untyped_storage().nbytes() == 7 * 3072

    def test_clean_domain_is_the_clean_set(self, layout, clean):
        read = domains_of(CorruptedDataModule(root=str(clean), domains=["clean", "fog"], limit=11))
        assert torch.equal(read["clean"].images, CIFARDataModule(root=str(clean)).load("test").images[:11])
        assert np.array_equal(read["fog"].images[0].permute(1, 2, 0).numpy(), published(0)[4 * COUNT])

    def test_clean_domain_without_the_clean_set(self, layout):
        with pytest.raises(FileNotFoundError, match=r"no test_batch in .*cifar-10-batches-py.*download: true"):
            domains_of(CorruptedDataModule(root=str(layout.parent), domains=["clean", "fog"]))

    def test_fortran_order_and_integer_types(self, layout):
        np.save(layout / "fog.npy", np.asfortranarray(published(0)))
        np.save(layout / "labels.npy", np.tile(np.arange(COUNT) % 10, 5).astype(">i2"))
        images = CorruptedFolder(layout).read("fog", 2, 10)
        assert np.array_equal(images.images.permute(0, 2, 3, 1).numpy(), published(0)[COUNT : 2 * COUNT])
        assert images.labels.tolist() == (np.arange(COUNT) % 10).tolist()

    def test_made_otherwise_than_the_published_sets(self, layout):
        """corruptions.json says which severities there are, how frost was made and from which split."""
        settings = {"severities": [5, 2], "frost": "procedural", "split": "validation"}
        (layout / "corruptions.json").write_text(json.dumps(settings))
        arguments = {"root": str(layout), "domains": ["frost", "fog"], "severity": 2}
        with pytest.raises(ValueError, match="was made from the validation images, and stream_split is test"):
            domains_of(CorruptedDataModule(**arguments))
        data = CorruptedDataModule(**arguments, stream_split="validation")
        read = domains_of(data)
        assert list(read) == ["frost_procedural", "fog"]
        half = published(1)[5 * COUNT // 2 :]
        assert np.array_equal(read["frost_procedural"].images.permute(0, 2, 3, 1).numpy(), half)
        with pytest.raises(ValueError, match=r"has severities \[5, 2\], not 4"):
            domains_of(CorruptedDataModule(**(arguments | {"severity": 4}), stream_split="validation"))


class TestRefusals:
    def refusal(self, layout, kind=ValueError, **arguments):
        with pytest.raises(kind) as error:
            domains_of(CorruptedDataModule(**({"root": str(layout), "domains": ["fog"]} | arguments)))
        return str(error.value)

    def test_no_layout_tells_both_ways(self, tmp_path, monkeypatch):
        monkeypatch.delenv("TTALIGHT_DATA", raising=False)
        message = self.refusal(tmp_path, FileNotFoundError)
        assert f"no CIFAR-10-C in {tmp_path}/CIFAR-10-C (TTALIGHT_DATA is not set)" in message
        assert "expected fog.npy, labels.npy" in message
        for word in ("download: true", "zenodo.org/records/2535967", "generate: true", "--data.root", "TTALIGHT_DATA"):
            assert word in message
        assert "zenodo.org/records/3555552" in self.refusal(tmp_path, FileNotFoundError, dataset="cifar100")

    def test_missing_corruption_lists_what_is_there(self, layout):
        message = self.refusal(layout, FileNotFoundError, domains=["fgo"])
        assert message == f"no fgo.npy in {layout}; there are fog, frost, snow; nearest: fog"

    def test_missing_labels(self, layout):
        (layout / "labels.npy").unlink()
        assert self.refusal(layout, FileNotFoundError).startswith(f"no labels.npy in {layout}; there are fog, frost")

    def test_objects_are_never_unpickled(self, layout):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("the file was unpickled",))

        np.save(layout / "fog.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
        assert "fog.npy holds Python objects" in self.refusal(layout)

    def test_truncated(self, layout):
        content = (layout / "fog.npy").read_bytes()
        (layout / "fog.npy").write_bytes(content[:-1000])
        assert "fog.npy is cut short: 1,000 bytes are missing at its end" in self.refusal(layout)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", b"\x93NUMPY\x01\x00\x10\x00garbage"])
    def test_not_npy(self, layout, content):
        (layout / "fog.npy").write_bytes(content)
        assert "fog.npy is not a .npy file (" in self.refusal(layout)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((50, 32, 32, 3), np.float32), r"uint8 RGB images .* it has float32 of shape (50, 32, 32, 3)"),
            (np.zeros((50, 3, 32, 32), np.uint8), r"uint8 RGB images .* it has uint8 of shape (50, 3, 32, 32)"),
            (np.zeros((50, 3072), np.uint8), "it has uint8 of shape (50, 3072)"),
            (np.zeros((52, 32, 32, 3), np.uint8), "fog.npy has 52 images, expected a multiple of 5"),
            (np.zeros((0, 32, 32, 3), np.uint8), "fog.npy has 0 images, expected a multiple of 5"),
            (np.zeros((50, 32, 32, 3), np.uint8), "labels.npy has 200 labels, but "),
        ],
    )
    def test_images_of_another_kind(self, layout, images, message):
        np.save(layout / "fog.npy", images)
        found = self.refusal(layout)
        for part in message.split(" .* "):
            assert part in found

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (np.full(5 * COUNT, 10), "labels.npy has labels from 10 to 10, expected 0 to 9"),
            (np.full(5 * COUNT, -1), "labels.npy has labels from -1 to -1, expected 0 to 9"),
            (np.zeros(5 * COUNT), "labels.npy must hold integers of shape (rows,), it has float64"),
            (np.zeros((5 * COUNT, 1), np.int64), "labels.npy must hold integers of shape (rows,)"),
        ],
    )
    def test_labels_of_another_kind(self, layout, labels, message):
        np.save(layout / "labels.npy", labels)
        assert message in self.refusal(layout)

    @pytest.mark.parametrize("content", ["{", "[]", '{"severities": 5, "split": "test"}', "{}"])
    def test_damaged_settings(self, layout, content):
        (layout / "corruptions.json").write_text(content)
        assert "corruptions.json cannot be read (" in self.refusal(layout)

    @pytest.mark.parametrize("severity", [0, 6])
    def test_severity(self, severity):
        with pytest.raises(ValueError, match=f"severity must be an integer from 1 .* got {severity}"):
            CorruptedDataModule(severity=severity)


class TestGenerating:
    def test_makes_what_corrupt_makes(self, clean):
        data = CorruptedDataModule(
            root=str(clean), domains=["clean", "fog", "frost"], severity=4, seed=3, generate=True
        )
        images = CIFARDataModule(root=str(clean)).load("test").images
        read = domains_of(data)
        assert torch.equal(read["clean"].images, images)
        assert torch.equal(read["fog"].images, corrupt(images, "fog", 4, seed=3))
        assert torch.equal(read["frost_procedural"].images, corrupt(images, "frost", 4, seed=3))

    def test_a_limit_takes_the_first_of_the_same_images(self, clean, monkeypatch):
        monkeypatch.setattr(CorruptedDataModule, "corruption_chunk", 16)
        whole, part = (
            domains_of(CorruptedDataModule(root=str(clean), domains=["gaussian_noise", "snow"], generate=True, limit=n))
            for n in (None, 21)
        )
        for name in ("gaussian_noise", "snow"):
            assert len(part[name]) == 21
            assert torch.equal(part[name].images, whole[name].images[:21])

    def test_files_come_first(self, layout, clean):
        read = domains_of(CorruptedDataModule(root=str(clean), domains=["fog"], generate=True))
        assert np.array_equal(read["fog"].images[0].permute(1, 2, 0).numpy(), published(0)[4 * COUNT])
        with pytest.raises(FileNotFoundError, match=r"no jpeg_compression.npy"):
            domains_of(CorruptedDataModule(root=str(clean), domains=["jpeg_compression"], generate=True))

    def test_validation_is_generated_beside_published_test(self, layout, clean, monkeypatch):
        monkeypatch.setattr(CIFAR10, "train_list", CIFAR10.test_list)
        data = CorruptedDataModule(
            root=str(clean), domains=["fog"], generate=True, stream_split="validation", validation=20
        )
        images = data.load("validation").images
        assert torch.equal(domains_of(data)["fog"].images, corrupt(images, "fog", 5))

    def test_without_the_clean_set(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no test_batch in"):
            domains_of(CorruptedDataModule(root=str(tmp_path), generate=True))


class Server(ThreadingHTTPServer):
    """Serves one file; may break off after a number of bytes, or ignore ranges."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.most, self.ranges, self.seen = content, None, True, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.seen.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if wanted and start >= len(self.server.content):
            self.send_error(416)
            return
        rest = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.most])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = np.random.default_rng(0).bytes(300_000)
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class TestFetch:
    def md5(self, server):
        return hashlib.md5(server.content).hexdigest()

    def test_goes_on_where_it_stopped(self, server, tmp_path):
        target = tmp_path / "new" / "file"
        server.most = 100_000
        with pytest.raises(ConnectionError, match=r"stopped after 100,000 bytes .*run the same again to continue"):
            fetch(server.url, target, self.md5(server))
        assert not target.exists()
        server.most = None
        fetch(server.url, target, self.md5(server))
        assert target.read_bytes() == server.content
        assert server.seen == [None, "bytes=100000-"]
        assert [path.name for path in target.parent.iterdir()] == ["file"]
        fetch(server.url, target, self.md5(server))
        assert len(server.seen) == 2

    def test_starts_anew_where_the_server_cannot_go_on(self, server, tmp_path):
        (tmp_path / "file.part").write_bytes(b"x" * 1000)
        server.ranges = False
        fetch(server.url, tmp_path / "file", self.md5(server))
        assert (tmp_path / "file").read_bytes() == server.content

    def test_everything_had_arrived(self, server, tmp_path):
        (tmp_path / "file.part").write_bytes(server.content)
        fetch(server.url, tmp_path / "file", self.md5(server))
        assert (tmp_path / "file").read_bytes() == server.content

    def test_wrong_checksum(self, server, tmp_path):
        with pytest.raises(ValueError, match=f"its md5 is {self.md5(server)}, expected {'0' * 32}; removed what came"):
            fetch(server.url, tmp_path / "file", "0" * 32)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_of_the_user_s_is_kept(self, server, tmp_path):
        (tmp_path / "file").write_bytes(b"mine")
        with pytest.raises(ValueError, match="remove it to have it downloaded again"):
            fetch(server.url, tmp_path / "file", self.md5(server))
        assert (tmp_path / "file").read_bytes() == b"mine"
        assert server.seen == []

    def test_no_server(self, tmp_path, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(ConnectionError, match=r"of http://127.0.0.1:9/x stopped after 0 bytes .*put it at"):
            fetch("http://127.0.0.1:9/x", tmp_path / "file", "0" * 32)


class TestUnpack:
    def archive(self, tmp_path, *members):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                if content is None:
                    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                else:
                    member.size = len(content)
                tar.addfile(member, io.BytesIO(content or b""))
        return path

    def test_takes_the_wanted_members_and_no_others(self, tmp_path):
        archive = self.archive(tmp_path, ("set/a.npy", b"1"), ("set/b.npy", b"2"), ("run.sh", b"3"))
        unpack(archive, tmp_path / "out", ["set/a.npy"])
        assert [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")] == [
            "set/a.npy"
        ]
        with pytest.raises(ValueError, match=r"lacks set/c.npy"):
            unpack(archive, tmp_path / "out", ["set/a.npy", "set/c.npy"])

    @pytest.mark.parametrize("name", ["/tmp/x.npy", "../x.npy", "set/../../x.npy"])
    def test_paths_that_lead_out(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"is not to be trusted: its member .* leads out of the folder"):
            unpack(self.archive(tmp_path, (name, b"1")), tmp_path / "out", [name])
        assert not (tmp_path / "x.npy").exists()

    def test_links(self, tmp_path):
        with pytest.raises(ValueError, match="should be a plain file"):
            unpack(self.archive(tmp_path, ("a.npy", None)), tmp_path / "out", ["a.npy"])

    def test_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr("ttalight.data.download._LARGEST", 3)
        with pytest.raises(ValueError, match="a plain file of at most 3 bytes"):
            unpack(self.archive(tmp_path, ("a.npy", b"1234")), tmp_path / "out", ["a.npy"])


class TestDownload:
    def test_archive_becomes_the_layout(self, layout, tmp_path, monkeypatch):
        archive = tmp_path / "published.tar"
        for name in (*COMMON, *EXTRA):
            if not (layout / f"{name}.npy").exists():
                np.save(layout / f"{name}.npy", np.zeros((5 * COUNT, 32, 32, 3), np.uint8))
        with tarfile.open(archive, "w") as tar:
            tar.add(layout, "CIFAR-10-C")
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(module._PUBLISHED, "cifar10", ("CIFAR-10-C", archive.as_uri(), md5))
        data = CorruptedDataModule(root=str(tmp_path / "new"), domains=["fog"], download=True)
        data.prepare_data()
        assert np.array_equal(domains_of(data)["fog"].images[0].permute(1, 2, 0).numpy(), published(0)[4 * COUNT])
        monkeypatch.setitem(module._PUBLISHED, "cifar10", ("CIFAR-10-C", "file:///nowhere", md5))
        (tmp_path / "new" / "CIFAR-10-C.tar").unlink()
        CorruptedDataModule(root=str(tmp_path / "new"), domains=["fog"], download=True).prepare_data()

    def test_generating_needs_the_clean_set_only(self, clean, monkeypatch):
        monkeypatch.setitem(module._PUBLISHED, "cifar10", ("CIFAR-10-C", "file:///nowhere", ""))
        data = CorruptedDataModule(root=str(clean), domains=["contrast"], download=True, generate=True)
        data.prepare_data()
        assert len(domains_of(data)["contrast"]) == COUNT


@pytest.mark.data
def test_real_test_images_become_the_benchmark(shared_data, tmp_path):
    """Distances to the clean images, root mean square over all, are those of the public generator."""
    shutil.unpack_archive(shared_data / "cifar-10-test.tar.xz", tmp_path)
    data = CorruptedDataModule(
        root=str(tmp_path),
        domains=["clean", "gaussian_noise", "brightness", "jpeg_compression"],
        generate=True,
        limit=3000,
    )
    read = domains_of(data)
    for name, expected in (("gaussian_noise", 24.6), ("brightness", 60.1), ("jpeg_compression", 11.1)):
        distance = (read[name].images.float() - read["clean"].images.float()).square().mean().sqrt().item()
        assert distance == pytest.approx(expected, rel=0.04)
