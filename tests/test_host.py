"""What the host offers."""

import os

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
