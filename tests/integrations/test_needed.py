"""A library that is not there is named, with what to install."""

from __future__ import annotations

import pytest

from qgalore_compile import integrations
from qgalore_compile.integrations.needed import need


def test_what_to_install_is_said() -> None:
    message = r"needs a thing \(No module named 'no_such_thing'\): pip install thing"
    with pytest.raises(ImportError, match=message), need("a thing", "thing"):
        import no_such_thing  # type: ignore[import-not-found]  # noqa: F401


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = integrations.Trainer
