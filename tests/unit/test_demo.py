"""The demo's S3 server, and its command line."""

import os

import pytest

from jobs.demo import PROMPTS, embedded_s3, main
from phi4ray.storage import join, s3, storage_for

pytestmark = pytest.mark.slow

ELSEWHERE = {
    "AWS_ENDPOINT_URL_S3": "https://s3.example.com",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    "AWS_PROFILE": "no-such-profile",
    "AWS_REGION": "eu-central-1",
    "AWS_SESSION_TOKEN": "of another account",
    "RAY_ADDRESS": "ray.example.com:6379",
}


def test_the_demo_stays_on_this_machine_whatever_the_shell_is_set_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    s3._client.cache_clear()
    try:
        with embedded_s3() as endpoint:
            client = s3.S3Storage()._client
            assert (client.meta.endpoint_url, client.meta.region_name) == (endpoint, "us-east-1")
            storage_for(PROMPTS).write(join(PROMPTS, "a"), b"b")
            assert not {"RAY_ADDRESS", "AWS_PROFILE", "AWS_SESSION_TOKEN"} & os.environ.keys()
    finally:
        s3._client.cache_clear()
    assert dict(os.environ) == before


def test_the_demo_tells_of_itself_and_refuses_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.demo.make_tiny_model", None)  # nothing is made for it
    for argument, code in (("--help", 0), ("--steps", 2)):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == code
    assert "make demo" in capsys.readouterr().out
