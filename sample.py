"""Sample images from prompts.

    python sample.py --ckpt=out/demo --prompt "a large red circle on a navy background" -n 4
    python sample.py --prompts=prompts.txt              # the released model; one prompt a line
    python sample.py --from_image=out/samples/00000-0.png --seed=7     # the same again, but for the seed
    python sample.py --ckpt=out/demo --prompt "..." --sheet="steps=8,16,32;cfg=1,2,4"
    python sample.py --ckpt=out/demo --ui               # a page to play on, in the browser
    python sample.py --ckpt=out/demo --export=demo.safetensors
    python sample.py --ckpt=out/demo --adapter=a.safetensors:0.8 --adapter=out/lora --prompt "..."

Writes OUT/00000-SEED.png and so on, each in its own size, in the order of the prompts, and, if there are more
than one, a grid of them. Image i of a prompt has the seed SEED + i and depends on nothing else in the batch.
In order: the settings; prompts; the text in an image's file; sampling; weights of and for other programs, and
adapters; commands. Then extras: a sheet of settings, TIPO, the page, the demo's judge, a judge for any data.
"""
import contextlib
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import sys
import tempfile
import threading
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from tqdm import tqdm

import hdm
import prepare

# One name for each kind of settings: `job` is an image's, `defaults` those of every job (ImageSettings),
# `options` the program's (Sampling), `settings` the checkpoint's (the dict of load_model).
RELEASED = "KBlueLeaf/HDM-xut-340M-anime"                    # the published model; CC-BY-NC-SA 4.0
RELEASED_FILE = "hdm-xut-340M-1024px-note.safetensors"
PUBLISHED = dict(              # the published model's settings; our own checkpoints hold theirs
    image_size=1024, steps=24, cfg=3.0, cfg_low=0.0, t_shift=1.0, tag_separator="$$", spaces=False)


@dataclass
class ImageSettings:           # of one image; a line of --prompts may end in any of these, such as --cfg=2
    ckpt: str = RELEASED       # train.py's OUT_DIR, one checkpoint, a published file or a hub id
    negative_prompt: str = ""  # what guidance moves away from
    num_images: Annotated[int, 1, 10_000] = 1           # -n: images for each prompt
    seed: Annotated[int, -1, 2 ** 62] = 0               # of a prompt's first image, then one more; -1: random
    width: Annotated[int, 1, 16384] | None = None       # pixels; None: init_image's, else the training size
    height: Annotated[int, 1, 16384] | None = None      # likewise
    sampler: str = "euler"     # a name in hdm.SAMPLERS; heun takes two evaluations a step, the others one
    steps: Annotated[int, 1, 1000] | None = None        # None: the checkpoint's own (published: 24)
    t_shift: Annotated[float, 0.001, 1000] | None = None  # of time, as in training; likewise (1)
    cfg: Annotated[float, -100, 100] | None = None      # guidance, 1 is none; likewise (3)
    cfg_low: Annotated[float, 0, 1] | None = None       # least time t, 1 noise to 0 image, with guidance;
    cfg_high: Annotated[float, 0, 1] = 1.0              # ... likewise (0). Greatest t with guidance
    cfg_rescale: Annotated[float, 0, 1] = 0.0           # how far guided contrast goes back to the unguided
    zoom: Annotated[float, 0.001, 1000] = 1.0           # camera: above 1 nearer
    x_shift: Annotated[float, -100, 100] = 0.0          # camera to the right; 1 is half of the longer side
    y_shift: Annotated[float, -100, 100] = 0.0          # camera down, likewise
    tread_cond: hdm.Fraction = 0.0    # share of the tokens that skip the U, with the prompt
    tread_uncond: hdm.Fraction = 0.0  # with the negative one: a weaker self to move away from (0.25 to 0.5)
    init_image: str = ""           # image to start from
    strength: Annotated[float, 0, 1] = 0.6              # share of the steps that are done on it
    mask: str = ""                 # image of the same size: white is redrawn, black stays

    def __post_init__(self):
        hdm.check_name(f"--sampler={self.sampler}", self.sampler, hdm.SAMPLERS, "sampler")
        hdm.check_bounds(self)
        if self.mask and not self.init_image:
            raise hdm.UserError(f"--mask={self.mask}: says what to redraw in --init_image, which is missing")


@dataclass
class Job(ImageSettings):      # one image to sample
    prompt: str = ""
    number: int = 0            # of its file


@dataclass
class Sampling:
    prompt: list[str] = field(default_factory=list)  # may be given several times
    prompts: str = ""              # file with one prompt a line, or - for standard input; # first: a comment
    slots: str = ""                # the prompt in parts, '{"artist": "..."}' or a json file of them,
    format: str = (                # ... which are put in here
        "<|special|>, <|characters|>, <|series|>, <|artist|>, <|general|>, "
        "<|natural language|>. <|quality|>, <|rating|>, <|meta|>")
    tipo: bool | str = False       # expand short prompts by TIPO; a folder or hub id of another one
    from_image: str = ""           # take prompt and settings from an image that was made here
    sheet: str = ""                # "steps=8,16;cfg=1,2": one PNG, rows and columns, of the first prompt
    batch_size: hdm.Count = 4      # images at a time: memory, not result
    out: str = "out/samples"       # folder for the images
    file_type: str = "png"         # png, webp, jpg
    no_metadata: bool = False      # leave prompt and settings out of the files
    latents_out: bool = False      # also write each image's latent, NAME.safetensors
    adapter: list[str] = field(default_factory=list)  # FILE, or an adapter run, :STRENGTH (1); may be given
                                   # often: all are added to the checkpoint's weights
    ema: bool = True               # the averaged weights, where the checkpoint has them
    text_encoder: str = ""         # another place of the text encoder; "": where the checkpoint says
    vae: str = ""                  # likewise of the VAE, a folder, file or hub id
    device: str = "auto"           # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"            # float32, bfloat16, float16; auto: 16 bit on CUDA, else float32
    export: str = ""               # write the weights as FILE.safetensors (published layout) or a FOLDER
    force: bool = False            # ... also of a model that other programs cannot read
    ui: bool | str = False         # a local web page; HOST:PORT in place of 127.0.0.1:7860

    def __post_init__(self):
        hdm.check_bounds(self)
        hdm.check_name(f"--file_type={self.file_type}", self.file_type, FORMATS, "type")


IMAGE_SETTINGS = [one.name for one in fields(ImageSettings)]
ALIASES = {"-n": "num_images", "--shift": "t_shift",           # of before; diffusers' two
           "--num_inference_steps": "steps", "--guidance_scale": "cfg"}
FORMATS = dict(png="PNG", webp="WEBP", jpg="JPEG")
# Where the settings of a prompt's line begin: --any= or a known flag.
FLAG = re.compile(rf"(?:^|\s+)(?=--\w+=|(?:{'|'.join(ALIASES)}|--(?:{'|'.join(IMAGE_SETTINGS)}))(?![\w-]))")


# Conditions on a call: an object with all settings of one image and of the program.
def unguided(call):
    return call.cfg == 1


def unguided_without_tipo(call):                             # TIPO reads the negative prompt, too
    return call.cfg == 1 and not call.tipo


def never_guided(call):
    return call.cfg_low > call.cfg_high


OF_EXPORT = "ckpt adapter ema text_encoder vae from_image export force".split()
NOT_EXPORTED = [one.name for one in (*fields(ImageSettings), *fields(Sampling)) if one.name not in OF_EXPORT]
IDLE = [  # settings, the condition on which they have no effect, its words
    ("strength", hdm.without("init_image"), "without --init_image"),
    ("negative_prompt", unguided_without_tipo, "with --cfg=1"),
    ("cfg_low cfg_high cfg_rescale tread_uncond", unguided, "with --cfg=1"),
    ("cfg_low cfg_high cfg_rescale tread_uncond", never_guided, "as cfg_low is above cfg_high: no guidance"),
    ("format", hdm.without("slots"), "without --slots"),
    ("force", hdm.without("export"), "without --export"),
    (" ".join(NOT_EXPORTED), attrgetter("export"), "with --export")]


# ---- prompts ----------------------------------------------------------------------------------------------
def prompt_line(line, defaults):
    """'PROMPT --key=value ...' -> its Job: defaults with these values, which are quoted as in a shell."""
    prompt, *flags = FLAG.split(line, maxsplit=1)
    with hdm.naming(f"--prompts, {line!r}", "wrong settings in it"):
        _, values = hdm.parse_args(shlex.split(" ".join(flags)), [ImageSettings], aliases=ALIASES)
        return Job(**vars(defaults) | values, prompt=prompt)


def prompt_lines(text):
    """The lines of a file of prompts, but empty ones and comments, which begin with #."""
    lines = [line.strip() for line in text.removeprefix("\ufeff").split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def read_slots(source):
    """The text of --slots, json or the path of a json file -> {slot: its text}."""
    with hdm.naming(f"--slots={source}", 'neither a json file nor json such as {"artist": "..."}'):
        is_json = source.lstrip().startswith("{")
        slots = json.loads(source if is_json else hdm.read_text(source))
        if not all(isinstance(text, str) for text in slots.values()):
            raise ValueError("each part must be a text")
    return slots


def fill_slots(template, slots):
    """'<|name|>, ...' filled from {name: text}; an empty one takes the text behind it along."""
    pairs = re.findall(r"<\|(.+?)\|>([^<]*)", template)      # each slot and the text behind it
    for name in slots:
        hdm.check_name(f"--slots: {name}", name, dict(pairs), "slot in --format")
    prompt = template.partition("<|")[0]                     # what stands before the first slot
    for name, punctuation in pairs:
        text = slots.get(name, "").strip().rstrip(",.")
        if name != "natural language":                       # in its words underscores would be meant
            text = hdm.parse_caption(text.replace(",", "$$"), spaces=True)
        if text:
            prompt += text + punctuation
    return prompt.rstrip(", ")


def report_foreign_syntax(lines):
    """Prints what in the prompts means something to other programs, and is plain text here."""
    texts = [line.prompt for line in lines] + [line.negative_prompt for line in lines]
    if any(re.search(r"\\[()]", text) for text in texts):
        print(r"prompts: \( and \) are taken for ( and )")
    if any(re.search(r"\([^()]+:\d*\.?\d+\)", text) for text in texts):
        print("prompts: weights as in (tag:1.2) are not known here, and read as text")


def encodable(text):
    """Text of the command line or a file's name, which can hold any bytes: ? in place of those not UTF-8."""
    return text.encode(errors="replace").decode()


def jobs_of(line):
    """A prompt's Job -> one for each of its images, each with its own seed."""
    seed = line.seed
    if seed == -1:
        seed = random.SystemRandom().randrange(2 ** 32)
        print(f"seed {seed}: {line.prompt}")
    line = replace(line, prompt=encodable(line.prompt), negative_prompt=encodable(line.negative_prompt))
    return [replace(line, num_images=1, seed=seed + i) for i in range(line.num_images)]


def read_jobs(options, defaults, load_tipo):
    """-> a Job for each image, in order, each with its own seed. load_tipo is called for --tipo alone."""
    lines = [Job(**vars(defaults), prompt=prompt) for prompt in options.prompt]
    if options.prompts:
        with hdm.naming(f"--prompts={options.prompts}", "no readable file of one prompt a line"):
            is_file = options.prompts != "-"
            text = hdm.read_text(options.prompts) if is_file else sys.stdin.buffer.read().decode()
        lines += [prompt_line(line, defaults) for line in prompt_lines(text)]
    slots = {}
    if options.slots:
        slots = read_slots(options.slots)
        lines.append(Job(**vars(defaults), prompt=fill_slots(options.format, slots)))
        print(f"prompt: {lines[-1].prompt}")
    if not lines:
        raise hdm.UserError('no prompt: give --prompt "a red circle", once or more, or --prompts=FILE')
    report_foreign_syntax(lines)
    jobs = [job for line in lines for job in jobs_of(line)]
    if options.tipo:
        expand = load_tipo(options.tipo)
        for job in jobs:
            job.prompt = expand(job, slots)
            print(f"prompt: {job.prompt}")
    return jobs


# ---- the text in an image's file --------------------------------------------------------------------------
def parameters(job, model_hash):
    """Prompt and settings in AUTOMATIC1111's form, which many programs show."""
    sampler = getattr(hdm.SAMPLERS[job.sampler], "title", job.sampler)
    pairs = {"Steps": job.steps, "Sampler": sampler, "CFG scale": f"{job.cfg:g}", "Seed": job.seed,
             "Size": f"{job.width}x{job.height}", "Model hash": model_hash[:10],
             "Model": Path(job.ckpt).name.removesuffix(".safetensors")}
    items = []
    for key, value in pairs.items():
        if re.search("[,:\n]", str(value)):                  # would end the value
            value = json.dumps(value, ensure_ascii=False)
        items.append(f"{key}: {value}")
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(items))
    return encodable("\n".join(lines))


def exif_block(description, comment):
    """EXIF bytes with description, ASCII, as ImageDescription, and comment as UserComment.

    Pillow would write the UserComment as BYTE; readers such as AUTOMATIC1111's take UNDEFINED (7) alone.
    An entry of a directory is its tag, type, number of bytes, and its value or where that begins.
    """
    description = description.encode("ascii") + b"\0"
    comment = b"UNICODE\0" + comment.encode("utf-16-be")
    gap = bytes(len(description) % 2)                        # values start at even places
    inner = 8 + 2 + 2 * 12 + 4 + len(description) + len(gap)     # where the second directory is
    first = struct.pack(">HHHIIHHIII", 2, 0x010E, 2, len(description), 38, 0x8769, 4, 1, inner, 0)
    second = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), inner + 2 + 12 + 4, 0)
    return b"Exif\0\0MM\0\x2a\0\0\0\x08" + first + description + gap + second + comment


def encode_file(image, file_type, text="", record=""):
    """(height, width, 3) uint8 -> a file's bytes; with text in it: `parameters`, and record, our own json."""
    options = {} if file_type == "png" else dict(quality=95)
    if text and file_type == "png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", text)      # as iTXt where Latin-1 does not do
        options["pnginfo"].add_text("hdm", record)
    elif text:
        options["exif"] = exif_block(record, text)
    file = io.BytesIO()
    with hdm.naming(f"--file_type={file_type}", "cannot hold this image with its settings; png can"):
        Image.fromarray(image).save(file, FORMATS[file_type], **options)
    return file.getvalue()


def read_record(path):
    """-> {name: value} of the settings that an image's file holds, and the hash of the model that made it."""
    with hdm.naming(f"--from_image={path}", "not an image that can be read"), Image.open(path) as image:
        record = image.info.get("hdm") or image.getexif().get(0x010E)
    if not str(record).startswith("{"):                      # cameras, too, write a description
        raise hdm.UserError(f"--from_image={path}: no settings of sample.py in it; it was made elsewhere "
                            f"or with --no_metadata, or another program has saved it")
    types = hdm.setting_types([ImageSettings, Sampling])
    with hdm.naming(f"--from_image={path}", "broken settings in it"):
        record = json.loads(record)
        if "shift" in record:                                # in older images
            record["t_shift"] = record["shift"]
        record.setdefault("adapter", [])                     # older images lack it
        own = "adapter", "ema", "text_encoder", "vae", "dtype"
        names = [name for name in (*IMAGE_SETTINGS, *own) if name in record]
        values = {name: hdm.setting_value(name, record[name], types[name]) for name in names}
        values["prompt"] = [str(record["prompt"])]
        return values, str(record["model_hash"])


def write_new(path, content):
    """Writes a new file, complete or not at all: path, or, where that is there, STEM-1, ... -> its path."""
    new = path
    with (hdm.naming("--out", f"{path} cannot be written"),
          hdm.scratch_folder(path.absolute().parent, ".new-") as scratch):
        (scratch / "new").write_bytes(content)
        for i in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                open(new, "xb").close()                      # its name; two processes may want the same
                break
            new = path.with_stem(f"{path.stem}-{i}")
        os.replace(scratch / "new", new)
    return new


# ---- sampling ----------------------------------------------------------------------------------------------
def to_uint8(images):
    """(B, 3, height, width) in [-1, 1], anything beyond is clipped -> (B, height, width, 3) uint8 numpy."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def file_number(path):
    """41 of 00041-7.png; -1 of other names."""
    match = re.match(r"(\d+)-", path.name)
    return int(match[1]) if match else -1


def number_files(jobs, folder):
    """jobs with the numbers of their files, above those in the folder, so that none is overwritten."""
    first = 1 + max(map(file_number, folder.iterdir()), default=-1)
    return [replace(job, number=i) for i, job in enumerate(jobs, first)]


def vae_factor(vae):
    """Pixels on the side of a latent cell; 1 where the model works on pixels."""
    return 1 if vae is None else vae.factor


@lru_cache(maxsize=1)              # images of one call share it: sample_files forgets it
def load_source(init_image, mask):
    """-> init_image and mask as PIL images of the same size, or None for what is not given."""
    image = mask_image = None
    if init_image:
        with hdm.naming(f"--init_image={init_image}", "not an image that can be read"):
            image = hdm.load_image(init_image)
    if mask:
        with hdm.naming(f"--mask={mask}", "not an image that can be read"):
            mask_image = hdm.load_image(mask).convert("L")
            with Image.open(mask) as file:
                lowest_alpha = file.convert("RGBA").getextrema()[3][0]
        if lowest_alpha < 255:
            raise hdm.UserError(f"--mask={mask}: it has transparent pixels, which are neither white (sampled "
                                f"again) nor black (kept): flatten it")
        if mask_image.size != image.size:
            raise hdm.UserError(f"--mask={mask}: {mask_image.width}x{mask_image.height} pixels, but "
                                f"--init_image has {image.width}x{image.height}; they must be the same")
    return image, mask_image


def fitted(image, width, height, method):
    """A PIL image in this size. Of a slightly larger one the middle is taken as it is, pixel by pixel; others
    are scaled to cover and cut."""
    left, top = image.width - width, image.height - height
    if 0 <= min(left, top) and max(left, top) < min(64, width / 4, height / 4):
        return image.crop((left // 2, top // 2, left // 2 + width, top // 2 + height))
    return ImageOps.fit(image, (width, height), method)


def resolved(job, settings, model, vae):
    """job with numbers in place of None. Its size is init_image's, as far as the model can make that, or the
    training size; what the model cannot make is refused."""
    size = settings["image_size"]
    width, height = size, size
    image, _ = load_source(job.init_image, job.mask)
    if image is not None:
        width, height = image.size
        if max(width, height) > 2 * size:                    # such as a photo's: more than the model can do
            width, height = hdm.scaled_sides(width, height, size)
        step = model.config.patch_size * vae_factor(vae)
        width, height = max(step, width // step * step), max(step, height // step * step)
    own = dict(width=width, height=height, steps=settings["steps"], cfg=settings["cfg"],
               cfg_low=settings["cfg_low"], t_shift=settings["t_shift"])
    job = replace(job, **{name: value for name, value in own.items() if getattr(job, name) is None})
    hdm.check_size(job.height, job.width, model.config, vae)
    if job.init_image and round(job.steps * job.strength) < 1:
        raise hdm.UserError(f"--strength={job.strength}: of {job.steps} steps none would be done; above "
                            f"{0.5 / job.steps:.3g} at least one is")
    return job


def as_trained(text, settings):
    """A prompt as the checkpoint's training read captions."""
    settings = PUBLISHED | settings                          # old checkpoints do not hold all of them
    return hdm.parse_caption(text, separator=settings["tag_separator"], spaces=settings["spaces"])


def encode_texts(te, jobs, settings):
    """-> {text: states (1, T, ctx_dim) on the CPU} of all prompts and negative prompts."""
    texts = {text: None for job in jobs for text in (job.prompt, job.negative_prompt)}
    return {text: te([as_trained(text, settings)])[0].cpu() for text in texts}


def batches(jobs, batch_size):
    """Neighbors that are alike but for prompt and seed, at most batch_size at a time."""
    for _, alike in itertools.groupby(jobs, key=lambda job: replace(job, prompt="", seed=0, number=0)):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


def source_pixels(job):
    """-> init_image, (height, width, 3) uint8, and mask, (height, width) bool, True is redrawn, in the job's
    size; None for what is not given."""
    image, mask = load_source(job.init_image, job.mask)
    if image is not None:
        image = np.array(fitted(image, job.width, job.height, Image.BICUBIC))
    if mask is not None:
        mask = np.array(fitted(mask, job.width, job.height, Image.NEAREST)) > 127
    return image, mask


def guidance_of(model, texts, jobs, shape, generators):
    """-> hdm.Guidance of a batch whose latents have this shape (C, h, w)."""
    job = jobs[0]
    device = model.in_patch.proj.weight.device
    rows, columns = shape[1] // model.config.patch_size, shape[2] // model.config.patch_size
    camera = torch.tensor([job.y_shift, job.x_shift])
    pos = (hdm.grid_positions(rows, columns, model.config.pos) + camera) / job.zoom          # (N, 2)

    def pick(rate):                                          # (B, R) tokens that TREAD keeps; None: all
        if rate == 0:
            return None
        picked = [hdm.pick_tokens(1, rows * columns, rate, generator) for generator in generators]
        return torch.cat(picked).to(device)

    def picks():
        return pick(job.tread_cond), pick(job.tread_uncond)
    ctx, ctx_mask = hdm.stack_texts([texts[one.prompt].to(device) for one in jobs])
    uncond = texts[job.negative_prompt].to(device).repeat(len(jobs), 1, 1)
    aspect = torch.full((len(jobs),), math.log(job.width / job.height), device=device)
    return hdm.Guidance(model, ctx, uncond, job.cfg, ctx_mask, aspect=aspect, pos=pos, picks=picks,
                        interval=(job.cfg_low, job.cfg_high), rescale=job.cfg_rescale)


def sample_latents(model, vae, texts, jobs, source, on_step):
    """-> latents (B, C, h, w) of jobs, one of batches; source: source_pixels; others as in sample_images."""
    job = jobs[0]                                            # the others differ in prompt and seed alone
    device = model.in_patch.proj.weight.device
    shape = model.config.in_channels, job.height // vae_factor(vae), job.width // vae_factor(vae)
    generators = [torch.Generator().manual_seed(one.seed) for one in jobs]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    guidance = guidance_of(model, texts, jobs, shape, generators)
    times = hdm.sampling_times(job.steps, job.t_shift)
    x = noise
    init_image, mask = source
    if init_image is not None:
        known = torch.from_numpy(init_image).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
        if vae is not None:
            known = vae.encode(known)                        # (1, C, h, w)
        times = times[-1 - round(job.steps * job.strength):]
        x = times[0] * noise + (1 - times[0]) * known
    if mask is not None:                                     # a cell is redrawn if any of its pixels is
        cells = torch.from_numpy(mask)[None, None].to(device).float()
        redrawn = torch.nn.functional.max_pool2d(cells, vae_factor(vae)) > 0          # (1, 1, h, w)

    def velocity(x, t):
        with hdm.SHARED_CPU.work(device):
            v = guidance(x, t)
        if mask is not None:                                 # what stays goes straight from noise to itself
            v = torch.where(redrawn, v, noise - known)
        on_step(t, x - t * v)
        return v
    return hdm.SAMPLERS[job.sampler](velocity, x, times)


def ignore(t, x0):
    """An on_step that does nothing."""


@torch.inference_mode()
def sample_images(model, vae, texts, jobs, on_step=ignore):
    """Samples jobs, one of batches, as resolved; texts as from encode_texts. Yields for each its image
    (height, width, 3) uint8 and its latent (C, h, w).

    All that is random comes from an image's own seed, on the CPU: the same in any batch, on any device.
    on_step is called at each time t, the last is 0, with what x0 (B, C, h, w) looks like by then. A latent
    that is not finite is sampled again in float32, with a warning.
    """
    source = source_pixels(jobs[0])
    x = sample_latents(model, vae, texts, jobs, source, on_step)
    on_step(0, x)
    init_image, mask = source
    dtype = model.in_patch.proj.weight.dtype                 # of the matrix products, if not autocast's
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    for job, latent in zip(jobs, x):                         # the VAE takes one at a time: less memory
        name = f"image {job.number:05d}-{job.seed}, {job.prompt[:60]!r}"
        if dtype != torch.float32 and not latent.isfinite().all():
            hdm.warn(f"{name}: its latent is not finite in {str(dtype)[6:]}: sampled again in float32")
            with hdm.in_float32(model):
                latent = sample_latents(model, vae, texts, [job], source, ignore)[0]
        if not latent.isfinite().all():
            hdm.warn(f"{name}: its latent is not finite in float32")
        pixels = latent[None] if vae is None else vae.decode_each(latent[None], name)
        image = to_uint8(pixels)[0]
        if mask is not None:
            image = np.where(mask[..., None], image, init_image)
        yield image, latent


def generate(model, vae, te, prompts, seeds, settings, batch_size=32, **image_settings):
    """-> (n, height, width, 3) uint8 images, one for each prompt with its seed, of these ImageSettings.
    Under torchrun each process samples its part, and gets all."""
    job = resolved(Job(**image_settings), settings, model, vae)
    numbered = enumerate(zip(prompts, seeds))
    jobs = [replace(job, prompt=prompt, seed=seed, number=i) for i, (prompt, seed) in numbered]
    jobs = hdm.of_this_rank(jobs)
    texts = encode_texts(te, jobs, settings)
    images = []
    for batch in batches(jobs, batch_size):
        images += [image for image, _ in sample_images(model, vae, texts, batch)]
    parts = hdm.gather(images)                               # of n processes the first has 0, n, 2 n, ...
    return np.stack([parts[i % len(parts)][i // len(parts)] for i in range(len(prompts))])


def advise(job, size):
    """Warns of a job's size that a model trained at this size is not good at (HDM's model card)."""
    tall = job.width == size <= job.height
    wide = job.width > job.height and job.height <= size and job.width * job.height >= size ** 2
    if not tall and not wide:
        print(f"warning: {job.width}x{job.height}: a model trained at {size} px does best {size} wide and "
              f"at least as high, or wider than high, at most {size} high, of {size}x{size} pixels or more")


@dataclass
class Checkpoint:
    """What samples: open_checkpoint makes it."""
    model: hdm.XUT
    vae: hdm.VAE | None
    settings: dict                 # as from load_model
    load_te: typing.Callable       # () -> its text encoder
    provenance: dict               # settings of the program that go into each image's file; model_hash


def encode_prompts(te, jobs, settings):
    """encode_texts, and a warning of each text that is too long."""
    states = encode_texts(te, jobs, settings)
    for text in states:
        tokens = len(te.tokenizer(as_trained(text, settings))["input_ids"])
        if tokens > te.max_length:
            print(f"warning: of {tokens} tokens the model reads {te.max_length}: {text[:60]!r} ...")
    return states


def job_file(job, image, options, provenance):
    """The bytes of an image's file, with its settings in them."""
    text = "" if options.no_metadata else parameters(job, provenance["model_hash"])
    record = asdict(replace(job, number=0)) | provenance
    return encode_file(image, options.file_type, text, json.dumps(record))


def sample_files(checkpoint, jobs, options, progress):
    """Samples this process's part of jobs and writes each as a new file of options.out. Yields the paths.

    At each step progress is called with how many images are done, a float, and x0 (B, C, h, w) as it is then.
    """
    model, vae, settings = checkpoint.model, checkpoint.vae, checkpoint.settings
    load_source.cache_clear()                                # since the last call a file may have changed
    jobs = [resolved(job, settings, model, vae) for job in jobs]
    sizes = {(job.width, job.height): job for job in jobs}
    for job in sizes.values():
        advise(job, settings["image_size"])
    texts = encode_prompts(checkpoint.load_te(), jobs, settings)     # its memory is free again
    done = 0

    def on_step(t, x0):
        progress(done + len(x0) * (1 - t), x0)
    for batch in batches(hdm.of_this_rank(jobs), options.batch_size):
        for job in batch:                                    # what no file can hold fails before it is made
            blank = np.zeros((job.height, job.width, 3), np.uint8)
            job_file(job, blank, options, checkpoint.provenance)
        for job, (image, latent) in zip(batch, sample_images(model, vae, texts, batch, on_step)):
            path = Path(options.out, f"{job.number:05d}-{job.seed}.{options.file_type}")
            path = write_new(path, job_file(job, image, options, checkpoint.provenance))
            if options.latents_out:
                write_new(path.with_suffix(".safetensors"), save({"latent": latent.float().cpu()}))
            yield path
        done += len(batch)


# ---- the weights of other programs -------------------------------------------------------------------------
ADAPTER = re.compile(r"(?i)(?<![a-z])(lycoris|lora|dora|lokr|loha|hada|b?oft|ia3)[._]")
AVERAGED = re.compile(r"(?i)(?<![a-z])(ema|swa)(?![a-z])")
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|module|_\w+_module)\.")               # by compile, DDP, FSDP
NOT_XUT = re.compile(r"vae\.|vae_(mean|std)$|n_averaged$|(te|text_encoders?|text_model|cond_stage_model)\.")


def xut_part(tensors, path, ema):
    """A file's tensors -> those of XUT, by their own names, and the others. XUT's have the prefix in front of
    ctx_proj.weight, such as unet.model."""
    adapters = [name for name in tensors if ADAPTER.search(name)]
    if adapters:
        raise hdm.UserError(f"{path}: holds {len(adapters)} adapter weights ({adapters[0]}, ...): sample.py "
                            f"takes them as --adapter={path} with their base as --ckpt, and can merge them "
                            f"by --export")
    plain = {WRAPPER.sub("", name): value for name, value in tensors.items()}
    found = [name for name in plain if re.search(r"(^|\.)ctx_proj\.weight$", name)]
    prefixes = [name.removesuffix("ctx_proj.weight") for name in found]
    if not prefixes:
        raise hdm.UserError(f"{path}: neither a checkpoint of ours nor a published one (no unet.model.* and "
                            f"no ctx_proj.weight); it holds {', '.join(list(tensors)[:3])}, ...")
    averaged = [one for one in prefixes if AVERAGED.search(one)]
    trained = [one for one in prefixes if one not in averaged]
    prefix, *more = averaged if averaged and (ema or not trained) else trained
    if more or len(plain) < len(tensors):
        names = ", ".join(f"{one}*" for one in prefixes)
        raise hdm.UserError(f"{path}: holds several models ({names}); keep one of them in it")

    # Without a prefix all names begin with it: of another XUT, of a VAE, of a text encoder.
    longer = tuple(one for one in prefixes if len(one) > len(prefix))
    own, others = {}, {}
    for name, value in plain.items():
        foreign = name.startswith(longer) or (prefix == "" and NOT_XUT.match(name))
        if name.startswith(prefix) and not foreign:
            own[name.removeprefix(prefix)] = value
        else:
            others[name] = value
    report_unread(others, prefix, path)
    return own, others


def report_unread(others, prefix, path):
    """Reports which of a file's tensors are neither XUT's nor a known part's, the first of each kind."""
    unread = [name for name in others if not NOT_XUT.match(name)]
    kinds = {}
    for name in unread:
        kinds.setdefault(name.partition(".")[0], name)
    if unread:
        print(f"{path}: {prefix}* is read; {len(unread)} other tensors are not, such as "
              f"{', '.join(list(kinds.values())[:5])}")


def count_blocks(tensors, prefix):
    """How many different numbers follow the prefix in the names of tensors."""
    matches = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors]
    return len({match[1] for match in matches if match})


def config_from_tensors(tensors, path):
    """The XUTConfig of a file without one, by names and shapes; the rest as published."""
    with hdm.naming(path, "not an XUT checkpoint"):
        dim, in_channels, patch_size, _ = tensors["in_patch.proj.weight"].shape             # (D, C, p, p)
        _, ctx_dim = tensors["ctx_proj.weight"].shape                                       # (D, ctx_dim)
        heads, quarter, _ = tensors["backbone.enc_blocks.0.0.attn.rope.freqs"].shape        # (H, K / 4, 2)
        _, mlp_dim = tensors["backbone.enc_blocks.0.0.mlp.w3.weight"].shape                 # (D, mlp_dim)
        return hdm.XUTConfig(
            dim=dim, ctx_dim=ctx_dim, heads=heads, head_dim=4 * quarter, mlp_dim=mlp_dim,
            depth=count_blocks(tensors, "backbone.enc_blocks"),
            enc_blocks=count_blocks(tensors, "backbone.enc_blocks.0"),
            dec_blocks=count_blocks(tensors, "backbone.dec_blocks.0"),
            pre_blocks=count_blocks(tensors, "prev_tread_trns.blocks"),
            post_blocks=count_blocks(tensors, "post_tread_trns.blocks"), patch_size=patch_size,
            in_channels=in_channels, aspect_cond="addon_info_embs_proj.0.weight" in tensors)


def find_weights(name, ema):
    """A run, checkpoint, diffusers-style folder, file or hub id -> its file of weights or their index."""
    if not hdm.looks_local(name):
        if name == RELEASED:
            print(f"weights: {name}, license CC-BY-NC-SA 4.0 (no commercial use)")
        return hdm.fetch(name, RELEASED_FILE, "checkpoint")
    path = (hdm.list_checkpoints(name) or [Path(name)])[-1]  # a run's last, else what is named
    if path.is_file():
        return path
    places = [(path, "model"), (path / "transformer", "diffusion_pytorch_model"),
              (path, "diffusion_pytorch_model")]
    if ema:
        places.insert(0, (path, "ema"))
    for folder, stem in places:
        file = hdm.weights_in(folder, stem)
        if file is not None:
            return file
    raise hdm.UserError(f"checkpoint {name}: neither a file nor a folder with model.safetensors or ckpt_*")


def find_encoders(settings, path, ours):
    """Points a checkpoint's settings to the encoders that lie beside its file: small ones move with it."""
    in_parts = path.absolute().parent.name == "transformer"  # a folder as diffusers has them
    folder = path.absolute().parents[1] if in_parts else path.parent
    if not ours and not in_parts:                            # what lies beside a bare file is not its own
        return
    for part in ("vae", "text_encoder"):
        has_none = ours and settings[part] == ""             # such as a model that works on pixels
        if (folder / part).is_dir() and not has_none:
            settings[part] = str(folder / part)


@contextlib.contextmanager
def expecting(path, part, place, given):
    """An error of the block says where a checkpoint expects its encoder, unless another place was given."""
    try:
        yield
    except hdm.UserError as error:
        if given:
            raise
        raise hdm.UserError(f"{path}: its {part.replace('_', ' ')} is expected at {place} ({error}); "
                            f"sample.py's --{part}=PLACE, a folder or hub id, names another") from error


def model_hash(*files):
    """SHA-256 of some files of weights; of one in shards, of the index and then of the shards by name."""
    digest = hashlib.sha256()
    for file in files:
        shards = hdm.shard_files(file) if file.suffix == ".json" else []
        for one in [file, *shards]:
            digest.update(np.memmap(one, np.uint8, "r"))     # mapped: no copy of it
    return digest.hexdigest()


def header_settings(metadata, path):
    """The settings in the header of a file of ours; of others None."""
    if "hdm" not in metadata:
        return None
    with hdm.naming(path, "broken settings in its header"):
        settings = PUBLISHED | json.loads(metadata["hdm"])
        return settings | dict(config=hdm.XUTConfig(**settings["config"]))


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, ema=True, with_vae=True, merge=True,
               base=""):
    """-> (XUT, VAE or None, settings) from our checkpoints or from any layout of the published weights.

    settings is a dict: config (the XUTConfig), text_encoder, text_length, tag_separator, spaces, vae,
    image_size, step, images, and for sampling steps, cfg, cfg_low, t_shift. ema=True takes the averaged
    weights where it has them. Of an adapter run XUT is its base with the adapter merged; merge=False: without
    it, and settings has base and base_hash. base: another place of it, where it is not where it was.
    """
    path = find_weights(path_or_hub_id, ema)
    tensors, metadata = hdm.read_tensors(path)
    settings = header_settings(metadata, path)
    ours = settings is not None
    is_adapter = ours and "base" in settings
    of_run = ours and "ctx_proj.weight" in tensors           # XUT alone, by its own names
    vae_tensors = None                                       # of a VAE in the same file
    if not is_adapter and not of_run:
        tensors, others = xut_part(tensors, path, ema)
        if hdm.part_of(others, "vae."):
            vae_tensors = others
    if not ours:                                             # a published file, Lightning's, diffusers', bare
        settings = dict(config=config_from_tensors(tensors, path), text_encoder=hdm.TEXT_ENCODER,
                        text_length=512, vae="", step=0, images=0, **PUBLISHED)
    find_encoders(settings, path, ours)
    if vae_tensors is not None:
        settings["vae"] = str(path)
    vae = None
    if settings["vae"] and with_vae:
        with expecting(path, "vae", settings["vae"], given=vae_tensors is not None):
            vae = hdm.load_vae(settings["vae"], device, dtype, vae_tensors)
    if is_adapter:
        model = load_base(settings, path, place_of_base(settings, base), device, dtype, may_differ=merge)
        if merge:
            merge_tensors(model, tensors, path, 1.0)
            settings = {name: settings[name] for name in settings if name not in ("base", "base_hash")}
    else:
        build = partial(hdm.XUT, settings["config"], init=False)
        model = hdm.load_strict(build, tensors, path, device, dtype)
    return model, vae, settings


def load_text_encoder(settings, device="cpu", dtype=None, place=""):
    """The TextEncoder that a checkpoint's settings name; place: another place of it."""
    name = place or settings["text_encoder"]
    with expecting("the checkpoint", "text_encoder", name, given=place):
        te = hdm.TextEncoder(name, settings["text_length"], device, dtype)
    if te.dim != settings["config"].ctx_dim:
        raise hdm.UserError(f"text encoder {name}: {te.dim} wide, but the model was trained with "
                            f"ctx_dim={settings['config'].ctx_dim}; name the text encoder of its training")
    return te


# ---- adapters: of runs here and of other programs ----------------------------------------------------------
# The end of a tensor's name: what of an adapter it is. Not read are Tucker's third factors (lora_mid,
# lokr_t2, hada_t1), DoRA's dora_scale, and any other.
PART = re.compile(r"\.(lora_(?:up|down|A|B)|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|diff(?:_b)?|[wb]_norm|alpha)"
                  r"(?:\.default)?(?:\.weight)?$")
OUR_NAMES = dict(lora_A="lora_down", lora_B="lora_up")       # of PEFT's


def place_of_base(settings, other):
    """Where the base of an adapter is, by the settings in its header; or, if it is gone from there, other."""
    base = settings["base"]
    return other if other and hdm.looks_local(base) and not os.path.exists(base) else base


def load_base(settings, path, base, device, dtype, may_differ):
    """The XUT at base, that the adapter in path was trained on, by its header's settings; where that file is
    another by now, it is refused, or with may_differ reported."""
    with hdm.naming(path, f"its base is expected at {base}; sample.py takes another place of that as --ckpt, "
                          f"with --adapter={path}"):
        file = find_weights(base, ema=True)
        model, _, _ = load_model(file, device, dtype, with_vae=False)
    digest = model_hash(file)
    if digest != settings["base_hash"]:
        line = f"{path}: was trained on the model {settings['base_hash'][:10]}; {base} is {digest[:10]} now"
        if not may_differ:
            raise hdm.UserError(line)
        hdm.warn(line)
    return model


def find_adapter(name, ema):
    """A run, a checkpoint, a folder of PEFT's or a file -> the adapter's file."""
    if not os.path.exists(name):
        raise hdm.UserError(f"--adapter={name}: no such file or folder")
    return hdm.weights_in(Path(name), "adapter_model") or find_weights(name, ema)


def split_strength(text):
    """'a.safetensors:0.8' -> 'a.safetensors', 0.8"""
    name, _, strength = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if name and math.isfinite(float(strength)):
            return name, float(strength)
    return text, 1.0


def peft_alphas(tensors, path):
    """{layer.alpha: its number} of PEFT's adapters, whose json beside the file says them."""
    pairs = {name.partition(".lora_A.")[0]: value for name, value in tensors.items() if ".lora_A." in name}
    file = path.with_name("adapter_config.json")
    if not pairs or not file.is_file():
        if any(name.startswith("base_model.") for name in pairs):
            raise hdm.UserError(f"{path}: {file.name}, which has its lora_alpha, is missing beside it")
        return {}
    with hdm.naming(file, "not the settings of a LoRA of PEFT"):
        config = json.loads(hdm.read_text(file))
        if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
            raise hdm.UserError(f"{file}: only LoRA is read, without use_dora")
        alphas = {}
        for layer, down in pairs.items():
            patterns = config.get("alpha_pattern") or {}
            own = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)]
            alpha = (own or [config["lora_alpha"]])[0]
            if config.get("use_rslora"):                     # alpha / sqrt(r)
                alpha *= len(down) ** 0.5
            alphas[f"{layer}.alpha"] = torch.tensor(float(alpha))
        return alphas


def adapter_parts(model, tensors, path):
    """An adapter's tensors, named by any program -> {name of XUT's weight: {part: tensor}}.

    The layer's name may have _ for its dots, and any prefix: lora_unet_, diffusion_model., lycoris_model_. Of
    the authors' Lightning checkpoints that is read which stands under lycoris_model.
    """
    tensors = hdm.part_of(tensors, "lycoris_model.") or tensors
    weights = {name.replace(".", "_"): name for name, _ in model.named_parameters()}
    tops = "|".join({name.partition(".")[0] for name in weights.values()})
    adapter, unknown = {}, []
    for key, value in (tensors | peft_alphas(tensors, path)).items():
        match = PART.search(key)
        layer = match and re.search(rf"(?:^|_)((?:{tops})(?:_.*)?)$", key[:match.start()].replace(".", "_"))
        name = None
        if layer:
            part = OUR_NAMES.get(match[1], match[1])
            name = weights.get(f"{layer[1]}_bias" if part in ("diff_b", "b_norm") else f"{layer[1]}_weight")
        if name is None or part in adapter.get(name, {}):
            unknown.append(key)
        elif not hdm.is_finite(value.float()):
            raise hdm.UserError(f"{path}: {key} is not finite")
        else:
            adapter.setdefault(name, {})[part] = value
    if unknown or not adapter:
        raise hdm.UserError(f"{path}: LoRA, LoKr, LoHa and diff of XUT's layers are read, no DoRA or Tucker, "
                            f"and none twice; {len(unknown)} others are in it: {', '.join(unknown[:3])}")
    return adapter


def merge_tensors(model, tensors, path, strength):
    with hdm.naming(path, "not an adapter of this model"):
        hdm.merge_adapter(model, adapter_parts(model, tensors, path), strength)


def merge_adapters(model, adapters, ema, digest):
    """Merges what --adapter names into a model whose file has this hash. -> the adapters' files."""
    files = []
    for text in filter(None, adapters):                      # --adapter= takes those of --from_image away
        name, strength = split_strength(text)
        file = find_adapter(name, ema)
        tensors, metadata = hdm.read_tensors(file)
        merge_tensors(model, tensors, file, strength)
        expected = (header_settings(metadata, file) or {}).get("base_hash", digest)
        if expected != digest:
            hdm.warn(f"--adapter={text}: was trained on the model {expected[:10]}; this one is {digest[:10]}")
        files.append(file)
    return files


# ---- the weights for other programs ------------------------------------------------------------------------
# What ComfyUI's loader has built in, in place of reading it from the file: the shapes of hdm.PRESETS["base"],
# Qwen3-0.6B, and these latents_mean and latents_std of EQ-SDXL-VAE's config.json. report_readers compares.
EQ_STATISTICS = (
    (-3.865960634760459, -1.3353925720045965, 0.8353661802812418, 0.909888159310023),
    (10.036514488374861, 6.848430044716239, 7.213817552213277, 5.591315799887989))


def published_shapes(c):
    """{name: shape} of XUT's tensors in the published layout, from the config c: a fork's XUT may differ."""
    D, mlp, p = c.dim, c.mlp_dim, c.patch_size
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def attention(name):
        shapes[f"{name}_pre_norm.norm.weight"] = D,
        shapes[f"{name}.rope.freqs"] = c.heads, c.head_dim // 4, 2
        layer(f"{name}.out", D, D)

    def block(name, crosses):
        shapes[f"{name}.mlp_pre_norm.norm.weight"] = D,
        layer(f"{name}.mlp.w12", 2 * mlp, D)
        layer(f"{name}.mlp.w3", D, mlp)
        attention(f"{name}.attn")
        shapes[f"{name}.attn.qkv.weight"] = 3 * D, D
        if crosses:
            attention(f"{name}.xattn")
            shapes[f"{name}.xattn.q.weight"] = D, D
            shapes[f"{name}.xattn.kv.weight"] = 2 * D, D
    layer("in_patch.proj", D, c.in_channels, p, p)
    layer("out_patch.proj", p * p * c.in_channels, D)
    layer("time_emb.proj.0", D, D)
    shapes["time_emb.freqs"] = 1, D // 2
    layer("ctx_proj", D, c.ctx_dim)
    if c.aspect_cond:
        layer("addon_info_embs_proj.0", D, 1)
        layer("addon_info_embs_proj.2", D, D)
    for part in ("attn", "xattn", "ffw"):
        layer(f"shared_adaln_{part}.0", D)
        layer(f"shared_adaln_{part}.1", 4 * D, D)
        layer(f"shared_adaln_{part}.3", 3 * D, 4 * D)
    for i in range(c.pre_blocks):
        block(f"prev_tread_trns.blocks.{i}", crosses=False)
    for i in range(c.post_blocks):
        block(f"post_tread_trns.blocks.{i}", crosses=False)
    for level in range(c.depth):
        for i in range(c.enc_blocks):
            block(f"backbone.enc_blocks.{level}.{i}", crosses=False)
        for i in range(c.dec_blocks):
            block(f"backbone.dec_blocks.{level}.{i}", crosses=i == 0)
    return shapes


def pipeline_configs(c, vae, text_length, encoder):
    """{file: its json} of a folder that the authors' diffusers pipeline loads.

    The keys are the arguments of its classes, which take no others; _class_name and model_index.json name
    these classes. test_the_jsons_of_an_exported_folder_are_the_authors compares with the published files.
    """
    tread = dict(dropout_ratio=0.5, prev_trns_depth=c.pre_blocks, post_trns_depth=c.post_blocks)
    transformer = dict(
        patch_size=c.patch_size, input_dim=c.in_channels, dim=c.dim, ctx_dim=c.ctx_dim, ctx_size=text_length,
        heads=c.heads, dim_head=c.head_dim, mlp_dim=c.mlp_dim, depth=c.depth, enc_blocks=c.enc_blocks,
        dec_blocks=c.dec_blocks, dec_ctx=False, class_cond=0, shared_adaln=True, concat_ctx=True,
        use_dyt=False, double_t=False, addon_info_embs_dim=1 if c.aspect_cond else None, tread_config=tread)
    scheduler = "FlowMatchEulerDiscreteScheduler"
    index = dict(
        _class_name="HDMXUTPipeline", transformer=["hdm.modules.xut", "XUDiTConditionModel"],
        text_encoder=["transformers", encoder], tokenizer=["transformers", "PreTrainedTokenizerFast"],
        vae=["diffusers", "AutoencoderKL"], scheduler=["diffusers", scheduler])
    configs = {
        "model_index.json": index, "transformer/config.json": transformer,
        "scheduler/scheduler_config.json": dict(_class_name=scheduler, num_train_timesteps=1000, shift=1.0)}
    if vae is None:
        index["vae"] = [None, None]
    else:                                                    # HDM has statistics in place of the factors
        configs["vae/config.json"] = vae.diffusers_config() | dict(
            latents_mean=vae.mean, latents_std=vae.std, scaling_factor=1.0, shift_factor=None)
    return configs


def find_text_encoder(settings):
    """-> the text encoder's folder, perhaps in the hub's cache, and its class; where it is missing, which is
    reported, None and the published one's class."""
    import huggingface_hub
    place = settings["text_encoder"]
    try:
        if not hdm.looks_local(place):
            place = huggingface_hub.snapshot_download(place, local_files_only=True)
        te = load_text_encoder(dict(settings, text_encoder=place), dtype=torch.bfloat16)
        return Path(place), type(te.model).__name__
    except hdm.UserError as error:
        why = error
    except (OSError, ValueError):
        why = "it is not in the hub's cache"
    print(f"missing: text_encoder/ and tokenizer/ of {settings['text_encoder']}, which other programs "
          f"need ({why}); --text_encoder=FOLDER names another place of it")
    return None, "Qwen3Model"


def copy_files(source, folder, weights):
    """Copies a folder's files, with its weights or without. No copytree: modes and subfolders stay behind."""
    folder.mkdir()
    for file in source.iterdir():
        holds_weights = ".safetensors" in file.name or ".bin" in file.name
        if file.is_file() and not file.name.startswith(".") and (weights or not holds_weights):
            shutil.copyfile(file, folder / file.name)


def write_folder(folder, tensors, config, vae, settings):
    """Writes a diffusers-style folder, with a copy of the text encoder. settings: for the files' headers."""
    folder.mkdir()
    te_folder, encoder = find_text_encoder(settings)
    if te_folder is not None:
        has_tokenizer = any(te_folder.glob("tokenizer*"))    # else it is in the folder beside it
        tokenizer = te_folder if has_tokenizer else te_folder.with_name("tokenizer")
        copy_files(te_folder, folder / "text_encoder", weights=True)
        copy_files(tokenizer, folder / "tokenizer", weights=False)
    for name, content in pipeline_configs(config, vae, settings["text_length"], encoder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    for part, prefix in dict(transformer="unet.", vae="vae.").items():
        weights = hdm.part_of(tensors, prefix)
        if weights:
            hdm.save_model(folder / part / "diffusion_pytorch_model.safetensors", weights, settings)


def report_readers(path, config, vae, settings):
    """Prints which programs read an export, and what of it they do not see."""
    reader = "the authors' diffusers pipeline" if path.is_dir() else "the authors' tools"
    reasons = ["a folder"] if path.is_dir() else []
    encoder = Path(settings["text_encoder"]).name
    if encoder != "Qwen3-0.6B":
        reasons.append(f"the text encoder ({encoder})")
    if published_shapes(config) != published_shapes(hdm.PRESETS["base"]):
        reasons.append("the shapes")
    statistics = vae.mean, vae.std
    if len(vae.mean) != 4 or not np.allclose(statistics, EQ_STATISTICS, rtol=2e-3):   # rounded to fp16
        reasons.append("the statistics")
    if reasons:
        print(f"read by sample.py, {reader}\nnot read by ComfyUI's loader, which takes a file of the base "
              f"model's shapes (343M) and has Qwen3-0.6B and EQ-SDXL-VAE's statistics built in; other here: "
              f"{', '.join(reasons)}")
    else:
        print(f"read by sample.py, {reader}, ComfyUI's loader")
    if settings["t_shift"] != 1:
        print(f"not carried: t_shift={settings['t_shift']:g}; other programs sample with 1")


def unknown_to_others(model, vae):
    """What of a model other programs cannot read, or would make noise with."""
    unknown = []
    for name in ("aspect_cond", "skips", "residual", "pos", "prediction"):
        value = getattr(model.config, name)
        if value != getattr(hdm.XUTConfig, name):
            unknown.append(f"{name}={value}")
    if vae is None:
        unknown.append("no VAE (pixels)")
    known = published_shapes(model.config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    strange = [name for name in known | shapes if known.get(name) != shapes.get(name)]
    if strange:
        unknown.append(f"{len(strange)} tensors not of the published layout ({', '.join(strange[:3])})")
    return unknown


def published_tensors(model, vae):
    """{name: tensor} of model and VAE in float16 with the published names."""
    weights = model.state_dict()
    tensors = {f"unet.model.{name}": value.half() for name, value in weights.items()}
    if "time_emb.freqs" in weights:                          # 1000 t times those in fp16 is off by 0.16 rad
        tensors["unet.model.time_emb.freqs"] = weights["time_emb.freqs"].float()
    if vae is not None:
        tensors |= {f"vae.{name}": value.half() for name, value in vae.state_dict().items()}
        tensors["vae_mean"] = torch.tensor(vae.mean).half()[None, :, None, None]      # (1, C, 1, 1)
        tensors["vae_std"] = torch.tensor(vae.std).half()[None, :, None, None]
    return tensors


def export(path, model, vae, settings, force=False):
    """Write model and VAE in fp16 as published: a new FILE.safetensors, else a new diffusers-style folder.

    The settings (as from load_model) go into the header, for load_model; other programs do not look there,
    and would make noise with options that are not the published ones: those need force.
    """
    path = Path(path)
    unknown = unknown_to_others(model, vae)
    if unknown and not force:
        raise hdm.UserError(f"--export={path}: other programs cannot read {', '.join(unknown)}; --force "
                            f"writes it, with its settings in the header, for sample.py alone")
    if path.exists():
        raise hdm.UserError(f"--export={path}: is there already, and is not overwritten; choose another name")
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
        raise hdm.UserError(f"--export={path}: a FILE.safetensors or a folder is written")
    hdm.make_folder(path.absolute().parent, "--export")
    tensors = published_tensors(model, vae)
    large = [name for name, value in tensors.items() if not hdm.is_finite(value)]
    if large:
        raise hdm.UserError(f"--export={path}: fp16 ends at 65504, too early for {', '.join(large[:3])}")
    header = dict(settings, vae="" if vae is None else "vae")    # load_model finds it where it lies
    with (hdm.naming(path, "cannot be written"),
          hdm.scratch_folder(path.absolute().parent, ".export-") as scratch):
        temporary = scratch / "new"                          # gets its place when it is complete
        if path.suffix.lower() == ".safetensors":
            hdm.save_model(temporary, tensors, header)
        else:
            write_folder(temporary, tensors, model.config, vae, header)
        os.rename(temporary, path)
    if unknown:
        print(f"{path}: written, in float16, for sample.py alone")
    else:
        print(f"{path}: written, in float16")
        report_readers(path, model.config, vae, settings)


# ---- commands ----------------------------------------------------------------------------------------------
@dataclass
class Command:
    """A command line, read."""
    flags: dict                    # {setting: value}, those that were typed
    options: Sampling
    defaults: ImageSettings        # of every image
    expected_hash: str | None      # of the model that drew --from_image
    rank: int                      # of this process under torchrun; 0 without
    device: str
    dtype: torch.dtype


def read_command(argv):
    """Command line -> Command. Under torchrun this joins the other processes."""
    if argv and not argv[0].startswith("-"):
        raise hdm.UserError(f"{argv[0]}: a prompt is given by --prompt {shlex.quote(' '.join(argv))}")
    doc = f"{__doc__.rstrip()}\n\nSamplers: {', '.join(hdm.SAMPLERS)}."
    _, flags = hdm.parse_args(argv, [ImageSettings, Sampling], doc=doc, aliases=ALIASES)
    values = flags
    expected_hash = None
    if "from_image" in flags:
        recorded, expected_hash = read_record(flags["from_image"])
        if "prompts" in flags or "slots" in flags:           # in place of its prompt
            del recorded["prompt"]
        values = recorded | flags
    of_images = {name: value for name, value in values.items() if name in IMAGE_SETTINGS}
    of_program = {name: value for name, value in values.items() if name not in IMAGE_SETTINGS}
    defaults, options = ImageSettings(**of_images), Sampling(**of_program)
    rank, _ = hdm.start_ranks()
    device = hdm.pick_device(options.device)
    dtype = hdm.pick_dtype(options.dtype, device)
    if options.export:                                       # copies weights, and computes nothing
        device, dtype = "cpu", torch.float32
    return Command(flags, options, defaults, expected_hash, rank, device, dtype)


def open_checkpoint(name, file, command):
    """-> the Checkpoint of --ckpt=name, whose weights are in file, with the encoders that are asked for."""
    options, device, dtype = command.options, command.device, command.dtype
    model, vae, settings = load_model(file, device, dtype, options.ema, with_vae=not options.vae)
    channels = model.config.in_channels
    if options.vae or (vae is None and channels == 4):       # published without its VAE
        settings["vae"] = options.vae or hdm.EQ_VAE
        with expecting(name, "vae", settings["vae"], given=options.vae):
            vae = hdm.load_vae(settings["vae"], device, dtype)
    vae_channels = 3 if vae is None else vae.latent_channels
    if vae_channels != channels:
        whose = "and it has no VAE" if vae is None else f"those of the VAE {settings['vae']} {vae_channels}"
        raise hdm.UserError(f"--ckpt={name}: its latents have {channels} channels, {whose}; --vae=PLACE "
                            f"names another, a folder, file or hub id")
    settings["text_encoder"] = options.text_encoder or settings["text_encoder"]
    load_te = partial(load_text_encoder, settings, device, dtype, options.text_encoder)
    files = [file]
    if options.adapter:
        files += merge_adapters(model, options.adapter, options.ema, model_hash(file))
    provenance = dict(adapter=options.adapter, ema=options.ema, text_encoder=options.text_encoder,
                      vae=options.vae, dtype=str(dtype)[6:], model_hash=model_hash(*files))
    if command.expected_hash not in (None, provenance["model_hash"]):
        print(f"warning: {options.from_image} was made by the model {command.expected_hash[:10]}; {name} is "
              f"{provenance['model_hash'][:10]}")
    return Checkpoint(model, vae, settings, load_te, provenance)


def warn_idle(command, jobs, settings):
    """Warns of each flag that has no effect in any job, and of a prompt line's settings that have none."""
    calls = []
    lines = {}                                               # {repr of a line's settings: (these, its call)}
    for job in jobs:
        call = SimpleNamespace(**vars(command.options) | vars(job))
        for name in ("cfg", "cfg_low"):                      # as resolved will do
            if getattr(call, name) is None:
                setattr(call, name, settings[name])
        calls.append(call)
        changed = [name for name in IMAGE_SETTINGS if getattr(job, name) != getattr(command.defaults, name)]
        own = {name: getattr(job, name) for name in changed if name != "seed" and name not in command.flags}
        lines[repr(own)] = own, call                         # the same once
    hdm.warn_idle(command.flags, calls, IDLE)
    for own, call in lines.values():
        hdm.warn_idle(own, [call], IDLE)


def sample_checkpoint(name, file, jobs, command):
    """Samples this process's part of a checkpoint's jobs -> paths of the files."""
    checkpoint = open_checkpoint(name, file, command)
    warn_idle(command, jobs, checkpoint.settings)
    hidden = command.rank > 0 or None                        # None: tqdm shows it on a terminal alone
    with tqdm(total=len(hdm.of_this_rank(jobs)), unit_scale=True, disable=hidden) as bar:
        def progress(done, x0):
            bar.update(done - bar.n)
        return list(sample_files(checkpoint, jobs, command.options, progress))


def make_out_folder(out):
    """Makes the folder of --out; an error where no file can be written there."""
    hdm.make_folder(out, "--out")
    with hdm.naming(f"--out={out}", "no files can be written there"):
        tempfile.TemporaryFile(dir=out).close()


def save_grid(paths, options, layout):
    """Writes a grid of these files; small images are enlarged. layout: arguments of hdm.image_grid."""
    if not options.sheet:
        paths = paths[:100]
    images = [np.array(Image.open(path)) for path in paths]
    grid = hdm.image_grid(images, scale=max(1, 128 // images[0].shape[1]), **layout)
    write_new(Path(options.out, "grid.png"), encode_file(np.array(grid), "png"))


def sample_all(command):
    """Draws what the command asks for, one checkpoint after the other."""
    options = command.options
    jobs = None
    if command.rank == 0:                                    # it reads, and rolls random seeds, for all
        jobs = read_jobs(options, command.defaults, load_tipo)
    jobs = hdm.gather(jobs)[0]
    columns = command.defaults.num_images                    # of the grid: a row for each prompt
    layout = dict(columns=columns if columns > 1 else min(len(jobs), 8))
    if options.sheet:
        jobs, layout = read_sheet(options.sheet, jobs)
    make_out_folder(options.out)
    jobs = hdm.gather(number_files(jobs, Path(options.out)))[0]
    names = dict.fromkeys(job.ckpt for job in jobs)          # each once
    files = {name: find_weights(name, options.ema) for name in names}
    paths = []
    for name, file in files.items():                         # one checkpoint is in memory at a time
        paths += sample_checkpoint(name, file, [job for job in jobs if job.ckpt == name], command)
    paths = sorted(itertools.chain(*hdm.gather(paths)), key=file_number)
    if len(paths) > 1 and command.rank == 0:
        save_grid(paths, options, layout)
    print(f"images: {len(jobs)} in {options.out}, from {jobs[0].number:05d} on")


def main(argv):
    command = read_command(argv)
    options, name = command.options, command.defaults.ckpt
    if not options.export and not options.ui:
        return sample_all(command)
    checkpoint = open_checkpoint(name, find_weights(name, options.ema), command)
    if options.export:
        warn_idle(command, [Job(**vars(command.defaults))], checkpoint.settings)
        if command.rank == 0:
            export(options.export, checkpoint.model, checkpoint.vae, checkpoint.settings, options.force)
    else:
        make_out_folder(options.out)
        Page(checkpoint, options, command.defaults).serve()


# ==== Extras ================================================================================================
# ---- a sheet of settings -----------------------------------------------------------------------------------
def read_axis(text):
    """'steps=8,16' -> {'steps=8': {'steps': 8}, 'steps=16': {'steps': 16}}"""
    name, _, values = text.strip().partition("=")
    axis = {}
    for value in values.split(","):
        label = f"{name}={value.strip()}"
        _, axis[label] = hdm.parse_args(["--" + label], [ImageSettings], aliases=ALIASES)
    return axis


def read_sheet(text, jobs):
    """'steps=8,16;cfg=1,2' -> a Job for each cell, row by row; columns and labels as hdm.image_grid's."""
    with hdm.naming(f"--sheet={text}", "wrong settings in it"):
        axes = [read_axis(part) for part in text.split(";")]
        rows, columns = [{"": {}}, *axes][-2:]               # one axis: a single row, without a label
        pairs = itertools.product(rows.values(), columns.values())
        cells = [replace(jobs[0], **row, **column) for row, column in pairs]
    several = len(jobs) > 1 or any(cell.num_images > 1 or cell.seed < 0 for cell in cells)
    if len(axes) > 2 or several:
        raise hdm.UserError(f"--sheet={text}: one or two settings, and one prompt with one image, whose "
                            f"seed is not -1")
    return cells, dict(columns=len(columns), column_labels=list(columns), row_labels=list(rows))


# ---- TIPO: short prompts made longer -----------------------------------------------------------------------
TIPO = "KBlueLeaf/TIPO-200M-ft"    # a LLaMA that was trained on tags and captions of the same images
TIPO_TOKENS = 512                  # at most, of its words
ENDING = dict(                     # tags that end a prompt: a guess at the common ones
    quality="masterpiece, best quality, high quality, low quality, worst quality",
    rating="safe, sfw, general, sensitive, questionable, nsfw, explicit",
    meta="absurdres, highres, lowres, newest, recent")


def split_prompt(prompt, slots):
    """A prompt of tags and sentences -> {slot of Sampling.format: its part of the prompt}."""
    parts = dict.fromkeys(re.findall(r"<\|(.+?)\|>", Sampling.format), "")
    slot_of = {}                                             # of the tags that are known
    for slot, tags in (*ENDING.items(), *slots.items()):
        if slot in parts:
            for tag in tags.lower().split(","):
                slot_of[hdm.parse_caption(tag, spaces=True)] = slot
    for text in re.split("[,\n]", prompt):
        text = hdm.parse_caption(text, spaces=True)
        if not text:
            continue
        slot = slot_of.get(text.lower(), "general")
        if len(text.split()) > 4:                            # a guess
            slot = "natural language"
        if parts[slot]:
            parts[slot] += ", "
        parts[slot] += text
    return parts


def tipo_request(job, slots):
    """-> the text that TIPO goes on with, and the job's prompt in slots, as from split_prompt.

    The keys, their order and the target are those of TIPO's training (arXiv 2411.08127 and its model card);
    another form gets worse text, not an error. test_what_tipo_reads holds an example.
    """
    parts = split_prompt(job.prompt, slots)
    known = job.width and job.height
    ratio = job.width / job.height if known else 1.0
    tags = [parts[slot] for slot in ("special", "general") if parts[slot]]
    lines = {"rating": parts["rating"], "artist": parts["artist"], "characters": parts["characters"],
             "copyrights": parts["series"], "quality": parts["quality"], "aspect_ratio": f"{ratio:.3f}",
             "target": "<|long|> <|tag_to_long|>", "tag": ", ".join(tags)}
    text = "".join(f"{key}: {value}\n" for key, value in lines.items() if value)
    return f"{text}long: {parts['natural language']}".rstrip(), parts


def cut_before(reply, banned):
    """The sentences of a reply before the first with a banned tag, which other tokens can spell, too."""
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, banned))})(?!\w)"
    match = re.search(pattern, reply.replace("_", " "), re.IGNORECASE)
    if match is None:
        return reply
    return reply[:reply.rfind(".", 0, match.start()) + 1]


def load_tipo(name):
    """-> expand(job, slots): the job's prompt with what TIPO (arXiv 2411.08127) adds to it.

    name: hub id or folder of a causal LM with its tokenizer. On the CPU, in float32: a prompt and a seed get
    the same words on any device. Tags of the negative prompt are not among them.
    """
    import transformers
    if name is True:
        name = TIPO
    with hdm.naming(name, "no causal LM and tokenizer to be had for --tipo"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    def expand(job, slots):
        request, parts = tipo_request(job, slots)
        negative = hdm.parse_caption(job.negative_prompt.lower()).replace("_", " ")
        banned = [tag.strip() for tag in negative.split(",") if tag.strip()]
        forms = [*banned, *map(str.capitalize, banned)]
        forms += [f" {form}" for form in forms]
        tokens = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
        config = transformers.GenerationConfig(              # as TIPO's authors advise
            do_sample=True, temperature=0.35, top_p=0.95, min_p=0.1, top_k=60, repetition_penalty=1.17,
            max_new_tokens=TIPO_TOKENS, stop_strings=["\n"], eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id, bad_words_ids=tokens or None)
        inputs = tokenizer(request, return_tensors="pt")
        with torch.random.fork_rng(devices=[]):              # generate takes no generator of its own
            torch.manual_seed(job.seed)
            output = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)[0]
        added = tokenizer.decode(output[inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        reply = added.partition("\n")[0].strip()
        if banned:
            reply = cut_before(reply, banned)
        if not reply:
            return job.prompt
        parts["natural language"] += " " + reply
        return fill_slots(Sampling.format, parts)
    return expand


# ---- the page ----------------------------------------------------------------------------------------------
ROWS = ("prompt", "negative_prompt", "ratio", "width height steps num_images", "seed sampler cfg t_shift",
        "zoom x_shift y_shift", "tread_cond tread_uncond", "cfg_low cfg_high cfg_rescale tipo")
SLIDERS = dict(zoom=(0.25, 4), x_shift=(-1, 1), y_shift=(-1, 1), tread_cond=(0, 0.9), tread_uncond=(0, 0.9))
RATIOS = "1:1 4:3 3:2 16:9 3:4 2:3 9:16".split()
ENLARGED = "img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"


def advised_size(ratio, size, step):
    """'3:2' -> width and height, multiples of step, that a model trained at this size is good at: advise."""
    w, h = map(int, ratio.split(":"))
    width = size * max(1, w / h) ** 0.5
    height = width * h / w
    return [math.ceil(width / step) * step, math.ceil(height / step) * step]


def preview(vae, latents):
    """What latents (B, C, h, w) look like, at little cost: a shrunk latent is nearly the latent of the shrunk
    image, to which the published VAE was trained down to a quarter (arXiv 2502.09509)."""
    if vae is not None:
        height, width = latents.shape[2:]
        shrink = min(1, 32 / max(height, width))
        size = math.ceil(height * shrink), math.ceil(width * shrink)
        latents = vae.decode(torch.nn.functional.interpolate(latents, size, mode="area"))
    return hdm.image_grid(to_uint8(latents), math.ceil(len(latents) ** 0.5), gap=0)


def make_controls(gr, start):
    """-> {name: gradio's control} of all in ROWS, row by row, with the values in start."""
    makers = dict(prompt=partial(gr.Textbox, lines=3), negative_prompt=gr.Textbox, tipo=gr.Checkbox,
                  sampler=partial(gr.Dropdown, list(hdm.SAMPLERS)), ratio=partial(gr.Radio, RATIOS))
    for name, (low, high) in SLIDERS.items():
        makers[name] = partial(gr.Slider, low, high, step=0.01)
    controls = {}
    for row in ROWS:
        with gr.Row():
            for name in row.split():
                make = makers.get(name, gr.Number)
                controls[name] = make(value=start.get(name), label=name.replace("_", " "), min_width=100)
    return controls


def refuse_urls(gr):
    """Makes gradio (6.31) fetch no URL. It does so for whoever names one in place of a file, and would reach
    what only this machine can; it has no switch for that. test_the_page_reads_no_file_and_asks_no_other_host
    fails when another version fetches by other functions than these two."""
    async def refuse(url, *request):
        raise gr.routes.HTTPException(403, "no URL is fetched here")
    gr.routes.secure_url_stream_response = refuse
    gr.processing_utils.async_ssrf_protected_get = refuse


class Page:
    """A page to sample on. Its file routes see options.out and a folder of uploads, nothing else.

    Browsers call its methods from several threads, but generate, of which gradio runs one at a time.
    """

    def __init__(self, checkpoint, options, defaults):
        address = "127.0.0.1:7860" if options.ui is True else options.ui
        match = re.fullmatch(r"(\S+):(\d{1,5})", address)
        if not match or not 0 < int(match[2]) < 2 ** 16:
            raise hdm.UserError(f"--ui={address}: HOST:PORT is needed, such as 127.0.0.1:7860")
        self.host, self.port = match[1], int(match[2])
        self.uploads = tempfile.TemporaryDirectory(prefix="hdm-", ignore_cleanup_errors=True)
        os.environ.update(GRADIO_TEMP_DIR=self.uploads.name, GRADIO_ANALYTICS_ENABLED="False")
        import gradio
        self.gr = gradio
        self.checkpoint = replace(checkpoint, load_te=cache(checkpoint.load_te))
        self.options = options
        prompt = ""                                          # that the page begins with
        if options.prompt or options.prompts or options.slots:
            prompt = read_jobs(replace(options, tipo=False), defaults, None)[0].prompt
        self.defaults = resolved(defaults, checkpoint.settings, checkpoint.model, checkpoint.vae)
        self.start = vars(self.defaults) | dict(prompt=prompt, tipo=bool(options.tipo))
        self.load_tipo = cache(load_tipo)                    # when it is first switched on
        self.checkpoint.load_te()                            # now, and kept
        self.controls = {}                                   # {setting: gradio's control}, without ratio
        self.shown = (0, None, ())     # how many images; the last; (file, caption)s, newest first. One tuple,
                                       # replaced as a whole: no thread sees a part of a change
        self.asked = threading.Event()     # a browser has asked for the last image: the next can be made
        self.stopping = threading.Event()

    @contextlib.contextmanager
    def errors_shown(self):
        """A UserError becomes its line, in a box on the page; of an upload it names the file alone."""
        try:
            yield
        except hdm.UserError as error:
            line = re.sub(re.escape(f"--from_image={self.uploads.name}") + r"[\\/].*[\\/]", "", str(error))
            raise self.gr.Error(html.escape(line, quote=False), print_exception=False) from error

    def show(self, image, *files):
        """Makes this the last image; files: what comes to the gallery with it."""
        count, _, before = self.shown
        self.shown = count + 1, image, (*files, *before)

    def read_controls(self, values):
        """The values of all controls -> jobs."""
        flags = [f"--{name}={value}" for name, value in zip(self.controls, values)]
        _, given = hdm.parse_args(flags, [ImageSettings, Sampling])
        options = replace(self.options, prompt=given.pop("prompt"), prompts="", slots="", tipo=False)
        if given.pop("tipo"):
            options.tipo = self.options.tipo or True
        jobs = read_jobs(options, ImageSettings(**vars(self.defaults) | given), self.load_tipo)
        return number_files(jobs, Path(options.out))

    def generate(self, values, progress):
        """The button: samples what the controls ask for -> a line on what was done."""
        self.stopping.clear()
        done = 0
        with self.errors_shown():
            jobs = self.read_controls(values)

            def on_progress(finished, x0):
                if self.stopping.is_set():
                    raise InterruptedError
                progress(finished / len(jobs))
                if self.asked.is_set():
                    self.asked.clear()
                    self.show(preview(self.checkpoint.vae, x0))
            with contextlib.suppress(InterruptedError):
                for path in sample_files(self.checkpoint, jobs, self.options, on_progress):
                    self.show(path, (path, path.name))
                    done += 1
        return f"{done} of {len(jobs)} images, in {self.options.out}"

    def update(self, seen):
        """For a browser that has seen so many (images, files) -> the last image, the gallery, new numbers."""
        self.asked.set()
        count, image, files = self.shown
        if seen[0] == count:
            return self.gr.skip()
        gallery = list(files) if len(files) > seen[1] else self.gr.skip()
        return image, gallery, (count, len(files))

    def take_settings(self, file):
        """An image's file -> values of all controls."""
        with self.errors_shown():
            recorded, digest = read_record(file)
        own = dict(init_image=self.defaults.init_image, mask=self.defaults.mask)
        fixed = self.checkpoint.provenance | own
        values = self.start | fixed | recorded | dict(
            prompt=recorded["prompt"][0], model_hash=digest, tipo=False)     # TIPO's words are in the prompt
        other = [name for name in fixed if values[name] != fixed[name]]
        if other:
            self.gr.Warning(f"made with another {', '.join(other)}: this page keeps its own")
        return [values[name] for name in self.controls]

    def size_of(self, ratio):
        """'3:2' -> values of width and height."""
        checkpoint = self.checkpoint
        step = checkpoint.model.config.patch_size * vae_factor(checkpoint.vae)
        return advised_size(ratio, checkpoint.settings["image_size"], step)

    def lay_out(self):
        """-> gradio's Blocks: the controls to the left, the images to the right, and what calls what."""
        gr = self.gr

        def generate(progress=gr.Progress(), *values):           # gradio looks for its bar in the defaults
            return self.generate(values, progress)
        with gr.Blocks(title="HDM", analytics_enabled=False) as blocks, gr.Row():
            with gr.Column():
                self.controls = make_controls(gr, self.start)
                ratio = self.controls.pop("ratio")           # no setting, it sets two
                upload = gr.UploadButton("take the settings of an image", file_types=["image"])
            with gr.Column():
                with gr.Row():
                    button = gr.Button("generate", variant="primary")
                    stop_button = gr.Button("stop")
                state = gr.Textbox(label="done", lines=2)
                image = gr.Image(show_label=False, buttons=["fullscreen"], format="png", height=512)
                gallery = gr.Gallery(lambda: list(self.shown[2]), show_label=False, columns=4)
            inputs = list(self.controls.values())
            size = [self.controls["width"], self.controls["height"]]
            seen = gr.State((0, 0))
            quiet = dict(show_progress="hidden")
            gr.on([button.click, self.controls["prompt"].submit], generate, inputs, state,
                  api_name="generate", concurrency_limit=1)
            gr.Timer(0.5).tick(self.update, seen, [image, gallery, seen], api_name="update", **quiet)
            stop_button.click(self.stopping.set, queue=False, api_name="stop")
            upload.upload(self.take_settings, upload, inputs, api_name="settings", **quiet)
            ratio.input(self.size_of, ratio, size, api_name="sides", **quiet)
        return blocks

    def serve(self):
        """Serves the page until Ctrl-C."""
        gr = self.gr
        refuse_urls(gr)
        blocks = self.lay_out()
        address = f"{self.host}:{self.port}"
        with hdm.naming(f"--ui={address}", "cannot be served at, or something else is"):
            blocks.launch(server_name=self.host, server_port=self.port, share=False, quiet=True,
                          prevent_thread_lock=True, show_error=True, footer_links=[], run_history=False,
                          theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                          allowed_paths=[str(Path(self.options.out).absolute())], css=ENLARGED)
        print(f"page: http://{address} until Ctrl-C", flush=True)
        blocks.block_thread()
        self.stopping.set()
        self.uploads.cleanup()


# ---- the demo's judge -------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def templates(height, width, shapes):
    """Each size and shape at each place that keeps it whole, 64 of them to a short side (half a pixel at 32):
    n (size, shape, cy, cx), their (n, height * width) coverages, (n,) the squared lengths of those."""
    step = min(height, width) / 64
    candidates = []
    masks = []
    for size, shape in itertools.product(prepare.RADIUS, shapes):
        rows, columns = prepare.center_range(size, shape, height, width)
        for cy, cx in itertools.product(np.arange(*rows, step), np.arange(*columns, step)):
            candidates.append((size, shape, cy, cx))
            masks.append(prepare.coverage(size, shape, height, width, cy, cx).ravel())
    return candidates, np.array(masks, np.float32), np.square(masks).sum(1)


def nearest(color, palette):
    """The name of the color in the palette that is nearest to this one, (3,)."""
    distances = {name: np.square(color - palette[name]).sum() for name in palette}
    return min(distances, key=distances.get)


def find_shape(image):
    """(height, width, 3) uint8 -> the background's color and the shape's, (3,) each, and the shape's coverage
    of each pixel, (height, width) 0 .. 1."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    # Edge pixels are mixtures, so nearer to the background than those inside. The smallest inside, a small
    # diamond's, has about 110 pixels; the farthest 5 % of a 32 x 48 canvas are 77.
    distance = np.linalg.norm(pixels - background, axis=-1)
    color = np.median(pixels[distance >= 0.8 * np.quantile(distance, 0.95)], axis=0)
    axis = color - background
    return background, color, np.clip((pixels - background) @ axis / max(axis @ axis, 1), 0, 1)


def is_filled(coverage, filling):
    """Whether a shape, by its coverage as from find_shape, has the stripes of a filling: whether the share of
    color where they are dim is less than half way from full to theirs."""
    stripes = prepare.stripes(filling, *coverage.shape)
    inside = coverage > 0.5 * stripes.min()
    dim = inside & (stripes < 1)
    return bool(dim.any() and coverage[dim].mean() < (1 + stripes.min()) / 2)


def judge(image, shapes=tuple(prepare.SHAPES), filling=""):
    """(height, width, 3) uint8 -> (size, color, shape, background), the shape one of `shapes`; with a filling
    and that, or "". Medians, and least squares on the soft coverage: a ragged edge or a stray pixel costs no
    verdict. An empty image still gets a guess."""
    background, color, coverage = find_shape(image)
    more = ()
    if filling:
        more = filling if is_filled(coverage, filling) else "",
        if more[0]:
            coverage = np.minimum(coverage / prepare.stripes(filling, *coverage.shape), 1)
    candidates, fits = fits_of(coverage, shapes)
    size, shape, _, _ = candidates[np.argmin(fits)]
    return size, nearest(color, prepare.COLORS), shape, nearest(background, prepare.BACKGROUNDS), *more


def fits_of(coverage, shapes):
    """A coverage, as from find_shape -> the candidates of templates, and for each |mask - coverage|^2 less a
    constant: the least is the best."""
    candidates, masks, lengths = templates(*coverage.shape, shapes)
    return candidates, lengths - 2 * (masks @ coverage.ravel())


def difference(image, words, shapes=tuple(prepare.SHAPES), filling=""):
    """The mean absolute difference, of 255 levels, of an image (height, width, 3) uint8 from a true one of
    (size, color, shape, background), which lies where it fits best, to half a pixel."""
    candidates, fits = fits_of(find_shape(image)[2], shapes)
    asked = [candidate[:2] == (words[0], words[2]) for candidate in candidates]
    *_, cy, cx = candidates[np.where(asked, fits, np.inf).argmin()]
    true = prepare.render(*words, *image.shape[:2], cy, cx, filling=filling)
    return np.abs(true.astype(float) - image).mean()


def centers_and_sizes(images):
    """(n, 3): each shape's center of mass (y, x), in pixels, and the square root of its area."""
    masks = [find_shape(image)[2] > 0.5 for image in images]
    return np.array([(*np.argwhere(mask).mean(0), mask.sum() ** 0.5) for mask in masks])


def judge_camera(render, side):
    """How render(zoom=, x_shift=, y_shift=), images whose longer side is `side` pixels, moves and sizes the
    shapes, against what the camera promises."""
    plain = centers_and_sizes(render())
    print(f"{'camera':<16}{'moved / predicted':>18}{'direction %':>12}{'size / predicted':>17}")
    for axis, value in itertools.product("xy", (0.25, -0.25)):
        seen = centers_and_sizes(render(**{f"{axis}_shift": value}))
        moved = (seen - plain)[:, "yx".index(axis)] / (-value * side / 2)
        size = (seen / plain)[:, 2].mean()
        print(f"{axis}_shift={value:<8}{moved.mean():>18.2f}{100 * (moved > 0).mean():>12.1f}{size:>17.2f}")
    for zoom in (1.33, 0.75):
        size = (centers_and_sizes(render(zoom=zoom)) / plain)[:, 2].mean() / zoom
        print(f"zoom={zoom:<41}{size:>17.2f}")


def open_judged(options):
    """The checkpoint of prepare.JudgeSettings -> a function (prompts, seeds) -> images; its settings."""
    device = hdm.pick_device(options.device)
    dtype = hdm.pick_dtype(options.dtype, device)
    model, vae, settings = load_model(options.ckpt, device, dtype)
    te = load_text_encoder(settings, device, dtype)
    return partial(generate, model, vae, te, settings=settings), settings


def judge_checkpoint(options):
    """Prints how many of the demo's unseen captions the images show; or, with options.camera, judge_camera.
    options: prepare.JudgeSettings."""
    prepare.check_extras(options)
    draw, settings = open_judged(options)
    _, unseen = prepare.combinations(options.shape)
    filling = options.filling
    asked = [words for words in unseen for _ in range(options.seeds)]
    prompts = [prepare.caption(words, filling) for words in asked]
    seeds = list(range(options.seeds)) * len(unseen)
    render = partial(draw, prompts, seeds)
    if options.camera:
        return judge_camera(render, settings["image_size"])
    shapes = *prepare.SHAPES, *([options.shape] if options.shape else [])
    rows = prepare.ATTRIBUTES | {"shape": shapes}
    if filling:
        asked = [(*words, filling) for words in asked]
        rows["filling"] = ("", filling)
    images = list(render())
    right = np.array([judge(image, shapes, filling) for image in images]) == asked   # (n, 4 or 5)
    differences = [difference(image, words[:4], shapes, filling) for image, words in zip(images, asked)]
    right = np.column_stack([right, right.all(1)]).sum(0)
    rows["all five" if filling else "all four"] = range(math.prod(map(len, rows.values())))
    print(f"{options.ckpt}: {len(unseen)} captions x {options.seeds} seeds")
    print(f"{'':<12}{'right':>6}{'of':>6}{'%':>7}{'chance %':>10}")
    for (name, choices), n in zip(rows.items(), right):
        print(f"{name:<12}{n:>6}{len(seeds):>6}{100 * n / len(seeds):>7.1f}{100 / len(choices):>10.1f}")
    print(f"mean difference from a true image of the caption: {np.mean(differences):.2f} of 255 levels")


# ---- a judge for any data: the nearest real image ----------------------------------------------------------
MOST_REAL = 10_000                 # real images, beside the held-out ones, that are compared with
MANY = 8                           # captions of a group, from which on samples have a mean of their own


def thing_and_group(caption, pattern):
    """A caption as the model reads it -> its first part but for the group, and the group: the first part that
    the regex matches, or "". "apple, 3d style, red" and "style" -> apple, 3d style."""
    parts = caption.split(", ")
    groups = [part for part in parts if pattern is not None and pattern.search(part)][:1]
    things = [part for part in parts if part not in groups]
    return "".join(things[:1]), "".join(groups)


def thumbnails(images):
    """(n, 192) float64: images (height, width, 3) uint8 averaged over 8 x 8 areas."""
    small = [np.asarray(Image.fromarray(image).resize((8, 8), Image.BOX)) for image in images]
    return np.stack(small).reshape(len(small), -1).astype(np.float64)


def remove_means(shown, real, groups):
    """Takes from (n, seeds, d) samples and (m, d) real images, in place, the mean of their group; groups:
    those of the real images, of which the first n are the samples' own.

    Samples lose their own mean, so that a light, or a style, that all of them got wrong alike is no mistake
    in each; but where a group has fewer than MANY captions the real images', as their own would be the very
    images.
    """
    for group in set(groups):
        of_real, of_shown = groups == group, groups[:len(shown)] == group
        mean = real[of_real].mean(0)
        real[of_real] -= mean
        if of_shown.sum() >= MANY:
            mean = shown[of_shown].mean((0, 1))
        shown[of_shown] -= mean


def rank_of(image, truth, real):
    """1 + how many of the real images (m, d) are nearer to an image (d,) than number `truth` of them is."""
    distances = np.linalg.norm(real - image, axis=1)
    return 1 + (distances < distances[truth]).sum()


def rank_all(shown, real, things, groups):
    """(n, seeds, d) samples of the captions of the first n real images; (m, d) all real images, their things
    and groups, (m,) texts -> {what is compared: (., 2) ranks of the true image, and of how many}."""
    rows = {"samples": [], "shuffled": [], "another group's": []}
    for k, images in enumerate(shown):
        alike = np.flatnonzero(groups == groups[k])
        truth = np.searchsorted(alike, k)
        for image in images:
            rows["samples"].append((rank_of(image, truth, real[alike]), len(alike)))
            rows["shuffled"].append((rank_of(image, (truth + 1) % len(alike), real[alike]), len(alike)))
        for other in real[(things == things[k]) & (groups != groups[k])]:
            rows["another group's"].append((rank_of(other, truth, real[alike]), len(alike)))
    return {name: np.array(pairs) for name, pairs in rows.items() if pairs}


def print_ranks(among, rows):
    """Lines of the table, of rank_all's rows, and what chance gives."""
    sizes = rows["samples"][:, 1]
    lines = {}                                               # {name: its three columns, not yet averaged}
    for name, pairs in rows.items():
        ranks = pairs[:, 0]
        lines[name] = ranks == 1, ranks <= 5, ranks
    lines["chance"] = 1 / sizes, np.minimum(5, sizes) / sizes, (sizes + 1) / 2
    for name, (nearest, five, ranks) in lines.items():
        print(f"{among:<10}{sizes.mean():>7.1f}  {name:<16}{len(ranks):>6}{100 * nearest.mean():>11.1f}"
              f"{100 * five.mean():>14.1f}{np.median(ranks):>13.1f}")


def read_square(index, i, side):
    """The middle of a real image as the model could make it, (side, side, 3) uint8."""
    image = Image.fromarray(index.read(i, side).permute(1, 2, 0).numpy())
    return np.array(fitted(image, side, side, Image.BICUBIC))


def read_thumbnails(index, numbers, side):
    """-> the places in `numbers` of the m real images that can be read (a warning of others); (m, 192)."""
    places, images = [], []
    for place, i in enumerate(numbers):
        try:
            images.append(thumbnails([read_square(index, i, side)])[0])
            places.append(place)
        except hdm.UserError as error:
            hdm.warn(f"left out: {error}")
    return places, np.array(images)


def save_pairs(path, images, index, held):
    """A PNG of samples, each beside the true image, by the numbers `held`."""
    side = images.shape[1]
    tiles = []
    for image, number in zip(images, held):
        tiles += [image, read_square(index, number, side)]
    sheet = hdm.image_grid(tiles, 12, max(1, 96 // side), gap=4, column_labels=["sample", "true"] * 6)
    with hdm.naming(f"--grid={path}", "cannot be written"):
        sheet.save(path)


def judge_by_data(options):
    """Samples the held-out captions of options.data, prepare.JudgeSettings, and prints how often the true
    image is the nearest real one of its group; beside it the same with another held-out image for the truth
    (shuffled), and with a real image of the same thing in another group in place of the sample."""
    pattern = prepare.read_regex("--group", options.group) if options.group else None
    draw, settings = open_judged(options)
    if "validation" not in settings:
        raise hdm.UserError(f"--ckpt={options.ckpt}: does not say what its training held out")
    index = prepare.open_index(options.data)
    _, _, held = prepare.split_data(index, settings["validation"], settings["holdout"])
    if not held:
        raise hdm.UserError(f"--ckpt={options.ckpt}: its training held out none of --data={options.data}")
    others = np.setdiff1d(np.arange(len(index)), held)
    by_hash = np.argsort(index.records["place"][others])     # whatever the weights of their sources
    numbers = [*held, *others[by_hash][:MOST_REAL].tolist()]
    s = hdm.ExampleSettings(tag_separator=settings["tag_separator"], spaces=settings["spaces"])
    captions = [hdm.draw_caption(index[i].caption, None, s) for i in numbers]
    things, groups = np.array([thing_and_group(caption, pattern) for caption in captions]).T
    if options.group and not groups.any():
        raise hdm.UserError(f"--group={options.group}: in no part of the captions, such as {captions[0]!r}")
    readable, real = read_thumbnails(index, numbers, settings["image_size"])
    things, groups = things[readable], groups[readable]
    held = [numbers[place] for place in readable if place < len(held)]
    prompts = [captions[place] for place in readable[:len(held)]]
    if not held:
        raise hdm.UserError(f"--data={options.data}: none of its held-out images can be read")
    n = len(held)
    shown = []
    for seed in tqdm(range(options.seeds), disable=not sys.stderr.isatty()):
        images = draw(prompts, [seed] * n)
        if seed == 0 and options.grid:
            save_pairs(options.grid, images[:48], index, held)
        shown.append(thumbnails(images))
    shown = np.stack(shown, axis=1)                          # (n, seeds, 192)
    remove_means(shown, real, groups)
    print(f"{options.ckpt}: {n} captions x {options.seeds} seeds; groups: {len(set(groups))}. Is the true "
          f"image the nearest real one?")
    print(f"{'among':<10}{'images':>7}  {'compared':<16}{'of':>6}{'nearest %':>11}{'first five %':>14}"
          f"{'median rank':>13}")
    print_ranks("held out", rank_all(shown, real[:n], things[:n], groups[:n]))
    print_ranks("all real", rank_all(shown, real, things, groups))


if __name__ == "__main__":
    hdm.run_main(main)
