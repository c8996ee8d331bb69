"""Who may ask: keys by their digests, from a file that may change while the service runs."""

import logging
import traceback
from pathlib import Path

import pytest
import yaml

from phi4ray.errors import ConfigError
from phi4ray.serve.tenants import KeyRing, digest, new_key, parse


def keys(path: Path, **owners: str) -> Path:
    tenants = [{"name": name, "key_sha256": [digest(key)]} for name, key in owners.items()]
    path.write_text(yaml.safe_dump({"tenants": tenants}))
    return path


def test_a_key_is_found_by_its_digest(tmp_path: Path) -> None:
    key, stored = new_key()
    ring = KeyRing(keys(tmp_path / "keys.yaml", acme=key), 1.0)
    found = ring.find(key, 0.0)
    assert found is not None
    assert (found.name, found.key_sha256) == ("acme", (stored,))
    assert ring.find(key + "x", 0.0) is None
    assert key not in (tmp_path / "keys.yaml").read_text()


def test_a_changed_file_is_read_again_and_no_sooner_than_said(tmp_path: Path) -> None:
    path = keys(tmp_path / "keys.yaml", acme="one")
    ring = KeyRing(path, 5.0)
    assert ring.find("one", 0.0)
    keys(path, acme="two")
    assert ring.find("one", 4.0)
    assert ring.find("one", 6.0) is None
    assert ring.find("two", 6.0)


def test_a_broken_file_leaves_the_old_keys_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = keys(tmp_path / "keys.yaml", acme="one")
    ring = KeyRing(path, 1.0)
    path.write_text("tenants: [{name: acme}]")
    with caplog.at_level(logging.ERROR, "phi4ray.serve.tenants"):
        assert ring.find("one", 10.0)
        assert ring.find("one", 20.0)
    (line,) = caplog.records
    assert "key_sha256" in line.getMessage()
    keys(path, acme="two")
    assert ring.find("two", 30.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", [b"a: 2024-13-45", b"[" * 5000, b"\xff\xfe\xff", b"a: [", b"a: \x00", None]
)
def test_whatever_happens_to_the_file_costs_no_request_and_is_one_line_a_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes | None
) -> None:
    path = keys(tmp_path / "keys.yaml", acme="one")
    ring = KeyRing(path, 1.0)

    def breaks() -> None:
        if broken is None:
            path.unlink()
        else:
            path.write_bytes(broken)

    with caplog.at_level(logging.ERROR, "phi4ray.serve.tenants"):
        breaks()
        assert all(ring.find("one", now_s) for now_s in (10.0, 20.0, 30.0))
        assert len(caplog.records) == 1
        keys(path, acme="one")
        assert ring.find("one", 40.0)
        breaks()
        assert ring.find("one", 50.0)
    assert len(caplog.records) == 2
    assert "keys.yaml" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "text",
    [
        "tenants: [{name: a, key_sha256: [sk-phi4-private]}]",
        "tenants: [ sk-phi4-private",
        "tenants: sk-phi4-private",
    ],
)
def test_a_key_where_its_digest_belongs_is_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, "keys.yaml")
    assert "keys.yaml" in str(error.value)
    assert "private" not in "".join(traceback.format_exception(error.value))


def test_the_tenants_are_told_anew_after_each_change_only(tmp_path: Path) -> None:
    path = keys(tmp_path / "keys.yaml", acme="one")
    ring = KeyRing(path, 1.0)
    before = ring.tenants
    ring.find("one", 10.0)
    assert ring.tenants is before
    keys(path, acme="one", other="two")
    ring.find("one", 20.0)
    assert [tenant.name for tenant in ring.tenants] == ["acme", "other"]


def test_a_swapped_link_is_a_change_as_kubernetes_makes_it(tmp_path: Path) -> None:
    for version, key in (("v1", "one"), ("v2", "two")):
        (tmp_path / version).mkdir()
        keys(tmp_path / version / "keys.yaml", acme=key)
    link = tmp_path / "now"
    link.symlink_to(tmp_path / "v1")
    ring = KeyRing(link / "keys.yaml", 1.0)
    link.unlink()
    link.symlink_to(tmp_path / "v2")
    assert ring.find("two", 10.0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tenants: 5", "tenants"),
        ("tenants: [{name: a, key_sha256: [short]}]", "tenants.0.key_sha256.0"),
        (f"tenants: [{{name: a, key_sha256: [{'a' * 64}], limit: 5}}]", "tenants.0.limit"),
        ("a: [", "not valid YAML"),
        ("", "file"),
        (
            f"tenants: [{{name: a, key_sha256: [{'a' * 64}]}}, "
            f"{{name: b, key_sha256: [{'a' * 64}]}}]",
            "there twice",
        ),
    ],
)
def test_what_is_wrong_in_a_keys_file_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match="keys") as error:
        parse(text, "keys.yaml")
    assert named in str(error.value)


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(tmp_path / "none.yaml", 1.0)
