"""Settings: every mistake ends in one sentence that names file, key and reason."""

import itertools
import re
import typing
from pathlib import Path

import msgspec
import pytest

import front
import settings
import ufrag

KEY = "0 " + "00" * 32 + "\n"
COMMON = """
[keys]
file = "keys"
[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [9000, 9099]
"""
RELAY = '[relay]\npublic = "127.0.0.1:3478"\ninternal = "127.0.0.1:3500"\n' + COMMON
TRANSCEIVER = (
    '[transceiver]\nlisten = "127.0.0.1:9000"\nrelay_prefixes = ["127.0.0.0/8"]\n'
    'control_prefixes = ["127.0.0.0/8", "::1/128"]\n' + COMMON
)
SIGNALING = (
    '[signaling]\nlisten = "127.0.0.1:8080"\nrelays = ["127.0.0.1:3478"]\n'
    'transceivers = ["127.0.0.1:9000"]\nweb_dir = "web"\n' + COMMON
)


def write(folder: Path, text: str) -> Path:
    (folder / "keys").write_text(KEY)
    (folder / "keys").chmod(0o600)
    path = folder / "some.toml"
    path.write_text(text)
    return path


def test_defaults_and_relative_paths(tmp_path: Path) -> None:
    relay = settings.load(write(tmp_path, RELAY), settings.Relay)
    assert str(relay.relay.public) == "127.0.0.1:3478"
    assert relay.relay.workers == 0
    assert relay.keys.file == tmp_path / "keys"
    assert relay.keys.load().mint_id == 0
    clusters = settings.clusters(relay.cluster)
    assert clusters[1].contains(relay.relay.public.address, 9099)
    signaling = settings.load(write(tmp_path, SIGNALING), settings.Signaling)
    assert signaling.signaling.web_dir == tmp_path / "web"
    transceiver = settings.load(write(tmp_path, TRANSCEIVER), settings.Transceiver)
    assert transceiver.backend.kind == "parrot"


def test_settings_are_frozen(tmp_path: Path) -> None:
    relay = settings.load(write(tmp_path, RELAY), settings.Relay)
    with pytest.raises(AttributeError):
        relay.relay.workers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("shape", "text", "old", "new", "message"),
    [
        (settings.Relay, RELAY, "127.0.0.1:3478", "127.0.0.1:99999",
         "relay.public: '99999' in '127.0.0.1:99999' is not a port (0 to 65535)"),
        (settings.Relay, RELAY, "127.0.0.1:3478", "localhost:1",
         "relay.public: 'localhost:1' is not ADDRESS:PORT or [IPV6]:PORT"),
        (settings.Relay, RELAY, "127.0.0.1:3478", "::1",
         "relay.public: '::1' is not ADDRESS:PORT or [IPV6]:PORT"),
        (settings.Relay, RELAY, '"127.0.0.1:3500"', "3500",
         "relay.internal: expected text, got 3500"),
        (settings.Relay, RELAY, "127.0.0.1:3500", "127.0.0.1:0",
         "relay.internal: needs a port, so that it is the same after a restart"),
        (settings.Relay, RELAY, "[keys]", "[keyz]",
         "the file: Object contains unknown field `keyz`"),
        (settings.Relay, RELAY, "public", "pubic",
         "relay: Object contains unknown field `pubic`"),
        (settings.Relay, RELAY, "[keys]", "workers = 257\n[keys]",
         "relay.workers: Expected `int` <= 256"),
        (settings.Relay, RELAY, "[keys]", "flow_idle_s = 0\n[keys]",
         "relay.flow_idle_s: Expected `float` > 0.0"),
        (settings.Relay, RELAY, "[keys]", "flows_max = 10\nflows_tentative_max = 11\n[keys]",
         "relay.flows_tentative_max: larger than relay.flows_max"),
        (settings.Relay, RELAY, "[keys]", '[transit]\nlisten = "10.4.0.1:3600"\n[keys]',
         "transit.internal: goes together with transit.listen"),
        (settings.Relay, RELAY, "[keys]", '[transit]\nlisten = "10.4.0.1:3600"\n'
         'internal = "[fd00::1]:3700"\nrelay_prefixes = ["10.0.0.0/8"]\n[keys]',
         "transit.internal: frames pass from one family to the same"),
        (settings.Relay, RELAY, "[keys]", '[transit]\nlisten = "10.4.0.1:0"\n'
         'internal = "10.4.0.1:3700"\nrelay_prefixes = ["10.0.0.0/8"]\n[keys]',
         "transit.listen: needs a port, so that others can be told of it"),
        (settings.Relay, RELAY, "id = 1", 'id = 1\ntransit = ["10.5.0.1:3601-3600"]',
         "cluster[0].transit[0]: '10.5.0.1:3601-3600' is not ADDRESS:PORT or ADDRESS:FIRST-LAST"),
        (settings.Relay, RELAY, "id = 1",
         'id = 1\ntransit = ["10.5.0.1:3600-3603", "10.5.0.1:3601"]',
         "cluster 1: transit: an address stands there twice"),
        (settings.Relay, RELAY, "id = 1", 'id = 1\ntransit = ["[::ffff:10.5.0.1]:3600"]',
         "cluster 1: transit: "),
        (settings.Relay, RELAY, "id = 1", 'id = 1\ntransit = ["10.5.0.1:3000-3255", "10.5.0.2:9"]',
         "cluster: 257 transit addresses are more than 256"),
        (settings.Relay, RELAY, "id = 1", "id = 65536", "cluster[0].id: Expected `int` <= 65535"),
        (settings.Relay, RELAY, "127.0.0.0/8", "fd00::/64",
         "cluster[0]: prefix fd00::/64 is shorter than /96: a hint carries 32 bits"),
        (settings.Relay, RELAY, "127.0.0.0/8", "127.0.0.1/8",
         "cluster[0].prefix: 127.0.0.1/8 has host bits set"),
        (settings.Relay, RELAY, "9000, 9099", "9099, 9000",
         "cluster[0]: ports 9099 to 9000 are no range of ports"),
        (settings.Relay, RELAY, COMMON, COMMON + COMMON.partition('"keys"')[2],
         "cluster: an id stands there twice"),
        (settings.Transceiver, TRANSCEIVER, "127.0.0.1:9000", "127.0.0.1:8999",
         "transceiver.listen: 127.0.0.1:8999 is outside its cluster (127.0.0.0/8,"
         " ports 9000 to 9099): no relay would find it"),
        (settings.Transceiver, TRANSCEIVER, '["127.0.0.0/8"]', "[]",
         "transceiver.relay_prefixes: Expected `array` of length >= 1"),
        (settings.Transceiver, TRANSCEIVER, "[keys]", '[backend]\nkind = "cuckoo"\n[keys]',
         "backend.kind: Invalid enum value 'cuckoo'"),
        (settings.Transceiver, TRANSCEIVER, "[keys]", '[backend]\nkind = "realtime"\n[keys]',
         'backend.url: kind "realtime" needs the server\'s address'),
        (settings.Transceiver, TRANSCEIVER, "[keys]", '[backend]\nurl = "wss://h/"\n[keys]',
         'backend.url: kind "parrot" has none; "realtime" is meant?'),
        (settings.Transceiver, TRANSCEIVER, "[keys]",
         '[backend]\nkind = "realtime"\nurl = "https://h/"\n[keys]',
         "backend.url: 'https://h/' starts with neither wss:// nor ws://"),
        (settings.Transceiver, TRANSCEIVER, "[keys]",
         '[backend]\nkind = "realtime"\nurl = "ws://h/"\nca_file = "c"\n[keys]',
         "backend.ca_file: nothing is trusted by ws://; wss:// is meant?"),
        (settings.Transceiver, TRANSCEIVER, "[keys]", "[backend]\nrate_hz = 8000\n[keys]",
         "backend.rate_hz: Invalid enum value 8000"),
        (settings.Transceiver, TRANSCEIVER, "[keys]",
         '[backend.headers]\nAuthorization = "Bearer x"\n[keys]',
         "backend.headers: a key belongs in key_file, not here"),
        (settings.Transceiver, TRANSCEIVER, "[keys]",
         '[backend.headers]\nX-A = "a\\nb"\n[keys]',
         "backend.headers[...]: Expected `str` matching regex"),
        (settings.Transceiver, TRANSCEIVER, "[keys]", '[[model]]\nkind = "parrot"\n[keys]',
         "model[0]: Object missing required field `name`"),
        (settings.Transceiver, TRANSCEIVER, "[keys]",
         '[[model]]\nname = "a"\n[[model]]\nname = "a"\n[keys]',
         "model: a name stands there twice"),
        (settings.Transceiver, TRANSCEIVER, "[keys]",
         '[[model]]\nname = "a"\nkind = "realtime"\n[keys]',
         'model[0].url: kind "realtime" needs'),
        (settings.Signaling, SIGNALING, "[keys]", "offer_octets_max = 1\n[keys]",
         "signaling.offer_octets_max: Expected `int` >= 1024"),
        (settings.Signaling, SIGNALING, "127.0.0.1:8080", "0.0.0.0:8080",
         "signaling.keys_file: without API keys only this machine may call, and 0.0.0.0:8080 is"),
        (settings.Signaling, SIGNALING, "listen", "[", "not TOML: "),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, shape: type, text: str, old: str, new: str, message: str) -> None:
    assert old in text
    path = write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(path, shape)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_what_moved_to_recovery_is_read_where_it_was(tmp_path: Path) -> None:
    """A relay of the version before has these keys in [redis]; its file goes on to work."""
    text = RELAY + '\n[redis]\nurl = "redis://127.0.0.1:1"\n'
    moved = "waiting_max = 7\nwait_s = 0.25\nlookups_per_s = 9\nunknown_s = 1.0\nunknown_max = 5\n"
    before = settings.load(write(tmp_path, text + moved), settings.Relay)
    after = settings.load(write(tmp_path, f"{text}[recovery]\n{moved}"), settings.Relay)
    assert before.recovery == after.recovery != settings.Recovery()
    assert before.recovery.waiting_max == 7 and before.recovery.wait_s == 0.25
    assert settings.load(write(tmp_path, text), settings.Relay).recovery == settings.Recovery()
    both = f"{text}wait_s = 0.25\n[recovery]\nwait_s = 0.25\n"
    with pytest.raises(settings.SettingsError, match=r"redis\.wait_s: it stands in \[recovery\]"):
        settings.load(write(tmp_path, both), settings.Relay)
    for odd in ("redis = 3\n" + RELAY, "recovery = 3\n" + text + moved):
        with pytest.raises(settings.SettingsError, match="object"):
            settings.load(write(tmp_path, odd), settings.Relay)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(settings.SettingsError, match=r"none\.toml: No such file or directory"):
        settings.load(tmp_path / "none.toml", settings.Relay)


def test_key_files_that_cannot_be_trusted(tmp_path: Path) -> None:
    path = write(tmp_path, RELAY).with_name("keys")
    path.chmod(0o640)
    with pytest.raises(settings.SettingsError, match=r"keys: mode 0640 lets others .* chmod 600"):
        settings.load_keys(path)
    path.chmod(0o600)
    path.write_text("0 nonsense\n")
    with pytest.raises(settings.SettingsError, match="keys: line 1: the secret is not 64"):
        settings.load_keys(path)
    with pytest.raises(settings.SettingsError, match="No such file"):
        settings.load_keys(tmp_path / "absent")
    path.write_text(KEY)
    with pytest.raises(settings.SettingsError, match="no key 4 in it to mint with"):
        settings.load_keys(path, 4)
    assert isinstance(settings.load_keys(path), ufrag.Keyring)


def test_a_key_that_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model-key"
    path.write_text("sk-abc\n")
    path.chmod(0o600)
    assert settings.load_secret(path) == "sk-abc"
    for wrong in ("", "two words", "one\ntwo", "caf\u00e9"):
        path.write_text(wrong)
        with pytest.raises(settings.SettingsError, match=r"model-key: expected one line") as caught:
            settings.load_secret(path)
        assert not wrong or wrong not in str(caught.value)
    path.chmod(0o604)
    with pytest.raises(settings.SettingsError, match=r"model-key: mode 0604 lets others"):
        settings.load_secret(path)


ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("relay", settings.Relay),
        ("transceiver", settings.Transceiver),
        ("signaling", settings.Signaling),
    ],
)
def test_example_files_show_every_key_at_its_default(
    tmp_path: Path, name: str, shape: type
) -> None:
    """With the comment signs taken away nothing changes, and no key of the shape is missing."""
    text = (ROOT / "config" / f"{name}.toml").read_text()
    as_shipped = settings.load(write(tmp_path, text), shape)
    spelt_out = re.sub(r"^#(\w+ = |\[+\w+\]+$)", r"\1", text, flags=re.MULTILINE)
    # The address and the files of a model server are refused for the kind that has none.
    spelt_out = spelt_out.replace('kind = "parrot"', 'kind = "realtime"', 1)
    if shape is settings.Signaling:  # relays stand here or at sites, never both
        spelt_out = spelt_out.replace('relays = ["203.0.113.5:3478"]\n', "", 1)
        spelt_out = spelt_out.replace("trusted_proxies = []", 'trusted_proxies = ["192.0.2.1/32"]')
    everything = settings.load(write(tmp_path, spelt_out), shape)
    if isinstance(everything, settings.Relay):
        # Tables that may be left out: at their defaults too but for what has none.
        assert everything.redis and everything.redis == settings.Redis(url=everything.redis.url)
        assert everything.vip
        assert everything.vip == settings.Vip(addresses=everything.vip.addresses)
        everything = msgspec.structs.replace(everything, redis=None, vip=None)
        face = everything.transit
        assert face.listen and face.internal and face.relay_prefixes
        assert (
            msgspec.structs.replace(face, listen=None, internal=None, relay_prefixes=())
            == settings.Transit()
        )
        assert everything.cluster[1].ways()
        everything = msgspec.structs.replace(
            everything, transit=settings.Transit(), cluster=everything.cluster[:1]
        )
    else:
        assert everything.redis
        assert everything.redis == settings.SharedRedis(url=everything.redis.url)
        everything = msgspec.structs.replace(everything, redis=None)
    if isinstance(everything, settings.Transceiver):
        assert everything.model == (settings.Model(name="parrot"),)
        assert everything.backend.url and everything.backend.key_file and everything.backend.ca_file
        backend = msgspec.structs.replace(
            everything.backend, kind="parrot", url=None, key_file=None, ca_file=None
        )
        everything = msgspec.structs.replace(everything, backend=backend, model=())
    if isinstance(everything, settings.Signaling):
        assert everything.ice_server and everything.whip.elsewhere
        whip = msgspec.structs.replace(everything.whip, elsewhere=None)
        everything = msgspec.structs.replace(everything, ice_server=(), whip=whip)
        everything = without_sites(everything)
    if isinstance(everything, settings.Signaling):
        table = everything.signaling
        assert table.keys_file and table.tls_certificate and table.tls_key
        table = msgspec.structs.replace(
            table, keys_file=None, tls_certificate=None, tls_key=None, trusted_proxies=()
        )
        table = msgspec.structs.replace(table, relays=as_shipped.signaling.relays)
        assert everything.limits == front.Limits()
        everything = msgspec.structs.replace(everything, signaling=table, limits=None)
    # The id to mint with has no default in the file: by default it follows the key file.
    everything = msgspec.structs.replace(
        everything, keys=msgspec.structs.replace(everything.keys, mint_id=None)
    )
    assert msgspec.to_builtins(everything, enc_hook=str) == msgspec.to_builtins(
        as_shipped, enc_hook=str
    )
    for table, kind in typing.get_type_hints(shape).items():
        fields = [getattr(each, "__struct_fields__", ()) for each in (kind, *typing.get_args(kind))]
        for key in itertools.chain(*fields):
            assert re.search(rf"^#?{key} = ", text, re.MULTILINE) or (table, key) in OTHERS_ONLY


def without_sites(found: settings.Signaling) -> settings.Signaling:
    """What says where sites and clusters are has no default; the rest of it is at its own."""
    assert found.steering and found.site[0].status
    shown = {
        name: getattr(found.steering, name)
        for name in ("country_header", "latitude_header", "longitude_header", "database")
    }
    assert all(shown.values())
    at = {"latitude": found.steering.latitude, "longitude": found.steering.longitude}
    assert found.steering == front.Steering(**shown, **at)
    cluster = msgspec.structs.replace(found.cluster[0], latitude=None, longitude=None, redis=None)
    return msgspec.structs.replace(found, site=(), steering=None, cluster=(cluster,))


# Only a transceiver mints.
OTHERS_ONLY = {("keys", "mint_id")}
