"""Optional libraries: imported, or missed with the command that installs them."""

import sys

import pytest

from zoo_registry import errors, optional


def test_what_is_there_is_imported():
    assert optional("email.message", "reading mail", "stdlib").Message


def test_what_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasters", None)
    with pytest.raises(errors.MissingExtra) as caught:
        optional("rasters.windows", "a GeoTIFF", "ssm-zoo-remote-sensing[geo]", otherwise="PNG does not need it")
    command = "pip install 'ssm-zoo-remote-sensing[geo]'"
    assert str(caught.value) == f"a GeoTIFF needs rasters: {command} (PNG does not need it)"
    assert (caught.value.extra, caught.value.command) == ("geo", command)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.MissingExtra, match=r"writing parquet needs pyarrow: pip install pyarrow$"):
        optional("pyarrow", "writing parquet", "pyarrow")
