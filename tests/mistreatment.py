"""A relay that mistreats datagrams by their number: instruments must find each of them.

For any client and one transceiver. Every 7th datagram is lost on its way in, every 11th on its way
out, every 13th comes twice, every 17th is changed; those that open flows (a load's first run) pass.
"""

PROGRAM = """
import select, socket, sys
sys.path[:0] = [{root!r}]
import frame
public, inner = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
for sock in (public, inner):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    sock.bind(("127.0.0.1", 0))
print(public.getsockname()[1], flush=True)
target = "127.0.0.1", int(sys.argv[1])

def number(payload):
    if payload[0] != 0x80 or payload[4] == 1:
        return 1
    return int.from_bytes(payload[8:16], "little")

while True:
    for sock in select.select([public, inner], [], [])[0]:
        datagram, source = sock.recvfrom(2048)
        if sock is public:
            if number(datagram) % 7:
                inner.sendto(frame.header(*source) + datagram, target)
            continue
        client, datagram = frame.client(datagram), datagram[frame.HEADER_OCTETS:]
        n = number(datagram)
        if not n % 17:
            datagram = datagram[:16] + bytes(8) + datagram[24:]
        if n % 11:
            public.sendto(datagram, client)
        if not n % 13:
            public.sendto(datagram, client)
"""
"""To be formatted with `root`, the checkout, and run with the transceiver's port."""
