"""MDS data sets with text: one document per sample. (Tokenized ones go straight to filter and pack.)"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prolong.data.mds import MDSReader
from megatron_prolong.data.sources.base import Bad, Part, Record
from megatron_prolong.errors import UserError


class Shards:
    kind = "mds"
    about = "an MDS data set with a column of text (or messages): one document per sample"

    def parts(self, path: str) -> list[Part]:
        reader = MDSReader(path)
        if "input_ids" in reader.columns:
            raise UserError(f"{path} is tokenized already (column input_ids); pack or filter it directly")
        return [
            Part(path, shard.first, shard.first + shard.num_samples, shard.raw.num_bytes)
            for shard in reader.shards
        ]

    def read(self, part: Part) -> Iterator[Record | Bad]:
        reader = MDSReader(part.path)
        for number in range(part.start, part.stop):
            yield Record(f"{part.path}, sample {number}", reader[number])
