"""Draw images from prompts.

    python sample.py --ckpt=out/demo --prompt "a large red circle on a navy background" -n 4
    python sample.py --prompts=prompts.txt              # the released model; one prompt a line
    python sample.py --from_image=out/samples/00000-0.png --seed=7     # the same again, but for the seed
    python sample.py --ckpt=out/demo --prompt "..." --sheet="steps=8,16,32;cfg=1,2,4"
    python sample.py --ckpt=out/demo --ui               # a page to play on, in the browser
    python sample.py --ckpt=out/demo --export=demo.safetensors

Writes OUT/00000-SEED.png and so on, each in its own size, in the order of the prompts, and, if there are more
than one, a grid of them. Image i of a prompt has the seed SEED + i and depends on nothing else in the batch.
In order: the settings; prompts; the text in an image's file; drawing; the weights of other programs, in and
out; commands. Then extras: a sheet of settings, TIPO, the page, the demo's judge.
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
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from tqdm import tqdm

import hdm
import prepare

RELEASED = "KBlueLeaf/HDM-xut-340M-anime"                    # the published model; CC-BY-NC-SA 4.0
RELEASED_FILE = "hdm-xut-340M-1024px-note.safetensors"
SAMPLING = dict(image_size=1024, steps=24, cfg=3.0, cfg_low=0.0, t_shift=1.0,    # ours hold their own
                tag_separator="$$", spaces=False)            # of parse_caption


@dataclass
class ImageSettings:                     # a line of --prompts may end in any of these, such as --cfg=2
    ckpt: str = RELEASED       # train.py's OUT_DIR, one checkpoint, a published file or a hub id
    negative_prompt: str = ""      # what guidance moves away from
    num_images: int = 1            # -n: images for each prompt
    seed: int = 0                  # of the first image of each prompt, the next one's is one more; -1: any
    width: int | None = None       # pixels; None: the checkpoint's training size, or init_image's
    height: int | None = None      # likewise
    sampler: str = "euler"         # of those above; heun takes two evaluations a step, the others one
    steps: int | None = None       # None: the checkpoint's own (published: 24)
    shift: float | None = None     # of time (train.py's t_shift); None: the checkpoint's own (published: 1)
    cfg: float | None = None       # guidance, 1 is none; None: the checkpoint's own (published: 3)
    cfg_low: float | None = None   # guidance acts at times t, 1 noise to 0 image, from cfg_low (None: the
                                   # checkpoint's own; published: 0) ...
    cfg_high: float = 1.0          # ... to cfg_high
    cfg_rescale: float = 0.0       # 0 .. 1: how far guided contrast goes back to the unguided
    zoom: float = 1.0              # camera: above 1 nearer
    x_shift: float = 0.0           # camera to the right, y_shift down; 1 is half of the longer side
    y_shift: float = 0.0           # likewise
    tread_cond: float = 0.0        # share of the tokens that skip the U, with the prompt: [0, 1)
    tread_uncond: float = 0.0      # with the negative one: a weaker self to move away from (0.25 to 0.5)
    init_image: str = ""           # image to start from
    strength: float = 0.6          # share of the steps that are done on it
    mask: str = ""                 # image of the same size: white is drawn anew, black stays

    def __post_init__(self):
        hdm.check_name(f"--sampler={self.sampler}", self.sampler, hdm.SAMPLERS, "sampler")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise hdm.UserError(f"--{name}={value}: from {low} to {high}")
        if self.mask and not self.init_image:
            raise hdm.UserError(f"--mask={self.mask}: says what to draw anew in --init_image; it is missing")


@dataclass
class Job(ImageSettings):                # one image to draw
    prompt: str = ""
    number: int = 0                # of its file


@dataclass
class Sampling:
    prompt: list[str] = field(default_factory=list)  # may be given several times
    prompts: str = ""              # file with one prompt a line, or - for standard input; # first: a comment
    slots: str = ""                # the prompt in parts, '{"artist": "..."}' or a json file of them,
    format: str = (                # ... which are put in here
        "<|special|>, <|characters|>, <|series|>, <|artist|>, <|general|>, "
        "<|natural language|>. <|quality|>, <|rating|>, <|meta|>")
    tipo: bool | str = False       # expand short prompts by TIPO; a folder or hub id of another one
    from_image: str = ""           # take prompt and settings from an image that was drawn here
    sheet: str = ""                # "steps=8,16;cfg=1,2": one PNG, rows and columns, of the first prompt
    batch_size: int = 4            # images at a time: memory, not result
    out: str = "out/samples"       # folder for the images
    file_type: str = "png"         # png, webp, jpg
    no_metadata: bool = False      # leave prompt and settings out of the files
    latents_out: bool = False      # also write each image's latent, NAME.safetensors
    ema: bool = True               # the averaged weights, where the checkpoint has them
    text_encoder: str = ""         # another place of the text encoder; "": where the checkpoint says
    vae: str = ""                  # likewise of the VAE, a folder, file or hub id
    device: str = "auto"           # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"            # float32, bfloat16, float16; auto: 16 bit on CUDA, else float32
    export: str = ""               # write the weights as FILE.safetensors (published layout) or a FOLDER
    force: bool = False            # ... also of a model that other programs cannot read
    ui: bool | str = False         # a local web page; HOST:PORT in place of 127.0.0.1:7860


# The names that diffusers has
ALIASES = {"-n": "num_images", "--num_inference_steps": "steps", "--guidance_scale": "cfg"}
LIMITS = dict(  # both allowed
    num_images=(1, 10_000), seed=(-1, 2 ** 62), steps=(1, 1000), shift=(0.001, 1000), zoom=(0.001, 1000),
    x_shift=(-100, 100), y_shift=(-100, 100), cfg=(-100, 100), width=(-16384, 16384), height=(-16384, 16384),
    cfg_low=(0, 1), cfg_high=(0, 1), cfg_rescale=(0, 1), strength=(0, 1), tread_cond=(0, 0.999),
    tread_uncond=(0, 0.999))
IDLE = [  # settings, when they have no effect, and why
    ("strength", lambda p: not p.init_image, "without --init_image"),
    ("negative_prompt", lambda p: p.cfg == 1 and not p.tipo, "with --cfg=1"),
    ("cfg_low cfg_high cfg_rescale tread_uncond", lambda p: p.cfg == 1, "with --cfg=1"),
    ("cfg_low cfg_high", lambda p: p.cfg_low > p.cfg_high, "as cfg_low is above cfg_high: no guidance"),
    ("format", lambda p: not p.slots, "without --slots"),
    ("force", lambda p: not p.export, "without --export"),
    ("prompt prompts slots sheet tipo num_images ui device dtype", lambda p: p.export, "with --export")]
FORMATS = dict(png="PNG", webp="WEBP", jpg="JPEG")
TIPO = "KBlueLeaf/TIPO-200M-ft"    # a LLaMA that was trained on tags and captions of the same images
TIPO_TOKENS = 512                  # at most, of its words
ENDING = dict(                     # tags that end a prompt: a guess at the common ones
    quality="masterpiece, best quality, high quality, low quality, worst quality",
    rating="safe, sfw, general, sensitive, questionable, nsfw, explicit",
    meta="absurdres, highres, lowres, newest, recent")


# ---- prompts ----------------------------------------------------------------------------------------------
def prompt_line(line, p):
    """'PROMPT --key=value ...' -> the Job of this prompt, p with these values, quoted as in a shell."""
    known = "|".join([*ALIASES, *(f"--{one.name}" for one in fields(ImageSettings))])
    text, *flags = re.split(rf"(?:^|\s+)(?=--\w+=|(?:{known})(?![\w-]))", line, maxsplit=1)
    with hdm.naming(f"--prompts, {line!r}", "settings in it that will not do"):
        values = hdm.parse_args(shlex.split(" ".join(flags)), [ImageSettings], aliases=ALIASES)[1]
        return Job(**vars(p) | values, prompt=text)


def fill_slots(template, slots):
    """'<|name|>, ...' filled from {name: text}; an empty one takes the punctuation behind it along."""
    known, text = re.findall(r"<\|(.+?)\|>([^<]*)", template), ""
    for name in slots:
        hdm.check_name(f"--slots: {name}", name, dict(known), "slot in --format")
    for name, between in known:
        words = slots.get(name, "").strip().rstrip(",.")
        if name != "natural language":                       # in its words underscores would be meant
            words = hdm.parse_caption(words.replace(",", "$$"), spaces=True)
        text += words + between if words else ""
    return text.rstrip(", ")


def prompt_lines(text):
    """The lines of a file of prompts, but empty ones and comments, which begin with #."""
    lines = [line.strip() for line in text.removeprefix("\ufeff").split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def read_jobs(s, p, load_tipo):
    """-> a Job for each image, in order, each with its own seed."""
    lines, slots = [Job(**vars(p), prompt=prompt) for prompt in s.prompt], {}
    if s.prompts:
        with hdm.naming(f"--prompts={s.prompts}", "no readable file of one prompt a line"):
            text = sys.stdin.read() if s.prompts == "-" else hdm.read_text(s.prompts)
        lines += [prompt_line(line, p) for line in prompt_lines(text)]
    if s.slots:
        with hdm.naming(f"--slots={s.slots}", 'neither a json file nor json such as {"artist": "..."}'):
            given = s.slots.lstrip().startswith("{")
            slots = json.loads(s.slots if given else hdm.read_text(s.slots))
            assert all(isinstance(words, str) for words in slots.values()), "each part must be a text"
        lines.append(Job(**vars(p), prompt=fill_slots(s.format, slots)))
        print(f"prompt: {lines[-1].prompt}")
    if not lines:
        raise hdm.UserError('no prompt: give --prompt "a red circle", once or more, or --prompts=FILE')
    texts = [text for line in lines for text in (line.prompt, line.negative_prompt)]
    if any(re.search(r"\\[()]", text) for text in texts):
        print(r"prompts: \( and \) are taken for ( and )")
    if any(re.search(r"\([^()]+:\d*\.?\d+\)", text) for text in texts):
        print("prompts: weights as in (tag:1.2) are not known here, and read as text")
    jobs = []
    for line in lines:
        if line.seed == -1:
            line = replace(line, seed=random.SystemRandom().randrange(2 ** 32))
            print(f"seed {line.seed}: {line.prompt}")
        prompt, negative = (text.encode(errors="replace").decode()   # argv can hold any bytes
                            for text in (line.prompt, line.negative_prompt))
        jobs += [replace(line, prompt=prompt, negative_prompt=negative, num_images=1, seed=line.seed + i)
                 for i in range(line.num_images)]
    if s.tipo:
        expand = load_tipo(s.tipo)
        jobs = [replace(job, prompt=expand(job, slots)) for job in jobs]
        print("\n".join(f"prompt: {job.prompt}" for job in jobs))
    return jobs


# ---- the text in an image's file --------------------------------------------------------------------------
def parameters(job, digest):
    """Prompt and settings in AUTOMATIC1111's form, which many programs show."""
    model = Path(job.ckpt).name.removesuffix(".safetensors")
    sampler = getattr(hdm.SAMPLERS[job.sampler], "title", job.sampler)
    pairs = {"Steps": job.steps, "Sampler": sampler, "CFG scale": f"{job.cfg:g}",
             "Seed": job.seed, "Size": f"{job.width}x{job.height}", "Model hash": digest[:10], "Model": model}
    line = ", ".join(f"{key}: " + (json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", str(value))
                                   else str(value)) for key, value in pairs.items())
    negative = [f"Negative prompt: {job.negative_prompt}"] if job.negative_prompt else []
    text = "\n".join([job.prompt, *negative, line])
    return text.encode(errors="replace").decode()            # a file's name can hold any bytes


def exif_block(about, text):
    """EXIF bytes with about, ASCII as our json is, as ImageDescription, and text as UserComment.

    Pillow would write the UserComment as BYTE; readers such as AUTOMATIC1111's take UNDEFINED (7) alone.
    """
    about, comment = about.encode("ascii") + b"\0", b"UNICODE\0" + text.encode("utf-16-be")
    gap = bytes(len(about) % 2)                              # values start at even places
    inner = 8 + 2 + 2 * 12 + 4 + len(about) + len(gap)       # where the second directory is
    first = struct.pack(">HHHIIHHIII", 2, 0x010E, 2, len(about), 38, 0x8769, 4, 1, inner, 0)
    second = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), inner + 2 + 12 + 4, 0)
    return b"Exif\0\0MM\0\x2a\0\0\0\x08" + first + about + gap + second + comment


def encode_file(image, kind, text="", about=""):
    """(height, width, 3) uint8 -> a file's bytes; with text in it: `parameters`, and about, our own json."""
    options = dict(quality=95) if kind != "png" else {}
    if text and kind == "png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", text)      # as iTXt where Latin-1 does not do
        options["pnginfo"].add_text("hdm", about)
    elif text:
        options["exif"] = exif_block(about, text)
    file = io.BytesIO()
    with hdm.naming(f"--file_type={kind}", "cannot hold this image with its settings; png can"):
        Image.fromarray(image).save(file, FORMATS[kind], **options)
    return file.getvalue()


def read_settings(path):
    """-> {name: value} of the settings in an image's file, no others than are written; its model's hash."""
    with hdm.naming(f"--from_image={path}", "not an image that can be read"), Image.open(path) as image:
        about = image.info.get("hdm") or image.getexif().get(0x010E)
    if not str(about).startswith("{"):                       # cameras, too, write a description
        raise hdm.UserError(f"--from_image={path}: no settings of sample.py in it; it was drawn elsewhere "
                            f"or with --no_metadata, or another program has saved it")
    with hdm.naming(f"--from_image={path}", "broken settings in it"):
        about, types = json.loads(about), hdm.setting_types([ImageSettings, Sampling])
        known = [one.name for one in fields(ImageSettings)] + ["ema", "text_encoder", "vae", "dtype"]
        values = {name: hdm.setting_value(name, about[name], types[name]) for name in known if name in about}
        return values | dict(prompt=[str(about["prompt"])]), str(about["model_hash"])


def write_new(path, content):
    """Writes a new file, whole or not at all: path, or, where that is there, STEM-1, ... -> its path."""
    with hdm.naming("--out", f"{path} cannot be written"), contextlib.ExitStack() as undo:
        for i in itertools.count():
            new = path.with_stem(f"{path.stem}-{i}") if i else path
            with contextlib.suppress(FileExistsError), open(new, "xb") as file:
                undo.callback(new.unlink)                    # after a full disk, Ctrl-C
                file.write(content)
                file.close()                                 # some disks say only here that they are full
                undo.pop_all()
                return new


# ---- drawing -----------------------------------------------------------------------------------------------
def to_uint8(images):
    """(B, 3, height, width) in [-1, 1], anything beyond is clipped -> (B, height, width, 3) uint8 numpy."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def number(jobs, out):
    """jobs with the numbers of their files, above those in the folder, so that none is overwritten."""
    taken = [int(match[1]) for path in out.iterdir() if (match := re.match(r"(\d+)-", path.name))]
    return [replace(job, number=i) for i, job in enumerate(jobs, max(taken, default=-1) + 1)]


@lru_cache(maxsize=1)              # images of one call share it: draw_files forgets it
def load_source(init_image, mask):
    """-> init_image and mask as PIL images of the same size, or None for what is not given."""
    with hdm.naming(f"--init_image={init_image}", "not an image that can be read"):
        image = hdm.load_image(init_image) if init_image else None
    with hdm.naming(f"--mask={mask}", "not an image that can be read"):
        anew = hdm.load_image(mask).convert("L") if mask else None
    if anew is not None and anew.size != image.size:
        raise hdm.UserError(f"--mask={mask}: {anew.width}x{anew.height} pixels, but --init_image has "
                            f"{image.width}x{image.height}; they must be the same")
    return image, anew


def fitted(image, p, method):
    """A PIL image in the size of p. Of a slightly larger one the middle is taken as it is, pixel by pixel;
    others are scaled to cover and cut."""
    over = image.width - p.width, image.height - p.height
    if 0 <= min(over) and max(over) < min(64, p.width / 4, p.height / 4):
        left, top = over[0] // 2, over[1] // 2
        return image.crop((left, top, left + p.width, top + p.height))
    return ImageOps.fit(image, (p.width, p.height), method)


def resolved(p, settings, model, vae):
    """p with numbers in place of None; a size or an image that will not do is refused."""
    width = height = settings["image_size"]
    image, _ = load_source(p.init_image, p.mask)
    if image is not None:
        width, height = image.size
        if max(width, height) > 2 * settings["image_size"]:  # such as a photo's: more than the model can do
            width, height = hdm.scaled_sides(width, height, settings["image_size"])
        step = model.config.patch_size * (1 if vae is None else vae.factor)
        width, height = (max(step, side // step * step) for side in (width, height))
    own = dict(width=width, height=height, steps=settings["steps"], cfg=settings["cfg"],
               cfg_low=settings["cfg_low"], shift=settings["t_shift"])
    p = replace(p, **{name: value for name, value in own.items() if getattr(p, name) is None})
    hdm.check_size(p.height, p.width, model.config, vae)
    if p.init_image and round(p.steps * p.strength) < 1:
        raise hdm.UserError(f"--strength={p.strength}: of {p.steps} steps none would be done; above "
                            f"{0.5 / p.steps:.3g} at least one is")
    return p


def as_trained(text, settings):
    """A prompt as the checkpoint's training read captions."""
    settings = SAMPLING | settings
    return hdm.parse_caption(text, separator=settings["tag_separator"], spaces=settings["spaces"])


def encode_texts(te, jobs, settings):
    """-> {text: states (1, T, ctx_dim) on the CPU} of all prompts and negative prompts."""
    texts = dict.fromkeys(text for job in jobs for text in (job.prompt, job.negative_prompt))
    return {text: te([as_trained(text, settings)])[0].cpu() for text in texts}


def batches(jobs, batch_size):
    """Neighbours that are alike but for prompt and seed, at most batch_size at a time."""
    for _, alike in itertools.groupby(jobs, key=lambda job: replace(job, prompt="", seed=0, number=0)):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


def draw_latents(model, vae, texts, jobs, watch):
    """-> latents (B, C, h, w) of jobs; what init_image and mask keep, as pixels, or None. See draw."""
    p, config, device = jobs[0], model.config, model.in_patch.proj.weight.device
    factor = 1 if vae is None else vae.factor
    rows, cols = (side // factor // config.patch_size for side in (p.height, p.width))
    pos = (hdm.grid_positions(rows, cols, config.pos) + torch.tensor([p.y_shift, p.x_shift])) / p.zoom
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    shape = config.in_channels, p.height // factor, p.width // factor
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    def picks():
        return [torch.cat([hdm.pick_tokens(1, rows * cols, rate, generator) for generator in generators]
                          ).to(device) if rate else None for rate in (p.tread_cond, p.tread_uncond)]
    ctx, mask = hdm.stack_texts([texts[job.prompt].to(device) for job in jobs])
    uncond = texts[p.negative_prompt].to(device).repeat(len(jobs), 1, 1)
    guidance = hdm.Guidance(model, ctx, uncond, p.cfg, mask, pos=pos, picks=picks,
                            aspect=torch.full((len(noise),), math.log(p.width / p.height), device=device),
                            interval=(p.cfg_low, p.cfg_high), rescale=p.cfg_rescale)
    times, x = hdm.sampling_times(p.steps, p.shift), noise
    source, anew = load_source(p.init_image, p.mask)
    if source is not None:
        source = np.array(fitted(source, p, Image.BICUBIC))
        known = torch.from_numpy(source).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
        known = known if vae is None else vae.encode(known)
        times = times[-1 - round(p.steps * p.strength):]
        x = times[0] * noise + (1 - times[0]) * known
    if anew is not None:                                     # a latent cell is drawn if any of its pixels is
        anew = np.array(fitted(anew, p, Image.NEAREST)) > 127
        cells = torch.from_numpy(anew)[None, None].to(device).float()
        cells = torch.nn.functional.max_pool2d(cells, factor) > 0

    def velocity(x, t):
        with hdm.SHARED_CPU.work(device):
            v = guidance(x, t)
        if anew is not None:                                 # what stays goes straight from noise to itself
            v = torch.where(cells, v, noise - known)
        watch(t, x - t * v)
        return v
    return hdm.SAMPLERS[p.sampler](velocity, x, times), source, anew


@torch.inference_mode()
def draw(model, vae, texts, jobs, watch=lambda t, x0: None):
    """Draws jobs, one of batches, as resolved; texts as from encode_texts. Yields for each its image
    (height, width, 3) uint8 and its latent (C, h, w).

    All that is random comes from an image's own seed, on the CPU: the same in any batch, on any device.
    watch is called at each time t, the last is 0, with what x0 (B, C, h, w) looks like by then. What is not
    finite is drawn again in float32, with a warning.
    """
    x, source, anew = draw_latents(model, vae, texts, jobs, watch)
    watch(0, x)
    kind, dtype = x.device.type, model.in_patch.proj.weight.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    for job, latent in zip(jobs, x):                         # the VAE takes one at a time: less memory
        name = f"image {job.number:05d}-{job.seed}, {job.prompt[:60]!r}"
        if not latent.isfinite().all() and dtype != torch.float32:
            hdm.warn(f"{name}: its latent is not finite in {str(dtype)[6:]}: drawn again in float32")
            with hdm.in_float32(model):
                latent = draw_latents(model, vae, texts, [job], lambda t, x0: None)[0][0]
        if not latent.isfinite().all():
            hdm.warn(f"{name}: its latent is not finite in float32{' either' * (dtype != torch.float32)}")
        image = to_uint8(latent[None] if vae is None else vae.decode_each(latent[None], name))[0]
        yield image if anew is None else np.where(anew[..., None], image, source), latent


def generate(model, vae, te, prompts, seeds, settings, batch_size=32, **how):
    """-> (n, height, width, 3) uint8 images, one for each prompt with its seed; how: fields of ImageSettings.
    Under torchrun each process draws its part, and gets all."""
    p = resolved(Job(**how), settings, model, vae)
    jobs = hdm.share([replace(p, prompt=prompt, seed=seed, number=i)
                  for i, (prompt, seed) in enumerate(zip(prompts, seeds))])
    texts = encode_texts(te, jobs, settings)
    images = [image for batch in batches(jobs, batch_size) for image, _ in draw(model, vae, texts, batch)]
    parts = hdm.gather(images)
    return np.stack([parts[i % len(parts)][i // len(parts)] for i in range(len(prompts))])


def advise(p, side):
    """Says where a size lies outside of what a model trained at this side is good at (HDM's model card)."""
    if not (p.width == side <= p.height or p.width > p.height and p.height <= side
            and p.width * p.height >= side ** 2):
        print(f"warning: {p.width}x{p.height}: a model trained at {side} px draws best {side} wide and at "
              f"least as high, or wider than high, at most {side} high, of {side}x{side} pixels or more")


def draw_files(model, vae, get_te, jobs, settings, s, common, watch):
    """Draws this process's part of jobs and writes each as a new file of s.out, in it its settings and
    common, those of the whole program. Yields the paths.

    get_te() loads the text encoder; unless others hold it, it is gone before the first step. watch is called
    at each step with how many are done, in parts of one, and with what x0 (B, C, h, w) looks like.
    """
    load_source.cache_clear()                                # since the last call a file may have changed
    jobs, done = [resolved(job, settings, model, vae) for job in jobs], 0
    for p in {(job.width, job.height): job for job in jobs}.values():
        advise(p, settings["image_size"])
    te = get_te()
    texts = encode_texts(te, jobs, settings)
    for text in texts:
        if (n := len(te.tokenizer(as_trained(text, settings))["input_ids"])) > te.max_length:
            print(f"warning: of {n} tokens the model reads {te.max_length}: {text[:60]!r} ...")
    del te                                                   # its memory goes to the images
    def content(job, image):
        text = "" if s.no_metadata else parameters(job, common["model_hash"])
        return encode_file(image, s.file_type, text, json.dumps(asdict(replace(job, number=0)) | common))
    for batch in batches(hdm.share(jobs), s.batch_size):
        for job in batch:                                    # what no file can hold fails before it is drawn
            content(job, np.zeros((job.height, job.width, 3), np.uint8))
        drawn = draw(model, vae, texts, batch, lambda t, x0: watch(done + len(x0) * (1 - t), x0))
        for job, (image, latent) in zip(batch, drawn):
            path = Path(s.out, f"{job.number:05d}-{job.seed}.{s.file_type}")
            path = write_new(path, content(job, image))
            if s.latents_out:
                write_new(path.with_suffix(".safetensors"), save({"latent": latent.float().cpu()}))
            yield path
        done += len(batch)


# ---- the weights for other programs ------------------------------------------------------------------------
ADAPTER = re.compile(r"(?i)(?<![a-z])(lycoris|lora|dora|lokr|loha|hada|b?oft|ia3)[._]")
AVERAGED = re.compile(r"(?i)(?<![a-z])(ema|swa)(?![a-z])")
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|module|_\w+_module)\.")               # by compile, DDP, FSDP
NOT_XUT = re.compile(r"vae\.|vae_(mean|std)$|n_averaged$|(te|text_encoders?|text_model|cond_stage_model)\.")


def xut_part(tensors, path, ema):
    """A file's tensors -> those with ctx_proj.weight's prefix, XUT's, by their own names, and the others."""
    if adapters := [name for name in tensors if ADAPTER.search(name)]:
        raise hdm.UserError(f"{path}: holds {len(adapters)} adapter weights ({adapters[0]}, ...), without "
                            f"which it is another model: merge them by the program that trained them")
    plain = {WRAPPER.sub("", name): value for name, value in tensors.items()}
    starts = [name.removesuffix("ctx_proj.weight") for name in plain
              if re.search(r"(^|\.)ctx_proj\.weight$", name)]
    if not starts:
        raise hdm.UserError(f"{path}: neither a checkpoint of ours nor a published one (no unet.model.* and "
                            f"no ctx_proj.weight); it holds {', '.join(list(tensors)[:3])}, ...")
    averaged = [start for start in starts if AVERAGED.search(start)]
    live = [start for start in starts if start not in averaged]
    chosen = averaged if averaged and (ema or not live) else live
    if len(chosen) > 1 or len(plain) < len(tensors):
        names = ", ".join(f"{start}*" for start in starts)
        raise hdm.UserError(f"{path}: holds several models ({names}); keep one of them in it")
    start, inner = chosen[0], tuple(one for one in starts if len(one) > len(chosen[0]))
    own = {name.removeprefix(start): value for name, value in plain.items() if name.startswith(start)
           and not name.startswith(inner) and (start or not NOT_XUT.match(name))}
    others = {name: value for name, value in plain.items()
              if not name.startswith(start) or name.removeprefix(start) not in own}
    if unread := [name for name in others if not NOT_XUT.match(name)]:
        kinds = {name.partition(".")[0]: name for name in reversed(unread)}
        print(f"{path}: {start}* is read; {len(unread)} other tensors are not, such as "
              f"{', '.join(list(kinds.values())[:5])}")
    return own, others


def config_from_tensors(tensors, path):
    """The XUTConfig of a file without one, by names and shapes; skips, residual and pos as published."""
    def count(pattern):
        return len({match.group(1) for name in tensors if (match := re.match(pattern, name))})
    with hdm.naming(path, "not an XUT checkpoint"):
        dim, in_channels, patch_size, _ = tensors["in_patch.proj.weight"].shape
        heads, quarter, _ = tensors["backbone.enc_blocks.0.0.attn.rope.freqs"].shape
        return hdm.XUTConfig(
            dim=dim, ctx_dim=tensors["ctx_proj.weight"].shape[1], heads=heads, head_dim=4 * quarter,
            mlp_dim=tensors["backbone.enc_blocks.0.0.mlp.w3.weight"].shape[1],
            depth=count(r"backbone\.enc_blocks\.(\d+)\."),
            enc_blocks=count(r"backbone\.enc_blocks\.0\.(\d+)\."),
            dec_blocks=count(r"backbone\.dec_blocks\.0\.(\d+)\."),
            pre_blocks=count(r"prev_tread_trns\.blocks\.(\d+)\."),
            post_blocks=count(r"post_tread_trns\.blocks\.(\d+)\."), patch_size=patch_size,
            in_channels=in_channels, aspect_cond="addon_info_embs_proj.0.weight" in tensors)


def find_weights(name, ema):
    """A run's folder, one checkpoint, a diffusers-style folder, a file or a hub id -> the file to read."""
    if not hdm.looks_local(name):
        if name == RELEASED:
            print(f"weights: {name}, licence CC-BY-NC-SA 4.0 (no commercial use)")
        return hdm.fetch(name, RELEASED_FILE, "checkpoint")
    path = (hdm.list_checkpoints(name) or [Path(name)])[-1]
    file = (path if path.is_file() else ema and hdm.weights_in(path, "ema") or hdm.weights_in(path, "model")
            or hdm.weights_in(path / "transformer", "diffusion_pytorch_model")
            or hdm.weights_in(path, "diffusion_pytorch_model"))
    if not file:
        raise hdm.UserError(f"checkpoint {name}: neither a file nor a folder with model.safetensors or "
                            f"ckpt_*")
    return file


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


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, ema=True, with_vae=True):
    """-> (XUT, VAE or None, settings) from our checkpoints or from any layout of the published weights.

    settings is a dict: config (the XUTConfig), text_encoder, text_length, tag_separator, spaces, vae,
    image_size, step, images, and for sampling steps, cfg, cfg_low, t_shift. ema=True takes the averaged
    weights where it has them.
    """
    path = find_weights(path_or_hub_id, ema)
    tensors, metadata = hdm.read_tensors(path)
    own = None                                               # a VAE in the same file
    if "hdm" not in metadata or "ctx_proj.weight" not in tensors:                     # else a run's: only XUT
        tensors, others = xut_part(tensors, path, ema)
        own = others if hdm.part_of(others, "vae.") else None
    inside = path.absolute().parent.name == "transformer"
    folder = path.absolute().parents[1] if inside else path.parent
    def beside(part, recorded):                              # small encoders move with their checkpoint
        known = "hdm" in metadata or inside
        return str(folder / part) if known and (folder / part).is_dir() else recorded
    if "hdm" in metadata:                                    # ours: the settings stand in the header
        with hdm.naming(path, "broken settings in its header"):
            settings = SAMPLING | json.loads(metadata["hdm"])
            settings["config"] = hdm.XUTConfig(**settings["config"])
        settings["vae"] = settings["vae"] and beside("vae", settings["vae"])          # "" is none: pixels
    else:                                                    # a published file, Lightning's, diffusers', bare
        settings = dict(config=config_from_tensors(tensors, path), text_encoder=hdm.TEXT_ENCODER,
                        text_length=512, vae=beside("vae", ""), step=0, images=0, **SAMPLING)
    settings["vae"] = str(path) if own else settings["vae"]
    settings["text_encoder"] = beside("text_encoder", settings["text_encoder"])
    with expecting(path, "vae", settings["vae"], given=own):
        vae = hdm.load_vae(settings["vae"], device, dtype, own) if settings["vae"] and with_vae else None
    def build():
        return hdm.XUT(settings["config"], init=False)
    return hdm.load_strict(build, tensors, path, device, dtype), vae, settings


def load_text_encoder(settings, device="cpu", dtype=None, place=""):
    """The TextEncoder that a checkpoint's settings name; place: another place of it."""
    name = place or settings["text_encoder"]
    with expecting("the checkpoint", "text_encoder", name, given=place):
        te = hdm.TextEncoder(name, settings["text_length"], device, dtype)
    if te.dim != settings["config"].ctx_dim:
        raise hdm.UserError(f"text encoder {name}: {te.dim} wide, but the model was trained "
                        f"with ctx_dim={settings['config'].ctx_dim}; name the text encoder of its training")
    return te


EQ_STATISTICS = (                  # latents_mean and latents_std of EQ-SDXL-VAE's config.json
    (-3.865960634760459, -1.3353925720045965, 0.8353661802812418, 0.909888159310023),
    (10.036514488374861, 6.848430044716239, 7.213817552213277, 5.591315799887989))


def published_shapes(c):
    """{name: shape} of XUT's tensors in the published layout, from the config c: a fork's XUT may differ."""
    D, mlp, p, freqs, shapes = c.dim, c.mlp_dim, c.patch_size, (c.heads, c.head_dim // 4, 2), {}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
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
    stacks = {"prev_tread_trns.blocks": c.pre_blocks, "post_tread_trns.blocks": c.post_blocks}
    for level in range(c.depth):
        stacks[f"backbone.enc_blocks.{level}"] = c.enc_blocks
        stacks[f"backbone.dec_blocks.{level}"] = c.dec_blocks
    for block, crosses in [(f"{stack}.{i}", "dec_blocks" in stack and i == 0)
                           for stack, count in stacks.items() for i in range(count)]:
        layer(f"{block}.mlp.w12", 2 * mlp, D)
        layer(f"{block}.mlp.w3", D, mlp)
        for part in ("mlp", "attn", "xattn")[:2 + crosses]:
            shapes[f"{block}.{part}_pre_norm.norm.weight"] = D,
        for attn in ("attn", "xattn")[:1 + crosses]:
            layer(f"{block}.{attn}.out", D, D)
            shapes[f"{block}.{attn}.rope.freqs"] = freqs
        shapes[f"{block}.attn.qkv.weight"] = 3 * D, D
        if crosses:
            shapes |= {f"{block}.xattn.q.weight": (D, D), f"{block}.xattn.kv.weight": (2 * D, D)}
    return shapes


def pipeline_configs(c, vae, text_length, encoder):
    """{file: its json} of a folder that the authors' diffusers pipeline loads. Their names, no others."""
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
        "model_index.json": index, "transformer/config.json": transformer, "scheduler/scheduler_config.json":
        dict(_class_name=scheduler, num_train_timesteps=1000, shift=1.0)}
    if vae is None:
        index["vae"] = [None, None]
    else:                                                    # HDM has statistics in place of the factors
        configs["vae/config.json"] = vae.diffusers_config() | dict(
            latents_mean=vae.mean, latents_std=vae.std, scaling_factor=1.0, shift_factor=None)
    return configs


def copy_text_encoder(settings, folder):
    """Copies it, from its folder or the hub's cache, and its tokenizer -> its class; says what is missing."""
    import huggingface_hub
    place = settings["text_encoder"]
    try:
        if not hdm.looks_local(place):
            place = huggingface_hub.snapshot_download(place, local_files_only=True)
        te = load_text_encoder(dict(settings, text_encoder=place), dtype=torch.bfloat16)
    except (hdm.UserError, OSError, ValueError) as error:
        why = error if isinstance(error, hdm.UserError) else "it is not in the hub's cache"
        print(f"missing: text_encoder/ and tokenizer/ of {settings['text_encoder']}, which other programs "
              f"need ({why}); --text_encoder=FOLDER names another place of it")
        return "Qwen3Model"                                  # the published one's
    place = Path(place)
    tokenizer = place if any(place.glob("tokenizer*")) else place.with_name("tokenizer")
    for source, part, without in (place, "text_encoder", "-"), (tokenizer, "tokenizer", "safetensors|bin"):
        (folder / part).mkdir()
        for file in source.iterdir():                        # no copytree: modes and subfolders stay behind
            if file.is_file() and not re.search(rf"^\.|\.({without})", file.name):
                shutil.copyfile(file, folder / part / file.name)
    return type(te.model).__name__


def report_readers(path, config, vae, settings):
    """Prints which programs read an export, and what of it they do not see."""
    encoder = Path(settings["text_encoder"]).name
    other = {"a folder": path.is_dir(), f"the text encoder ({encoder})": encoder != "Qwen3-0.6B",
             "the shapes": published_shapes(config) != published_shapes(hdm.PRESETS["base"]),
             "the statistics": len(vae.mean) != 4
             or not np.allclose((vae.mean, vae.std), EQ_STATISTICS, rtol=2e-3)}       # rounded to fp16
    reasons = ", ".join(name for name, differs in other.items() if differs)
    print(f"read by sample.py, the authors' {'diffusers pipeline' if path.is_dir() else 'tools'}"
          + ("" if reasons else ", ComfyUI's loader"))
    if reasons:
        print(f"not read by ComfyUI's loader, which takes a file of the base model's shapes (343M) and has "
              f"Qwen3-0.6B and EQ-SDXL-VAE's statistics built in; other here: {reasons}")
    if settings["t_shift"] != 1:
        print(f"not carried: t_shift={settings['t_shift']:g}; other programs draw with 1")


def export(path, model, vae, settings, force=False):
    """Write model and VAE in fp16 as published: a new FILE.safetensors, else a new diffusers-style folder.

    The settings (as from load_model) go into the header, for load_model; other programs do not look there,
    and would draw noise with options that are not the published ones: those need force.
    """
    path, config = Path(path), model.config
    odd = [f"{name}={getattr(config, name)}" for name in ("aspect_cond", "skips", "residual", "pos")
           if getattr(config, name) != getattr(hdm.XUTConfig, name)] + ["no VAE (pixels)"] * (vae is None)
    known = published_shapes(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if strange := [name for name in known | shapes if known.get(name) != shapes.get(name)]:
        odd.append(f"{len(strange)} tensors not of the published layout ({', '.join(strange[:3])})")
    if odd and not force:
        raise hdm.UserError(f"--export={path}: other programs cannot read {', '.join(odd)}; --force writes "
                            f"it, with its settings in the header, for sample.py alone")
    if path.exists():
        raise hdm.UserError(f"--export={path}: is there already, and is not overwritten; choose another name")
    # Of frequencies in fp16 other programs make angles, 1000 t times them, that are off by up to 0.16 rad.
    tensors = {f"unet.model.{name}": value.float() if name == "time_emb.freqs" else value.half()
               for name, value in model.state_dict().items()}
    if vae is not None:
        tensors |= {f"vae.{name}": value.half() for name, value in vae.state_dict().items()}
        tensors |= {name: torch.tensor(numbers).half()[None, :, None, None]
                    for name, numbers in dict(vae_mean=vae.mean, vae_std=vae.std).items()}
    if large := [name for name, value in tensors.items() if not hdm.is_finite(value)]:
        raise hdm.UserError(f"--export={path}: fp16 ends at 65504, too early for {', '.join(large[:3])}")
    header = dict(settings, vae="" if vae is None else "vae")             # load_model finds it where it lies
    with (hdm.naming(path, "cannot be written"),
          hdm.scratch_folder(path.absolute().parent, ".export-") as partial):
        whole = partial / "new"                              # gets its place when it is complete
        if path.suffix.lower() == ".safetensors":
            hdm.save_model(whole, tensors, header)
        else:
            whole.mkdir()
            encoder = copy_text_encoder(settings, whole)
            for name, own in pipeline_configs(config, vae, settings["text_length"], encoder).items():
                (whole / name).parent.mkdir(exist_ok=True)
                (whole / name).write_text(json.dumps(own, indent=2), encoding="utf-8")
            for part, prefix in dict(transformer="unet.", vae="vae.").items():
                if inside := hdm.part_of(tensors, prefix):
                    hdm.save_model(whole / part / "diffusion_pytorch_model.safetensors", inside, header)
        os.rename(whole, path)
    print(f"{path}: written, in float16" + ", for sample.py alone" * bool(odd))
    if not odd:
        report_readers(path, config, vae, settings)


# ---- commands ----------------------------------------------------------------------------------------------
def warn_idle(flags, p, s, jobs, settings):
    """Says what can have no effect: a flag in any job, or what a prompt's line sets in its own."""
    calls, lines = [], {}
    for job in jobs:
        unset = {name: settings[name] for name in ("cfg", "cfg_low") if getattr(job, name) is None}
        calls.append(SimpleNamespace(**vars(s) | vars(job) | unset))
        own = {name: getattr(job, name) for name in vars(p).keys() - flags.keys() - {"seed"}
               if getattr(job, name) != getattr(p, name)}
        lines[repr(own)] = own, calls[-1]                    # the same once
    hdm.warn_idle(flags, calls, IDLE)
    for own, call in lines.values():
        hdm.warn_idle(own, [call], IDLE)


def main(argv):
    if argv and not argv[0].startswith("-"):
        raise hdm.UserError(f"{argv[0]}: a prompt is given by --prompt {shlex.quote(' '.join(argv))}")
    doc = f"{__doc__.rstrip()}\n\nSamplers: {', '.join(hdm.SAMPLERS)}."
    _, flags = hdm.parse_args(argv, [ImageSettings, Sampling], doc=doc, aliases=ALIASES)
    values, expected = dict(flags), None
    if "from_image" in values:
        kept, expected = read_settings(values["from_image"])
        if values.keys() & {"prompts", "slots"}:             # other prompts
            kept.pop("prompt")
        values = kept | values
    own = [one.name for one in fields(ImageSettings) if one.name in values]
    p = ImageSettings(**{name: values.pop(name) for name in own})
    s = Sampling(**values)
    if s.batch_size < 1:
        raise hdm.UserError(f"--batch_size={s.batch_size}: at least 1")
    hdm.check_name(f"--file_type={s.file_type}", s.file_type, FORMATS, "type")
    rank, _ = hdm.start_ranks()
    device = hdm.pick_device(s.device)
    dtype = hdm.pick_dtype(s.dtype, device)
    jobs = [Job(**vars(p))]                                  # of --ui and --export
    if not s.ui and not s.export:                            # the first process reads and rolls dice for all
        jobs = hdm.gather(read_jobs(s, p, load_tipo) if rank == 0 else None)[0]
    columns, tops, sides = p.num_images if p.num_images > 1 else min(len(jobs), 8), (), ()
    if s.sheet:
        jobs, columns, tops, sides = read_sheet(s.sheet, jobs)
    hdm.make_folder(s.out, "--out")
    with hdm.naming(f"--out={s.out}", "no files can be written there"):
        tempfile.TemporaryFile(dir=s.out).close()
    jobs, paths = hdm.gather(number(jobs, Path(s.out)))[0], []
    files = {ckpt: find_weights(ckpt, s.ema) for ckpt in dict.fromkeys(job.ckpt for job in jobs)}
    for ckpt, file in files.items():
        how = ("cpu", torch.float32) if s.export else (device, dtype)
        model, vae, settings = load_model(file, *how, s.ema, not s.vae)
        digest = hashlib.sha256(np.memmap(file, np.uint8, "r")).hexdigest()           # mapped: no copy of it
        if expected not in (None, digest):
            print(f"warning: {s.from_image} was drawn by the model {expected[:10]}; {ckpt} is {digest[:10]}")
        if s.vae or vae is None and model.config.in_channels == 4:                    # published without VAE
            settings["vae"] = s.vae or hdm.EQ_VAE
            with expecting(ckpt, "vae", settings["vae"], given=s.vae):
                vae = hdm.load_vae(settings["vae"], *how)
        channels = 3 if vae is None else vae.latent_channels
        if channels != model.config.in_channels:
            its = f"those of the VAE {settings['vae']} {channels}" if vae else "and it has no VAE"
            raise hdm.UserError(f"--ckpt={ckpt}: its latents have {model.config.in_channels} channels, {its};"
                                f" --vae=PLACE names another, a folder, file or hub id")
        settings["text_encoder"] = s.text_encoder or settings["text_encoder"]
        todo = [job for job in jobs if job.ckpt == ckpt]
        if not s.ui:                                         # a page can change what it begins with
            warn_idle(flags, p, s, todo, settings)
        if s.export:
            if rank == 0:
                export(s.export, model, vae, settings, s.force)
            return
        get_te = partial(load_text_encoder, settings, device, dtype, s.text_encoder)
        common = dict(ema=s.ema, text_encoder=s.text_encoder, vae=s.vae, dtype=str(dtype)[6:],
                      model_hash=digest)
        if s.ui:
            return page(model, vae, get_te, settings, s, p, common)
        with tqdm(total=len(hdm.share(todo)), unit_scale=True, disable=rank > 0 or None) as bar:
            paths += draw_files(model, vae, get_te, todo, settings, s, common,
                                lambda done, x0: bar.update(done - bar.n))
        del model, vae                                       # room for the next checkpoint's
    paths = sorted(sum(hdm.gather(paths), []), key=lambda path: int(path.name.partition("-")[0]))
    if len(paths) > 1 and rank == 0:                         # a row for each prompt, small images enlarged
        images = [np.array(Image.open(path)) for path in (paths if s.sheet else paths[:100])]
        sheet = hdm.image_grid(images, columns, max(1, 128 // images[0].shape[1]), tops=tops, sides=sides)
        write_new(Path(s.out, "grid.png"), encode_file(np.array(sheet), "png"))
    print(f"images: {len(jobs)} in {s.out}, from {jobs[0].number:05d} on")


# ==== Extras ================================================================================================
# ---- a sheet of settings -----------------------------------------------------------------------------------
def read_sheet(text, jobs):
    """'steps=8,16;cfg=1,2' -> a Job for each cell, row by row; the columns; labels above and to the left."""
    axes = [{"": {}}]                                        # labels and what they set
    with hdm.naming(f"--sheet={text}", "settings that will not do"):
        for part in text.split(";"):
            name, _, values = part.strip().partition("=")
            words = [f"{name}={value.strip()}" for value in values.split(",")]
            axis = {}
            for word in words:
                _, axis[word] = hdm.parse_args(["--" + word], [ImageSettings], aliases=ALIASES)
            axes.append(axis)
        rows, columns = axes[-2:]
        pairs = itertools.product(rows.values(), columns.values())
        cells = [replace(jobs[0], **row, **column) for row, column in pairs]
    if len(axes) > 3 or len(jobs) > 1 or any(cell.num_images > 1 or cell.seed < 0 for cell in cells):
        raise hdm.UserError(f"--sheet={text}: one or two settings, and one prompt with one image, whose "
                            f"seed is not -1")
    return cells, len(columns), list(columns), list(rows)


# ---- TIPO: short prompts made longer -----------------------------------------------------------------------
def tipo_request(job, slots):
    """-> the text that TIPO goes on with; the job's prompt as slots of the model card's template."""
    parts = dict.fromkeys(re.findall(r"<\|(.+?)\|>", Sampling.format), "")
    kinds = {hdm.parse_caption(tag, spaces=True): name for name, tags in (*ENDING.items(), *slots.items())
             if name in parts for tag in tags.lower().split(",")}
    for tag in filter(None, (hdm.parse_caption(tag, spaces=True) for tag in re.split("[,\n]", job.prompt))):
        sentence = len(tag.split()) > 4                      # a guess
        kind = "natural language" if sentence else kinds.get(tag.lower(), "general")
        parts[kind] += ", " * bool(parts[kind]) + tag
    square = not job.width or not job.height                 # as far as is known here
    lines = {"rating": parts["rating"], "artist": parts["artist"], "characters": parts["characters"],
             "copyrights": parts["series"], "quality": parts["quality"],
             "aspect_ratio": f"{1 if square else job.width / job.height:.3f}",
             "target": "<|long|> <|tag_to_long|>",
             "tag": ", ".join(filter(None, (parts["special"], parts["general"])))}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items() if value)
    return f"{text}long: {parts['natural language']}".rstrip(), parts


def load_tipo(name):
    """-> expand(job, slots): the job's prompt with what TIPO (arXiv 2411.08127) adds to it.

    name: hub id or folder of a causal LM with its tokenizer. On the CPU, in float32: a prompt and a seed get
    the same words on any device. Tags of the negative prompt are not among them.
    """
    import transformers
    name = TIPO if name is True else name
    with hdm.naming(name, "no causal LM and tokenizer to be had for --tipo"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    def expand(job, slots):
        request, parts = tipo_request(job, slots)
        negative = hdm.parse_caption(job.negative_prompt.lower()).replace("_", " ").split(",")
        banned = [tag.strip() for tag in negative if tag.strip()]
        forms = [lead + form for tag in banned for lead in ("", " ") for form in (tag, tag.capitalize())]
        config = transformers.GenerationConfig(              # as TIPO's authors advise
            do_sample=True, temperature=0.35, top_p=0.95, min_p=0.1, top_k=60, repetition_penalty=1.17,
            max_new_tokens=TIPO_TOKENS, stop_strings=["\n"], eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            bad_words_ids=[tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms] or None)
        inputs = tokenizer(request, return_tensors="pt")
        with torch.random.fork_rng(devices=[]):              # generate takes no generator of its own
            torch.manual_seed(job.seed)
            output = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)[0]
        added = tokenizer.decode(output[inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        reply = added.partition("\n")[0].strip()
        # A tag can also be spelt with other tokens than the tokenizer's: its sentence goes, and what follows.
        spelt = rf"(?<!\w)({'|'.join(map(re.escape, banned))})(?!\w)"
        if banned and (match := re.search(spelt, reply.replace("_", " "), re.IGNORECASE)):
            reply = reply[:reply.rfind(".", 0, match.start()) + 1]
        if not reply:
            return job.prompt
        parts["natural language"] += " " + reply
        return fill_slots(Sampling.format, parts)
    return expand


# ---- the page ----------------------------------------------------------------------------------------------
ROWS = ("prompt", "negative_prompt", "ratio", "width height steps num_images", "seed sampler cfg shift",
        "zoom x_shift y_shift", "tread_cond tread_uncond", "cfg_low cfg_high cfg_rescale tipo")
SLIDERS = dict(zoom=(0.25, 4), x_shift=(-1, 1), y_shift=(-1, 1), tread_cond=(0, 0.9), tread_uncond=(0, 0.9))
RATIOS = "1:1 4:3 3:2 16:9 3:4 2:3 9:16".split()
ENLARGED = "img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"


def sides(ratio, size, step):
    """'3:2' -> width and height, multiples of step, that a model trained at this size is good at: advise."""
    w, h = map(int, ratio.split(":"))
    width = size * max(1, w / h) ** 0.5
    return [math.ceil(side / step) * step for side in (width, width * h / w)]


def preview(vae, latents):
    """What latents look like, at little cost: a shrunk latent is nearly the latent of the shrunk image, to
    which the published VAE was trained down to a quarter (arXiv 2502.09509)."""
    if vae is not None:
        shrink = min(1, 32 / max(latents.shape[2:]))
        size = [math.ceil(side * shrink) for side in latents.shape[2:]]
        latents = vae.decode(torch.nn.functional.interpolate(latents, size, mode="area"))
    return hdm.image_grid(to_uint8(latents), math.ceil(len(latents) ** 0.5), gap=0)


def make_controls(gr, start):
    """-> {name: gradio's control} of all in ROWS, row by row, with the values in start."""
    makers = dict(prompt=partial(gr.Textbox, lines=3), negative_prompt=gr.Textbox, tipo=gr.Checkbox,
                  sampler=partial(gr.Dropdown, list(hdm.SAMPLERS)), ratio=partial(gr.Radio, RATIOS),
                  **{name: partial(gr.Slider, *ends, step=0.01) for name, ends in SLIDERS.items()})
    controls = {}
    for row in ROWS:
        with gr.Row():
            for name in row.split():
                label = name.replace("_", " ")
                make = makers.get(name, gr.Number)
                controls[name] = make(value=start.get(name), label=label, min_width=100)
    return controls


def page(model, vae, get_te, settings, s, p, common):
    """Serves the page until Ctrl-C. Its file routes see s.out and a folder of uploads, nothing else."""
    address = re.fullmatch(r"(\S+):(\d{1,5})", "127.0.0.1:7860" if s.ui is True else s.ui)
    if not address or not 0 < int(address[2]) < 2 ** 16:
        raise hdm.UserError(f"--ui={s.ui}: HOST:PORT is needed, such as 127.0.0.1:7860")
    uploads = tempfile.TemporaryDirectory(prefix="hdm-", ignore_cleanup_errors=True)
    os.environ.update(GRADIO_TEMP_DIR=uploads.name, GRADIO_ANALYTICS_ENABLED="False")
    import gradio as gr
    given = s.prompt or s.prompts or s.slots
    prompt = read_jobs(replace(s, tipo=False), p, None)[0].prompt if given else ""
    p = resolved(p, settings, model, vae)
    start = vars(p) | dict(prompt=prompt, tipo=bool(s.tipo))
    get_te, get_tipo = cache(get_te), cache(load_tipo)
    get_te()                                                 # now; TIPO when it is first switched on
    controls, drawn, latest = {}, [], (0, None)              # latest: how many were shown, the last one
    asked, stopping = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def show_errors():                                       # of a UserError: its line
        try:
            yield
        except hdm.UserError as error:
            line = re.sub(re.escape(f"--from_image={uploads.name}") + r"[\\/].*[\\/]", "", str(error))
            raise gr.Error(html.escape(line, quote=False), print_exception=False) from error

    @show_errors()
    def draw_all(progress=gr.Progress(), *values):
        nonlocal latest
        stopping.clear()
        flags = [f"--{name}={value}" for name, value in zip(controls, values)]
        given = hdm.parse_args(flags, [ImageSettings, Sampling])[1]
        wish = replace(s, prompt=given.pop("prompt"), prompts="", slots="",
                       tipo=given.pop("tipo") and (s.tipo or True))
        jobs = number(read_jobs(wish, ImageSettings(**vars(p) | given), get_tipo), Path(s.out))

        def watch(done, x0):
            nonlocal latest
            if stopping.is_set():
                raise InterruptedError
            progress(done / len(jobs))
            if asked.is_set():                               # else no page has seen the last one yet
                asked.clear()
                latest = latest[0] + 1, preview(vae, x0)
        before = len(drawn)
        with contextlib.suppress(InterruptedError):
            for path in draw_files(model, vae, get_te, jobs, settings, s, common, watch):
                drawn.insert(0, (path, path.name))
                latest = latest[0] + 1, path
        return f"{len(drawn) - before} of {len(jobs)} images, in {s.out}"

    def update(seen):                                          # to a page that has seen so many
        asked.set()
        count, image = latest
        if seen == count:
            return gr.skip()
        return image, list(drawn) if isinstance(image, Path) else gr.skip(), count

    @show_errors()
    def take_settings(file):
        kept, digest = read_settings(file)
        stays = common | dict(init_image=p.init_image, mask=p.mask)
        kept = start | common | kept | dict(prompt=kept["prompt"][0], model_hash=digest)
        kept["tipo"] = False                                 # its words are in the prompt
        if other := ", ".join(name for name in stays if kept[name] != stays[name]):
            gr.Warning(f"drawn with another {other}: this page keeps its own")
        return [kept[name] for name in controls]

    async def fetch_nothing(url, *request):                  # as gradio would for whoever names it a URL
        raise gr.routes.HTTPException(403, "no URL is fetched here")
    gr.routes.secure_url_stream_response = gr.processing_utils.async_ssrf_protected_get = fetch_nothing

    with gr.Blocks(title="HDM", analytics_enabled=False) as blocks, gr.Row():
        with gr.Column():
            controls.update(make_controls(gr, start))
            ratio = controls.pop("ratio")                    # no setting, it sets two
            upload = gr.UploadButton("take the settings of an image", file_types=["image"])
        with gr.Column():
            with gr.Row():
                draw_button, stop_button = gr.Button("draw", variant="primary"), gr.Button("stop")
            state = gr.Textbox(label="drawn", lines=2)
            image = gr.Image(show_label=False, buttons=["fullscreen"], format="png", height=512)
            gallery = gr.Gallery(lambda: list(drawn), show_label=False, columns=4)
        inputs, quiet = list(controls.values()), dict(show_progress="hidden")
        gr.on([draw_button.click, controls["prompt"].submit], draw_all, inputs, state, api_name="draw")
        seen = gr.State(0)
        gr.Timer(0.5).tick(update, seen, [image, gallery, seen], api_name="update", **quiet)
        stop_button.click(stopping.set, queue=False, api_name="stop")
        upload.upload(take_settings, upload, inputs, api_name="settings", **quiet)
        step = model.config.patch_size * (1 if vae is None else vae.factor)
        ratio.input(lambda ratio: sides(ratio, settings["image_size"], step), ratio,
                    [controls["width"], controls["height"]], api_name="sides", **quiet)
    with hdm.naming(f"--ui={address[0]}", "cannot be served at, or something else is"):
        blocks.launch(server_name=address[1], server_port=int(address[2]), share=False, quiet=True,
                      prevent_thread_lock=True, show_error=True, footer_links=[], run_history=False,
                      theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                      allowed_paths=[str(Path(s.out).absolute())], css=ENLARGED)
    print(f"page: http://{address[0]} until Ctrl-C", flush=True)
    blocks.block_thread()
    stopping.set()
    uploads.cleanup()


# ---- the demo's judge -------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def templates(height, width):
    """Each size and shape at each place that keeps it whole, 64 of them to a short side (half a pixel at 32):
    n (size, shape, cy, cx), their (n, height * width) coverages, (n,) the squared lengths of those."""
    step, places = min(height, width) / 64, []
    for size, shape in itertools.product(prepare.RADIUS, prepare.SHAPES):
        rows, columns = (np.arange(*ends, step) for ends in prepare.centre_range(size, shape, height, width))
        places += [(size, shape, cy, cx) for cy, cx in itertools.product(rows, columns)]
    masks = [prepare.coverage(size, shape, height, width, cy, cx).ravel() for size, shape, cy, cx in places]
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
    coverage: a ragged edge or a stray pixel costs no verdict. An empty image still gets a guess."""
    ground, ink, share = look(image)
    places, masks, lengths = templates(*share.shape)
    fits = lengths - 2 * (masks @ share.ravel())                 # |mask - share|^2 less a constant
    size, shape, _, _ = places[np.argmin(fits)]
    return size, nearest(ink, prepare.COLOURS), shape, nearest(ground, prepare.BACKGROUNDS)


def places_and_sizes(images):
    """(n, 3): each shape's centre of mass (y, x), in pixels, and the square root of its area."""
    masks = [look(image)[2] > 0.5 for image in images]
    return np.array([[*np.argwhere(mask).mean(0), mask.sum() ** 0.5] for mask in masks])


def judge_camera(draw, side):
    """How draw(zoom=, x_shift=, y_shift=), images whose longer side is `side` pixels, moves and sizes the
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
    model, vae, defaults = load_model(settings.ckpt)
    asked = [words for words in prepare.UNSEEN for _ in range(settings.seeds)]
    prompts = [prepare.CAPTION.format(*words) for words in asked]
    seeds = list(range(settings.seeds)) * len(prepare.UNSEEN)
    draw = partial(generate, model, vae, load_text_encoder(defaults), prompts, seeds, defaults)
    if settings.camera:
        return judge_camera(draw, defaults["image_size"])
    right = np.array([judge(image) for image in draw()]) == asked      # (n, 4)
    right = np.column_stack([right, right.all(1)]).sum(0)
    print(f"{settings.ckpt}: {len(prepare.UNSEEN)} captions x {settings.seeds} seeds")
    print(f"{'':<12}{'right':>6}{'of':>6}{'%':>7}{'chance %':>10}")
    rows = prepare.ATTRIBUTES | {"all four": prepare.COMBINATIONS}
    for (name, choices), n in zip(rows.items(), right):
        print(f"{name:<12}{n:>6}{len(seeds):>6}{100 * n / len(seeds):>7.1f}{100 / len(choices):>10.1f}")


if __name__ == "__main__":
    hdm.run(main)
