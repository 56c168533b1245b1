"""Malicious pictures and folders: each is classified, or refused in one sentence that names it."""

import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from harness import Wrong, few_or_many, judge, run
from PIL import Image
from shelf import read_scores

from binaryvit_cli import main
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.loading import load_images
from binaryvit_runtime.errors import UserError


MODES = {
    "PNG": ["1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "I", "I;16", "F", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB"],
    "PPM": ["1", "L", "I", "RGB"],
    "TGA": ["L", "LA", "P", "RGB", "RGBA"],
    "ICO": ["RGBA"],
}
SIZES = [(1, 1), (1, 2), (2, 1), (3, 500), (500, 3), (1, 1000), (32, 16), (33, 17), (257, 255), (700, 300)]
EXTENSIONS = [".png", ".jpg", ".JPEG", ".tif", ".gif", ".webp", ".bmp"]


def random_picture(rng: Random, mode: str, size: tuple[int, int]) -> Image.Image:
    pixels = np.frombuffer(rng.randbytes(4 * size[0] * size[1]), np.uint8).reshape(size[1], size[0], 4)
    kind = rng.choice(["noise", "black", "white"])
    pixels = {"noise": pixels, "black": np.zeros_like(pixels), "white": np.full_like(pixels, 255)}[kind]
    if mode == "I;16":
        return Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    if mode == "F":
        extreme = rng.choice([1.0, 255.0, 1e30, -1.0, np.nan, np.inf])
        return Image.fromarray(pixels[..., 0].astype(np.float32) / 255 * np.float32(extreme))
    if mode == "I":
        return Image.fromarray(pixels[..., 0].astype(np.int32) * rng.choice([1, 257, 2**20, -1]))
    picture = Image.fromarray(pixels, "RGBA")
    if mode == "LAB":
        return Image.merge("LAB", picture.split()[:3])
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def ordinary(rng: Random) -> bytes:
    """A picture of any mode, size and format. Its EXIF orientation is valid or damaged."""
    format = rng.choice(list(MODES))
    picture = random_picture(rng, rng.choice(MODES[format]), rng.choice(SIZES))
    options = {}
    if format in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.6:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535])
        encoded = bytearray(exif.tobytes())
        if rng.random() < 0.4 and format != "TIFF":
            encoded[rng.randrange(len(encoded))] ^= 0xFF
        options["exif"] = exif if format == "TIFF" else bytes(encoded)
    if format in ("PNG", "GIF") and rng.random() < 0.3:
        options["transparency"] = rng.choice([0, 255])
    if picture.mode in ("LA", "RGBA", "RGB", "I", "I;16", "1", "F"):
        options.pop("transparency", None)
    encoded = io.BytesIO()
    picture.save(encoded, format, **options)
    return encoded.getvalue()


def cut(rng: Random) -> bytes:
    content = ordinary(rng)
    return content[: rng.randrange(len(content))]


def animated(rng: Random) -> bytes:
    frames = [random_picture(rng, "RGB", (20, 10)) for _ in range(rng.choice([2, 50]))]
    encoded = io.BytesIO()
    frames[0].save(encoded, rng.choice(["GIF", "PNG", "WEBP", "TIFF"]), save_all=True, append_images=frames[1:])
    return encoded.getvalue()


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    told = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", told)


def png(width: int, height: int, *more: bytes, rows: bytes | None = None, depth: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(rows if rows is not None else bytes(3 * width + 1) * height, 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def weird_chunks(rng: Random) -> bytes:
    more = [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(rng.randbytes(100))),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8))),
        chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8))),
        chunk(b"tEXt", b"x\0" + bytes(10**6)),
        chunk(b"eXIf", rng.randbytes(50)),
        chunk(b"gAMA", b""),
        chunk(b"tRNS", rng.randbytes(rng.choice([0, 1, 6, 300]))),
        chunk(b"PLTE", rng.randbytes(rng.choice([0, 3, 4, 900]))),
        chunk(b"sRGB", b"\xff", crc=1),
        chunk(b"abcd", rng.randbytes(10)),
        chunk(b"acTL", struct.pack(">II", 2**31, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
    ]
    return png(20, 10, *rng.sample(more, rng.choice([1, 2, 3])))


def bomb(rng: Random) -> bytes:
    """A few bytes whose header promises a large picture."""
    large = rng.choice([(2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (60_000, 1), (1, 60_000), (20_000, 20_000)])
    kinds = [
        lambda: png(*large, rows=bytes(100)),
        lambda: png(10, 10, rows=bytes(10**8)),
        lambda: png(13_000, 13_000, rows=bytes((13_000 // 8 + 1) * 13_000), depth=1, color=0),
        lambda: png(9_000, 9_000, rows=bytes(9_001 * 9_000), color=3),
        lambda: b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        lambda: b"P6 " + f"{large[0]} {large[1]} 255\n".encode() + bytes(100),
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, *large, 1, 24, 0, 0, 0, 0, 0, 0),
        lambda: tall_jpeg(),
        lambda: elongated(),
    ]
    return rng.choice(kinds)()


def tall_jpeg() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (60, 60_000), "red").save(encoded, "JPEG")
    return encoded.getvalue()


def elongated() -> bytes:
    encoded = io.BytesIO()
    Image.new("L", (1, 60_000), 9).save(encoded, "PNG")
    return encoded.getvalue()


def other(rng: Random) -> bytes:
    """A file that is not a picture, or a picture in a rare format."""
    return rng.choice(
        [
            b"",
            b"\0" * 1000,
            b"%PDF-1.4\n%%EOF",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n(x) run\nshowpage\n",
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            b"<html>404</html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xd9",
            b"RIFF\xff\xff\xff\xffWEBPVP8 ",
            b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(100),
            b"MM\0*\0\0\0\x08\0\x01\x01\x00\0\x04" + b"\xff" * 8 + b"\0\0\0\x08",
            b"\x00\x00\x00\x1cftypheic" + bytes(100),
            b"8BPS\0\x01" + b"\xff" * 40,
            b"DDS " + b"\xff" * 124,
            b"icns" + struct.pack(">I", 2**31) + b"ic10" + struct.pack(">I", 8),
            rng.randbytes(5000),
        ]
    )


PICTURES = [ordinary, ordinary, ordinary, cut, cut, animated, weird_chunks, weird_chunks, bomb, other]


@few_or_many(10, 400)
def test_hostile_pictures(cases, assert_withstood, look_at):
    def attack(rng: Random, folder: Path) -> str:
        file = folder / f"a{rng.choice(EXTENSIONS)}"
        make = rng.choice(PICTURES)
        file.write_bytes(make(rng))
        return look_at(file)

    assert_withstood(attack, cases, "hostile pictures")


def put_fifo(rng: Random, path: Path) -> None:
    os.mkfifo(path)


def put_socket(rng: Random, path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def put_folder(rng: Random, path: Path) -> None:
    path.mkdir()
    (path / rng.choice(["a.png", ".hidden.png", "Thumbs.db", "a.pdf"])).write_bytes(ordinary(rng))


def put_unreadable(rng: Random, path: Path) -> None:
    """A file without read permission. Root can read it nevertheless."""
    path.write_bytes(ordinary(rng))
    path.chmod(0)


THINGS: list[Callable[[Random, Path], None]] = [
    put_fifo,
    put_socket,
    put_folder,
    put_unreadable,
    lambda rng, path: path.symlink_to(path),
    lambda rng, path: path.symlink_to("nothing"),
    lambda rng, path: path.symlink_to(path.parent),
    lambda rng, path: path.symlink_to("/dev/zero"),
    lambda rng, path: path.symlink_to("/dev/tty"),
    lambda rng, path: path.symlink_to("/proc/self/mem"),
    lambda rng, path: path.write_bytes(rng.choice(PICTURES[:3])(rng)),
    lambda rng, path: path.write_bytes(other(rng)),
]
NAMES = [
    *["a.png", "b.JPG", "c", ".hidden.png", ".ipynb_checkpoints", "Thumbs.db", "desktop.ini", "x.jpg", "n.pdf"],
    *["-v.png", "--json.png", "*.png", "[a].png", "a\nb.png", "\x1b[31m.png", " .png", "é.png", "日本.png", "a" * 250],
    *["e\u0301.png", "\u202e.png", "%s{}.png", "http:..png", "~.png", "$HOME.png", os.fsdecode(b"gr\xfcn.png")],
]


@few_or_many(3, 250)
def test_hostile_folders(cases, assert_withstood, shelf):
    good = (shelf / "a.png").read_bytes()

    def attack(rng: Random, folder: Path) -> str:
        photos = folder / "photos"
        for parent in ("ant", "bee", "bee/deeper"):
            (photos / parent).mkdir(parents=True)
            for name in rng.sample(NAMES, rng.choice([1, 3])):
                rng.choice(THINGS)(rng, photos / parent / name)
        certain = photos / "ant" / "certain.png"
        certain.write_bytes(good)
        if rng.random() < 0.2:
            (photos / "bee" / "deeper").chmod(0)
        argument = rng.choice([photos, photos, f"{photos}/**", f"{photos}/**/*.png", f"{photos}/*/*"])
        said = run(main, "classify", shelf / "packed", argument, "--json", "--top-k=3")
        assert said.code in (0, 1), said
        assert "Traceback" not in said.err, said
        answers = json.loads(said.out)
        read_scores(said)
        if not any(answer.get("labels") and answer["image"] == str(certain) for answer in answers):
            raise Wrong(f"{certain} is not answered for: {said}")
        if sum("error" in answer for answer in answers) != len(said.errors()) or (said.code == 1) != bool(
            said.errors()
        ):
            raise Wrong(f"answers and errors differ: {said}")
        try:
            load_images(DataArguments(train_dir=str(photos), validation_dir=str(photos)), 0, None, None)
        except UserError as error:
            assert "\n" not in str(error), error
            return "refused"
        return judge(said) if said.code == 0 else "refused"

    assert_withstood(attack, cases, "hostile folders")
