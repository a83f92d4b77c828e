"""Joining data sets that lie in subdirectories under one index, without touching their shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prolong.data.mds.index import INDEX, common_tokenizer, index_text, read_index
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import is_temporary, write_durably


def merge_indexes(directories: Sequence[Path], out: Path) -> int:
    """Write `out/index.json` naming the shards of `directories`, in this order; returns the sample count.

    Every directory must lie below `out`, since shards are named relative to it. Raises UserError when one
    does not, has no valid index, has other columns than the first, or was made with another tokenizer.
    """
    entries: list[dict[str, Any]] = []
    tokenizers: dict[str, str | None] = {}
    for directory in directories:
        try:
            relative = Path(directory).resolve().relative_to(Path(out).resolve())
        except ValueError:
            raise UserError(f"{directory} does not lie below {out}; move it there to merge it") from None
        tokenizers[str(directory)] = read_index(directory).tokenizer
        for entry in json.loads((Path(directory) / INDEX).read_bytes())["shards"]:
            for key in ("raw_data", "zip_data"):
                if entry.get(key):
                    entry[key]["basename"] = (relative / entry[key]["basename"]).as_posix()
            entries.append(entry)
    tokenizer = common_tokenizer(tokenizers)
    path = Path(out) / INDEX
    previous = path.read_bytes() if path.exists() else None
    try:
        write_durably(path, index_text(entries, tokenizer))
        return sum(shard.num_samples for shard in read_index(out).shards)  # also compares the columns
    except BaseException:
        if previous is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(previous)
        raise


def merge_tree(root: Path) -> int:
    """Merge all data sets below `root` (at any depth, in the order of their paths) into `root/index.json`.

    An index that is itself a merger of directories below it is not counted twice: only directories that
    hold shard files are taken. Returns the sample count. Raises UserError when there is none, when `root` holds
    shards itself, which the new index would not name, when a job below it is not finished, and when a link leads to
    data sets elsewhere.
    """
    root = Path(root)
    for link in filter(Path.is_symlink, root.rglob("*")):
        if any(link.rglob(INDEX)) and not link.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{link} leads to data that does not lie below {root}; move it there to merge it")
    indexes = [path for path in root.rglob(INDEX) if not is_temporary(path, root)]
    holders = sorted({path.parent for path in indexes if any(path.parent.glob("shard.*.mds*"))})
    if not holders or holders == [root]:
        raise UserError(f"{root}: no data set in its subdirectories (no {INDEX} beside shard files)")
    if root in holders:
        raise UserError(f"{root} holds shards itself; move them with their {INDEX} into a subdirectory first")
    for holder in holders:
        if ".partial" in {Path(name).suffix for name in holder.relative_to(root).parts}:
            raise UserError(f"{holder} is of a job that is not finished; finish it, or move it away")
    return merge_indexes(holders, root)
