"""Which documents are dropped, under which reason, and that nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from documents import COLUMNS, files_of, tokens_of, write_documents
from hypothesis import given
from hypothesis import strategies as st
from llama3 import llama3_tokenizer
from packs import record_tokenizer

from megatron_prolong.data import filter as filter_module
from megatron_prolong.data.duplicates import find_duplicates
from megatron_prolong.data.executors import LocalProcesses
from megatron_prolong.data.filter import (
    Candidate,
    FilterOptions,
    FilterReport,
    filter_documents,
    load_predicate,
)
from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.data.ngrams import NgramIndex, evaluation_texts
from megatron_prolong.data.pack import PackOptions, pack
from megatron_prolong.errors import UserError

POEM = "the quick brown fox jumps over the lazy dog while seven wizards quietly vex a grumpy old king"


def run(inputs: list[Path], out: Path, **options: object) -> FilterReport:
    report = filter_documents(inputs, out, FilterOptions(**options))  # type: ignore[arg-type]
    assert report is not None
    assert report.tokens == report.kept_tokens + sum(tokens for _, tokens in report.dropped.values())
    assert report.documents == report.kept_documents + sum(number for number, _ in report.dropped.values())
    assert len(MDSReader(out)) == report.kept_documents
    return report


def write_texts(path: Path, texts: list[str]) -> Path:
    encode = llama3_tokenizer().backend_tokenizer.encode
    with MDSWriter(path, {"input_ids": "ndarray:uint32", "domain": "str"}) as writer:
        for text in texts:
            writer.write(
                {"input_ids": np.array(encode(text, add_special_tokens=False).ids, np.uint32), "domain": "t"}
            )
    return path


def test_lengths_by_domain_and_masks_kept(tmp_path: Path) -> None:
    books = write_documents(tmp_path / "books", [5, 50, 500], domain="books", mask=True)
    code = write_documents(tmp_path / "code", [5, 50, 500], first=11, domain="code", mask=True)
    report = run([books, code], tmp_path / "out", min_length={"": 10, "code": 100}, max_length={"books": 100})
    assert report.dropped == {"too short": [3, 60], "too long": [1, 500]}
    kept = list(MDSReader(tmp_path / "out"))
    assert [(sample["domain"], sample["length"]) for sample in kept] == [("books", 50), ("code", 500)]
    np.testing.assert_array_equal(kept[1]["input_ids"], tokens_of(13, 500))
    np.testing.assert_array_equal(kept[0]["mask"], MDSReader(books)[1]["mask"])


def test_duplicates_across_inputs_keep_the_first(tmp_path: Path) -> None:
    a = write_documents(tmp_path / "a", [5, 6, 7], domain="a")
    b = write_documents(tmp_path / "b", [5, 6, 8], domain="b")
    report = run([a, b], tmp_path / "out", duplicates=True)
    assert report.dropped == {"duplicate": [2, 11]}
    assert [(s["domain"], s["length"]) for s in MDSReader(tmp_path / "out")] == [
        ("a", 5),
        ("a", 6),
        ("a", 7),
        ("b", 8),
    ]


def test_a_document_that_is_dropped_anyway_is_nobodys_duplicate() -> None:
    tokens = [tokens_of(1, 5), tokens_of(2, 4)]
    given = [None, *tokens, None, tokens[0], np.zeros(4, np.uint32), tokens[1]]
    assert find_duplicates(given).tolist() == [False, False, False, False, True, False, True]


def test_a_document_that_its_length_drops_takes_no_copy_along(tmp_path: Path) -> None:
    a = write_documents(tmp_path / "a", [5, 6], domain="a")
    b = write_documents(tmp_path / "b", [5, 6], domain="b")
    report = run([a, b], tmp_path / "out", duplicates=True, min_length={"a": 6})
    assert report.dropped == {"too short": [1, 5], "duplicate": [1, 6]}
    assert [(s["domain"], s["length"]) for s in MDSReader(tmp_path / "out")] == [("a", 6), ("b", 5)]


def test_result_does_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_module, "TASK_BYTES", 2000)
    lengths = [*range(10, 60), *range(10, 60)]
    source = write_documents(tmp_path / "documents", lengths, size_limit=900)
    options = FilterOptions(min_length={"": 20}, duplicates=True)
    filter_documents([source], tmp_path / "one", options)
    filter_documents([source], tmp_path / "two", options, executor=LocalProcesses(2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("0*"))) > 5


def test_tasks_hold_every_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last ones, and what repeats one of another task."""
    monkeypatch.setattr(filter_module, "TASK_BYTES", 2000)
    a = write_documents(tmp_path / "a", [*range(40, 70), 45], size_limit=900)
    b = write_documents(tmp_path / "b", range(30, 50), first=1, domain="again", size_limit=900)
    with MDSWriter(tmp_path / "c", {"input_ids": "ndarray:uint32"}) as writer:
        for number in (6, 3):  # a's sixth and third
            writer.write({"input_ids": tokens_of(number, 39 + number)})
    report = run([a, b, tmp_path / "c"], tmp_path / "out", duplicates=True, min_length={"": 31})
    kept = [sample["input_ids"].tolist() for sample in MDSReader(tmp_path / "out")]
    expected = zip([*range(1, 32), *range(2, 21)], [*range(40, 70), 45, *range(31, 50)], strict=True)
    assert kept == [tokens_of(number, length).tolist() for number, length in expected]
    assert report.dropped == {"too short": [1, 30], "duplicate": [2, 87]}
    size = sum(shard.raw.num_bytes for name in "abc" for shard in MDSReader(tmp_path / name).shards)
    assert size / 2900 <= len(list((tmp_path / "out").glob("0*"))) <= size / 2000 + 1


def test_other_questions_are_another_job(tokenizer: Path, tmp_path: Path) -> None:
    source = write_documents(tmp_path / "documents", [30, 40])
    evaluation = tmp_path / "eval.txt"
    evaluation.write_text(POEM)
    asked = {"min_length": {"": 5}, "against": (str(evaluation),), "tokenizer": str(tokenizer)}
    run([source], tmp_path / "out", **asked)
    assert run([source], tmp_path / "out", **asked).kept_documents == 2
    with pytest.raises(UserError, match="out exists already"):
        run([source], tmp_path / "out", **asked | {"min_length": {"": 6}})
    evaluation.write_text(POEM + " queen")
    with pytest.raises(UserError, match="out exists already"):
        run([source], tmp_path / "out", **asked)
    evaluation.write_text(POEM)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(UserError, match="out exists already"):
        run([source], tmp_path / "out", **asked | {"tokenizer": str(tmp_path)})
    shutil.rmtree(source)
    write_documents(source, [30, 41])
    with pytest.raises(UserError, match="out exists already"):
        run([source], tmp_path / "out", **asked)


def test_another_file_in_a_directory_of_evaluation_sets_is_another_job(
    tokenizer: Path, tmp_path: Path
) -> None:
    """The old result was shown as that of all of them."""
    source = write_texts(tmp_path / "texts", [f"before {POEM}", "nothing to see here"])
    asked = {"against": (str(tmp_path / "eval"),), "tokenizer": str(tokenizer)}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.txt").write_text("other words " * 20)
    for _ in range(2):
        assert run([source], tmp_path / "out", **asked).kept_documents == 2
    (tmp_path / "eval" / "b.txt").write_text(POEM)
    with pytest.raises(UserError, match="out exists already"):
        run([source], tmp_path / "out", **asked)
    assert run([source], tmp_path / "out2", **asked).kept_documents == 1


def test_the_first_places_of_contamination_are_shown(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filter_module, "_MAX_EXAMPLES", 3)
    parts = [write_texts(tmp_path / name, [f"{name} {n} {POEM}" for n in range(2)]) for name in "ab"]
    parts.append(write_texts(tmp_path / "c", ["kept"]))
    (tmp_path / "eval.txt").write_text(POEM)
    for task_bytes in (1, 1 << 28):
        monkeypatch.setattr(filter_module, "TASK_BYTES", task_bytes)
        out = tmp_path / f"out{task_bytes}"
        report = run(parts, out, against=(str(tmp_path / "eval.txt"),), tokenizer=str(tokenizer))
        assert [example.split(":")[0].split("/")[-1] for example in report.examples] == [
            f"{name}, shard shard.00000.mds, sample {number}" for name, number in ("a0", "a1", "b0")
        ]
        assert len(json.loads((out / "00000" / "report.json").read_text())["examples"]) == min(
            3, 1 + task_bytes
        )


def test_contaminated_documents(tokenizer: Path, tmp_path: Path) -> None:
    shout = POEM.upper().replace(" ", ",  ")
    source = write_texts(
        tmp_path / "texts",
        ["nothing to see here", f"before {shout} after", POEM[:40], POEM[-50:] + " other words"],
    )
    (tmp_path / "eval.jsonl").write_text(json.dumps({"id": 7, "qa": [{"question": POEM}]}) + "\n")
    against = {"against": (str(tmp_path / "eval.jsonl"),), "tokenizer": str(tokenizer)}
    report = run([source], tmp_path / "out", **against)
    assert report.dropped["contaminated"][0] == 1 and report.kept_documents == 3
    (example,) = report.examples
    assert "sample 1" in example and "the quick brown fox" in example
    num_ngrams = len(POEM.split()) - 12
    for hits, kept in ((num_ngrams, 3), (num_ngrams + 1, 4)):
        assert run([source], tmp_path / f"hits{hits}", hits=hits, **against).kept_documents == kept
    with pytest.raises(UserError, match=r"eval\.jsonl: no text of at least 99 words, so nothing could match"):
        run([source], tmp_path / "out3", n=99, **against)
    record_tokenizer(source)
    with pytest.raises(UserError, match="are of different tokenizers"):
        run([source], tmp_path / "out3", **against)


def test_json_files_of_a_directory_are_read_as_when_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some benchmarks come as a directory of indented documents; a large one is cut into parts elsewhere."""
    monkeypatch.setattr("megatron_prolong.data.sources.jsonl._PART_BYTES", 8)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([{"question": "one"}, {"question": "two"}], indent=2))
    (tmp_path / "sub" / "b.json").write_text('{"question": "three"}\n{"question": "four"}\n')
    (tmp_path / "sub" / "c.jsonl").write_text('{"question": "five"}\n')
    assert list(evaluation_texts([str(tmp_path)])) == ["one", "two", "three", "four", "five"]


def test_an_evaluation_set_is_read_once_by_a_process(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every task it took as long as some tasks; but a changed file is read again."""
    monkeypatch.setattr(filter_module, "TASK_BYTES", 1)
    read: list[int] = []
    monkeypatch.setattr(
        filter_module, "evaluation_texts", lambda paths: read.append(1) or evaluation_texts(paths)
    )
    source = write_documents(tmp_path / "documents", [50] * 4, size_limit=300)
    evaluation = tmp_path / "eval.txt"
    for number in (1, 2):
        evaluation.write_text(f"{POEM} {number}")
        os.utime(evaluation, (number, number))
        run([source], tmp_path / str(number), against=(str(evaluation),), tokenizer=str(tokenizer))
        assert len(read) == number
    assert len(list((tmp_path / "1").glob("0*"))) == 4


def words_of(text: str) -> str:
    return " ".join(NgramIndex([text], 1).find(text))


def test_chinese_and_japanese_characters_are_words() -> None:
    """A clause without blanks was one word: a copy was found only with the same punctuation around it."""
    question = "鲁迅的第一篇白话小说《狂人日记》发表于哪一年"
    index = NgramIndex([question, "吾輩は猫である。名前はまだない。"])
    assert index.find("请问" + question[1:] + "呢")[0] == "迅 的 第 一 篇 白 话 小 说 狂 人 日 记"
    assert index.find("そして吾輩は猫である、名前はまだない") and not index.find(
        "吾輩は犬である。名前はまだない。"
    )
    assert words_of("GPT-3模型ﾃﾞｰﾀ、ラーメン・々〆〇") == "gpt 3 模 型 ﾃ ﾞ ｰ ﾀ ラ ー メ ン 々 〆 〇"
    assert words_of("한국어 단어, naïve Ünder_score") == "한국어 단어 naïve ünder_score"


def test_domains_may_be_numbers(tmp_path: Path) -> None:
    """As other writers of MDS have them; filter refused its own output's column, pack ended in a traceback."""
    with MDSWriter(tmp_path / "in", COLUMNS | {"domain": "int"}) as writer:
        for number, length in enumerate([6, 6, 10, 10]):
            writer.write({"input_ids": tokens_of(number, length), "length": length, "domain": number % 2})
    run([tmp_path / "in"], tmp_path / "out", min_length={"0": 8})
    assert [each["domain"] for each in MDSReader(tmp_path / "out")] == ["1", "0", "1"]
    pack([tmp_path / "in"], tmp_path / "packs", PackOptions(16, "concat"))
    assert [each["domain"] for each in MDSReader(tmp_path / "packs")] == ["0+1", "0+1"]


def test_a_misspelt_domain_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a rare one is found, where the first glance at the documents does not fall on it."""
    books = write_documents(tmp_path / "books", [30], domain="books")
    with MDSWriter(tmp_path / "mixed", COLUMNS) as writer:
        for domain in (*["code"] * 5, "rare", "code"):
            writer.write({"input_ids": tokens_of(1, 30), "length": 30, "domain": domain})
    monkeypatch.setattr(filter_module, "_GLANCES", 2)
    run([books, tmp_path / "mixed"], tmp_path / "out", min_length={"rare": 1}, max_length={"books": 30})
    monkeypatch.setattr(filter_module._Work, "__call__", lambda *_: pytest.fail("a task was begun"))
    said = "given for bok, but no document is of that domain; there are books, code, rare$"
    with pytest.raises(UserError, match=said):
        run([books, tmp_path / "mixed"], tmp_path / "misspelt", min_length={"bok": 9, "rare": 9, "": 1})
    assert not list(tmp_path.glob("misspelt*"))


@given(
    words=st.lists(st.sampled_from("abcdBC"), max_size=40),
    evaluation=st.lists(st.lists(st.sampled_from("abcdeAB"), max_size=12), max_size=5),
    n=st.integers(1, 5),
)
def test_ngrams_are_found_exactly(words: list[str], evaluation: list[list[str]], n: int) -> None:
    """Against sets of tuples; whatever the case of their letters."""
    index = NgramIndex([" ".join(each) for each in evaluation], n)
    text = " ".join(words)
    words, *evaluation = ([word.lower() for word in each] for each in (words, *evaluation))
    known = {tuple(each[i : i + n]) for each in evaluation for i in range(len(each) - n + 1)}
    expected = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = [each for each in dict.fromkeys(expected) if each in known]
    assert index.find(text) == [" ".join(each) for each in expected]
    assert len(index) == len(known)


def test_evaluation_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([{"x": ["one", {"y": "two"}], "z": 3}]))
    (tmp_path / "b.json").write_text('{"x": "three"}\n{"x": "four"}\n')
    (tmp_path / "c.txt").write_text("five")
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "c.txt")]
    assert list(evaluation_texts(paths)) == ["one", "two", "three", "four", "five"]
    (tmp_path / "b.json").write_text('{"x": "one \u2028line"}\n{"x": "two"}\n', encoding="utf-8")
    assert list(evaluation_texts(paths[1:2])) == ["one \u2028line", "two"]
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "b.json").write_text(damaged)
        with pytest.raises(UserError, match=r"b\.json: neither JSON nor JSON Lines"):
            list(evaluation_texts(paths))
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"d\.jsonl, line at byte 0 is not JSON"):
        list(evaluation_texts([str(tmp_path / "d.jsonl")]))


def test_predicate(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(
        "def keep(document):\n"
        "    if 'secret' in document.text:\n"
        "        return 'has a secret'\n"
        "    return document.domain == 't' and (document.tokens >= 0).sum() > 5  # numpy's bool\n"
        "def broken(document):\n"
        "    return {}['no such key']\n"
    )
    monkeypatch.chdir(tmp_path)
    source = write_texts(tmp_path / "texts", ["a secret and more words", "x", "some words that are kept"])
    report = run([source], tmp_path / "out", predicate="my_rules:keep", tokenizer=str(tokenizer))
    assert {reason: counts[0] for reason, counts in report.dropped.items()} == {
        "has a secret": 1,
        "predicate": 1,
    }
    with pytest.raises(
        UserError, match=r"sample 0: predicate my_rules:broken raised KeyError.*my_rules\.py:\d"
    ):
        run([source], tmp_path / "out2", predicate="my_rules:broken")
    with pytest.raises(UserError, match=r"sample 0: reading the text of tokens needs --tokenizer$"):
        run([source], tmp_path / "out2", predicate="my_rules:keep")
    (tmp_path / "my_rules.py").write_text("def keep(document):\n    return True\n")
    with pytest.raises(UserError, match="out exists already"):  # not the old rule's answer
        run([source], tmp_path / "out", predicate="my_rules:keep", tokenizer=str(tokenizer))
    assert run([source], tmp_path / "out3", predicate="builtins:bool").kept_documents == 3  # has no file
    (tmp_path / "no_python.py").write_text("def keep(document):\n    return (1\n")
    (tmp_path / "no_dependency.py").write_text("x = 1\nimport nowhere_to_be_found\n")
    for name, message in {
        "no_python:keep": r"cannot be imported: SyntaxError.*no_python\.py:2\)",
        "no_dependency:keep": r"cannot be imported: ModuleNotFoundError.*no_dependency\.py:2\)",
        "my_rules": "write it as module:function",
        ":keep": "write it as module:function",
        "nowhere_to_be_found:keep": "No module named",
        "nowhere_to_be_found.rules:keep": "No module named .*; it is looked for here",
        "my_rules:other": "module my_rules has no other",
        "my_rules:__name__": "is str, not a function",
    }.items():
        with pytest.raises(UserError, match=message):
            load_predicate(name)


def test_long_text_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_module, "_DECODE_TOKENS", 3)
    backend = llama3_tokenizer().backend_tokenizer
    text = "é中😀 What is the capital?<|eot_id|> " * 5
    tokens = np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32)
    assert Candidate(tokens, "d", "n", backend).text == text
    with pytest.raises(UserError, match="needs --tokenizer"):
        _ = Candidate(tokens, "d", "n", None).text


def test_a_long_run_of_what_half_a_character_decodes_to_is_read_in_pieces_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Damaged texts hold such; a piece that went on to the end of the run was decoded again at every token."""

    class Decoder:
        num_decoded = 0

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            self.num_decoded += len(ids)
            return bytes(ids).decode(errors="replace")

    monkeypatch.setattr(filter_module, "_DECODE_TOKENS", 60)
    text, decoder = "\ufffd" * 1000, Decoder()
    assert Candidate(np.frombuffer(text.encode(), np.uint8).astype(np.uint32), "d", "n", decoder).text == text
    assert decoder.num_decoded < 5 * 3000


def test_refusals(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "documents", [30, 40])
    with pytest.raises(UserError, match="nothing to filter by"):
        FilterOptions()
    with pytest.raises(UserError, match="needs the data's --tokenizer"):
        FilterOptions(against=("x.txt",))
    with pytest.raises(
        UserError, match=r"no document can be left: .* at least 1,000 tokens and at most 999;"
    ):
        FilterOptions({"": 1000}, {"": 999})
    with pytest.raises(UserError, match=r"no document of books can be left: .* at least 40 .* at most 30;"):
        FilterOptions({"": 40, "code": 10}, {"": 50, "books": 30, "code": 10})
    for number in ({"n": 0}, {"hits": 0}):
        with pytest.raises(UserError, match="n-grams have at least 1 word, and at least 1 hit"):
            FilterOptions(duplicates=True, **number)
    with pytest.raises(
        UserError, match=r"not one of 2 documents is left; dropped:\n  - too short: 2 documents"
    ):
        run([source], tmp_path / "out", min_length={"": 99})
    assert not (tmp_path / "out").exists()
    pack([source], tmp_path / "packs", PackOptions(8, "concat"))
    with pytest.raises(UserError, match="packed already"):
        run([tmp_path / "packs"], tmp_path / "out", duplicates=True)
