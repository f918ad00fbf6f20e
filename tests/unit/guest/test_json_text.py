"""The agent's JSON against the standard library's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.agent.json_text import dumps

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(values)
def test_json_reads_what_we_write(value: object) -> None:
    assert json.loads(dumps(value)) == value


def test_what_json_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes has no JSON text"):
        dumps({"a": [b"x"]})
