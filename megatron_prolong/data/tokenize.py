"""Sources to tokenized documents: an MDS data set with the columns of ProLong's raw data.

Columns: input_ids uint32 [n], length, domain; chats also have mask uint8 [n]. No beginning or end of text is
added to plain text (ProLong's choice); a chat's template writes its own. The input is cut into tasks by its
content alone (some 64 MiB each), so the result does not depend on how many workers made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.chat import (
    ChatError,
    EncodedChat,
    Rendered,
    control_tokens,
    encode_batch,
    find_problem,
    refuse_empty_masks,
    render,
)
from megatron_prolong.data.encoder import TextEncoder
from megatron_prolong.data.executors import Executor
from megatron_prolong.data.job import REPORT, Job
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.data.records import (
    Parts,
    SourcesReport,
    describe,
    field_of,
    in_lots,
    into_tasks,
    leave_out,
    list_parts,
    missing,
    spelled_alike,
    surrogate_problem,
    text_problem,
)
from megatron_prolong.data.sources import Bad, Record, source_of
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import tokenizer_file

TASK_BYTES = 1 << 26
_BATCH_BYTES = 1 << 22


@dataclass(frozen=True)
class TokenizeOptions:
    """What the records of a source become.

    kind: of the sources (SOURCES), or `chat` for JSON Lines of messages; None looks at the files.
    domain: name written into every sample; domain_field: take it from this field of the record instead. A record
    that does not name one has the domain that is given, or is bad input where none is.
    text_field, messages_field: the field of a record, dots reach into nested ones (`meta.text`).
    chat: the records are chats (messages with role and content). max_chat_tokens: longer ones are cut after
    the last assistant turn that fits. on_bad_input: `stop` at the first record that is no text, or `skip`
    and count it.
    """

    kind: str | None = None
    domain: str = ""
    domain_field: str | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    chat: bool = False
    max_chat_tokens: int | None = None
    on_bad_input: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.max_chat_tokens is not None and not self.chat and self.kind != "chat":
            raise UserError(
                f"--max-chat-tokens {self.max_chat_tokens} is for chats: add --chat, or leave it out"
            )


@dataclass
class TokenizeReport(SourcesReport):
    """What became of the input. left_out: also of files in repositories.

    forced_cuts: places where a text of 128K characters without any blank or newline had to be cut before
    encoding, which may change the two tokens there. targets: tokens with mask 1, chats only.
    """

    tokens: int = 0
    targets: int = 0
    forced_cuts: int = 0


def tokenize(
    sources: Sequence[str],
    tokenizer: Path | str,
    out: Path | str,
    options: TokenizeOptions | None = None,
    *,
    executor: Executor | None = None,
    slurm: Mapping[str, str] | None = None,
) -> TokenizeReport | None:
    """Tokenize everything in `sources` into the MDS data set `out`; a stopped run is continued.

    tokenizer: directory of a tokenizer, model or checkpoint. slurm: the environment of an array job, to do its
    share only; then None is returned while other jobs still have tasks to do.
    Raises UserError for bad input, naming file and record.
    """
    options = options or TokenizeOptions()
    if options.kind == "chat":
        options = replace(options, kind="jsonl", chat=True)
    sources = spelled_alike(sources)
    parts = list_parts(sources, options.kind, Path(out))
    job = Job(Path(out), _settings(sources, tokenizer, options, parts))

    def refuse(total: TokenizeReport) -> None:
        if options.chat:
            refuse_empty_masks(total.tokens, total.targets, str(job.out))

    work = _Work(str(tokenizer), options)
    return TokenizeReport.complete(job, into_tasks(parts, TASK_BYTES), work, executor, slurm, refuse)


def _settings(
    sources: Sequence[str], tokenizer: Path | str, options: TokenizeOptions, parts: Parts
) -> dict[str, Any]:
    file = tokenizer_file(tokenizer)
    digest = hashlib.sha256(file.read_bytes())
    if options.chat:
        for name in ("tokenizer_config.json", "chat_template.jinja"):  # where the template may be
            path = file.with_name(name)
            digest.update(path.read_bytes() if path.exists() else b"")
    return {
        "step": "tokenize",
        "tokenizer": f"sha256 {digest.hexdigest()}",
        **describe(sources, parts, options),
    }


Encoded = tuple[NDArray[np.uint32], NDArray[np.uint8] | None]
"""Token ids and, for chats, the loss mask."""


class Encode(Protocol):
    def __call__(self, records: Sequence[Record]) -> list[Encoded | Bad]: ...


@dataclass(frozen=True)
class _Work:
    """One task: read its parts, encode them, write one directory. Picklable, for any process to do."""

    tokenizer: str
    options: TokenizeOptions

    def __call__(self, directory: Path, parts: Parts) -> None:
        report = TokenizeReport()
        encoder = TextEncoder(self.tokenizer)
        encode: Encode = partial(_encode_texts, encoder, self.options.text_field)
        columns = {"input_ids": "ndarray:uint32", "length": "int", "domain": "str"}
        if self.options.chat:
            encode = _Chats(self.tokenizer, self.options)
            columns["mask"] = "ndarray:uint8"
        with MDSWriter(directory, columns, tokenizer=encoder.fingerprint) as writer:
            for batch in _batches(self._records(parts, report)):
                for record, encoded in zip(batch, encode(batch), strict=True):
                    if isinstance(encoded, Bad):
                        leave_out(encoded, self.options.on_bad_input, report.left_out)
                    else:
                        self._write(writer, record, encoded, report)
            report.forced_cuts = encoder.forced_cuts
            writer.attach_json(REPORT, vars(report))

    def _records(self, parts: Parts, report: TokenizeReport) -> Iterator[Record]:
        """The usable records; the others are counted, or stop the job."""
        for kind, part in parts:
            for found in source_of(kind).read(part):
                bad = found if isinstance(found, Bad) else self._problem(found)
                if isinstance(found, Record):
                    report.left_out.update(found.left_out)
                if bad is not None:
                    leave_out(bad, self.options.on_bad_input, report.left_out)
                elif isinstance(found, Record):
                    yield found

    def _problem(self, record: Record) -> Bad | None:
        if self.options.chat:  # the rest is judged as they are rendered
            name = self.options.messages_field
            if field_of(record.fields, name) is None:
                return missing(record, name, "--messages-field")
        elif problem := text_problem(record, self.options.text_field, "--text-field"):
            return problem
        domain = self._domain(record)
        if domain is None:
            known = ", ".join(record.fields)
            return Bad(
                record.name,
                f"field {self.options.domain_field!r} names no domain (fields: {known}); with --domain, such "
                "records have that one",
                "no domain",
            )
        return surrogate_problem(record, domain)

    def _domain(self, record: Record) -> str | None:
        """None where the record should name one and does not."""
        if not (name := self.options.domain_field):
            return self.options.domain
        found = field_of(record.fields, name)
        if found is not None and not isinstance(found, str | int | float | np.number):
            return None
        return ("" if found is None else str(found)) or self.options.domain or None

    def _write(self, writer: MDSWriter, record: Record, encoded: Encoded, report: TokenizeReport) -> None:
        tokens, mask = encoded
        domain = self._domain(record)
        assert domain is not None, "_problem would have found it"
        sample = {"input_ids": tokens, "length": len(tokens), "domain": domain}
        if mask is not None:
            sample["mask"] = mask
            report.targets += int(mask.sum())
        writer.write(sample)
        report.documents += 1
        report.tokens += len(tokens)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Consecutive records of about _BATCH_BYTES of text together."""
    return in_lots(records, _BATCH_BYTES, lambda record: _num_characters(record.fields), most=4096)


def _num_characters(value: Any) -> int:
    """Of all texts in a record, however deep."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


def _encode_texts(encoder: TextEncoder, name: str, records: Sequence[Record]) -> list[Encoded | Bad]:
    encoded = encoder.encode([field_of(record.fields, name) for record in records])
    return [
        (tokens, None) if len(tokens) else Bad(record.name, "", "empty")
        for record, tokens in zip(records, encoded, strict=True)
    ]


class _Chats:
    """Chats through the tokenizer's template, with the mask of what the assistant wrote (data/chat.py)."""

    def __init__(self, directory: str, options: TokenizeOptions) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_file(directory).parent)
        self._control = control_tokens(self._tokenizer)
        self._options = options

    def __call__(self, records: Sequence[Record]) -> list[Encoded | Bad]:
        rendered = [self._render(record) for record in records]
        texts = [each for each in rendered if not isinstance(each, Bad)]
        encoded = iter(encode_batch(texts, self._tokenizer))
        return [
            each if isinstance(each, Bad) else self._cut(next(encoded), record)
            for each, record in zip(rendered, records, strict=True)
        ]

    def _render(self, record: Record) -> Rendered | Bad:
        messages = field_of(record.fields, self._options.messages_field)
        if problem := find_problem(messages, self._control):
            return Bad(record.name, problem, "not a chat")
        try:
            return render(messages, self._tokenizer)
        except ChatError as error:
            return Bad(record.name, str(error), error.reason)

    def _cut(self, chat: EncodedChat, record: Record) -> Encoded | Bad:
        limit = self._options.max_chat_tokens
        kept = chat if limit is None else chat.cut(limit)
        if kept is None:
            return Bad(record.name, "", "no assistant turn fits into the limit")
        return kept.tokens, kept.mask
