"""What the host offers."""

import os
import select
import signal
import socket
import struct

import pytest

import host


def test_there_is_a_cpu():
    assert host.cpus() == sorted(set(host.cpus())) != []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_pinning_happens_in_the_process_that_asks():
    before = host.cpus()
    pid = os.fork()
    if not pid:
        os._exit(0 if host.pin(before[-1]) and host.cpus() == [before[-1]] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert host.cpus() == before


def test_a_cpu_that_is_not_there():
    assert not host.pin(100_000)


def test_sections_do_not_overlap_and_start_at_zero():
    memory = host.SharedMemory("earshot-test", {"a": 10, "b": 5000, "c": 1})
    try:
        for name, octets in (("a", 10), ("b", 5000), ("c", 1)):
            section = memory.section(name)
            assert bytes(section) == bytes(octets)
            section[:] = name.encode() * octets
        assert bytes(memory.section("a")) == b"a" * 10
        with pytest.raises(KeyError):
            memory.section("d")
    finally:
        os.close(memory.fd)


def test_a_descriptor_is_all_that_another_process_needs():
    memory = host.SharedMemory("earshot-test", {"a": 10, "b": 5000}, 7, {"flows": 3})
    memory.section("b")[:2] = b"hi"
    other = host.SharedMemory.adopt(os.dup(memory.fd))
    assert (other.layout, other.parameters) == (7, {"flows": 3})
    assert other.sections == memory.sections
    assert bytes(other.section("b")[:2]) == b"hi"
    other.section("a")[0] = 9
    assert memory.section("a")[0] == 9
    os.close(memory.fd)
    os.close(other.fd)


def header(text, magic=host.MEMORY_MAGIC, octets=None):
    return magic + struct.pack("=I", len(text) if octets is None else octets) + text.encode()


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"", "cannot be mapped"),
        (b"x", "does not describe itself"),
        (bytes(8192), "does not describe itself"),
        (header("{}", b"earshot2").ljust(8192), "does not describe itself"),
        (header("{").ljust(8192), "description is broken"),
        (header("{}", octets=1 << 31).ljust(8192), "description is broken"),
        (header("[]").ljust(8192), "description is broken"),
        (header('{"layout":1,"sections":3,"parameters":{}}').ljust(8192), "is broken"),
        (header('{"layout":1,"sections":{"a":[1]},"parameters":{}}').ljust(8192), "is broken"),
        (header('{"layout":1,"sections":{"a":[0,8193]},"parameters":{}}').ljust(8192), "outside"),
        (header('{"layout":1,"sections":{"a":[-8,8]},"parameters":{}}').ljust(8192), "outside"),
        (header('{"layout":1,"sections":{"a":[8,-9]},"parameters":{}}').ljust(8192), "outside"),
    ],
)
def test_what_is_no_such_memory_is_refused(octets, reason):
    fd = os.memfd_create("test")
    os.write(fd, octets)
    with pytest.raises(ValueError, match=reason):
        host.SharedMemory.adopt(fd)
    os.close(fd)  # still the caller's


def test_a_socket_is_no_memory():
    with socket.socket() as sock, pytest.raises(ValueError, match="cannot be mapped"):
        host.SharedMemory.adopt(sock.fileno())


def test_only_one_process_claims_a_memory():
    """The next one waits until it is dead, whatever killed it."""
    memory = host.SharedMemory("earshot-test", {"a": 1})
    said, say = os.pipe()

    def child(mark):
        pid = os.fork()
        if not pid:
            memory.claim()
            os.write(say, mark)
            signal.pause()
        return pid

    first = child(b"1")
    assert os.read(said, 1) == b"1"
    second = child(b"2")
    assert not select.select([said], [], [], 0.05)[0]
    os.kill(first, signal.SIGKILL)
    assert os.read(said, 1) == b"2"
    os.kill(second, signal.SIGKILL)
    for pid in (first, second):
        os.waitpid(pid, 0)
    for fd in (said, say, memory.fd):
        os.close(fd)


def test_forked_processes_share_it():
    memory = host.SharedMemory("earshot-test", {"a": 8})
    pid = os.fork()
    if not pid:
        memory.section("a")[0] = 42
        os._exit(0)
    os.waitpid(pid, 0)
    assert memory.section("a")[0] == 42
    os.close(memory.fd)


def test_attach_reads_what_was_published(tmp_path):
    memory = host.SharedMemory("earshot-test", {"a": 8, "b": 8})
    path = tmp_path / "state" / "test.json"
    host.publish(path, 1, [memory])
    memory.section("b")[:] = b"12345678"
    (seen,) = host.attach(path, 1, "earshot-test")
    assert bytes(seen.section("b")) == b"12345678"
    assert seen.section("b").readonly
    with pytest.raises(ValueError, match="layout 1, not 2"):
        host.attach(path, 2, "earshot-test")
    with pytest.raises(FileNotFoundError, match="another program"):
        host.attach(path, 1, "earshot")
    os.close(memory.fd)
    with pytest.raises(OSError, match="No such file"):
        host.attach(path, 1, "earshot-test")
    host.unpublish(path)
    assert not path.exists()


def test_what_a_successor_published_stays(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('{"pid": 1}')
    host.unpublish(path)
    assert path.exists()
    host.unpublish(tmp_path / "nowhere")
