"""Strategies for damaged input: edits of valid bytes, and of values inside valid JSON."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

SNIPPETS = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\x1b[2J",
    "\u202e\ud7ff\uffff".encode(),
    b"\\ud800",
    b'"',
    b"'",
    b": ",
    b"- ",
    b"#",
    b"~",
    b"../",
    b"/dev/zero",
    b"&a [*a, *a]",
    b"!!python/object/apply:os.system [true]",
    b"<<: *a",
    b"null",
    b"true",
    b"NaN",
    b"-1",
    b"1e999",
    b"0x7fffffffffffffff",
    b"9" * 400,
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"a" * 70_000,
)
MAX_EDITS, MAX_CUT = 5, 64

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from([0, 1, 2, -1, 1 << 31, 1 << 63, 10**400, 0.5, 1e308, "", "auto", "none", "~", "/", "\x1b[31m"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
"""Any value that JSON and YAML can hold."""


@st.composite
def edited(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of the valid texts after 1 to 5 edits: bytes replaced, inserted, cut, or a part repeated."""
    content = draw(st.sampled_from(list(valid)))
    for _ in range(draw(st.integers(1, MAX_EDITS))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.integers(0, MAX_CUT)))
        piece = draw(st.sampled_from(SNIPPETS) | st.binary(max_size=8) | st.just(content[place:end] * 3))
        content = content[:place] + piece + content[end:]
    return content


@st.composite
def edited_json(draw: st.DrawFn, valid: Sequence[Any]) -> bytes:
    """One of the valid values, as JSON, after a value at a random place was replaced, removed, or given a new key."""
    value = json.loads(json.dumps(draw(st.sampled_from(list(valid)))))
    for _ in range(draw(st.integers(1, 3))):
        value = draw(_edited_value(value))
    return json.dumps(value).encode()


@st.composite
def _edited_value(draw: st.DrawFn, value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(["inside", "inside", "remove", "add"]))
    if action == "inside":
        value[key] = draw(_edited_value(value[key]))
    elif action == "remove":
        del value[key]
    elif isinstance(value, dict):
        value[draw(st.text(max_size=8))] = draw(VALUES)
    return value
