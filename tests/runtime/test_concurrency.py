"""One classifier in many threads, in forks, in an event loop and in other processes: the answers are those of one thread."""

import asyncio
import contextlib
import copy
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from teams import recorded_teams

from binaryvit_runtime import Classifier, UserError, pixels
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


PICTURES = [np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), np.uint8) for seed in range(10)]
FORKS = 20
HANGS = 3  # seconds

pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    classifier = Classifier.from_pretrained("binaryvit-digits", threads=2)
    classifier.network.limit_team(2)  # as for a large network
    return classifier


@pytest.fixture(scope="module")
def expected() -> list:
    return Classifier.from_pretrained("binaryvit-digits", threads=1)(PICTURES)


def assert_fork_succeeds(check) -> None:
    """`check()` is true in a fork, which does not hang."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if check() else 2
        os._exit(code)
    deadline = time.monotonic() + HANGS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the forked process hangs")
        time.sleep(0.001)
    assert ended[1] == 0


@forks
def test_a_process_forks_while_its_threads_classify(classifier, expected):
    stop, wrong = threading.Event(), []

    def classify() -> None:
        while not stop.is_set():
            if classifier(PICTURES[0]) != expected[0]:
                wrong.append("a thread of the parent process")

    threads = [threading.Thread(target=classify) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(FORKS):
            assert_fork_succeeds(lambda: classifier(PICTURES[:3]) == expected[:3])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


@forks
def test_a_process_forks_while_a_thread_opens_a_huge_picture(tmp_path, monkeypatch):
    """Pillow's limit is disabled meanwhile. The fork has the limit, and opens huge pictures, too."""
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    opened, limit = Image.open, Image.MAX_IMAGE_PIXELS
    is_open = threading.Event()

    def open_slowly(source):
        if Image.MAX_IMAGE_PIXELS is None:
            is_open.set()
            time.sleep(0.2)
        return opened(source)

    def is_refused() -> bool:
        with contextlib.suppress(Image.DecompressionBombError):
            pixels.open_picture(tmp_path / "huge.png")
            return False
        return limit == Image.MAX_IMAGE_PIXELS

    monkeypatch.setattr(Image, "open", open_slowly)
    thread = threading.Thread(target=is_refused)
    thread.start()
    is_open.wait(HANGS)
    assert_fork_succeeds(is_refused)
    thread.join()


# Replaces C++'s `operator new`. In a thread that asks for it, an allocation of 8 bytes takes long: the engine's list of
# idle workspaces grows by one pointer, and is locked meanwhile.
SLOW_ALLOCATION = """
#include <stdlib.h>
#include <unistd.h>
static __thread int is_slow;
static volatile int has_begun;
void be_slow(void) { is_slow = 1; }
int begun(void) { return has_begun; }
void *_Znwm(size_t size) {
    if (is_slow && size == sizeof(void *)) {
        has_begun = 1;
        usleep(300000);
    }
    return malloc(size ? size : 1);
}
"""
FORKING_WHILE_THE_ENGINE_HOLDS_A_LOCK = """
import ctypes, os, signal, sys, threading
import numpy as np
from binaryvit_runtime import Classifier

library = ctypes.CDLL(sys.argv[1])
classifier, picture = Classifier.from_pretrained("binaryvit-digits", threads=1), np.zeros((32, 32, 3), np.uint8)
thread = threading.Thread(target=lambda: (library.be_slow(), classifier(picture)))
thread.start()
while not library.begun():
    pass
child = os.fork()
if child == 0:
    signal.alarm(10)
    classifier(picture)
    os._exit(0)
thread.join()
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_a_process_forks_while_another_thread_holds_the_lock_of_the_engine(tmp_path):
    (tmp_path / "slow.c").write_text(SLOW_ALLOCATION)
    library = str(tmp_path / "slow.so")
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "slow.c", "-o", library], check=True)
    command = [sys.executable, "-c", FORKING_WHILE_THE_ENGINE_HOLDS_A_LOCK, library]
    subprocess.run(command, env=os.environ | {"LD_PRELOAD": library}, check=True, timeout=60)


def test_uploads_are_decoded_at_once(classifier, expected, monkeypatch):
    uploads, decode, together = [], pixels.to_rgb, threading.Barrier(2, timeout=HANGS)
    for picture in PICTURES[:2]:
        Image.fromarray(picture).save(upload := io.BytesIO(), "png")
        uploads.append(upload)

    def decode_at_once(*arguments):
        together.wait()
        return decode(*arguments)

    monkeypatch.setattr("binaryvit_runtime.classifier.to_rgb", decode_at_once)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(classifier, uploads)) == expected[:2]


def test_many_threads_share_a_classifier(classifier, expected):
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(classifier, PICTURES * 10)) == expected * 10


@pytest.mark.parametrize("is_small", [False, True])
def test_one_picture_takes_a_thread_for_each_cpu_and_one_in_a_small_network(is_small, expected, monkeypatch):
    """Threads of one picture spin while they wait for each other: hundreds of them would take all CPUs for minutes."""
    monkeypatch.setattr("binaryvit_runtime.cpus.available_cpus", lambda: 3)
    if not is_small:
        monkeypatch.setattr("binaryvit_runtime.cpus.SMALL_NETWORK", 0)
    classifier = Classifier.from_pretrained("binaryvit-digits", threads=1000)
    with recorded_teams() as teams:
        assert classifier(PICTURES[0]) == expected[0]
    assert teams == ([] if is_small else [3, 3])  # network and classifier


def test_an_event_loop_classifies_in_its_executor(classifier, expected):
    async def classify() -> list:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(None, classifier, picture) for picture in PICTURES))

    assert asyncio.run(classify()) == expected


def test_a_spawned_process_gets_a_classifier(classifier, expected):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(classifier, [PICTURES]) == expected


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_loaded_from_the_same_folder(duplicate, expected, tmp_path, monkeypatch):
    shutil.copytree(shipped_models()["binaryvit-digits"], tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    classifier = Classifier.from_pretrained("digits", threads=2, max_pixels=10**6)
    monkeypatch.chdir("/")
    same = duplicate(classifier)
    assert same.threads == 2
    assert same.max_pixels == 10**6
    assert same(PICTURES) == expected


def test_a_pickle_of_a_deleted_model_is_refused_by_name(tmp_path):
    shutil.copytree(shipped_models()["binaryvit-digits"], tmp_path / "digits")
    pickled = pickle.dumps(Classifier.from_pretrained(tmp_path / "digits"))
    Path(tmp_path / "digits").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"digits.* cannot be loaded"):
        pickle.loads(pickled)


class SlowFile(io.BytesIO):
    """A file whose sender goes on when `more` is set."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.begun, self.more, self.at_once = threading.Event(), threading.Event(), []

    def read(self, *size):
        self.begun.set()
        self.at_once.append(self.more.wait(60))
        return super().read(*size)


def test_members_of_an_archive_are_read_one_after_the_other(classifier, expected, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, picture in enumerate(PICTURES):
            content = io.BytesIO()
            Image.fromarray(picture).save(content, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with tarfile.open(tmp_path / "a.tar") as archive:
            for _ in range(20):
                assert classifier(archive.extractfile(member) for member in archive.getmembers()) == expected
    finally:
        sys.setswitchinterval(switch)


@forks
def test_a_file_that_waits_for_its_sender_stops_no_other_file_and_no_fork(classifier, expected):
    content = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(content, "PNG")
    slow = SlowFile(content.getvalue())
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(classifier, slow) for _ in range(2)]
        slow.begun.wait(60)
        assert classifier(io.BytesIO(content.getvalue())) == expected[0]
        assert_fork_succeeds(lambda: classifier(io.BytesIO(content.getvalue())) == expected[0])
        assert not slow.more.is_set()
        assert len(slow.at_once) == 0  # one of the two threads reads, the other one waits for it
        slow.more.set()
        assert [answer.result() for answer in waiting] == [expected[0], expected[0]]
    assert slow.at_once == [True, True]
