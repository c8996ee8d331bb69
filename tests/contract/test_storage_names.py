"""What URIs and patterns mean where they could mean two things."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4ray.errors import (
    ConfigError,
    InputError,
)
from phi4ray.storage import expand, join, s3, storage_for


def put(prefix: str, *names: str) -> list[str]:
    """Write small objects, each holding its name; returns their URIs."""
    uris = [join(prefix, name) for name in names]
    for uri, name in zip(uris, names, strict=True):
        storage_for(uri).write(uri, name.encode())
    return uris


def names(prefix: str, *patterns: str) -> list[str]:
    """What patterns below a prefix expand to, relative to it."""
    items = expand([join(prefix, pattern) for pattern in patterns])
    return [item.uri.removeprefix(join(prefix, "")) for item in items]


def spellings(path: Path) -> Iterator[str]:
    yield str(path)
    yield path.as_uri()
    yield path.name
    yield f"./x/../{path.name}"
    yield f"{path.parent}//{path.name}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_has_one_name_however_it_is_written(here: Path) -> None:
    path = here / "a.jsonl"
    for spelling in spellings(path):
        assert join(spelling, "x") == f"{path}/x"
        storage = storage_for(spelling)
        storage.write(spelling, spelling.encode())
        assert path.read_text() == spelling
        assert storage.read(spelling) == spelling.encode()
        assert storage.head(spelling).uri == str(path)
    assert [item.uri for item in expand(list(spellings(path)))] == [str(path)]


def test_what_is_listed_lies_below_the_joined_prefix(here: Path) -> None:
    put(str(here / "out"), "a/b")
    for spelling in spellings(here / "out"):
        (item,) = storage_for(spelling).list(spelling)
        assert item.uri.removeprefix(join(spelling, "")) == "a/b"


@pytest.mark.parametrize("slashes", ["", "/", "//", "///"])
def test_a_folder_is_one_however_many_slashes_end_it(prefix: str, slashes: str) -> None:
    folder = join(prefix, "out") + slashes
    (uri,) = put(folder, "a")
    assert uri == join(prefix, "out/a")
    assert [item.uri for item in storage_for(folder).list(folder)] == [uri]


def test_slashes_within_a_key_are_kept(s3_prefix: str) -> None:
    put(s3_prefix, "in/a.jsonl", "in//b.jsonl", "in//deep/c.jsonl")
    assert names(s3_prefix, "in//b.jsonl") == names(s3_prefix, "in//*.jsonl") == ["in//b.jsonl"]
    assert names(s3_prefix, "in//**/*.jsonl") == ["in//b.jsonl", "in//deep/c.jsonl"]
    assert names(s3_prefix, "in/*.jsonl") == ["in/a.jsonl"]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "https://host/x", "s3a://b/x", "a+b://x/y"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://.*file://"):
        storage_for(uri)


def test_a_folder_may_itself_be_hidden(prefix: str) -> None:
    put(prefix, ".cache/_in/a.jsonl")
    assert names(prefix, ".cache/_in") == names(prefix, ".cache/_in/*") == [".cache/_in/a.jsonl"]


@pytest.mark.parametrize("pattern", ["[!]*", "[z-a]*", "[", "[]*"])
def test_a_glob_that_can_match_nothing_is_no_crash(prefix: str, pattern: str) -> None:
    put(prefix, "a.jsonl")
    with pytest.raises(InputError, match="matches no file"):
        names(prefix, pattern)


def test_names_that_look_like_globs_are_taken_as_names_first(prefix: str) -> None:
    put(prefix, "[a].jsonl", "a.jsonl", "run[1]?/x.jsonl", "run1x/y.jsonl")
    assert names(prefix, "[a].jsonl") == ["[a].jsonl"]
    assert names(prefix, "run[1]?") == names(prefix, "run[1]?/") == ["run[1]?/x.jsonl"]


def test_an_object_called_like_a_folder_is_taken_as_the_object(s3_prefix: str) -> None:
    put(s3_prefix, "in.jsonl", "in.jsonl/x.jsonl")
    assert names(s3_prefix, "in.jsonl") == ["in.jsonl"]
    assert names(s3_prefix, "in.jsonl/") == ["in.jsonl/x.jsonl"]


def test_an_object_that_marks_a_folder_does_not_hide_it(s3_prefix: str) -> None:
    put(s3_prefix, "mark", "mark/a.jsonl", "alone")
    assert names(s3_prefix, "mark") == ["mark/a.jsonl"]
    with pytest.raises(InputError, match="alone: its name does not tell its format"):
        names(s3_prefix, "alone")


@pytest.mark.parametrize(
    ("glob", "listed"),
    [
        ("in20*/*.jsonl", "folder/in20"),
        ("in2024/a*", "folder/in2024/a"),
        ("in//b*", "folder/in//b"),
        ("[i]*", "folder/"),
    ],
)
def test_of_a_glob_only_what_begins_as_it_does_is_listed(
    s3_prefix: str, glob: str, listed: str
) -> None:
    put(s3_prefix, "in2024/a.jsonl", "in//b.jsonl", "i.jsonl", "other/a.jsonl")
    asked: list[str] = []
    events = s3.S3Storage()._client.meta.events
    events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: asked.append(params["Prefix"])
    )
    assert len(names(s3_prefix, glob)) == 1
    assert asked[-1] == listed


def test_endings_are_known_in_capitals_too(prefix: str) -> None:
    put(prefix, "in/A.JSONL", "in/b.Jsonl.GZ", "in/c.PARQUET")
    assert names(prefix, "in/") == ["in/A.JSONL", "in/b.Jsonl.GZ", "in/c.PARQUET"]
    assert names(prefix, "in/A.JSONL") == ["in/A.JSONL"]


def test_files_of_a_folder_that_are_no_inputs_are_told_with_one_of_them(prefix: str) -> None:
    put(prefix, "in/a.jsonl", "in/b.json.gz", "in/c.pq", "in/_SUCCESS", "in/.c.crc", "in/_x/y.pq")
    told: list[str] = []
    folder = join(prefix, "in/")
    expand([folder], tell=told.append)
    (line,) = told
    assert line.startswith(f"files skipped below {folder}: 2 (first: {folder}b.json.gz); ")
    expand([f"{folder}*.jsonl"], tell=told.append)
    assert told == [line]


def test_a_whole_bucket_is_a_folder(s3_prefix: str) -> None:
    (uri,) = put(s3_prefix, "a.jsonl")
    bucket = "/".join(s3_prefix.split("/")[:3])
    for pattern in (bucket, f"{bucket}/"):
        assert [item.uri for item in expand([pattern])] == [uri]


def test_bucket_names_are_no_globs(s3_prefix: str) -> None:
    with pytest.raises(InputError, match="bucket"):
        expand(["s3://buck*/a.jsonl"])


def test_placeholders_of_folders_are_no_inputs(s3_prefix: str) -> None:
    put(s3_prefix, "in/", "in/a.jsonl", "in/b.jsonl/")
    assert names(s3_prefix, "in") == ["in/a.jsonl"]


@pytest.mark.parametrize("pattern", ["notes.txt", "*.txt", "plan.json"])
def test_a_file_of_unknown_format_is_refused_when_asked_for(prefix: str, pattern: str) -> None:
    put(prefix, "notes.txt", "plan.json")
    with pytest.raises(InputError, match=r"\.jsonl.*\.parquet"):
        names(prefix, pattern)


@pytest.mark.parametrize("pattern", ["none", "none/", "none/*.jsonl", "none.jsonl", "empty"])
def test_a_pattern_that_matches_nothing_is_an_error(prefix: str, pattern: str) -> None:
    put(prefix, "empty/notes.txt", "none-other/x.jsonl")
    with pytest.raises(InputError, match=f"{pattern.replace('*', '.')}.*looked for"):
        names(prefix, pattern)
