"""Damaged and hostile safetensors files and folders: every one a typed error that names the culprit."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_hadacore.errors import CheckpointError
from hf_hadacore.integrity import (
    DTYPES,
    INDEX_NAME,
    checkpoint_files,
    read_header,
    verify_files,
    verify_quantized,
)

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "a.weight_scale": torch.ones(3, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_raw(file: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def test_header_says_what_the_library_reads(whole: Path) -> None:
    headers = read_header(whole)
    assert set(headers) == set(TENSORS)
    content = whole.read_bytes()
    for name, tensor in load_file(whole).items():
        info = headers[name]
        assert (info.dtype, info.shape, info.file) == (tensor.dtype, tuple(tensor.shape), whole)
        stored = bytearray(content[info.offset : info.offset + info.nbytes])
        assert info.nbytes == tensor.numel() * tensor.element_size()
        if stored:
            assert torch.equal(torch.frombuffer(stored, dtype=info.dtype).reshape(info.shape), tensor)


def test_every_dtype_of_the_table_is_the_librarys(tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    save_file({name: torch.empty(0, dtype=dtype) for name, dtype in DTYPES.items()}, file)
    assert {name: info.dtype for name, info in read_header(file).items()} == DTYPES


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ([], "must be a JSON object"),
        (b'{"x": {}, "x": {}}', "'x' occurs twice"),
        ({"__metadata__": {"n": 1}}, "__metadata__"),
        ({"x": 3}, "'x'"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "'x'"),
        ({"x": entry(dtype="F33")}, "'x': unknown dtype 'F33'"),
        ({"x": entry(dtype=["F32"])}, "'x': unknown dtype"),
        ({"x": entry(shape=[-2])}, "'x': shape"),
        ({"x": entry(shape=[2.0])}, "'x': shape"),
        ({"x": entry(shape=[True, 2])}, "'x': shape"),
        ({"x": entry(shape=[2**40, 2**40])}, "'x': shape"),
        ({"x": entry(shape=[3])}, "'x': F32 .3. takes 12 bytes"),
        ({"x": entry(begin=8, end=0)}, "'x': data_offsets"),
        ({"x": entry(end=2**70)}, "'x': F32 .2. takes 8 bytes"),
        ({"x": entry(begin=4, end=12)}, "'x' begins at .* leaves a hole after 'the header'"),
        ({"x": entry(), "y": entry(begin=4, end=12)}, "'y' begins at .* overlaps 'x'"),
        ({"x": entry(), "y": entry(begin=8, end=16)}, "truncated: tensor 'y' ends"),
        ({"x": entry(shape=[1], end=4)}, "4 bytes after the last tensor"),
    ],
)
def test_bad_headers(tmp_path: Path, header: object, says: str) -> None:
    file = write_raw(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=says) as error:
        verify_files([file])
    assert str(file) in str(error.value)


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**64 - 1])
def test_absurd_header_lengths(tmp_path: Path, length: int) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=r"bad.safetensors"):
        read_header(file)


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    for file in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_anywhere(whole: Path, data: st.DataObject) -> None:
    content = whole.read_bytes()
    cut = whole.with_name("cut.safetensors")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=r"cut.safetensors"):
        verify_files([cut])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_never_get_further_than_the_library(whole: Path, data: st.DataObject) -> None:
    """One byte changed: a typed error, or a header that the library reads in the same way."""
    content = bytearray(whole.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file = whole.with_name("mutated.safetensors")
    file.write_bytes(content)
    try:
        headers = read_header(file)
    except CheckpointError as error:
        assert "mutated.safetensors" in str(error)
        return
    loaded = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: info.shape for name, info in headers.items()
    }


def sharded(folder: Path) -> dict[str, str]:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2), "c": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    return {"a": first, "b": second, "c": second}


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(content))


def test_finds_shards_and_prefers_the_single_file(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": sharded(tmp_path)})
    assert [file.name for file in checkpoint_files(tmp_path)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert checkpoint_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_missing_shard(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": sharded(tmp_path)})
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*missing.*'b'"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d": "model-00001-of-00002.safetensors"}, "names tensor 'd'"),
        ({"b": "model-00001-of-00002.safetensors"}, "'b' is in model-00001"),
        ({"c": None}, "holds tensor 'c'"),
        ({"a": "../model-00001-of-00002.safetensors"}, "'a'.*plain name"),
        ({"a": "/etc/passwd"}, "'a'.*plain name"),
        ({"a": "/x/model.safetensors"}, "'a'.*plain name"),
        ({"a": "..\\x.safetensors"}, "'a'.*plain name"),
        ({"a": "C:x.safetensors"}, "'a'.*plain name"),
        ({"a": "x\0.safetensors"}, "'a'.*plain name"),
        ({"a": 7}, "'a'.*plain name"),
        ({"a": "pytorch_model.bin"}, "'a'.*plain name"),
    ],
)
def test_index_that_contradicts_or_escapes(tmp_path: Path, changes: dict, says: str) -> None:
    weight_map = {**sharded(tmp_path), **changes}
    write_index(
        tmp_path, {"weight_map": {name: file for name, file in weight_map.items() if file is not None}}
    )
    with pytest.raises(CheckpointError, match=says):
        checkpoint_files(tmp_path)


def test_index_of_other_files_is_not_looked_at(tmp_path: Path) -> None:
    names = sharded(tmp_path)
    write_index(tmp_path, {"weight_map": {"z": "other.safetensors"}})
    files = [tmp_path / name for name in sorted(set(names.values()))]
    assert set(verify_files(files)) == set(names)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {}}, 3])
def test_index_without_a_map(tmp_path: Path, content: object) -> None:
    write_index(tmp_path, content)
    with pytest.raises(CheckpointError, match="weight_map"):
        checkpoint_files(tmp_path)


def test_index_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=f"{name}.*no pickle is ever opened"):
        checkpoint_files(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        checkpoint_files(tmp_path / "absent")


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        save_file({"x": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"'x' is in both .*one.*two"):
        verify_files(files)


def test_quantized_expectations(whole: Path) -> None:
    headers = verify_files([whole])
    verify_quantized(headers, {"a.weight": (torch.int32, (3, 4)), "a.weight_scale": (None, [3, 2])})
    wrong = {
        "a.weight_zero": (torch.uint8, (3, 2)),
        "a.weight": (torch.int32, (3, 8)),
        "scalar": (torch.bfloat16, ()),
        "empty": (None, (4, 0)),
    }
    for name, expected in wrong.items():
        with pytest.raises(CheckpointError, match=f"{name}: expected .*, found "):
            verify_quantized(headers, {name: expected})
    with pytest.raises(CheckpointError, match="and 1 more"):
        verify_quantized(headers, wrong)


def test_zeros_of_a_symmetric_weight(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(3, 4, dtype=torch.int32), "w_zero": torch.zeros(3, 2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    headers = verify_files([tmp_path / "x.safetensors"])
    weight = {"w": (torch.int32, (3, 4))}
    verify_quantized(headers, weight | {"w_zero": (torch.uint8, (3, 2))})
    with pytest.raises(CheckpointError, match="w_zero: expected no zeros in a symmetric weight"):
        verify_quantized(headers, weight)


def test_integer_scales_are_not_floating_point(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected floating point \[3, 4\], found int32"):
        verify_quantized(verify_files([whole]), {"a.weight": (None, (3, 4))})
