import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.inputs import fingerprint, tokenizer_fingerprint
from megatron_prolong.recipe.load import dump_recipe, load_recipe
from megatron_prolong.recipe.validate import check, find_problems, incoming_shape
from tests.recipe.conftest import (
    ENCODINGS,
    SHAPE,
    describe_checkpoint,
    write_checkpoint,
    write_domain,
    write_model,
    write_tokenizer,
)

Write = Callable[..., Path]


def problems_of(path: Path, overrides: list[str], world_size: int | None = None, **options: Any) -> list[str]:
    """What is wrong, without the file names; [] when nothing is."""
    try:
        check(load_recipe(path, overrides), world_size, **options)
    except UserError as error:
        lines = str(error).splitlines()[1:]
        return [re.sub(r"^  - (override '.*?'|[^ ]*): ", "", line) for line in lines]
    return []


def test_the_good_recipe_is_good(write: Write, recipe_data: dict[str, Any]) -> None:
    at_their_limits = ["checkpoint.every=10", "checkpoint.keep_every=20", "stage.one.micro_batch_tokens=1K"]
    at_their_limits += ["layout.pp=2", "layout.first_stage_layers=3"]  # which leaves one for the last stage
    smallest_pairs = ["layout.tp=2", "layout.cp=4", "layout.cp_exchange=a2a+p2p"]
    for overrides in ([], at_their_limits, smallest_pairs):
        findings = find_problems(load_recipe(write(recipe_data), overrides), 8)
        assert (findings.errors, findings.warnings) == ([], [])


def test_a_damaged_tokenizer_is_called_so(write: Write, recipe_data: dict[str, Any], workdir: Path) -> None:
    (workdir / "model" / "tokenizer.json").write_text("{")
    (warning,) = find_problems(load_recipe(write(recipe_data)), 8).warnings
    assert "tokenizer.json: cannot be read as JSON" in warning


def test_pickled_weights_are_weights(write: Write, recipe_data: dict[str, Any], workdir: Path) -> None:
    (workdir / "model" / "model.safetensors").rename(workdir / "model" / "pytorch_model.bin")
    assert problems_of(write(recipe_data), []) == []


# One mistake each: overrides, world size, and what must be said about it (and nothing else).
MISTAKES = [
    (["stage.one.batch_tokens=9000"], None, "stages.one.batch_tokens: found 9000; must be a multiple of"),
    (
        ["stage.one.yarn.factor=2", "stage.one.yarn.original_length=1K", "stage.one.yarn.beta_fast=1"],
        None,
        "stages.one.yarn.beta_fast: found 1; must be above beta_slow, 1",
    ),
    (["stage.one.micro_batch_tokens=1023"], None, "stages.one.micro_batch_tokens: found 1023; must hold at"),
    (["stage.one.lr=0"], None, "stages.one.lr: found 0; must be greater than 0"),
    (["stage.one.warmup=1"], None, "stages.one.warmup: found 1; must be less than 1"),
    (["stage.one.warmup=-0.1"], None, "stages.one.warmup: found -0.1; must be greater than or equal to 0"),
    (["stage.one.min_lr_ratio=1.5"], None, "stages.one.min_lr_ratio: found 1.5; must be less than or equal"),
    (["stage.one.steps=0"], None, "stages.one.steps: found 0; must be greater than 0"),
    (["stage.one.sequence_length=1.5"], None, "stages.one.sequence_length: found 1.5; must be a whole number"),
    (["stage.one.schedule=cosin"], None, "stages.one.schedule: found 'cosin'"),
    (["stage.one.skip_steps=[1, 2-x]"], None, "stages.one.skip_steps: found [1, '2-x']; must be steps and ranges"),
    (["stage.one.steps=9", "stage.one.skip_steps=4-3"], None, "stages.one.skip_steps: found 4-3; must be steps of"),
    (["stage.one.steps=9", "stage.one.skip_steps=2,9-10"], None, "found 9-10; must be steps of the stage, 1 to 9"),
    (["evaluation.suite=none"], None, "evaluation.suite: found none; without held_out there is nothing to"),
    (["stage.one.seed=-1"], None, "stages.one.seed: found -1"),
    (["precision=fp16"], None, "precision: found 'fp16'; must be 'fp32', 'bf16' or 'fp8'"),
    (["optimizer.beta1=1"], None, "optimizer.beta1: found 1; must be less than 1"),
    (["checkpoint.every=10", "checkpoint.keep_every=25"], None, "checkpoint.keep_every: found 25; must be a"),
    (["checkpoint.keep=0"], None, "checkpoint.keep: found 0; must be greater than 0"),
    (["stage.one.mixture={books: 0.5, code: 0.4}"], None, "the proportions sum to 0.9; they must sum to 1"),
    (["stage.one.mixture={books: 0.5, code: 0.499}"], None, "the proportions sum to 0.999; they must sum to 1"),
    (["stage.one.mixture={}"], None, "stages.one.mixture: found no directory"),
    (["stage.one.mixture={code: 0.6, ./code: 1}"], None,
     "'./code': 1}; names one directory twice: code and ./code; keep one"),
    (["stage.one.mixture={code: 0.6, link: 0.4}"], None, "names one directory twice: code and link; keep one"),
    (["stage.two.precision=fp8", "fp8_recipe=blockwise", "layout.cp=2", "layout.tp=1"], None,
     "stages.two.precision: fp8_recipe blockwise crashes on documents padded for context parallelism"),
    (["model.path=~nobody-here/m"], None, "model.path: ~nobody-here/m: no such directory"),
    (["stage.one.mixture={absent: 1}"], None, "stages.one.mixture.absent: no such directory"),
    (["stage.one.mixture={model: 1}"], None, "stages.one.mixture.model: no index.json"),
    (["stage.one.mixture=data"], None, "stages.one.mixture: found 'data'; must be directories with"),
    (["stage.one.loss_mask=true"], None, "stages.one.mixture.code: no column mask (loss_mask is true)"),
    (["stage.one.loss_mask=true", "stage.one.mixture=mock"], None, "stages.one.loss_mask: found true; mock"),
    (["model.path=absent"], None, "model.path: absent: no such directory"),
    (["model.path=books"], None, "model.path: books: holds neither config.json"),
    (["model.path=qwen"], None, "qwen/config.json does not describe a Llama model"),
    (["model.path=weightless"], None, "model.path: weightless holds no weights"),
    (["model.path=unfinished"], None, "model.path: unfinished holds no .metadata"),
    (["model.tokenizer=books"], None, "model.tokenizer: books: no tokenizer.json there"),
    (["model.tokenizer=large"], None, "model.tokenizer: large has 301 tokens, but the model has"),
    (["run_dir=recipe.yaml/run"], None, "recipe.yaml is a file; name a directory"),
    (["run_dir=$NOT_SET/run"], None, "run_dir: $NOT_SET/run names a variable that is not set"),
    (["layout.tp=3"], None, "layout.tp: found 3; must divide the model's num_heads 8 and num_kv_heads 4"),
    (["layout.pp=3"], None, "layout.pp: found 3; must divide the model's 4 layers"),
    (["layout.first_stage_layers=1"], None, "layout.first_stage_layers: found 1; needs pp of at least 2"),
    (["layout.pp=2", "layout.first_stage_layers=4"], None, "layout.pp: found 2; must divide the model's 4 layers"),
    (["layout.pp=2", "layout.first_stage_layers=1", "layout.last_stage_layers=2"], None,
     "layout.pp: found 2; must divide the model's 4 layers"),
    (["layout.pp=2", "layout.virtual_pp=2", "layout.last_stage_layers=1"], None,
     "layout.virtual_pp: found 2; must divide the 3 layers"),
    (["layout.pp=2", "layout.virtual_pp=2", "layout.first_stage_layers=2", "layout.last_stage_layers=2"], None,
     "layout.last_stage_layers: found 2; goes with first_stage_layers and virtual_pp only from pp 3 on"),
    (["recompute=block"], None, "recompute: found 'block'; must be none, selective, all_but_attention,"),
    (["layout.virtual_pp=2"], None, "layout.virtual_pp: found 2; needs pp of at least 2"),
    (["layout.pp=2", "layout.virtual_pp=4"], None, "layout.virtual_pp: found 4; must divide the 2 layers"),
    (["stage.one.layout.pp=3"], None, "stages.one.layout.pp: found 3; must divide the model's 4 layers"),
    (["layout.tp=2", "layout.cp=3", "layout.cp_exchange=a2a"], None, "tp, 4, to be a multiple of 6, the 2 key"),
    (["layout.cp=2", "layout.cp_exchange=a2a+p2p"], None, "needs an even cp of at least 4, not 2"),
    (["layout.tp=2", "layout.pp=2"], 6, "6 ranks cannot be divided into copies of tp·pp·cp = 4"),
    (["fp8_parameters=true"], None, "fp8_parameters: found true; needs precision: fp8"),
    (["fp8_parameters=true", "stage.two.precision=fp8", "fp8_recipe=blockwise"], None,
     "fp8_parameters: found true; needs fp8_recipe: tensorwise, not blockwise"),
    (["fp8_parameters=true", "precision=fp8", "layout.distributed_optimizer=false"], None,
     "fp8_parameters: found true; needs layout.distributed_optimizer: true"),
    (["stage.one.carry.weights=false"], None, "stages.one.carry.weights: found false; the first stage"),
    (["stage.two.carry.weights=false"], None, "stages.two.carry.optimizer: found true; moments of other"),
    (["stage.two.layout.distributed_optimizer=false"], None,
     "stages.two.carry.optimizer: found true; stage one's cannot be saved with layout.distributed_optimizer: t"),
    (["layout.distributed_optimizer=false", "stage.one.precision=fp32"], None,
     "stages.two.carry.optimizer: found true; stage one's cannot be saved in fp32 and continued in bf16 wi"),
    (["stage.one.tokens=null", "stage.one.steps=null"], None, "found neither of steps and tokens; give one"),
    (["stage.one.seed=99999999999999999999"], None, "stages.one.seed: found 99999999999999999999; must be less"),
    (["stages=[]"], None, "stages: found []; must not be empty"),
    (["layout=4"], None, "layout: found 4; must be a mapping"),
    (["name=a b"], None, "name: found 'a b'; may hold only letters"),
    (["stage.one.seqence_length=3"], None, "unknown key; did you mean stages.one.sequence_length?"),
    (["colour=blue"], None, "colour: unknown key; known keys: base, checkpoint, deterministic, evaluation"),
]  # fmt: skip


@pytest.fixture
def inputs(workdir: Path) -> None:
    """Directories that the mistakes point at."""
    write_tokenizer(workdir / "large", SHAPE.vocab_size + 1)
    write_model(workdir / "qwen")
    config = json.loads((workdir / "qwen" / "config.json").read_text())
    (workdir / "qwen" / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    write_model(workdir / "weightless")
    (workdir / "weightless" / "model.safetensors").unlink()
    (workdir / "unfinished").mkdir()
    describe_checkpoint(workdir / "unfinished", "weights", SHAPE)


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("overrides", "world_size", "message"), MISTAKES)
def test_one_mistake_gives_one_message(
    write: Write, recipe_data: dict[str, Any], overrides: list[str], world_size: int | None, message: str
) -> None:
    problems = problems_of(write(recipe_data), overrides, world_size)
    assert any(message in problem for problem in problems), problems
    # A field of the layout is judged once per stage and rule; anything else once.
    keys = {problem.split(": ")[0].replace("stages.two", "stages.one") for problem in problems}
    assert len(keys) == 1, problems


def test_an_optimizer_that_can_continue_is_carried(write: Write, recipe_data: dict[str, Any]) -> None:
    path = write(recipe_data)
    unsharded, to_fp32 = "layout.distributed_optimizer=false", "stage.two.precision=fp32"
    assert problems_of(path, [to_fp32]) == []
    assert problems_of(path, [unsharded, "stage.two.precision=fp8"]) == []
    assert problems_of(path, [unsharded, to_fp32, "stage.two.carry.optimizer=false"]) == []


@pytest.mark.parametrize(
    ("layout", "dtype", "overrides", "problem"),
    [
        (True, "bfloat16", [], None),
        (True, "float32", [], None),
        (True, "bfloat16", ["layout.distributed_optimizer=false"],
         "saved with layout.distributed_optimizer: true and continued with false"),
        (False, "bfloat16", ["stage.one.layout.distributed_optimizer=true"],
         "saved with layout.distributed_optimizer: false and continued with true"),
        (False, "float32", ["layout.distributed_optimizer=false"],
         "saved in fp32 and continued in bf16 without layout.distributed_optimizer"),
        (False, "bfloat16", ["layout.distributed_optimizer=false", "stage.one.precision=fp8"], None),
    ],
)  # fmt: skip
def test_the_optimizer_of_another_run_is_judged_before_it_is_needed(
    write: Write,
    recipe_data: dict[str, Any],
    layout: bool,
    dtype: str,
    overrides: list[str],
    problem: str | None,
) -> None:
    theirs = Path("runs/earlier/64k/step_00000125")
    write_checkpoint(theirs)
    form = {"dtype": dtype, "layout": {"distributed_optimizer": layout}}
    describe_checkpoint(theirs, "training", SHAPE, **form)
    path, overrides = write(recipe_data), ["model.path=runs/earlier/64k", *overrides]
    expected = (
        f"stages.one.carry.optimizer: found true; that of {theirs} cannot be {problem}: change that, or set"
    )
    assert [one.startswith(expected) for one in problems_of(path, overrides)] == [True] * bool(problem)
    alone = [*overrides, "stage.one.carry.optimizer=false"]
    assert problems_of(path, alone) == []
    for other in ({"kind": "weights"}, {"kind": "training", "layout": None}):  # the second is damaged
        describe_checkpoint(theirs, shape=SHAPE, **form | other)
        assert problems_of(path, overrides) == []


def test_the_optimizer_of_what_the_run_has_saved_itself_counts(
    write: Write, recipe_data: dict[str, Any]
) -> None:
    """Its recipe may have changed since."""
    path, unsharded = write(recipe_data), "layout.distributed_optimizer=false"
    write_checkpoint(Path("runs/tiny/one/step_00000004"))
    (problem,) = problems_of(path, [unsharded])
    said = "cannot be saved with layout.distributed_optimizer: true and continued with false"
    assert problem == f"stages.one: the optimizer of runs/tiny/one/step_00000004 {said}: undo that"
    write_checkpoint(Path("runs/tiny/one/step_00000010"))  # done
    (problem,) = problems_of(path, [unsharded])
    assert problem.startswith(
        f"stages.two.carry.optimizer: found true; that of runs/tiny/one/step_00000010 {said}"
    )
    assert problems_of(path, [unsharded, "stage.two.layout.distributed_optimizer=true"]) == []


def test_both_steps_and_tokens(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe_data["stages"][0]["tokens"] = "8K"
    assert problems_of(write(recipe_data), []) == ["stages.one: found both of steps and tokens; give one"]


def test_the_data_of_a_stage_that_is_done_may_be_gone(
    write: Write, recipe_data: dict[str, Any], workdir: Path
) -> None:
    path, gone = write(recipe_data), ["stage.one.mixture={gone: 1}"]
    for step, problems in ((9, 1), (10, 0)):
        write_checkpoint(workdir / f"runs/tiny/one/step_{step:08}")
        assert len(problems_of(path, gone)) == problems
    (workdir / "runs/tiny/one/latest").write_text("step_00000009\n")  # put back: the last step is made again
    assert len(problems_of(path, gone)) == 1


def test_the_model_may_be_gone_once_no_stage_is_to_start_from_it(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any], workdir: Path
) -> None:
    gone = (write(recipe_data), "model.path=gone", "stage.one.mixture=mock", "stage.two.mixture=mock")
    again = "stage.two.carry={weights: false, optimizer: false}"
    assert prolong("recipe", "check", *gone)[0] == 2
    write_checkpoint(workdir / "runs/tiny/one/step_00000004")
    write_tokenizer(workdir / "runs/tiny/hf", SHAPE.vocab_size)
    assert prolong("recipe", "check", *gone)[::2] == (0, "")
    for command in (("train", "--check"), ("launch",), ("plan", "--gpus", 8), ("status",)):
        code, _, err = prolong(*command, *gone)
        assert code == 0, err
    assert "model.path: gone: no such directory" in prolong("recipe", "check", *gone, again)[2]
    write_checkpoint(workdir / "runs/tiny/two/step_00000004")
    assert prolong("recipe", "check", *gone, again)[0] == 0


def test_fp8_needs_cuda(write: Write, recipe_data: dict[str, Any]) -> None:
    path = write(recipe_data)
    assert problems_of(path, ["precision=fp8"]) == []
    assert problems_of(path, ["stage.two.precision=fp8", "fp8_parameters=true"]) == []
    assert problems_of(path, ["precision=fp8"], on_cpu=True) == [
        "precision: found fp8; it needs CUDA, and this machine has none: use bf16 or fp32"
    ]
    assert problems_of(path, ["stage.two.precision=fp8"], on_cpu=True)[0].startswith("stages.two.precision")


def test_duplicate_and_reserved_stage_names(write: Write, recipe_data: dict[str, Any]) -> None:
    first, second = recipe_data["stages"]
    second["name"] = "one"
    assert problems_of(write(recipe_data), []) == [
        "stages.one: 2 stages have this name; names must be unique"
    ]
    for first["name"] in ("export", "latest"):
        assert "reserved" in problems_of(write(recipe_data), [])[0]


TEN_MISTAKES = """\
name: ten
model: {path: model}
layout: {tp: 16, cp_exchange: ring}        # two
precision: fp16
optimizer: {beta1: 1.5}
stages:
  - name: one
    sequence_length: 1K
    batch_tokens: 1500
    steps: 10
    tokens: 1M                             # as well as steps
    lr: -1e-5
    warmpu: 0.1
    mixture: {books: 0.5, absent: 0.6}     # two
"""


def test_ten_mistakes_are_reported_at_once(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(TEN_MISTAKES))
    lines = str(caught.value).splitlines()
    expected = [
        "recipe.yaml:3: layout.tp: found 16; must divide the model's num_heads 8 and num_kv_heads 4",
        "recipe.yaml:3: layout.cp_exchange: found 'ring'",
        "recipe.yaml:4: precision: found 'fp16'",
        "recipe.yaml:5: optimizer.beta1: found 1.5; must be less than 1",
        "recipe.yaml:9: stages.one.batch_tokens: found 1500; must be a multiple of sequence_length, 1024",
        "recipe.yaml:7: stages.one: found both of steps and tokens; give one",
        "recipe.yaml:12: stages.one.lr: found '-1e-5'; must be greater than 0",
        "recipe.yaml:13: stages.one.warmpu: unknown key; did you mean stages.one.warmup?",
        "recipe.yaml:14: stages.one.mixture: the proportions sum to 1.1; they must sum to 1",
        "recipe.yaml:14: stages.one.mixture.absent: no such directory",
    ]
    assert lines[0] == "recipe.yaml: the recipe has 10 problems:"
    for message in expected:
        assert sum(message in line for line in lines) == 1, message


def test_a_misspelt_required_key_is_two_problems(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe_data["modle"] = recipe_data.pop("model")
    assert problems_of(write(recipe_data), []) == [
        "model: required, but not given",
        "modle: unknown key; did you mean model?",
    ]


def test_warnings_do_not_stop_a_run(write: Write, recipe_data: dict[str, Any]) -> None:
    findings = find_problems(load_recipe(write(recipe_data), ["stage.two.rope_base=1e4"]))
    assert findings.errors == []
    assert "found 10000, below the incoming 500000" in findings.warnings[0]
    bases = ["stage.one.rope_base=8e6", "stage.two.rope_base=5e6"]
    (lower,) = find_problems(load_recipe(write(recipe_data), bases)).warnings
    assert "stages.two.rope_base: found 5e+06, below the incoming 8e+06" in lower
    yarn = ["stage.two.yarn.factor=2", "stage.two.yarn.original_length=1K"]
    (short,) = find_problems(load_recipe(write(recipe_data), yarn)).warnings
    assert short.endswith("stages.two.yarn.factor: found 2, which reaches to 2048 tokens; 4096 need 4")
    (idle, _) = find_problems(load_recipe(write(recipe_data)), 16).warnings
    assert "16 data-parallel ranks share a batch of 8 sequences" in idle
    (Path("model") / "tokenizer.json").unlink()
    findings = find_problems(load_recipe(write(recipe_data)))
    assert findings.errors == [] and "no tokenizer.json" in findings.warnings[0]


def test_the_same_data_again_should_have_another_seed(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe_data["stages"][1] |= {"sequence_length": "1K", "mixture": {"books": 0.5, "code": 0.5}}
    path = write(recipe_data)
    (warning,) = find_problems(load_recipe(path)).warnings
    assert "stages.two.seed: found 42, as in stage one, whose samples it draws again" in warning
    for other in (
        "stage.two.seed=7",
        "stage.two.sequence_length=4K",
        "stage.two.mixture={books: 1}",
        "stage.two.carry={weights: false, optimizer: false}",
    ):
        assert find_problems(load_recipe(path, [other])).warnings == []
    write_checkpoint(Path("runs/tiny/two/step_00000001"))
    assert find_problems(load_recipe(path)).warnings == []


def test_samples_that_another_run_has_trained_on_should_be_drawn_with_another_seed(
    write: Write, recipe_data: dict[str, Any]
) -> None:
    first, second = recipe_data["stages"]
    one, three = {**first, "steps": 2}, {**second, "name": "three", "mixture": {"code": 1.0}}
    theirs = Path("runs/earlier/two/step_00000032")
    write_checkpoint(theirs)
    describe_checkpoint(theirs, "training", SHAPE, stage="two", step=32)
    earlier = {**recipe_data, "stages": [one, second, three]}
    (theirs / "recipe.yaml").write_text(dump_recipe(load_recipe(write(earlier, "earlier.yaml"))))
    path = write(recipe_data | {"model": {"path": "runs/earlier/two"}, "stages": [second, first, three]})

    def warnings(*overrides: str) -> list[str]:
        return find_problems(load_recipe(path, overrides)).warnings

    again, as_well = warnings()  # three was not trained yet
    assert "stages.two.seed: found 42, as in stage two of runs/earlier/two, whose samples it draws" in again
    assert "stages.one.seed: found 42, as in stage one of runs/earlier/two, whose" in as_well
    assert warnings("stage.two.seed=7", "stage.one.seed=7") == []
    anew = "stage.one.carry={weights: false, optimizer: false}"  # from the same model again
    assert warnings(anew) == [again, as_well]
    (theirs / "recipe.yaml").write_text(
        dump_recipe(load_recipe(Path("earlier.yaml"), ["stage.two.carry={weights: false, optimizer: false}"]))
    )
    assert warnings() == [again]


def test_a_stage_of_another_run_is_a_model(write: Write, recipe_data: dict[str, Any]) -> None:
    raised = SHAPE.replace(rope_base=8e6)
    write_checkpoint(Path("runs/earlier/64k/step_00000125"), raised)
    overrides = ["model.path=runs/earlier/64k", "stage.one.carry.optimizer=true"]
    recipe = load_recipe(write(recipe_data), overrides)
    findings = find_problems(recipe)
    assert (findings.errors, findings.warnings) == ([], [])
    assert incoming_shape(recipe) == raised


def test_a_stage_of_another_run_should_be_finished(
    prolong: Callable[..., tuple], write: Write, recipe_data: dict[str, Any]
) -> None:
    """A job that was preempted ends as one that is done, and leaves as many files."""
    checkpoint = Path("runs/earlier/one/step_00000009")
    write_checkpoint(checkpoint)
    (checkpoint / "recipe.yaml").write_text(dump_recipe(load_recipe(write(recipe_data))))
    overrides = ["model.path=runs/earlier/one"]
    for step, said in ((9, True), (10, False)):
        describe_checkpoint(checkpoint, "training", SHAPE, stage="one", step=step)
        for command in (["recipe", "check"], ["train", "--check"]):
            code, _, err = prolong(*command, write(recipe_data), *overrides)
            assert code == 0
            assert ("step_00000009 is step 9 of the 10 of stage one: finish" in err) == said
    (checkpoint / "recipe.yaml").write_text("of: another version")
    assert find_problems(load_recipe(write(recipe_data), overrides)).warnings == []


def test_an_initial_model(write: Write, recipe_data: dict[str, Any]) -> None:
    sizes = {"num_layers": 4, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 128}
    recipe_data["model"] = {"init": sizes, "tokenizer": "model"}
    recipe = load_recipe(write(recipe_data))
    check(recipe, 8)
    assert incoming_shape(recipe).vocab_size == SHAPE.vocab_size

    path = write(recipe_data)
    assert problems_of(path, ["model.init.num_heads=7"]) == [
        "model.init.num_heads: found 7; must divide hidden_size, 64",
        "model.init.num_kv_heads: found 4; must divide num_heads, 7",
    ]
    (odd,) = problems_of(path, ["model.init.hidden_size=72"])
    assert odd.startswith("model.init: its head size is 9; ") and odd.endswith("so it must be even")
    del recipe_data["model"]["tokenizer"]
    assert problems_of(write(recipe_data), []) == [
        "model.tokenizer: required with init: it sets the vocabulary size"
    ]
    recipe_data["model"]["path"] = "model"
    assert "model: found both of path and init; give one" in problems_of(write(recipe_data), [])


def test_an_empty_or_broken_domain(write: Write, recipe_data: dict[str, Any], workdir: Path) -> None:
    write_domain(workdir / "empty", ["input_ids"], samples=0)
    write_domain(workdir / "other", ["text"])
    write_domain(workdir / "broken", ["input_ids"])
    (workdir / "broken" / "index.json").write_text("{")
    write_domain(workdir / "foreign", ["input_ids"])
    (workdir / "foreign" / "index.json").write_text('{"shards": [{"samples": null, "column_names": [1]}]}')
    path = write(recipe_data)
    for name, message in (
        ("empty", "lists no samples"),
        ("other", "no column input_ids"),
        ("broken", "JSON"),
        ("foreign", "lists no shards"),
    ):
        (problem,) = problems_of(path, [f"stage.one.mixture={{{name}: 1.0}}"])
        assert message in problem


@pytest.mark.parametrize("suffix", ["", ":uint8", ":uint32", ":int64", ":uint32:1024"])
def test_masks_of_any_integers(write: Write, recipe_data: dict[str, Any], workdir: Path, suffix: str) -> None:
    """datatools packs them as uint32."""
    write_domain(
        workdir / "chats", ["input_ids", "mask"], encodings={**ENCODINGS, "mask": f"ndarray{suffix}"}
    )
    assert problems_of(write(recipe_data), ["stage.one.loss_mask=true", "stage.one.mixture={chats: 1}"]) == []


@pytest.mark.parametrize(
    ("column", "encoding", "numbers"),
    [
        ("mask", "ndarray:float32", "integers"),
        ("mask", "uint8", "integers"),
        ("mask", "json", "integers"),
        ("input_ids", "ndarray:int64", "uint32"),
    ],
)
def test_columns_of_other_kinds_are_found_before_the_run(
    write: Write, recipe_data: dict[str, Any], workdir: Path, column: str, encoding: str, numbers: str
) -> None:
    write_domain(workdir / "chats", ["input_ids", "mask"], encodings={**ENCODINGS, column: encoding})
    (problem,) = problems_of(write(recipe_data), ["stage.one.loss_mask=true", "stage.one.mixture={chats: 1}"])
    assert problem.startswith(f"stages.one.mixture.chats: its column {column} is {encoding}; ")
    assert f"arrays of {numbers}" in problem


def test_data_of_another_tokenizer(write: Write, recipe_data: dict[str, Any], workdir: Path) -> None:
    """Its ids are within the vocabulary, so nothing else would notice."""
    path = write(recipe_data)
    write_tokenizer(workdir / "smaller", SHAPE.vocab_size - 1)
    index = json.loads((workdir / "books" / "index.json").read_text())
    for made_with, said in (
        ("model", []),
        ("smaller", ["stages.one.mixture.books", "stages.two.mixture.books"]),
    ):
        known = tokenizer_fingerprint(workdir / made_with)
        (workdir / "books" / "index.json").write_text(json.dumps(index | {"tokenizer": known}))
        problems = problems_of(path, [])
        assert len(problems) == len(said)
        for problem, key in zip(problems, said, strict=True):
            model = tokenizer_fingerprint(workdir / "model")
            message = f"another tokenizer (fingerprint {known}) than the model's ({model})"
            assert f"{key}: its tokens were made with {message}" in problem
    (workdir / "model" / "tokenizer.json").unlink()
    assert problems_of(path, []) == []  # nothing to compare with


def test_a_fingerprint_is_that_of_the_ordinary_tokens() -> None:
    """Llama-3 and Llama-3.1 name their reserved tokens differently; some vocabularies list such tokens too."""

    def tokenizer(vocabulary: object, *special: str) -> dict[str, Any]:
        added = [{"id": 7, "content": token, "special": True} for token in special]
        return {"model": {"vocab": vocabulary}, "added_tokens": added}

    plain = fingerprint(tokenizer({"a": 0, "b": 1}))
    assert len(plain) == 16
    assert fingerprint(tokenizer({"b": 1, "a": 0}, "<|reserved_special_token_2|>")) == plain
    assert fingerprint(tokenizer({"a": 0, "b": 1, "<|python_tag|>": 2}, "<|python_tag|>")) == plain
    assert fingerprint(tokenizer([["a", -1.5], ["b", -2.0]])) == plain
    assert plain not in {
        fingerprint(tokenizer({"a": 1, "b": 0})),
        fingerprint(tokenizer({"a": 0, "b": 1, "c": 2})),
    }


def test_checking_changes_nothing(write: Write, recipe_data: dict[str, Any]) -> None:
    recipe = load_recipe(write(recipe_data))
    before = recipe.model_dump()
    check(recipe, 8)
    assert recipe.model_dump() == before
