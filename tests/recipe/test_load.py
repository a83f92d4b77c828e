import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.load import dump_recipe, load_recipe
from megatron_prolong.recipe.schema import json_schema, settings_of

Write = Callable[..., Path]


def test_a_short_recipe_gets_prolongs_defaults(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe = load_recipe(write(recipe_data))
    one, two = recipe.stages
    assert recipe.run_dir == Path("runs/tiny")
    assert (recipe.precision, recipe.recompute, recipe.loss_chunk_tokens) == ("bf16", "full", 2048)
    assert (recipe.optimizer.beta2, recipe.optimizer.weight_decay, recipe.optimizer.clip) == (0.95, 0.1, 1.0)
    assert (one.batch_sequences, one.num_steps, one.warmup_steps) == (8, 10, 1)
    assert (two.num_steps, two.num_tokens) == (32, 2**20)
    assert (one.lr, one.min_lr, one.seed) == (1e-5, pytest.approx(1e-6), 42)
    assert one.mixture == {Path("books"): 0.25, Path("code"): 0.75}


def test_a_token_budget_is_rounded_up_and_so_is_the_warmup(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe_data["stages"][1] |= {"tokens": 2**20 + 1, "warmup": 0.05}
    recipe_data["stages"][0] |= {"steps": 250, "warmup": 0.05}
    one, two = load_recipe(write(recipe_data)).stages
    assert two.num_steps == 33
    assert one.warmup_steps == 13  # as transformers: ceil(12.5)
    recipe_data["stages"][0] |= {"steps": 100, "warmup": 0.07}
    assert load_recipe(write(recipe_data)).stages[0].warmup_steps == 7  # although 0.07 · 100 > 7 in floats


def test_stage_overrides_of_layout_and_precision(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe_data["layout"] = {"tp": 2, "cp_exchange": "p2p"}
    recipe_data["offload_activations"] = True
    recipe_data["stages"][1] |= {"layout": {"cp": 4}, "precision": "fp32", "recompute": "none"}
    recipe_data["stages"][1]["offload_activations"] = False
    recipe = load_recipe(write(recipe_data))
    one, two = recipe.stages
    assert settings_of(recipe, one) == (recipe.layout, "bf16", "full", True)
    merged, *rest = settings_of(recipe, two)
    assert rest == ["fp32", "none", False]
    assert (merged.tp, merged.cp, merged.cp_exchange, merged.model_ranks) == (2, 4, "p2p", 8)


def test_layers_of_pipeline_stages_are_those_of_their_number(
    write: Write, recipe_data: dict[str, Any]
) -> None:
    recipe_data["layout"] = {"pp": 2, "first_stage_layers": 1}
    one, two = recipe_data["stages"]
    one["layout"], two["layout"] = {"pp": 2, "tp": 2}, {"pp": 1}
    recipe = load_recipe(write(recipe_data))
    assert [settings_of(recipe, stage).layout.first_stage_layers for stage in recipe.stages] == [1, None]
    two["layout"] = {"pp": 4, "last_stage_layers": 3}
    layout = settings_of(recipe, load_recipe(write(recipe_data)).stages[1]).layout
    assert (layout.first_stage_layers, layout.last_stage_layers) == (None, 3)


def test_domains_are_named_by_the_shortest_ends_of_their_paths(
    write: Write, recipe_data: dict[str, Any]
) -> None:
    first, second = recipe_data["stages"]
    first["mixture"] = {"packs/64k/books": 0.5, "sft/books": 0.25, "code": 0.25}
    second["mixture"] = "mock"
    one, two = load_recipe(write(recipe_data)).stages
    assert list(one.domain_names.values()) == ["64k/books", "sft/books", "code"]
    assert two.domain_names == {}


def test_a_recipe_cannot_be_changed(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe = load_recipe(write(recipe_data))
    with pytest.raises(ValueError, match="frozen"):
        recipe.stages[0].lr = 1.0  # type: ignore[misc]


def test_overrides(write: Write, recipe_data: dict[str, Any]) -> None:
    overrides = [
        "stage.one.lr=2e-5",
        "stage.two.steps=7",
        "stage.one.tokens=16K",
        "layout.tp=2",
        "optimizer.clip=0.5",
        "run_dir=/tmp/elsewhere",
        "stage.one.layout.cp=2",
        "stage.one.mixture.code=0.25",
        "stage.one.mixture.data/v1.5/code=0.5",
        "stage.two.mixture=mock",
        "model.init={num_layers: 2, hidden_size: 8, num_heads: 2, num_kv_heads: 1, ffn_hidden_size: 16}",
        "model.tokenizer=model",
    ]
    recipe = load_recipe(write(recipe_data), overrides)
    one, two = recipe.stages
    assert one.lr == 2e-5
    assert (two.steps, two.tokens, two.num_steps) == (7, None, 7)
    assert (one.steps, one.tokens, one.num_steps) == (None, 2**14, 2)
    assert (recipe.layout.tp, recipe.optimizer.clip, recipe.run_dir) == (2, 0.5, Path("/tmp/elsewhere"))
    assert settings_of(recipe, one).layout.cp == 2
    assert one.mixture == {Path("books"): 0.25, Path("code"): 0.25, Path("data/v1.5/code"): 0.5}
    assert two.mixture == "mock"
    assert recipe.model.path is None
    assert recipe.model.init is not None and recipe.model.init.num_layers == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layout.tp", "must look like key.path=value"),
        ("=3", "must look like key.path=value"),
        ("stage.on.lr=1", "did you mean stage.one?"),
        ("stage.zzz.lr=1", "the stages are one, two"),
        ("stage.one=1", "must name a stage and a key, stage.NAME.KEY=value; the stages are one, two"),
        ("base=other.yaml", "a base is named in the recipe file only"),
        ("evaluation.lengths=8K", "evaluation.lengths: found '8K'; must be a list"),
        ("layout.tpp=2", "layout.tpp: unknown key; did you mean layout.tp?"),
        ("steps=4", "steps: unknown key; every stage has its own: stage.NAME.steps=VALUE"),
        ("stage.one.steps=010", "stages.one.steps: found '010'; must be a number"),
        ("stage.one.lr=fast", "override 'stage.one.lr=fast': stages.one.lr: found 'fast'"),
    ],
)
def test_bad_overrides(write: Write, recipe_data: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(recipe_data), [override])
    assert message in str(caught.value)


def test_bases_merge_deeply_and_stages_by_name(write: Write, recipe_data: dict[str, Any]) -> None:
    Path("sub").mkdir()
    recipe_data["layout"] = {"tp": 2, "cp": 2}
    write(recipe_data, "sub/grandparent.yaml")
    write({"base": "grandparent.yaml", "layout": {"cp": 4}, "optimizer": {"clip": 0.5}}, "sub/parent.yaml")
    child = {
        "base": "sub/parent.yaml",
        "name": "child",
        "stages": [
            {"name": "two", "steps": 3, "mixture": {"code": 1.0}},
            {**recipe_data["stages"][0], "name": "three"},
        ],
    }
    recipe = load_recipe(write(child))
    assert recipe.name == "child" and recipe.run_dir == Path("runs/child")
    assert (recipe.layout.tp, recipe.layout.cp, recipe.optimizer.clip) == (2, 4, 0.5)
    assert [stage.name for stage in recipe.stages] == ["one", "two", "three"]
    two = recipe.stages[1]
    assert (two.steps, two.tokens, two.lr) == (3, None, 5e-6)  # steps replaces the base's tokens
    assert two.mixture == {Path("code"): 1.0}  # replaced whole
    assert str(recipe.origin.place(("stages", "two", "lr"))).startswith("sub/grandparent.yaml:")
    assert str(recipe.origin.place(("stages", "two", "steps"))).startswith("recipe.yaml:")


def test_a_stage_copied_and_not_renamed_stays_there_twice(write: Write, recipe_data: dict[str, Any]) -> None:
    write(recipe_data, "base.yaml")
    child = {"base": "base.yaml", "stages": [{"name": "two", "lr": 1e-5}, {"name": "two", "lr": 2e-5}]}
    with pytest.raises(UserError, match=r"has 1 problem:\n.*2 stages have this name"):  # both are whole
        load_recipe(write(child))


@pytest.mark.parametrize("command", ["plan", "status", "doctor", "launch", "recipe show"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.one.steps=null", "stages.one: found neither of steps and tokens; give one"),
        ("stage.one.batch_tokens=1000", "stages.one.batch_tokens: found 1000; must be a multiple"),
        ("stage.one.mixture={gone-128: 0.5}", "stages.one.mixture: the proportions sum to 0.5"),
        ("model.path=null", "model: found neither of path and init; give one"),
        ("model.init={num_layers: 4, hidden_size: 64, num_heads: 7, num_kv_heads: 7, ffn_hidden_size: 8}",
         "model.init.num_heads: found 7; must divide hidden_size, 64"),
    ],
)  # fmt: skip
def test_no_command_works_with_a_contradictory_recipe(
    prolong: Callable[..., tuple],
    write: Write,
    recipe_data: dict[str, Any],
    command: str,
    override: str,
    message: str,
) -> None:
    code, _, err = prolong(*command.split(), write(recipe_data), override)
    assert code == 2
    assert message in err


def test_an_init_replaces_the_path_of_the_base(write: Write, recipe_data: dict[str, Any]) -> None:
    write(recipe_data, "base.yaml")
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 96}
    recipe = load_recipe(write({"base": "base.yaml", "model": {"init": sizes, "tokenizer": "model"}}))
    assert recipe.model.path is None and recipe.model.init is not None
    shape = recipe.model.init.shape(vocab_size=500)
    assert (shape.head_dim, shape.vocab_size, shape.rope_base) == (16, 500, 5e5)


def test_circles_and_missing_bases(write: Write) -> None:
    write({"base": "b.yaml"}, "a.yaml")
    write({"base": "a.yaml"}, "b.yaml")
    with pytest.raises(UserError, match="goes in a circle"):
        load_recipe("a.yaml")
    with pytest.raises(UserError, match=r"c\.yaml:1: base: absent\.yaml: no such file"):
        load_recipe(write({"base": "absent.yaml"}, "c.yaml"))
    with pytest.raises(UserError, match=r"c\.yaml:1: base: ~nobody-here/a\.yaml: no such file"):
        load_recipe(write({"base": "~nobody-here/a.yaml"}, "c.yaml"))
    with pytest.raises(UserError, match="must be the path"):
        load_recipe(write({"base": 3}, "d.yaml"))


def test_numbers_are_what_they_look_like(write: Write, recipe_data: dict[str, Any]) -> None:
    """YAML 1.1 has octal, binary and base-sixty numbers, and takes these for 8, 5 and 90."""
    path = write(recipe_data)
    text = path.read_text()
    for written in ("010", "0b101", "1:30", "1:30.5"):
        path.write_text(f"{text}checkpoint: {{keep: {written}}}\n")
        with pytest.raises(UserError, match=f"checkpoint.keep: found '{written}'; must be a number"):
            load_recipe(path)


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot read the recipe: No such file"):
        load_recipe("nowhere.yaml")


def test_a_file_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: cannot read the recipe: not UTF-8 text"):
        load_recipe(path)


def test_a_key_written_twice(write: Write, recipe_data: dict[str, Any]) -> None:
    path = write(recipe_data)
    path.write_text(path.read_text() + "name: again\n")
    last = path.read_text().count("\n")
    with pytest.raises(UserError, match=rf"recipe\.yaml:{last}: name: written twice"):
        load_recipe(path)
    with pytest.raises(UserError, match=rf"recipe\.yaml:{last}: name: written twice"):
        load_recipe(write({"base": path.name, "name": "child"}, "child.yaml"))


def test_what_a_file_says_over_its_base_is_its_own_mistake(write: Write, recipe_data: dict[str, Any]) -> None:
    write({**recipe_data, "optimizer": {"clip": 1}}, "base.yaml")
    with pytest.raises(UserError, match=r"child\.yaml:3: optimizer\.clip: found -1"):
        load_recipe(write({"base": "base.yaml", "optimizer": {"clip": -1}}, "child.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("name: !!python/name:os.system x", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping .* found an empty file"),
        ("run_dir: {{ scratch }}\n", r"not valid YAML: a key must be text\n.*line \d+"),
        ("? [a, b]\n: c\n", "not valid YAML: a key must be text"),
        ("model: &m {path: *m}\n", "an anchor holds itself"),
        ("model: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_not_a_recipe(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"recipe\.yaml: .*{message}"):
        load_recipe(write(text))


def test_the_line_of_a_stage_whose_name_is_a_number(write: Write, recipe_data: dict[str, Any]) -> None:
    text = yaml.safe_dump({**recipe_data, "stages": None}).replace("stages: null\n", "")
    text += "stages:\n  - sequence_length: 1K\n    name: 64\n"
    with pytest.raises(UserError, match=rf"recipe\.yaml:{text.count(chr(10))}: stages\.0\.name: found 64"):
        load_recipe(write(text))


def test_yaml_anchors_work(write: Write, recipe_data: dict[str, Any]) -> None:
    text = yaml.safe_dump({**recipe_data, "stages": None}).replace("stages: null\n", "")
    text += """stages:
  - &first {name: one, sequence_length: 1K, batch_tokens: 8K, steps: 1, lr: 1e-5, mixture: mock}
  - {<<: *first, name: two, lr: 2e-5}
"""
    one, two = load_recipe(write(text)).stages
    assert (one.lr, two.lr, two.sequence_length) == (1e-5, 2e-5, 1024)


def test_variables_and_home_in_paths(
    write: Write, recipe_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA", "/scratch/data")
    monkeypatch.setenv("HOME", "/home/someone")
    recipe_data["model"]["path"] = "~/model"
    recipe_data["stages"][0]["mixture"] = {"$DATA/books": 1.0}
    recipe = load_recipe(write(recipe_data))
    assert recipe.model.path == Path("/home/someone/model")
    assert recipe.stages[0].mixture == {Path("/scratch/data/books"): 1.0}


def test_the_dump_loads_as_the_same_recipe(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe_data |= {"layout": {"tp": 2}, "evaluation": {"lengths": [1, 2]}}
    recipe_data["stages"][1] |= {"layout": {"cp": 2}, "carry": {"optimizer": False}, "mixture": "mock"}
    recipe = load_recipe(write(recipe_data), ["stage.one.lr=3e-5"])
    again = load_recipe(write(dump_recipe(recipe), "dump.yaml"))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert "sequence_parallel: true" in dump_recipe(recipe)  # defaults are written out


def test_two_recipes_differ_when_a_value_does(write: Write, recipe_data: dict[str, Any]) -> None:
    path = write(recipe_data)
    assert load_recipe(path) == load_recipe(path, ["layout.tp=1"])
    assert load_recipe(path) != load_recipe(path, ["layout.tp=2"])


def test_the_json_schema_describes_the_fields() -> None:
    schema = json_schema()
    assert schema["properties"]["layout"]["description"].startswith("How the model")
    assert "base" in schema["properties"]
    assert schema["$defs"]["Stage"]["properties"]["lr"]["description"] == "Peak learning rate."
    json.dumps(schema)


def test_no_torch_is_imported(write: Write, recipe_data: dict[str, Any]) -> None:
    path = write(recipe_data)
    program = f"""
import sys
from megatron_prolong.cli import main, recipe
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.recipe.validate import check
check(load_recipe({str(path)!r}), world_size=8)
heavy = {{"torch", "megatron.core", "transformers", "numpy"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
