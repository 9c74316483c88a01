"""The configuration: every option composes, values come out typed, and mistakes are named."""

import dataclasses
import re

import pytest

from launcher import config as schemas
from launcher.checks import validate
from launcher.cli.compose import CommandLine, check, load
from launcher.config import (
    AdafactorConfig,
    AdamwConfig,
    Config,
    CustomConfig,
    DigitsDataConfig,
    GptConfig,
    ImagesDataConfig,
    MoeConfig,
    SgdConfig,
    SyntheticDataConfig,
    TextDataConfig,
    WrnConfig,
    conf_dir,
)
from launcher.errors import ConfigError

OPTIONS = sorted(
    (folder.name, file.stem)
    for folder in conf_dir().iterdir()
    if folder.is_dir()
    for file in folder.glob("*.yaml")
)
CUSTOM = ("model=custom", "model.target=package.module:build")

# What some options cannot do without.
REQUIRED = {
    ("model", "custom"): ("model.target=package.module:build",),
    ("parallel", "from_file"): ("parallel.path=plan.json",),
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    plus = "+" if group == "recipe" else ""
    config = load([f"{plus}{group}={option}", *REQUIRED.get((group, option), ())])
    assert isinstance(config, Config)


@pytest.mark.parametrize(("group", "option"), schemas.SCHEMAS)
def test_every_schema_has_its_option(group, option):
    config = load([f"{group}={option}", *REQUIRED.get((group, option), ())])
    chosen = {"model": config.model, "data": config.data, "optimizer": config.optimizer}[group]
    assert type(chosen) is schemas.SCHEMAS[group, option]
    assert chosen.name == option


def test_defaults_are_the_first_light():
    config = load()
    assert config.mode == "train"
    assert isinstance(config.model, GptConfig)
    assert (config.cluster.name, config.parallel.name, config.runtime.name) == (
        "local",
        "auto",
        "auto",
    )
    assert isinstance(config.data, TextDataConfig)
    assert isinstance(config.optimizer, AdamwConfig)
    assert config.logger.name == "wandb"


def test_composed_values_are_plain_python():
    config = load([*CUSTOM, "+model.args={hidden: 256, sizes: [1, 2]}", "logger.tags=[a,b]"])
    assert config.model.args == {"hidden": 256, "sizes": [1, 2]}
    assert type(config.model.args) is dict
    assert type(config.model.args["sizes"]) is list
    assert config.logger.tags == ["a", "b"]


def test_numbers_keep_their_types():
    config = load(["parallel.num_microbatches=8", "optimizer.learning_rate=1"])
    assert config.parallel.num_microbatches == 8
    assert type(config.optimizer.learning_rate) is float
    assert load().parallel.num_microbatches == "auto"


@pytest.mark.parametrize(
    ("overrides", "data", "optimizer"),
    [
        (["model=gpt"], TextDataConfig, AdamwConfig),
        (["model=moe"], TextDataConfig, AdafactorConfig),
        (["model=wrn"], DigitsDataConfig, SgdConfig),
        (CUSTOM, SyntheticDataConfig, AdamwConfig),
        # What the user says wins, also when it is the default of another model.
        (["model=wrn", "data=images", "optimizer=adamw"], ImagesDataConfig, AdamwConfig),
        (["optimizer=adamw", "model=moe"], TextDataConfig, AdamwConfig),
    ],
)
def test_a_model_brings_its_data_and_optimizer(overrides, data, optimizer):
    config = load(overrides)
    assert type(config.data) is data
    assert type(config.optimizer) is optimizer


def test_recipes_override_groups_and_the_user_overrides_recipes():
    config = load(["+recipe=rehearse", "model=wrn", "cluster=8xp3"])
    assert (config.runtime.name, config.model.size) == ("emulate", "tiny")
    assert isinstance(config.model, WrnConfig)
    assert isinstance(config.data, DigitsDataConfig)
    assert load(["+recipe=rehearse", "runtime=local", "train.steps=9"]).train.steps == 9
    paper = load(["+recipe=alpa_gpt_39b"])
    assert (paper.model.size, paper.cluster.name) == ("39b", "8xp3")


def test_hosts_override_any_cluster():
    assert load(["cluster=8xp3", "cluster.hosts=2"]).cluster.hosts == 2


def test_parallel_zero_means_two_unless_set():
    assert load(["parallel=zero"]).parallel.zero == 2
    assert load(["parallel=zero", "parallel.zero=3"]).parallel.zero == 3


@pytest.mark.parametrize("option", ["single", "data", "zero", "manual", "auto"])
def test_every_parallel_key_exists_under_every_choice(option):
    keys = {field.name: None for field in dataclasses.fields(load().parallel)}
    del keys["name"], keys["num_microbatches"]
    if option == "zero":
        keys["zero"] = 1
    values = ["null" if value is None else value for value in keys.values()]
    overrides = [f"parallel.{key}={value}" for key, value in zip(keys, values, strict=True)]
    assert load([f"parallel={option}", *overrides]).parallel.name == option


MISTAKES = [
    # A mistyped key, group or option.
    (["model.hiden=3"], "model.hiden=3: there is no key model.hiden: did you mean model.hidden?"),
    (["modle=gpt"], "modle=gpt: there is no key modle: did you mean mode or model?"),
    (["steps=3"], "did you mean train.steps?"),
    (["trian.steps=5"], "trian.steps=5: there is no key trian.steps: did you mean train.steps?"),
    (["+trian.steps=5"], "did you mean train.steps?"),
    (["trian.stepz=5"], "did you mean train.steps?"),
    (["modle.size=tiny"], "there is no key modle.size: did you mean model.size?"),
    (["cluster.devic.memory_gib=3"], "did you mean cluster.device.memory_gib?"),
    (["hydra.rn.dir=x"], "did you mean hydra.run.dir?"),
    (["trian.foo=1"], "there is no key trian.foo: did you mean train?"),
    (["size=tiny"], "did you mean model.size?"),
    (["train.foo=1"], "train has steps, global_batch, tokens, eval_every, eval_batches"),
    (["zzz=1"], "zzz=1: there is no key zzz: see all keys with --cfg job"),
    (["hydra.run.dirr=x"], "did you mean hydra.run.dir?"),
    (["model=gptt"], "model=gptt is unknown: did you mean model=gpt? There are custom, gpt"),
    (["optimizer=zzz"], "optimizer=zzz is unknown: take one of adafactor, adamw, sgd"),
    (["recipe=rehearse"], "write +recipe=rehearse to add it"),
    (["+recipe=zzz"], "recipe=zzz is unknown"),
    # A key that is added and nobody reads.
    (["+foo=1"], "+foo=1: there is no key foo"),
    (["+model.hiden=1"], "+model.hiden=1: there is no key model.hiden: did you mean model.hidden"),
    (["++train.foo=1"], "there is no key train.foo"),
    (["train={stepz: 5}"], "did you mean train.steps?"),
    (["+train.steps=5"], "+train.steps=5 is there already: write train.steps=5"),
    # A key of another option.
    (["model.experts=4"], "model.experts=4 is a key of model=moe only: leave it out, or take"),
    (["+model.experts=4"], "is a key of model=moe only"),
    (["optimizer.momentum=0.5"], "is a key of optimizer=sgd only"),
    ([*CUSTOM, "model.args.x=1"], "is a new entry: write +model.args.x=1 to add it"),
    (["model.name=moe"], "model.name=moe contradicts model=gpt: leave it out, or take model=moe"),
    # A wrong type.
    (["train.steps=two"], "train.steps=two is of the wrong type: give a whole number"),
    (["train.steps=1.5"], "train.steps=1.5 is of the wrong type: give a whole number"),
    (["train.steps=null"], "give a whole number"),
    (["model.hidden=x"], "give a whole number or null"),
    (["debug=maybe"], "give true or false"),
    (["logger.tags=a"], "give a list such as [a,b]"),
    (["optimizer.learning_rate=x"], "give a number"),
    (["+cluster.device.peak_tflops.fp8=x"], "fp8=x is of the wrong type: give a number"),
    (["train.trace_steps=10"], "train.trace_steps=10 is of the wrong type: give a list of steps"),
    (["train.profile_steps=[x]"], "train.profile_steps[0]: Value 'x' of type 'str'"),
    (["parallel.num_microbatches=true"], "give auto or a whole number"),
    (["parallel.num_microbatches=many"], "many is neither auto nor a number"),
    (["train=3"], "give one of its keys, such as train.steps=<value>"),
    (["hydra.mode=FAST"], "hydra.mode=FAST is of the wrong type: give another value or null"),
    (["hydra.sweep.dir=[1]"], "hydra.sweep.dir=[1] is of the wrong type: give a text"),
    (["hydra.job.env_copy=x"], "hydra.job.env_copy=x is of the wrong type: give a list"),
    (["model.hidden.x=3"], "model.hidden has no keys of its own"),
    # A missing value, or none to be had.
    (
        ["model=custom"],
        "model.target has no value: give model.target=my_package.my_module:build, a",
    ),
    (["train.steps=???"], "train.steps has no value"),
    (["~train.steps"], "~train.steps cannot be taken out: give it a value"),
    (["~train.steps=3"], "is not there with that value"),
    (["~model"], "model has no value: give model=custom or model=gpt or model=moe or model=wrn"),
    (["train.steps=${nope}"], "Interpolation key 'nope' not found"),
    # What cannot be read.
    (["seed"], "seed has no value: write seed=<value>"),
    (["data.path=a=b"], "data.path=a=b cannot be read"),
    (["seed=1,2"], "seed=1,2 has several values: add --multirun"),
    (["seed=range(1,3)"], "add --multirun to sweep over them"),
    (["logger=null"], "(command line: logger=null)"),
    # What comes with a later version.
    (["mode=submit"], "mode=submit is not in this version yet: take mode=train or plan"),
    # Checkpoints, and where a run begins.
    (["checkpoint.keep=0"], "checkpoint.keep=0 is less than 1: give checkpoint.keep=1 or more"),
    (["checkpoint.every_steps=-1"], "checkpoint.every_steps=-1 is less than 0"),
    (["resume=''"], "resume='' is empty and names no file: give a path, or leave it out"),
    (["mode=plan", "resume=a"], "resume=a contradicts mode=plan, which resumes nothing"),
    (["mode=plan", "replan=true"], "replan=true contradicts mode=plan, which resumes nothing"),
    (
        ["resume=none", "resume_weights_only=true"],
        "resume_weights_only=true contradicts resume=none: give resume=PATH",
    ),
    (
        ["model.weights=w", "resume=a"],
        "model.weights=w contradicts resume=a: the weights are those of one or the other",
    ),
    (
        ["model.weights=w", "resume_weights_only=true"],
        "contradicts resume=auto resume_weights_only",
    ),
    # What mode=profile measures.
    (["mode=profile", "runtime=emulate"], "runtime=emulate contradicts mode=profile"),
    (["profile.name=mine"], "profile.name=mine contradicts mode=train, which measures nothing"),
    # Virtual stages.
    (["parallel.virtual_stages=2"], "parallel.virtual_stages=2 contradicts parallel.schedule=null"),
    (
        ["parallel=data", "parallel.virtual_stages=2"],
        "contradicts parallel=data, which has one submesh with one stage: leave it out, or take "
        "parallel=manual parallel.pp=2 parallel.schedule=interleaved",
    ),
    (
        ["parallel=manual", "parallel.virtual_stages=2"],
        "leave it out, or take parallel.schedule=interleaved with parallel.pp=2 or more",
    ),
    (
        ["parallel.schedule=zb_h1", "parallel.virtual_stages=3"],
        "parallel.virtual_stages=3 contradicts parallel.schedule=zb_h1, which has one stage on a",
    ),
    (
        ["parallel.schedule=interleaved", "parallel.virtual_stages=1"],
        "parallel.virtual_stages=1 contradicts parallel.schedule=interleaved, which takes 2 or more",
    ),
    (
        ["parallel=data", "parallel.schedule=interleaved"],
        "parallel.schedule=interleaved contradicts parallel=data, which has one submesh: leave it out",
    ),
    (
        ["parallel=manual", "parallel.schedule=interleaved"],
        "needs several submeshes, and parallel.pp=null makes one: give parallel.pp=2 or more",
    ),
    (
        ["parallel.schedule=interleaved", "parallel.pp=4", "parallel.num_microbatches=6"],
        "parallel.num_microbatches=6 is no multiple of parallel.pp=4, by which "
        "parallel.schedule=interleaved groups them: give a multiple, such as "
        "parallel.num_microbatches=8",
    ),
    (["train.tokens=0"], "train.tokens=0.0 is less than 1"),
    (["train.tokens=inf"], "train.tokens=inf is not a finite number"),
    (["train.tokens=many"], "train.tokens=many is of the wrong type: give a number or null"),
    # A value that cannot be.
    (["mode=tune"], "mode=tune is unknown: take mode=train or plan"),
    (["model.dtype=fp8"], "model.dtype=fp8 is unknown: take model.dtype=auto or fp32"),
    (["seed=-1"], "seed=-1 is less than 0"),
    (["train.steps=0"], "train.steps=0 is less than 1: give train.steps=1 or more"),
    (["parallel.zero=4"], "parallel.zero=4 is more than 3: give 0 to 3"),
    (["model.dropout=1"], "model.dropout=1.0 is not less than 1"),
    (["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan is not a finite number"),
    (["model=moe", "model.capacity_factor=0"], "leaves the experts no room"),
    (["model=custom", "model.target=build"], "not of the form package.module:function"),
    (["parallel.name=both"], "parallel.name=both is unknown"),
    # Steps to look into that are not there, or in two ways.
    (["train.trace_steps=[0]"], "train.trace_steps=[0] names step 0, and train.steps=100: give"),
    (
        ["train.steps=5", "train.profile_steps=[2,9]"],
        "train.profile_steps=[2,9] names step 9, and train.steps=5: give steps from 1 to 5",
    ),
    (
        ["train.trace_steps=[2]", "train.profile_steps=[2,3]"],
        "step 2 is in train.trace_steps=[2], which waits after every instruction, and in",
    ),
    (
        ["mode=plan", "train.trace_steps=[2]"],
        "train.trace_steps=[2] contradicts mode=plan, which runs no step: leave it out",
    ),
    (["mode=eval", "train.profile_steps=[2]"], "train.profile_steps=[2] contradicts mode=eval"),
    # A size that does not divide.
    (["model.hidden=100", "model.heads=3"], "give a multiple, such as model.hidden=99"),
    (["model=moe", "model.hidden=10", "model.heads=4"], "model.hidden=10 does not divide by"),
    (
        ["train.global_batch=7", "parallel.num_microbatches=2"],
        "train.global_batch=7 does not divide by 2 (parallel.num_microbatches=2): give a multiple",
    ),
    (
        ["parallel=manual", "train.global_batch=8", "parallel.num_microbatches=2", "parallel.dp=3"],
        "does not divide by 6 (parallel.num_microbatches=2 times parallel.dp=3)",
    ),
    # A contradiction.
    (["parallel=single", "parallel.tp=2"], "or take parallel=manual parallel.tp=2"),
    (["parallel=data", "parallel.zero=2"], "or take parallel=zero parallel.zero=2"),
    (["parallel=zero", "parallel.zero=0"], "contradicts parallel=zero: leave it out, or take"),
    (["parallel=from_file"], "needs a plan, and parallel.path=null"),
    (["parallel=from_file", "parallel.path=p", "parallel.pp=2"], "whose plan file decides it"),
    (
        ["parallel=from_file", "parallel.path=p", "parallel.num_microbatches=2"],
        "parallel.num_microbatches=2 contradicts parallel=from_file",
    ),
    (["parallel.path=p"], "parallel.path=p contradicts parallel=auto"),
]


@pytest.mark.parametrize(("overrides", "text"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named_in_one_line(overrides, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        load(overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_value_from_a_file_is_named_too(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "bad.yaml").write_text("# @package _global_\ntrain:\n  steps: many\n")
    (folder / "typo.yaml").write_text("# @package _global_\ntrain:\n  stepz: 3\n")
    (folder / "broken.yaml").write_text("# @package _global_\ntrain: [3\n")
    for name, text in (
        ("bad", "recipe/bad.yaml: train.steps: Value 'many' of type 'str' could not be converted"),
        (
            "typo",
            "recipe/typo.yaml: train.stepz: there is no key train.stepz: did you mean train.steps?",
        ),
        ("broken", "while parsing a flow sequence"),
    ):
        line = CommandLine(overrides=(f"+recipe={name}",), config_dir=str(tmp_path))
        with pytest.raises(ConfigError, match=re.escape(text)):
            check(line)


def test_a_config_dir_adds_options(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [custom]\ntarget: mine:build\n")
    check(CommandLine(overrides=("model=mine",), config_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="is no folder: correct the path"):
        check(CommandLine(config_dir=str(tmp_path / "nowhere")))


def test_another_primary_config_must_have_the_schema(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nseed: 7\n")
    (tmp_path / "bare.yaml").write_text("seed: 7\n")
    check(CommandLine(config_name="mine", config_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="does not start from the launcher's schema"):
        check(CommandLine(config_name="bare", config_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="Cannot find primary config 'zzz'"):
        check(CommandLine(config_name="zzz"))


def test_every_point_of_a_sweep_is_checked(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params: {seed: '0,-3'}\n"
    )
    good = CommandLine(overrides=("seed=0,1", "model=gpt,wrn"), multirun=True)
    assert check(good) is None
    assert check(CommandLine(overrides=("hydra.mode=MULTIRUN", "seed=0,1"))) is None
    for overrides, text in (
        (("seed=0,x",), "seed=x is of the wrong type"),
        (("seed=range(-1,2)",), "seed=-1 is less than 0"),
        (("seed=0,1", "model=gpt,zzz"), "model=zzz is unknown"),
        (("+recipe=sweep",), "seed=-3 is less than 0"),
        (("optimizer.beta1=interval(0,1)",), "is no list of values"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            check(CommandLine(overrides=overrides, multirun=True, config_dir=str(tmp_path)))


def test_hydra_interpolations_have_values_already():
    config = load(["logger.group=${hydra:job.name}", "logger.project=${hydra:run.dir}"])
    assert config.logger.group == "launcher"
    assert config.logger.project.startswith("outputs/")


def test_checks_hold_for_configs_made_in_python():
    config = load()
    config.model = MoeConfig(hidden=10, heads=4)
    with pytest.raises(ConfigError, match=r"model\.hidden=10 does not divide by model\.heads=4"):
        validate(config)
    config.model = CustomConfig(target="a.b:c")
    validate(config)


def test_conf_is_found_in_a_checkout_and_in_a_package(tmp_path, monkeypatch):
    assert (conf_dir() / "config.yaml").is_file()
    package = tmp_path / "launcher"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr(schemas, "__file__", str(package / "config.py"))
    assert conf_dir() == package / "conf"
