"""Loading: YAML, overrides, and everything that can be wrong with them, reported at once."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_moe.config import Config, ConfigError, dump_config, load_config
from dist_moe.config.messages import field_paths
from dist_moe.config.renamed_keys import load_stored_config
from dist_moe.config.yaml_io import parse, render
from dist_moe.errors import ABSENT
from dist_moe.policies.registry import POLICIES
from tests.unit.config.files import DEBUG, debug

SMALLEST = """
model: {architecture: qwen3_moe, config: {}}
data: {sequence_length: 8}
train: {steps: 1, global_batch_size: 2, micro_batch_size: 1, learning_rate: 1e-3}
"""


def refused(*overrides: str, path: Path = DEBUG) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.violations)
    return lines


def test_defaults_are_those_of_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "smallest.yaml"
    path.write_text(SMALLEST)
    config = load_config(path)
    assert (config.run.seed, config.run.threads, config.run.dir) == (0, "auto", "runs/default")
    assert (config.balance.policy, config.balance.rate, config.parallel.zero_stage) == ("loss_free", 0.001, 1)
    assert config.router.top_k is None
    assert config.train.schedule_steps is None
    assert config.train.betas == (0.9, 0.95)
    assert config.train.learning_rate == 1e-3
    assert config.data.sources == ["stdlib-code"]


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones() -> None:
    config = debug("train.steps=7", "train.steps=9", "train.betas=[0.8, 0.9]", "run.threads=2", "router.score=softmax")
    assert (config.train.steps, config.train.betas) == (9, (0.8, 0.9))
    assert (config.run.threads, config.router.score) == (2, "softmax")
    assert config.train.global_batch_size == 12


def test_an_override_reaches_below_free_mappings() -> None:
    config = debug("model.config.hidden_size=96", "train.deepspeed.zero_optimization.reduce_bucket_size=1e6")
    assert config.model.config["hidden_size"] == 96
    assert config.model.config["kv_lora_rank"] == 16
    assert config.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1e6}}


def test_an_override_may_hold_an_equals_sign() -> None:
    assert debug("run.dir=runs/rate=3").run.dir == "runs/rate=3"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stepps=4", "train.stepps=4 is not a key of train; did you mean train.steps?"),
        ("run.thread=3", "run.thread=3 is not a key of run; did you mean run.threads?"),
        ("trian.steps=3", 'trian={"steps": 3} is not a section; did you mean train?'),
        ("micro_batch=7", "micro_batch=7 is not a section; did you mean train.micro_batch_size?"),
        ("interval=7", "interval=7 is not a section; did you mean checkpoint.interval or observe.interval?"),
        ("run.top_k=1", "run.top_k=1 is not a key of run; did you mean router.top_k?"),
        (
            "run.qqqqqq=1",
            "run.qqqqqq=1 is not a key of run; the known keys are dir, seed, threads, bind_cores and keep_memory",
        ),
        ("checkpoint={true: x}", "checkpoint.true=x is not a key of checkpoint; the known keys are interval, "),
        ("slurm.time=abc", "slurm.time=abc is not a key of slurm; the known keys are nodes, "),
        ("slurm.time_limit=3", "slurm.time_limit=3 is not a key of slurm; the known keys are nodes, "),
        ("time=abc", "time=abc is not a section; the sections are run, task, model, "),
        ("checkpoint={2024-01-01: x}", "checkpoint.2024-01-01=x is not a key of checkpoint; the known keys are "),
        ("checkpoint={3: x}", "checkpoint.3=x is not a key of checkpoint; the known keys are interval, "),
        ("foo", "override=foo is not of the form key=value; write for example train.steps=20"),
        ("a..b=1", "override=a..b=1 is not of the form key=value; write for example train.steps=20"),
        (
            "run.dir.x=1",
            "run.dir=runs/debug has no keys below it, so run.dir.x cannot be set; give the key of a value",
        ),
        (
            "run.dir=[",
            "run.dir=[ is not valid YAML (while parsing a flow node, expected the node content, but found "
            "'<stream end>', line 1, column 2); quote the value: key='\"text\"'",
        ),
        (
            "run.dir=07",
            "run.dir=07 is not valid YAML (07 is octal in YAML 1.1 and decimal in YAML 1.2, so write it without the "
            "leading zero, line 1, column 1); quote the value: key='\"text\"'",
        ),
        (
            os.fsdecode(b"data.sources=[caf\xe9.txt]"),
            "data.sources=[caf\udce9.txt] has bytes that are not UTF-8; rename the file, or give a pattern such as "
            "texts/*.txt that matches its name",
        ),
        (
            os.fsdecode(b"run.d\xefr=x"),
            "run.d\udcefr=x has bytes that are not UTF-8; rename the file, or give a pattern such as "
            "texts/*.txt that matches its name",
        ),
        ("model=3", "model=3 is not a mapping; write its keys below it"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, line: str) -> None:
    (found,) = refused(override)
    assert found == line or (line.endswith((", ", "are ")) and found.startswith(line))


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("train.steps=0", "train.steps=0 should be greater than or equal to 1; give the optimizer steps"),
        ("train.steps=true", "train.steps=true should be a whole number;"),
        ("train.steps='20'", "train.steps=20 should be a whole number;"),
        ("train.steps=20.0", "train.steps=20.0 should be a whole number;"),
        ("train.learning_rate=.inf", "train.learning_rate=Infinity should be a finite number;"),
        ("train.precision=fp8", "train.precision=fp8 should be 'auto', 'fp32' or 'bf16';"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.9, 2]", "train.betas[1]=2 should be less than 1;"),
        ("run.threads=x", "run.threads=x should be a whole number or 'auto';"),
        ("run.threads=0", "run.threads=0 should be greater than or equal to 1 or 'auto';"),
        ("parallel.zero_stage=true", "parallel.zero_stage=true should be 0, 1 or 2;"),
        ("parallel.zero_stage=3", "parallel.zero_stage=3 should be 0, 1 or 2;"),
        ("parallel.timeout_s=0", "parallel.timeout_s=0 should be greater than or equal to 1;"),
        ("data.sources=[]", "data.sources=[] is empty; give the sources of text"),
        ("run.dir=", "run.dir=null should be a text; give the folder that the run writes to"),
        ("observe.tensorboard=3", "observe.tensorboard=3 should be true or false; say whether TensorBoard event files"),
        ("run.dir=''", 'run.dir="" is empty;'),
        ("kubernetes.image=", "kubernetes.image=null should be a text; give the container image, such as "),
        ("kubernetes.memory=lots", "kubernetes.memory=lots does not have the required form; give the memory of each"),
        (
            "kubernetes.claim=A_b",
            "kubernetes.claim=A_b does not have the required form; give the PersistentVolumeClaim",
        ),
        ("cluster.hosts=[a]", "cluster.hosts[0]=a should be a mapping; give the hosts, each with `name: host0`, "),
        ("cluster.environment=[A B]", "cluster.environment[0]=A B is not the name of an environment variable ("),
        ("cluster.environment=[a.b]", "cluster.environment[0]=a.b is not the name of an environment variable ("),
        ("train.betas=[0.1, 0.2, 0.3]", "train.betas=[0.1, 0.2, 0.3] has too many values; give the decay rates"),
        ("train.betas=3", "train.betas=3 should be a list; give the decay rates"),
        ("train.warmup_steps=x", "train.warmup_steps=x should be a number; give the optimizer steps of linear warmup"),
        ("train.learning_rate=x", "train.learning_rate=x should be a number; give the peak learning rate"),
        (
            "run.seed=99999999999999999999",
            "run.seed=99999999999999999999 should be less than 4294967296; give the seed of the initial weights and of "
            "the order of the data (0 to 4294967295)",
        ),
        ("parallel.timeout_s=1e-9", "parallel.timeout_s=1e-09 should be greater than or equal to 1; give the timeout"),
        ("data.sources=[1]", "data.sources[0]=1 should be a text;"),
        ("data.sequence_length=1", "data.sequence_length=1 should be greater than or equal to 2;"),
        ("data.validation_fraction=1", "data.validation_fraction=1 should be less than 1;"),
        ("router.selection=top_p", "router.selection=top_p should be 'top_k', 'threshold', 'expert_threshold', 'uni"),
        (
            "balance.policy=null",
            "balance.policy=null should be 'none', 'loss_free', 'adaptive_weight',",
        ),
        ("model.architecture=phimoe", "model.architecture=phimoe should be 'deepseek_v3', 'qwen3_moe', "),
    ],
)
def test_a_wrong_value_is_refused_with_the_meaning_of_its_field(override: str, start: str) -> None:
    (line,) = refused(override)
    assert line.startswith(start)
    assert "; give the " in line or "; say whether " in line


def test_all_unknown_missing_and_invalid_keys_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("run: {seed: -1}\nmodell: {}\ntrain: {steps: 3, warmup: 4}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["nothing", "data.tokenizer=words"])
    found = {violation.key for violation in caught.value.violations}
    assert found == {
        *("override", "run.seed", "modell", "train.warmup", "data.tokenizer"),
        *("model", "data.sequence_length", "train.global_batch_size", "train.learning_rate"),
    }
    missing = next(violation for violation in caught.value.violations if violation.key == "train.global_batch_size")
    assert missing.value is ABSENT
    assert str(missing).startswith("train.global_batch_size is missing; give the sequences of one optimizer step")


KINDS = (
    *("train.stepz=3", "observe.interval=0", "train.micro_batch=2", "foo", "balance.rate=-1"),
    *("train.momentum=0.5", "parallel.expert_parallel=5", "router.top_k=3", "model.config.hiden_size=4"),
    *("balance.clip=2.0", "data.sequence_length=500"),
)


def test_violations_of_every_kind_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, KINDS, workers=5)
    assert {violation.key for violation in caught.value.violations} == {
        *("train.stepz", "observe.interval", "train.micro_batch", "override", "balance.rate"),
        *("train.momentum", "parallel.expert_parallel", "router.top_k", "model.config.hiden_size"),
        *("balance.clip", "data.sequence_length", "train.global_batch_size"),
    }


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ("train.optimiser=sgd train.momentum=0.5", "train.optimiser"),
        ("train.optimizer=adam train.momentum=0.5", "train.optimizer"),
        ("train.steps=x train.warmup_steps=30", "train.steps"),
        ("train.global_batch_size=0 train.micro_batch_size=5", "train.global_batch_size"),
        ("balance.policy=adaptive balance.clip=2.0", "balance.policy"),
        ("router.group=4 router.topk_groups=4", "router.group"),
        ("model.architecture=phimoe router.top_k=30 model.config.hiden_size=4", "model.architecture"),
        ("model.config=3 parallel.expert_parallel=5", "model.config"),
        ("train=3 data.sequence_length=500", "train data.sequence_length"),
        ("slurm.signal_s=x slurm.minutes=1", "slurm.signal_s"),
    ],
)
def test_a_rule_that_reads_a_broken_field_is_not_checked(overrides: str, keys: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, overrides.split(), workers=2)
    assert [violation.key for violation in caught.value.violations] == keys.split()


def test_the_entries_of_a_list_of_sections_are_located() -> None:
    wrong = "cluster.hosts=[{name: a}, {slots: 0, name: '-b', port: 3}, {slots: 2}, 4]"
    lines = refused(wrong, "observe.interval=0")
    assert [line.split("=")[0] for line in lines[:3]] == [
        *("observe.interval", "cluster.hosts[1].name", "cluster.hosts[1].slots")
    ]
    assert lines[1].startswith("cluster.hosts[1].name=-b is not a valid name of a host")
    assert lines[3].startswith("cluster.hosts[1].port=3 is not a key of cluster.hosts[1]; did you mean cluster.")
    assert lines[4].startswith("cluster.hosts[2].name is missing; give the name")
    assert lines[5].startswith("cluster.hosts[3]=4 ")


def test_rules_of_the_workers_are_left_out_where_those_are_not_known() -> None:
    wrong = ("train.stepz=3", "train.micro_batch_size=5", "parallel.expert_parallel=5")
    assert [line.split("=")[0] for line in refused(*wrong)] == ["train.stepz"]
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, wrong, workers=2)
    assert [violation.key for violation in caught.value.violations] == [
        *("train.stepz", "train.micro_batch_size", "parallel.expert_parallel")
    ]


def test_a_rule_within_a_section_is_reported_along_with_its_other_violations() -> None:
    lines = refused("slurm.nodes=0", "slurm.minutes=1")
    assert lines[0].startswith("slurm.nodes=0 ") and "slurm.signal_s=120 is not less than" in lines[1]


def test_deepspeed_keys_that_a_field_sets_are_refused() -> None:
    wrong = "train.deepspeed={fp16: {}, optimizer: 1, zero_optimization: {stage: 3, offload_optimizer: {}}}"
    assert refused(wrong) == [
        "train.deepspeed.optimizer=1 is not set here; remove it; train.optimizer sets it in DeepSpeed",
        "train.deepspeed.zero_optimization.stage=3 is not set here; remove it; "
        "parallel.zero_stage sets it in DeepSpeed",
    ]
    assert len(refused("train.deepspeed.zero_optimization=3")) == 1
    assert refused("train.deepspeed={7: 3}")[0].startswith("train.deepspeed.7=3 is not a key of DeepSpeed; ")
    assert refused("train.deepspeed=3")[0].startswith("train.deepspeed=3 should be a mapping; ")
    assert debug("train.deepspeed=null").train.deepspeed == {}
    allowed = debug("train.deepspeed={zero_optimization: {overlap_comm: false}, communication_data_type: fp32}")
    assert allowed.train.deepspeed == {"communication_data_type": "fp32"}, "what has no effect is not passed on"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"run: [", "is not valid YAML"),
        (b"run: {seed: 1}\nrun: {seed: 2}", 'found a second key "run", line 2, column 1'),
        (b"run: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"run: {dir: \xff}", "is not UTF-8"),
        (b"- a\n- b", "holds a list, not a mapping"),
        (b"words", "holds a text, not a mapping"),
        (b"3", "holds a whole number, not a mapping"),
    ],
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    (line,) = refused(path=path)
    assert line.startswith(str(path))
    assert rule in line


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(path=tmp_path / "nothing.yaml")[0]
    assert "cannot be used (it is not a regular file)" in refused(path=tmp_path)[0]


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(SMALLEST + "run:\nobserve:\n  # interval: 3\n")
    assert load_config(path).observe.interval == 10
    path.write_text("")
    assert {line.split(" ")[0] for line in refused(path=path)} == {"model", "data", "train"}


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    for text in ("1e-6", "1E+2", "3.e2", "5.0e1", ".5e1", "-.5e1", "-2e3"):
        assert debug(f"model.config.rms_norm_eps={text}").model.config["rms_norm_eps"] == float(text)
    assert debug("run.dir='1e-6'").run.dir == "1e-6"


def test_a_configuration_is_frozen() -> None:
    config = debug()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
free = st.dictionaries(
    st.text(), st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
# A path has no NUL, and begins with the home folder of a user after a tilde.
texts = st.text(min_size=1).filter(lambda text: "\0" not in text and not text.startswith("~"))
names = texts | st.sampled_from(["1e-6", "on", "null", "0o7", "12:30", "2024-01-01", " a ", "a: b"])


keys_of = st.sampled_from(sorted({*field_paths(), *Config.model_fields, "x", "train.y", "cluster.hosts"}))
junk = plain | st.recursive(
    plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(plain | st.just("name"), inner, max_size=2)
)


@settings(max_examples=80, deadline=None)
@given(changes=st.dictionaries(keys_of, junk, min_size=1, max_size=4))
def test_any_settings_load_or_are_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_text("".join(f"{line}\n" for line in SMALLEST.splitlines()), encoding="utf-8")
    overrides = [f"{key}={render(value).removesuffix('...').strip()}" for key, value in changes.items()]
    try:
        load_config(path, overrides)
    except ConfigError as error:
        assert error.violations


@settings(max_examples=60, deadline=None)
@given(keys=free, name=names, rate=st.floats(0, 1e9), betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_what_is_dumped_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, keys: dict, name: str, rate: float, betas: tuple[float, float]
) -> None:
    start = debug()
    changed = start.model_copy(
        update={
            "model": start.model.model_copy(update={"config": keys}),
            "run": start.run.model_copy(update={"dir": name}),
            "train": start.train.model_copy(update={"learning_rate": rate, "betas": betas}),
        }
    )
    path = tmp_path_factory.mktemp("dumped") / "config.yaml"
    path.write_text(dump_config(changed), encoding="utf-8")
    assert load_config(path) == changed


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}", "found a second key"),
        ("a: 010", "010 is octal in YAML 1.1 and decimal in YAML 1.2"),
        ("a: -_", "'-_' is not an integer"),
    ],
)
def test_yaml_that_readers_may_read_differently_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(text)


@pytest.mark.parametrize("text", ["yes", "on", "N", "12:30", "0o17", "017", "-_", "1e-6", "null", ".5e1"])
def test_text_that_looks_like_another_value_stays_text(text: str) -> None:
    """For a reader of YAML 1.1 too, such as PyYAML."""
    rendered = render({"a": text})
    assert parse(rendered) == yaml.safe_load(rendered) == {"a": text}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_of_a_complete_configuration_can_be_replaced(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "complete.yaml"
    path.write_text(dump_config(debug()))
    assert load_config(path, [f"balance.policy={policy}"]).balance.policy == policy
    assert load_stored_config(path, [f"balance.policy={policy}"]).balance.policy == policy


@pytest.mark.parametrize("value", ["[]", "[0.9]"])
def test_a_list_with_too_few_values_says_so(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        debug(f"train.betas={value}")
    assert str(caught.value) == (
        f"train.betas={value} has too few values; give the decay rates of the two moments of adamw, a list of two "
        "numbers (0 to below 1)"
    )
