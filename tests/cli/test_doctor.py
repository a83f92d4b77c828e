"""`prolong doctor` on a machine without GPUs, and against recipes that lack something."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import ModelShape, to_hf_config
from megatron_prolong.runtime import doctor
from megatron_prolong.runtime.doctor import measure_all_reduce


def findings(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(app, ["doctor", "--quick", "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, {one["name"]: one for one in json.loads(result.stdout)}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shape = ModelShape(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=250,
        max_length=256, rope_base=1e4,
    )  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(to_hf_config(shape)))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    path = tmp_path / "small.yaml"
    path.write_text(
        f"""
name: small
run_dir: {tmp_path / "run"}
model: {{path: {tmp_path / "model"}}}
stages: [{{name: s, sequence_length: 256, batch_tokens: 1K, steps: 5, lr: 1e-3, mixture: mock}}]
"""
    )
    return path


def test_a_healthy_cpu_machine(tmp_path: Path) -> None:
    code, found = findings()
    assert code == 0
    assert found["torch"]["status"] == found["megatron-core"]["status"] == found["gloo"]["status"] == "ok"
    assert "GB free" in found["disk"]["detail"] and "MB/s" in found["disk"]["detail"]
    assert found["transformer-engine"]["status"] == "ok"  # optional


def test_packages_are_compared_with_what_setup_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": None, "megatron-core": "0.15.3", "transformer-engine": "2.10.0", "wandb": None}
    monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name, "1"))
    code, found = findings()
    assert code == 1
    assert found["torch"]["status"] == "missing"
    assert found["torch"]["remedy"].startswith('pip install "torch')
    for name in ("megatron-core", "transformer-engine"):
        assert (
            found[name]["status"] == "warning" and f"{versions[name]}; tested with" in found[name]["detail"]
        )
    assert found["wandb"]["status"] == found["apex"]["status"] == "ok"
    assert len({*found} & {"psutil", "einops", "xxhash", "tensorboard"}) == 4


def test_the_all_reduce_sums_and_is_timed() -> None:
    assert 0 < measure_all_reduce("gloo", 2, num_bytes=4096) < 60


def test_an_all_reduce_that_fails_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("trace\nconnection refused")

    monkeypatch.setattr(doctor, "measure_all_reduce", broken)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "failed: connection refused" in result.stdout


def test_a_recipe_that_has_all_it_needs(recipe: Path) -> None:
    code, found = findings(str(recipe))
    assert "nothing wrong" in found["recipe"]["detail"]
    assert "GB per rank predicted" in found["memory of stage s"]["detail"]
    assert found["checkpoints"]["status"] == "ok"
    assert code == 0


def test_what_a_recipe_lacks(recipe: Path) -> None:
    arguments = ["doctor", "--quick", str(recipe), "precision=fp8", "layout.tp=2", "--gpus", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    missing = [line for line in result.stdout.splitlines() if line.startswith("missing")]
    assert any("it needs CUDA" in line for line in missing)
    assert any("3 ranks cannot be divided" in line for line in missing)


def test_a_layout_that_cannot_be_has_no_memory_to_tell_of(recipe: Path) -> None:
    for override in ("layout.pp=3", "layout.tp=3"):
        code, found = findings(str(recipe), override)
        assert code == 1
        assert "memory of stage s" not in found


def test_checkpoints_that_do_not_fit_on_the_disk(recipe: Path) -> None:
    overrides = ("checkpoint.keep_every=1", "checkpoint.every=1", "stage.s.steps=1B")
    code, found = findings(str(recipe), *overrides)
    assert code == 1 and found["checkpoints"]["status"] == "missing"
    assert "checkpoint.keep" in found["checkpoints"]["remedy"]
    for check in (["--check"], []):
        refused = CliRunner().invoke(app, ["train", *check, str(recipe), *overrides])
        assert "no room for the checkpoints" in str(refused.exception), (
            "before a day of training, not after it"
        )


@pytest.mark.parametrize(
    ("cudnn", "capability", "status"),
    [(91701, (9, 0), "warning"), (91900, (9, 0), "ok"), (91701, (10, 0), "ok"), (None, (9, 0), "warning")],
)
def test_a_cudnn_whose_gradients_can_be_nan_is_a_warning(monkeypatch, cudnn, capability, status) -> None:
    def version() -> int:
        if cudnn is None:
            raise RuntimeError("cuDNN version incompatibility")
        return cudnn

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.backends.cudnn.version", version)
    (finding,) = doctor._cudnn()
    assert finding.status == status and bool(finding.remedy) == (status == "warning")


@pytest.mark.parametrize(
    ("capability", "installed", "te", "status"),
    [
        (9, True, "2.12.0", "ok"),
        (9, False, "2.12.0", "ok"),
        (9, False, None, "warning"),
        (9, None, "2.12.0", "missing"),
        (10, True, None, "warning"),
    ],
)
def test_what_attends_is_told(
    monkeypatch, capability: int, installed: bool | None, te: str | None, status: str
) -> None:
    def use() -> None:
        if installed is None:
            raise UserError("flash-attn-3 is installed, but PyTorch cannot use it")

    assert torch.cuda.is_available() or not doctor._attention()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(doctor, "is_flash_attention_3_installed", lambda: installed is not False)
    monkeypatch.setattr(doctor, "use_flash_attention_3", use)
    monkeypatch.setattr(doctor, "version_of", lambda _: te)
    (finding,) = doctor._attention()
    assert finding.status == status and bool(finding.remedy) == (status == "warning")
    assert ("FlashAttention-3" in finding.detail) == (installed is True and capability == 9)
    assert ("flash-attn-3" in finding.remedy) == (status == "warning" and capability == 9)


def test_a_gpu_slower_than_those_beside_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or not doctor._gpu_speeds()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for speeds, status in (([640.0, 612.0], "ok"), ([640.0, 640.0, 500.0], "warning")):
        monkeypatch.setattr(doctor, "measure_gpus", lambda speeds=speeds: speeds)
        (finding,) = doctor._gpu_speeds()
        assert finding.status == status and ("GPU 2" in finding.remedy) == (status == "warning")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_every_gpus_speed_is_measured() -> None:
    speeds = doctor.measure_gpus(width=256, products=2)
    assert len(speeds) == torch.cuda.device_count() and min(speeds) > 0


def test_gpus_are_judged_by_what_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        name, total_memory, major, minor = "Old", 16 * 10**9, 7, 0

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Device)
    (finding, compiler) = doctor._devices()
    assert finding.status == "warning" and "bf16" in finding.remedy
    assert "fp32" not in finding.remedy, "a recipe with fp32 is refused on a GPU"
    assert compiler.status == "ok"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor._compiler().status == "missing"
