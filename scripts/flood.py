"""The load test of a relay and of all that stands behind it: real protocol, honest statistics.

    flood.py packets      thousands of clients' datagrams through a relay: loss, delay, what is most
    flood.py calls        whole WebRTC calls through signaling, at a rate: set-up, replies, silence
    flood.py attack       the attacks of the relay's threat model beside live calls
    flood.py chaos        parts are killed, restarted, moved while calls run: what do they notice?
    flood.py approaches   the same calls straight, by one port, through TURN, through this relay
    flood.py compare      runs of `packets` beside one another: which figures differ?
    flood.py echo         a transceiver for the packets of a load elsewhere
    flood.py first        first datagrams of clients in a file, for other tools

Each has --help; the first five have --json, and --report FILE: a page with plots.

Rules that stay true:
- Load is sent only to addresses that were named. Public ones need --i-own-this-target.
- Everything stops by itself, and Ctrl-C ends all that was started.
- What the tool costs itself stands beside the figures; and where microseconds are measured
  (packets), how exact its clock is and how much it makes with an echo in place of the relay.
- The schedule is the clock's: what leaves late is late from the moment it was meant to leave.
"""

from pathlib import Path
from typing import Annotated

import approaches
import assault
import barrage
import chaos
import dialling
import firsts
import reflector
import repeats
import typer

import endpoints
import settings

CLIENTS_MAX = 1_000_000
"""A client each of 127.0.0.0/8 would be 16 million; a file of a million has 130 MB."""

cli = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@cli.callback()
def _main() -> None:
    """The load test of a relay and of all that stands behind it."""


@cli.command()
def first(
    clients: Annotated[int, typer.Option(min=1, max=CLIENTS_MAX, help="How many.")],
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")],
    host: Annotated[str, typer.Option(help="Address of the transceiver.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 9000,
    config: Annotated[Path, typer.Option(help="The relay's configuration.")] = firsts.CONFIG,
    keys: Annotated[
        Path | None, typer.Option(help="The key file (default: the configuration's).")
    ] = None,
    cluster: Annotated[
        int | None, typer.Option(help="Id of the cluster (default: the configuration's first).")
    ] = None,
) -> None:
    """Write the first datagram of each client: a big-endian 16-bit length and so many octets each.

    A relay with the same key forwards them, and all that the clients send afterwards.
    """
    try:
        found = settings.load(config, settings.Relay)
        path = keys or found.keys.file
        firsts.make_keys(path)
        keyring = settings.load_keys(path, found.keys.mint_id)
        home = firsts.home(found, cluster)
        at = endpoints.Endpoint(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        records = [
            firsts.record(firsts.check(keyring, home, at.address, port)) for _ in range(clients)
        ]
    except ValueError as error:  # settings' and ufrag's sentences
        raise typer.BadParameter(str(error)) from error
    out.write_bytes(b"".join(records))


cli.command("approaches")(approaches.approaches)
cli.command("attack")(assault.attack)
cli.command("calls")(dialling.calls)
cli.command("chaos")(chaos.chaos)
cli.command("compare")(repeats.compare)
cli.command("echo")(reflector.echo)
cli.command("packets")(barrage.packets)

if __name__ == "__main__":
    cli()
