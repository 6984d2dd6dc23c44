"""What may be loaded: the operator's own addresses, public ones by their owner, no groups."""

import importlib
import socket
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

OWN = (
    "127.0.0.1", "127.200.3.4", "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1",
    "169.254.7.7", "100.64.0.1", "100.127.255.254", "198.18.0.1", "::1", "fd00::1", "fe80::1",
    "2001:2::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
)  # fmt: skip
PUBLIC = (
    "8.8.8.8", "1.1.1.1", "172.32.0.1", "172.15.0.1", "100.63.0.1", "100.128.0.1", "192.0.2.1",
    "198.51.100.7", "203.0.113.7", "192.0.0.8", "240.0.0.1", "0.1.2.3", "198.20.0.1",
    "2606:4700::1111", "2001:db8::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:7f00:1::1",
    "fec0::1",
)  # fmt: skip
NO_HOST = (
    "0.0.0.0", "::", "224.0.0.1", "239.1.2.3", "ff02::1", "255.255.255.255", "::ffff:224.0.0.1",
    "::ffff:255.255.255.255", "::ffff:0.0.0.0",
)  # fmt: skip


def _target():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("target")
    finally:
        sys.path.remove(str(SCRIPTS))


target = _target()


@pytest.fixture
def resolver(monkeypatch):
    """Names that the tests know, instead of anybody's DNS."""
    known = {"own.example": ["10.0.0.7"], "mixed.example": ["10.0.0.7", "8.8.8.8"]}
    real = socket.getaddrinfo

    def found(host, *rest, **more):
        if host not in known:
            return real(host, *rest, **more | {"flags": socket.AI_NUMERICHOST})
        return [each for literal in known[host] for each in real(literal, *rest, **more)]

    monkeypatch.setattr(target.socket, "getaddrinfo", found)


@pytest.mark.parametrize("address", OWN)
@pytest.mark.parametrize("owned", [False, True])
def test_the_operators_own_addresses_may_be_loaded(address, owned):
    assert target.guard(address, owned) == address
    bracketed = f"[{address}]" if ":" in address else address
    assert target.endpoint(f"{bracketed}:3478", owned) == (address, 3478)
    assert target.page(f"http://{bracketed}:8080/", owned) == f"http://{bracketed}:8080"


@pytest.mark.parametrize("address", PUBLIC)
def test_others_are_refused_but_to_their_owner(address):
    bracketed = f"[{address}]" if ":" in address else address
    for ask in (
        lambda owned: target.guard(address, owned),
        lambda owned: target.endpoint(f"{bracketed}:3478", owned),
        lambda owned: target.page(f"https://{bracketed}/", owned),
    ):
        with pytest.raises(target.TargetError, match=r"public address.*--i-own-this-target"):
            ask(False)
        assert ask(True)


@pytest.mark.parametrize("address", NO_HOST)
@pytest.mark.parametrize("owned", [False, True])
def test_groups_and_broadcasts_are_refused_to_everybody(address, owned):
    with pytest.raises(target.TargetError, match="is not one host"):
        target.guard(address, owned)


def test_other_ways_to_write_an_address_are_read_as_what_is_sent_to():
    assert target.guard("127.1", False) == "127.0.0.1"
    assert target.guard("2130706433", False) == "127.0.0.1"
    for written in ("134744072", "0x08080808", "8.8.2056"):  # all are 8.8.8.8
        with pytest.raises(target.TargetError, match=r"8\.8\.8\.8 is a public address"):
            target.guard(written, False)
    with pytest.raises(target.TargetError, match="is not one host"):
        target.guard("0", False)


def test_a_name_is_public_if_any_of_its_addresses_is(resolver):
    assert target.guard("own.example", False) == "10.0.0.7"
    assert target.endpoint("own.example:9", False) == ("10.0.0.7", 9)
    assert target.page("https://own.example", False) == "https://own.example"
    with pytest.raises(target.TargetError, match=r"8\.8\.8\.8 is a public address"):
        target.guard("mixed.example", False)
    with pytest.raises(target.TargetError, match=r"8\.8\.8\.8 is a public address"):
        target.page("https://mixed.example/", False)
    assert target.guard("mixed.example", True) == "10.0.0.7"


def test_the_zone_of_a_link_is_kept():
    (name,) = [each for _, each in socket.if_nameindex() if each == "lo"]
    assert target.guard(f"fe80::1%{name}", False) == f"fe80::1%{name}"


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x",
        ":3478", "::1:3478", "[::1]", "[::1:3478", "127.0.0.1:1/path", "127.0.0.1:1?query",
        "127.0.0.1:1#part", "user@127.0.0.1:1", "http://127.0.0.1:1", "127.0.0.1 :1",
        "127.0.0.1:1\n", "8.8.8.8\\@127.0.0.1:1", "[127.0.0.1]:1",
    ],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused_in_one_line(text):
    with pytest.raises(target.TargetError) as found:
        target.endpoint(text, True)
    assert repr(text) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:8080", "ftp://127.0.0.1/", "file:///etc/passwd", "http://", "http:///x",
        "http://127.0.0.1:x/", "http://127.0.0.1:99999/", "http://[::1", "http://user@127.0.0.1/",
        "http://127.0.0.1@8.8.8.8/", "http://127.0.0.1\\@8.8.8.8/", "http://127.0.0.1/?x=1",
        "http://127.0.0.1/#x", "http://127.0.0.1 /", "http://127.0.0.1/\r\n",
    ],
)  # fmt: skip
def test_what_is_no_page_is_refused_in_one_line(url):
    with pytest.raises(target.TargetError) as found:
        target.page(url, True)
    assert repr(url) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["no.such.name.invalid", "a" * 70 + ".example", "\udcff", "a..b"])
def test_what_is_no_name_is_refused(name, monkeypatch):
    def none(host, *_, **__):
        host.encode("idna")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(target.socket, "getaddrinfo", none)
    with pytest.raises(target.TargetError, match="is no address"):
        target.guard(name, True)


def test_a_path_of_a_page_is_kept_without_its_last_slash():
    assert target.page("http://127.0.0.1:8080/below/", False) == "http://127.0.0.1:8080/below"
