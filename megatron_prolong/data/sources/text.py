"""Directories of text files: one document per file."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prolong.data.sources.base import MAX_RECORD_BYTES, Bad, Part, Record
from megatron_prolong.data.sources.files import list_files, open_bytes

SUFFIXES = (".txt", ".text", ".md", ".rst")


class Text:
    kind = "text"
    about = f"a text file, or a directory of them ({', '.join(SUFFIXES)}): one document per file"

    def parts(self, path: str) -> list[Part]:
        return [Part(name, 0, size, size) for name, size in list_files(path, SUFFIXES)]

    def read(self, part: Part) -> Iterator[Record | Bad]:
        with open_bytes(part.path) as file:
            data = file.read(MAX_RECORD_BYTES + 1)
        if len(data) > MAX_RECORD_BYTES:
            yield Bad(part.path, f"is longer than {MAX_RECORD_BYTES >> 20} MiB", "too long")
            return
        try:
            yield Record(part.path, {"text": data.decode("utf-8-sig")})
        except UnicodeDecodeError as error:
            yield Bad(part.path, f"is not UTF-8 (byte {error.start})", "not UTF-8")
