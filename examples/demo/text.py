"""Gather the demo's text and train its tokenizer: real text that every Python installation carries.

- code: packages of the standard library, each one repository (long documents)
- books: pydoc's language reference and the long descriptions of installed packages
- short: docstrings of the standard library, one document each
- chats: questions about functions, answered by their docstrings, for instruction tuning
- held_out: packages that none of the above has seen

    python examples/demo/text.py DEMO_DIR
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

STDLIB = Path(sysconfig.get_paths()["stdlib"])
HELD_OUT = ("asyncio", "email", "xml", "multiprocessing", "tkinter", "concurrent", "zoneinfo", "tomllib")
SKIPPED = ("test", "site-packages", "lib2to3", "idlelib", "turtledemo", "pydoc_data", "ensurepip")
VOCAB_SIZE = 2048
MIN_DOCSTRING = 300  # characters; shorter ones are mostly signatures

# Llama-3's special tokens and chat format (Llama-3 model card).
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def main(demo: Path) -> None:
    """Write DEMO_DIR/text and DEMO_DIR/tokenizer."""
    text = demo / "text"
    shutil.rmtree(text, ignore_errors=True)
    for package in sorted(STDLIB.iterdir()):
        if package.is_dir() and (package / "__init__.py").exists() and package.name not in SKIPPED:
            target = text / ("held_out" if package.name in HELD_OUT else "code") / package.name
            copy_sources(package, target)
    for number, modules in enumerate(batches(sorted(STDLIB.glob("[a-z]*.py")), 8)):
        for module in modules:
            copy_file(module, text / "code" / f"modules_{number:02d}" / module.name)
    docstrings = list(standard_docstrings())
    write_jsonl(text / "books.jsonl", ({"text": book} for book in books()))
    write_jsonl(text / "short.jsonl", ({"text": f"{name}\n\n{doc}"} for name, doc in docstrings))
    write_jsonl(text / "chats.jsonl", ({"messages": chat(name, doc)} for name, doc in docstrings))
    train_tokenizer(text, demo / "tokenizer")
    size = sum(path.stat().st_size for path in text.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB of text from Python {sys.version.split()[0]} in {text}")


def copy_sources(package: Path, target: Path) -> None:
    """Copy the Python files of a package, without its tests."""
    for source in sorted(package.rglob("*.py")):
        if not {"test", "tests", "__pycache__"} & set(source.relative_to(package).parts):
            copy_file(source, target / source.relative_to(package))


def copy_file(source: Path, target: Path) -> None:
    """Copy one file, making its directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def batches(items: list[Path], size: int) -> Iterator[list[Path]]:
    """Consecutive groups of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def books() -> Iterator[str]:
    """Long prose: the language reference, and what packages say of themselves."""
    yield "\n\n".join(topics[name] for name in sorted(topics))
    for distribution in sorted(distributions(), key=lambda found: found.metadata["Name"]):
        description = distribution.metadata.get_payload()
        if isinstance(description, str) and len(description) > 4000:
            yield description


def standard_docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public functions and classes of the standard library."""
    seen = set()
    for module_info in sorted(pkgutil.iter_modules([str(STDLIB)]), key=lambda info: info.name):
        name = module_info.name
        if name.startswith("_") or name in (*SKIPPED, *HELD_OUT, "antigravity", "this"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:  # an optional part of the standard library that this machine was built without
            continue
        for attribute, value in sorted(vars(module).items()):
            doc = inspect.getdoc(value) if inspect.isfunction(value) or inspect.isclass(value) else None
            if doc and len(doc) >= MIN_DOCSTRING and doc not in seen and not attribute.startswith("_"):
                seen.add(doc)
                yield f"{name}.{attribute}", doc


def chat(name: str, doc: str) -> list[dict[str, str]]:
    """One question and its answer."""
    return [
        {"role": "user", "content": f"What does {name} do?"},
        {"role": "assistant", "content": doc},
    ]


def write_jsonl(path: Path, records: Iterator[dict[str, object]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train_tokenizer(text: Path, out: Path) -> None:
    """Byte-level BPE on the training text, saved as a Hugging Face tokenizer with Llama-3's chat format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = [*sorted((text / "code").rglob("*.py")), text / "books.jsonl", text / "short.jsonl"]
    tokenizer.train([str(path) for path in files], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[1]
    )
    wrapped.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[2:])})
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(str(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
