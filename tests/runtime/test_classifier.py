"""What `Classifier` takes, what it refuses, and that threads, forks and generators do not change its answers."""

import gc
import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from packed_model import save_packed
from PIL import Image
from tiny import tiny_config

import binaryvit_hf
import binaryvit_runtime
from binaryvit_runtime import Answer, Classifier, UserError
from binaryvit_runtime.classifier import LOOKAHEAD
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.packed_model import sigmoid


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("model"), tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier.from_pretrained(folder, threads=3)


@pytest.fixture(scope="module")
def arrays():
    return list(np.random.default_rng(0).integers(0, 256, (20, 30, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def expected(folder, arrays):
    one_thread = Classifier.from_pretrained(folder, threads=1)
    return [one_thread(array) for array in arrays]


@pytest.fixture(scope="module")
def files(arrays, tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(root / f"{number:02}.png")
    return sorted(root.iterdir())


def test_one_picture_has_one_answer(classifier, arrays, files, expected):
    with open(files[0], "rb") as file:
        for picture in (str(files[0]), files[0], arrays[0], Image.fromarray(arrays[0]), Image.open(files[0]), file):
            assert classifier(picture) == expected[0]
            assert classifier([picture]) == [expected[0]]
        assert not file.closed
        assert classifier(file) == expected[0]


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda items: (item for item in items), lambda items: dict.fromkeys(items)]
)
def test_any_iterable_of_pictures_has_answers_in_its_order(kind, classifier, files, expected):
    assert classifier(kind(files)) == expected
    stream = classifier.stream(kind(files))
    assert [answer.labels for answer in stream] == expected


def test_kinds_of_pictures_may_be_mixed(classifier, arrays, files, expected):
    mixed = [arrays[0], str(files[1]), Image.open(files[2]), io.BytesIO(files[3].read_bytes()), files[4]]
    assert classifier(mixed) == expected[:5]


def test_a_folder_has_answers_in_the_order_of_its_files(classifier, files, expected):
    assert classifier(files[0].parent) == expected
    assert classifier(str(files[0].parent)) == expected


def test_no_pictures_have_no_answers(classifier):
    assert classifier([]) == []
    assert classifier(iter(())) == []
    assert list(classifier.stream([])) == []


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_the_number_of_threads_does_not_change_the_answers(threads, folder, arrays, expected):
    classifier = Classifier.from_pretrained(folder, threads=threads)
    assert classifier(arrays) == expected
    assert classifier(arrays[0]) == expected[0]


def test_several_threads_share_a_classifier(classifier, arrays, expected):
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(classifier, arrays if call % 2 else arrays[call]) for call in range(12)]
        for call, future in enumerate(calls):
            assert future.result() == (expected if call % 2 else expected[call])


def test_several_threads_share_a_picture(classifier, files, expected, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.tiff"):
        Image.open(files[0]).resize((400, 500)).save(tmp_path / name, exif=exif)
        alone = classifier(tmp_path / name)
        for _ in range(5):
            shared = [Image.open(tmp_path / name)] * 8 + [open(tmp_path / name, "rb")] * 8  # noqa: SIM115
            assert classifier(shared) == [alone] * 16
            shared[-1].close()


def test_a_pillow_image_is_left_as_it_was(classifier, tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    film = Image.open(tmp_path / "film.gif")
    film.info["note"] = 5
    first = classifier(film)
    film.seek(1)
    assert film.info["note"] == 5
    assert classifier(film) == classifier(frames[1])
    film.seek(0)
    assert classifier(film) == first == classifier(frames[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_forks_after_a_call(classifier, arrays, expected):
    assert classifier(arrays) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads are alive, which is the point
        child = os.fork()
    if child == 0:
        os._exit(0 if classifier(arrays) == expected and classifier(arrays[0]) == expected[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert classifier(arrays) == expected


def test_pictures_are_read_as_the_answers_need_them(classifier, arrays, expected):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield arrays[taken[-1] % len(arrays)]

    stream = classifier.stream(endless())
    assert taken == []
    assert next(stream).labels == expected[0]
    assert len(taken) <= LOOKAHEAD * classifier.threads + 1
    before = threading.active_count()
    for number, answer in zip(range(1, 50), stream):
        assert answer.labels == expected[number % len(arrays)]
    del stream, answer
    gc.collect()
    assert threading.active_count() < before  # the threads of the stream ended with it


def test_with_one_thread_the_first_answer_does_not_wait_for_the_second_picture(folder, arrays, expected):
    def pictures():
        yield arrays[0]
        pytest.fail("the second picture is read")

    stream = Classifier.from_pretrained(folder, threads=1).stream(pictures())
    assert next(stream).labels == expected[0]


def test_an_error_of_the_iterable_is_raised(classifier, arrays):
    def broken():
        yield from arrays[:5]
        raise KeyError("camera")

    with pytest.raises(KeyError, match="camera"):
        classifier(broken())
    with pytest.raises(KeyError, match="camera"):
        list(Classifier.stream(classifier, broken()))


@pytest.fixture
def broken_file(tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    return file


def test_a_broken_file_among_others_is_named(classifier, files, expected, broken_file):
    pictures = [*files[:2], broken_file, *files[2:]]
    with pytest.raises(UserError, match=r"broken\.png' cannot be read as an image"):
        classifier(pictures)
    answers = list(classifier.stream(pictures))
    assert [answer.image for answer in answers] == [str(picture) for picture in pictures]
    assert [answer.labels for answer in answers] == [*expected[:2], None, *expected[2:]]
    assert "broken.png' cannot be read" in answers[2].error
    assert answers[2].describe() == {"image": str(broken_file), "error": answers[2].error}


WRONG_ARRAYS = {
    "floats": np.zeros((8, 8, 3), np.float32),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "a batch": np.zeros((1, 8, 8, 3), np.uint8),
    "a vector": np.zeros(8, np.uint8),
    "two channels": np.zeros((8, 8, 2), np.uint8),
    "truth": np.zeros((8, 8), bool),
    "no rows": np.zeros((0, 8, 3), np.uint8),
    "no columns": np.zeros((8, 0), np.uint8),
    "objects": np.zeros((8, 8), object),
}


@pytest.mark.parametrize("array", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_other_arrays_are_refused_by_their_shape(array, classifier, arrays):
    with pytest.raises(UserError) as refusal:
        classifier(array)
    assert str(array.shape) in str(refusal.value)
    with pytest.raises(UserError, match="Picture 1: ") as refusal:
        classifier([arrays[0], array])
    assert str(array.shape) in str(refusal.value)


def short_name(value) -> str:
    """A name of a case. `repr` of an object is another one in every process."""
    return type(value).__name__ if "object at" in repr(value) else repr(value)


@pytest.mark.parametrize(
    "picture, words",
    [
        ("https://example.org/cat.jpg", "is a URL: download"),
        ("http://example.org/cat.jpg", "is a URL: download"),
        ("none.jpg", "'none.jpg' does not exist."),
        ("", "'' does not exist."),
        ("a\0b", "cannot be read as an image"),
        (Path("/"), "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        (b"\x89PNG", "not bytes"),
        (io.BytesIO(b"no image"), "cannot be read as an image"),
        (io.StringIO("no image"), "cannot be read as an image"),
        (5, "not int"),
        (None, "not NoneType"),
        (["a.jpg"], "not list"),
    ],
    ids=short_name,
)
def test_what_is_no_picture_is_refused_in_one_sentence(picture, words, classifier, arrays):
    with pytest.raises(UserError) as refusal:
        classifier([arrays[0], picture])
    assert words in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    fine, wrong, again = classifier.stream([arrays[0], picture, arrays[0]])
    assert fine.labels == again.labels
    assert wrong.labels is None
    assert words in wrong.error


@pytest.mark.parametrize("images", [5, None, 2.5, b"\x89PNG", object()], ids=short_name)
def test_an_argument_that_is_no_picture_is_refused(images, classifier):
    with pytest.raises(UserError, match=f"not {type(images).__name__}"):
        classifier(images)


@pytest.mark.parametrize("images", ["cat.jpg", Path("cat.jpg"), np.zeros((8, 8, 3), np.uint8), io.BytesIO(), 5])
def test_a_stream_of_one_picture_is_refused_before_it_is_read(images, classifier):
    with pytest.raises(UserError, match="takes an iterable of pictures"):
        classifier.stream(images)


def test_a_folder_without_pictures_is_refused(classifier, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no files with an image's extension"):
        classifier(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all folders")
def test_a_part_of_a_folder_that_cannot_be_read_is_named(classifier, files, tmp_path):
    (tmp_path / "a.png").write_bytes(files[0].read_bytes())
    (tmp_path / "locked").mkdir(0)
    with pytest.raises(UserError, match="locked' cannot be read"):
        classifier(tmp_path)


def test_more_labels_than_the_model_has_are_all_of_them(classifier, arrays, expected):
    assert classifier(arrays[0], top_k=10**30) == expected[0]
    assert len(expected[0]) == 3
    assert classifier(arrays[0], top_k=1) == expected[0][:1]


@pytest.mark.parametrize("top_k", [0, -1, 2.0, "5", None, True])
def test_another_number_of_labels_is_refused_before_a_picture_is_read(top_k, classifier):
    for call in (classifier, classifier.stream):
        with pytest.raises(UserError, match="top_k"):
            call(iter([5]), top_k=top_k)


@pytest.mark.parametrize("background", ["whiteish", "#ff000080", "none", 5, ("white",), ""], ids=repr)
def test_another_background_is_refused_before_a_picture_is_read(background, classifier):
    for call in (classifier, classifier.stream):
        with pytest.raises(UserError, match="background must be None or"):
            call(iter([5]), background=background)


@pytest.mark.parametrize("threads", [0, -1, 2.0, "2", True, 2**31, 2**64])
def test_another_number_of_threads_is_refused(threads, folder):
    with pytest.raises(UserError, match="threads must be a whole number"):
        Classifier.from_pretrained(folder, threads=threads)


@pytest.mark.parametrize("max_pixels", [0, -1, 1e6, "9", True])
def test_another_number_of_pixels_is_refused(max_pixels, folder):
    with pytest.raises(UserError, match="max_pixels must be a whole number"):
        Classifier.from_pretrained(folder, max_pixels=max_pixels)


def test_files_of_pictures_with_more_than_max_pixels_are_refused(folder, files, expected):
    classifier = Classifier.from_pretrained(folder, max_pixels=30 * 40)
    assert classifier(files) == expected
    classifier = Classifier.from_pretrained(folder, max_pixels=30 * 40 - 1)
    for picture in (files[0], io.BytesIO(files[0].read_bytes())):
        with pytest.raises(UserError, match="is too large: it has 40 x 30 pixels, more than 1199"):
            classifier(picture)


def test_a_folder_that_cannot_be_written_is_read(folder, arrays, expected, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "model")
    for path in (*copy.iterdir(), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(copy.iterdir())
    assert Classifier.from_pretrained(copy)(arrays[0]) == expected[0]
    assert sorted(copy.iterdir()) == before
    copy.chmod(0o755)


def test_transparent_pictures_are_marked(classifier, arrays):
    transparent = np.dstack([arrays[0], np.full((30, 40), 99, np.uint8)])
    assert [answer.transparent for answer in classifier.stream([arrays[0], transparent])] == [False, True]


def test_an_answer_describes_itself_for_json():
    labels = [{"label": "ant", "score": 1.0}]
    assert Answer("a.png", labels).describe() == {"image": "a.png", "labels": labels}


def test_a_large_negative_logit_has_the_score_0_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sigmoid(np.array([-200.0, 0.0, 200.0], np.float32)).tolist() == [0, 0.5, 1]


def test_names_that_are_imported_when_they_are_used_are_listed():
    assert set(binaryvit_runtime.__all__) <= set(dir(binaryvit_runtime))
    assert set(binaryvit_hf.__all__) <= set(dir(binaryvit_hf))
