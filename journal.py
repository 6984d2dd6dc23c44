"""The journal: what a program writes down, a line a record, for people or for machines.

    text   2026-11-21 10:00:00,123 session INFO call …0bCd1e ended: hung up request_id=1a2b3c4d …
    json   {"time":"2026-11-21T10:00:00.123Z","level":"info","logger":"session","pid":7,…}

What it owns: the two forms, what `fields` adds to a record, and the one handler that writes.

Rules that stay true:
- A record is one line of at most LINE_OCTETS_MAX octets of UTF-8, whatever is in it: what is too
  long is cut and says so, and control characters do not leave their line. Only a traceback has
  several lines, and only as text.
- Writing never raises into whoever logs: what cannot be written is counted, and the next line that
  can be says how many were lost.
- Clients appear as the network of their site (`masked`). Keys, whole call ids and ufrags are not
  handed in: what is handed in is written.

It decides nothing about what is worth a line, and rotates nothing: that is the service manager's.

JSON https://www.rfc-editor.org/rfc/rfc8259
"""

import datetime
import ipaddress
import logging
import sys
import time
from typing import Any, Literal, TextIO

import orjson

Form = Literal["text", "json"]

VARIABLE = "EARSHOT_LOG_FORMAT"
"""Environment variable that stands for `--log-format`: a drop-in of a unit that changes it need not
repeat ExecStart."""

HELP = "How log lines are written: text or json."

LINE_OCTETS_MAX = 8192
"""Docker cuts lines at 16 KiB and syslog's usual limit is 8: a line that is cut in two is no JSON
any more. Tracebacks are a few kilobytes."""

TEXT_CHARACTERS_MAX = 512
"""Of one field's text. A sentence fits; nobody's document does."""

_CONTROLS = {
    number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160), 0x2028, 0x2029)
}
_PLAIN_FORM = "%(asctime)s %(name)s%(process_id)s %(levelname)s %(message)s"


def fields(**named: Any) -> dict[str, Any]:
    """What a record says for machines too: `log.info("…", extra=fields(status=201))`.

    Values are numbers, text, None (left out), or lists and dictionaries of those.
    """
    return {"fields": {name: value for name, value in named.items() if value is not None}}


def configure(form: Form, *, processes: bool = False, stream: TextIO | None = None) -> None:
    """Write all that is logged from INFO on in this form, to stderr; with the process's id, if it
    is one of several."""
    formatter = Json() if form == "json" else Text(processes)
    handler = Writer(stream or sys.stderr, formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def masked(host: str | None) -> str:
    """A client's address as logs may have it: IPv4 keeps 24 bits and IPv6 48, which is what a
    provider gives to a site. Empty for what is no address."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return f"{ipaddress.IPv6Network((address, 48), strict=False).network_address}x"
        address = address.ipv4_mapped
    return f"{str(address).rpartition('.')[0]}.x"


def line(text: str, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """Text of a stranger's as part of a line: without control characters, cut if it is longer."""
    if len(text) > characters_max:
        text = f"{text[:characters_max]}…"
    return text.translate(_CONTROLS)


class Text(logging.Formatter):
    """A record for people."""

    def __init__(self, processes: bool = False) -> None:
        """With `processes`, each line names the process that wrote it."""
        super().__init__(_PLAIN_FORM)
        self._processes = processes

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        record.process_id = f"[{record.process}]" if self._processes else ""
        record.message = line(record.message, LINE_OCTETS_MAX // 4)
        text = super().formatMessage(record)
        for name, value in getattr(record, "fields", {}).items():
            text += f" {name}={_plain(value)}"
        return text

    def format(self, record: logging.LogRecord) -> str:
        """The record, cut to LINE_OCTETS_MAX."""
        octets = super().format(record).encode(errors="backslashreplace")
        if len(octets) > LINE_OCTETS_MAX:
            octets = octets[: LINE_OCTETS_MAX - 4] + b" ..."
        return octets.decode(errors="ignore")


def _plain(value: Any) -> str:
    if isinstance(value, str) and value and " " not in value and '"' not in value:
        return line(value)
    return line(orjson.dumps(_safe(value)).decode())


class Json(logging.Formatter):
    """A record for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object. What of it is too long goes first by its fields, then its traceback."""
        wrong = self.formatException(record.exc_info) if record.exc_info else None
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        head: dict[str, Any] = {
            "time": f"{at:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": _cut(record.getMessage(), LINE_OCTETS_MAX // 8),
        }
        named = getattr(record, "fields", {})
        tail = {} if wrong is None else {"exception": _cut_front(wrong, LINE_OCTETS_MAX // 4)}
        for more in (named, {"cut": sorted(named)[:32]}):
            # First in order and last in value: what a record is made of has the last word.
            octets = orjson.dumps({**head, **_safe(more), **head, **tail})
            if len(octets) <= LINE_OCTETS_MAX:
                return octets.decode()
        return orjson.dumps({**head, "message": head["message"][:64], "cut": True}).decode()


def _safe(value: Any, depth: int = 4) -> Any:
    """A value that orjson takes, of bounded text."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else str(value)
    if depth and isinstance(value, dict):
        return {_cut(str(name), 64): _safe(each, depth - 1) for name, each in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_safe(each, depth - 1) for each in value]
    return _cut(str(value), TEXT_CHARACTERS_MAX)


def _cut(text: str, characters_max: int) -> str:
    """Text as UTF-8 can have it: strangers' JSON brings lone surrogates."""
    if len(text) > characters_max:
        text = f"{text[:characters_max]}…"
    return text.encode(errors="backslashreplace").decode()


def _cut_front(text: str, characters_max: int) -> str:
    """The end of a traceback: the fault itself is in its last lines."""
    return _cut(text if len(text) <= characters_max else f"…{text[-characters_max + 1 :]}", 1 << 20)


class Writer(logging.Handler):
    """Writes lines, and keeps every fault to itself."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        """Write to a stream of text, or to the octets under it, where it has them."""
        super().__init__()
        self.setFormatter(formatter)
        self.lost = 0
        """Records that could not be written since the last that could."""
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            written = self._formatted(record)
            if self.lost:
                written += "\n" + self._formatted(_said("log lines were lost", lost=self.lost))
            self._write(written + "\n")
            self.lost = 0
        except Exception:  # a full disk, a closed pipe: nobody's request fails for that
            self.lost += 1

    def _formatted(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:
            # Such as arguments that do not fit the message, or a __str__ that fails.
            where = f"{record.filename}:{record.lineno}: {type(error).__name__}"
            return self.format(_said(f"a record could not be written: {where}"))

    def _write(self, text: str) -> None:
        octets = text.encode(errors="backslashreplace")
        under = getattr(self._stream, "buffer", None)
        if under is None:
            self._stream.write(octets.decode())
        else:  # UTF-8, whatever the locale says: JSON is nothing else
            under.write(octets)
        self._stream.flush()


def _said(message: str, **named: Any) -> logging.LogRecord:
    record = logging.LogRecord("journal", logging.WARNING, __file__, 0, message, (), None)
    record.__dict__.update(fields(**named))
    record.created = time.time()
    return record
