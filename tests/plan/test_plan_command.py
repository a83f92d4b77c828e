"""`prolong plan` from a recipe to tables, a written recipe and a page that a browser draws."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from plan_shapes import LLAMA3_8B
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError
from megatron_prolong.plan.hardware import HARDWARE_FILE
from megatron_prolong.recipe.layout_rules import layout_problems
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.recipe.schema import settings_of
from megatron_prolong.recipe.shape import to_hf_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "prolong_8b.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(to_hf_config(LLAMA3_8B)))
    return directory


def run(model: Path, *arguments: str) -> str:
    command = ["plan", str(EXAMPLE), f"model.path={model}", "--gpus", "16", *arguments]
    result = CliRunner().invoke(app, command)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The tables, the written recipe and the page of one run over all stages."""
    directory = tmp_path_factory.mktemp("out")
    recipe, page = directory / "best.yaml", directory / "plan.html"
    text = run(model, "--simulate", "--write", str(recipe), "--html", str(page))
    return text, recipe, page


def test_a_step_ends_between_the_signal_and_the_time_limit(model: Path) -> None:
    """On one node, where steps are longest; half as long again remains for the save."""
    lead = re.search(r"--signal=B:USR1@(\d+)", EXAMPLE.with_name("prolong_512k.sh").read_text())
    assert lead is not None
    plans = json.loads(run(model, "--json", "--gpus", "8"))
    longest = max(plan["recipe"]["step_seconds"]["total"] for plan in plans)
    assert 600 < 1.5 * longest < int(lead[1])


def test_how_often_a_checkpoint_comes(model: Path) -> None:
    text = run(model, "--stage", "512k", "--gpus", "8", "--no-te", "checkpoint.every=125")
    assert "a checkpoint every 125 steps (checkpoint.every): every 30.0 hours" in text


def test_a_small_models_plan_is_not_all_zeros(tmp_path: Path) -> None:
    small = LLAMA3_8B.replace(num_layers=2, hidden_size=64, ffn_hidden_size=128, head_dim=8, vocab_size=512)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(small)))
    text = run(
        tmp_path,
        "--stage",
        "64k",
        "stage.64k.batch_tokens=64K",
        "stage.64k.sequence_length=8K",
        "stage.64k.steps=10",
        "--html",
        str(tmp_path / "plan.html"),
    )
    found = re.search(r"recipe's layout .*: (\S+) GB, (\S+) s/step, .*, (\S+) GPU-hours, USD (\S+)", text)
    assert found is not None and all(float(number) > 0 for number in found.groups()), text
    assert re.search(r"best, GB: parameters 0\.00\d+, gradients 0\.00\d+", text), text
    bars = re.findall(r">([\d.]+) (?:GB|s)<", (tmp_path / "plan.html").read_text())
    assert len(bars) > 10 and all(float(number) > 0 for number in bars), bars


def test_tables_rank_and_explain(outputs: tuple[str, Path, Path]) -> None:
    text, _, _ = outputs
    for expected in (
        "tok/s/GPU",
        "steps played",
        "out of memory",
        "recipe's layout",
        "GPU-hours",
        "nearest miss",
    ):
        assert expected in text


def test_the_written_recipe_is_valid_at_its_best_layouts(outputs: tuple[str, Path, Path]) -> None:
    text, path, _ = outputs
    recipe, before = load_recipe(path), yaml.safe_load(EXAMPLE.read_text())
    assert [stage.name for stage in recipe.stages] == [stage["name"] for stage in before["stages"]]
    for stage in recipe.stages:
        assert not layout_problems(settings_of(recipe, stage).layout, LLAMA3_8B, 16)
        assert f"tp{stage.layout.tp} pp{stage.layout.pp}" in text


def test_the_best_leaves_room_and_is_what_is_written(model: Path, tmp_path: Path) -> None:
    """At 64K on 8 GPUs the fastest layout fills them, and one with room is 5% slower."""
    path = tmp_path / "best.yaml"
    arguments = ["--no-te", "--stage", "64k", "--gpus", "8"]
    text = run(model, *arguments, "--write", str(path))
    assert re.search(r"tp2 pp1 cp4 dp1 a2a, recompute none +!84\.\d ", text)
    assert "best: tp4 pp1 cp2 dp1 all_gather, recompute none, 5% slower" in text
    assert "slower than the best mostly by attention" in text
    (found,) = json.loads(run(model, *arguments, "--json", "--top", "1"))
    assert found["layouts"] == [found["best"]] and not found["best"]["tight"]
    written = load_recipe(path).stages[0]
    assert (written.layout.tp, written.layout.cp, written.recompute) == (4, 2, "none")


def test_layers_of_pipeline_stages_stay_with_the_stage_that_is_not_planned(
    model: Path, tmp_path: Path
) -> None:
    uneven = ["layout.pp=4", "layout.first_stage_layers=7", "layout.last_stage_layers=7"]
    path = tmp_path / "best.yaml"
    run(model, "--stage", "64k", "--gpus", "64", *uneven, "--write", str(path))
    recipe = load_recipe(path)
    planned, other = (settings_of(recipe, stage).layout for stage in recipe.stages[:2])
    assert (planned.pp, planned.first_stage_layers) == (1, None)
    assert (other.pp, other.first_stage_layers, other.last_stage_layers) == (4, 7, 7)
    assert not layout_problems(planned, LLAMA3_8B, 64) and not layout_problems(other, LLAMA3_8B, 64)


def test_where_every_layout_runs_no_reasons_follow(tmp_path: Path) -> None:
    small = LLAMA3_8B.replace(num_layers=2, hidden_size=64, ffn_hidden_size=128, head_dim=8, vocab_size=512)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(small)))
    text = run(tmp_path, "--stage", "sft", "--gpus", "1", "stage.sft.batch_tokens=64K")
    assert "best, seconds" in text and "do not run" not in text


def test_kernels_are_named_and_those_of_transformer_engine_are_faster(model: Path) -> None:
    texts = [run(model, "--stage", "512k", "--top", "1", option) for option in ("--no-te", "--te")]
    assert "layers and attention: PyTorch's FlashAttention-2" in texts[0]
    assert "layers and attention: Transformer Engine" in texts[1]
    plain, te, fp8 = (
        json.loads(run(model, "--json", "--stage", "512k", *options))[0]
        for options in (["--no-te"], ["--te"], ["--no-te", "precision=fp8"])
    )
    assert [found["attention"] for found in (plain, te, fp8)] == ["flash2", "te", "te"]
    speeds = [found["layouts"][0]["tokens_per_second_per_gpu"] for found in (plain, te, fp8)]
    assert speeds == sorted(speeds) and speeds[1] > 1.2 * speeds[0]


def test_pytorchs_attention_is_faster_with_flash_attention_3(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*options: str) -> dict:
        (stage,) = json.loads(run(model, "--json", "--stage", "512k", *options))
        return stage

    slow, fast = found("--no-te"), found("--no-te", "--flash3")
    assert (slow["attention"], fast["attention"]) == ("flash2", "flash3")
    speeds = [stage["layouts"][0]["tokens_per_second_per_gpu"] for stage in (slow, fast)]
    assert speeds[1] > 1.2 * speeds[0]
    monkeypatch.setattr(
        "megatron_prolong.runtime.flash_attention_3.is_flash_attention_3_installed", lambda: True
    )
    assert found("--no-te") == fast
    assert found("--no-te", "--gpu", "a100-80g")["attention"] == "flash2"
    with pytest.raises(UserError, match="--flash3: a100-80g"):
        run(model, "--flash3", "--gpu", "a100-80g")


def test_json_has_the_same_ranking(model: Path) -> None:
    (stage,) = json.loads(run(model, "--json", "--stage", "512k", "--top", "3"))
    layouts = stage["layouts"]
    speeds = [layout["tokens_per_second_per_gpu"] for layout in layouts]
    assert len(layouts) == 3 and speeds == sorted(speeds, reverse=True)
    assert all(layout["memory_bytes"]["needed"] <= 84.9e9 for layout in layouts)
    assert sum(stage["rejected"].values()) > 0
    seconds = layouts[0]["step_seconds"]
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))


def test_the_page_is_drawn_by_a_browser(outputs: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Chromium lays out the page without script or network; the dumped document has the bars and the points."""
    _, _, page = outputs
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    html = page.read_text()
    links = re.sub(r'xmlns(:xlink)?="[^"]+"', "", html)
    assert "http" not in links and "<script" not in html
    base = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    screenshot = tmp_path / "page.png"
    # Not run in the page: geometry of every SVG element, written into the title that --dump-dom shows.
    probe = tmp_path / "probe.html"
    probe.write_text(html.replace("</body>", f"{_PROBE}</body>"))
    command = [*base, "--window-size=1200,4000", f"--screenshot={screenshot}", "--dump-dom", probe.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found = json.loads(dumped.split('id="probe">')[1].split("<")[0])
    assert found["svgs"] == 9 and found["bars"] > 100 and found["points"] > 50
    assert found["outside"] == []
    assert screenshot.stat().st_size > 20_000


_PROBE = """<pre id="probe"></pre><script>
const outside = [];
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  for (const one of svg.querySelectorAll("text, use, [id^=patch] path")) {
    const box = one.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
        || box.bottom > frame.bottom + 1) outside.push(one.textContent);
  }
}
document.getElementById("probe").textContent = JSON.stringify({
  svgs: document.querySelectorAll("svg").length, bars: document.querySelectorAll("[id^=patch] path").length,
  points: document.querySelectorAll("[id^=PathCollection] use").length, outside: outside });
</script>"""


def test_what_is_missing_is_named(model: Path, tmp_path: Path) -> None:
    for text in ("", "h100", "h100: 80"):
        (tmp_path / "table.yaml").write_text(text)
        with pytest.raises(UserError, match=r"table\.yaml: a hardware table is GPU names with their numbers"):
            run(model, "--hardware", str(tmp_path / "table.yaml"))
    h100 = yaml.safe_load(HARDWARE_FILE.read_text())["h100-80g"]
    for changed, problem in (
        ({"peak_flops": {}}, "peak_flops lacks bf16 and fp8"),
        ({"peak_flops": {"bf16": 9e14}}, "peak_flops lacks fp8"),
        ({"efficiency": h100["efficiency"] | {"matmul_fp8": 0.0}}, "efficiency.matmul_fp8 is 0"),
        ({"efficiency": h100["efficiency"] | {"te": [0.5, 0]}}, "greater than 0"),
    ):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump({"h100-80g": h100 | changed}))
        with pytest.raises(UserError, match=rf"table\.yaml: not a hardware table(.|\n)*{problem}"):
            run(model, "--hardware", str(tmp_path / "table.yaml"))
    with pytest.raises(UserError, match=r"--gpu x100: unknown GPU; known are a100-80g, h100-80g"):
        run(model, "--gpu", "x100")
    with pytest.raises(UserError, match="no such stage, only 64k, 512k, sft"):
        run(model, "--stage", "1m")


def test_too_few_gpus_say_what_would_be_nearest(model: Path, tmp_path: Path) -> None:
    """An error, for scripts: but the tables and the page, which say why, are there, and no recipe is."""
    page, recipe = tmp_path / "plan.html", tmp_path / "plan.yaml"
    arguments = [str(EXAMPLE), f"model.path={model}", "--stage", "512k", "--gpus", "1", "--html", str(page)]
    for more in ([], ["--json"], ["--write", str(recipe)]):
        result = CliRunner().invoke(app, ["plan", *arguments, *more])
        assert isinstance(result.exception, UserError)
        assert str(result.exception).startswith(
            "no layout runs on 1 × h100-80g:\n  - stage 512k: nearest miss: "
        )
        assert "nearest miss" in result.stdout or json.loads(result.stdout)
    assert page.exists() and not recipe.exists()


def test_the_recipe_itself_is_not_overwritten(outputs: tuple[str, Path, Path]) -> None:
    """Its comments would be lost."""
    recipe = outputs[1]
    result = CliRunner().invoke(app, ["plan", str(recipe), "--stage", "64k", "--write", str(recipe)])
    assert isinstance(result.exception, UserError) and "that is the recipe itself" in str(result.exception)
