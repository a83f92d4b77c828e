"""MDS, the format of ProLong's published data (mosaicml-streaming's, version 2): reading, writing, merging.

A data set is a directory with `index.json` and shard files `shard.00000.mds`; both may lie in nested
directories when several processes wrote them, with one merged index on top. A shard is

    uint32 n | uint32 offsets [n+1], from the start of the file | JSON of the shard's settings | n samples

and a sample is the uint32 sizes of its variable-size columns, then the bytes of every column, columns in
alphabetical order. All integers are little-endian. Shards may be compressed as a whole and the index may
hold hashes of them. The package that defined the format depends on torchvision and five cloud SDKs, hence
this implementation; `tests/parity/test_mds_streaming.py` proves both directions against it.
"""

from megatron_prolong.data.mds.index import INDEX, Shard, common_tokenizer, read_index
from megatron_prolong.data.mds.merge import merge_indexes, merge_tree
from megatron_prolong.data.mds.reader import MDSReader, is_there, is_unpacked_by_all
from megatron_prolong.data.mds.writer import MDSWriter

__all__ = [
    "INDEX",
    "MDSReader",
    "MDSWriter",
    "Shard",
    "common_tokenizer",
    "is_there",
    "is_unpacked_by_all",
    "merge_indexes",
    "merge_tree",
    "read_index",
]
