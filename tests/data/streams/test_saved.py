"""Streams in files: round trip, damage, and the order that reads one."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from ttalight.data import (
    Correlated,
    DigitsDataModule,
    Domain,
    Gradual,
    Mixed,
    PerDomain,
    Probed,
    SavedStream,
    SingleSample,
    Stream,
)

DOMAINS = [Domain("fog", 5), Domain("snow", 5), Domain("clean")]
LABELS = [np.arange(20) % 4, np.arange(13) % 4, np.arange(10) % 4]


@pytest.fixture
def stream():
    return Probed(Mixed(), every=9, samples=4).build(DOMAINS, LABELS, 4, 0)


@pytest.fixture
def file(stream, tmp_path):
    path = tmp_path / "stream.npz"
    stream.save(path)
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype.hasobject)
    return buffer.getvalue()


class TestRoundTrip:
    @pytest.mark.parametrize("order", [PerDomain(), Correlated(mixed=True), SingleSample(window=5)])
    def test_everything_comes_back(self, order, tmp_path):
        stream = order.build(DOMAINS, LABELS, 4, 0)
        stream.save(str(tmp_path / "s.npz"))
        again = Stream.load(str(tmp_path / "s.npz"))
        for name in ("domains", "visits", "announced", "window", "hash"):
            assert getattr(again, name) == getattr(stream, name)
        for name in ("visit", "sample", "offsets"):
            assert np.array_equal(getattr(again, name), getattr(stream, name))
            assert getattr(again, name).dtype == getattr(stream, name).dtype

    def test_probes_come_back(self, stream, file):
        again = Stream.load(file)
        assert again.visits == stream.visits
        assert any(visit.probe for visit in again.visits)

    def test_numpy_reads_it_without_pickle(self, stream, file):
        with np.load(file, allow_pickle=False) as data:
            assert np.array_equal(data["sample"], stream.sample)
            assert json.loads(data["header"].tobytes())["hash"] == stream.hash

    def test_nothing_but_the_file_is_left(self, file, stream):
        stream.save(file)
        assert [path.name for path in file.parent.iterdir()] == ["stream.npz"]


class TestDamage:
    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no saved stream .*nothing\.npz"):
            Stream.load(tmp_path / "nothing.npz")

    def test_cut_short_anywhere(self, file):
        content = file.read_bytes()
        for length in range(0, len(content), 17):
            file.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"stream\.npz"):
                Stream.load(file)

    def test_any_byte_changed(self, file, stream):
        """A changed byte is an error, or one of those that say nothing, such as a time stamp."""
        content = file.read_bytes()
        for place in range(0, len(content), 11):
            file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
            try:
                assert Stream.load(file).hash == stream.hash
            except ValueError as error:
                assert "stream.npz" in str(error)  # noqa: PT017

    def test_a_pickle_is_not_opened(self, file, tmp_path):
        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        content = members(file)
        for data in (npy(np.array([Payload()], dtype=object)), pickle.dumps(Payload())):
            write(file, content | {"sample.npy": data})
            with pytest.raises(ValueError, match=r"is not a saved stream, or is damaged .* write it again"):
                Stream.load(file)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("name", "array", "message"),
        [
            ("sample", np.zeros(49), "sample must be uint32 of shape"),
            ("sample", np.zeros((9, 5), np.uint32), "sample must be uint32 of shape"),
            ("sample", np.zeros(4, np.uint32), "visit and sample must be equally long"),
            ("visit", np.full(49, 99, np.uint32), "visit has the index 99"),
            ("offsets", np.array([0, 99]), "offsets must rise from 0"),
            ("header", np.frombuffer(b"{]", np.uint8), "JSONDecodeError"),
            ("header", np.frombuffer(b"[1]", np.uint8), "its header does not say format 1"),
            ("header", np.frombuffer(b'{"format": 2}', np.uint8), "its header does not say format 1"),
            ("header", np.frombuffer(b'{"format": 1}', np.uint8), "is damaged or was changed"),
            ("header", np.frombuffer(b'{"format": 1, "domains": 3}', np.uint8), "is damaged or was changed"),
        ],
    )
    def test_other_content(self, file, name, array, message):
        write(file, members(file) | {f"{name}.npy": npy(array)})
        with pytest.raises(ValueError, match=message):
            Stream.load(file)

    def test_a_sample_changed(self, file, stream):
        sample = stream.sample.copy()
        sample[3] += 1
        write(file, members(file) | {"sample.npy": npy(sample)})
        with pytest.raises(ValueError, match="its content does not fit the hash in it"):
            Stream.load(file)

    def test_a_missing_member(self, file):
        content = members(file)
        del content["visit.npy"]
        write(file, content)
        with pytest.raises(ValueError, match=r"no item named 'visit\.npy'"):
            Stream.load(file)

    def test_a_bomb_is_not_unpacked(self, file):
        content = members(file) | {"sample.npy": npy(np.zeros(10**6, np.uint32))}
        write(file, content, zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match="is compressed"):
            Stream.load(file)

    def test_a_header_that_promises_too_much(self, file):
        buffer = io.BytesIO()
        header = {"descr": "<u4", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(buffer, header)
        write(file, members(file) | {"sample.npy": buffer.getvalue() + bytes(4 * 49)})
        with pytest.raises(ValueError, match="sample must have 4,000,000,000,000 bytes, it has 196"):
            Stream.load(file)


class TestSavedStream:
    def module(self, order, **kwargs):
        domains = kwargs.pop("domains", ["contrast", "fog"])
        data = DigitsDataModule(batch_size=8, domains=domains, limit=20, stream=order, **kwargs)
        data.setup("test")
        return data

    @pytest.mark.parametrize("order", [PerDomain(), Gradual([1, 3]), Probed(Mixed(), every=15, samples=6)])
    def test_it_replays_what_was_saved(self, order, tmp_path):
        data = self.module(order)
        path = tmp_path / "s.npz"
        data.stream.save(path)
        again = self.module(SavedStream(str(path)), seed=0)
        assert again.stream.hash == data.stream.hash
        for (images, labels), (others, same) in zip(data.test_dataloader(), again.test_dataloader(), strict=True):
            assert (images == others).all()
            assert (labels == same).all()
        assert again.order.describe() == {"path": str(path)}

    def test_clean_images_that_were_asked_for(self, tmp_path):
        data = self.module(PerDomain(), domains=["contrast", "clean"])
        data.stream.save(tmp_path / "s.npz")
        again = self.module(SavedStream(str(tmp_path / "s.npz")), domains=["contrast", "clean"])
        assert again.stream.hash == data.stream.hash

    def test_other_domains(self, tmp_path):
        self.module(PerDomain()).stream.save(tmp_path / "s.npz")
        message = r"is a stream over contrast \(5\), fog \(5\), and the data module delivers snow \(5\): give the same"
        with pytest.raises(ValueError, match=message):
            self.module(SavedStream(str(tmp_path / "s.npz")), domains=["snow"])

    def test_another_limit(self, tmp_path):
        self.module(PerDomain()).stream.save(tmp_path / "s.npz")
        data = DigitsDataModule(domains=["contrast", "fog"], limit=10, stream=SavedStream(str(tmp_path / "s.npz")))
        with pytest.raises(ValueError, match="of contrast, which has 10 samples"):
            data.setup("test")
