"""Every shipped recipe against the real Llama configs, with stand-ins for weights and data."""

import shutil
from pathlib import Path

import pytest

from megatron_prolong.recipe.load import dump_recipe, load_recipe
from megatron_prolong.recipe.schema import Recipe, settings_of
from megatron_prolong.recipe.shape import read_shape
from megatron_prolong.recipe.validate import find_problems
from tests.recipe.conftest import describe_checkpoint, write_domain, write_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = Path(__file__).parent / "configs"
MODELS = {
    "models/Meta-Llama-3-8B-Instruct": "llama-3-8b-instruct",
    "models/Meta-Llama-3-70B-Instruct": "llama-3-70b-instruct",
}
COLUMNS = ["domain", "indices", "input_ids", "length", "mask"]

# Recipe, and the numbers of GPUs that it runs on as it is.
WORLDS = {
    "prolong_64k": [8, 16, 64, 128],
    "prolong_512k": [8, 16, 64, 128],
    "prolong_sft": [8, 64],
    "prolong_8b": [8, 16, 32, 64, 128],
    "prolong_70b": [128, 256],
    "prolong_1m": [32, 64, 256],
}


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """An example, in a working directory that has everything it names."""
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(EXAMPLES / f"{request.param}.yaml")
    assert loaded.model.path is not None
    if config := MODELS.get(str(loaded.model.path)):
        shutil.copytree(CONFIGS / config, loaded.model.path)
        (loaded.model.path / "model.safetensors").touch()
        write_tokenizer(loaded.model.path, 128_256)
    else:
        _write_checkpoint(loaded.model.path)
    for stage in loaded.stages:
        assert stage.mixture != "mock"
        for directory in stage.mixture:
            write_domain(Path(directory), COLUMNS)
    return loaded


def _write_checkpoint(stage_directory: Path) -> None:
    """What an earlier 8B run leaves: a training checkpoint and the file that names it."""
    checkpoint = stage_directory / "step_00005000"
    write_tokenizer(checkpoint / "hf", 128_256)
    shape = read_shape(CONFIGS / "llama-3-8b-instruct").replace(rope_base=8e6, max_length=65_536)
    describe_checkpoint(checkpoint, "training", shape)
    (checkpoint / ".metadata").touch()
    (stage_directory / "latest").write_text(f"{checkpoint.name}\n")


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [(name, world) for name, worlds in WORLDS.items() for world in worlds],
    indirect=["recipe"],
)
def test_an_example_fits_its_model_and_cluster(recipe: Recipe, world_size: int) -> None:
    findings = find_problems(recipe, world_size)
    assert findings.errors == []
    assert findings.warnings == []


@pytest.mark.parametrize("recipe", ["prolong_70b"], indirect=True)
def test_a_cluster_that_is_too_small_is_refused(recipe: Recipe) -> None:
    errors = find_problems(recipe, 64).errors
    assert len(errors) == 1
    assert "stages.512k.layout: 64 ranks cannot be divided into copies of tp·pp·cp = 128" in errors[0]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_every_example_loads_and_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(EXAMPLES / f"{name}.yaml")
    (tmp_path / "resolved.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "resolved.yaml") == loaded


def test_every_prolong_example_is_checked_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("prolong_*.yaml")} == WORLDS.keys()


def test_the_numbers_of_prolong() -> None:
    """Table 9 of the paper and the public scripts: steps, sequences a step, tokens, rates, warmup steps, bases."""
    stages = {stage.name: stage for stage in load_recipe(EXAMPLES / "prolong_8b.yaml").stages}
    numbers = {
        name: (
            stage.num_steps,
            stage.batch_sequences,
            stage.batch_tokens,
            stage.lr,
            round(stage.min_lr, 12),
            stage.warmup_steps,
            stage.rope_base,
        )
        for name, stage in stages.items()
    }
    assert numbers == {
        "64k": (5000, 64, 4_194_304, 1e-5, 1e-6, 500, 8e6),
        "512k": (2500, 16, 8_388_608, 5e-6, 5e-7, 250, 1.28e8),
        "sft": (250, 64, 4_194_304, 2e-5, 2e-6, 13, None),
    }
    assert [stage.carry.optimizer for stage in stages.values()] == [True, True, False]
    assert [stage.loss_mask for stage in stages.values()] == [False, False, True]


@pytest.mark.parametrize("name", WORLDS)
def test_the_optimizer_of_prolong(name: str) -> None:
    """Of the scripts; transformers 4.44 exempts only norms of its own from decay, not those of ProLong's model."""
    optimizer = load_recipe(EXAMPLES / f"{name}.yaml").optimizer
    assert optimizer.model_dump() == {
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "decay_norms": True,
    }  # fmt: skip


def test_the_mixtures_of_prolong() -> None:
    """Percents of the public scripts, by directory."""
    short = {
        "fineweb-edu": 10, "fineweb-2023-50": 10, "stackexchange": 4, "dolmawiki": 4, "tuluv2": 3, "arxiv": 3,
        "openwebmath": 3, "textbooks": 3,
    }  # fmt: skip
    repositories, books = "thestackv1_concat_by_repo", "book"
    long = {
        "64k": {f"{repositories}-65536": 30, f"{books}-65536": 30},
        "512k": {
            f"{repositories}-524288": 15, f"{repositories}-65536": 15, f"{books}-524288": 5, f"{books}-65536": 25,
        },
    }  # fmt: skip
    for stage in load_recipe(EXAMPLES / "prolong_8b.yaml").stages[:2]:
        assert stage.mixture != "mock"
        percents = {path.name: round(100 * share, 9) for path, share in stage.mixture.items()}
        assert percents == long[stage.name] | short


@pytest.mark.parametrize("name", ["64k", "512k", "sft"])
def test_the_stages_alone_are_those_of_the_whole(name: str) -> None:
    whole = load_recipe(EXAMPLES / "prolong_8b.yaml")
    alone = load_recipe(EXAMPLES / f"prolong_{name}.yaml")
    (stage,) = alone.stages
    same = next(one for one in whole.stages if one.name == name)
    assert settings_of(alone, stage).layout == settings_of(whole, same).layout
    fields = stage.model_dump(exclude={"layout"})
    assert fields == same.model_dump(exclude={"layout"})
    assert alone.optimizer == whole.optimizer
    assert (alone.precision, alone.recompute) == (whole.precision, whole.recompute)
