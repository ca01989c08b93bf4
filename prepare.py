"""Data for train.py: an index of captioned images as they lie on disks, a cache of latents; the demo set.

    python prepare.py PATH ... --out=data/mine --dry_run     # what is there, without writing an index
    python prepare.py PATH ... --out=data/mine               # folders, tars, tables -> an index: no copies
    python prepare.py PATH ... --out=data/mine --latents     # and a cache of VAE latents
    python prepare.py text_encoder PATH --out=data/my_te     # a tokenizer and a tiny LM for PATH's captions
    python prepare.py demo                                   # data/demo, data/demo_unseen.txt, data/demo_te
    python prepare.py judge --ckpt=out/demo                  # how many unseen captions are drawn right

In order: the settings; captioned images as they lie on people's disks; the index; the order of training; the
cache of latents; training examples; commands. Then extras: a dry run, a text encoder for captions, the demo.
"""
import bisect
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import tarfile
import textwrap
import time
import unicodedata
import warnings
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

import hdm


@dataclass
class DemoSettings:
    out: str = "data/demo"  # folder of images and captions; OUT_unseen.txt and OUT_te are written beside it
    count: hdm.Count = 12000  # images; 12,000 take about 10 s on one core and 95 MB in blocks of 4 KB
    seed: hdm.Whole = 0     # image i depends on (seed, i) alone; also of the text encoder's weights
    centred: bool = False   # for the camera: each shape in the middle, sized by the canvas's longer side


@dataclass
class TextEncoderSettings:
    out: str = "data/text_encoder"  # folder for the tokenizer and the model
    vocab: Annotated[int, 257, math.inf] = 4096  # most tokens; the least: 256 bytes and the pad
    tag_separator: str = "$$"       # this and the next as train.py has them
    spaces: bool = False            # likewise


@dataclass
class DataSettings:
    out: str = "data/index"         # folder for the index; latents go beside it
    caption: str = ""               # by columns of tables and .json: '{characters} $$ {artist} ||| {tags}'
    name_column: str = ""           # of tables: has the images' names; default: file_name ... filepath, or id
    caption_lines: str = "join"     # a caption file's lines: join them, or choose one, each time anew
    sidecar: str = ""               # such as .nl.txt: more text from STEM.nl.txt, kept in place ...
    sidecar_place: str = "after"    # ... before or after the caption
    min_size: hdm.Whole = 0               # pixels of the short side
    max_ratio: Annotated[float, 1, math.inf] = 10.0       # long side to short side
    require_tag: list[str] = field(default_factory=list)  # leave out images without it; may be given often
    drop_tag: list[str] = field(default_factory=list)     # leave out images with it
    verify: bool = False            # decode each image, in place of looking at its header and its end
    dry_run: bool = False           # write no index, but OUT.png, a sheet of images, crops and captions
    text_encoder: str = hdm.TEXT_ENCODER   # its tokens are counted in a dry run
    latents: bool = False           # write a cache of VAE latents for image_size
    mean_only: bool = False         # without the posterior's variance: half the disk
    vae: str = hdm.EQ_VAE           # folder or hub id
    batch_size: hdm.Count = 16      # images at a time in the VAE
    workers: hdm.Count = 4          # threads that read for it
    device: str = "auto"            # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"             # of the VAE: float32, bfloat16; auto: 16 bit on CUDA


@dataclass
class PrepareSettings(DataSettings, hdm.Example):
    pass                            # a dry run shows examples as train.py makes them


@dataclass
class JudgeSettings:
    ckpt: str = "out/demo"          # train.py's OUT_DIR or one checkpoint
    seeds: hdm.Count = 8            # images of each unseen caption, from seeds 0, 1, ...
    camera: bool = False            # measure instead how far shifts and zooms move the shape


# ---- captioned images as they lie on people's disks --------------------------------------------------------
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".avif")
OTHERS = tuple(".arw .cr2 .dng .exr .heic .heif .ico .jp2 .jxl .nef .psd .svg .tga .tif .tiff".split())
TEXTS = (".txt", ".caption", ".json")            # of the caption beside an image: the first one there counts
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ARCHIVES = tuple(".7z .arrow bz2 .cbz gz .h5 .lmdb .lz4 .parquet .rar .tar .tfrecord xz .zip zst".split())
KINDS = {OTHERS: "format not read", ARCHIVES: "archive not read", TABLES: "table or json that is no source",
         TEXTS: "caption without an image"}      # of what is passed over
IMAGE_HEAD = rb"(?s)II\*\0|MM\0\*|\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM....\0\0\0\0|....ftyp(avi|hei|mif)"
SYSTEM = ("$recycle.bin,$windows.~bt,#recycle,#snapshot,~snapshot,@eadir,@recently-snapshot,@recycle,@tmp,"
          "__macosx,desktop.ini,ehthumbs.db,ehthumbs_vista.db,found.000,lost.dir,lost+found,network "
          "trash folder,recycled,recycler,system volume information,temporary items,thumbs.db").split(",")
FILE_COLUMNS = ("file_name", "file", "path", "filename", "image", "img_path", "image_path", "filepath")
TEXT_COLUMNS = ("text", "caption", "prompt", "tags", "tag_string", "tag_groups")
COLUMN = r"\{([^{}]+)\}"                         # in --caption
# name: path below the source, its identity; file: the image, or the tar that holds it at offset; texts: other
# files that its caption comes from; stamp: of these three; image: of file alone; lines: of its caption file;
# source: its number in the call; place: in [0, 1), a hash of the name, so that no added data move an image
# across the split; colours: 1 where its profile makes other colours of them, 2 where that is broken.
Record = namedtuple(
    "Record",
    "name file texts caption offset length width height weight stamp image lines source place colours",
    defaults=[0])


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
        except hdm.UserError as error:
            self.add(error, path)
        except (json.JSONDecodeError, RecursionError):
            self.add("broken json", path)
        except (OSError, ValueError, NotImplementedError) as error:
            self.add("unreadable", getattr(error, "filename", None) or path)  # it may be the image's caption


def printable(text):
    return text.encode(errors="backslashreplace").decode()  # names on disk, and captions, can be any bytes


def stamp_of(*files, key=()):
    """64 bits of a key and of the sizes and times of files: unchanged means not edited."""
    stats = [*key, *((info.st_size, info.st_mtime_ns) for info in map(os.stat, files))]
    return int.from_bytes(hashlib.blake2b(repr(stats).encode(), digest_size=8).digest(), "little")


def open_at(file, offset, length):
    """A span: a plain file; a member of a tar, which is read whole; or an image of a parquet file, where
    offset is 1 + its row in a row group + 2^32 x the group."""
    if offset and file.lower().endswith(".parquet"):
        group, row = divmod(offset - 1, 2 ** 32)
        return io.BytesIO(image_bytes(read_row_group(file, stamp_of(file), group)[row]))
    stream = open(file, "rb")
    if not offset:
        return stream
    with stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(length))


def measure_image(stream, length, verify=False):
    """-> upright width and height of an image file of this length, from its header, or, verify, decoded; and
    Record's colours.

    UserError, in words: zero bytes, no readable header, too large, truncated (JPEG, PNG and GIF have an end,
    a cut WebP has no readable header, BMP and AVIF do not tell), does not decode.
    """
    ends = dict(JPEG=rb"\xff\xd9", MPO=rb"\xff\xd9", PNG=rb"IEND\xaeB`\x82", GIF=rb"\0;[\0\r\n ]*\Z")
    trouble, turned = "no readable header" if length else "zero bytes", False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # Pillow's, about what is judged here
            image = Image.open(stream, formats=["JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF"])  # by content
            start, end, transform = stream.tell(), ends.get(image.format, b""), hdm.colours_of(image)
            with contextlib.suppress(Exception):             # a broken EXIF turns nothing
                # A PNG's own getexif would decode it, to look for EXIF behind the pixels.
                turned = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
        trouble = "truncated"
        # An end before start is that of a JPEG's thumbnail.
        stream.seek(max(start, length - 2 ** 16))
        if not re.search(end, stream.read()):                # cut, or much lies behind it: a phone's film
            stream.seek(start)
            assert re.search(end.removesuffix(rb"[\0\r\n ]*\Z"), stream.read())
            for i in range(image.n_frames if image.format == "GIF" else 1):
                image.seek(i)
                image.load()
        trouble = "does not decode"
        stream.seek(0)
        sides = hdm.load_image(stream).size if verify else image.size[::-1] if turned else image.size
        return *sides, 2 if transform is False else int(transform is not None)
    except Exception as error:                               # what is broken can raise anything
        bomb = isinstance(error, Image.DecompressionBombError)
        raise hdm.UserError("too large" if bomb else trouble) from error


def row_caption(row, template):
    """The caption in a table's row or an image's .json: of the first of TEXT_COLUMNS that holds one, or the
    template filled in; " $$ " between tags, in a list, in groups of them, or in a string with commas or else
    spaces. A .json may also be a text or a list of tags."""
    def texts(name, value):
        if isinstance(value, dict):
            groups = [group for group in value.values() if isinstance(group, (str, list, dict))]
            return [text for group in groups for text in texts(name, group)]  # numbers are taggers' scores
        if re.search(r"(^|_)tags?(_|$)", name.lower()) and isinstance(value, str) and "$$" not in value:
            value = value.split("," if "," in value else None)
        values = [str(one) for one in (value if isinstance(value, list) else [value])
                  if isinstance(one, (str, int, float))]
        return [" ".join(one.split()) for one in values if one.split() and one != "nan"]
    if isinstance(row, str):
        row = {"caption": row}
    elif isinstance(row, list) and all(isinstance(tag, str) for tag in row):
        row = {"tags": row}
    if not isinstance(row, dict):
        raise hdm.UserError("json without a caption: no text, list of texts or object")
    groups = {name: value for name, value in row.items()  # Danbooru's tag_string_general, gallery-dl's
              if re.match("(tag_string|tags)_", name) and isinstance(value, (str, list))}  # tags_general
    row = {**row, "tag_groups": groups} if groups else row
    if not row.keys() & set(re.findall(COLUMN, template) or TEXT_COLUMNS):
        raise hdm.UserError(f"json or row without a caption: keys {', '.join(list(row)[:3]) or '(none)'}")
    if template:                                 # in one pass: braces in a caption name no column
        return re.sub(COLUMN, lambda match: " $$ ".join(texts(match[1], row.get(match[1]))), template)
    name = next((name for name in TEXT_COLUMNS if texts(name, row.get(name))), "")
    odd = [other for other in TEXT_COLUMNS if not isinstance(row.get(other) or "", (str, int, float))]
    if odd and not name:
        raise hdm.UserError(f"json or row without a caption: no texts in {odd[0]}")
    return (" $$ " if name.startswith("tag") else hdm.OR).join(texts(name, row.get(name)))


def row_name(row, column):
    """What a row calls its image: in the column, else in the first of FILE_COLUMNS that it fills; its id only
    where no other column names a file. UserError where it does not say."""
    names = [column] if column else [name for name in FILE_COLUMNS if name in row]
    others = {name: str(row[name]).rstrip("'\"]}") for name in row if name not in TEXT_COLUMNS}  # lists, too
    files = [name for name, text in others.items() if text.lower().endswith(IMAGES) and "://" not in text]
    if files and not names:
        raise hdm.UserError(f"row that names a file in another column: --name_column={files[0]}, or =id")
    for name in names or ["id"]:
        value = row.get(name)
        value = value.get("path") if isinstance(value, dict) else value  # Hugging Face's, beside "bytes"
        if isinstance(value, float) and value.is_integer() and abs(value) < 2 ** 53:  # above it is rounded
            value = int(value)
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value).strip().replace("\\", "/")
    raise hdm.UserError(f"row without a file_name, path or id: columns {', '.join(map(str, list(row)[:5]))}")


def plain(path):
    """How names are compared that are not the same letter by letter: é as one letter (a Mac has two), 0012
    and 12.0 as 12."""
    folder, name = os.path.split(unicodedata.normalize("NFC", path))
    number = re.fullmatch(r"0*([0-9]+)(\.0*)?", name)
    return os.path.join(folder, number[1] if number else name)


@dataclass(slots=True)
class Row:
    caption: str = ""       # alternatives, if several rows have its name
    tables: tuple = ()      # the files that they are from
    nearness: int = 9       # of the image that it is for, as in Rows.candidates
    image: str | None = ""  # that image without its suffix; None: others are as near
    used: bool = False


class Rows(dict):
    """{path of an image, with or without suffix, as tables have it: Row}. A row is for the image that is
    nearest to its name, and for none where two are."""
    base = None                                  # folder of the table, where that is the source

    def __init__(self):
        self.alike = {}                          # {plain form: names that have it}

    def add(self, name, caption, table):
        row = self.setdefault(name, Row())
        if caption not in row.caption.split(hdm.OR):
            row.caption += hdm.OR * bool(row.caption) + caption
        row.tables = (*row.tables, table) if table not in row.tables else row.tables
        if plain(name) != name:
            self.alike.setdefault(plain(name), {name}).add(name)

    def candidates(self, image):
        """Yields (nearness, row) of the rows that an image may have: 0 by its path, 1 by its name alone in a
        table that is the source; 2 and 3 likewise, but as plain() compares them, if one row has that form."""
        stem = os.path.splitext(image)[0]
        names = {image: 0} if stem.lower().endswith(IMAGES) else {image: 0, stem: 0}
        if self.base:
            names = {os.path.join(self.base, os.path.basename(name)): 1 for name in names} | names
        for name, nearness in names.items():
            if name in self:
                yield nearness, self[name]
            like = plain(name)
            alike = {like} & self.keys() | self.alike.get(like, set())
            if len(alike) == 1:
                yield nearness + 2, self[alike.pop()]

    def claim(self, images):
        for image in images if self else ():
            stem = os.path.splitext(image)[0]
            for nearness, row in self.candidates(image):
                if nearness < row.nearness:
                    row.nearness, row.image = nearness, stem
                elif nearness == row.nearness and stem != row.image:
                    row.image = None

    def take(self, image):
        """-> the captions of an image's nearest rows, as alternatives, or "", and their tables' files."""
        stem = os.path.splitext(image)[0]
        rows = [row for nearness, row in (self.candidates(image) if self else ())
                if (nearness, stem) == (row.nearness, row.image)]
        nearest = min((row.nearness for row in rows), default=0)
        rows = [row for row in rows if row.nearness == nearest]
        for row in rows:
            row.used = True
        return hdm.OR.join(row.caption for row in rows), {table for row in rows for table in row.tables}


def swallows(lines, cells, place, width):
    """Whether a csv record of several lines took in others, behind a quote that is closed late: it has not a
    cell for each column, its name at place has several lines, or another line looks like a row: as many
    cells, and such a name. (Captions may have lines that look so: none can say what is meant.)"""
    def look(name):                              # True: a file's; else whether it is one word, has digits
        name = name.strip(' "')
        return name.lower().endswith(IMAGES) or (len(name.split()) == 1, bool(re.search(r"\d", name)))
    if len(cells) != width or "\n" in cells[place]:
        return True
    own = sum(cell.count("\n") for cell in cells[:place])  # the line with its name
    rows = [line.strip().split(",") for line in lines[:own] + lines[own + 1:]]
    spots = {0: [0], width - 1: [-1]}.get(place, [place, place - width])  # a caption may have commas
    looks = True, look(cells[place])
    return any(look(row[spot]) in looks for row in rows if len(row) >= width for spot in spots)


def csv_rows(lines, column, **how):
    """Yields (where, row) of a csv file, None for a broken row. Where a quote is not closed, or a record of
    several lines swallows others, its first line is the broken row, and the second begins the next one."""
    header, at = None, 0
    while at < len(lines):
        reader = csv.reader((lines[i] for i in range(at, len(lines))), strict=True, **how)
        cells = None
        with contextlib.suppress(csv.Error):
            cells = next(reader)
        taken = lines[at:at + reader.line_num]
        if cells is not None and not "".join(cells).strip():
            pass                                 # a line without text
        elif header is None:
            if cells is None:
                raise hdm.UserError("broken first line")
            header, names = [cell.strip() for cell in cells], [column] if column else [*FILE_COLUMNS, "id"]
            place = next((header.index(name) for name in names if name in header), 0)
        else:
            if len(taken) > 1 and (cells is None or swallows(taken, cells, place, len(header))):
                cells, taken = None, taken[:1]
            broken = cells is None or len(cells) > len(header)
            yield f"line {at + 1}", None if broken else dict(zip(header, cells))
        at += len(taken)


def coco_rows(table):
    """The rows of COCO's captions, each under the file name of its image."""
    lists = [table["images"], table["annotations"] if isinstance(table.get("annotations"), list) else []]
    images, notes = ([one for one in some if isinstance(one, dict)] for some in lists)
    names = {str(image.get("id")): image.get("file_name") for image in images}
    rows = [{**note, "file_name": names.get(str(note.get("image_id")))}
            for note in notes if "caption" in note]
    if not rows:
        what = f"annotations with {', '.join(sorted(notes[0])[:5])}" if notes else "a list of images"
        raise hdm.UserError(f"COCO's, without captions: {what}")
    return rows


def open_parquet(path):
    """-> a pyarrow ParquetFile, and its column of image files or None: it may have their names."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise hdm.UserError("parquet is read by pyarrow, which is not here: pip install pyarrow") from error
    file = ParquetFile(path, buffer_size=2 ** 20)
    leaves = [file.schema.column(i) for i in range(len(file.schema))]  # such as image.bytes
    def holds_images(path):                      # a hash or an embedding, too, is bytes
        batches = file.iter_batches(16, columns=[path], use_threads=False)
        values = filter(None, (image_bytes(cell) for batch in batches for cell in batch[0]))
        return any(re.match(IMAGE_HEAD, value) for value in itertools.islice(values, 16))
    blobs = [leaf.path for leaf in leaves if not leaf.max_repetition_level
             and (leaf.physical_type, leaf.logical_type.type) == ("BYTE_ARRAY", "NONE")]
    blobs.sort(key=lambda path: path.split(".")[0] != "image")
    return file, next(filter(holds_images, blobs), None)


def image_bytes(cell):
    value = cell.as_py()
    while isinstance(value, dict):               # structs that hold the bytes and nothing else
        (value,) = value.values()
    return value or b""


def parquet_rows(path):
    """Yields (where, row without its image, offset of its image for open_at, if it has a column of them)."""
    file, images = open_parquet(path)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    columns = [leaf for leaf in leaves if leaf != images and not leaf.endswith(".bytes")]
    number = itertools.count()
    for group in range(file.num_row_groups):
        batches = file.iter_batches(row_groups=[group], columns=columns, use_threads=False)
        rows = itertools.chain.from_iterable(batch.to_pylist() or [{}] * batch.num_rows for batch in batches)
        for i, row in enumerate(rows, 1):
            yield f"row {next(number):06d}", row, images and group * 2 ** 32 + i


@functools.lru_cache(maxsize=1)
def read_row_group(path, stamp, group):
    """The images of a row group, the least that parquet can read; the last one stays in memory."""
    file, images = open_parquet(path)
    return file.read_row_group(group, columns=[images], use_threads=False).column(0)


def table_rows(path, span, column):
    """Yields (where, row) of a table, or parquet_rows; a row that is no dict is broken."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        yield from parquet_rows(path)
        return
    with open_at(*span) as file:
        lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        if suffix == ".json":
            table = json.loads("".join(lines))
            if isinstance(table, dict) and isinstance(table.get("images"), list):
                table = coco_rows(table)
            elif isinstance(table, dict):        # kohya's {image: {"caption": , "tags": }}, {image: caption}
                table = [{"file_name": name, **(row if isinstance(row, dict) else {"caption": row})}
                         for name, row in table.items()]
            for number, row in enumerate(table if isinstance(table, list) else [table], 1):
                yield f"row {number}", row
        elif suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                row = None
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                if line.strip():
                    yield f"line {number}", row
        elif suffix == ".tsv":                   # a quote is a letter there
            yield from csv_rows(list(lines), column, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from csv_rows(list(lines), column)


def read_table(path, span, s, rows, report):
    """Adds the captions of a table to rows -> {path/row: span} of images that it holds itself."""
    columns, new, images = set(), [], {}
    for where, row, *offset in table_rows(path, span, s.name_column):
        with report.leaving_out(f"{path}, {where}"):
            if not isinstance(row, dict):
                raise hdm.UserError("broken table row")
            columns.update(row)
            name = where[4:] if any(offset) else row_name(row, s.name_column)
            name = os.path.normpath(os.path.join(path if any(offset) else os.path.dirname(path), name))
            both = path.lower().endswith(".json") and {"caption", "tags"} <= row.keys()  # as kohya uses them
            new.append((name, row_caption(row, s.caption or "{caption} ||| {tags}" * both)))
            if any(offset):
                images[name] = path, offset[0], 0
    if missing := {*re.findall(COLUMN, s.caption), s.name_column} - {"", *columns}:
        raise hdm.UserError(f"table without a column {' '.join(sorted(missing))}")
    for name, caption in new:
        rows.add(name, caption, span[0])
    return images


def read_texts(caption, spans, s):
    """A row's caption or "", the spans of text files by suffix -> the caption, lines of its file."""
    extra, lines = "", []
    for suffix, span in spans.items():
        if span[2] > 2 ** 20:                   # a guess
            raise hdm.UserError("caption over 1 MB")
        with open_at(*span) as file:
            text = file.read().decode("utf-8-sig", "surrogateescape")
        text = re.sub(f"[{hdm.OR}{hdm.BESIDE}]", " ", text)  # ours, which people's files hold by chance alone
        if suffix == s.sidecar:
            extra = " ".join(text.split())
        elif suffix == ".json":
            caption = row_caption(json.loads(text), s.caption)
        else:
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            caption = (hdm.OR if s.caption_lines == "choose" else " ").join(lines)
    whole = hdm.OR.join(one.strip() for one in caption.split(hdm.OR) if hdm.parse_caption(one))
    if extra:
        whole = hdm.BESIDE.join((extra, whole, "") if s.sidecar_place == "before" else ("", whole, extra))
    if not whole or "\0" in whole or printable(whole) != whole:  # such as UTF-16, cp1252
        raise hdm.UserError("caption is not UTF-8" if whole else "empty caption")
    return whole, len(lines)


def is_hidden(name):
    """Whether a file or folder is not people's but a system's: .DS_Store, ._7.jpg, .Trash-1000, __MACOSX."""
    return name.startswith(".") or name.lower() in SYSTEM


def tar_files(path, report):
    """Yields (path, span or None: no plain file) for a tar's members, as far as its headers can be read."""
    with contextlib.suppress(Exception), tarfile.open(path, "r:", encoding="utf-8") as tar:
        size = os.path.getsize(path)
        for member in itertools.takewhile(lambda member: member.offset_data + member.size <= size, tar):
            plain = member.isreg() and not member.issparse()
            name = os.path.normpath("/" + member.name)  # no ../ leads out of the tar
            if any(map(is_hidden, name.split("/"))):
                report.add("hidden or system file", path + name)
            elif not member.isdir():
                yield path + name, (path, member.offset_data, member.size) if plain else None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) == bytes(512):  # tarfile is silent about some ends that are none
            return
    report.add("tar cut short", path)


class Group:
    """The files of a folder or a tar: {path, its suffix in lower case: (path, span)}."""

    def __init__(self, files):
        self.files, self.read = files, set()     # read: keys of captions and tables
        self.images = {path: span for key, (path, span) in files.items() if key.endswith(IMAGES)}
        self.stems = {os.path.splitext(path)[0] for path in self.images}
        self.composed = {unicodedata.normalize("NFC", key): key for key in files if not key.isascii()}

    def beside(self, image, end):
        """-> the key of an image's file with this end, such as 7.txt, else 7.jpg.txt, of 7.jpg; or None."""
        stem = os.path.splitext(image)[0]
        for base in (stem,) if image in self.stems else (stem, image):  # 7.jpg.txt is that of a 7.jpg.png
            if base + end in self.files:
                return base + end
            key = self.composed and self.composed.get(unicodedata.normalize("NFC", base + end))
            if key and key[:-len(end)] not in self.stems and key[:-len(end)] not in self.images:
                return key                       # and no other image's
        return None

    def rest(self):
        """Yields (kind, path) of what has not been read."""
        for key, (path, span) in self.files.items():
            stem, suffix = os.path.splitext(key)
            if path in self.images or key in self.read or suffix == ".tar" and not span[1]:
                continue
            kind = next((kind for ends, kind in KINDS.items() if key.endswith(ends)), None)
            if suffix in TEXTS and (stem in self.stems or stem in self.images):
                kind = "extra caption file"
            elif kind is None:
                kind = "not an image"
                try:
                    with open_at(span[0], span[1], min(span[2], 16)) as stream:
                        if re.match(IMAGE_HEAD, stream.read(16)):
                            kind = "image without a known suffix"
                except OSError:
                    kind = "unreadable"
            yield kind, path


def walk(top, report):
    """Yields a Group for each folder below top, and for each tar (top may be a file); of a.txt and a.TXT only
    the first."""
    single = [(os.path.dirname(top), [], [os.path.basename(top)])] if os.path.isfile(top) else []
    seen = set()                                 # links may run in circles
    for folder, below, names in single or os.walk(
            top, followlinks=True, onerror=lambda error: report.add("unreadable", error.filename)):
        below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        hidden = set() if single else set(filter(is_hidden, [*below, *names]))  # a source may have any name
        for name in hidden - {".prepare"}:       # our own mark
            report.add("hidden or system file", os.path.join(folder, name))
        below[:] = [name for name in below if name not in hidden]
        paths = [os.path.join(folder, name) for name in sorted(names) if name not in hidden]
        plain = [(path, (path, 0, os.path.getsize(path)) if os.path.isfile(path) else None) for path in paths]
        tars = [path for path, span in plain if span and path.lower().endswith(".tar")]
        for group in plain, *(tar_files(path, report) for path in tars):
            files = {}
            for path, span in group:
                stem, suffix = os.path.splitext(path)
                key = stem + suffix.lower()
                if span and key not in files:
                    files[key] = path, span
                else:
                    report.add("duplicate name" if span else "not a plain file", path)
            yield Group(files)


def read_tables(group, s, rows, report):
    """The tables that go with the images of a folder or a tar, and the images that they hold themselves."""
    own = {base + ".json" for image in group.images for base in (image, os.path.splitext(image)[0])}
    for key, (path, span) in group.files.items():
        named = re.fullmatch(r"metadata\.(jsonl|csv)|meta.*\.json", os.path.basename(key)) and key not in own
        if named or key.endswith(".parquet") and not span[1]:
            group.read.add(key)
            with report.leaving_out(path):
                group.images |= read_table(path, span, s, rows, report)


def find_captions(image, group, rows, s):
    """-> the caption in an image's rows, or "", the files of these tables, and {end: span} of its text files:
    the first of TEXTS that is there, the last one for --caption; none if it has rows; and a sidecar."""
    caption, tables = rows.take(image)
    keys = {}
    for end in () if tables else TEXTS[::-1] if s.caption else TEXTS:
        key = group.beside(image, end)
        if key and not (s.sidecar and key.endswith(s.sidecar)):
            keys[end] = key
            break
    if s.sidecar and (key := group.beside(image, s.sidecar)):
        keys[s.sidecar] = key
    group.read.update(keys.values())
    return caption, tables, {end: group.files[key][1] for end, key in keys.items()}


def scan(source, report, s, known=lambda stamp: None, weight=1.0, number=0):
    """Yields a Record for each captioned image of a folder, a tar or a table; others go into the report.

    known: from a stamp to the Record of an earlier scan, whose files are not opened again, or None. weight,
    number: the source's.
    """
    top = os.path.abspath(source)
    root = top if os.path.isdir(top) else os.path.dirname(top)
    if root != top and not top.lower().endswith((".tar", *TABLES)):
        raise hdm.UserError(f"{source}: no folder, and no {' '.join(TABLES)} or .tar file")
    rows, counts, given = Rows(), Counter(), root != top and top.lower().endswith(TABLES)
    with hdm.naming(source, "not a table of images"):
        given = given and not (top.lower().endswith(".parquet") and open_parquet(top)[1])
        if given:
            read_table(top, (top, 0, 0), s, rows, report)
            rows.base = root
            root = os.path.dirname(root) if os.path.basename(root) == "annotations" else root  # as COCO's
    for group in walk(root, Report()) if given else ():
        rows.claim(group.images)
    for group in walk(root if given else top, report):
        if given:
            group.read.update(key for key in group.files if group.files[key][0] == top)
        else:
            read_tables(group, s, rows, report)
            rows.claim(group.images)
        for path, (file, offset, length) in group.images.items():
            with report.leaving_out(path):
                caption, tables, spans = find_captions(path, group, rows, s)
                name = os.path.relpath(path, root).replace(os.sep, "/")
                if printable(path) != path:
                    raise hdm.UserError("name is not UTF-8")
                if not tables and (given or not spans):
                    raise hdm.UserError("not in the table" if given else "no caption")
                texts = tuple(sorted({*tables, *(span[0] for span in spans.values())} - {file}))  # of a tar
                stamp = stamp_of(file, *texts, key=(name, file, texts))
                if (record := known(stamp)) is None:
                    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64
                    caption, lines = read_texts(caption, spans, s)
                    with open_at(file, offset, length) as stream:
                        length = length or stream.seek(0, 2)  # of a parquet's image it is known only now
                        stream.seek(0)
                        width, height, colours = measure_image(stream, length, s.verify)
                    record = Record(name, file, texts, caption, offset, length, width, height, weight,
                                      stamp, stamp_of(file), lines, number, place, colours)
                if kind := refusal(record, s):
                    raise hdm.UserError(kind)
                if record.colours == 2:
                    report.add("kept: broken colour profile", path)
                kohya = file == path and re.match(r"([1-9]\d{0,2})_[^/]*/", name)  # not 2020_trip/
                how = " and ".join([*sorted(map(os.path.basename, tables)), *spans])
                counts[how + " in a tar" * (file != path and not file.lower().endswith(".parquet"))
                       + (f" in {kohya[0]}" if kohya else "")] += 1
                yield record._replace(weight=weight * float(kohya[1] if kohya else 1), source=number)
        with report.leaving_out(root):
            for kind, path in group.rest():
                report.add(kind, path)
    for name, row in rows.items():
        if not row.used:
            report.add("row without an image", f"{row.tables[0]}: {os.path.relpath(name, root)}")
    how = ", ".join(f"{n:,} with {how}" for how, n in counts.most_common()) or "none"
    print(printable(f"images: {how} in {source}"))


# ---- the index: what training reads; images stay where they are ------------------------------------------
# records.bin: a RECORD for each image, in order of weight and place; text.bin: its texts, from `text` on.
RECORD = np.dtype([(name, "<f8" if name in ("weight", "place") else "<u8")
                   for name in (*Record._fields[4:], "text", "bytes")])
RECORD_4 = np.dtype([(name, kind) for name, kind in RECORD.descr if name != "colours"])   # of format 4


class Index:
    """index[i]: a Record, out of records (n,) RECORD and text (bytes,) uint8, which a folder has as maps."""

    def __init__(self, records, text, about, folder=None):
        self.records, self.text, self.about, self.folder = records, text, about, folder

    @classmethod
    def open(cls, folder):
        with hdm.naming(folder, "not a whole index; run prepare.py again"):
            about = json.loads(Path(folder, "index.json").read_text(encoding="utf-8"))
            kind = {4: RECORD_4, 5: RECORD}.get(about["format"])
            assert kind, "of another format"
            records = np.memmap(Path(folder, "records.bin"), kind, "r").view(np.ndarray)
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
        return Record(name, file, tuple(texts), caption, *numbers)

    def split(self, validation):
        """-> the training part, [(first record, number, weight)], and at most 512 held-out records."""
        parts, held = [], []
        for weight, first, stop in self.about["groups"]:
            middle = bisect.bisect_left(self.records["place"], validation, first, stop)
            parts += [(middle, stop - middle, weight)] if middle < stop else []
            held += range(first, min(middle, first + 512))
        return parts, sorted(held, key=lambda i: self.records[i]["place"])[:512]

    def changed(self, i):
        """Whether the files of an image are not as they were indexed, or gone."""
        record = self[i]
        with contextlib.suppress(OSError):
            return stamp_of(record.file, *record.texts, key=record[:3]) != record.stamp
        return True

    def read(self, i, side=None):
        """-> an image (3, height, width) uint8, its short side scaled to side."""
        name, file, texts, _, offset, length, *_ = record = self[i]
        with hdm.naming(file if file.endswith(name) else f"{file}: {name}", "not a whole image"):
            if offset and stamp_of(file) != record.image:   # what lies there now may be another image
                raise hdm.UserError(f"{file}: {name}: the file has changed since it was indexed")
            with open_at(file, offset, length) as stream:
                return torch.from_numpy(np.array(hdm.load_image(stream, side))).permute(2, 0, 1)


def refusal(record, s):
    """Why the filters leave an image out, or None."""
    def plain(tags):
        return {tag.strip().replace("_", " ").lower() for tag in tags}
    short, long = sorted((record.width, record.height))
    tags = plain(re.split(rf",|\|\|\||%%|\$\$|{hdm.OR}|{hdm.BESIDE}", record.caption))
    wrong = {"below --min_size": short < s.min_size, "beyond --max_ratio": long > s.max_ratio * short,
             "without --require_tag": plain(s.require_tag) - tags,
             "with --drop_tag": plain(s.drop_tag) & tags}
    return next((kind for kind, is_so in wrong.items() if is_so), None)


def build_index(sources, s, folder=None, old=None):
    """Scan (path, weight) pairs -> an Index, in memory or in the folder. What stands in old, an earlier one
    by the same settings, and has not changed since is not read again."""
    options = [s.caption, s.name_column, s.caption_lines, s.sidecar, s.sidecar_place, s.verify]
    same = old and (old.about["format"], old.about["options"]) == (5, options)
    stamps, numbers = np.unique(old.records["stamp"] if same else np.zeros(0, "<u8"), return_index=True)
    def known(stamp):
        i = np.searchsorted(stamps, np.uint64(stamp))
        return old[numbers[i]] if np.uint64(stamp) in stamps[i:i + 1] else None

    report, raw = Report(), io.BytesIO()         # raw: 104 bytes an image, until they are sorted
    with open(Path(folder, "text.bin"), "wb") if folder else io.BytesIO() as text:
        for number, (source, weight) in enumerate(sources):
            for record in scan(source, report, s, known, weight, number):
                entry = "\0".join([record.name, record.file, record.caption, *record.texts])
                entry = entry.encode(errors="surrogateescape")  # a table's path can be any bytes
                values = *record[4:], text.tell(), len(entry)
                raw.write(np.array(values, RECORD).tobytes())
                text.write(entry)
        size = text.tell()
        data = None if folder else np.frombuffer(text.getvalue(), np.uint8)
    for kind, entry in sorted(report.items()):
        what = kind if kind.startswith("kept: ") else f"left out: {kind}"
        print(printable(f"{entry['count']:>11,} {what}, as {entry['paths'][0]!r}"))
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
    about = dict(format=5, identity=identity, options=options, groups=groups, sizes=[len(records), size])
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
    with hdm.scratch_folder(out.parent, out.name + ".tmp") as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        (new / ".prepare").write_text(str(len(os.listdir(new))))
        if out.exists():
            out.rename(scratch / "old")
        new.rename(out)


# ---- the order of training ---------------------------------------------------------------------------------
# An example: of records a and b of weight 1 and c of weight 1.5 the stream with seed 0 begins
#   a c b | b c a c | c b a | a c c b
# In each epoch (between the bars) each stands as often as its weight says: c once, then twice, and so on.
def shuffled(i, n, *key):
    """Item i of a random order of range(n), one for each key, that stands nowhere in memory: a Feistel
    network over the cells of a grid; from a cell past n it walks on."""
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    def number(*words):
        return int.from_bytes(hashlib.blake2b(repr((key, words)).encode(), digest_size=8).digest(), "little")
    while True:
        row, column = divmod(i, columns)
        for turn in range(4):
            row = (row + number(turn, column)) % rows
            column = (column + number(turn, row, "row")) % columns
        i = row * columns + column
        if i < n:
            return i


class Epochs:
    """The endless stream of training: in each epoch, in an order of its own, a record stands as often as its
    weight says; of weights with fractions some stand once more, drawn anew each time."""

    def __init__(self, parts, seed):
        self.parts, self.seed = parts, seed      # [(first record, number, weight)]
        self.images = sum(number for _, number, _ in parts)
        self.length = sum(number * weight for _, number, weight in parts)  # on average

    def start(self, epoch):
        """The stream's item at which an epoch starts."""
        return sum(int(number * weight * epoch) for _, number, weight in self.parts)

    def next_epoch(self, i):
        """The first epoch that starts at item i or later."""
        return bisect.bisect_left(range(2 + int((i + len(self.parts)) / self.length)), i, key=self.start)

    def __getitem__(self, i):
        """-> epoch, which copy of the record in it, the record's number."""
        epoch = self.next_epoch(i + 1) - 1
        index = shuffled(i - self.start(epoch), self.start(epoch + 1) - self.start(epoch), self.seed, epoch)
        for first, number, weight in self.parts:
            places = int(number * weight * (epoch + 1)) - int(number * weight * epoch)
            if index < places:
                copy, index = divmod(index, number)
                if copy == int(weight):                      # the fraction's: as many as there are, drawn
                    index = shuffled(index, number, self.seed, epoch, first)
                return epoch, copy, first + index
            index -= places


# ---- the cache of latents ----------------------------------------------------------------------------------
SHARD = 512                                      # images in a file; a kill loses at most these


def latents_folder(data, index, vae, image_size):
    """Its name says whose latents it holds: a hash of the VAE's encoder (in bfloat16, whatever it has) and of
    the images' names and files, not of captions. In it 000007.safetensors: by the numbers of 512 records
    their moments (C or 2 C, height, width), float16."""
    digest = hashlib.sha256(repr((vae.mean, vae.std)).encode())
    for weight in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        digest.update(weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    digest.update(index.records["place"].tobytes() + index.records["image"].tobytes())
    if "colours" in index.records.dtype.names and (converted := index.records["colours"] == 1).any():
        digest.update(converted.tobytes())       # others are as before profiles were read
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
            f"--latents: {folder}, of these images and this VAE, is not there or not whole: "
            f"python prepare.py {s.data} --latents --image_size={s.image_size} --vae={s.vae}{then}")

    def read(self, i, side=None):
        """-> the moments of record i, (C or 2 C, height, width) float16."""
        file = shard(self.folder, i)
        with hdm.naming(file, f"no latents of record {i}"), safe_open(file, "pt") as tensors:
            return tensors.get_tensor(str(i))


def half_moments(vae, pixels, channels):
    """-> moments (B, channels, h, w) float16; of images where they are not finite again, in float32."""
    moments = torch.cat(vae.moments(pixels), dim=1)[:, :channels].half().cpu()
    bad = ~moments.isfinite().flatten(1).all(1)
    if bad.any() and next(vae.parameters()).dtype != torch.float32:
        with hdm.in_float32(vae):
            moments[bad] = half_moments(vae, pixels[bad.to(pixels.device)], channels)
    return moments


def encode_latents(s, vae, device, rank, ranks):
    """Writes the shards that are not there; the ranks take them in turns."""
    index = Index.open(s.out)
    folder = latents_folder(s.out, index, vae, s.image_size) + "_mean" * s.mean_only
    hdm.make_folder(folder, "--out")
    channels = vae.latent_channels * (1 if s.mean_only else 2)
    sides = np.stack([index.records[name].astype(int) for name in ("height", "width")], axis=1)
    cells = sides * s.image_size // sides.min(1, keepdims=True) // vae.factor  # (n, 2): the latents' sides
    def whole(i):                                # i, its image, scaled and cut to whole cells; or None
        try:
            image = index.read(i, s.image_size)
            if index.changed(i):
                raise hdm.UserError(f"{index[i].name} is not as it was indexed; run prepare.py again")
        except hdm.UserError as error:
            return hdm.warn(f"{error}; no latents of it")
        height, width = (side // vae.factor * vae.factor for side in image.shape[1:])
        return i, image[:, :height, :width]

    todo = [range(first, min(first + SHARD, len(index))) for first in range(0, len(index), SHARD)
            if not is_whole(shard(folder, first))]
    gb = 2e-9 * channels * sum(cells[numbers].prod(1).sum() for numbers in todo)
    free, images = shutil.disk_usage(folder).free / 1e9, sum(map(len, todo))
    if gb > free:
        raise hdm.UserError(f"--latents: {gb:.2f} GB are needed in {folder}, {free:.2f} are free")
    trial = torch.zeros(s.batch_size, 3, s.image_size, s.image_size, device=device)
    for _ in range(2):                           # the first one warms up
        clock = time.perf_counter()
        vae.moments(trial)[0].sum().item()
    hours = images / s.batch_size * (time.perf_counter() - clock) / 3600 / ranks
    print(f"latents: {images:,} of {len(index):,} images to encode into {folder}: {gb:.3f} GB, "
          f"{free:.0f} are free; about {hours:.2f} h on {ranks} x {device} if the disk keeps up", flush=True)
    hdm.gather(None)                                 # all have seen the same files
    with ThreadPoolExecutor(s.workers) as pool:  # Pillow works outside of Python's lock
        for numbers in tqdm(todo[rank::ranks], disable=rank > 0):
            alike = sorted(numbers, key=lambda i: tuple(cells[i]))
            latents, ready = {}, filter(None, pool.map(whole, alike))
            for _, same in itertools.groupby(ready, key=lambda pair: pair[1].shape):
                while batch := list(itertools.islice(same, s.batch_size)):
                    pixels = torch.stack([image for _, image in batch]).to(device).float() / 127.5 - 1
                    for (i, _), moment in zip(batch, half_moments(vae, pixels, channels)):
                        if moment.isfinite().all():
                            latents[str(i)] = moment.clone()
                        else:
                            hdm.warn(f"{index[i].name}: its latent is not finite in float16, also if encoded "
                                     f"in float32; no latents of it")
            partial = shard(folder, numbers[0]).with_suffix(".partial")
            save_file(latents, partial)
            hdm.open_modes(partial)
            partial.replace(shard(folder, numbers[0]))
    hdm.gather(None)


# ---- training examples -------------------------------------------------------------------------------------
class Samples(Dataset):
    """Item i of the endless training stream, or of the held-out set: hdm.training_example of one image.

    Training: places is an Epochs, seed the run's. Held out: places are record numbers, seed is None. latents:
    a Latents, or None; s: settings with those of hdm.Example; factor: as in hdm.training_example.
    """

    def __init__(self, index, places, latents, s, config, factor, seed=None):
        self.index, self.places, self.latents = index, places, latents
        self.s, self.config, self.factor, self.seed = s, config, factor, seed

    def __getitem__(self, i):
        unreadable = []
        for at in range(i, i + 100):                         # one bad file of millions must not end the run:
            try:                                             # the next in order takes its place
                example, changed = self.example(at)
                return dict(example, trouble=("\n".join(unreadable), changed))
            except hdm.UserError as error:
                unreadable.append(str(error))
        raise hdm.UserError(f"100 images in a row cannot be read, from {unreadable[0]} on")

    def example(self, i):
        """-> the training example; the image's name if its files are not as they were indexed, else ""."""
        training = self.seed is not None
        epoch, copy, number = self.places[i] if training else (0, 0, self.places[i % len(self.places)])
        record = self.index[number]
        key = f"{record.source}/{record.name}" if record.source > 0 else record.name  # its own in all sources
        if training:
            key = f"{self.seed} {epoch} {copy} {key}"
        size = self.s.image_size
        image = (self.latents or self.index).read(number, size)                       # the short side: size
        sides = image.shape[2], image.shape[1]
        if self.latents:
            sides = hdm.scaled_sides(record.width, record.height, size)
        changed = record.name if self.index.changed(number) else ""
        return hdm.training_example(image, record.caption, sides, key, self.s, self.config, self.factor,
                                    bool(self.latents), training), changed


def open_data(s):
    """-> the Index of s.data, its training stream, the held-out records, an identity of all these."""
    index = open_index(s.data)
    least = math.nextafter(index.records["place"].min(), 1)  # holds out one, or all that have this name
    for share in (0.02, least, 0.0) if s.validation is None else (s.validation,):
        parts, held = index.split(share)
        if parts and (held or not share):
            s.validation = share
            break
    else:
        least = math.ceil(1000 * least) / 1000
        raise hdm.UserError(f"--validation={s.validation}: holds out {len(held)} of {len(index):,} images; "
                            f"{f'least is {least}' if parts else 'none is left'}; 0: no held-out loss")
    some = index.records[::1 + len(index) // 100_000]        # of very many a sample
    small = np.minimum(some["width"], some["height"]) < s.image_size
    if small.any():
        print(f"data: {100 * small.mean():.3g} % of the images are smaller than image_size and enlarged; "
              f"prepare.py --min_size={s.image_size} leaves them out")
    identity = hashlib.sha256(f"{index.about['identity']} {s.validation}".encode()).hexdigest()
    if len(set(hdm.gather((identity, str(s.resume))))) > 1:
        raise hdm.UserError(f"--data={s.data}, --resume={s.resume}: not the same to all processes")
    epochs = Epochs(parts, s.seed)
    s.images = max(1, round(s.epochs * epochs.length)) if s.epochs else s.images
    return index, epochs, held, identity


def say_what_is_cut(index, te, s):
    """Prints the share of captions that text_length cuts, of a sample as training draws and reads them."""
    some = range(0, len(index), 1 + len(index) // 2000)      # the index is in order of a hash
    texts = [hdm.draw_caption(index[i].caption, random.Random(i), s) for i in some]
    lengths = np.array([len(ids) for ids in te.tokenizer(texts)["input_ids"]])
    if share := (lengths > te.max_length).mean():
        print(f"captions: --text_length={s.text_length} cuts {share:.2%} of a sample of {len(texts):,}, of "
              f"up to {lengths.max()} tokens; a higher one keeps their ends, shorter captions cost less")


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
        tokenizer = hdm.TextEncoder(s.text_encoder, s.text_length).tokenizer
        return dry_run(Index.open(s.out) if ready else build_index(sources, s, old=old), s, tokenizer)
    rank, ranks = hdm.start_ranks()
    if s.latents:                                # first: a mistake is an error before an hour's work
        device = hdm.pick_device(s.device)
        vae = hdm.load_vae(s.vae, device, hdm.pick_dtype(s.dtype, device))
        if s.image_size % vae.factor:
            raise hdm.UserError(f"--image_size={s.image_size}: no multiple of {vae.factor}, a cell's pixels")
    if rank == 0 and not ready:
        with whole_folder(s.out) as folder:
            n = len(build_index(sources, s, folder, old))
            old = None                           # unmapped: Windows renames no folder of mapped files
        print(f"{n:,} images in {s.out}; report.json there names what was left out")
    hdm.gather(None)                                 # the others wait for it
    if s.latents:
        encode_latents(s, vae, device, rank, ranks)


IDLE = [  # settings, when they have no effect, and why
    ("vae batch_size workers device dtype", lambda s: not s.latents or s.dry_run, "without --latents"),
    ("text_encoder text_length tag_separator spaces caption_dropout tag_dropout group_dropout",
     lambda s: not s.dry_run, "without --dry_run"),
    ("text_lengths mask_padding tread_rate t_shift vae_chunk", lambda s: True, "here: it is train.py's"),
    ("image_size", lambda s: not s.latents and not s.dry_run, "without --latents or --dry_run"),
    ("sidecar_place", lambda s: not s.sidecar, "without --sidecar")]


def judge(settings):
    import sample  # the judge draws: the one step up, in a command of its own
    sample.judge_checkpoint(settings)


def main(argv):
    commands = {"demo": (make_demo, DemoSettings, []), "judge": (judge, JudgeSettings, []),
                "text_encoder": (text_encoder, TextEncoderSettings, ["SOURCE"])}
    name, *rest = argv or [""]
    if name in commands:
        command, kind, positionals = commands[name]
        classes, idle = [kind], []
    else:
        if not name.startswith("-") and not os.path.exists(name.rpartition("=")[0] or name):
            hdm.check_name(f"prepare.py {name}", name, commands, "path or command")
        command, kind, positionals, rest = prepare, PrepareSettings, ["PATH ..."], argv
        classes, idle = [DataSettings, hdm.Example], IDLE
    words, values = hdm.parse_args(rest, classes, positionals, doc=__doc__)
    settings = kind(**values)
    hdm.check_bounds(settings)
    hdm.warn_idle(values, [settings], idle)
    command(settings, *words)


# ==== Extras ================================================================================================
# ---- a dry run ---------------------------------------------------------------------------------------------
def dry_run(index, s, tokenizer):
    """prepare.py --dry_run, with its settings s: prints what training will meet; OUT.png shows the first 48
    images with their crops and captions."""
    n, epochs, lengths = len(index), Epochs(index.split(0.0)[0], 0), index.records["length"]
    sides = np.stack([index.records[name].astype(int) for name in ("width", "height")])
    print(f"{n:,} images, {lengths.sum() / 1e9:.3f} GB; {epochs.length:,.0f} to an epoch")
    for what, values, edges in (("width / height", sides[0] / sides[1], [0, 0.5, 0.75, 1, 1.01, 1.34, 2.01]),
                                ("short side", sides.min(0), sorted({0, 256, 512, 768, 1024, s.image_size}))):
        counts = np.histogram(values, [*edges, np.inf])[0]
        print(f"{what}: " + ", ".join(f"{n:,} from {edge:g}" for edge, n in zip(edges, counts) if n))
    cells = (sides * s.image_size // sides.min(0) // 8).prod(0).sum()
    print(f"--latents at {s.image_size} px: {16e-9 * cells:.3f} GB, with --mean_only half (4 channels, f8)")
    some = np.random.default_rng(0).permutation(n)[:20_000].tolist()
    texts = [hdm.draw_caption(index[i].caption, None, s) for i in some]
    tokens = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    print(f"tokens of {len(texts):,} captions: median {np.median(tokens):.0f}, 95 % below "
          f"{np.quantile(tokens, 0.95):.0f}, at most {tokens.max()}; --text_length={s.text_length} cuts "
          f"{100 * (tokens > s.text_length).mean():.1f} %")
    tags = Counter(tag for text in texts for tag in {tag.strip() for tag in text.split(",")})
    print("most common tags: " + ", ".join(f"{tag} {count:,}" for tag, count in tags.most_common(20)))
    hashes, (_, which, counts) = [], np.unique(lengths, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(counts[which] > 1).tolist():     # others are alone with their length
        record = index[i]
        with contextlib.suppress(OSError), open_at(record.file, record.offset, record.length) as stream:
            hashes.append(hashlib.sha256(stream.read()).digest())
    print(f"exact duplicates: {len(hashes) - len(set(hashes)):,} images")
    config, tiles = hdm.XUTConfig(patch_size=s.image_size, in_channels=1), []
    samples = Samples(index, epochs, None, replace(s, tread_rate=0.0), config, None, seed=0)
    for i in range(min(48, n)):
        tiles.append(Image.new("RGB", (201, 270), "white"))
        with contextlib.suppress(hdm.UserError):             # it cannot be read, and stays white
            draw_example(tiles[-1], samples.example(i)[0], index.read(epochs[i][2], s.image_size))
    hdm.make_folder(Path(s.out).parent, "--out")
    hdm.image_grid(list(map(np.asarray, tiles)), columns=8, gap=10).save(f"{s.out}.png")
    print(f"{s.out}.png: {len(tiles)} images as training takes them: crop in red, caption below")


def draw_example(tile, example, image):
    """Draws on a PIL tile: the image (3, height, width), in it what training sees, framed; the caption."""
    (left, top, side), canvas = example["crop"], ImageDraw.Draw(tile)
    image = image.clone()
    image[:, top:top + side, left:left + side] = example["pixels"]                    # so that a flip shows
    shown = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    scale = 200 / max(shown.size)
    tile.paste(shown.resize([round(length * scale) or 1 for length in shown.size]))
    canvas.rectangle([scale * x for x in (left, top, left + side, top + side)], outline="red")
    canvas.text((0, 203), "\n".join(textwrap.wrap(example["caption"], 34)[:5]) or "(dropped)", "black")


# ---- a text encoder for any captions -----------------------------------------------------------------------
def make_text_encoder(captions, out, most_tokens=4096, dim=128, seed=0, **shape):
    """Saves to the folder `out` a byte-level BPE tokenizer trained on `captions` and a tiny random Qwen3, as
    AutoTokenizer and AutoModel load them: the path of a real encoder without its download or its knowledge (a
    word that stands in no caption means nothing). shape: other settings of its Qwen3Config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # here: slow to import
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model, logging
    logging.disable_progress_bar()  # it would write "Writing model shards" over our own lines
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are tokens, so that any text can be encoded, emoji too, whatever the captions held.
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=most_tokens, special_tokens=["<pad>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right",
                            clean_up_tokenization_spaces=False).save_pretrained(out)
    tiny = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=dim, intermediate_size=2 * dim,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=dim // 4,
                pad_token_id=0, bos_token_id=None, eos_token_id=None)
    config = Qwen3Config(**tiny | shape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen3Model(config)
        # Nothing is trained here, so the scales decide what a state says. Where layers keep the size of what
        # they read (1 / sqrt(fan in)), embeddings of std 2 make it mostly its own word, a bit those before.
        # Mean cosine of the states of one shape word in two captions | of two shape words, over the 384 (this
        # function, 2026): std 0.5: 0.57 | 0.16; 2: 0.92 | -0.01; 8: 1.00 | -0.05; all at Qwen3's 0.02: 0.59 |
        # 0.28. In each case a linear probe on the last token's state finds all four attributes.
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=2.0 if name == "embed_tokens.weight" else weight.shape[1] ** -0.5)
    model.save_pretrained(out)
    hdm.open_modes(out)


# ---- what the demo shows ----------------------------------------------------------------------------------
CANVASES = {(32, 32): 0.8, (32, 48): 0.1, (48, 32): 0.1}  # (height, width) in pixels: share of the images
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


def make_demo(settings):
    out = os.path.abspath(settings.out)
    seen = [words for words in COMBINATIONS if words not in UNSEEN]
    # Each run of 352 images shows each combination once, in one shuffled order.
    order = np.random.default_rng(settings.seed).permutation(len(seen))
    canvases = CENTRED_CANVASES if settings.centred else CANVASES
    with whole_folder(out) as folder, whole_folder(out + "_te") as encoder:
        # From all 352 captions, not from those drawn: a demo of 20 images, too, has one token per word.
        make_text_encoder([CAPTION.format(*words) for words in seen], encoder, seed=settings.seed)
        for i in range(settings.count):
            rng = np.random.default_rng((settings.seed, i))
            words = seen[order[i % len(seen)]]
            height, width = rng.choice(list(canvases), p=list(canvases.values()))
            place = random_centre(rng, words[0], words[2], height, width)
            if settings.centred:
                place = height / 2, width / 2, CENTRED_RADIUS[words[0]] * max(height, width)
            Image.fromarray(draw(*words, height, width, *place)).save(folder / f"{i:05d}.png")
            (folder / f"{i:05d}.txt").write_text(CAPTION.format(*words) + "\n")
    Path(out + "_unseen.txt").write_text("".join(CAPTION.format(*words) + "\n" for words in UNSEEN))
    print(f"{settings.count} images in {settings.out}; beside it _unseen.txt and _te, the text encoder")


def text_encoder(settings, source):
    index = open_index(source)
    how = dict(separator=settings.tag_separator, spaces=settings.spaces)
    captions = (hdm.parse_caption(index[i].caption, **how) for i in range(len(index)))  # all alternatives'
    with whole_folder(settings.out) as out:
        make_text_encoder(captions, out, settings.vocab)
    print(f"a text encoder for the words of {len(index)} captions in {settings.out}")


if __name__ == "__main__":
    hdm.run(main)
