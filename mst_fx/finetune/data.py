"""Text to sequences of full length: documents end to end, cut every ``length`` tokens; only the last tail is left out.

Packed sequences are kept on disk (``--cache_dir``) and made again only if the data, the tokenizer or the length change.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from mst_fx.commands.demo import standard_library_text
from mst_fx.commands.models import UsageError, first_line
from mst_fx.config import did_you_mean
from mst_fx.finetune.checks import looks_like_path

BATCH = 500
"""Documents tokenized in one call."""
PIECE = 1 << 20
"""Characters of a text file tokenized in one call, or a little more: pieces end at the end of a line."""


@dataclass(frozen=True)
class Source:
    """Where text is, as plain values: they are what packed data is kept under."""

    kind: str
    """"stdlib", "text", "jsonl", "parquet", "folder" or "hub"."""
    path: str = ""
    column: str = ""
    cache_dir: str | None = None
    stamp: str = ""
    """Changes with the content."""

    def __str__(self) -> str:
        if self.kind == "stdlib":
            return "the Python standard library's sources (no --dataset was given)"
        of = f", column {self.column!r}" if self.column else ""
        return f"{self.path} ({self.kind}{of})"


def find_source(dataset: str | None, column: str, cache_dir: str | None = None) -> Source:
    """Look at a dataset without reading it all.

    Raises:
        UsageError: If it is not there, is empty, or has no such column.
    """
    if dataset is None:
        return Source("stdlib", stamp=sys.version)
    path = Path(dataset).expanduser()
    if path.is_file():
        if not path.stat().st_size:
            raise UsageError(f"--dataset {dataset}: the file is empty")
        stamp = file_stamp(path)
        kind = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(path.suffix.lower(), "text")
        if path.suffix.lower() in (".csv", ".tsv"):
            raise UsageError(f"--dataset {dataset}: tables of text are not read; write it as JSONL or Parquet")
        if kind == "text":
            return Source(kind, str(path.resolve()), stamp=stamp)
        columns = _parquet_columns(path, dataset) if kind == "parquet" else _jsonl_columns(path, dataset)
        _check_column(dataset, column, columns)
        return Source(kind, str(path.resolve()), column, stamp=stamp)
    if path.suffix or looks_like_path(dataset):
        if not path.is_dir():
            raise UsageError(f"--dataset {dataset}: there is no such file")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        raise UsageError(f"--dataset {dataset}: saved by `save_to_disk`, which is not read; write it by `to_parquet`")
    try:
        builder = datasets.load_dataset_builder(dataset, cache_dir=cache_dir)
    except Exception as e:
        raise UsageError(f"--dataset {dataset}: neither a file here nor a dataset on the hub ({first_line(e)})") from e
    if path.is_dir() and builder.name == "text":
        raise UsageError(
            f"--dataset {dataset}: of a folder of text files every line would be a document; join them to one file, or "
            "write one document a line as JSON (.jsonl)"
        )
    splits = getattr(builder.config, "data_files", None)
    if path.is_dir() and splits is not None and "train" not in splits:
        raise UsageError(f"--dataset {dataset}: has no split named train, but {', '.join(map(str, splits))}")
    if builder.info.features:
        _check_column(dataset, column, builder.info.features)
    return Source("folder" if path.is_dir() else "hub", dataset, column, cache_dir, stamp=str(builder.hash))


def file_stamp(path: Path) -> str:
    """Return what changes when a file does."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _check_column(dataset: str, column: str, columns: Iterable[str]) -> None:
    columns = list(columns)
    if column not in columns:
        near = did_you_mean(column, columns)
        raise UsageError(f"--text_column {column!r}: {dataset} has the columns {', '.join(map(repr, columns))}.{near}")


def _jsonl_columns(path: Path, dataset: str) -> list[str]:
    first = next((line for line in _lines(path) if line.strip()), None)
    if first is None:
        raise UsageError(f"--dataset {dataset}: the file is empty")
    return list(_json_line(first, dataset, 1))


def _lines(path: str | Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows puts a mark in front
            yield from file
    except UnicodeDecodeError as e:
        raise UsageError(f"--dataset {path}: not in UTF-8 ({e})") from e


def _json_line(line: str, dataset: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise UsageError(f"--dataset {dataset}: line {number} is not JSON ({e}); one object per line is needed") from e
    if not isinstance(row, dict):
        raise UsageError(f"--dataset {dataset}: line {number} is no JSON object; one object per line is needed")
    return row


def _parquet_columns(path: Path, dataset: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise UsageError(f"--dataset {dataset}: the file is empty")
            return file.schema_arrow.names
    except pyarrow.ArrowInvalid as e:
        raise UsageError(f"--dataset {dataset}: not a Parquet file ({first_line(e)})") from e


# -- reading -----------------------------------------------------------------------------------------


def documents(source: Source) -> Iterator[Iterator[str]]:
    """Return documents one by one, each as its pieces in order."""
    if source.kind in ("stdlib", "text"):
        yield _pieces(source)
    else:
        for value in _values(source):
            if not isinstance(value, str):
                raise UsageError(
                    f"--text_column {source.column!r}: {source.path} holds a value of type {type(value).__name__} "
                    "there, not text"
                )
            yield iter([value])


def _pieces(source: Source) -> Iterator[str]:
    if source.kind == "stdlib":
        lines: Iterable[str] = standard_library_text().decode(errors="replace").splitlines(keepends=True)
        yield from _joined(lines)
        return
    yield from _joined(_lines(source.path))


def _joined(lines: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _values(source: Source) -> Iterator[Any]:
    if source.kind == "jsonl":
        for number, line in enumerate(_lines(source.path), 1):
            if line.strip():
                row = _json_line(line, source.path, number)
                if source.column not in row:
                    raise UsageError(f"--dataset {source.path}: line {number} has no {source.column!r}")
                yield row[source.column]
    elif source.kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(columns=[source.column]):
                yield from batch.column(0).to_pylist()
    else:
        found = datasets.load_dataset(source.path, split="train", cache_dir=source.cache_dir)
        _check_column(source.path, source.column, found.column_names or ())  # pyright: ignore
        for row in found:
            yield row[source.column]  # pyright: ignore


# -- packing -----------------------------------------------------------------------------------------


def pack(source: Source, tokenizer: Any, length: int, cache_dir: str | None, stamp: str) -> datasets.Dataset:
    """Return sequences of exactly ``length`` tokens.

    Args:
        source: The text.
        tokenizer: Of the model, loaded from ``tokenizer.name_or_path``.
        length: Tokens per sequence.
        cache_dir: Where packed data is kept; None for that of ``datasets``.
        stamp: Changes with the tokenizer.

    Raises:
        UsageError: If there are too few tokens for one sequence.
    """
    # Plain values alone: a generator's arguments are what it is kept under, the same in every process.
    named = {
        **asdict(source),
        "tokenizer_path": tokenizer.name_or_path,
        "tokenizer_cache": cache_dir,
        "stamp_of": stamp,
    }
    try:
        packed = datasets.Dataset.from_generator(
            _packed_rows,
            features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),  # pyright: ignore
            cache_dir=cache_dir,  # pyright: ignore
            gen_kwargs={"length": length, **named},
        )
    except Exception as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, UsageError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None
    return packed  # pyright: ignore


def _packed_rows(
    length: int, tokenizer_path: str, tokenizer_cache: str | None, stamp_of: str, **source: Any
) -> Iterator[dict[str, list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, cache_dir=tokenizer_cache)
    tokens: list[int] = []
    total = 0
    for ids in tokenized(documents(Source(**source)), tokenizer):
        tokens += ids
        total += len(ids)
        full = len(tokens) - len(tokens) % length
        for start in range(0, full, length):
            yield {"input_ids": tokens[start : start + length]}
        del tokens[:full]
    if total < length:
        raise UsageError(
            f"--dataset: {total} tokens in all, fewer than one sequence of --model_max_length {length}; give more text "
            "or a shorter length"
        )


def tokenized(texts: Iterator[Iterator[str]], tokenizer: Any) -> Iterator[list[int]]:
    """Return the tokens of all documents in order, each between the tokens that the tokenizer puts around a text."""
    begin, end = _borders(tokenizer)

    def encode(pieces: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(pieces), add_special_tokens=False, verbose=False)["input_ids"]

    def marked() -> Iterator[tuple[str, bool, bool]]:
        for pieces in texts:
            before: str | None = None
            first = True
            for piece in pieces:
                if before is not None:
                    yield before, first, False
                    first = False
                before = piece
            if before is not None:
                yield before, first, True

    waiting = marked()
    # Pieces of a text file are large, and go to the tokenizer one at a time.
    while batch := list(_until_full(waiting)):
        for ids, (_, first, last) in zip(encode([text for text, _, _ in batch]), batch, strict=True):
            yield (begin if first else []) + ids + (end if last else [])


def _until_full(waiting: Iterator[tuple[str, bool, bool]]) -> Iterator[tuple[str, bool, bool]]:
    size = 0
    for item in itertools.islice(waiting, BATCH):
        yield item
        size += len(item[0])
        if size >= PIECE:
            return


def _borders(tokenizer: Any) -> tuple[list[int], list[int]]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    begin, end = whole[:at], whole[at + len(plain) :]
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    return begin, end


def tokenizer_stamp(name: str) -> str:
    """Return what changes when a local tokenizer's files do."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
    found = (Path(name) / f for f in files)
    return f"{os.path.abspath(name)} " + " ".join(file_stamp(p) for p in found if p.is_file())


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch. There is no padding, so no attention mask."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}
