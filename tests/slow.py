"""Cases that `make test` leaves out, because others of the same kind are quicker; `make test-all` runs them too."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def all_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters of a test, marked slow unless they are in `quick`."""
    cases = list(cases)
    assert set(quick) <= set(cases), f"no such case: {set(quick) - set(cases)}"
    as_tuple = [case if type(case) is tuple else (case,) for case in cases]
    return [
        pytest.param(*values, marks=[] if case in quick else pytest.mark.slow)
        for case, values in zip(cases, as_tuple, strict=True)
    ]
