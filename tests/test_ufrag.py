"""The routing hint: vectors to the octet, then properties, then the command line."""

import ipaddress
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ufrag

MASTER = bytes(range(32)).hex()
RING = ufrag.Keyring.parse(f"0 {MASTER}\n5 {MASTER}\n")
V4 = ufrag.Cluster(1, ipaddress.ip_network("10.4.0.0/16"), 1, 65535)
V6 = ufrag.Cluster(48879, ipaddress.ip_network("fd00:4::/96"), 1, 65535)
CLUSTERS = {V4.id: V4, V6.id: V6}

VECTORS = [
    (0, V4, "10.4.1.2", 40000, 0x01020304, "APeT9ekG4r6OlO9+HGsokz4", "Z4K/XErQpQxJ6rgyZhiW2+BN"),
    (
        5,
        V6,
        "fd00:4::a0b0:c0d0",
        9000,
        0xFFFFFFFF,
        "oBNkYsMHpxI+ztU/+3L24Uk",
        "pDe06PCwrUnRvmPPt13zV8de",
    ),
]


def with_key(key_id: int) -> ufrag.Keyring:
    return ufrag.Keyring(RING.keys, key_id)


def test_aes_vector_of_quic_lb() -> None:
    """draft-ietf-quic-load-balancers, appendix B: one block, both ways."""
    key = bytes.fromhex("8f95f09245765f80256934e50c66207f")
    block = bytes.fromhex("ed793a51d49b8f5fee080dbf48c0d1e5")
    cipher = bytes.fromhex("4dd2d05a7b0de9b2b9907afb5ecf8cc3")
    ecb = Cipher(algorithms.AES(key), modes.ECB())
    ours = ufrag.Key(0, key, b"", ecb.encryptor(), ecb.decryptor())
    assert ours.encrypt(block) == cipher
    assert ours.decrypt(cipher) == block


@pytest.mark.parametrize(("key_id", "cluster", "host", "port", "nonce", "text", "pwd"), VECTORS)
def test_vectors_of_the_specification(
    key_id: int, cluster: ufrag.Cluster, host: str, port: int, nonce: int, text: str, pwd: str
) -> None:
    address = ipaddress.ip_address(host)
    assert ufrag.mint(with_key(key_id), cluster, address, port, nonce) == text
    assert ufrag.password(RING, text) == pwd.encode()
    expected = ufrag.Hint(key_id, cluster.id, address, port, nonce)
    assert ufrag.parse(RING, CLUSTERS, text.encode()) == expected


@given(st.ip_addresses(network="10.4.0.0/16"), st.integers(1, 65535), st.integers(0, 0xFFFFFFFF))
def test_round_trip(address: ipaddress.IPv4Address, port: int, nonce: int) -> None:
    text = ufrag.mint(with_key(0), V4, address, port, nonce)
    assert len(text) == ufrag.UFRAG_CHARACTERS
    found = ufrag.parse(RING, CLUSTERS, text.encode())
    assert found == ufrag.Hint(0, V4.id, address, port, nonce)
    assert ufrag.from_call_id(ufrag.call_id(text)) == text
    assert len(ufrag.password(RING, text) or b"") == ufrag.PASSWORD_CHARACTERS


def test_every_changed_bit_is_rejected() -> None:
    """All 23 * 8 bits of the text, one at a time: never a hint, so never a packet forwarded."""
    text = VECTORS[0][5].encode()
    reasons = set()
    for bit in range(len(text) * 8):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        found = ufrag.parse(RING, CLUSTERS, bytes(changed))
        assert isinstance(found, ufrag.Reject), f"bit {bit}"
        reasons.add(found)
    assert reasons == {
        ufrag.Reject.MALFORMED,
        ufrag.Reject.UNKNOWN_KEY,
        ufrag.Reject.FORGED,
    }


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_octets_end_in_a_reason(octets: bytes) -> None:
    assert isinstance(ufrag.parse(RING, CLUSTERS, octets), ufrag.Reject)
    ufrag.password(RING, octets)


def test_outside_the_cluster() -> None:
    narrow = {1: ufrag.Cluster(1, ipaddress.ip_network("10.4.2.0/24"), 1, 65535)}
    ports = {1: ufrag.Cluster(1, ipaddress.ip_network("10.4.0.0/16"), 1, 39999)}
    text = VECTORS[0][5].encode()
    assert ufrag.parse(RING, narrow, text) is ufrag.Reject.OUTSIDE
    assert ufrag.parse(RING, ports, text) is ufrag.Reject.OUTSIDE
    assert ufrag.parse(RING, {}, text) is ufrag.Reject.UNKNOWN_CLUSTER
    with pytest.raises(ValueError, match="outside cluster 1"):
        ufrag.mint(RING, narrow[1], ipaddress.ip_address("10.4.1.2"), 1, 0)
    with pytest.raises(ValueError, match="outside cluster 1"):
        ufrag.mint(RING, V4, ipaddress.ip_address("fd00:4::1"), 1, 0)


def test_another_secret_under_the_same_id_is_a_forgery() -> None:
    other = ufrag.Keyring.parse(f"0 {'ab' * 32}")
    assert ufrag.parse(other, CLUSTERS, VECTORS[0][5].encode()) is ufrag.Reject.FORGED
    assert ufrag.password(other, VECTORS[0][5]) != VECTORS[0][6].encode()


def test_rotation_old_and_new_side_by_side() -> None:
    old = ufrag.Keyring.parse(f"0 {MASTER}")
    both = ufrag.Keyring.parse(f"0 {MASTER}\n1 {'cd' * 32}")
    address = ipaddress.ip_address("10.4.0.9")
    before = ufrag.mint(old, V4, address, 9000, 7)
    after = ufrag.mint(both, V4, address, 9000, 7)
    assert both.mint_id == 1
    for text in (before, after):
        assert isinstance(ufrag.parse(both, CLUSTERS, text.encode()), ufrag.Hint)
    assert ufrag.parse(old, CLUSTERS, after.encode()) is ufrag.Reject.UNKNOWN_KEY
    assert ufrag.Keyring.parse(f"0 {MASTER}\n1 {'cd' * 32}", mint_id=0).mint_id == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no key in it"),
        ("# nothing\n\n", "there is no key in it"),
        ("0", "line 1: expected a key id and 64 hexadecimal digits"),
        (f"7 {MASTER}", "line 1: the key id is not a number from 0 to 6"),
        (f"0 {MASTER}\n0 {MASTER}", "line 2: key id 0 stands there twice"),
        (f"0 {MASTER[:-2]}", "line 1: the secret is not 64 hexadecimal digits"),
        (f"0 {'zz' * 32}", "line 1: the secret is not 64 hexadecimal digits"),
    ],
)
def test_broken_key_files_name_the_line_and_no_secret(text: str, message: str) -> None:
    with pytest.raises(ufrag.KeyFileError) as caught:
        ufrag.Keyring.parse(text)
    assert str(caught.value) == message
    with pytest.raises(ufrag.KeyFileError, match="no key 3 in it"):
        ufrag.Keyring.parse(f"0 {MASTER}", mint_id=3)


def test_secrets_stay_out_of_representations() -> None:
    key = RING.keys[0]
    assert key.route.hex() not in repr(RING)
    assert repr(key) == "Key(id=0)"


@pytest.mark.parametrize("text", ["", "rtc_", "APeT9ekG4r6OlO9+HGsokz4", "rtc_APeT9ekG4r6OlO9+HGs"])
def test_what_is_no_call_id(text: str) -> None:
    assert ufrag.from_call_id(text) is None


def test_call_id_is_url_safe_in_one_spelling() -> None:
    ident = ufrag.call_id(VECTORS[1][5])
    assert ident == "rtc_oBNkYsMHpxI-ztU_-3L24Uk"
    assert ufrag.from_call_id(ident.replace("-", "+")) is None


def test_a_call_id_has_a_secret_that_the_ufrag_has_not() -> None:
    text, secret = VECTORS[1][5], "x" * (ufrag.SECRET_CHARACTERS - 1) + "_"
    ident = ufrag.call_id(text, secret)
    assert ufrag.from_call_id(ident) == text
    for wrong in (ident[:-1], f"{ident}x", f"{ident[:-1]}+", f"{ident[:-1]}\n", f"{ident}\n"):
        assert ufrag.from_call_id(wrong) is None


def test_clusters_that_no_hint_can_name() -> None:
    with pytest.raises(ValueError, match="shorter than /96"):
        ufrag.Cluster(1, ipaddress.ip_network("fd00::/64"), 1, 2)
    with pytest.raises(ValueError, match="no range of ports"):
        ufrag.Cluster(1, ipaddress.ip_network("10.0.0.0/8"), 2, 1)
    with pytest.raises(ValueError, match="between 0 and 65535"):
        ufrag.Cluster(65536, ipaddress.ip_network("10.0.0.0/8"), 1, 2)


def test_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    line = run(ufrag.cli, ["keygen", "--id", "3"]).stdout
    keys = tmp_path / "keys"
    keys.write_text(line)
    assert ufrag.Keyring.parse(line).mint_id == 3
    minted = run(ufrag.cli, ["mint", "--keys", str(keys), "127.0.0.1:9000", "--nonce", "0000002a"])
    text, pwd = minted.stdout.split()
    assert (len(text), len(pwd)) == (ufrag.UFRAG_CHARACTERS, ufrag.PASSWORD_CHARACTERS)
    for spelling in (text, ufrag.call_id(text)):
        told = run(ufrag.cli, ["inspect", "--keys", str(keys), "--", spelling])
        assert told.stdout == "key 3, cluster 1, transceiver 127.0.0.1:9000, nonce 0000002a\n"
    forged = run(ufrag.cli, ["inspect", "--keys", str(keys), "--", "A" * 23])
    assert forged.exit_code == 1
    assert "UNKNOWN_KEY" in forged.stderr


def test_command_line_refuses_with_a_reason(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("0 short\n")
    script = Path(sys.executable).with_name("ufrag")
    ran = subprocess.run(
        [script, "mint", "--keys", keys, "127.0.0.1:9000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "line 1: the secret is not 64 hexadecimal" in ran.stderr
