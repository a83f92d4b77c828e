"""Checks a whole data set and lists everything that is wrong with it, shard by shard.

Files: every shard named by the index is there, has its size and hashes, and every sample in it decodes.
Contents: tokens, boundaries, mask and length of every sample agree, and tokens are in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prolong.data.domain import check_vocabulary
from megatron_prolong.data.mds import MDSReader, Shard
from megatron_prolong.data.mds.compression import KNOWN
from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.progress import track
from megatron_prolong.runtime.publish import is_disk_full, is_temporary

_SHOWN_PER_SHARD = 3
# Of shards; not .metadata and .lock, which `hf download` leaves.
_ENDINGS = (".mds", *(f".{algorithm}" for algorithm in KNOWN))


@dataclass(frozen=True)
class Verdict:
    """problems: one message each, of every damaged shard. num_unhashed: shards whose index has no hashes, so
    that a changed token in them goes unnoticed."""

    num_shards: int
    num_samples: int
    num_unhashed: int
    problems: list[str]


def verify(directory: Path, vocab_size: int | None = None) -> Verdict:
    """Read every byte of a data set. Raises UserError only when its index cannot be read, or the disk is full."""
    reader = MDSReader(directory)
    problems = _unlisted(directory, reader.shards)
    if not len(reader):
        problems.append(f"{directory}: it is empty: its index.json lists no samples")
    num_unhashed = 0
    shards = reader.shards
    for number, shard in track(enumerate(shards), len(shards), f"{directory}: shards"):
        num_unhashed += not shard.delivered[1].hashes
        found = list(_check_shard(reader, number, shard, vocab_size))
        problems += found[:_SHOWN_PER_SHARD]
        if len(found) > _SHOWN_PER_SHARD:
            problems.append(f"{shard.path}: and {len(found) - _SHOWN_PER_SHARD} more samples like these")
    return Verdict(len(shards), len(reader), num_unhashed, problems)


def _unlisted(directory: Path, shards: list[Shard]) -> list[str]:
    """Shard files the index does not know: their samples would silently be missing."""
    known = {path for shard in shards for path in (shard.path, shard.delivered[0])}
    files = sorted(
        path
        for path in Path(directory).rglob("shard.*.mds*")
        if path not in known and path.suffix in _ENDINGS and not is_temporary(path, Path(directory))
    )
    return [f"{path}: not named by {directory}/index.json, so its samples are never read" for path in files]


def _check_shard(reader: MDSReader, number: int, shard: Shard, vocab_size: int | None) -> Iterator[str]:
    try:
        reader.verify(number)
    except UserError as error:
        if is_disk_full(error):  # for want of room to unpack, which says nothing of the shard
            raise
        yield str(error)
        return
    except OSError as error:  # of a bad disk, or for want of permission
        yield f"{shard.delivered[0]}: cannot be read ({error.strerror})"
        return
    if "input_ids" not in reader.columns:
        return
    for index in range(shard.first, shard.first + shard.num_samples):
        identity = Identity.of(reader, index)
        sample = reader[index]
        try:
            sequence = PackedSequence.from_sample(sample, identity, loss_mask="mask" in sample)
            if sample.get("length", sequence.num_tokens) != sequence.num_tokens:
                raise UserError(f"{identity}: length {sample['length']}, but {sequence.num_tokens} tokens")
            if vocab_size is not None:
                check_vocabulary(sequence, vocab_size)
        except UserError as error:
            yield str(error)
