"""Which clients have an assured flow, seen from outside the workers."""

import random

import census
import flows
import frame

SLOTS = 3000
LIMITS = flows.Limits(flows=SLOTS, tentative=SLOTS, addresses=16, idle_s=60, tentative_idle_s=15)
HOP = frame.name("10.4.1.2", 9000, 2)


def header(number):
    return frame.header(f"198.51.{number >> 8}.{number & 255}", 5000)


def key(number):
    return frame.key(header(number))


def ufrag(number):
    return b"%023d" % number


class Host:
    """The tables of a few workers, and a census of them."""

    def __init__(self, workers=1):
        memories = [memoryview(bytearray(flows.octets(SLOTS))) for _ in range(workers)]
        self.tables = [flows.Table(memory, LIMITS, 0) for memory in memories]
        self.index = census.Index(memories)

    def open(self, *numbers, worker=0, now=1.0, assured=True):
        for number in numbers:
            refused = self.tables[worker].open(header(number), HOP, ufrag(number), now)
            assert refused is None
        if assured:
            self.tables[worker].answered(map(header, numbers), now)

    def close(self, *numbers, worker=0):
        """Let all but these live on, for as long as it takes these to expire."""
        table, going = self.tables[worker], set(map(header, numbers))
        for now in range(1000, 2000):
            table.active.update(set(table.hops) - going)
            table.sweep(now)
        assert not going & set(table.hops)

    def take(self):
        self.index.look()
        numbers, entries = self.index.take(10**6)
        assert len(numbers) == len(entries)
        return dict(entries)


def test_flows_are_due_once_they_are_assured():
    seen = Host()
    seen.open(1, 2, assured=False)
    assert seen.take() == {}
    assert seen.index.count() == [(2, 0)]
    seen.tables[0].answered([header(2)], 2.0)
    assert seen.take() == {key(2): ufrag(2)}
    assert seen.take() == {}
    assert seen.index.count() == [(1, 1)]


def test_clients_are_found_in_any_table_and_no_longer_than_they_are_there():
    seen = Host(workers=3)
    seen.open(1, 2, worker=1)
    seen.open(3, worker=2)
    assert seen.index.find(key(1)) is None, "nothing is known before a look"
    seen.index.look()
    assert [seen.index.find(key(n)) for n in range(4)] == [None, ufrag(1), ufrag(2), ufrag(3)]
    seen.close(1, worker=1)
    assert seen.index.find(key(1)) is None, "it is read when it is asked for"
    seen.index.look()
    assert [seen.index.find(key(n)) for n in range(4)] == [None, None, ufrag(2), ufrag(3)]
    assert seen.index.count() == [(0, 0), (0, 1), (0, 1)]


def test_a_client_that_went_to_another_worker():
    seen = Host(workers=2)
    seen.open(1, worker=0)
    seen.index.look()
    seen.open(1, worker=1, now=5.0)
    seen.index.look()
    seen.close(1, worker=0)
    seen.index.look()
    assert seen.index.find(key(1)) == ufrag(1)
    seen.close(1, worker=1)
    seen.index.look()
    assert seen.index.find(key(1)) is None


def test_a_slot_that_changed_its_client_between_two_looks():
    seen = Host()
    seen.open(1)
    assert seen.take() == {key(1): ufrag(1)}
    seen.close(1)
    seen.open(2, now=2000.0)
    assert seen.take() == {key(2): ufrag(2)}
    assert seen.index.find(key(1)) is None


def test_all_are_written_again_in_a_period():
    seen = Host(workers=2)
    seen.open(*range(1000), worker=0)
    seen.open(*range(2000, 2500), worker=1)
    everything = seen.take()
    assert len(everything) == 1500
    for steps in (1, 7, 400):  # also where a share is less than a slot, or ends within one
        again = {}
        for _ in range(steps):
            seen.index.refresh(1.0000001 / steps)
            again |= seen.take()
        assert again == everything, steps
    seen.index.refresh(50.0)
    assert seen.take() == everything


def test_what_was_not_written_is_due_again():
    seen = Host()
    seen.open(1, 2, 3)
    seen.index.look()
    numbers, entries = seen.index.take(2)
    assert len(entries) == 2 and len(seen.index.due) == 1
    seen.close(1)
    seen.index.look()
    seen.index.put_back(numbers)
    assert set(seen.take()) == {key(2), key(3)}


def ssrc(number):
    return 100_000 + number


def test_clients_are_found_by_the_ssrc_that_their_slot_has_now():
    seen = Host(workers=2)
    seen.open(1, worker=0)
    seen.open(2, 3, worker=1)
    stranger = header(4)
    seen.index.look()
    assert seen.index.follow(stranger, ssrc(2)) is None
    for number in (1, 2):
        seen.tables[number - 1].heard(header(number), ssrc(number), 1.0)
    assert seen.index.follow(stranger, ssrc(2)) is None, "nothing is known before a look"
    assert len(seen.take()) == 3
    assert seen.index.follow(stranger, ssrc(1)) == (ufrag(1), False)
    assert seen.index.follow(frame.header("198.51.0.2", 6000), ssrc(2)) == (ufrag(2), True)
    assert seen.take() == {}, "an SSRC is not written to Redis"
    # Another one: what was looked up is read from the slot.
    seen.tables[1].listening.add(header(2))
    seen.tables[1].heard(header(2), ssrc(7), 1.0)
    assert seen.index.follow(stranger, ssrc(2)) is None
    seen.index.look()
    assert seen.index.follow(stranger, ssrc(7)) == (ufrag(2), False)
    seen.close(2, worker=1)
    assert seen.index.follow(stranger, ssrc(7)) is None
    seen.index.look()
    assert len(seen.index._ssrcs) == 1


def test_a_session_is_found_by_the_addresses_that_it_had():
    seen = Host(workers=2)
    for worker, number in enumerate((1, 2)):
        table = seen.tables[worker]
        table.open(header(number), HOP, ufrag(1), 1.0)
        table.answered([header(number)], 1.0)
        table.heard(header(number), ssrc(1), 1.0)
    seen.open(3)
    seen.tables[0].heard(header(3), ssrc(1), 1.0)
    seen.index.look()
    assert seen.index.follow(header(4), ssrc(1)) is None, "two sessions"
    assert seen.index.follow(frame.header("198.51.0.2", 7), ssrc(1)) == (ufrag(1), True)
    assert seen.index.follow(frame.header("198.51.0.3", 7), ssrc(1)) == (ufrag(3), True)
    seen.close(3)
    assert seen.index.follow(header(4), ssrc(1)) == (ufrag(1), False)


def test_it_agrees_with_the_tables_whatever_happens():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    seen, now = Host(workers=2), 1.0
    for turn in range(60):
        for worker, table in enumerate(seen.tables):
            now += 1
            free = [n for n in rng.sample(range(SLOTS), 40) if header(n) not in table.hops]
            seen.open(*free, worker=worker, now=now, assured=False)
            table.answered(rng.sample(sorted(table.hops), len(table.hops) // 2), now)
            for one in rng.sample(sorted(table.listening), len(table.listening) // 2):
                table.heard(one, rng.randrange(1, 2000), now)
            if turn % 9 == 8:
                table.active.update(rng.sample(sorted(table.hops), len(table.hops) // 2))
                for _ in range(70):
                    now += 2
                    table.sweep(now)
        seen.index.look()
        seen.index.refresh(1.0)
        for n in range(SLOTS):
            read = [
                flow.ufrag
                for table in seen.tables
                for flow in [flows.read(table._memory, table._slots.get(header(n), 0))]
                if header(n) in table.hops and flow.state is flows.State.ASSURED
            ]
            found = seen.index.find(key(n))
            assert found in read if len(read) == 1 else bool(found) == bool(read), f"seed {seed}"
        everything = [flow for table in seen.tables for flow in flows.read_all(table._memory)]
        for wanted in range(1, 2000, 7):
            having = {
                flow.ufrag
                for flow in everything
                if flow.ssrc == wanted and flow.state is flows.State.ASSURED
            }
            found = seen.index.follow(frame.header("192.0.2.1", 1), wanted)
            assert found == ((*having, False) if len(having) == 1 else None), f"seed {seed}"
    assert len(seen.index._held) <= 2 * SLOTS
