"""Addresses, networks and URLs as operators write them, and the reasons of refusals."""

import pytest

import endpoints


def test_endpoints_and_prefixes() -> None:
    assert str(endpoints.Endpoint("[::1]:80")) == "[::1]:80"
    assert endpoints.Endpoint("127.0.0.1:80") == endpoints.Endpoint("127.0.0.1:80")
    assert len({endpoints.Endpoint("[::1]:80"), endpoints.Endpoint("[0::1]:80")}) == 1
    prefix = endpoints.Prefix("10.4.0.0/16")
    assert "10.4.255.1" in prefix
    assert "::ffff:10.4.0.1" in prefix
    assert "10.5.0.1" not in prefix
    assert "::1" not in prefix
    assert "nonsense" not in prefix
    assert "fe80::1%eth0" in endpoints.Prefix("fe80::/10")


@pytest.mark.parametrize(
    ("url", "kind", "nodes"),
    [
        ("redis://h", "redis", (("h", 6379),)),
        ("rediss://user:p%40ss@[::1]:7/3", "redis", (("::1", 7),)),
        ("redis+sentinel://a,b:9/flows/2", "sentinel", (("a", 26379), ("b", 9))),
        ("redis+cluster://a:1,b:2", "cluster", (("a", 1), ("b", 2))),
        ("unix:///run/redis.sock?db=4", "unix", ()),
    ],
)
def test_where_redis_is(url: str, kind: str, nodes: tuple[tuple[str, int], ...]) -> None:
    found = endpoints.RedisUrl(url)
    assert (found.kind, found.nodes) == (kind, nodes)
    assert found.tls == url.startswith("rediss")
    assert "p@ss" not in repr(found) and "p%40ss" not in str(found)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://h", "starts with none of redis://"),
        ("redis://a,b", "names several servers"),
        ("redis://h/x", "'x' is not the number of a database"),
        ("redis://h:0", "'h:0' is not HOST:PORT"),
        ("redis+cluster://h/1", "a Cluster has no database"),
        ("redis+sentinel://h", "names no service"),
        ("unix://relative", "is not an absolute path"),
    ],
)
def test_where_redis_cannot_be(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        endpoints.RedisUrl(url)


def test_where_a_model_server_is() -> None:
    found = endpoints.ModelUrl("wss://models.example:8443/v1/realtime?tenant=a")
    assert found.tls
    assert str(found) == "wss://models.example:8443/v1/realtime?tenant=a"
    assert not endpoints.ModelUrl("ws://[::1]:80").tls
    assert len({found, endpoints.ModelUrl(str(found))}) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://h/v1/realtime", "starts with neither wss:// nor ws://"),
        ("h:80", "starts with neither"),
        ("wss:///v1", "is not wss://HOST"),
        ("wss://h:99999/", "not a URL: Port out of range"),
        ("wss://h:0/", "is not wss://HOST"),
        ("wss://h/#x", "is not wss://HOST"),
        ("wss://h/a b", "is not wss://HOST"),
        ("wss://[::1/", "not a URL"),
        ("wss://h/?model=a", "names a model"),
        ("wss://sk-secret@h/", "the key belongs in key_file"),
    ],
)
def test_where_a_model_server_cannot_be(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        endpoints.ModelUrl(url)
    assert "sk-secret" not in str(caught.value)


def test_prefixes_are_the_same_when_their_networks_are() -> None:
    one, same, other = (endpoints.Prefix(text) for text in ("10.4.0.0/16", "10.4.0.0/16", "::/96"))
    assert one == same and hash(one) == hash(same)
    assert one not in (other, "10.4.0.0/16")
