"""Processes that decode: what they give, what ends them, what they know, and how many there are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.serving import bombs
from models.preprocess.decoder import Decoder
from models.preprocess.decoder_child import DecoderUnavailable
from models.preprocess.image import ImagePreprocessor
from models.preprocess.limits import InputError
from models.priority import DECODER_NICENESS
from tests.support.models.drawings import PLAIN, drawing, encoded

SMALL = encoded(drawing(), "AVIF")
LARGE = encoded(drawing((3_000, 2_000)), "JPEG")
# Tenths of a second of CPU time.
RUNS = bombs.BOMBS["BMP of runs"](2_000_000)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with closing(Decoder()) as found:
        yield found


@pytest.fixture(autouse=True)
def no_others() -> None:
    """Ends the processes that other tests of this run have left idle."""
    Decoder.shared().close()


def children() -> list[int]:
    """Processes of this one that decode."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return [
        int(line.split()[0])
        for line in found.stdout.splitlines()
        if "models.preprocess.decoder_process" in line
    ]


def refusal(decoder: Decoder, data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        ImagePreprocessor(PLAIN, decoder=decoder)(data)
    return caught.value.code


def test_what_another_process_decodes_is_what_this_one_does(decoder: Decoder) -> None:
    prepare = ImagePreprocessor(PLAIN, decoder=decoder)
    waits: list[bool] = []
    for _ in range(2):
        found = prepare(LARGE, waits.append)
        assert found.shape == (16, 16, 3)
    assert waits == [True, False] * 2
    assert len(children()) == 1
    small = encoded(drawing((3_000, 2_000)).resize((1_500, 1_000)), "PNG")
    np.testing.assert_allclose(found * 255, prepare(small) * 255, atol=6)


def test_what_takes_too_much_time_is_ended_and_harms_no_other(decoder: Decoder) -> None:
    strict = Decoder(base_seconds=-0.05)
    assert refusal(strict, RUNS) == "input_too_costly"
    assert strict.ended == 1
    with ThreadPoolExecutor(2) as threads:
        bad = threads.submit(refusal, decoder, RUNS)
        for _ in range(3):
            ImagePreprocessor(PLAIN, decoder=decoder)(SMALL)
        assert bad.result() in ("input_too_costly", "undecodable_image")


def test_what_takes_too_much_memory_is_refused_and_its_process_is_counted() -> None:
    with closing(Decoder(memory_bytes=16 << 20)) as decoder:
        for count in (1, 2):
            assert refusal(decoder, LARGE) == "input_too_costly"
            assert decoder.ended == count
            assert ImagePreprocessor(PLAIN, decoder=decoder)(SMALL).shape == (16, 16, 3)
            assert decoder.ended == count


def test_fifty_megapixels_are_decoded_in_the_memory_that_there_is(decoder: Decoder) -> None:
    """Also of a progressive JPEG, which is kept as coefficients too, and of what is turned."""
    image = Image.new("RGB", (7_000, 7_000), "green")
    exif = Image.Exif()
    exif[0x0112] = 6
    prepare = ImagePreprocessor(PLAIN, decoder=decoder)
    for data in (
        encoded(image, "JPEG", progressive=True, subsampling=0, exif=exif),
        encoded(image.convert("RGBA"), "PNG", compress_level=1),
    ):
        np.testing.assert_allclose(prepare(data).mean((0, 1)), (0, 128, 0), atol=2)


def test_a_process_that_dies_is_replaced(decoder: Decoder) -> None:
    prepare = ImagePreprocessor(PLAIN, decoder=decoder)
    expected = prepare(SMALL)
    (first,) = children()
    os.kill(first, signal.SIGKILL)
    np.testing.assert_array_equal(prepare(SMALL), expected)
    (second,) = children()
    assert second != first
    # The process dies for another reason than its image, so the image is tried again.
    threading.Timer(0.05, os.kill, (second, signal.SIGKILL)).start()
    assert refusal(decoder, RUNS) == "undecodable_image"
    np.testing.assert_array_equal(prepare(SMALL), expected)
    (third,) = children()
    assert third not in (first, second)


def test_there_are_no_more_than_allowed(decoder: Decoder) -> None:
    prepare = ImagePreprocessor(PLAIN, decoder=decoder)
    alone = prepare(LARGE)
    with ThreadPoolExecutor(6) as threads:
        for pixels in threads.map(prepare, [LARGE] * 12):
            np.testing.assert_array_equal(pixels, alone)
    assert 1 <= len(children()) <= 2


def test_small_images_do_not_wait_for_large_ones(decoder: Decoder) -> None:
    prepare = ImagePreprocessor(PLAIN, decoder=decoder)
    prepare(SMALL)
    with ThreadPoolExecutor(4) as threads:
        large = [threads.submit(refusal, decoder, RUNS) for _ in range(4)]
        done = 0
        while not all(one.done() for one in large):
            prepare(SMALL)
            done += 1
    assert done > 5
    assert len(children()) == 3


def test_it_knows_no_secret_loads_no_network_and_gives_way(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPWORK_ADMIN_KEY", "a-key-of-the-administrator")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    ImagePreprocessor(PLAIN, decoder=decoder)(SMALL)
    (child,) = children()
    names = {
        one.partition(b"=")[0] for one in Path(f"/proc/{child}/environ").read_bytes().split(b"\0") if one
    }
    assert names <= {
        b"PATH", b"PYTHONPATH", b"PYTHONHOME", b"LD_LIBRARY_PATH", b"LANG", b"LC_ALL", b"TMPDIR",
        b"OPENBLAS_NUM_THREADS", b"OMP_NUM_THREADS",
    }  # fmt: skip
    mapped = Path(f"/proc/{child}/maps").read_text()
    assert "torch" not in mapped
    assert "onnxruntime" not in mapped
    assert os.getpriority(os.PRIO_PROCESS, child) >= DECODER_NICENESS


def test_it_ends_with_its_parent() -> None:
    program = (
        "import os, sys\n"
        "from models.preprocess.decoder import Decoder\n"
        "from models.preprocess.image import ImagePreprocessor\n"
        "from tests.models.preprocess.test_decoder import PLAIN, SMALL, children\n"
        "ImagePreprocessor(PLAIN)(SMALL)\n"
        "print(*children(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    (child,) = map(int, found.stdout.split())
    begun = time.monotonic()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() - begun < 20
        time.sleep(0.05)


def test_where_none_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DecoderUnavailable, match="ended with status 1 before it was ready"):
        ImagePreprocessor(PLAIN, decoder=Decoder())(SMALL)
