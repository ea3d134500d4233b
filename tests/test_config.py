"""jf.config and the JAXFABRIC_* variables."""

from __future__ import annotations

import pytest
from ranks import make_mesh

import jaxfabric as jf
from jaxfabric import _config, _mesh

VARIABLES = ("TRANSPORT", "TIMEOUT_S", "MAILBOX_BYTES", "WINDOW_BYTES", "SPIN_S")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"JAXFABRIC_{name}", raising=False)


def test_defaults_are_as_documented() -> None:
    settings = _config.Config().settings
    assert settings == _config.Settings()
    table = _config.__doc__
    assert table is not None
    for name in VARIABLES:
        assert f"JAXFABRIC_{name}" in table
    for value in (30, settings.mailbox_bytes, settings.window_bytes):
        assert f"{value:.0f}" in table


def test_variables_are_read_once_at_the_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = _config.Config()
    monkeypatch.setenv("JAXFABRIC_TIMEOUT_S", "2.5")
    monkeypatch.setenv("JAXFABRIC_MAILBOX_BYTES", "4096")
    monkeypatch.setenv("JAXFABRIC_TRANSPORT", "fake")
    monkeypatch.setenv("JAXFABRIC_SPIN_S", "")  # empty is unset
    settings = config.settings
    assert (settings.timeout_s, settings.mailbox_bytes) == (2.5, 4096)
    assert (settings.transport, settings.spin_s) == ("fake", 5e-6)
    monkeypatch.setenv("JAXFABRIC_TIMEOUT_S", "9")
    assert config.settings.timeout_s == 2.5


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TIMEOUT_S", "soon", "JAXFABRIC_TIMEOUT_S='soon': expected float"),
        ("TIMEOUT_S", "-1", "JAXFABRIC_TIMEOUT_S='-1': must not be negative"),
        ("MAILBOX_BYTES", "1.5", "JAXFABRIC_MAILBOX_BYTES='1.5': expected int"),
        ("MAILBOX_BYTES", "256M", "JAXFABRIC_MAILBOX_BYTES='256M': expected int"),
        ("WINDOW_BYTES", "-8", "JAXFABRIC_WINDOW_BYTES=-8: must not be negative"),
        ("SPIN_S", "x", "JAXFABRIC_SPIN_S='x': expected float"),
        ("TIMEOUT_S", "nan", "JAXFABRIC_TIMEOUT_S='nan'"),
        ("TIMEOUT_S", "inf", "JAXFABRIC_TIMEOUT_S: timeout_s=inf must be above 0"),
        ("TIMEOUT_S", "0", "JAXFABRIC_TIMEOUT_S: timeout_s=0.0 must be above 0"),
        (
            "WINDOW_BYTES",
            str(1 << 60),
            "JAXFABRIC_WINDOW_BYTES=1152.* and below",
        ),
    ],
)
def test_bad_values_name_their_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"JAXFABRIC_{variable}", value)
    with pytest.raises(ValueError, match=message):
        _ = _config.Config().settings


def test_variables_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIMEOUT", "NIC", "TIMEOUT_S", "TEST_SEED", "BUILD_CUDA"):
        monkeypatch.setenv(f"JAXFABRIC_{name}", "3")
    assert _config.misspelt_variables() == {
        "JAXFABRIC_NIC": "JAXFABRIC_NICS",
        "JAXFABRIC_TIMEOUT": "JAXFABRIC_TIMEOUT_S",
    }


def test_update_and_with() -> None:
    config = _config.Config()
    config.update(timeout_s=120)
    assert config.settings.timeout_s == 120
    with config(timeout_s=1, transport="shm") as settings:
        assert config.settings is settings
        assert (settings.timeout_s, settings.transport) == (1, "shm")
        config.update(spin_s=0)
    assert config.settings == _config.Settings(timeout_s=120)
    with pytest.raises(RuntimeError, match="out"), config(timeout_s=3):
        raise RuntimeError("out")
    assert config.settings.timeout_s == 120
    with pytest.raises(TypeError, match="no setting 'speed'; there are libf"):
        config.update(speed=3)
    with pytest.raises(ValueError, match="timeout_s='x': expected float"):
        config.update(timeout_s="x")


def test_fabrics_take_the_settings_in_force() -> None:
    mesh = make_mesh(2)
    with jf.config(timeout_s=7, transport="fake", window_bytes=64, mailbox_bytes=4096):
        fabric = jf.Fabric(mesh)
    with fabric:
        assert (fabric.timeout_s, fabric.transport) == (7, "fake")
        with pytest.raises(jf.CapacityError):
            fabric.window(65, "int8")
    with jf.config(timeout_s=7), jf.Fabric(mesh, timeout_s=3) as fabric:
        assert fabric.timeout_s == 3


def test_sizes_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"jf\.Fabric: mailbox_bytes=-1: must"):
        jf.Fabric(make_mesh(2), mailbox_bytes=-1)
    with pytest.raises(
        TypeError, match=r"jf\.Fabric: mailbox_bytes=1\.5: expected int"
    ):
        jf.Fabric(make_mesh(2), mailbox_bytes=1.5)  # type: ignore[arg-type]
    for value in (1.7, float("inf")):
        with pytest.raises(ValueError, match=r"mailbox_bytes=.*: expected int"):
            _config.Config().update(mailbox_bytes=value)
    with pytest.raises(ValueError, match="spin_s=inf: must be finite"):
        _config.Config().update(spin_s=float("inf"))
    with pytest.raises(ValueError, match=rf"jf\.Fabric: window_bytes={1 << 70}: must"):
        jf.Fabric(make_mesh(2), window_bytes=1 << 70)


def test_options_of_verbs() -> None:
    with jf.config(verbs=" gid_index=3, traffic_class=106"):
        options = _mesh.transport_options("verbs", None)
        assert options == {"gid_index": 3, "traffic_class": 106}
        assert _mesh.transport_options("fake", {"seed": 1}) == {"seed": 1}
        assert _mesh.transport_options("shm", None) == {}
    assert _mesh.transport_options("verbs", None) == {}
    with jf.config(verbs="gid_index"), pytest.raises(ValueError, match="name=number"):
        _mesh.transport_options("verbs", None)
