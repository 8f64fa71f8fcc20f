"""Who reads a link, and what happens to its descriptors when it ends."""

from __future__ import annotations

import os
import threading

from tests.conftest import wait_until
from zerodeploy.control.reading import LinkReader
from zerodeploy.link.base import Running


class Pipes(Running):
    """A link of pipes; the test has the other ends."""

    def __init__(self) -> None:
        self.stdout, self.far_out = os.pipe()
        self.stderr, self.far_err = os.pipe()
        self.far_in, self.stdin = os.pipe()
        for fd in (self.stdout, self.stderr, self.stdin):
            os.set_blocking(fd, False)
        self.open = True

    def stop(self, patience_s: float = 0.5) -> None:
        pass

    def close(self) -> None:
        if self.open:
            self.open = False
            for fd in (self.stdout, self.stderr, self.stdin):
                os.close(fd)


def reader_of(pipes: Pipes, ended, said) -> LinkReader:
    return LinkReader(
        pipes, "test", 60.0, received=lambda data: None, said=said, ended=ended, tick=lambda: None, failed=lambda e: None
    )


def test_a_number_that_is_another_link_s_by_now_is_not_read():
    """Both outputs end at once: when the first end is dealt with, the numbers are given back and taken by somebody else."""
    pipes, heard = Pipes(), []
    taken: list[int] = []

    def ended() -> None:
        reader.retire()
        read, write = os.pipe()
        while read != pipes.stderr and len(taken) < 8:
            taken.extend((read, write))
            read, write = os.pipe()
        taken.extend((read, write))
        os.write(write, b"another link's first bytes")
        os.set_blocking(read, False)

    reader = reader_of(pipes, ended, heard.append)
    os.write(pipes.far_err, b"ours")
    os.close(pipes.far_out)
    reader.start()
    wait_until(lambda: not reader.thread.is_alive(), 5, "the reader has ended")
    assert pipes.stderr in taken, "the number was not taken again: the test shows nothing"
    assert os.read(pipes.stderr, 100) == b"another link's first bytes"
    assert b"another" not in b"".join(heard)
    reader.close()
    for fd in (*taken, pipes.far_err, pipes.far_in):
        os.close(fd)


def test_descriptors_are_given_back_when_the_reader_is_out():
    """Ended from another thread while the reader deals with something: the numbers stay ours until it is done."""
    pipes = Pipes()
    inside, go_on = threading.Event(), threading.Event()

    def said(data: bytes) -> None:
        inside.set()
        go_on.wait(10)

    reader = reader_of(pipes, lambda: None, said)
    reader.start()
    os.write(pipes.far_err, b"x")
    assert inside.wait(5)
    ender = threading.Thread(target=reader.retire)
    ender.start()
    ender.join(0.2)
    assert ender.is_alive() and pipes.open and os.fstat(pipes.stdout)
    go_on.set()
    ender.join(5)
    assert not pipes.open and not ender.is_alive()
    reader.close()
    reader.poke()  # after all is over: must not write to a number that is somebody else's
    for fd in (pipes.far_out, pipes.far_err, pipes.far_in):
        os.close(fd)
