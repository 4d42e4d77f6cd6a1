"""The YAML of a user and of a checkpoint as untrusted input: regular, bounded, and refused in words at once."""

import os
import time
from pathlib import Path

import pytest

from dist_moe.config import ConfigError, load_config, load_stored_config
from dist_moe.config.yaml_io import LARGEST_FILE, MAX_DEPTH, MAX_VALUES, parse
from dist_moe.untrusted import MAX_DIGITS, parse_json
from tests.unit.config.files import DEBUG


def _bomb(first: str, line: str) -> str:
    """Nine lines, each of which has the value of the one before ten times."""
    lines = [first, *(line.format(name=f"a{n}", ten=",".join([f"*a{n - 1}"] * 10)) for n in range(1, 10))]
    return "".join(f"{each}\n" for each in lines)


HOSTILE = {
    "flow lists": ("a: " + "[" * 3000 + "]" * 3000, "nests too deeply"),
    "flow mappings": ("{a: " * 3000 + "1" + "}" * 3000, "nests too deeply"),
    "blocks": ("".join(f"{' ' * depth}a:\n" for depth in range(300)), "nests too deeply"),
    "list bomb": (_bomb("a0: &a0 [x]", "{name}: &{name} [{ten}]"), f"holds more than {MAX_VALUES:,} values"),
    "merge bomb": (_bomb("a0: &a0 {k: 1}", "{name}: &{name} {{<<: [{ten}]}}"), "holds more than"),
    "key bomb": (_bomb("a0: &a0 [x]", "{name}: &{name} [{ten}]") + "? *a9\n: 1\n", "holds more than"),
    "depth by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, MAX_DEPTH + 1)),
        "nests too deeply",
    ),
    "half a surrogate pair": ('"a\\ud800": 1', "a text has half of a surrogate pair, line 1, column 1"),
    "alias of itself": ("a: &a [*a]", r"has the alias \*a inside of the value that it names"),
    "values": ("a:\n" + "- 1\n" * (MAX_VALUES + 1), f"holds more than {MAX_VALUES:,} values"),
    "list as a key": ("? [a, [b]]\n: 1\n", "a key is not a plain value"),
    "hexadecimal": (f"train: {{steps: 0x{'f' * 5000}}}", f"an integer has more than {MAX_DIGITS} characters, line 1"),
    "octal": (f"train: {{steps: -0o{'7' * 5000}}}", "an integer has more than"),
    "binary": (f"train: {{steps: 0b{'1' * 20000}}}", "an integer has more than"),
    "decimal": (f"train: {{steps: {'9' * 5000}}}", "an integer has more than"),
    "octal of YAML 1.1": (f"%YAML 1.1\n---\ntrain: {{steps: 0{'7' * 5000}}}", "an integer has more than"),
    "base 60": (f"%YAML 1.1\n---\ntrain:\n  steps: 1{':59' * 3000}", "an integer has more than"),
    "float in base 60": (f"%YAML 1.1\n---\ntrain:\n  learning_rate: 1{':59' * 300}.5", "is not of its type"),
    "empty tagged integer": ("train: {steps: !!int ''}", "is not of its type"),
    "tagged boolean": ("train: {steps: !!bool maybe}", "is not of its type"),
    "size": ("a: " + "x" * LARGEST_FILE, f"is larger than {LARGEST_FILE:,} bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("load", [load_config, load_stored_config])
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, name: str, load: object) -> None:
    text, rule = HOSTILE[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=rule) as caught:
        load(path)  # type: ignore[operator]
    assert caught.value.violations[0].key == str(path)
    assert time.process_time() - start < 5


def test_a_pipe_a_device_and_a_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="cannot be used \\(it is not a regular file\\)"):
            load_config(path)


def test_aliases_of_a_plain_configuration_are_read() -> None:
    assert parse("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 1}\n")["d"] == {"b": [1, 2], "e": 1}


def test_the_longest_integers_are_read_and_printed() -> None:
    for text in ("0x" + "f" * (MAX_DIGITS - 2), "9" * MAX_DIGITS):
        assert str(parse(text)) == str(int(text, 0))
        assert f"{parse(text):,}"
    assert parse_json(f'{{"a": {"9" * MAX_DIGITS}}}')["a"] == int("9" * MAX_DIGITS)
    with pytest.raises(ValueError, match=f"an integer has more than {MAX_DIGITS} characters"):
        parse_json(f'{{"a": {"9" * (MAX_DIGITS + 1)}}}')


def test_an_override_with_a_deep_key_or_a_long_integer_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, ["a." * 3000 + "b=1", "a." * MAX_DEPTH + "b=1", f"train.steps=0x{'f' * 5000}"])
    first, second, third = caught.value.violations
    assert (
        (first.key, first.rule) == (second.key, second.rule) == ("override", f"is a key of more than {MAX_DEPTH} names")
    )
    assert third.key == "train.steps" and str(first).endswith("; write for example train.steps=20")
    with pytest.raises(ConfigError, match="is not a section") as caught:
        load_config(DEBUG, ["a." * (MAX_DEPTH - 1) + "b=1"])
    assert caught.value.violations[0].key != "override"
