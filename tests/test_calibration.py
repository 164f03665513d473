"""Calibration text: every kind of file, the samples that come of it, and errors before anything is done."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_tokenizer import make_tokenizer

from hf_hadacore.errors import CalibrationError
from hf_hadacore.offline.calibration import Calibration, calibration_tokens, digest, load_tokenizer


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


# Ten documents of ten different tokens each.
DOCUMENTS = [[10 + 8 * (d % 9) + t % 8 if t else 2 + d % 5 for t in range(10)] for d in range(10)]
ROWS = [{"id": d, "text": words(*document)} for d, document in enumerate(DOCUMENTS)]


def tokens(source: Any, tokenizer: Any = None, **options: Any) -> torch.Tensor:
    options = {"samples": 4, "sequence_length": 20, **options}
    return calibration_tokens(Calibration(source, **options), tokenizer or make_tokenizer())


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"data{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    if suffix == ".txt":
        file.write_text("\n\n".join(row["text"] for row in ROWS))
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS))
    else:
        {".jsonl": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv}[suffix](file)
    return file


def test_text_file_is_one_text_in_order(tmp_path: Path) -> None:
    file = write(tmp_path, ".txt")
    flat = torch.tensor(DOCUMENTS).flatten()
    assert torch.equal(tokens(file, samples=5), flat.view(5, 20))
    # Fewer samples than the text holds are spread over it.
    assert torch.equal(tokens(file, samples=2), flat.view(5, 20)[[0, 2]])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_rows_are_shuffled_texts(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, suffix)
    got = tokens(file, samples=5)
    documents = [tuple(document) for document in got.view(10, 10).tolist()]
    assert sorted(documents) == sorted(map(tuple, DOCUMENTS))
    assert documents != list(map(tuple, DOCUMENTS))
    assert torch.equal(got, tokens(file, samples=5))
    assert not torch.equal(got, tokens(file, samples=5, seed=1))


def test_samples_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    file = write(tmp_path, ".txt")
    got = tokens(file, make_tokenizer(bos="w9"), samples=5, sequence_length=11)
    assert got.shape == (5, 11)
    assert (got[:, 0] == 9).all()
    assert torch.equal(got[:, 1:], torch.tensor(DOCUMENTS)[[0, 2, 4, 6, 8]])


def test_conversations(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": "w22"}]}
    ] * 4
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    got = tokens(file, samples=2, sequence_length=12, chat_template=True)
    assert got.flatten().tolist() == [7, 20, 21, 7, 22, 8] * 4
    with pytest.raises(CalibrationError, match=r"which column is the text.*'messages'"):
        tokens(file)
    with pytest.raises(CalibrationError, match=r"'messages' holds list, not text.*--chat-template"):
        tokens(file, column="messages")
    with pytest.raises(CalibrationError, match="chat template cannot be applied to column 'messages'"):
        tokens(file, make_tokenizer(chat_template=None), chat_template=True)


def test_template_that_begins_like_a_text(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "w20 w21"}]}))
    template = "w9 {% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(bos="w9", chat_template=template)
    got = tokens(file, tokenizer, samples=1, sequence_length=3, chat_template=True)
    assert got.tolist() == [[9, 20, 21]]


def test_columns(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"a": 1, "prose": row["text"]}) for row in ROWS))
    assert tokens(file).shape == (4, 20)
    file.write_text("\n".join(json.dumps({"a": "x", "prose": row["text"]}) for row in ROWS))
    assert tokens(file, column="prose").shape == (4, 20)
    with pytest.raises(CalibrationError, match=r"data\.jsonl: which column.*'a', 'prose'"):
        tokens(file)
    with pytest.raises(CalibrationError, match=r"no column 'story'; its columns are 'a', 'prose'"):
        tokens(file, column="story")


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**options: Any) -> Any:
        asked.append(options)
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("org/name", "name:config", "org/name:config:validation", "name::test"):
        assert tokens(source).shape == (4, 20)
    assert all(options.pop("streaming") for options in asked)
    assert asked == [
        {"path": "org/name", "name": None, "split": "train"},
        {"path": "name", "name": "config", "split": "train"},
        {"path": "org/name", "name": "config", "split": "validation"},
        {"path": "name", "name": None, "split": "test"},
    ]


def test_no_more_is_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows() -> Any:
        for number in range(10**9):
            read.append(number)
            yield {"text": words(*range(10, 20))}

    class Rows:
        def shuffle(self, **options: Any) -> Any:
            return rows()

    monkeypatch.setattr(datasets, "load_dataset", lambda **options: Rows())
    assert tokens("org/name").shape == (4, 20)
    assert len(read) == 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"data\.jsonl: cannot be read: \w+"),
        (b'{"text": "w2 w3"}', "2 tokens give 0 samples of 20, 4 were asked for"),
        (b'{"text": ', "cannot be read"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b'{"text": null}', "0 tokens"),
        (b'{"text": 5}', "holds int, not text"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        tokens(file)


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match=r"nothing\.txt: there is no such file"):
        tokens(tmp_path / "nothing.txt")
    with pytest.raises(CalibrationError, match="is a folder"):
        tokens(tmp_path)
    (tmp_path / "data.bin").write_text("w2")
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "data.bin", "a/b/c", "../x", "name:a:b:c"):
        with pytest.raises(CalibrationError, match=r"neither a file that ends in .* nor a hub dataset"):
            tokens(source)

    def unreachable(**options: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CalibrationError, match="org/name: cannot be read: offline"):
        tokens("org/name")


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 1.5}, {"sequence_length": 1}])
def test_unusable_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=f"{next(iter(options))} must be an integer of at least"):
        Calibration("x.txt", **options)


def test_title_has_no_folders(tmp_path: Path) -> None:
    assert Calibration(write(tmp_path, ".txt")).title == "data.txt"
    assert Calibration("org/name:config").title == "org/name:config"


def test_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        load_tokenizer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("w5").input_ids == [5]


def test_digest_tells_tokens_apart() -> None:
    one = torch.arange(6).view(2, 3)
    assert digest(one) == digest(one.clone()) != digest(one.flip(0))
