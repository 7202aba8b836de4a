"""Peak memory reacts to what is allocated."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest

from edgetune.runtime.memory import peak_rss_mb, reset_peak, trim, use_huge_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start the peak anew")


@linux
def test_peak_rises_by_what_is_allocated_and_stays():
    reset_peak()
    before = peak_rss_mb()
    block = bytearray(100_000_000)
    block[::4096] = b"x" * len(block[::4096])
    during = peak_rss_mb()
    assert 60 < during - before < 130  # a system may take other pages back meanwhile
    del block
    assert peak_rss_mb() == pytest.approx(during, abs=5)


@linux
def test_reset_forgets_an_old_peak():
    reset_peak()
    block = bytearray(b"x") * 100_000_000
    high = peak_rss_mb()
    del block
    reset_peak()
    assert peak_rss_mb() < high - 90


def test_elsewhere_the_system_tells_in_its_own_unit(monkeypatch, tmp_path):
    import resource

    from edgetune.runtime import memory

    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    raw = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_rss_mb() == pytest.approx(raw / 1e6, rel=0.1)
    monkeypatch.setattr(sys, "platform", "freebsd14")
    assert peak_rss_mb() == pytest.approx(raw * 1024 / 1e6, rel=0.1)


def test_reset_where_it_is_not_allowed_does_nothing(monkeypatch, tmp_path):
    from edgetune.runtime import memory

    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no" / "clear_refs")
    reset_peak()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory so")
def test_freed_memory_goes_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(50_000) for _ in range(1200)]
    for block in blocks:
        ctypes.memset(block, 1, 50_000)
    for block in blocks[:-1]:  # the last one keeps the heap's end where it is
        libc.free(ctypes.c_void_p(block))
    reset_peak()
    before = peak_rss_mb()
    trim()
    reset_peak()
    after = peak_rss_mb()
    libc.free(ctypes.c_void_p(blocks[-1]))
    assert after < before - 40


@linux
def test_large_regions_are_moved_to_huge_pages_and_keep_what_they_hold():
    import mmap

    size = 32 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        wanted = bytes(range(256)) * (size // 256)
        block.write(wanted)
        sparse = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        sparse[0] = 1
        resident = peak_rss_mb()
        moved = use_huge_pages()
        grown = peak_rss_mb() - resident
        assert block[:] == wanted
        assert moved == 0 or moved >= size - (4 << 20)  # 0: a kernel before 6.1, or no such pages free
        assert grown < 20  # what was not resident did not become so
        sparse.close()


def test_elsewhere_pages_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages() == 0
