"""Data for train.py: an index of captioned images as they lie on disks, a cache of latents; the demo set.

    python prepare.py PATH ... --out=data/mine --dry_run     # what is there, without writing an index
    python prepare.py PATH ... --out=data/mine               # folders, tars, tables -> an index: no copies
    python prepare.py PATH ... --out=data/mine --latents     # and a cache of VAE latents
    python prepare.py text_encoder PATH --out=data/my_te     # a tokenizer and a tiny LM for PATH's captions
    python prepare.py demo                                   # data/demo, data/demo_unseen.txt, data/demo_te
    python prepare.py judge --ckpt=out/demo                  # how many unseen captions the images show
    python prepare.py judge --ckpt=out/mine --data=data/mine # how near they are to held-out images

What is read, and how:
  captions beside images   a/7.jpg with a/7.txt, .caption or .json, or a/7.jpg.txt, a/7.jpg.json (gallery-dl,
                           Hydrus; files with a tag on each line: --caption_lines=tags)
  a .json for each image   its text, caption, prompt, tags or tag_string; a text; a list of tags; groups of
                           tags, {"tags": {"general": ["solo"]}}
  kohya's repeats          10_cat/7.png: ten times an epoch (1_ to 999_, at the top of PATH)
  kohya's metadata         meta_cap.json, {"7": {"caption": "a cat", "tags": "cat, mat"}}: tags are shuffled
  imagefolder              metadata.jsonl or .csv, {"file_name": "7.jpg", "text": "a cat"}; of a list of texts
                           one is drawn
  WebDataset               00000.tar with 007.jpg, 007.txt, as img2dataset writes it, is read in place
  parquet                  train-00000.parquet with image and text, by pyarrow; an image reads its row group
  tables, where named      csv, tsv, jsonl, json (also COCO's), parquet; images lie anywhere below its folder

A table's row is for the image that it names as file_name, file, path, filename, image, img_path, image_path
or filepath, with or without its suffix and, in a table that is named, its folder; without these columns, as
id (1 and 1.0 are 1.jpg). --name_column=X takes column X. A row that names a file only in another column is
left out, and the report names the flag that reads it. Several rows of one image are alternatives. In a tsv "
is a letter; in a csv a quote that is closed late costs its row alone. Columns of tags are split at commas,
else at spaces.
PATH=0.5 is a weight: half of these images, chosen again each time, stand in each epoch; PATH=2.5 is each
twice and half of them once more.

In order: the settings; sources, which are folders, tars and tables of captioned images; the index; the order
of training; the cache of latents; training examples; commands. Then extras: a dry run, a text encoder for
captions, the demo.
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
import posixpath
import random
import re
import shutil
import tarfile
import textwrap
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

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
    out: str = ""           # folder of images and captions; OUT_unseen.txt and OUT_te are written beside it;
                            # "": data/demo, data/star, data/hatched
    count: hdm.Count | None = None  # images; None: 12,000, about 10 s on one core and 95 MB in blocks of 4 KB
    seed: hdm.Whole = 0     # image i depends on (seed, i) alone; also of the text encoder's weights
    side: hdm.Count = 32    # pixels of an image's short side
    centered: bool = False   # for the camera: each shape in the middle, sized by the canvas's longer side
    shape: str = ""         # for adapters: star, which the demo lacks, in all images; 200 of them
    filling: str = ""       # likewise: hatched, the six shapes


@dataclass
class TextEncoderSettings:
    out: str = "data/text_encoder"  # folder for the tokenizer and the model
    vocab: Annotated[int, 257, math.inf] = 4096  # most tokens; the least: 256 bytes and the pad
    tag_separator: str = "$$"       # between the tags of a caption, as for train.py
    spaces: bool = False            # underscores in tags become spaces, as for train.py


@dataclass
class DataSettings:
    out: str = "data/index"         # folder for the index; latents go beside it
    caption: str = ""               # by columns of tables and .json: '{characters} $$ {artist} ||| {tags}'
    name_column: str = ""           # of tables, with the images' names; default: as above
    caption_lines: str = "join"     # a caption file's lines: join them; choose one each time; each is one of
                                    # the tags
    sidecar: str = ""               # such as .nl.txt: more text from STEM.nl.txt, kept in place ...
    sidecar_place: str = "after"    # ... before or after the caption
    min_size: hdm.Whole = 0               # pixels of the short side
    max_ratio: Annotated[float, 1, math.inf] = 10.0       # long side to short side
    require_tag: list[str] = field(default_factory=list)  # leave out images without it, or, as cat|dog,
                                                          # without any of these; may be given often
    drop_tag: list[str] = field(default_factory=list)     # leave out images with it, or, as cat|dog, any
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
class PrepareSettings(DataSettings, hdm.ExampleSettings):
    pass                            # a dry run shows examples as train.py makes them


@dataclass
class JudgeSettings:
    ckpt: str = "out/demo"          # train.py's OUT_DIR or one checkpoint
    seeds: hdm.Count = 8            # images of each caption, from seeds 0, 1, ...
    data: str = ""                  # its training's: judge by the images held out there; "": the demo
    group: str = ""                 # ... regex: a caption's part that has it, such as "3d style", is a group
    grid: str = ""                  # ... a PNG of the first 48 captions' samples beside the true images
    camera: bool = False            # measure instead how far shifts and zooms move the shape
    shape: str = ""                 # star: of the unseen captions of prepare.py demo --shape=star
    filling: str = ""               # hatched: likewise of --filling=hatched
    device: str = "auto"            # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"             # float32, bfloat16, float16; auto: 16 bit on CUDA, else float32


# ---- sources: captioned images as they lie on people's disks -----------------------------------------------
# A source is a folder, a tar or a table. In order: an image's Record; reading images; captions and names in
# rows; kinds of tables; which row is for which image; text files; folders and tars; scan, which joins them.
# A span (file, offset, length) says where an image or a text lies, as open_at reads it.
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".avif")
OTHERS = tuple(".arw .cr2 .dng .exr .heic .heif .ico .jp2 .jxl .nef .psd .svg .tga .tif .tiff".split())
TEXTS = (".txt", ".caption", ".json")            # beside an image: the first that is there has its caption
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# Ends of names: gz and bz2 without a dot are those of .tgz and .tbz2, too.
ARCHIVES = tuple(".7z .arrow bz2 .cbz gz .h5 .lmdb .lz4 .parquet .rar .tar .tfrecord xz .zip zst".split())
KINDS = {OTHERS: "format not read", ARCHIVES: "archive not read", TABLES: "table or json that is no source",
         TEXTS: "caption without an image"}      # in the report, of files that were not read
SYSTEM = ("$recycle.bin,$windows.~bt,#recycle,#snapshot,~snapshot,@eadir,@recently-snapshot,@recycle,@tmp,"
          "__macosx,desktop.ini,ehthumbs.db,ehthumbs_vista.db,found.000,lost.dir,lost+found,network "
          "trash folder,recycled,recycler,system volume information,temporary items,thumbs.db").split(",")
FILE_COLUMNS = ("file_name", "file", "path", "filename", "image", "img_path", "image_path", "filepath")
TEXT_COLUMNS = ("text", "caption", "prompt", "tags", "tag_string", "tag_groups")
COLUMN = r"\{([^{}]+)\}"                         # in --caption
CAPTION_RULES = 2              # raised when the same files get other captions: an update reads them again


class Record(NamedTuple):
    """What the index says of one image."""
    name: str         # its path below the source, by which it is known
    file: str         # the image; or the tar or parquet file that holds it
    texts: tuple      # other files that its caption comes from
    caption: str      # as hdm.draw_caption takes it
    offset: int       # where it lies in the file, as open_at takes it; 0: it is the file
    length: int       # bytes
    width: int        # pixels, upright
    height: int       # likewise
    weight: float     # how often it stands in an epoch
    stamp: int        # stamp_of its names, its file and its texts: the same means not edited
    image: int        # stamp_of(file) alone
    lines: int        # in its caption file that are not empty
    source: int       # the source's number in the call
    place: float      # in [0, 1), a hash of the name: no added data move an image across the split
    colors: int = 0  # 1: its profile makes other colors of its values; 2: its profile is broken


class Report(dict):
    """{kind: {"count": n, "paths": the first thousand}} of what was left out."""

    def add(self, kind, path):
        entry = self.setdefault(str(kind), {"count": 0, "paths": []})
        entry["count"] += 1
        if len(entry["paths"]) < 1000:
            entry["paths"].append(printable(path))

    @contextlib.contextmanager
    def leaving_out(self, path):
        """An error of a user's file ends the block, is counted by its kind and stops nothing else."""
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
    infos = [os.stat(file) for file in files]
    stats = [*key] + [(info.st_size, info.st_mtime_ns) for info in infos]
    return int.from_bytes(hashlib.blake2b(repr(stats).encode(), digest_size=8).digest(), "little")


# ---- reading an image --------------------------------------------------------------------------------------
def open_at(file, offset, length):
    """Opens a span: a plain file, where offset is 0; a member of a tar, which is read at once; or an image of
    a parquet file, where offset is 1 + its row in a row group + 2^32 x the group."""
    if offset and file.lower().endswith(".parquet"):
        group, row = divmod(offset - 1, 2 ** 32)
        return io.BytesIO(image_bytes(read_row_group(file, stamp_of(file), group)[row]))
    stream = open(file, "rb")
    if not offset:
        return stream
    with stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(length))


def starts_as_image(data):
    """Whether a file of any name begins as an image does: TIFF (of either byte order), JPEG, PNG, GIF, WebP,
    BMP, AVIF or HEIF. data: at least 16 bytes of it."""
    heads = rb"II\*\0|MM\0\*|\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM....\0\0\0\0|....ftyp(avi|hei|mif)"
    return re.match(heads, data, re.DOTALL) is not None


@contextlib.contextmanager
def failing_as(kind):
    """What the block raises becomes a UserError of this text: of a broken image Pillow can raise anything."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise hdm.UserError("too large") from error
    except Exception as error:
        raise hdm.UserError(kind) from error


def measure_image(stream, length, verify=False):
    """-> upright width and height of an image file of this length, from its header; and Record's colors.

    verify: decode it, too. UserError: zero bytes, no readable header, too large, truncated (JPEG, PNG and GIF
    have an end, a cut WebP has no readable header, BMP and AVIF do not tell), does not decode.
    """
    if length == 0:
        raise hdm.UserError("zero bytes")
    with failing_as("no readable header"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # Pillow's, about what is judged here
        image = Image.open(stream, formats=["JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF"])  # by content
        header = stream.tell()
        transform = hdm.color_transform(image)
        width, height = image.size
        with contextlib.suppress(Exception):                 # a broken EXIF turns nothing
            # A PNG's own getexif would decode it, to look for EXIF behind the pixels.
            if Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8):
                width, height = height, width
    with failing_as("truncated"):
        check_end(image, stream, header, length)
    if verify:
        with failing_as("does not decode"):
            stream.seek(0)
            width, height = hdm.load_image(stream).size
    if transform is False:
        return width, height, 2
    return width, height, int(transform is not None)


def check_end(image, stream, header, length):
    """Raises where an open image's file is cut. header: the bytes read so far, the thumbnail's among them:
    an end in these is the thumbnail's."""
    end = {"JPEG": rb"\xff\xd9", "MPO": rb"\xff\xd9", "PNG": rb"IEND\xaeB`\x82", "GIF": rb"\0;"}
    if image.format not in end:
        return                                               # nothing to look for
    # A GIF's end is two bytes that any pixels may hold: it counts where only padding is behind it.
    last = rb"[\0\r\n ]*\Z" if image.format == "GIF" else b""
    stream.seek(max(header, length - 2 ** 16))
    if re.search(end[image.format] + last, stream.read()):
        return
    # Cut, or much lies behind the end, such as a phone's film: then it is somewhere, and all frames decode.
    stream.seek(header)
    if not re.search(end[image.format], stream.read()):
        raise ValueError("no end")
    frames = image.n_frames if image.format == "GIF" else 1
    for i in range(frames):
        image.seek(i)
        image.load()


# ---- captions and names in a row ---------------------------------------------------------------------------
def is_of_tags(column):
    """Whether a column holds tags, by its name: tags, tag_string, general_tags."""
    return re.search(r"(^|_)tags?(_|$)", column.lower()) is not None


def texts_in(name, value):
    """-> the texts in the column `name`: one, those of a list, or the tags of groups {group: tags}. A string
    of tags is split at commas, else at spaces."""
    found = []
    if isinstance(value, dict):
        for group in value.values():
            if isinstance(group, (str, list, dict)):         # numbers are taggers' scores
                found += texts_in(name, group)
        return found
    if is_of_tags(name) and isinstance(value, str) and "$$" not in value:
        value = value.split("," if "," in value else None)
    if not isinstance(value, list):
        value = [value]
    for part in value:
        if isinstance(part, (str, int, float)) and str(part) != "nan":
            found.append(" ".join(str(part).split()))
    return [text for text in found if text]


def as_row(thing):
    """A table's row or an image's .json, which may also be a text or a list of tags -> {column: value}."""
    if isinstance(thing, str):
        return {"caption": thing}
    if isinstance(thing, list) and all(isinstance(tag, str) for tag in thing):
        return {"tags": thing}
    if not isinstance(thing, dict):
        raise hdm.UserError("json without a caption: no text, list of texts or object")
    groups = {}                                  # Danbooru's tag_string_general, gallery-dl's tags_general
    for name, value in thing.items():
        if re.match("(tag_string|tags)_", name) and isinstance(value, (str, list)):
            groups[name] = value
    return {**thing, "tag_groups": groups} if groups else thing


def row_caption(row, template):
    """The caption of a row, as as_row takes it: the template filled in, with " $$ " between the texts of a
    list. Without one, as kohya's caption ||| tags, or else the first of TEXT_COLUMNS that holds texts. Of a
    column alone a list is of tags, if it is named so, or of alternatives."""
    row = as_row(row)
    wanted = re.findall(COLUMN, template) or TEXT_COLUMNS
    if not row.keys() & set(wanted):
        raise hdm.UserError(f"json or row without a caption: keys {', '.join(list(row)[:3]) or '(none)'}")
    if not template and "caption" in row and row.get("tags"):
        template = "{caption} ||| {tags}"
    if template and not re.fullmatch(COLUMN, template):
        # In one pass: braces in a caption name no column.
        return re.sub(COLUMN, lambda match: " $$ ".join(texts_in(match[1], row.get(match[1]))), template)
    for name in wanted:
        texts = texts_in(name, row.get(name))
        if texts:
            return (" $$ " if is_of_tags(name) else hdm.OR).join(texts)
    for name in wanted:
        if row.get(name) and not isinstance(row[name], (str, int, float)):
            raise hdm.UserError(f"json or row without a caption: no texts in {name}")
    return ""


def row_name(row, column):
    """What a row calls its image: in the column, else in the first of FILE_COLUMNS that it fills; its id only
    where no other column names a file. UserError where it does not say."""
    names = [column] if column else [name for name in FILE_COLUMNS if name in row]
    if not names:
        names = ["id"]
        for name, value in row.items():
            text = str(value).rstrip("'\"]}").lower()        # the last of a list, too
            if name not in TEXT_COLUMNS and text.endswith(IMAGES) and "://" not in text:
                other = ", or =id" if "id" in row else ""
                raise hdm.UserError(f"row that names a file in another column: --name_column={name}{other}")
    for name in names:
        value = row.get(name)
        if isinstance(value, dict):              # Hugging Face's, beside "bytes"
            value = value.get("path")
        if isinstance(value, float) and value.is_integer() and abs(value) < 2 ** 53:  # above it is rounded
            value = int(value)
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value).strip().replace("\\", "/")
    raise hdm.UserError(f"row without a file_name, path or id: columns {', '.join(map(str, list(row)[:5]))}")


# ---- kinds of tables ---------------------------------------------------------------------------------------
# Each *_rows yields (where, row, offset): "line 5" or "row 5", for the report; {column: value}, or anything
# else for a broken row; and where a parquet file holds the row's image (open_at), else 0.
def kind_of_name(text):
    """"file" for an image's file name; else whether the text is one word, and whether it has digits."""
    text = text.strip(' "')
    if text.lower().endswith(IMAGES):
        return "file"
    return len(text.split()) == 1, re.search(r"\d", text) is not None


def holds_other_rows(lines, cells, at, width):
    """Whether a csv record of several lines took in other rows, behind a quote that is closed late.

    It did if it has not a cell for each of width columns, if its name, cells[at], has several lines, or if
    another of its lines looks like a row: as many cells, and such a name. (A caption may have lines that look
    so: none can say what is meant.)
    """
    if len(cells) != width or "\n" in cells[at]:
        return True
    own = sum(cell.count("\n") for cell in cells[:at])       # the line with its name
    spots = [at, at - width]             # a caption may have commas: the name is counted from both ends
    if at == 0:
        spots = [0]
    elif at == width - 1:
        spots = [-1]
    kinds = ("file", kind_of_name(cells[at]))
    for line in lines[:own] + lines[own + 1:]:
        row = line.strip().split(",")
        if len(row) >= width and any(kind_of_name(row[spot]) in kinds for spot in spots):
            return True
    return False


def csv_rows(lines, column, **how):
    """Rows of a csv file. Where a quote is not closed, or a record of several lines holds others, its first
    line is a broken row, and the second begins the next one: a broken row costs no other its caption."""
    header = None
    start = 0                                    # of a record in lines
    while start < len(lines):
        reader = csv.reader((lines[i] for i in range(start, len(lines))), strict=True, **how)
        cells = None                             # stays so where a quote is wrong
        with contextlib.suppress(csv.Error):
            cells = next(reader)
        taken = lines[start:start + reader.line_num]
        if cells is not None and not "".join(cells).strip():
            pass                                 # lines without text
        elif header is None:
            if cells is None:
                raise hdm.UserError("broken first line")
            header = [cell.strip() for cell in cells]
            names = [column] if column else [*FILE_COLUMNS, "id"]
            known = [name for name in names if name in header]
            name_at = header.index(known[0]) if known else 0
        else:
            if len(taken) > 1 and (cells is None or holds_other_rows(taken, cells, name_at, len(header))):
                cells, taken = None, taken[:1]
            complete = cells is not None and len(cells) <= len(header)
            yield f"line {start + 1}", dict(zip(header, cells)) if complete else None, 0
        start += len(taken)


def json_rows(text):
    """Rows of a .json file: a list of them, COCO's, or an object by image."""
    table = json.loads(text)
    if isinstance(table, dict) and isinstance(table.get("images"), list):
        table = coco_rows(table)
    elif isinstance(table, dict):                # kohya's {image: {"caption": , "tags": }}, {image: caption}
        rows = []
        for name, row in table.items():
            if not isinstance(row, dict):
                row = {"caption": row}
            rows.append({"file_name": name, **row})
        table = rows
    elif not isinstance(table, list):
        table = [table]
    for number, row in enumerate(table, 1):
        yield f"row {number}", row, 0


def coco_rows(table):
    """The rows of COCO's captions, each under the file name of its image."""
    names = {}
    for image in objects_in(table["images"]):
        key, name = str(image.get("id")), image.get("file_name")
        if "id" in image and names.get(key, name) != name:
            raise hdm.UserError(f"COCO's, where {names[key]} and {name} have one id, {key}")
        names[key] = name
    notes = objects_in(table.get("annotations"))
    captions = [note for note in notes if "caption" in note]
    if not captions:
        what = f"annotations with {', '.join(sorted(notes[0])[:5])}" if notes else "a list of images"
        raise hdm.UserError(f"COCO's, without captions: {what}")
    return [{**note, "file_name": names.get(str(note.get("image_id")))} for note in captions]


def objects_in(value):
    """The objects in a json list; none in anything else."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def jsonl_rows(lines):
    for number, line in enumerate(lines, 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if line.strip():
            yield f"line {number}", row, 0


def parquet_rows(path):
    """Rows of a parquet file, without the images that it may hold."""
    file, image_column = open_parquet(path)
    paths = [file.schema.column(i).path for i in range(len(file.schema))]      # image.path of a struct image
    columns = [path for path in paths if path != image_column and not path.endswith(".bytes")]
    number = 0                                   # of the row in the file
    for group in range(file.num_row_groups):
        offset = group * 2 ** 32                 # as open_at has it: the group's first row is 1 more
        for batch in file.iter_batches(row_groups=[group], columns=columns, use_threads=False):
            for row in batch.to_pylist() or [{}] * batch.num_rows:
                offset += 1
                yield f"row {number:06d}", row, offset if image_column else 0
                number += 1


def open_parquet(path):
    """-> a pyarrow ParquetFile, and its column of image files or None: it may have their names."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise hdm.UserError("parquet is read by pyarrow, which is not here: pip install pyarrow") from error
    file = ParquetFile(path, buffer_size=2 ** 20)
    blobs = []
    for i in range(len(file.schema)):
        leaf = file.schema.column(i)
        of_bytes = leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"
        if of_bytes and not leaf.max_repetition_level:       # no list
            blobs.append(leaf.path)
    blobs.sort(key=lambda path: path.split(".")[0] != "image")     # False first: the column image
    images = []
    for column in blobs:
        if holds_images(file, column):
            if column.split(".")[0] == "image":  # no look at the others: a file is opened for each row group
                return file, column
            images.append(column)
    if len(images) > 1:                          # such as an image before and after an edit
        raise hdm.UserError(f"parquet with several columns of images, {', '.join(images)}: name one image")
    return file, images[0] if images else None


def holds_images(file, column):
    """Whether one of a column's first 16 values is an image: bytes may be a hash or an embedding, too."""
    checked = 0
    for batch in file.iter_batches(16, columns=[column], use_threads=False):
        for cell in batch[0]:
            data = image_bytes(cell)
            if starts_as_image(data):
                return True
            checked += len(data) > 0
            if checked == 16:
                return False
    return False


def image_bytes(cell):
    value = cell.as_py()
    while isinstance(value, dict):               # structs that hold the bytes and nothing else
        (value,) = value.values()
    return value or b""


@functools.lru_cache(maxsize=1)
def read_row_group(path, stamp, group):
    """The images of a row group, the least that parquet can read; the last one stays in memory. stamp: of the
    file, so that an edited one is read again."""
    file, image_column = open_parquet(path)
    return file.read_row_group(group, columns=[image_column], use_threads=False).column(0)


def table_rows(path, span, column):
    """The rows of a table of any kind."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        yield from parquet_rows(path)
        return
    with open_at(*span) as file:
        lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        if suffix == ".json":
            yield from json_rows("".join(lines))
        elif suffix == ".jsonl":
            yield from jsonl_rows(lines)
        elif suffix == ".tsv":                   # a quote is a letter there
            yield from csv_rows(list(lines), column, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from csv_rows(list(lines), column)


def read_table(path, span, s, rows, report):
    """Adds the captions of a table to rows -> {path/row: span} of images that it holds itself."""
    columns = set()                              # of all rows
    captions = []                                # (name, caption)
    images = {}
    for where, row, offset in table_rows(path, span, s.name_column):
        with report.leaving_out(f"{path}, {where}"):
            if not isinstance(row, dict):
                raise hdm.UserError("broken table row")
            columns.update(row)
            if offset:
                name = os.path.join(path, where.removeprefix("row "))
            else:
                name = os.path.join(os.path.dirname(path), row_name(row, s.name_column))
            name = os.path.normpath(name)
            captions.append((name, row_caption(row, s.caption)))
            if offset:
                images[name] = path, offset, 0
    missing = {*re.findall(COLUMN, s.caption), s.name_column} - {"", *columns}
    if missing:
        raise hdm.UserError(f"table without a column {' '.join(sorted(missing))}")
    for name, caption in captions:
        rows.add(name, caption, span[0])
    return images


# ---- which row is for which image --------------------------------------------------------------------------
def comparable(path):
    """How names are compared that are not the same letter by letter: é as one letter (a Mac has two), 0012
    and 12.0 as 12."""
    folder, name = os.path.split(unicodedata.normalize("NFC", path))
    number = re.fullmatch(r"0*([0-9]+)(\.0*)?", name)
    return os.path.join(folder, number[1] if number else name)


@dataclass(slots=True)
class Row:
    """What tables say of one name, and the image that it is for.

    The line `cat.png,a cat` of /data/t.csv makes Row("a cat", ("/data/t.csv",)) of the name /data/cat.png; a
    line `cat.png,a tabby` after it makes the caption two alternatives, "a cat" and "a tabby".
    """
    caption: str = ""       # alternatives, if several rows have its name
    tables: tuple = ()      # the files that they are from
    nearness: int = 9       # of the image that it is for, as in Rows.candidates
    image: str | None = ""  # that image without its suffix; None: others are as near
    used: bool = False


class Rows(dict):
    """{path of an image, with or without suffix, as tables have it: Row}.

    A name may fit several images, and an image several names. So all images are shown to `claim` first: each
    row keeps the nearest and is for none where two are as near. Then `take` gives an image the rows that kept
    it. Names are matched in this order, here for the image /data/s/cat.png and the table /data/t.csv:
      0  its path, with suffix or without:           s/cat.png, s/cat
      1  its name alone, where t.csv is the source:  cat.png, cat
      2  as 0, but as `comparable` has it, if this is so of one row only: s/0012 would be for s/12.png
      3  as 1, likewise
    So the row `cat.png` is for s/cat.png. Where there is a t/cat.png, too, it is for none; where there is a
    /data/cat.png, it is for that one, which is nearer. The rows `s/cat.png` and `s/cat` are both for
    s/cat.png, as alternatives.
    """
    base = None                                  # folder of the table, where that is the source

    def __init__(self):
        self.alike = {}                          # {comparable form: the other names that have it}

    def add(self, name, caption, table):
        row = self.setdefault(name, Row())
        if not row.caption:
            row.caption = caption
        elif caption not in row.caption.split(hdm.OR):
            row.caption += hdm.OR + caption
        if table not in row.tables:
            row.tables = (*row.tables, table)
        form = comparable(name)
        if form != name:
            self.alike.setdefault(form, set()).add(name)

    def candidates(self, image):
        """Yields (nearness, row) of the rows that an image may have."""
        if not self:                             # as mostly, then it costs nothing
            return
        stem = os.path.splitext(image)[0]
        names = {image: 0}
        if not stem.lower().endswith(IMAGES):    # 7.jpg is no name of 7.jpg.png
            names[stem] = 0
        if self.base:
            names = {os.path.join(self.base, os.path.basename(name)): 1 for name in names} | names
        for name, nearness in names.items():
            if name in self:
                yield nearness, self[name]
            form = comparable(name)
            alike = {form} & self.keys() | self.alike.get(form, set())
            if len(alike) == 1:
                yield nearness + 2, self[alike.pop()]

    def claim(self, images):
        """Shows images to the rows, before any of them takes its own."""
        for image in images:
            stem = os.path.splitext(image)[0]
            for nearness, row in self.candidates(image):
                if nearness < row.nearness:
                    row.nearness, row.image = nearness, stem
                elif nearness == row.nearness and stem != row.image:
                    row.image = None

    def take(self, image):
        """-> the captions of an image's nearest rows, as alternatives, or "", and their tables' files."""
        stem = os.path.splitext(image)[0]
        own = [row for near, row in self.candidates(image) if (near, stem) == (row.nearness, row.image)]
        nearest = min((row.nearness for row in own), default=0)
        rows = [row for row in own if row.nearness == nearest]
        tables = set()
        for row in rows:
            row.used = True
            tables.update(row.tables)
        return hdm.OR.join(row.caption for row in rows), tables


# ---- text files --------------------------------------------------------------------------------------------
CAPTION_LINES = {"join": " ", "choose": hdm.OR, "tags": " $$ "}        # what stands between a file's lines


def read_texts(caption, spans, s):
    """Caption of an image's rows, or "", and {suffix: span} of its text files -> its caption, its lines."""
    sidecar = ""
    lines = []
    for suffix, span in spans.items():
        text = read_caption_file(span)
        if suffix == s.sidecar:
            sidecar = " ".join(text.split())
        elif suffix == ".json":
            caption = row_caption(json.loads(text), s.caption)
        else:
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            caption = CAPTION_LINES[s.caption_lines].join(lines)
    alternatives = [text.strip() for text in caption.split(hdm.OR) if hdm.parse_caption(text)]
    caption = hdm.OR.join(alternatives)          # less those of separators alone
    if sidecar:
        parts = [sidecar, caption, ""] if s.sidecar_place == "before" else ["", caption, sidecar]
        caption = hdm.BESIDE.join(parts)
    if not caption:
        raise hdm.UserError("empty caption")
    if "\0" in caption or printable(caption) != caption:     # such as UTF-16, cp1252
        raise hdm.UserError("caption is not UTF-8")
    return caption, len(lines)


def read_caption_file(span):
    if span[2] > 2 ** 20:                        # a guess
        raise hdm.UserError("caption over 1 MB")
    with open_at(*span) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    return re.sub(f"[{hdm.OR}{hdm.BESIDE}]", " ", text)  # ours, which people's files hold by chance alone


# ---- folders and tars --------------------------------------------------------------------------------------
class FileSet:
    """The files of a folder or a tar, out of (path, span or None: no plain file)."""

    def __init__(self, files, report):
        self.files = {}                          # {path, its suffix in lower case: (path, span)}
        for path, span in files:
            stem, suffix = os.path.splitext(path)
            key = stem + suffix.lower()
            if span is None:
                report.add("not a plain file", path)
                continue
            if key in self.files:                # a.TXT beside a.txt, or a tar's members of one name ...
                report.add("duplicate name", path)
            if key not in self.files or self.files[key][0] == path:          # ... of which the last counts
                self.files[key] = path, span
        self.read = set()                        # keys of captions and tables
        self.images = {path: span for key, (path, span) in self.files.items() if key.endswith(IMAGES)}
        self.stems = {os.path.splitext(path)[0] for path in self.images}
        self.composed = {unicodedata.normalize("NFC", key): key for key in self.files if not key.isascii()}

    def beside(self, image, end):
        """-> the key of an image's file with this end, such as 7.txt, else 7.jpg.txt, of 7.jpg; or None."""
        bases = [os.path.splitext(image)[0]]
        if image not in self.stems:              # else 7.jpg.txt is that of a 7.jpg.png
            bases.append(image)
        for base in bases:
            if base + end in self.files:
                return base + end
            if not self.composed:                # all names are ASCII, as most are: nothing to normalize
                continue
            key = self.composed.get(unicodedata.normalize("NFC", base + end))
            if key and key[:-len(end)] not in self.stems and key[:-len(end)] not in self.images:
                return key                       # and no other image's
        return None

    def has_beside(self, key, suffix):
        """Whether a file with this suffix is beside an image, as 7.json or 7.jpg.json is beside 7.jpg."""
        base = key.removesuffix(suffix)
        return base != key and (base in self.stems or base in self.images)

    def rest(self):
        """Yields (kind, path) of what has not been read."""
        for key, (path, span) in self.files.items():
            walked = os.path.splitext(key)[1] == ".tar" and not span[1]      # it is a group of its own
            if path not in self.images and key not in self.read and not walked:
                yield self.kind(key, span), path

    def kind(self, key, span):
        """What is passed over, in words."""
        suffix = os.path.splitext(key)[1]
        if suffix in TEXTS and self.has_beside(key, suffix):
            return "extra caption file"
        for ends, kind in KINDS.items():
            if key.endswith(ends):
                return kind
        try:
            with open_at(span[0], span[1], min(span[2], 16)) as stream:
                if starts_as_image(stream.read(16)):
                    return "image without a known suffix"
        except OSError:
            return "unreadable"
        return "not an image"


def is_hidden(name):
    """Whether a file or folder is not people's but a system's: .DS_Store, ._7.jpg, .Trash-1000, __MACOSX."""
    return name.startswith(".") or name.lower() in SYSTEM


def visible(folder, names, report):
    """The names that are not hidden, sorted; the others are reported."""
    kept = []
    for name in sorted(names):
        if not is_hidden(name):
            kept.append(name)
        elif name != ".prepare":                 # our own mark
            report.add("hidden or system file", os.path.join(folder, name))
    return kept


def folders_below(top, report):
    """Yields (folder, names of its files) of top and all below it, each once: links may run in circles."""
    seen = set()
    for folder, below, names in os.walk(
            top, followlinks=True, onerror=lambda error: report.add("unreadable", error.filename)):
        real = os.path.realpath(folder)
        # Scratch: that of complete_folder, in use or of a killed run.
        is_scratch = re.search(r"[^/\\]\.tmp[a-z0-9_]{8}$", folder) and "lock" in names
        if real in seen or folder != top and is_scratch:
            below.clear()                        # os.walk goes where this list says
            continue
        seen.add(real)
        names = visible(folder, names, report)
        below[:] = visible(folder, below, report)
        below.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))   # own names before links'
        yield folder, names


def tar_files(path, report):
    """Yields (path, span or None: no plain file) for a tar's members, as far as its headers can be read."""
    # Broken headers raise errors of many kinds.
    with contextlib.suppress(Exception), tarfile.open(path, "r:", encoding="utf-8") as tar:
        size = os.path.getsize(path)
        for member in tar:
            if member.offset_data + member.size > size:
                break
            name = posixpath.normpath("/" + member.name)     # no ../ leads out of the tar
            if any(map(is_hidden, name.split("/"))):
                report.add("hidden or system file", path + name)
            elif member.isreg() and not member.issparse():
                yield path + name, (path, member.offset_data, member.size)
            elif not member.isdir():
                yield path + name, None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) == bytes(512):  # tarfile is silent about some ends that are none
            return
    report.add("tar cut short", path)


def walk(top, report):
    """Yields a FileSet for each folder below top, and for each tar. Top may be a file, of any name."""
    folders = folders_below(top, report)
    if os.path.isfile(top):
        folders = [(os.path.dirname(top), [os.path.basename(top)])]
    for folder, names in folders:
        files, tars = [], []
        for name in names:
            path = os.path.join(folder, name)
            span = None
            if os.path.isfile(path):
                span = path, 0, os.path.getsize(path)
                if name.lower().endswith(".tar"):
                    tars.append(path)
            files.append((path, span))
        yield FileSet(files, report)
        for path in tars:
            yield FileSet(tar_files(path, report), report)


# ---- scan --------------------------------------------------------------------------------------------------
@dataclass
class Source:
    """A source, opened: what is walked, what its images' names are relative to, and what tables say."""
    top: str                # folder, tar or file that is walked
    root: str               # folder
    rows: Rows
    table: str | None = None  # the table that was named, whose rows alone have captions then


def open_source(source, s, report):
    """Reads the table that is the source, if it is one: which images it names is known before the walk."""
    top = os.path.abspath(source)
    if os.path.isdir(top):
        return Source(top, top, Rows())
    if not top.lower().endswith((".tar", *TABLES)):
        raise hdm.UserError(f"{source}: no folder, and no {' '.join(TABLES)} or .tar file")
    root = os.path.dirname(top)
    rows = Rows()
    with hdm.naming(source, "not a table of images"):
        if top.lower().endswith(".tar") or top.lower().endswith(".parquet") and open_parquet(top)[1]:
            return Source(top, root, rows)                   # it holds its images itself
        read_table(top, (top, 0, 0), s, rows, report)
    rows.base = root
    if os.path.basename(root) == "annotations":              # as COCO's
        root = os.path.dirname(root)
    for group in walk(root, Report()):
        rows.claim(group.images)
    return Source(root, root, rows, top)


def read_tables(group, s, rows, report):
    """The tables that go with the images of a folder or a tar, and the images that they hold themselves."""
    for key, (path, span) in group.files.items():
        named = re.fullmatch(r"metadata\.(jsonl|csv)|meta.*\.json", os.path.basename(key))
        if named and group.has_beside(key, ".json"):
            named = None                         # the caption of an image called meta...
        if named or key.endswith(".parquet") and not span[1]:
            group.read.add(key)
            with report.leaving_out(path):
                group.images |= read_table(path, span, s, rows, report)


def find_captions(image, group, rows, s):
    """-> the caption in an image's rows, or "", the files of these tables, and {end: span} of its text files:
    the first of TEXTS that is there, the last one for --caption; none if it has rows; and a sidecar."""
    caption, tables = rows.take(image)
    ends = TEXTS[::-1] if s.caption else TEXTS
    if tables:
        ends = ()
    keys = {}
    for end in ends:
        key = group.beside(image, end)
        if key and not (s.sidecar and key.endswith(s.sidecar)):
            keys[end] = key
            break
    if s.sidecar:
        key = group.beside(image, s.sidecar)
        if key:
            keys[s.sidecar] = key
    group.read.update(keys.values())
    return caption, tables, {end: group.files[key][1] for end, key in keys.items()}


def new_record(name, span, texts, stamp, caption, spans, s):
    """Opens an image and the text files in spans -> its Record. caption: of its rows, or ""."""
    file, offset, length = span
    caption, lines = read_texts(caption, spans, s)
    with open_at(file, offset, length) as stream:
        if length == 0:
            length = stream.seek(0, 2)           # of a parquet's image it is known only now
        stream.seek(0)
        width, height, colors = measure_image(stream, length, s.verify)
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64
    return Record(name, file, texts, caption, offset, length, width, height, weight=1.0, stamp=stamp,
                  image=stamp_of(file), lines=lines, source=0, place=place, colors=colors)


def scan_image(path, group, source, s, known):
    """-> the Record of an image of a group, with its weight by kohya's folders; how its caption was found, in
    words. UserError where it is left out."""
    span = group.images[path]
    file = span[0]
    caption, tables, spans = find_captions(path, group, source.rows, s)
    name = os.path.relpath(path, source.root).replace(os.sep, "/")
    if printable(path) != path:
        raise hdm.UserError("name is not UTF-8")
    if source.table and not tables:
        raise hdm.UserError("not in the table")
    if not tables and not spans:
        raise hdm.UserError("no caption")
    others = tables | {text for text, _, _ in spans.values()}
    texts = tuple(sorted(others - {file}))       # in a tar they are of one file
    stamp = stamp_of(file, *texts, key=(name, file, texts))
    record = known(stamp) if known else None
    if record is None:
        record = new_record(name, span, texts, stamp, caption, spans, s)
    check_filters(record, s)
    how = " and ".join([*sorted(map(os.path.basename, tables)), *spans])
    weight = 1.0
    if file == path:
        kohya = re.match(r"([1-9]\d{0,2})_[^/]*/", name)     # 10_cat/7.png, but not 2020_trip/7.png
        if kohya:
            weight = float(kohya[1])
            how += f" in {kohya[0]}"
    elif not file.lower().endswith(".parquet"):
        how += " in a tar"
    return record._replace(weight=weight), how


def scan(source, report, s, known=None, weight=1.0, number=0):
    """Yields a Record for each captioned image of a folder, a tar or a table; others go into the report.

    known: from a stamp to the Record of an earlier scan, whose files are not opened again, or None. weight,
    number: the source's.
    """
    opened = open_source(source, s, report)
    counts = Counter()                           # {how captions were found: images}
    for group in walk(opened.top, report):
        if opened.table:
            group.read.update(key for key, (path, _) in group.files.items() if path == opened.table)
        else:
            read_tables(group, s, opened.rows, report)
            opened.rows.claim(group.images)
        for path in group.images:
            record = None
            with report.leaving_out(path):
                record, how = scan_image(path, group, opened, s, known)
            if record is not None:
                if record.colors == 2:
                    report.add("kept: broken color profile", path)
                counts[how] += 1
                yield record._replace(weight=weight * record.weight, source=number)
        for kind, path in group.rest():
            report.add(kind, path)
    for name, row in opened.rows.items():
        if not row.used:
            report.add("row without an image", f"{row.tables[0]}: {os.path.relpath(name, opened.root)}")
    found = ", ".join(f"{n:,} with {how}" for how, n in counts.most_common()) or "none"
    print(printable(f"images: {found} in {source}"))


# ---- the index: what training reads; images stay where they are ------------------------------------------
# records.bin: a RECORD for each image, in order of weight and place; text.bin: its texts, from `text` on.
FIELDS = dict.fromkeys((*Record._fields[4:], "text", "bytes"), "<u8") | {"weight": "<f8", "place": "<f8"}
RECORD = np.dtype(list(FIELDS.items()))
RECORD_4 = np.dtype([(name, kind) for name, kind in RECORD.descr if name != "colors"])   # of format 4


class Index:
    """index[i]: a Record, out of records (n,) RECORD and text (bytes,) uint8, which a folder has as maps."""

    def __init__(self, records, text, about, folder=None):
        self.records, self.text, self.about, self.folder = records, text, about, folder

    @classmethod
    def open(cls, folder):
        with hdm.naming(folder, "not a complete index; run prepare.py again"):
            about = json.loads(Path(folder, "index.json").read_text(encoding="utf-8"))
            if about["format"] not in (4, 5):
                raise ValueError("of another format")
            kind = RECORD_4 if about["format"] == 4 else RECORD
            records = np.memmap(Path(folder, "records.bin"), kind, "r").view(np.ndarray)
            text = np.memmap(Path(folder, "text.bin"), np.uint8, "r").view(np.ndarray)
            if about["sizes"] != [len(records), len(text)]:
                raise ValueError("its files are not of one size")
        return cls(records, text, about, folder)

    def __reduce__(self):                        # to a loader process that is spawned goes the path alone
        if self.folder:
            return Index.open, (self.folder,)
        return Index, (self.records, self.text, self.about)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        *numbers, start, length = self.records[i].item()
        entry = self.text[start:start + length].tobytes().decode(errors="surrogateescape")
        name, file, caption, *texts = entry.split("\0")
        return Record(name, file, tuple(texts), caption, *numbers)

    def matching(self, pattern):
        """-> the numbers of the records whose name or caption a regex (re.Pattern) matches somewhere."""
        found = []
        for i in range(len(self)):
            record = self[i]
            if pattern.search(record.name) or pattern.search(record.caption):
                found.append(i)
        return found

    def split(self, validation, matched=()):
        """-> the training part, [(record numbers, weight)], and at most 512 held-out records.

        Held out are the records in `matched` and those whose place is below validation. Records of one weight
        stand in order of place, so these are the first of them.
        """
        parts, held = [], set(matched)
        places = self.records["place"]
        for weight, first, stop in self.about["groups"]:
            middle = bisect.bisect_left(places, validation, first, stop)
            rest = range(middle, stop)
            if len(matched):
                rest = np.setdiff1d(np.arange(middle, stop), matched)
            if len(rest):
                parts.append((rest, weight))
            held.update(range(first, min(middle, first + 512)))
        return parts, sorted(held, key=lambda i: (places[i], i))[:512]

    def changed(self, i):
        """Whether the files of an image are not as they were indexed, or gone."""
        record = self[i]
        with contextlib.suppress(OSError):
            return stamp_of(record.file, *record.texts, key=record[:3]) != record.stamp
        return True

    def read(self, i, side=None):
        """-> an image (3, height, width) uint8, its short side scaled to side."""
        record = self[i]
        file = record.file
        where = file if file.endswith(record.name) else f"{file}: {record.name}"
        with hdm.naming(where, "not a complete image"):
            if record.offset and stamp_of(file) != record.image:     # another image may lie there now
                raise hdm.UserError(f"{where}: the file has changed since it was indexed")
            with open_at(file, record.offset, record.length) as stream:
                image = hdm.load_image(stream, side)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_filters(record, s):
    """UserError with the name of the filter that leaves an image out."""
    short, long = sorted((record.width, record.height))
    if short < s.min_size:
        raise hdm.UserError("below --min_size")
    if long > s.max_ratio * short:
        raise hdm.UserError("beyond --max_ratio")
    tags = plain_tags(re.split(rf",|\|\|\||%%|\$\$|{hdm.OR}|{hdm.BESIDE}", record.caption))
    if not all(plain_tags(any_of(wanted)) & tags for wanted in s.require_tag):
        raise hdm.UserError("without --require_tag")
    if any(plain_tags(any_of(unwanted)) & tags for unwanted in s.drop_tag):
        raise hdm.UserError("with --drop_tag")


def any_of(tags):
    """The tags of cat|dog; also :|, which is a tag itself."""
    return [tags, *tags.split("|")]


def plain_tags(tags):
    """Tags as they are compared: in lower case, with spaces for underscores."""
    return {tag.strip().replace("_", " ").lower() for tag in tags} - {""}


def earlier_records(old, options):
    """-> a function: stamp -> the Record of it in an earlier index by the same options, or None. Without such
    an index None."""
    if old is None or old.about["format"] != 5 or old.about["options"] != options:
        return None
    stamps, numbers = np.unique(old.records["stamp"], return_index=True)

    def known(stamp):
        stamp = np.uint64(stamp)
        i = np.searchsorted(stamps, stamp)
        if i == len(stamps) or stamps[i] != stamp:
            return None
        return old[numbers[i]]

    return known


def scan_sources(sources, s, report, known, text):
    """Scans (path, weight) pairs; texts go into the stream `text` -> records (n,) RECORD, as they come."""
    raw = io.BytesIO()                           # 104 bytes an image
    for number, (source, weight) in enumerate(sources):
        for record in scan(source, report, s, known, weight, number):
            entry = "\0".join([record.name, record.file, record.caption, *record.texts])
            entry = entry.encode(errors="surrogateescape")   # a table's path can be any bytes
            values = *record[4:], text.tell(), len(entry)
            raw.write(np.array(values, RECORD).tobytes())
            text.write(entry)
    return np.frombuffer(raw.getbuffer(), RECORD)


def build_index(sources, s, folder=None, old=None):
    """Scan (path, weight) pairs -> an Index, in memory or in the folder. What stands in old, an earlier one
    by the same settings, and has not changed since is not read again."""
    options = [CAPTION_RULES, s.caption, s.name_column, s.caption_lines, s.sidecar, s.sidecar_place, s.verify]
    report = Report()
    data = None
    text = io.BytesIO() if folder is None else open(Path(folder, "text.bin"), "wb")
    with text:
        records = scan_sources(sources, s, report, earlier_records(old, options), text)
        size = text.tell()
        if folder is None:
            data = np.frombuffer(text.getvalue(), np.uint8)
    for kind, entry in sorted(report.items()):
        what = kind if kind.startswith("kept: ") else f"left out: {kind}"
        print(printable(f"{entry['count']:>11,} {what}, as {entry['paths'][0]!r}"))
    several = (records["lines"] > 1).sum()
    if several:
        print(f"{several:,} captions have several lines: --caption_lines={s.caption_lines} (of "
              f"{', '.join(CAPTION_LINES)})")
    if not len(records):
        raise hdm.UserError(f"{' '.join(source for source, _ in sources)}: no image with a caption (.txt, "
                            f".caption, .json, a table of them) is left to train on")
    records = records[np.lexsort((records["place"], records["weight"]))]
    weights, firsts = np.unique(records["weight"], return_index=True)
    stops = [*firsts[1:].tolist(), len(records)]
    groups = list(zip(weights.tolist(), firsts.tolist(), stops))
    identity = hashlib.sha256(records["place"].tobytes() + json.dumps(groups).encode()).hexdigest()
    about = dict(format=5, identity=identity, options=options, groups=groups, sizes=[len(records), size])
    if folder is None:
        return Index(records, data, about)
    records.tofile(Path(folder, "records.bin"))
    Path(folder, "index.json").write_text(json.dumps(about))
    Path(folder, "report.json").write_text(json.dumps(report, indent=1))
    return Index.open(folder)


def is_index(path):
    return Path(path, "index.json").is_file()


def open_index(data):
    """--data: what prepare.py wrote, or a source as scan takes it, which is indexed now and in memory."""
    if is_index(data):
        return Index.open(str(data))
    if not os.path.exists(data):
        raise hdm.UserError(f"--data={data}: no such folder (python prepare.py demo makes data/demo)")
    return build_index([(str(data), 1.0)], DataSettings())


@contextlib.contextmanager
def complete_folder(out):
    """Yields a folder to write in, which takes the name `out` when the block is through: a half-written one
    never has that name. What stands there is replaced only if it is as we left it, never a stranger's."""
    out = Path(os.path.abspath(out))
    mark = out / ".prepare"                      # how many files we wrote
    ours = mark.is_file() and mark.read_text() == str(count_files(out))
    if out.exists() and not ours and not (out.is_dir() and not os.listdir(out)):
        raise hdm.UserError(f"--out: {out} is not as prepare.py wrote it: move it, or choose another --out")
    hdm.make_folder(out.parent, "--out")
    with hdm.scratch_folder(out.parent, out.name + ".tmp") as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        (new / ".prepare").write_text(str(count_files(new)))
        if out.exists():
            out.rename(scratch / "old")
        new.rename(out)


def count_files(folder):
    """How many files a folder has, less those of the system: a Finder's .DS_Store is no one's work."""
    return sum(not is_hidden(name) for name in os.listdir(folder))


# ---- the order of training ---------------------------------------------------------------------------------
def shuffled(i, n, *key):
    """Item i of a random order of range(n), one for each key.

    The order stands nowhere in memory: any process finds any item of 10^9 at once, after a resume, too.
    range(n) is laid out on a grid of about sqrt(n) rows. Each turn moves a cell along its column by a hash of
    that column, then along its row by a hash of that row. Such a move can be undone, so no two cells meet: a
    Feistel network, of four turns as is usual. The grid may have a few cells more than n: from one of these
    the cell moves on until it is below n, where again no two meet.
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)

    def hash_of(*words):
        return int.from_bytes(hashlib.blake2b(repr((key, words)).encode(), digest_size=8).digest(), "little")

    while True:
        row, column = divmod(i, columns)
        for turn in range(4):
            row = (row + hash_of(turn, column)) % rows
            column = (column + hash_of(turn, row, "row")) % columns
        i = row * columns + column
        if i < n:
            return i


class Stream:
    """The endless stream of training: in each epoch, in an order of its own, a record stands as often as its
    weight says; of weights with fractions some stand once more, chosen again each time.

    Of records a and b of weight 1 and c of weight 1.5, numbers 0 to 2, the stream with seed 0 begins
        a c b | b c a c | c b a | a c c b
    with epochs between the bars. c stands once, then twice, and so on: int(1.5 e) times in e epochs.
    stream[6] is (1, 1, 2): in epoch 1 the second copy, 1, of record 2. Steps run over the bars: with a global
    batch of 4 step 0 takes a c b b, step 1 c a c c. Of two ranks with batches of 2 the first has a c and c a,
    the second b b and c c (if captions are of one length: train.order_of_rank sorts each step's items by it).
    """

    def __init__(self, parts, seed):
        self.parts, self.seed = parts, seed      # [(record numbers, weight)]
        self.images = sum(len(records) for records, _ in parts)
        self.length = sum(len(records) * weight for records, weight in parts)  # on average

    def start(self, epoch):
        """The stream's item at which an epoch starts."""
        return sum(int(len(records) * weight * epoch) for records, weight in self.parts)

    def next_epoch(self, i):
        """The first epoch that starts at item i or later."""
        most = int((i + len(self.parts)) / self.length) + 2  # int() costs each part less than one item
        return bisect.bisect_left(range(most), i, key=self.start)

    def __getitem__(self, i):
        """-> epoch, which copy of the record in it, the record's number."""
        epoch = self.next_epoch(i + 1) - 1
        first_item, end = self.start(epoch), self.start(epoch + 1)
        at = shuffled(i - first_item, end - first_item, self.seed, epoch)
        for records, weight in self.parts:
            number = len(records)
            # The epoch in order: all records of a part once, once more, ..., then its fraction.
            items = int(number * weight * (epoch + 1)) - int(number * weight * epoch)
            if at >= items:
                at -= items
                continue
            copy, at = divmod(at, number)
            if copy == int(weight):              # the fraction's: as many as there are, drawn
                at = shuffled(at, number, self.seed, epoch, int(records[0]))
            return epoch, copy, int(records[at])


# ---- the cache of latents ----------------------------------------------------------------------------------
SHARD = 512                                      # images in a file; a kill loses at most these


def hash_of_vae(vae):
    """Of what its latents depend on: its normalization, and its encoder in bfloat16, whatever it has."""
    digest = hashlib.sha256(repr((vae.mean, vae.std)).encode())
    for weight in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        digest.update(weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest


def latents_folder(data, index, vae, image_size):
    """Its name says whose latents it holds: a hash of the VAE and of the images' names and files, not of
    captions. Each file in it, such as 000007.safetensors, holds {record number: moments (C or 2 C, height,
    width) float16} of SHARD records."""
    digest = hash_of_vae(vae)
    digest.update(index.records["place"].tobytes() + index.records["image"].tobytes())
    if "colors" in index.records.dtype.names:
        converted = index.records["colors"] == 1
        if converted.any():                      # without, the name is as before profiles were read
            digest.update(converted.tobytes())
    return f"{os.path.normpath(data)}_latents{image_size}_{digest.hexdigest()[:8]}"


def shard(folder, i):
    """The file for record i."""
    return Path(folder, f"{i // SHARD:06d}.safetensors")


def missing_shards(folder, n):
    """-> the records of each shard of n records that is not there or not complete."""
    missing = []
    for first in range(0, n, SHARD):
        try:
            with safe_open(shard(folder, first), "pt"):
                pass
        except (OSError, SafetensorError):
            missing.append(range(first, min(first + SHARD, n)))
    return missing


class Latents:
    """The cache of a run; a UserError names the command that makes the right one."""

    def __init__(self, s, index, vae):
        expected = latents_folder(s.data, index, vae, s.image_size)
        for folder in (expected, expected + "_mean"):
            if not missing_shards(folder, len(index)):
                self.folder = folder
                return
        then = "" if index.folder else ", then --data=data/index"
        raise hdm.UserError(
            f"--latents: {expected}, of these images and this VAE, is not there or not complete: "
            f"python prepare.py {s.data} --latents --image_size={s.image_size} --vae={s.vae}{then}")

    def read(self, i, side=None):
        """-> the moments of record i, (C or 2 C, height, width) float16."""
        file = shard(self.folder, i)
        with hdm.naming(file, f"no latents of record {i}"), safe_open(file, "pt") as tensors:
            return tensors.get_tensor(str(i))


def half_moments(vae, pixels, channels):
    """-> moments (B, channels, h, w) float16; images whose are not finite are encoded again, in float32."""
    moments = torch.cat(vae.moments(pixels), dim=1)[:, :channels].half().cpu()
    bad = ~moments.isfinite().flatten(1).all(1)
    if bad.any() and next(vae.parameters()).dtype != torch.float32:
        with hdm.in_float32(vae):
            moments[bad] = half_moments(vae, pixels[bad.to(pixels.device)], channels)
    return moments


def latent_sizes(index, image_size, factor):
    """-> (n, 2) height and width of each record's latent, in cells."""
    sides = np.stack([index.records[name].astype(int) for name in ("height", "width")], axis=1)
    return sides * image_size // sides.min(1, keepdims=True) // factor


def read_cells(i, index, image_size, factor):
    """-> i, its image (3, height, width) uint8, scaled and cut to whole cells; None, with a warning, where it
    cannot be read."""
    try:
        image = index.read(i, image_size)
        if index.changed(i):
            raise hdm.UserError(f"{index[i].name} is not as it was indexed; run prepare.py again")
    except hdm.UserError as error:
        hdm.warn(f"{error}; no latents of it")
        return None
    height, width = image.shape[1:]
    return i, image[:, :height // factor * factor, :width // factor * factor]


def encode_shard(loaded, index, vae, channels, batch_size, device):
    """Encodes (i, image) pairs, in batches of neighbors with one shape -> {str(i): moments}."""
    latents = {}
    for _, pairs in itertools.groupby(loaded, key=lambda pair: pair[1].shape):
        while batch := list(itertools.islice(pairs, batch_size)):
            pixels = torch.stack([image for _, image in batch]).to(device).float() / 127.5 - 1
            for (i, _), moments in zip(batch, half_moments(vae, pixels, channels)):
                if moments.isfinite().all():
                    latents[str(i)] = moments.clone()
                else:
                    hdm.warn(f"{index[i].name}: its latent is not finite in float16, also if encoded in "
                             f"float32; no latents of it")
    return latents


def seconds_per_image(s, vae, device):
    """How long the VAE encodes, by a batch of blank images."""
    trial = torch.zeros(s.batch_size, 3, s.image_size, s.image_size, device=device)
    for _ in range(2):                           # the first one warms up
        clock = time.perf_counter()
        vae.moments(trial)[0].sum().item()
        seconds = time.perf_counter() - clock
    return seconds / s.batch_size


def encode_latents(s, vae, device, rank, ranks):
    """Writes the shards that are not there; the ranks take them in turns."""
    index = Index.open(s.out)
    folder = latents_folder(s.out, index, vae, s.image_size)
    channels = 2 * vae.latent_channels
    if s.mean_only:
        folder += "_mean"
        channels = vae.latent_channels
    hdm.make_folder(folder, "--out")
    sizes = latent_sizes(index, s.image_size, vae.factor)
    todo = missing_shards(folder, len(index))
    images = sum(map(len, todo))
    gb = 2e-9 * channels * sum(sizes[numbers].prod(1).sum() for numbers in todo)
    free = shutil.disk_usage(folder).free / 1e9
    if gb > free:
        raise hdm.UserError(f"--latents: {gb:.2f} GB are needed in {folder}, {free:.2f} are free")
    hours = images * seconds_per_image(s, vae, device) / 3600 / ranks
    print(f"latents: {images:,} of {len(index):,} images to encode into {folder}: {gb:.3f} GB, "
          f"{free:.0f} are free; about {hours:.2f} h on {ranks} x {device} if the disk keeps up", flush=True)

    hdm.gather(None)                             # all have seen the same files
    load = functools.partial(read_cells, index=index, image_size=s.image_size, factor=vae.factor)
    with ThreadPoolExecutor(s.workers) as pool:  # Pillow works outside of Python's lock
        for numbers in tqdm(todo[rank::ranks], disable=rank > 0):
            by_size = sorted(numbers, key=lambda i: tuple(sizes[i]))
            loaded = (pair for pair in pool.map(load, by_size) if pair is not None)
            latents = encode_shard(loaded, index, vae, channels, s.batch_size, device)
            file = shard(folder, numbers[0])
            temporary = file.with_suffix(".partial")
            save_file(latents, temporary)
            hdm.open_modes(temporary)
            temporary.replace(file)              # a killed run leaves no file that looks complete
    hdm.gather(None)


# ---- training examples -------------------------------------------------------------------------------------
class Examples(Dataset):
    """Item i of the endless training stream, or of the held-out set: hdm.training_example of one image.

    Training: places is a Stream, seed the run's. Held out: places are record numbers, seed is None. latents:
    a Latents, or None; s: settings with those of hdm.ExampleSettings; factor: as in hdm.training_example.
    """

    def __init__(self, index, places, latents, s, config, factor, seed=None):
        self.index, self.places, self.latents = index, places, latents
        self.s, self.config, self.factor, self.seed = s, config, factor, seed

    def __getitem__(self, i):
        unreadable = []
        for at in range(i, i + 100):             # one bad file of millions must not end the run:
            try:                                 # the next in order takes its place
                example, changed = self.example(at)
                return dict(example, trouble=("\n".join(unreadable), changed))
            except hdm.UserError as error:
                unreadable.append(str(error))
                if len(unreadable) > 10:         # not bad files, but a disk that is away: two minutes in all
                    time.sleep(0.025 * len(unreadable))
        raise hdm.UserError(f"100 images in a row cannot be read, from {unreadable[0]} on")

    def place_of(self, i):
        """-> an item's record and its number; the text that all its random choices are a function of."""
        if self.seed is None:
            number = self.places[i % len(self.places)]
        else:
            epoch, copy, number = self.places[i]
        record = self.index[number]
        key = record.name
        if record.source > 0:
            key = f"{record.source}/{key}"       # two sources may have one name
        if self.seed is not None:
            key = f"{self.seed} {epoch} {copy} {key}"
        return record, number, key

    def caption_length(self, i):
        """In characters, about; 0 where training drops the caption."""
        record, _, key = self.place_of(i)
        *_, chance = hdm.choices_of(key)
        return 0 if chance < self.s.caption_dropout else len(record.caption)

    def example(self, i):
        """-> the training example; the image's name if its files are not as they were indexed, else ""."""
        record, number, key = self.place_of(i)
        training = self.seed is not None
        size = self.s.image_size
        image = (self.latents or self.index).read(number, size)                       # the short side: size
        sides = image.shape[2], image.shape[1]
        if self.latents:
            sides = hdm.scaled_sides(record.width, record.height, size)
        changed = record.name if self.index.changed(number) else ""
        return hdm.training_example(image, record.caption, sides, key, self.s, self.config, self.factor,
                                    bool(self.latents), training), changed


def read_regex(flag, text):
    """The regex of a flag, compiled."""
    try:
        return re.compile(text)
    except re.error as error:
        raise hdm.UserError(f"{flag}={text}: no regular expression: {error}") from error


def matched_records(index, holdout):
    """The numbers of the records that the regex holdout matches: some, not all. "": none."""
    if not holdout:
        return []
    matched = index.matching(read_regex("--holdout", holdout))
    if 0 < len(matched) < len(index):
        return matched
    raise hdm.UserError(f"--holdout={holdout}: matches the name or caption of {'all' if matched else 'none'} "
                        f"of {len(index):,} images, such as {index[0].name}: {index[0].caption[:80]!r}")


def split_data(index, validation, holdout=""):
    """-> the share to hold out, then Index.split of it and of what the regex holdout matches.

    None: 2 %, but with holdout 0; of few images, where that holds out none or all, the least share that holds
    out one, or all that have its name; of a single image none.
    """
    matched = matched_records(index, holdout)
    least = math.nextafter(index.records["place"].min(), 1)
    shares = (validation,)
    if validation is None:
        shares = (0.0,) if holdout else (0.02, least, 0.0)
    for share in shares:
        parts, held = index.split(share, matched)
        if parts and (held or share == 0):
            return share, parts, held
    hint = f"least is {math.ceil(1000 * least) / 1000}" if parts else "none is left"
    raise hdm.UserError(f"--validation={validation}: holds out {len(held)} of {len(index):,} images; {hint}; "
                        f"0: no held-out loss")


def open_data(s):
    """-> the Index of s.data, its training stream, the held-out records, an identity of all these. Sets
    s.validation and, by s.epochs, s.images."""
    index = open_index(s.data)
    s.validation, parts, held = split_data(index, s.validation, s.holdout)
    some = index.records[::1 + len(index) // 100_000]        # of very many a sample
    small = np.minimum(some["width"], some["height"]) < s.image_size
    if small.any():
        print(f"data: {100 * small.mean():.3g} % of the images are smaller than image_size and enlarged; "
              f"prepare.py --min_size={s.image_size} leaves them out")
    identity = f"{index.about['identity']} {s.validation}"
    if s.holdout:
        identity += f" {s.holdout}"
    identity = hashlib.sha256(identity.encode()).hexdigest()
    if len(set(hdm.gather((identity, str(s.resume))))) > 1:
        raise hdm.UserError(f"--data={s.data}, --resume={s.resume}: not the same to all processes")
    stream = Stream(parts, s.seed)
    if s.epochs:
        s.images = max(1, round(s.epochs * stream.length))
    return index, stream, held, identity


def report_cut_captions(index, te, s):
    """Prints the share of captions that text_length cuts, of a sample as training draws and reads them."""
    some = range(0, len(index), 1 + len(index) // 2000)      # those of a weight are in order of a hash
    texts = [hdm.draw_caption(index[i].caption, random.Random(i), s) for i in some]
    lengths = np.array([len(ids) for ids in te.tokenizer(texts)["input_ids"]])
    share = (lengths > te.max_length).mean()
    if share:
        print(f"captions: --text_length={s.text_length} cuts {share:.2%} of a sample of {len(texts):,}, of "
              f"up to {lengths.max()} tokens; a higher one keeps their ends, shorter captions cost less")


# ---- the command line -----------------------------------------------------------------------------------
def read_sources(paths):
    """PATH or PATH=WEIGHT ... -> [(path, weight)]"""
    sources = []
    for path in paths:
        head, weight = path, "1"
        if not os.path.exists(path):
            head, _, weight = path.rpartition("=")
        if not os.path.exists(head) or hdm.setting_value(path, weight, float) <= 0:
            raise hdm.UserError(f"{path}: no such file or folder, or a weight that is not above 0")
        if is_index(head) and len(paths) > 1:
            raise hdm.UserError(f"{path}: an index, which is no source: name the folders that it is of")
        sources.append((head, float(weight)))
    return sources


def prepare(s, *paths):
    hdm.check_name("--caption_lines", s.caption_lines, CAPTION_LINES, "way")
    hdm.check_name("--sidecar_place", s.sidecar_place, ("before", "after"), "place")
    if s.caption and not re.search(COLUMN, s.caption):
        raise hdm.UserError(f"--caption={s.caption}: names no column, as in {{artist}} ||| {{tags}}")
    sources = read_sources(paths)
    ready = is_index(paths[0])                   # for --latents or a dry run
    if ready and not s.latents and not s.dry_run:
        raise hdm.UserError(f"{paths[0]}: an index already. To make it again name its sources and --out; it "
                            f"takes --latents or --dry_run")
    s.out = os.path.normpath(paths[0] if ready else s.out)
    old = None
    with contextlib.suppress(hdm.UserError):     # there is none, or a broken one, or of an older format
        old = Index.open(s.out)
    if s.dry_run:
        with hdm.naming(s.text_encoder, "no tokenizer to be had for --text_encoder"):
            tokenizer = hdm.load_tokenizer(s.text_encoder)
        index = Index.open(s.out) if ready else build_index(sources, s, old=old)
        return dry_run(index, s, tokenizer)
    rank, ranks = hdm.start_ranks()
    if s.latents:                                # first: a mistake is an error before an hour's work
        device = hdm.pick_device(s.device)
        vae = hdm.load_vae(s.vae, device, hdm.pick_dtype(s.dtype, device))
        if s.image_size % vae.factor:
            raise hdm.UserError(f"--image_size={s.image_size}: no multiple of {vae.factor}, a cell's pixels")
    if rank == 0 and not ready:
        with complete_folder(s.out) as folder:
            n = len(build_index(sources, s, folder, old))
            old = None                           # unmapped: Windows renames no folder of mapped files
        print(f"{n:,} images in {s.out}; report.json there names what was left out")
    hdm.gather(None)                             # the others wait for it
    if s.latents:
        encode_latents(s, vae, device, rank, ranks)


def writes_no_latents(s):
    return not s.latents or s.dry_run


OF_A_SCAN = ("out caption name_column caption_lines sidecar sidecar_place min_size max_ratio require_tag "
             "drop_tag verify")
IDLE = [  # settings, when they have no effect, and why
    ("mean_only vae batch_size workers device dtype", writes_no_latents, "without --latents"),
    ("text_encoder text_length tag_separator spaces cache_text caption_dropout tag_dropout group_dropout",
     hdm.without("dry_run"), "without --dry_run"),
    ("text_lengths mask_padding tread_rate t_shift vae_chunk", hdm.without(),
     "here: it is train.py's"),
    ("image_size", hdm.without("latents", "dry_run"), "without --latents or --dry_run"),
    ("sidecar_place", hdm.without("sidecar"), "without --sidecar")]
JUDGE_IDLE = [
    ("group grid", hdm.without("data"), "without --data"),
    ("camera shape filling", lambda s: s.data, "with --data: it is the demo's")]


def judge(settings):
    import sample  # the judge samples: the one step up, in a command of its own
    if settings.data:
        sample.judge_by_data(settings)
    else:
        sample.judge_checkpoint(settings)


def main(argv):
    commands = {"demo": (make_demo, DemoSettings, []), "judge": (judge, JudgeSettings, []),
                "text_encoder": (text_encoder, TextEncoderSettings, ["SOURCE"])}
    name = argv[0] if argv else ""
    path = name.rpartition("=")[0] or name       # PATH or PATH=WEIGHT
    if not name.startswith("-") and not os.path.exists(path):
        hdm.check_name(f"prepare.py {name}", name, commands, "path or command")
    if name in commands:
        command, kind, positionals = commands[name]
        argv = argv[1:]
        classes = [kind]
        idle = JUDGE_IDLE if name == "judge" else []
    else:
        command, kind, positionals = prepare, PrepareSettings, ["PATH ..."]
        classes, idle = [DataSettings, hdm.ExampleSettings], IDLE
    words, values = hdm.parse_args(argv, classes, positionals, doc=__doc__)
    if command is prepare and is_index(words[0]):
        idle = [*IDLE, (OF_A_SCAN, hdm.without(), f"on {words[0]}, an index already")]
    settings = kind(**values)
    hdm.check_bounds(settings)
    hdm.warn_idle(values, [settings], idle)
    command(settings, *words)


# ==== Extras ================================================================================================
# ---- a dry run ---------------------------------------------------------------------------------------------
def dry_run(index, s, tokenizer):
    """prepare.py --dry_run, with its settings s: prints what training will meet; OUT.png shows the first 48
    images with their crops and captions."""
    stream = Stream(index.split(0.0)[0], seed=0)
    print(f"{len(index):,} images, {index.records['length'].sum() / 1e9:.3f} GB; {stream.length:,.0f} to an "
          f"epoch")
    print_sizes(index, s)
    print_captions(index, s, tokenizer)
    print(f"exact duplicates: {count_duplicates(index):,} images")
    render_sheet(index, stream, s)


def print_sizes(index, s):
    """Histograms of the images' sizes, and what their latents will take."""
    width, height = (index.records[name].astype(int) for name in ("width", "height"))
    short = np.minimum(width, height)
    print_histogram("width / height", width / height, [0, 0.5, 0.75, 1, 1.01, 1.34, 2.01])
    print_histogram("short side", short, sorted({0, 256, 512, 768, 1024, s.image_size}))
    cells = latent_sizes(index, s.image_size, 8).prod(1).sum()
    print(f"--latents at {s.image_size} px: {16e-9 * cells:.3f} GB, with --mean_only half (4 channels, f8)")


def print_histogram(what, values, edges):
    counts = np.histogram(values, [*edges, np.inf])[0]
    parts = [f"{n:,} from {edge:g}" for edge, n in zip(edges, counts) if n]
    print(f"{what}: {', '.join(parts)}")


def print_captions(index, s, tokenizer):
    """How long the captions of a sample are, and their commonest tags."""
    some = np.random.default_rng(0).permutation(len(index))[:20_000].tolist()
    texts = [hdm.draw_caption(index[i].caption, None, s) for i in some]
    tokens = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    print(f"tokens of {len(texts):,} captions: median {np.median(tokens):.0f}, 95 % below "
          f"{np.quantile(tokens, 0.95):.0f}, at most {tokens.max()}; --text_length={s.text_length} cuts "
          f"{100 * (tokens > s.text_length).mean():.1f} %")
    tags = Counter()
    for text in texts:
        tags.update({tag.strip() for tag in text.split(",")})
    print("most common tags: " + ", ".join(f"{tag} {count:,}" for tag, count in tags.most_common(20)))


def count_duplicates(index):
    """How many images are byte for byte another one: only those of one length are read."""
    lengths = index.records["length"]
    _, which, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    hashes = []
    for i in np.flatnonzero(counts[which] > 1).tolist():
        record = index[i]
        with contextlib.suppress(OSError), open_at(record.file, record.offset, record.length) as stream:
            hashes.append(hashlib.sha256(stream.read()).digest())
    return len(hashes) - len(set(hashes))


def render_sheet(index, stream, s):
    """Writes OUT.png: the first 48 images of the stream as training takes them."""
    # There is no model here. hdm.training_example takes from its config the sizes of noise and positions,
    # which no sheet shows: one channel, and one patch as large as the crop, cost least and fit any size.
    config = hdm.XUTConfig(patch_size=s.image_size, in_channels=1)
    examples = Examples(index, stream, None, replace(s, tread_rate=0.0), config, None, seed=0)
    tiles = []
    for i in range(min(48, len(index))):
        tile = Image.new("RGB", (201, 270), "white")
        with contextlib.suppress(hdm.UserError):             # it cannot be read, and stays white
            example, _ = examples.example(i)
            render_example(tile, example, index.read(stream[i][2], s.image_size))
        tiles.append(np.asarray(tile))
    hdm.make_folder(Path(s.out).parent, "--out")
    hdm.image_grid(tiles, columns=8, gap=10).save(f"{s.out}.png")
    print(f"{s.out}.png: {len(tiles)} images as training takes them: crop in red, caption below")


def render_example(tile, example, image):
    """Draws on a PIL tile: the image (3, height, width), in it what training sees, framed; the caption."""
    left, top, side = example["crop"]
    canvas = ImageDraw.Draw(tile)
    image = image.clone()
    image[:, top:top + side, left:left + side] = example["pixels"]                    # so that a flip shows
    shown = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    scale = 200 / max(shown.size)
    width, height = (max(1, round(length * scale)) for length in shown.size)
    tile.paste(shown.resize((width, height)))
    canvas.rectangle([scale * x for x in (left, top, left + side, top + side)], outline="red")
    canvas.text((0, 203), "\n".join(textwrap.wrap(example["caption"], 34)[:5]) or "(dropped)", "black")


# ---- a text encoder for any captions -----------------------------------------------------------------------
def make_text_encoder(captions, out, most_tokens=4096, dim=128, seed=0, more_words=(), **shape):
    """Saves to the folder `out` a byte-level BPE tokenizer trained on `captions` and a tiny random Qwen3, as
    AutoTokenizer and AutoModel load them: the path of a real encoder without its download or its knowledge (a
    word that stands in no caption means nothing). more_words: each gets a token behind the captions' own, for
    which that changes nothing. shape: other settings of its Qwen3Config."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers  # slow to import
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model, logging
    logging.disable_progress_bar()  # it would write "Writing model shards" over our own lines
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are tokens, so that any text can be encoded, emoji too, whatever the captions held.
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=most_tokens, special_tokens=["<pad>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    known = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True) for word in more_words])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right",
                            clean_up_tokenization_spaces=False).save_pretrained(out)
    tiny = dict(vocab_size=known, hidden_size=dim, intermediate_size=2 * dim,
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
        if more_words:
            model.resize_token_embeddings(known + len(more_words), mean_resizing=False)
            model.embed_tokens.weight[known:].normal_(std=2.0)
    model.save_pretrained(out)
    hdm.open_modes(out)


# ---- what the demo shows ----------------------------------------------------------------------------------
CANVASES = {(32, 32): 0.8, (32, 48): 0.1, (48, 32): 0.1}  # (height, width) at --side=32: share of the images
RADIUS = {"small": 0.30, "large": 0.42}  # in short sides
CENTERED_CANVASES = {(32, 32): 0.5, (32, 48): 0.25, (48, 32): 0.25}
CENTERED_RADIUS = {"small": 0.20, "large": 0.32}  # in long sides, so that positions alone say what is where
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (245,) * 3, "black": (20,) * 3}


def in_circle(y, x):
    return x**2 + y**2 <= 1

def in_square(y, x):
    return np.fmax(abs(x), abs(y)) <= 0.86

def in_triangle(y, x):
    return (y <= 0.8) & (1.8 * abs(x) <= y + 1)

def in_diamond(y, x):
    return abs(x) / 0.75 + abs(y) <= 1

def in_cross(y, x):
    return (np.fmax(abs(x), abs(y)) <= 1) & (np.fmin(abs(x), abs(y)) <= 0.33)

def in_ring(y, x):
    return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.62**2)


# In radii from the center: the reach up, down and to either side; whether (y, x), y downwards, is inside.
SHAPES = {"circle": (1, 1, 1, in_circle), "square": (0.86, 0.86, 0.86, in_square),
          "triangle": (1, 0.8, 1, in_triangle), "diamond": (1, 1, 0.75, in_diamond),
          "cross": (1, 1, 1, in_cross), "ring": (1, 1, 1, in_ring)}
# What an adapter may teach a trained demo: its words are known to the demo's text encoder from the beginning.
def in_star(y, x):
    corner = np.arctan2(x, -y) % (2 * np.pi / 5)             # angle from a point, folded to 0 .. 36 degrees
    corner = np.fmin(corner, 2 * np.pi / 5 - corner)
    return np.hypot(y, x) * (np.cos(corner) + 1.08 * np.sin(corner)) <= 1

MORE_SHAPES = {"star": (1, 0.81, 0.95, in_star)}
FILLINGS = {"hatched": 0.4}                      # the color's share in every other stripe
BACKGROUNDS = {"gray": (128, 128, 128), "navy": (25, 30, 80), "pink": (250, 190, 205), "teal": (20, 120, 120)}
ATTRIBUTES = {"size": RADIUS, "color": COLORS, "shape": SHAPES, "background": BACKGROUNDS}
CAPTION = "a {} {} {} on a {} background"
COMBINATIONS = list(itertools.product(*ATTRIBUTES.values()))  # 384 of (size, color, shape, background)
# The test of composing: 32 combinations stay out of training, though each of their words is in it.
UNSEEN = [words for words, numbers in zip(COMBINATIONS, np.ndindex(2, 8, 6, 4))
          if np.dot(numbers, (1, 1, 2, 3)) % 12 == 0]


def combinations(shape):
    """-> those of a demo and, of these, the unseen: COMBINATIONS and UNSEEN; or of one of MORE_SHAPES."""
    if not shape:
        return COMBINATIONS, UNSEEN
    every = list(itertools.product(RADIUS, COLORS, [shape], BACKGROUNDS))
    unseen = [words for words, numbers in zip(every, np.ndindex(2, 8, 1, 4))
              if np.dot(numbers, (1, 1, 2, 3)) % 4 == 0]
    return every, unseen


def caption(words, filling=""):
    """The caption of (size, color, shape, background); eight words with a filling, too."""
    text = CAPTION.format(*words)
    return f"{filling} {text.removeprefix('a ')}" if filling else text


def stripes(filling, height, width):
    """(height, width): the color's share at each pixel of a shape; diagonals two pixels wide, or 1."""
    if not filling:
        return np.ones((height, width))
    return np.where(np.add.outer(np.arange(height), np.arange(width)) % 4 < 2, 1.0, FILLINGS[filling])


def center_range(size, shape, height, width):
    """((lowest, highest) cy, (lowest, highest) cx), in pixels, that keep the whole shape on the canvas."""
    r = RADIUS[size] * min(height, width)
    up, down, side, _ = (SHAPES | MORE_SHAPES)[shape]
    return (up * r, height - down * r), (side * r, width - side * r)


def random_center(rng, size, shape, height, width):
    """Uniform in the middle half of its range on each axis: anywhere is too hard for minutes of training."""
    ranges = center_range(size, shape, height, width)
    return [low + (high - low) * rng.uniform(0.25, 0.75) for low, high in ranges]


def coverage(size, shape, height, width, cy, cx, r=None):
    """(height, width) share of each pixel inside the shape: rendered at four times the size, averaged."""
    if r is None:
        r = RADIUS[size] * min(height, width)    # pixels
    y = ((np.arange(4 * height) + 0.5) / 4 - cy) / r
    x = ((np.arange(4 * width) + 0.5) / 4 - cx) / r
    is_inside = (SHAPES | MORE_SHAPES)[shape][3]
    return is_inside(y[:, None], x[None]).reshape(height, 4, width, 4).mean((1, 3))


def render(size, color, shape, background, height, width, cy, cx, r=None, filling=""):
    """(height, width, 3) uint8: the shape with its center at (cy, cx), in pixels from the top left corner."""
    ground = np.array(BACKGROUNDS[background])
    share = coverage(size, shape, height, width, cy, cx, r) * stripes(filling, height, width)
    return np.rint(ground + share[..., None] * (COLORS[color] - ground)).astype(np.uint8)


def check_extras(settings):
    """Refuses a --shape or --filling that is not known."""
    hdm.check_name(f"--shape={settings.shape}", settings.shape, ("", *MORE_SHAPES), "shape")
    hdm.check_name(f"--filling={settings.filling}", settings.filling, ("", *FILLINGS), "filling")


def make_demo(settings):
    check_extras(settings)
    name = "_".join(filter(None, (settings.filling, settings.shape))) or "demo"
    settings = replace(settings, out=settings.out or f"data/{name}")
    out = os.path.abspath(settings.out)
    every, unseen = combinations(settings.shape)
    seen = [words for words in every if words not in unseen]
    is_extra = settings.shape or settings.filling
    count = settings.count or (200 if is_extra else 12000)
    # Each run of 352 images shows each combination once, in one shuffled order.
    order = np.random.default_rng(settings.seed).permutation(len(seen))
    canvases = CENTERED_CANVASES if settings.centered else CANVASES
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(complete_folder(out))
        if not is_extra:                         # else the demo's serves
            # From all 352 captions, not from those rendered: a demo of 20 images, too, has a token per word.
            encoder = stack.enter_context(complete_folder(out + "_te"))
            captions = [caption(words) for words in seen]
            make_text_encoder(captions, encoder, seed=settings.seed, more_words=[*MORE_SHAPES, *FILLINGS])
        for i in range(count):
            rng = np.random.default_rng((settings.seed, i))
            words = seen[order[i % len(seen)]]
            canvas = rng.choice(list(canvases), p=list(canvases.values()))
            height, width = canvas * settings.side // 32
            cy, cx = random_center(rng, words[0], words[2], height, width)
            radius = None                        # its size's
            if settings.centered:
                cy, cx = height / 2, width / 2
                radius = CENTERED_RADIUS[words[0]] * max(height, width)
            image = render(*words, height, width, cy, cx, radius, settings.filling)
            Image.fromarray(image).save(folder / f"{i:05d}.png")
            (folder / f"{i:05d}.txt").write_text(caption(words, settings.filling) + "\n")
    lines = [caption(words, settings.filling) + "\n" for words in unseen]
    Path(out + "_unseen.txt").write_text("".join(lines))
    beside = "_unseen.txt" if is_extra else "_unseen.txt and _te, the text encoder"
    print(f"{count} images in {settings.out}; beside it {beside}")


def text_encoder(settings, source):
    index = open_index(source)
    how = dict(separator=settings.tag_separator, spaces=settings.spaces)
    captions = (hdm.parse_caption(index[i].caption, **how) for i in range(len(index)))  # all alternatives'
    with complete_folder(settings.out) as out:
        make_text_encoder(captions, out, settings.vocab)
    print(f"a text encoder for the words of {len(index)} captions in {settings.out}")


if __name__ == "__main__":
    hdm.run_main(main)
