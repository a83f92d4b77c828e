"""Bad input is named, all of it at once, and leaves nothing behind."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import save_family
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_prolong.convert import staging, transfer
from megatron_prolong.convert.compare import compare
from megatron_prolong.convert.manifest import write_manifest
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.convert.unpickle import Inert, SafeUnpickler, load_common, load_metadata
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import read_shape
from megatron_prolong.runtime.checksums import verify_checksums
from megatron_prolong.runtime.publish import temporary_name


def _refused(convert: Callable[[Path], object], tmp_path: Path) -> str:
    """The message of the refusal; asserts that no file is left, under whatever name."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        convert(tmp_path / "out")
    assert set(tmp_path.rglob("*")) == before
    return str(error.value)


def test_every_wrong_tensor_is_listed(original: Path, tmp_path: Path) -> None:
    path = original / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.zeros(63)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 64, dtype=torch.float64)
    save_file(tensors, path)
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert "model.layers.1.mlp.up_proj.weight: missing" in message
    assert "lm_head.weight: missing" in message
    assert "model.norm.weight: shape [63], config.json asks for [64]" in message
    assert "model.layers.9.mlp.up_proj.weight: unexpected" in message
    assert "model.layers.0.self_attn.q_proj.bias: unexpected" in message
    assert "model.layers.0.self_attn.q_proj.weight: dtype torch.float8_e4m3fn; only fp32" in message
    assert "model.layers.0.self_attn.o_proj.weight: dtype torch.float64; only fp32" in message


def test_a_clone_without_git_lfs(original: Path, tmp_path: Path) -> None:
    """It was told as a truncated file, which fetching again the same way does not cure."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n"
    (original / "model.safetensors").write_text(pointer)
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert "model.safetensors: only Git LFS's pointer to it; fetch the file itself" in message


def test_the_cache_of_the_hub_in_place_of_a_snapshot(original: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--meta-llama--Llama-3.2-1B"
    shutil.copytree(original, cache / "snapshots" / "4e20de")
    message = _refused(lambda out: to_megatron(cache, out), tmp_path)
    assert message.endswith(
        f"this is the Hub's cache of a model, give a snapshot of it: {cache}/snapshots/4e20de"
    )
    with pytest.raises(UserError, match="give a snapshot of it"):
        read_shape(cache)
    to_megatron(cache / "snapshots" / "4e20de", tmp_path / "out")


def test_a_file_without_tensors(original: Path, tmp_path: Path) -> None:
    save_file({}, original / "model.safetensors")
    assert "model.norm.weight: missing" in _refused(lambda out: to_megatron(original, out), tmp_path)


def test_a_model_saved_without_its_head_is_one_sentence(original: Path, tmp_path: Path) -> None:
    path = original / "model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert "found such as embed_tokens.weight, expected such as model.embed_tokens.weight" in message
    assert "\n" not in message


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tied_head_that_is_not_the_embedding(
    tmp_path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropped without a word, the export answered with another head than transformers does."""
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4096)
    original = save_family("llama3.2-tied", tmp_path / "original")
    safetensors = original / "model.safetensors"
    path = original / "pytorch_model.bin" if legacy else safetensors
    tensors, save = load_file(safetensors), torch.save if legacy else save_file
    safetensors.unlink()
    head = tensors["model.embed_tokens.weight"].clone()
    for number, wrong in enumerate((head + torch.eye(*head.shape).flip(0), head[1:].clone(), head.half())):
        save({**tensors, "lm_head.weight": wrong}, path)
        message = _refused(lambda out: to_megatron(original, out), tmp_path)
        assert "ties lm_head.weight to model.embed_tokens.weight, but the two differ" in message, number
        assert "set tie_word_embeddings: false" in message
    save({**tensors, "lm_head.weight": head}, path)
    to_megatron(original, tmp_path / "out")


@pytest.mark.parametrize("odd", ["layers.2.mlp.gate_proj", "layers.1.self_attn.k_proj"])
def test_dtypes_that_differ_inside_one_of_megatrons_tensors(original: Path, tmp_path: Path, odd: str) -> None:
    """Taken as they are, keys were rounded to the queries' dtype, and layers of two dtypes could not be read."""
    path = original / "model.safetensors"
    tensors = {
        name: value if odd in name or "norm" in name else value.bfloat16()
        for name, value in load_file(path).items()
    }
    save_file(tensors, path)
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert message.endswith(f"choose one --dtype:\n  - model.{odd}.weight: float32, but bfloat16 beside it")
    to_megatron(original, tmp_path / "out", "fp32")


@pytest.mark.parametrize(
    ("number", "dtype", "said"), [(float("nan"), None, "as float32"), (-1e6, "fp16", "as float16")]
)
def test_numbers_that_are_not_finite(
    original: Path, tmp_path: Path, number: float, dtype: str | None, said: str
) -> None:
    path, name = original / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
    tensors[name][3, 5] = number
    save_file(tensors, path)
    message = _refused(lambda out: to_megatron(original, out, dtype), tmp_path)
    assert message.startswith(f"{name}, rows 0 to ") and said in message


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_safetensors(original: Path, tmp_path: Path, keep: int) -> None:
    path = original / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert message.startswith(f"{path}: ") and "truncated" in message.removeprefix(str(path))


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"I8","shape":[1],"data_offsets":[0,"1"]}}',  # only a comparison of names would refuse I8
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}}',
    ],
)
def test_a_header_of_wrong_numbers(original: Path, tmp_path: Path, header: bytes) -> None:
    (original / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert "damaged safetensors header" in _refused(lambda out: to_megatron(original, out), tmp_path)


def test_a_broken_file_beside_the_weights(original: Path, converted: Path, tmp_path: Path) -> None:
    """Each way names the file the user knows, not the copy under a temporary name."""
    for source, directory, convert in (
        (original, original, to_megatron),
        (converted, converted / "hf", to_hf),
    ):
        (directory / "tokenizer_config.json").write_text("{")
        message = _refused(partial(convert, source), tmp_path)
        assert message.startswith(f"{directory}/tokenizer_config.json: cannot be read as JSON")
        names = [f"{directory}/{name}" for name in ("generation_config.json", "tokenizer_config.json")]
        for path in map(Path, names):
            path.unlink(missing_ok=True)
            path.symlink_to("../blobs/not-there")  # of a cache, half downloaded
        message = _refused(partial(convert, source), tmp_path)
        assert message.startswith("these links lead nowhere") and all(name in message for name in names)


def test_missing_shards(tmp_path: Path) -> None:
    original = save_family("llama3", tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted(original.glob("*.safetensors"))
    for shard in shards[1:3]:
        shard.unlink()
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert shards[1].name in message and shards[2].name in message
    for wrong in ('{"weight_map": 3}', '{"weight_map": {"model.norm.weight": 3}}'):
        (original / "model.safetensors.index.json").write_text(wrong)
        assert "it has no weight_map" in _refused(lambda out: to_megatron(original, out), tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    original = save_family("llama3", tmp_path / "sharded", max_shard_size="60KB")
    first, second = sorted(original.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second)
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert f"{second}: holds what another shard holds too" in message and name in message


def test_a_bin_that_holds_no_tensors_by_name(original: Path, tmp_path: Path) -> None:
    (original / "model.safetensors").unlink()
    torch.save([torch.ones(2)], original / "pytorch_model.bin")
    message = _refused(lambda out: to_megatron(original, out), tmp_path)
    assert "pytorch_model.bin: holds a list; expected tensors by name" in message


def test_directories_that_are_something_else(original: Path, converted: Path, tmp_path: Path) -> None:
    assert "no config.json" in _refused(lambda out: to_megatron(converted, out), tmp_path)
    assert "not a Megatron torch_dist checkpoint" in _refused(lambda out: to_hf(original, out), tmp_path)
    assert "no such directory" in _refused(lambda out: to_hf(tmp_path / "nowhere", out), tmp_path)
    message = _refused(lambda out: to_hf(converted, out, sidecar=tmp_path / "nowhere"), tmp_path)
    assert "nowhere: no such directory; expected a Hugging Face model" in message
    (tmp_path / "empty").mkdir()
    message = _refused(lambda out: to_hf(converted, out, sidecar=tmp_path / "empty"), tmp_path)
    assert "empty: neither a config nor a tokenizer is there" in message
    quantised = {**json.loads((original / "config.json").read_text()), "quantization_config": {"bits": 4}}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(quantised))
    message = _refused(lambda out: to_hf(converted, out, sidecar=tmp_path / "empty"), tmp_path)
    assert (
        "gives the tokenizer alone) does not describe a Llama" in message and "quantization_config" in message
    )
    (original / "model.safetensors").unlink()
    assert "no weights" in _refused(lambda out: to_megatron(original, out), tmp_path)


def test_the_target_exists(
    original: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("x")
    for convert in (lambda: to_megatron(original, taken), lambda: to_hf(converted, taken)):
        with pytest.raises(UserError, match="already exists"):
            convert()
    assert [path.name for path in taken.iterdir()] == ["precious"]
    with pytest.raises(UserError, match="precious: already exists"):
        to_megatron(original, taken / "precious")
    (tmp_path / "empty").mkdir()
    to_megatron(original, tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: already exists"):
        to_megatron(original, tmp_path / "link")
    for place in (taken / "precious", tmp_path / "link"):
        with pytest.raises(UserError, match=rf"below: .*/{place.name} is no directory; choose another place"):
            to_megatron(original, place / "and" / "below")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"^\.: already exists"):  # empty, but it has no name to write beside
        to_megatron(original, Path())
    with pytest.raises(UserError, match=r"^s3:/bucket: is the address of a server"):
        to_megatron(original, Path("s3://bucket"))
    assert list(Path().iterdir()) == []


_NAMES_IN_METADATA = (b"state_dict_metadata", b"properties", b"relative_path", b"offsets", b"sizes")


def test_damaged_torch_dist_files(converted: Path, tmp_path: Path) -> None:
    data = converted / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    assert data.name in _refused(lambda out: to_hf(converted, out), tmp_path)
    data.unlink()
    assert "no such file" in _refused(lambda out: to_hf(converted, out), tmp_path)
    data.write_bytes(bytes(len(content)))
    assert "damaged" in _refused(lambda out: to_hf(converted, out), tmp_path)
    contents = (converted / ".metadata").read_bytes()
    for changed in (b"nonsense", *(contents.replace(name, b"x" * len(name)) for name in _NAMES_IN_METADATA)):
        (converted / ".metadata").write_bytes(changed)
        assert ".metadata: damaged" in _refused(lambda out: to_hf(converted, out), tmp_path)
    (converted / ".metadata").unlink()  # as `cp CHECKPOINT/*` leaves it out
    assert ".metadata: no such file; the checkpoint is" in _refused(
        lambda out: to_hf(converted, out), tmp_path
    )
    (converted / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "'zarr'" in _refused(lambda out: to_hf(converted, out), tmp_path)


def test_one_changed_bit_of_a_weight(original: Path, converted: Path, tmp_path: Path) -> None:
    """Only a training compared the checksums: an export of what a bad disk had changed said nothing."""
    data = converted / "__0_0.distcp"
    row = load_file(original / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"][5].numpy()
    content = bytearray(data.read_bytes())
    content[content.index(row.tobytes())] ^= 1
    data.write_bytes(content)
    for read in (partial(to_hf, converted), lambda _: compare(original, converted)):
        message = _refused(read, tmp_path)
        assert str(data) in message and "damaged, copy it again (BadZipFile: Bad CRC-32" in message


def test_a_dtype_that_is_none_of_a_llama(converted: Path, tmp_path: Path) -> None:
    contents = pickle.loads((converted / ".metadata").read_bytes())
    contents.state_dict_metadata["output_layer.weight"].properties.dtype = torch.float64
    (converted / ".metadata").write_bytes(pickle.dumps(contents))
    said = _refused(lambda out: to_hf(converted, out), tmp_path)
    assert "output_layer.weight: dtype torch.float64; only fp32, fp16 and bf16 are supported" in said


def test_a_checkpoint_that_lacks_a_chunk(converted: Path, tmp_path: Path) -> None:
    contents = pickle.loads((converted / ".metadata").read_bytes())
    contents.state_dict_metadata["decoder.final_layernorm.weight"].chunks.pop()
    (converted / ".metadata").write_bytes(pickle.dumps(contents))
    said = _refused(lambda out: to_hf(converted, out), tmp_path)
    assert "decoder.final_layernorm.weight has chunks that overlap or are missing" in said


def test_a_converted_checkpoint_has_checksums(converted: Path) -> None:
    verify_checksums(converted)
    for name in ("__0_0.distcp", ".metadata", "prolong.json", "hf/config.json"):
        content = (converted / name).read_bytes()
        (converted / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        with pytest.raises(UserError, match=rf"{name}: contents changed"):
            verify_checksums(converted)
        (converted / name).write_bytes(content)


def test_checksums_are_of_what_was_written_not_of_what_is_read_later(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil_and_write(directory: Path, content: dict[str, Any]) -> None:
        weights = (directory / "__0_0.distcp").read_bytes()
        (directory / "__0_0.distcp").write_bytes(weights[:-5] + bytes([weights[-5] ^ 1]) + weights[-4:])
        write_manifest(directory, content)

    monkeypatch.setattr("megatron_prolong.convert.to_megatron.write_manifest", spoil_and_write)
    to_megatron(original, tmp_path / "converted")
    with pytest.raises(UserError, match=r"__0_0\.distcp: contents changed"):
        verify_checksums(tmp_path / "converted")


def test_a_checkpoint_of_another_shape(converted: Path, tmp_path: Path) -> None:
    manifest = json.loads((converted / "prolong.json").read_text())

    def said(**shape: object) -> str:
        changed = {**manifest, "shape": {**manifest["shape"], **shape}}
        (converted / "prolong.json").write_text(json.dumps(changed))
        return _refused(lambda out: to_hf(converted, out), tmp_path)

    message = said(num_layers=5, ffn_hidden_size=100)
    assert "linear_fc1.weight: shape [4, 344, 64], expected [5, 200, 64]" in message
    assert "linear_fc2.weight: shape [4, 64, 172], expected [5, 64, 100]" in message
    # Only a vocabulary may be larger than it is said to be.
    assert "linear_fc2.weight: shape [4, 64, 172], expected [3, 64, 172]" in said(num_layers=3)
    # As of Hugging Face: a head that would be left out without a word.
    assert "output_layer.weight: unexpected, not part of this Llama" in said(tie_embeddings=True)


def test_not_enough_space(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "free" in _refused(lambda out: to_megatron(original, out), tmp_path)


def test_the_disk_fills_up_midway(
    original: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system says when a write finds no space; the file system itself is not ours to fill."""
    calls = iter(range(1000))

    def failing(*arguments: Any) -> torch.Tensor:
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return gather(*arguments)

    gather = transfer.gather
    for module in ("dist_writer", "hf_writer"):
        monkeypatch.setattr(f"megatron_prolong.convert.{module}.gather", failing)
    assert "disk is full" in _refused(lambda out: to_megatron(original, out / "of" / "parents"), tmp_path)
    calls = iter(range(1000))
    assert "disk is full" in _refused(lambda out: to_hf(converted, out), tmp_path)


def test_a_real_disk_that_fills_up(
    original: Path, converted: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the space after the check: nothing of the conversion stays, all that was there does."""
    (small_disk / "precious").write_bytes(bytes(900_000))
    usage = shutil.disk_usage(small_disk)
    for convert in (lambda out: to_megatron(original, out), lambda out: to_hf(converted, out)):
        assert re.search(
            r"needs [\d,]{5,} bytes, but the disk has [\d,]+ free", _refused(convert, small_disk)
        )
        with monkeypatch.context() as patch:
            patch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
            assert "the disk is full; nothing was kept" in _refused(convert, small_disk)
    assert (small_disk / "precious").read_bytes() == bytes(900_000)


def test_a_limit_on_the_size_of_files(original: Path, converted: Path, tmp_path: Path) -> None:
    """`ulimit -f`, which some clusters set on their login nodes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert in (lambda out: to_megatron(original, out), lambda out: to_hf(converted, out)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            message = _refused(convert, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "no file may become so large here (see `ulimit -f`); nothing was kept" in message


def test_a_disk_that_is_full_for_the_small_files_after_the_weights(
    original: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two of them torch.save said "iostream error", which ended in a traceback."""
    before = shutil.disk_usage(small_disk)
    to_megatron(original, small_disk / "out")
    needed = before.free - shutil.disk_usage(small_disk).free
    shutil.rmtree(small_disk / "out")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: before._replace(free=10**9))
    for missing_pages in range(1, 8):
        (small_disk / "fill").write_bytes(bytes(before.free - needed + 4096 * missing_pages))
        message = _refused(lambda out: to_megatron(original, out), small_disk)
        assert "the disk is full; nothing was kept" in message


def test_what_a_killed_conversion_left_is_removed(original: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in ("out[1]", "out1"):
        left = tmp_path / f"{name}.tmp-prolong-{socket.gethostname()}-{dead.pid}"
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"half")
    to_megatron(original, tmp_path / "out[1]")
    assert {path.name for path in tmp_path.iterdir()} == {"original", "out[1]", left.name}


def test_what_is_forbidden_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the source that may not be read was told as a target that cannot be written."""
    forbidden = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "__3_0.distcp"))
    with (
        pytest.raises(PermissionError, match=r"__3_0\.distcp"),
        staging.staged_directory(tmp_path / "out", 0),
    ):
        raise forbidden

    def refuse(*_: object, **__: object) -> None:
        raise forbidden

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match="out: cannot be written: Permission denied"),
        staging.staged_directory(tmp_path / "out", 0),
    ):
        pass


def test_two_conversions_into_one_directory(tmp_path: Path) -> None:
    """Neither touches what the other writes; the first to be complete stays."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from megatron_prolong.convert.staging import staged_directory\n"
        "with staged_directory(Path(sys.argv[1]), 0) as partial:\n"
        "    (partial / 'second').touch()\n"
    )
    with (
        pytest.raises(UserError, match="out: another process has made it meanwhile"),
        staging.staged_directory(tmp_path / "out", 0) as partial,
    ):
        (partial / "first").touch()
        subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=True)
        assert [path.name for path in partial.iterdir()] == ["first"]
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "second"]


def test_what_a_process_of_the_same_number_left_is_no_other_process(tmp_path: Path) -> None:
    """In a container that was killed and starts again, it has the same host and number."""
    left = temporary_name(tmp_path / "out")
    left.mkdir()
    (left / "half").touch()
    with staging.staged_directory(tmp_path / "out", 0) as partial:
        (partial / "whole").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "whole"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(original: Path, tmp_path: Path, number: signal.Signals) -> None:
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's parent ignores it\n"
        "from megatron_prolong.convert import dist_writer\n"
        "gather = dist_writer.gather\n"
        "def slowly(*args):\n"
        "    time.sleep(0.2)\n"
        "    print(args[0].tensor.name, file=sys.stderr, flush=True)\n"
        "    return gather(*args)\n"
        "dist_writer.gather = slowly\n"
        f"sys.argv = ['prolong', 'convert', 'to-megatron', {str(original)!r}, {str(tmp_path / 'out')!r}]\n"
        "from megatron_prolong.cli.main import run\n"
        "run()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600  # starting Python can take minutes on a busy machine
    while not list(tmp_path.glob("out.tmp-*/__0_0.distcp")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and b"output_layer.weight" not in errors, "it stops before the last tensor"
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_an_interrupt_while_files_are_handed_out_stops_the_first() -> None:
    class Files(list[Any]):
        gone_through = 0

        def __iter__(self) -> Iterator[Any]:
            self.gone_through += 1
            for file in super().__iter__():
                yield file
                if self.gone_through == 2:  # the first time, their bytes are counted
                    raise KeyboardInterrupt

    def write(_: int, chunks: Iterator[Any]) -> None:
        for _ in chunks:
            written.append("a chunk")
            time.sleep(0.02)

    written: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        transfer.write_files("writing", Files([[SimpleNamespace(num_bytes=1)] * 50] * 2), write, workers=1)
    assert len(written) < 50


def test_exit_code_and_message_of_the_command(original: Path, tmp_path: Path) -> None:
    (original / "model.safetensors").unlink()
    command = [sys.executable, "-m", "megatron_prolong", "convert", "to-megatron", original, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_table_of_contents_of_an_older_python(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.11.2, which Debian 12 has: nothing that it had written could be read, not even by itself."""
    path = converted / ".metadata"
    contents = load_metadata(path)
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name))
    )
    path.write_bytes(pickle.dumps(contents))
    assert b"getattr" in path.read_bytes() and load_metadata(path) == contents


def test_pickles_run_nothing(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"iteration": 3, "args": Exploit(), "list": [Exploit()]}, tmp_path / "common.pt")
    common = load_common(tmp_path)
    assert common is not None and common["iteration"] == 3
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(UserError, match="not the metadata"):
        load_metadata(tmp_path / ".metadata")
    assert not (tmp_path / "ran").exists()

    class Member:
        def __reduce__(self) -> tuple[object, ...]:
            return (getattr, (OrderedDict, "fromkeys"))  # only an enum's members are looked up

    assert isinstance(SafeUnpickler(io.BytesIO(pickle.dumps(Member()))).load(), Inert)
