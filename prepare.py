"""Data for train.py: an index of captioned images as they lie on disks, a cache of latents; the demo set.

    python prepare.py PATH ... --out=data/mine --dry_run     # what is there, without writing an index
    python prepare.py PATH ... --out=data/mine               # folders, tars, tables -> an index: no copies
    python prepare.py PATH ... --out=data/mine --latents     # and a cache of VAE latents
    python prepare.py text_encoder PATH --out=data/my_te     # a tokenizer and a tiny LM for PATH's captions
    python prepare.py demo                                   # data/demo, data/demo_unseen.txt, data/demo_te
    python prepare.py judge --ckpt=out/demo                  # how many unseen captions are drawn right

In order: the settings; what the demo shows; its data set; the text encoder; captioned images as they lie on
people's disks; the index; the cache of latents; the judge; commands.
"""
import bisect
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
import warnings
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import hdm
from sample import gather, generate


@dataclass
class DemoSettings:
    out: str = "data/demo"  # folder of pictures and captions; OUT_unseen.txt and OUT_te are written beside it
    count: int = 12000      # pictures; 12,000 take about 10 s on one core and 95 MB in blocks of 4 KB
    seed: int = 0           # picture i depends on (seed, i) alone; also of the text encoder's weights
    centred: bool = False   # for the camera: each shape in the middle, sized by the canvas's longer side


@dataclass
class TextEncoderSettings:
    out: str = "data/text_encoder"  # folder for the tokenizer and the model
    vocab: int = 4096               # most tokens; at least 257: the 256 bytes and the pad


@dataclass
class DataSettings:
    out: str = "data/index"         # folder for the index; latents go beside it
    caption: str = ""               # by columns of tables and .json: '{characters} $$ {artist} ||| {tags}'
    caption_lines: str = "join"     # a caption file's lines: join them, or choose one, each time anew
    sidecar: str = ""               # such as .nl.txt: more text from STEM.nl.txt, kept in place ...
    sidecar_place: str = "after"    # ... before or after the caption
    min_size: int = 0               # pixels of the short side
    max_ratio: float = 10.0         # long side to short side
    require_tag: list[str] = field(default_factory=list)  # leave out images without it; may be given often
    drop_tag: list[str] = field(default_factory=list)     # leave out images with it
    verify: bool = False            # decode each picture, in place of looking at its header and its end
    dry_run: bool = False           # write no index, but OUT.png, a sheet of pictures, crops and captions
    image_size: int = 256           # of training: side of the square crop
    text_encoder: str = hdm.TEXT_ENCODER   # its tokens are counted in a dry run ...
    text_length: int = 256                 # ... and those past this many
    latents: bool = False           # write a cache of VAE latents for image_size
    mean_only: bool = False         # without the posterior's variance: half the disk
    vae: str = hdm.EQ_VAE           # folder or hub id
    batch_size: int = 16            # images at a time in the VAE
    workers: int = 4                # threads that read for it
    device: str = "auto"            # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"             # of the VAE: float32, bfloat16; auto: 16 bit on CUDA


@dataclass
class JudgeSettings:
    ckpt: str = "out/demo"          # train.py's OUT_DIR or one checkpoint
    seeds: int = 8                  # pictures of each unseen caption, drawn from seeds 0, 1, ...
    camera: bool = False            # measure instead how far shifts and zooms move the shape


# ---- what the demo shows ----------------------------------------------------------------------------------
CANVASES = {(32, 32): 0.8, (32, 48): 0.1, (48, 32): 0.1}  # (height, width) in pixels: share of the pictures
RADIUS = {"small": 0.30, "large": 0.42}  # in short sides
CENTRED_CANVASES = {(32, 32): 0.5, (32, 48): 0.25, (48, 32): 0.25}
CENTRED_RADIUS = {"small": 0.20, "large": 0.32}  # in long sides, so that positions alone say what is where
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (245,) * 3, "black": (20,) * 3}
# In radii from the centre: the reach up, down and to either side; whether (y, x), y downwards, is inside.
SHAPES = {
    "circle": (1, 1, 1, lambda y, x: x**2 + y**2 <= 1),
    "square": (0.86, 0.86, 0.86, lambda y, x: np.fmax(abs(x), abs(y)) <= 0.86),
    "triangle": (1, 0.8, 1, lambda y, x: (y <= 0.8) & (1.8 * abs(x) <= y + 1)),
    "diamond": (1, 1, 0.75, lambda y, x: abs(x) / 0.75 + abs(y) <= 1),
    "cross": (1, 1, 1, lambda y, x: (np.fmax(abs(x), abs(y)) <= 1) & (np.fmin(abs(x), abs(y)) <= 0.33)),
    "ring": (1, 1, 1, lambda y, x: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.62**2))}
BACKGROUNDS = {"gray": (128, 128, 128), "navy": (25, 30, 80), "pink": (250, 190, 205), "teal": (20, 120, 120)}
ATTRIBUTES = {"size": RADIUS, "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
CAPTION = "a {} {} {} on a {} background"
COMBINATIONS = list(itertools.product(*ATTRIBUTES.values()))  # 384 of (size, colour, shape, background)
# The test of composing: 32 combinations stay out of training, though each of their words is in it.
UNSEEN = [words for words, (size, colour, shape, background) in zip(COMBINATIONS, np.ndindex(2, 8, 6, 4))
          if (size + colour + 2 * shape + 3 * background) % 12 == 0]


def centre_range(size, shape, height, width):
    """((lowest, highest) cy, (lowest, highest) cx), in pixels, that keep the whole shape on the canvas."""
    r = RADIUS[size] * min(height, width)
    up, down, side, _ = SHAPES[shape]
    return (up * r, height - down * r), (side * r, width - side * r)


def random_centre(rng, size, shape, height, width):
    """Uniform in the middle half of its range on each axis: anywhere is too hard for minutes of training."""
    ranges = centre_range(size, shape, height, width)
    return [low + (high - low) * rng.uniform(0.25, 0.75) for low, high in ranges]


def coverage(size, shape, height, width, cy, cx, r=None):
    """(height, width) share of each pixel inside the shape: drawn at four times the size, then averaged."""
    r = RADIUS[size] * min(height, width) if r is None else r                         # pixels
    y = ((np.arange(4 * height) + 0.5) / 4 - cy) / r
    x = ((np.arange(4 * width) + 0.5) / 4 - cx) / r
    return SHAPES[shape][3](y[:, None], x[None]).reshape(height, 4, width, 4).mean((1, 3))


def draw(size, colour, shape, background, height, width, cy, cx, r=None):
    """(height, width, 3) uint8: the shape with its centre at (cy, cx), in pixels from the top left corner."""
    ground = np.array(BACKGROUNDS[background])
    share = coverage(size, shape, height, width, cy, cx, r)[..., None]
    return np.rint(ground + share * (COLOURS[colour] - ground)).astype(np.uint8)


# ---- the demo data set, the text encoder ------------------------------------------------------------------
@contextlib.contextmanager
def whole_folder(out):
    """Yields a folder to write in, which takes the name `out` when the block is through: a half-written one
    never has that name. What stands there is replaced only if it is as we left it, never a stranger's."""
    out = Path(os.path.abspath(out))
    mark = out / ".prepare"  # how many files we wrote
    ours = mark.is_file() and mark.read_text() == str(len(os.listdir(out)) - 1)
    if out.exists() and not ours and not (out.is_dir() and not os.listdir(out)):
        raise hdm.UserError(f"--out: {out} is not as prepare.py wrote it: move it, or choose another --out")
    hdm.make_folder(out.parent, "--out")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".tmp") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        (new / ".prepare").write_text(str(len(os.listdir(new))))
        if out.exists():
            out.rename(Path(scratch, "old"))
        new.rename(out)


def make_demo(settings):
    out = os.path.abspath(settings.out)
    seen = [words for words in COMBINATIONS if words not in UNSEEN]
    # Each run of 352 pictures shows each combination once, in one shuffled order.
    order = np.random.default_rng(settings.seed).permutation(len(seen))
    canvases = CENTRED_CANVASES if settings.centred else CANVASES
    with whole_folder(out) as pictures, whole_folder(out + "_te") as encoder:
        # From all 352 captions, not from those drawn: a demo of 20 pictures, too, has one token per word.
        hdm.make_text_encoder([CAPTION.format(*words) for words in seen], encoder, seed=settings.seed)
        for i in range(settings.count):
            rng = np.random.default_rng((settings.seed, i))
            words = seen[order[i % len(seen)]]
            height, width = rng.choice(list(canvases), p=list(canvases.values()))
            place = random_centre(rng, words[0], words[2], height, width)
            if settings.centred:
                place = height / 2, width / 2, CENTRED_RADIUS[words[0]] * max(height, width)
            Image.fromarray(draw(*words, height, width, *place)).save(pictures / f"{i:05d}.png")
            (pictures / f"{i:05d}.txt").write_text(CAPTION.format(*words) + "\n")
    Path(out + "_unseen.txt").write_text("".join(CAPTION.format(*words) + "\n" for words in UNSEEN))
    print(f"{settings.count} pictures in {settings.out}; beside it _unseen.txt and _te, the text encoder")


def text_encoder(settings, source):
    index = open_index(source)
    captions = (hdm.parse_caption(index[i].caption) for i in range(len(index)))  # all alternatives' words
    with whole_folder(settings.out) as out:
        hdm.make_text_encoder(captions, out, settings.vocab)
    print(f"a text encoder for the words of {len(index)} captions in {settings.out}")


# ---- captioned images as they lie on people's disks --------------------------------------------------------
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif")
OTHERS = (".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tif", ".tiff")
TEXTS = (".txt", ".caption", ".json")            # of the caption beside an image: the first one there counts
TABLES = (".json", ".jsonl", ".csv", ".tsv")
NAME_COLUMNS = ("file_name", "file", "path", "filename", "id")
TEXT_COLUMNS = ("text", "caption", "prompt", "tags")
COLUMN = r"\{([^{}]+)\}"                         # in --caption
# name: path below the source, its identity; file: the image, or the tar that holds it at offset; texts: other
# files that its caption comes from; stamp: of these three; image: of file alone; lines: of its caption file;
# source: its number in the call; place: in [0, 1), a hash of the name, so that no added data move a picture
# across the split.
Picture = namedtuple(
    "Picture", "name file texts caption offset length width height weight stamp image lines source place")


class Report(dict):
    """{kind: {"count": n, "paths": the first thousand}} of what was left out."""

    def add(self, kind, path):
        entry = self.setdefault(str(kind), {"count": 0, "paths": []})
        entry["count"] += 1
        entry["paths"] += [printable(path)] * (len(entry["paths"]) < 1000)

    @contextlib.contextmanager
    def leaving_out(self, path):                 # what stops the block is counted, and stops nothing else
        try:
            yield
        except (hdm.UserError, OSError, ValueError, RecursionError, csv.Error) as error:
            self.add(error if isinstance(error, hdm.UserError) else "unreadable", path)


def printable(text):
    return text.encode(errors="backslashreplace").decode()  # names on disk, and captions, can be any bytes


def stamp_of(*files, key=()):
    """64 bits of a key and of the sizes and times of files: unchanged means not edited."""
    stats = [*key, *((info.st_size, info.st_mtime_ns) for info in map(os.stat, files))]
    return int.from_bytes(hashlib.blake2b(repr(stats).encode(), digest_size=8).digest(), "little")


def open_at(file, offset, length):
    """A span: a plain file, or a member of a tar, which is read whole."""
    stream = open(file, "rb")
    if not offset:
        return stream
    with stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(length))


def measure_image(stream, length, verify=False):
    """-> upright width and height of an image file of this length, from its header, or, verify, decoded.

    UserError, in words: zero bytes, no readable header, too large, truncated (JPEG, PNG, GIF and WebP have an
    end, BMP and AVIF do not), does not decode.
    """
    ends = dict(JPEG=rb"\xff\xd9", MPO=rb"\xff\xd9", PNG=rb"IEND\xaeB`\x82", GIF=rb"\0;[\0\r\n ]*\Z")
    trouble = "no readable header" if length else "zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # Pillow's, about what is judged here
            image = Image.open(stream, formats=["JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF"])  # by content
            start = stream.tell()
            # A PNG's own getexif would decode it, to look for EXIF behind the pixels.
            turned = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
        trouble = "truncated"
        # An end before start is that of a JPEG's thumbnail; 64 KB of anything may lie behind the end.
        stream.seek(max(start, length - 2 ** 16))
        assert re.search(ends.get(image.format, b""), stream.read())
        trouble = "does not decode"
        stream.seek(0)
        return hdm.load_image(stream).size if verify else image.size[::-1] if turned else image.size
    except Exception as error:                               # what is broken can raise anything
        bomb = isinstance(error, Image.DecompressionBombError)
        raise hdm.UserError("too large" if bomb else trouble) from error


def row_caption(row, template):
    """The caption in a table's row or an image's .json: of the first of TEXT_COLUMNS that holds one, or the
    template filled in; " $$ " between tags, in a list or a string with commas or else spaces."""
    def texts(name):
        value = row.get(name)
        if re.search(r"(^|_)tags?(_|$)", name.lower()) and isinstance(value, str) and "$$" not in value:
            value = value.split("," if "," in value else None)
        values = [str(one) for one in (value if isinstance(value, list) else [value])
                  if isinstance(one, (str, int, float))]
        return [" ".join(one.split()) for one in values if one.split() and one != "nan"]
    if template:                                 # in one pass: braces in a caption name no column
        return re.sub(COLUMN, lambda match: " $$ ".join(texts(match[1])), template)
    name = next(filter(texts, TEXT_COLUMNS), "")
    return (" $$ " if name == "tags" else hdm.OR).join(texts(name))


def read_table(path, span, template, rows, report):
    """Adds {path of an image, with or without suffix: (caption, table's file)} to rows."""
    suffix, columns, new = os.path.splitext(path)[1].lower(), set(), {}
    with open_at(*span) as file:
        lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        if suffix == ".json":
            table = json.loads("".join(lines))
            if isinstance(table, dict):          # kohya's {image: {"caption": , "tags": }}, {image: caption}
                table = [{"file_name": name, **(row if isinstance(row, dict) else {"caption": row})}
                         for name, row in table.items()]
            table = iter(table if isinstance(table, list) else [table])
        elif suffix == ".jsonl":
            table = map(json.loads, filter(str.strip, lines))
        else:  # strict: else a quote that is never closed makes one caption of all that follows
            table = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
        for number in itertools.count(1):
            with report.leaving_out(f"{path}, row {number}"):  # what next raises concerns one row
                if (row := next(table, table)) is table:
                    break
                if not isinstance(row, dict) or None in row:  # None: cells past the header's
                    raise hdm.UserError("broken table row")
                columns.update(row)
                name = next((str(row[key]) for key in NAME_COLUMNS if row.get(key) not in (None, "")), "")
                key = os.path.normpath(os.path.join(os.path.dirname(path), name.replace("\\", "/")))
                if not name or key in rows or key in new:
                    raise hdm.UserError("duplicate name" if name else "row without a file_name, path or id")
                both = suffix == ".json" and {"caption", "tags"} <= row.keys()  # as kohya uses them
                new[key] = row_caption(row, template or "{caption} ||| {tags}" * both), span[0]
    if missing := set(re.findall(COLUMN, template)) - columns:
        raise hdm.UserError(f"table without a column {' '.join(sorted(missing))}")
    rows.update(new)


def read_texts(caption, spans, s):
    """A row's caption or "", the spans of text files by suffix -> the caption, lines of its file."""
    extra, lines = "", []
    for suffix, span in spans.items():
        if span[2] > 2 ** 20:                   # a guess
            raise hdm.UserError("caption over 1 MB")
        with open_at(*span) as file:
            text = file.read().decode("utf-8-sig", "surrogateescape")
        if suffix == s.sidecar:
            extra = " ".join(text.split())
        elif suffix == ".json":
            row = json.loads(text)
            caption = row_caption(row if isinstance(row, dict) else {}, s.caption)
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            caption = (hdm.OR if s.caption_lines == "choose" else " ").join(lines)
    whole = hdm.OR.join(one.strip() for one in caption.split(hdm.OR) if hdm.parse_caption(one))
    if extra:
        whole = hdm.BESIDE.join((extra, whole, "") if s.sidecar_place == "before" else ("", whole, extra))
    if not whole or "\0" in whole or printable(whole) != whole:  # such as UTF-16, cp1252
        raise hdm.UserError("caption is not UTF-8" if whole else "empty caption")
    return whole, len(lines)


def tar_files(path, report):
    """Yields (path, span or None: no plain file) for a tar's members, as far as its headers can be read."""
    with contextlib.suppress(Exception), tarfile.open(path, "r:", encoding="utf-8") as tar:
        size = os.path.getsize(path)
        for member in itertools.takewhile(lambda member: member.offset_data + member.size <= size, tar):
            plain = member.isreg() and not member.issparse()
            name = os.path.normpath("/" + member.name)  # no ../ leads out of the tar
            yield path + name, (path, member.offset_data, member.size) if plain else None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) == bytes(512):  # tarfile is silent about some ends that are none
            return
    report.add("tar cut short", path)


def walk(top, report):
    """Yields {path, its suffix in lower case: (path, span)} for each folder below top, and for each tar (top
    may be one); of a.txt and a.TXT only the first."""
    tar = [(os.path.dirname(top), [], [os.path.basename(top)])] if os.path.isfile(top) else []
    seen = set()                                 # links may run in circles
    for folder, below, names in tar or os.walk(
            top, followlinks=True, onerror=lambda error: report.add("unreadable", error.filename)):
        below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        paths = [os.path.join(folder, name) for name in sorted(names)]
        plain = [(path, (path, 0, os.path.getsize(path)) if os.path.isfile(path) else None) for path in paths]
        tars = [path for path, span in plain if span and path.lower().endswith(".tar")]
        for group in plain, *(tar_files(path, report) for path in tars):
            files = {}
            for path, span in group:
                stem, suffix = os.path.splitext(path)
                key = stem + suffix.lower()
                if span and key not in files:
                    files[key] = path, span
                elif key.endswith((".tar", *IMAGES, *TEXTS, *TABLES)):
                    report.add("duplicate name" if span else "not a plain file", path)
                if key.endswith(OTHERS):
                    report.add("format not read", path)
            yield files


def scan(source, report, s, known=lambda stamp: None, weight=1.0, number=0):
    """Yields a Picture for each captioned image of a folder, a tar or a table; others go into the report.

    known: from a stamp to the Picture of an earlier scan, whose files are not opened again, or None. weight,
    number: the source's.
    """
    top = os.path.abspath(source)
    given = os.path.isfile(top) and top.lower().endswith(TABLES)
    root = top if os.path.isdir(top) else os.path.dirname(top)
    if root != top and not top.lower().endswith((".tar", *TABLES)):
        raise hdm.UserError(f"{source}: no folder, and no {' '.join(TABLES)} or .tar file")
    order = TEXTS[::-1] if s.caption else TEXTS
    rows, used, counts, stems, sidecar = {}, set(), Counter(), Counter(), s.sidecar or "\0"  # in no name
    if given:
        with hdm.naming(source, "not a table of images"):
            read_table(top, (top, 0, 0), s.caption, rows, report)
        for path in itertools.chain.from_iterable(walk(root, Report())):
            stems[os.path.basename(os.path.splitext(path)[0])] += path.endswith(IMAGES)
    for files in walk(root if given else top, report):
        images = [key for key in files if key.endswith(IMAGES)]
        own = {os.path.splitext(key)[0] + ".json" for key in images}
        for key in files if not given else ():
            if re.fullmatch(r"metadata\.(jsonl|csv)|meta.*\.json", os.path.basename(key)) and key not in own:
                with report.leaving_out(key):
                    read_table(*files[key], s.caption, rows, report)
        for path, (file, offset, length) in map(files.get, images):
            with report.leaving_out(path):
                name, stem = os.path.relpath(path, root).replace(os.sep, "/"), os.path.splitext(path)[0]
                if printable(path) != path:
                    raise hdm.UserError("name is not UTF-8")
                keys = [path, stem]
                if stems[os.path.basename(stem)] == 1:  # then a row may omit its image's folder
                    keys += [os.path.join(root, os.path.basename(key)) for key in keys]
                row = next((key for key in keys if key in rows), None)
                used.add(row)
                caption, table = rows.get(row, ("", ""))
                ends = [end for end in order
                        if stem + end in files and not (stem + end).endswith(sidecar)][:not table]
                ends += [sidecar] * (stem + sidecar in files)
                if not table and (given or not ends):
                    raise hdm.UserError("not in the table" if given else "no caption")
                spans = {end: files[stem + end][1] for end in ends}
                texts = {table, *(span[0] for span in spans.values())} - {"", file}  # a tar may hold them
                texts = tuple(sorted(texts))
                stamp = stamp_of(file, *texts, key=(name, file, texts))
                if (picture := known(stamp)) is None:
                    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64
                    caption, lines = read_texts(caption, spans, s)
                    with open_at(file, offset, length) as stream:
                        sides = measure_image(stream, length, s.verify)
                    picture = Picture(name, file, texts, caption, offset, length, *sides, weight, stamp,
                                      stamp_of(file), lines, number, place)
                if kind := refusal(picture, s):
                    raise hdm.UserError(kind)
                kohya = file == path and re.match(r"([1-9]\d{0,2})_[^/]*/", name)  # not 2020_trip/
                how = " and ".join([os.path.basename(table)] * bool(table) + ends)
                counts[how + " in a tar" * (file != path) + (f" in {kohya[0]}" if kohya else "")] += 1
                yield picture._replace(weight=weight * float(kohya[1] if kohya else 1), source=number)
    for key in rows.keys() - used:
        report.add("row without an image", f"{rows[key][1]}: {os.path.relpath(key, root)}")
    how = ", ".join(f"{n:,} with {how}" for how, n in counts.most_common()) or "none"
    print(printable(f"images: {how} in {source}"))


# ---- the index: what training reads; images stay where they are ------------------------------------------
# records.bin: a RECORD for each image, in order of weight and place; text.bin: its texts, from `text` on.
RECORD = np.dtype([(name, "<f8" if name in ("weight", "place") else "<u8")
                   for name in (*Picture._fields[4:], "text", "bytes")])


class Index:
    """index[i]: a Picture, out of records (n,) RECORD and text (bytes,) uint8, which a folder has as maps."""

    def __init__(self, records, text, about, folder=None):
        self.records, self.text, self.about, self.folder = records, text, about, folder

    @classmethod
    def open(cls, folder):
        with hdm.naming(folder, "not a whole index; run prepare.py again"):
            about = json.loads(Path(folder, "index.json").read_text(encoding="utf-8"))
            assert about["format"] == 4, "of another format"
            records = np.memmap(Path(folder, "records.bin"), RECORD, "r").view(np.ndarray)
            text = np.memmap(Path(folder, "text.bin"), np.uint8, "r").view(np.ndarray)
            assert about["sizes"] == [len(records), len(text)], "its files are not of one size"
        return cls(records, text, about, folder)

    def __reduce__(self):                        # to a loader process that is spawned goes the path alone
        return (Index.open, (self.folder,)) if self.folder else (Index, (self.records, self.text, self.about))

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        *numbers, start, length = self.records[i].item()
        entry = self.text[start:start + length].tobytes().decode(errors="surrogateescape")
        name, file, caption, *texts = entry.split("\0")
        return Picture(name, file, tuple(texts), caption, *numbers)

    def split(self, validation):
        """-> the training part, [(first record, number, weight)], and at most 512 held-out records."""
        parts, held = [], []
        for weight, first, stop in self.about["groups"]:
            middle = bisect.bisect_left(self.records["place"], validation, first, stop)
            parts += [(middle, stop - middle, weight)] if middle < stop else []
            held += range(first, min(middle, first + 512))
        return parts, sorted(held, key=lambda i: self.records[i]["place"])[:512]

    def changed(self, i):
        """Whether the files of a picture are not as they were indexed, or gone."""
        picture = self[i]
        with contextlib.suppress(OSError):
            return stamp_of(picture.file, *picture.texts, key=picture[:3]) != picture.stamp
        return True

    def read(self, i, side=None):
        """-> a picture (3, height, width) uint8, its short side scaled to side."""
        name, file, texts, _, offset, length, *_ = picture = self[i]
        with hdm.naming(file if file.endswith(name) else f"{file}: {name}", "not a whole picture"):
            if offset and stamp_of(file) != picture.image:   # what lies there now may be another picture
                raise hdm.UserError(f"{file}: {name}: the tar has changed since it was indexed")
            with open_at(file, offset, length) as stream:
                return torch.from_numpy(np.array(hdm.load_image(stream, side))).permute(2, 0, 1)


def refusal(picture, s):
    """Why the filters leave an image out, or None."""
    def plain(tags):
        return {tag.strip().replace("_", " ").lower() for tag in tags}
    short, long = sorted((picture.width, picture.height))
    tags = plain(re.split(rf",|\|\|\||%%|\$\$|{hdm.OR}|{hdm.BESIDE}", picture.caption))
    wrong = {"below --min_size": short < s.min_size, "beyond --max_ratio": long > s.max_ratio * short,
             "without --require_tag": plain(s.require_tag) - tags,
             "with --drop_tag": plain(s.drop_tag) & tags}
    return next((kind for kind, is_so in wrong.items() if is_so), None)


def build_index(sources, s, folder=None, old=None):
    """Scan (path, weight) pairs -> an Index, in memory or in the folder. What stands in old, an earlier one
    by the same settings, and has not changed since is not read again."""
    options = [s.caption, s.caption_lines, s.sidecar, s.sidecar_place, s.verify]
    same = old and old.about["options"] == options
    stamps, numbers = np.unique(old.records["stamp"] if same else np.zeros(0, "<u8"), return_index=True)
    def known(stamp):
        i = np.searchsorted(stamps, np.uint64(stamp))
        return old[numbers[i]] if np.uint64(stamp) in stamps[i:i + 1] else None

    report, raw = Report(), io.BytesIO()         # raw: 96 bytes an image, until they are sorted
    with open(Path(folder, "text.bin"), "wb") if folder else io.BytesIO() as text:
        for number, (source, weight) in enumerate(sources):
            for picture in scan(source, report, s, known, weight, number):
                entry = "\0".join([picture.name, picture.file, picture.caption, *picture.texts])
                entry = entry.encode(errors="surrogateescape")  # a table's path can be any bytes
                record = *picture[4:], text.tell(), len(entry)
                raw.write(np.array(record, RECORD).tobytes())
                text.write(entry)
        size = text.tell()
        data = None if folder else np.frombuffer(text.getvalue(), np.uint8)
    for kind, entry in sorted(report.items()):
        print(f"{entry['count']:>11,} left out: {kind}, as {entry['paths'][0]!r}")
    records = np.frombuffer(raw.getbuffer(), RECORD)
    if several := (records["lines"] > 1).sum():
        print(f"{several:,} captions have several lines: --caption_lines={s.caption_lines}")
    if not len(records):
        raise hdm.UserError(f"{' '.join(source for source, _ in sources)}: no image with a caption (.txt, "
                            f".caption, .json, a table of them) is left to train on")
    records = records[np.lexsort((records["place"], records["weight"]))]
    weights, firsts = np.unique(records["weight"], return_index=True)
    groups = list(zip(weights.tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(records)]))
    identity = hashlib.sha256(records["place"].tobytes() + json.dumps(groups).encode()).hexdigest()
    about = dict(format=4, identity=identity, options=options, groups=groups, sizes=[len(records), size])
    if folder is None:
        return Index(records, data, about)
    records.tofile(Path(folder, "records.bin"))
    Path(folder, "index.json").write_text(json.dumps(about))
    Path(folder, "report.json").write_text(json.dumps(report, indent=1))
    return Index.open(folder)


def open_index(data):
    """--data: what prepare.py wrote, or a source as scan takes it, which is indexed now and in memory."""
    if Path(data, "index.json").is_file():
        return Index.open(str(data))
    if not os.path.exists(data):
        raise hdm.UserError(f"--data={data}: no such folder (python prepare.py demo makes data/demo)")
    return build_index([(str(data), 1.0)], DataSettings())


# ---- the cache of latents ----------------------------------------------------------------------------------
SHARD = 512                                      # pictures in a file; a kill loses at most these


def latents_folder(data, index, vae, image_size):
    """Its name says whose latents it holds: a hash of the VAE's encoder (in bfloat16, whatever it has) and of
    the pictures' names and files, not of captions. In it 000007.safetensors: by the numbers of 512 records
    their moments (C or 2 C, height, width), float16."""
    digest = hashlib.sha256(repr((vae.mean, vae.std)).encode())
    for weight in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        digest.update(weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    digest.update(index.records["place"].tobytes() + index.records["image"].tobytes())
    return f"{os.path.normpath(data)}_latents{image_size}_{digest.hexdigest()[:8]}"


def shard(folder, i):
    """The file for record i."""
    return Path(folder, f"{i // SHARD:06d}.safetensors")


def is_whole(file):
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt"):
        return True
    return False


class Latents:
    """The cache of a run; a UserError names the command that makes the right one."""

    def __init__(self, s, index, vae):
        folder = latents_folder(s.data, index, vae, s.image_size)
        for self.folder in folder, folder + "_mean":
            if all(is_whole(shard(self.folder, i)) for i in range(0, len(index), SHARD)):
                return
        then = "" if index.folder else ", then --data=data/index"
        raise hdm.UserError(
            f"--latents: {folder}, of these pictures and this VAE, is not there or not whole: "
            f"python prepare.py {s.data} --latents --image_size={s.image_size} --vae={s.vae}{then}")

    def read(self, i, side=None):
        """-> the moments of record i, (C or 2 C, height, width) float16."""
        file = shard(self.folder, i)
        with hdm.naming(file, f"no latents of record {i}"), safe_open(file, "pt") as tensors:
            return tensors.get_tensor(str(i))


def encode_latents(s, vae, device, rank, ranks):
    """Writes the shards that are not there, dealt over the processes."""
    index = Index.open(s.out)
    folder = latents_folder(s.out, index, vae, s.image_size) + "_mean" * s.mean_only
    hdm.make_folder(folder, "--out")
    channels = vae.latent_channels * (1 if s.mean_only else 2)
    sides = np.stack([index.records[name].astype(int) for name in ("height", "width")], axis=1)
    cells = sides * s.image_size // sides.min(1, keepdims=True) // vae.factor  # (n, 2): the latents' sides
    def whole(i):                                # i, its picture, scaled and cut to whole cells; or None
        try:
            picture = index.read(i, s.image_size)
            if index.changed(i):
                raise hdm.UserError(f"{index[i].name} is not as it was indexed; run prepare.py again")
        except hdm.UserError as error:
            return print(f"warning: {error}; no latents of it", flush=True)
        height, width = (side // vae.factor * vae.factor for side in picture.shape[1:])
        return i, picture[:, :height, :width]

    todo = [range(first, min(first + SHARD, len(index))) for first in range(0, len(index), SHARD)
            if not is_whole(shard(folder, first))]
    gb = 2e-9 * channels * sum(cells[numbers].prod(1).sum() for numbers in todo)
    free, pictures = shutil.disk_usage(folder).free / 1e9, sum(map(len, todo))
    if gb > free:
        raise hdm.UserError(f"--latents: {gb:.2f} GB are needed in {folder}, {free:.2f} are free")
    trial = torch.zeros(s.batch_size, 3, s.image_size, s.image_size, device=device)
    for _ in range(2):                           # the first one warms up
        clock = time.perf_counter()
        vae.moments(trial)[0].sum().item()
    hours = pictures / s.batch_size * (time.perf_counter() - clock) / 3600 / ranks
    print(f"latents: {pictures:,} of {len(index):,} pictures to encode into {folder}: {gb:.3f} GB, "
          f"{free:.0f} are free; about {hours:.2f} h on {ranks} x {device} if the disk keeps up", flush=True)
    gather(None)                                 # all have seen the same files
    with ThreadPoolExecutor(s.workers) as pool:  # Pillow works outside of Python's lock
        for numbers in tqdm(todo[rank::ranks], disable=rank > 0):
            alike = sorted(numbers, key=lambda i: tuple(cells[i]))
            latents, ready = {}, filter(None, pool.map(whole, alike))
            for _, same in itertools.groupby(ready, key=lambda pair: pair[1].shape):
                while batch := list(itertools.islice(same, s.batch_size)):
                    pixels = torch.stack([picture for _, picture in batch]).to(device).float() / 127.5 - 1
                    moments = torch.cat(vae.moments(pixels), dim=1)[:, :channels].half().cpu()
                    latents.update((str(i), moment.clone()) for (i, _), moment in zip(batch, moments))
            partial = shard(folder, numbers[0]).with_suffix(".partial")
            save_file(latents, partial)
            partial.replace(shard(folder, numbers[0]))
    gather(None)


# ---- the judge --------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4)
def templates(height, width):
    """Each size and shape at each place that keeps it whole, 64 of them to a short side (half a pixel at 32):
    n (size, shape, cy, cx), their (n, height * width) coverages, (n,) the squared lengths of those."""
    step = min(height, width) / 64
    places = [(size, shape, cy, cx) for size, shape in itertools.product(RADIUS, SHAPES) for cy, cx in
              itertools.product(*(np.arange(*r, step) for r in centre_range(size, shape, height, width)))]
    masks = [coverage(size, shape, height, width, cy, cx).ravel() for size, shape, cy, cx in places]
    return places, np.array(masks, np.float32), np.square(masks).sum(1)


def nearest(colour, palette):
    return min(palette, key=lambda name: sum((colour - palette[name]) ** 2))


def look(image):
    """(height, width, 3) uint8 -> the ground's colour, the shape's, (height, width) 0: ground .. 1: shape."""
    pixels = image.astype(np.float32)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    # Edge pixels are mixtures, so nearer to the ground than those inside. The smallest inside, a small
    # diamond's, has about 110 pixels; the farthest 5 % of a 32 x 48 canvas are 77.
    distance = np.linalg.norm(pixels - ground, axis=-1)
    ink = np.median(pixels[distance >= 0.8 * np.quantile(distance, 0.95)], axis=0)
    axis = ink - ground
    return ground, ink, np.clip((pixels - ground) @ axis / max(axis @ axis, 1), 0, 1)


def judge(image):
    """(height, width, 3) uint8 -> (size, colour, shape, background). Medians, and least squares on the soft
    coverage: a ragged edge or a stray pixel costs no verdict. An empty picture still gets a guess."""
    ground, ink, share = look(image)
    places, masks, lengths = templates(*share.shape)
    fits = lengths - 2 * (masks @ share.ravel())             # |mask - share|^2 less a constant
    size, shape, _, _ = places[np.argmin(fits)]
    return size, nearest(ink, COLOURS), shape, nearest(ground, BACKGROUNDS)


def places_and_sizes(images):
    """(n, 3): each shape's centre of mass (y, x), in pixels, and the square root of its area."""
    masks = [look(image)[2] > 0.5 for image in images]
    return np.array([[*np.argwhere(mask).mean(0), mask.sum() ** 0.5] for mask in masks])


def judge_camera(draw, side):
    """How draw(zoom=, x_shift=, y_shift=), pictures whose longer side is `side` pixels, moves and sizes the
    shapes, against what the camera promises."""
    plain = places_and_sizes(draw())
    print(f"{'camera':<16}{'moved / predicted':>18}{'direction %':>12}{'size / predicted':>17}")
    for axis, value in itertools.product("xy", (0.25, -0.25)):
        seen = places_and_sizes(draw(**{f"{axis}_shift": value}))
        moved = (seen - plain)[:, "yx".index(axis)] / (-value * side / 2)
        size = (seen / plain)[:, 2].mean()
        print(f"{axis}_shift={value:<8}{moved.mean():>18.2f}{100 * (moved > 0).mean():>12.1f}{size:>17.2f}")
    for zoom in (1.33, 0.75):
        size = (places_and_sizes(draw(zoom=zoom)) / plain)[:, 2].mean() / zoom
        print(f"zoom={zoom:<41}{size:>17.2f}")


def judge_checkpoint(settings):
    model, vae, defaults = hdm.load_model(settings.ckpt)
    asked = [words for words in UNSEEN for _ in range(settings.seeds)]
    prompts = [CAPTION.format(*words) for words in asked]
    seeds = list(range(settings.seeds)) * len(UNSEEN)
    draw = functools.partial(generate, model, vae, hdm.load_text_encoder(defaults), prompts, seeds, defaults)
    if settings.camera:
        return judge_camera(draw, defaults["image_size"])
    right = np.array([judge(image) for image in draw()]) == asked      # (n, 4)
    right = np.column_stack([right, right.all(1)]).sum(0)
    print(f"{settings.ckpt}: {len(UNSEEN)} captions x {settings.seeds} seeds")
    print(f"{'':<12}{'right':>6}{'of':>6}{'%':>7}{'chance %':>10}")
    rows = ATTRIBUTES | {"all four": COMBINATIONS}
    for (name, choices), n in zip(rows.items(), right):
        print(f"{name:<12}{n:>6}{len(seeds):>6}{100 * n / len(seeds):>7.1f}{100 / len(choices):>10.1f}")


# ---- the command line -----------------------------------------------------------------------------------
def prepare(s, *paths):
    hdm.check_name("--caption_lines", s.caption_lines, ("join", "choose"), "way")
    hdm.check_name("--sidecar_place", s.sidecar_place, ("before", "after"), "place")
    if s.mean_only and not s.latents:
        raise hdm.UserError("--mean_only: says how to write --latents, which is missing")
    if s.caption and not re.search(COLUMN, s.caption):
        raise hdm.UserError(f"--caption={s.caption}: names no column, as in {{artist}} ||| {{tags}}")
    sources = []
    for path in paths:                           # PATH or PATH=WEIGHT
        head, weight = (path, "1") if os.path.exists(path) else path.rpartition("=")[::2]
        if not os.path.exists(head) or hdm.setting_value(path, weight, float) <= 0:
            raise hdm.UserError(f"{path}: no such file or folder, or a weight that is not above 0")
        sources.append((head, float(weight)))
    ready = len(paths) == 1 and Path(paths[0], "index.json").is_file()  # an index, for --latents or a dry run
    s.out, old = os.path.normpath(paths[0] if ready else s.out), None
    with contextlib.suppress(hdm.UserError):     # there is none, or a broken one, or of an older format
        old = Index.open(s.out)
    if s.dry_run:
        import train                             # which imports this file
        tokenizer = hdm.TextEncoder(s.text_encoder, s.text_length).tokenizer
        return train.dry_run(Index.open(s.out) if ready else build_index(sources, s, old=old), s, tokenizer)
    rank, ranks = hdm.start_ranks()
    if s.latents:                                # first: a mistake is told before an hour's work
        device = hdm.pick_device(s.device)
        vae = hdm.load_vae(s.vae, device, hdm.pick_dtype(s.dtype, device))
        if s.image_size % vae.factor:
            raise hdm.UserError(f"--image_size={s.image_size}: no multiple of {vae.factor}, a cell's pixels")
    if rank == 0 and not ready:
        with whole_folder(s.out) as folder:
            n = len(build_index(sources, s, folder, old))
        print(f"{n:,} pictures in {s.out}; report.json there names what was left out")
    gather(None)                                 # the others wait for it
    if s.latents:
        encode_latents(s, vae, device, rank, ranks)


LEAST = dict(count=1, seed=0, vocab=257, seeds=1, max_ratio=1, image_size=1, text_length=1, batch_size=1,
             workers=1)
COMMANDS = {"demo": (make_demo, DemoSettings, ()), "judge": (judge_checkpoint, JudgeSettings, ()),
            "text_encoder": (text_encoder, TextEncoderSettings, ("SOURCE",))}


def main(argv):
    name, *rest = argv or [""]
    if name not in COMMANDS and (name.startswith("-") or os.path.exists(name.rpartition("=")[0] or name)):
        command, settings, positionals, rest = prepare, DataSettings, ("PATH ...",), argv
    else:
        hdm.check_name(f"prepare.py {name}", name, COMMANDS, "path or command")
        command, settings, positionals = COMMANDS[name]
    words, values = hdm.parse_args(rest, [settings], positionals, doc=__doc__)
    settings = settings(**values)
    for name, least in LEAST.items():
        if getattr(settings, name, least) < least:
            raise hdm.UserError(f"--{name}={getattr(settings, name)}: at least {least}")
    command(settings, *words)


if __name__ == "__main__":
    hdm.run(main)
