"""Messages hold no password."""

import pytest

from dnal_dist.common.errors import InputError, secret_in

SECRET = "hunter-2"


@pytest.mark.parametrize(
    "words",
    [
        f"https://user:{SECRET}@host/x.tar", f"https://{SECRET}@host/x", f"//user:{SECRET}@host", f"user:{SECRET}@host:/x",
        f"s3://AKIA:{SECRET[:3]}/{SECRET[3:]}@bucket/x", f"https://host/x?signature={SECRET}", f"https://h/x#token={SECRET}", f'"https://user:{SECRET}@host',
        f"model.init_from='//user:{SECRET}@h",
    ],
)  # fmt: skip
def test_messages_never_hold_a_secret(words):
    assert secret_in(words)
    message = str(InputError(f"override {words}: not a YAML value, found [{words}]; correct it"))
    assert SECRET[3:] not in message and message.endswith("; correct it")


@pytest.mark.parametrize("words", ["runs/me@host/x", "https://host:80/a@b.tar", "key 'x': a@b", "s3://bucket/a@b.tar", "a:b", "x?"])
def test_words_without_a_secret_stay(words):
    assert secret_in(words) is None and str(InputError(words)) == words
