"""JSON Lines, plain or compressed: one document per line.

A plain file is cut into parts by bytes; a line belongs to the part its first byte lies in.
"""

from __future__ import annotations

import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import IO

from megatron_prolong.data.sources.base import MAX_RECORD_BYTES, Bad, Part, Record
from megatron_prolong.data.sources.files import COMPRESSED, is_remote, list_files, open_bytes

SUFFIXES = (".jsonl", ".ndjson", ".json")
_PART_BYTES = 1 << 26


class JsonLines:
    kind = "jsonl"
    about = "JSON Lines (.jsonl, also .gz, .zst, .bz2): one document per line, in the field `text`"

    def parts(self, path: str) -> list[Part]:
        parts: list[Part] = []
        for name, size in list_files(path, SUFFIXES):
            step = max(size, 1) if _is_whole(name) else _PART_BYTES
            parts += [
                Part(name, start, min(start + step, size), min(step, size - start))
                for start in range(0, max(size, 1), step)
            ]
        return parts

    def read(self, part: Part) -> Iterator[Record | Bad]:
        whole = _is_whole(part.path)
        with open_bytes(part.path) as file:
            at = 0
            if part.start and not whole:
                # The line that crosses the start belongs to the part before. One byte back, so that a
                # line beginning exactly at the start is kept.
                file.seek(part.start - 1)
                at = part.start - 1 + _skip_line(file, part.num_bytes + 1)
            while whole or at < part.stop:
                line, num_bytes = _read_line(file)
                if not num_bytes:
                    return
                name = f"{part.path}, line at byte {at}"
                at += num_bytes
                if line is None:
                    yield Bad(name, f"is longer than {MAX_RECORD_BYTES >> 20} MiB", "too long")
                elif line.removeprefix(BOM_UTF8).strip():
                    yield _parse(name, line)


def _is_whole(path: str) -> bool:
    """Whether the file is one part: a compressed or remote one cannot be entered in the middle, or not cheaply."""
    return path.lower().endswith(COMPRESSED) or is_remote(path)


def _read_line(file: IO[bytes]) -> tuple[bytes | None, int]:
    """The next line and its bytes; a line beyond the limit is passed over in small pieces (None)."""
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) <= MAX_RECORD_BYTES:
        return line, len(line)
    return None, len(line) + (0 if line.endswith(b"\n") else _skip_line(file))


def _skip_line(file: IO[bytes], limit: int = sys.maxsize) -> int:
    """Passes over the rest of a line, or `limit` bytes and a little more of it; returns how many they were."""
    skipped, piece = 0, b" "
    while piece and not piece.endswith(b"\n") and skipped < limit:
        piece = file.readline(1 << 20)
        skipped += len(piece)
    return skipped


def _parse(name: str, line: bytes) -> Record | Bad:
    array = "; a JSON array becomes JSON Lines by `jq -c '.[]'`" if line.lstrip().startswith(b"[") else ""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad(name, f"is not UTF-8 (byte {error.start} of the line)", "not UTF-8")
    except ValueError as error:
        return Bad(name, f"is not JSON ({error}){array}", "not JSON")
    except RecursionError:
        return Bad(name, "is nested too deeply", "not JSON")
    if not isinstance(fields, dict):
        return Bad(name, f"is not a JSON object but {type(fields).__name__}{array}", "not an object")
    return Record(name, fields)
