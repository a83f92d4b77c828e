"""Dropping documents from tokenized data: by length, as duplicates, as contaminated, by a rule of the user's.

A document is dropped for the first reason that applies, in that order, and counted under it. Duplicates are
found by one pass over all documents beforehand; the rest is done by tasks of some 256 MiB each, so that the
result does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.documents import TokenizedInputs, digest, identities, read_table
from megatron_prolong.data.duplicates import find_duplicates
from megatron_prolong.data.encoder import load_tokenizer
from megatron_prolong.data.executors import Executor, LocalProcesses
from megatron_prolong.data.job import REPORT, Job
from megatron_prolong.data.mds import MDSReader, MDSWriter, common_tokenizer, read_index
from megatron_prolong.data.mds.writer import disk_full_is_users
from megatron_prolong.data.ngrams import DEFAULT_N, NgramIndex, evaluation_texts
from megatron_prolong.data.report import Report
from megatron_prolong.data.sources import find_kind, source_of
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import tokenizer_file, tokenizer_fingerprint
from megatron_prolong.runtime.progress import track
from megatron_prolong.runtime.publish import whole_file

TASK_BYTES = 1 << 28
_MAX_EXAMPLES = 20
_GLANCES = 1000
_DECODE_TOKENS = 1 << 18


@dataclass(frozen=True)
class FilterOptions:
    """min_length, max_length: in tokens, by domain; "" is for all other domains.

    duplicates: drop exact duplicates but the first. against: files of evaluation sets; a document with at
    least `hits` distinct n-grams of n words in common with them is dropped. predicate: `module:function`,
    called with a Candidate; True keeps the document, False drops it, a text drops it for this reason.
    tokenizer: directory with tokenizer.json, needed by `against` and by predicates that read text.
    """

    min_length: Mapping[str, int] = field(default_factory=dict)
    max_length: Mapping[str, int] = field(default_factory=dict)
    duplicates: bool = False
    against: tuple[str, ...] = ()
    n: int = DEFAULT_N
    hits: int = 1
    predicate: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.against and not self.tokenizer:
            raise UserError("comparing with evaluation sets needs the data's --tokenizer, to read its text")
        if self.n < 1 or self.hits < 1:
            raise UserError("n-grams have at least 1 word, and at least 1 hit is needed to drop a document")
        if not (self.min_length or self.max_length or self.duplicates or self.against or self.predicate):
            raise UserError(
                "nothing to filter by; give a length, duplicates, evaluation files or a predicate"
            )

        for domain in sorted({*self.min_length, *self.max_length}):
            least, most = _limit(self.min_length, domain, 0), _limit(self.max_length, domain, sys.maxsize)
            if least > most:
                documents = f"document of {domain}" if domain else "document"
                raise UserError(
                    f"no {documents} can be left: it must have at least {least:,} tokens and at most {most:,}; "
                    "correct one of the lengths (DOMAIN=TOKENS is for one domain)"
                )

    def length_problem(self, domain: str, length: int) -> str | None:
        """Why a document of so many tokens is dropped, if it is."""
        if length < _limit(self.min_length, domain, 0):
            return "too short"
        return "too long" if length > _limit(self.max_length, domain, length) else None


@dataclass
class FilterReport(Report):
    """tokens == kept_tokens + sum(tokens of dropped). dropped: reason to [documents, tokens].
    examples: why documents were found contaminated, the first few."""

    tokens: int = 0
    kept_documents: int = 0
    kept_tokens: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, other: Mapping[str, Any]) -> None:
        super().add(other)
        for reason, (documents, tokens) in other["dropped"].items():
            self._drop(reason, documents, tokens)
        self.examples = (self.examples + other["examples"])[:_MAX_EXAMPLES]

    def _drop(self, reason: str, documents: int, tokens: int) -> None:
        counts = self.dropped.setdefault(reason, [0, 0])
        counts[0] += documents
        counts[1] += tokens

    def count(self, num_tokens: int, reason: str | None) -> None:
        self.documents += 1
        self.tokens += num_tokens
        if reason is None:
            self.kept_documents += 1
            self.kept_tokens += num_tokens
        else:
            self._drop(reason, 1, num_tokens)


class Candidate:
    """A document as a predicate sees it. tokens: uint32 [n], read-only. name: data set, shard, sample."""

    def __init__(self, tokens: NDArray[np.uint32], domain: str, name: str, tokenizer: Any) -> None:
        self.tokens = tokens
        self.domain = domain
        self.name = name
        self._tokenizer = tokenizer

    @cached_property
    def text(self) -> str:
        """The decoded tokens. Raises UserError without a tokenizer."""
        if self._tokenizer is None:
            raise UserError(f"{self.name}: reading the text of tokens needs --tokenizer")
        return "".join(_decode(self.tokens, self._tokenizer))


def _decode(tokens: NDArray[np.uint32], tokenizer: Any) -> Iterator[str]:
    """The text in pieces of some 256K tokens: as Python integers all of a long document's are ten times
    their size. A piece does not end inside a character, which decodes to U+FFFD and has at most four bytes, so
    four tokens."""
    start = 0
    while start < len(tokens):
        for end in range(start + _DECODE_TOKENS, start + _DECODE_TOKENS + 4):
            piece = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
            if not piece.endswith("\ufffd"):
                break
        yield piece
        start = end


def filter_documents(
    inputs: Sequence[Path | str],
    out: Path | str,
    options: FilterOptions,
    *,
    executor: Executor | None = None,
    slurm: Mapping[str, str] | None = None,
) -> FilterReport | None:
    """Write the documents that pass to the MDS data set `out`, in order; a stopped run is continued.

    slurm: as in tokenize. Raises UserError for bad input, and when not one document is left.
    """
    names = [str(Path(each)) for each in inputs]
    data = TokenizedInputs(names)
    if data.is_packed:
        raise UserError(f"{', '.join(names)}: packed already; filter the documents before packing them")
    if options.tokenizer:
        given = tokenizer_fingerprint(Path(options.tokenizer))
        common_tokenizer({", ".join(names): data.tokenizer, options.tokenizer: given})
    settings = _settings(names, options)
    job = Job(Path(out), settings)
    if not job.is_finished:
        _refuse_misspelt(names, options, job.out)
        with job.open():
            duplicates = _duplicates(job, data, options) if options.duplicates else None
            tasks = _tasks(names)
            work = _Work(names, options, settings["against"], duplicates)
            if not job.run(tasks, work, executor or LocalProcesses(1), slurm):
                return None
            job.finish(tasks, lambda: vars(_sum(job, tasks)))
    return FilterReport.of([job.report()])


def _settings(inputs: Sequence[str], options: FilterOptions) -> dict[str, Any]:
    settings = asdict(options) | {
        "step": "filter",
        "inputs": identities(inputs),
        "against": {path: _state(path) for path in options.against},
    }
    if options.tokenizer:
        settings["tokenizer"] = digest(tokenizer_file(options.tokenizer))
    if options.predicate:
        load_predicate(options.predicate)
        module = sys.modules[options.predicate.partition(":")[0]]
        if rules := getattr(module, "__file__", None):  # builtins have none
            settings["predicate"] = [options.predicate, digest(Path(rules))]
    return settings


def _state(path: str) -> str:
    """Of an evaluation set: the content of a file; which files, of how many bytes, of a directory or a URL."""
    if Path(path).is_file():
        return digest(Path(path))
    parts = source_of(find_kind(path)).parts(path)
    return f"{len(parts)} parts, sha256 {hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _tasks(inputs: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Task directory to [first, last + 1) sample, counted over all inputs: whole shards, TASK_BYTES of them."""
    ranges: list[tuple[int, int]] = []
    first = at = num_bytes = 0
    for directory in inputs:
        for shard in read_index(Path(directory)).shards:
            at += shard.num_samples
            num_bytes += shard.raw.num_bytes
            if num_bytes >= TASK_BYTES:
                ranges.append((first, at))
                first, num_bytes = at, 0
    if at > first:
        ranges.append((first, at))
    return {f"{number:05}": each for number, each in enumerate(ranges)}


def _duplicates(job: Job, data: TokenizedInputs, options: FilterOptions) -> Path:
    """The file that says of every sample whether it repeats an earlier one; made once per job."""
    path = job.directory / "duplicates"
    with job.alone():
        if not path.exists():
            numbers = track(range(len(data)), len(data), "finding duplicates")
            with disk_full_is_users(job.out), whole_file(path) as temporary:

                def tokens(number: int) -> NDArray[np.uint32] | None:
                    """None where the length is wrong for the domain: that drops no copy in another domain."""
                    sample = data.read(number)
                    found = sample["input_ids"]
                    return None if options.length_problem(sample.get("domain", ""), len(found)) else found

                temporary.write_bytes(find_duplicates(map(tokens, numbers)).tobytes())
    return path


def _refuse_misspelt(inputs: Sequence[str], options: FilterOptions, out: Path) -> None:
    """A length for a domain that no document has would not be missed.

    A glance at some documents of every input finds all but the rarest domains; for those all are looked through.
    """
    asked, found = {*options.min_length, *options.max_length} - {""}, set[str]()
    if not asked:
        return
    readers = [MDSReader(directory, columns=["domain"]) for directory in inputs]
    steps = [(reader, 1 + len(reader) // _GLANCES) for reader in readers]
    some = (reader[number] for reader, step in steps for number in range(0, len(reader), step))
    for sample in chain(some, chain.from_iterable(readers)):
        found.add(str(sample.get("domain", "")))
        if asked <= found:
            return
    raise UserError(
        f"{out}: a length is given for {', '.join(sorted(asked - found))}, but no document is of that domain; "
        f"there are {', '.join(sorted(found - {''})) or 'none'}"
    )


def _sum(job: Job, tasks: Iterable[str]) -> FilterReport:
    total = FilterReport.of(job.task_reports(tasks))
    if not total.kept_documents:
        raise UserError.many(
            f"{job.out}: not one of {total.documents:,} documents is left; dropped:",
            [
                f"{reason}: {documents:,} documents"
                for reason, (documents, _) in sorted(total.dropped.items())
            ],
        )
    return total


@dataclass(frozen=True)
class _Work:
    """One task: judge a range of samples and write those that pass. Picklable, for any process to do."""

    inputs: list[str]
    options: FilterOptions
    against: Mapping[str, str]
    duplicates: Path | None

    def __call__(self, directory: Path, samples: tuple[int, int]) -> None:
        data = TokenizedInputs(self.inputs)
        judge = _Judge(self.options, self.against)
        duplicates = None if self.duplicates is None else read_table(self.duplicates, np.dtype(bool))
        columns = {"input_ids": "ndarray:uint32", "length": "int", "domain": "str"}
        if data.has_mask:
            columns["mask"] = "ndarray:uint8"
        report = FilterReport()
        with MDSWriter(directory, columns, tokenizer=data.tokenizer) as writer:
            for number in range(*samples):
                sample = data.read(number)
                tokens, domain = sample["input_ids"], sample.get("domain", "")
                candidate = Candidate(tokens, domain, data.name(number), judge.tokenizer)
                repeats = duplicates is not None and bool(duplicates[number])
                reason = judge.reason(candidate, repeats, report)
                report.count(len(tokens), reason)
                if reason is None:
                    writer.write({**sample, "domain": domain, "length": len(tokens)})
            writer.attach_json(REPORT, vars(report))


class _Judge:
    """The options, ready to be applied to one document after the other."""

    def __init__(self, options: FilterOptions, against: Mapping[str, str]) -> None:
        self._options = options
        self.tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        self._ngrams = _ngrams(tuple(against.items()), options.n) if against else None
        self._predicate = load_predicate(options.predicate) if options.predicate else None

    def reason(self, candidate: Candidate, repeats: bool, report: FilterReport) -> str | None:
        """Why the document is dropped; None if it is kept."""
        if problem := self._options.length_problem(candidate.domain, len(candidate.tokens)):
            return problem
        if repeats:
            return "duplicate"
        if self._ngrams is not None and len(found := self._ngrams.find(candidate.text)) >= self._options.hits:
            if len(report.examples) < _MAX_EXAMPLES:
                report.examples.append(f"{candidate.name}: {found[0]!r}")
            return "contaminated"
        if self._predicate is not None:
            verdict = self._ask(self._predicate, candidate)
            if isinstance(verdict, str) or not verdict:
                return verdict or "predicate"
        return None

    def _ask(self, predicate: Callable[[Candidate], bool | str], candidate: Candidate) -> bool | str:
        try:
            return predicate(candidate)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{candidate.name}: predicate {self._options.predicate} raised {error!r} ({_where(error)})"
            ) from error


@lru_cache(maxsize=1)  # reading an evaluation set takes as long as filtering some tasks against it
def _ngrams(against: tuple[tuple[str, str], ...], n: int) -> NgramIndex:
    """Of evaluation sets, each with its `_state`."""
    paths = [path for path, _ in against]
    index = NgramIndex(evaluation_texts(paths), n)
    if not len(index):
        raise UserError(f"{', '.join(paths)}: no text of at least {n} words, so nothing could match")
    return index


def _limit(limits: Mapping[str, int], domain: str, default: int) -> int:
    return limits.get(domain, limits.get("", default))


def _where(error: Exception) -> str:
    """File and line that raised the error; of a syntax error, that it is about."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def load_predicate(name: str) -> Callable[[Candidate], bool | str]:
    """Import `module:function`, the working directory included. Raises UserError when there is none."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"predicate {name!r}: write it as module:function, such as my_rules:keep")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"predicate {name!r}: {error}; it is looked for here and in installed packages"
            ) from None
        said = traceback.format_exception_only(error)[-1].strip()
        raise UserError(f"predicate {name!r}: cannot be imported: {said} ({_where(error)})") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(f"predicate {name!r}: module {module_name} has no {function_name}")
    if not callable(function):
        raise UserError(f"predicate {name!r} is {type(function).__name__}, not a function")
    return function
