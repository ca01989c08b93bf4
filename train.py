"""Train XUT on captioned images, on one device or on many.

    python train.py configs/demo.py --lr=0.3 --out_dir=out/b   # settings of a file and of the command line
    torchrun --nproc_per_node=4 -- train.py configs/256.py     # on four GPUs, with the same global batch
    python train.py configs/demo.py --resume                   # go on, bitwise, from the newest checkpoint
    python train.py configs/demo.py --init_from=out/demo --out_dir=out/c    # a new run from old weights
    python train.py --plot out/demo out/b                      # the curves of runs, in plot.png
    python train.py configs/256.py --plan --gpus=4             # hours, dollars, memory, before it begins
    python train.py configs/256.py --bench=50 --baseline       # where the time goes here, on made-up data

In order: settings; the data, their order, a look at them; checkpoints, log; the model; train, a flat loop;
what it costs.
All random choices (order, tags, crop, VAE sample, t, noise, kept tokens, dropouts) are functions of (seed,
epoch, sample), drawn on the CPU: the number of workers or GPUs changes nothing, resuming needs no generator.
"""
import bisect
import contextlib
import copy
import ctypes
import dataclasses
import gc
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import hdm
from prepare import Latents, latents_folder, open_at, open_index, shard
from sample import Picture, gather, generate, image_grid, prompt_line


# ---- Settings: flat, together with the fields of hdm.XUTConfig -------------------------------------------

@dataclasses.dataclass
class Run:
    out_dir: str = "out/run"       # checkpoints, metrics.jsonl, run.json and samples/ go here
    init_from: str = ""            # weights to start from: a run, a checkpoint, a published file, a hub id
    resume: bool | str = False     # bare: go on from the newest checkpoint of out_dir; or a checkpoint's path
    seed: int = 0                  # of everything random
    device: str = "auto"           # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"            # float32, or autocast to bfloat16 or float16; auto: 16 bit on CUDA
    compile: bool = True           # torch.compile of XUT's blocks, where a compiler is found
    memory_budget: float = 1.0     # compiled: share of activations kept, cheap ones are made again; 1: all
    workers: int = 4               # loader processes; 0: the main process loads
    max_steps: int = 0             # stop early at this step, the schedule unchanged; 0: at the stage's end
    max_hours: float = 0.0         # stop early, as by Ctrl-C, after this time; 0: never
    log_every: int = 20            # steps between two lines of metrics
    eval_every: int = 1000         # steps between two held-out losses; 0: never
    sample_every: int = 1000       # steps between two grids of previews; 0: never
    save_every: int = 1000         # steps between two checkpoints; 0: one at the end
    keep_ckpts: int = 3            # how many of the newest checkpoints stay; 0: all
    milestone_every: int = 0       # images; the first checkpoint after each multiple always stays; 0: none
    log: str = ""                  # metrics and previews go to wandb or tensorboard as well, if installed
    preview_prompts: str = ""      # file with one prompt a line, # first: a comment; previewed after captions


@dataclasses.dataclass
class Data:
    data: str = "data/train"       # what prepare.py wrote, or a source of captioned images as it takes it
    vae: str = hdm.EQ_VAE          # folder or hub id; "": train on pixels
    text_encoder: str = hdm.TEXT_ENCODER   # folder or hub id of a causal LM
    image_size: int = 256          # side of the square crop in pixels: an image's short side is scaled to it
    text_length: int = 256         # tokens that captions are cut to
    text_lengths: int = 4          # and padded to the nearest of so many, in equal steps; 1: to text_length
    mask_padding: bool = False     # False: pads are ordinary tokens, as published; True: nothing sees them
    caption_dropout: float = 0.1   # share of captions replaced by an empty one, for guidance
    tag_dropout: float = 0.25      # share of a caption's shuffled tags (after |||) that are left out
    group_dropout: float = 0.3     # share of its groups of them
    tag_separator: str = "$$"      # ",": captions are plain lists of tags, shuffled as a whole but for a |||
    spaces: bool = False           # underscores in captions become spaces, not in ^_^
    validation: float | None = None        # share of images held out, by a hash of the name; at most 512 are
                                           # used; None: 0.02, of few images what holds out one
    new_data: bool = False         # with --resume: other pictures than before, from a fresh epoch on
    latents: bool = False          # read prepare.py's cache of VAE latents in place of the pictures
    vae_chunk: int = 0             # pictures that the VAE takes at a time; 0: a micro-step's
    max_unreadable: float = 0.05   # share of the pictures; when more of them cannot be read, the run ends


@dataclasses.dataclass
class Optim:
    preset: str = "base"           # small, base or large: an XUTConfig, which the settings below change
    images: int = 152_500_000      # the stage's length in images seen (published at 256 px: 20 x 7.624M) ...
    epochs: float = 0.0            # ... or in passes over the data; 0: not given
    batch_size: int = 32           # images in one micro-step of one process
    global_batch: int = 2048       # images in one optimiser step, a multiple of batch_size x processes
    checkpointing: bool = False    # compute blocks again in the backward pass: a third slower, less memory
    lr: float = 0.5                # peak, before each tensor's division by its fan-in
    warmup: int = 1000             # steps of linear warm-up to the peak
    schedule: str = "cosine"       # then: cosine, to 1 % of the peak at the stage's end; constant
    beta1: float = 0.9             # AdamW
    beta2: float = 0.98            # AdamW
    weight_decay: float = 0.02     # AdamW's, times the tensor's own lr
    clip: float = 3.0              # largest global gradient norm; 0: any
    tread_rate: float = 0.5        # share of image tokens that go around the U, in [0, 1)
    t_shift: float = 1.0           # > 1 moves training and sampling times toward noise; 1: published
    ema: float = 0.9999            # decay of the averaged weights, a step; 0: no average
    sample_steps: int = 24         # Euler steps of previews, and sample.py's default for the checkpoint
    sample_cfg: float = 3.0        # guidance, likewise
    sample_cfg_low: float = 0.0    # ... at times t from here on alone: below, it sharpens mistakes, too


@dataclasses.dataclass
class Bench:
    bench: int = 0                 # in place of training: measure so many steps, on made-up data
    baseline: bool = False         # ... and again with the settings of a plain eager trainer: the ratio
    caption_tokens: int = 128      # ... the captions' mean length; they are uniform from 1/2 to 3/2 of it
    plan: bool = False             # in place of training: say what it will cost and whether it fits
    gpus: int = 4                  # ... on so many of these
    tflops: float = 209.5          # ... dense, 16 bit, with float32 sums, of each (RTX 5090: 209.5)
    utilisation: float = 0.25      # ... the share of it that is reached, a guess: --bench measures it
    dollars_per_gpu_hour: float = 0.35     # ... likewise a guess


@dataclasses.dataclass
class Settings(Bench, Optim, Data, Run):
    pass                           # all of them, flat


CLASSES = Run, Data, Optim, Bench, hdm.XUTConfig
LEAST = dict.fromkeys(("images", "batch_size", "global_batch", "image_size", "text_length", "text_lengths",
                       "log_every", "sample_steps", "caption_tokens", "gpus"), 1)     # of other numbers: 0
ABOVE_0, BELOW_1 = sys.float_info.min, math.nextafter(1, 0)    # normal: training flushes denormals
LEAST |= dict.fromkeys(("lr", "t_shift", "memory_budget", "tflops", "utilisation"), ABOVE_0)
MOST = dict(text_lengths=4, memory_budget=1, utilisation=1, sample_steps=1000, sample_cfg=100)
MOST |= dict.fromkeys(("caption_dropout", "tag_dropout", "group_dropout", "validation", "max_unreadable",
                       "tread_rate", "ema", "sample_cfg_low", "beta1", "beta2"), BELOW_1)

IDLE = [  # settings, when they have no effect, and why
    ("gpus tflops utilisation dollars_per_gpu_hour", lambda s: not s.plan, "without --plan"),
    ("baseline caption_tokens", lambda s: not s.bench, "without --bench"),
    ("new_data", lambda s: not s.resume, "without --resume"),
    ("memory_budget", lambda s: not s.compile, "with --compile=false"),
    ("vae_chunk", lambda s: s.latents or not s.vae, "with --latents or without a --vae"),
    ("preview_prompts", lambda s: not s.sample_every, "with --sample_every=0"),
    ("eval_every", lambda s: s.eval_every and s.validation == 0, "with --validation=0"),
    ("milestone_every", lambda s: not s.save_every, "with --save_every=0")]


def read_settings(argv, ranks=1):
    """-> the Settings, and the {name: value} that were given, also of XUTConfig."""
    (config_file,), flags = hdm.parse_args(argv, CLASSES, ["CONFIG"], __doc__)
    config = hdm.read_config(config_file, CLASSES)
    for place in (config, flags):                            # flags win over the file
        if place.get("images") and place.get("epochs"):
            raise hdm.UserError(f"images={place['images']}, epochs={place['epochs']}: one of the two, please")
    if flags.get("images"):
        config.pop("epochs", None)
    given = config | flags
    if given.get("epochs"):
        given.pop("images", None)                            # open_data counts them
    s = Settings(**{name: given[name] for name in given if hasattr(Settings, name)})
    for name, value in vars(s).items():
        least, most = LEAST.get(name, 0), MOST.get(name, math.inf)
        if isinstance(value, (int, float)) and not least <= value <= most:
            low = "above 0" if 0 < least < 1 else f"{least} or more"
            high = {math.inf: "", BELOW_1: ", below 1"}.get(most, f", at most {most}")
            raise hdm.UserError(f"--{name}={value}: must be {low}{high}")
    if s.global_batch % (s.batch_size * ranks):
        near = max(1, round(s.global_batch / s.batch_size / ranks)) * s.batch_size * ranks
        raise hdm.UserError(f"--global_batch={s.global_batch}: no multiple of batch_size x processes = "
                            f"{s.batch_size} x {ranks}; {near} is")
    if s.latents and not s.vae:
        raise hdm.UserError("--latents: a run in pixels, --vae=, has none")
    if not s.tag_separator.strip():
        raise hdm.UserError("--tag_separator=: $$, or a comma, is needed")
    hdm.check_name(f"--preset={s.preset}", s.preset, hdm.PRESETS, "preset")
    hdm.check_name(f"--schedule={s.schedule}", s.schedule, ("cosine", "constant"), "schedule")
    hdm.check_name(f"--log={s.log}", s.log, ("", "wandb", "tensorboard"), "place")
    before = Path(config_file).with_name(Path(s.init_from).name + ".py")    # configs/256.py of out/256
    fresh = s.init_from and not (s.resume or s.bench or s.plan)
    if fresh and not os.path.exists(s.init_from) and before.is_file():
        raise hdm.UserError(f"--init_from={s.init_from}: none; train.py {before} makes it, or name another")
    hdm.warn_idle(flags, [s], IDLE)
    return s, given


# ---- Data and their order --------------------------------------------------------------------------------

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
        self.pictures = sum(number for _, number, _ in parts)
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
        raise hdm.UserError(f"--validation={s.validation}: holds out {len(held)} of {len(index):,} pictures; "
                            f"{f'least is {least}' if parts else 'none is left'}; 0: no held-out loss")
    some = index.records[::1 + len(index) // 100_000]        # of very many a sample
    small = np.minimum(some["width"], some["height"]) < s.image_size
    if small.any():
        print(f"data: {100 * small.mean():.3g} % of the pictures are smaller than image_size and enlarged; "
              f"prepare.py --min_size={s.image_size} leaves them out")
    identity = hashlib.sha256(f"{index.about['identity']} {s.validation}".encode()).hexdigest()
    if len(set(gather((identity, str(s.resume))))) > 1:
        raise hdm.UserError(f"--data={s.data}, --resume={s.resume}: not the same to all processes")
    epochs = Epochs(parts, s.seed)
    s.images = max(1, round(s.epochs * epochs.length)) if s.epochs else s.images
    return index, epochs, held, identity


class Samples(Dataset):
    """Item i of the endless training stream, or of the held-out set: what the loss of one image needs.

    Training (places: Epochs): a random square crop. Held out (places: record numbers): centre crop, all tags,
    t and noise that no setting changes, no dropout, no TREAD. latents: prepare.Latents, or None.
    """

    def __init__(self, index, places, latents, s, config, factor, training):
        self.index, self.places, self.latents, self.training = index, places, latents, training
        self.s, self.config, self.factor = s, config, factor

    def __getitem__(self, i):
        unreadable = []
        for at in range(i, i + 100):                         # one bad file of millions must not end the run:
            try:                                             # the next in order takes its place
                item = self.item(at)
                return dict(item, trouble=("\n".join(unreadable), item.pop("changed")))
            except hdm.UserError as error:
                unreadable.append(str(error))
        raise hdm.UserError(f"100 pictures in a row cannot be read, from {unreadable[0]} on")

    def item(self, i):
        s, config, training, size = self.s, self.config, self.training, self.s.image_size
        epoch, copy, number = self.places[i] if training else (0, 0, self.places[i % len(self.places)])
        picture = self.index[number]
        name = f"{picture.source}/" * (picture.source > 0) + picture.name             # its own in all sources
        rng = random.Random(f"{s.seed} {epoch} {copy} {name}" if training else name)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        dropped = training and rng.random() < s.caption_dropout
        caption = "" if dropped else hdm.draw_caption(picture.caption, rng if training else None, s)
        # The whole picture, its short side X: (3, height, width), or its latent: (C or 2 C, height, width)
        whole = (self.latents or self.index).read(number, size)
        height, width = whole.shape[1:]
        sides = hdm.scaled_sides(picture.width, picture.height, size) if self.latents else (width, height)
        shape = config.in_channels, size // self.factor, size // self.factor          # (C, h, w)
        # Shifted square crop: the cut starts at any pixel, or any cell, of the long side.
        unit, side = (self.factor, shape[1]) if self.latents else (1, size)
        spare = width - side, height - side                  # one of them is 0
        left, top = (rng.randint(0, most) if training else most // 2 for most in spare)
        patch = config.patch_size * self.factor // unit
        # Held-out times are the published ones, without shift and not by hdm.draw_time: losses of runs that
        # train on other times compare.
        t = (hdm.draw_time(1, s.t_shift, generator) if training
             else torch.sigmoid(torch.randn(1, generator=generator)))[0]
        item = dict(caption=caption, changed=picture.name * self.index.changed(number),
                    crop=(left, top, side), aspect=torch.tensor(math.log(sides[0] / sides[1])),
                    pos=hdm.crop_positions(height, width, top, left, side, patch, config.pos),
                    t=t, noise=torch.randn(shape, generator=generator))
        item["moments" if self.latents else "pixels"] = whole[:, top:top + side, left:left + side]
        if s.vae:                                            # for a draw from its posterior
            item["vae_noise"] = torch.randn(shape, generator=generator)
        if training and s.tread_rate > 0:
            item["keep"] = hdm.pick_tokens(1, len(item["pos"]), s.tread_rate, generator)[0]
        return item


def say_what_is_cut(index, te, s):
    """Prints the share of captions that text_length cuts, of a sample as training draws and reads them."""
    some = range(0, len(index), 1 + len(index) // 2000)      # the index is in order of a hash
    texts = [hdm.draw_caption(index[i].caption, random.Random(i), s) for i in some]
    lengths = np.array([len(ids) for ids in te.tokenizer(texts)["input_ids"]])
    if share := (lengths > te.max_length).mean():
        print(f"captions: --text_length={s.text_length} cuts {share:.2%} of a sample of {len(texts):,}, of "
              f"up to {lengths.max()} tokens; a higher one keeps their ends, shorter captions cost less")


def padded_lengths(s):
    """The numbers of tokens that a micro-step's texts are padded to: all shapes that XUT will meet."""
    steps = range(1, s.text_lengths + 1)
    return sorted({math.ceil(s.text_length * step / s.text_lengths) for step in steps})


def loss_inputs(batch, vae, te, s, device, lap=lambda name: None):
    """A collated batch -> the arguments of hdm.flow_loss, through the frozen encoders; the host waits for
    nothing. lap is told what has just been done."""
    batch = {name: hdm.to_device(value, device) if isinstance(value, torch.Tensor) else value
             for name, value in batch.items()}
    if "moments" in batch:                                   # cached: the mean alone, or mean and logvar
        moments = batch["moments"].float().split(vae.latent_channels, dim=1)
        x0 = vae.latents(moments[0], moments[-1], batch["vae_noise"] if len(moments) > 1 else None)
    else:
        x0 = batch["pixels"].float() / 127.5 - 1                                      # (B, 3, X, X)
        if vae is not None:
            pieces = zip(*(whole.split(s.vae_chunk or len(x0)) for whole in (x0, batch["vae_noise"])))
            x0 = torch.cat([vae.encode(part, sample=True, noise=noise) for part, noise in pieces])
    lap("vae")
    ids = te.tokenize(batch["caption"], s.text_length)
    # Each caption keeps the pads up to its own length and no more, whatever stands beside it in the batch.
    lengths = padded_lengths(s)
    own = [lengths[bisect.bisect_left(lengths, len(row))] for row in ids]
    ctx, mask = te.encode(ids, max(own))
    if not s.mask_padding:
        mask = torch.arange(max(own)) < torch.tensor(own)[:, None] if min(own) < max(own) else None
    lap("text")
    inputs = {name: batch[name] for name in ("pos", "t", "noise", "keep", "aspect") if name in batch}
    return dict(inputs, x0=x0, ctx=ctx, ctx_mask=mask if mask is None else hdm.to_device(mask, device))


class Laps:
    """Seconds by what they went to; on CUDA by events, for which nothing waits until they are read."""

    def __init__(self, kind, seconds):
        self.cuda, self.marks, self.seconds = kind == "cuda", [], Counter(seconds)

    def __call__(self, name):
        """The time since the last call went to `name`; None: to nothing that is counted."""
        mark = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append((name, mark))

    def read(self):
        """-> {name: seconds} since the beginning."""
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (name, mark) in zip(self.marks, self.marks[1:]):
            if name is not None:
                self.seconds[name] += before.elapsed_time(mark) / 1000 if self.cuda else mark - before
        self.marks = []
        return self.seconds


def lr_at(seen, s, warmup, end):
    """The lr, before the division, of the step after `seen` images: linear warm-up over `warmup` images, then
    constant, or a cosine to 1 % of the peak at `end` images."""
    if seen < warmup:
        steps = warmup / s.global_batch
        return s.lr * min(seen / s.global_batch + 1, steps) / steps
    if s.schedule == "constant":
        return s.lr
    part = min(1, (seen - warmup) / max(1, end - warmup))
    return s.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


def open_schedule(s, state):
    """-> lr_at's warmup and end, in images. A resumed run with another global batch keeps its warm-up in
    images, and so its lr; where a command moves the lr, or changes the length, it says from what to what."""
    before = state.get("settings", vars(s))
    old = Settings(**{name: before[name] for name in before if hasattr(Settings, name)})
    old_warmup = state.get("warmup_images", old.warmup * old.global_batch)
    warmup = old_warmup if s.warmup == old.warmup else s.warmup * s.global_batch
    seen = state.get("images", 0)
    old_end, end = (seen + math.ceil((one.images - seen) / one.global_batch) * one.global_batch
                    for one in (old, s))                     # steps are never cut
    was, now = (f"{lr:.4g}" for lr in (lr_at(seen, old, old_warmup, old_end), lr_at(seen, s, warmup, end)))
    if was != now or s.images != old.images:
        print(f"lr at this point, {seen:,} images: {was} -> {now}")
    if warmup > end and not s.bench:
        print(f"warning: --warmup={s.warmup}, {warmup:,} images: the run ends before its peak, at {end:,}")
    return warmup, end


def dry_run(index, s, tokenizer):
    """prepare.py --dry_run, with its settings s: prints what training will meet; OUT.png shows the first 48
    pictures with their crops and captions."""
    n, epochs, lengths = len(index), Epochs(index.split(0.0)[0], 0), index.records["length"]
    sides = np.stack([index.records[name].astype(int) for name in ("width", "height")])
    print(f"{n:,} pictures, {lengths.sum() / 1e9:.3f} GB; {epochs.length:,.0f} to an epoch")
    for what, values, edges in (("width / height", sides[0] / sides[1], [0, 0.5, 0.75, 1, 1.01, 1.34, 2.01]),
                                ("short side", sides.min(0), sorted({0, 256, 512, 768, 1024, s.image_size}))):
        counts = np.histogram(values, [*edges, np.inf])[0]
        print(f"{what}: " + ", ".join(f"{n:,} from {edge:g}" for edge, n in zip(edges, counts) if n))
    cells = (sides * s.image_size // sides.min(0) // 8).prod(0).sum()
    print(f"--latents at {s.image_size} px: {16e-9 * cells:.3f} GB, with --mean_only half (4 channels, f8)")
    run = Settings(vae="", tread_rate=0.0, image_size=s.image_size, tag_separator=s.tag_separator,
                   spaces=s.spaces)
    some = np.random.default_rng(0).permutation(n)[:20_000].tolist()
    texts = [hdm.draw_caption(index[i].caption, None, run) for i in some]
    tokens = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    print(f"tokens of {len(texts):,} captions: median {np.median(tokens):.0f}, 95 % below "
          f"{np.quantile(tokens, 0.95):.0f}, at most {tokens.max()}; --text_length={s.text_length} cuts "
          f"{100 * (tokens > s.text_length).mean():.1f} %")
    tags = Counter(tag for text in texts for tag in {tag.strip() for tag in text.split(",")})
    print("most common tags: " + ", ".join(f"{tag} {count:,}" for tag, count in tags.most_common(20)))
    hashes, (_, which, counts) = [], np.unique(lengths, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(counts[which] > 1).tolist():     # others are alone with their length
        picture = index[i]
        with contextlib.suppress(OSError), open_at(picture.file, picture.offset, picture.length) as stream:
            hashes.append(hashlib.sha256(stream.read()).digest())
    print(f"exact duplicates: {len(hashes) - len(set(hashes)):,} pictures")
    config, tiles = hdm.XUTConfig(patch_size=s.image_size, in_channels=1), []
    samples = Samples(index, epochs, None, run, config, 1, training=True)
    for i in range(min(48, n)):
        tiles.append(Image.new("RGB", (201, 270), "white"))
        with contextlib.suppress(hdm.UserError):             # it cannot be read, and stays white
            item, pixels = samples.item(i), index.read(epochs[i][2], s.image_size).permute(1, 2, 0)
            whole, canvas = Image.fromarray(pixels.contiguous().numpy()), ImageDraw.Draw(tiles[-1])
            scale, (left, top, side) = 200 / max(whole.size), item["crop"]
            tiles[-1].paste(whole.resize([round(length * scale) or 1 for length in whole.size]))
            canvas.rectangle([scale * x for x in (left, top, left + side, top + side)], outline="red")
            canvas.text((0, 203), "\n".join(textwrap.wrap(item["caption"], 34)[:5]) or "(dropped)", "black")
    hdm.make_folder(Path(s.out).parent, "--out")
    image_grid(list(map(np.asarray, tiles)), columns=8, gap=10).save(f"{s.out}.png")
    print(f"{s.out}.png: {len(tiles)} pictures as training takes them: crop in red, caption below")


# ---- Checkpoints (folders with model.safetensors, ema.safetensors, train.pt, small encoders) and log -----

@contextlib.contextmanager
def if_the_disk_allows(what):
    """A full disk ends no run: what could not be written is told, and training goes on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        print(f"warning: not written: {what} ({hdm.first_line(error)})", flush=True)


def save_checkpoint(out_dir, settings, model, ema, state, keep, milestone, gb):
    """Written under another name and renamed when complete: a folder named ckpt_* is always whole."""
    final = out_dir / f"ckpt_{settings['step']:08d}"
    partial = out_dir / "partial_ckpt"
    free = shutil.disk_usage(out_dir).free / 1e9
    with if_the_disk_allows(f"{final}, which takes {gb:.2f} GB where {free:.2f} are free; older ones stay"):
        partial.mkdir()
        hdm.save_model(partial / "model.safetensors", model.state_dict(), settings)
        if ema is not model:
            hdm.save_model(partial / "ema.safetensors", ema.state_dict(), settings)
        torch.save(state, partial / "train.pt")
        if milestone:                                        # marked as never to be deleted
            (partial / "milestone").touch()
        for part in ("text_encoder", "vae"):                 # small ones go where the run's folder goes
            source, there = Path(settings[part]), os.path.isdir(settings[part])
            if there and sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) < 100e6:
                shutil.copytree(source, partial / part)
                if part == "text_encoder" and source.with_name("tokenizer").is_dir():
                    shutil.copytree(source.with_name("tokenizer"), partial / "tokenizer")
        hdm.open_modes(partial)                              # of copies, too
        for path in (*partial.rglob("*"), partial) if os.name != "nt" else ():        # Windows cannot
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)                             # a power cut leaves no name without its content
            os.close(descriptor)
        partial.rename(final)
        passing = [path for path in hdm.list_checkpoints(out_dir) if not (path / "milestone").exists()]
        for old in passing[:-keep] if keep else []:
            shutil.rmtree(old)
    shutil.rmtree(partial, ignore_errors=True)               # there is none, unless the disk was full
    return final.is_dir()


def load_state(s, identity, epochs, ranks):
    """train.pt of --resume, its place in the stream moved to a fresh epoch where the pictures are others."""
    with hdm.naming(f"--resume={s.resume}", "no whole checkpoint of a run; --init_from takes weights alone"):
        state = torch.load(Path(s.resume, "train.pt"), map_location="cpu", weights_only=True)
        old = vars(Settings()) | state["settings"]           # with what older checkpoints do not know
    if state["identity"] != identity:
        told = (f"--data={s.data}: other pictures or weights ({epochs.pictures:,}) than {s.resume} saw "
                f"({state['pictures']:,})")
        same_place = (old["data"], old["validation"]) == (s.data, s.validation)
        if same_place and epochs.pictures <= state["pictures"] and not s.new_data:
            raise hdm.UserError(f"{told}: put those back, or go on with these by --new_data")
        print(f"{told}: a new epoch begins")
        state["position"] = epochs.start(state["next_epoch"])
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in (vars(s) | dict(ranks=ranks)).items()
               if value != old.get(name) and name not in ("resume", "new_data", "max_steps", "max_hours")]
    print(f"resume: {s.resume}; changed by this command: {', '.join(changed) or 'nothing'}")
    return state


def read_metrics(run):
    """The records of a run's metrics.jsonl; a line that was left half-written is none."""
    file, records = Path(run, "metrics.jsonl"), []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def plot(runs):
    """The curves of some runs over the images that they saw -> plot.png in the current folder."""
    lines = {run: read_metrics(run) for run in runs}
    if not lines or not all(lines.values()):
        empty = [run for run in runs if not lines[run]]
        raise hdm.UserError(f"--plot {' '.join(empty) or 'RUN'}: a folder with metrics.jsonl is needed")
    from matplotlib.figure import Figure
    figure = Figure((20, 4), layout="constrained")
    for name, axis in zip(("loss", "val_loss", "grad_norm", "images_per_s"), figure.subplots(1, 4)):
        for run in runs:
            points = [(line["images"], line[name]) for line in lines[run] if line.get(name) is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], label=run)
        axis.set(title=name, xlabel="images", yscale="log" if "loss" in name else "linear")
        axis.legend()
    figure.savefig("plot.png")
    print(f"plot.png: {', '.join(runs)}")


def tracker(s, folder, start, run_id):
    """-> report(step, record, sheet): a line of metrics and an image of previews, to wandb, tensorboard or,
    with s.log "", nobody; wandb's id of the run, in which a resumed one goes on."""
    def numbers(record):
        return {name: value for name, value in record.items() if isinstance(value, float)}
    def report(step, record={}, sheet=None):
        pass
    if s.log == "wandb":
        import wandb
        with hdm.naming("--log=wandb", "no run can be begun there"):
            run = wandb.init(project="hdm", name=str(folder), config=vars(s), id=run_id, resume="allow")
        run_id = run.id
        def report(step, record={}, sheet=None):
            previews = {} if sheet is None else {"previews": wandb.Image(sheet)}
            run.log(numbers(record) | previews, step=step)
    if s.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder, purge_step=start)      # what stood there from this step on is hidden
        def report(step, record={}, sheet=None):
            for name, value in numbers(record).items():
                board.add_scalar(name, value, step)
            if sheet is not None:
                board.add_image("previews", np.asarray(sheet), step, dataformats="HWC")
            board.flush()
    return report, run_id


def open_log(out_dir, s, config, start, run_id):
    """The folder is this run's: run.json, metrics.jsonl less what a resumed run writes again or never had."""
    lock = FileLock(out_dir / "lock")                        # free when this process ends, however it ends
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise hdm.UserError(f"--out_dir={out_dir}: another run is at work there (if none is, remove "
                            f"{out_dir / 'lock'})") from error
    except (NotImplementedError, OSError) as error:          # of some network file systems
        print(f"warning: {out_dir} cannot be locked ({hdm.first_line(error)}): start no second run there")
    shutil.rmtree(out_dir / "partial_ckpt", ignore_errors=True)     # of a run that was killed while saving
    commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')    # or why it is none
    run = dict(command=sys.argv, settings=vars(s), config=dataclasses.asdict(config), git_commit=commit,
               versions=dict(python=sys.version, torch=torch.__version__, numpy=np.__version__))
    (out_dir / (f"run_{start:08d}.json" if start else "run.json")).write_text(json.dumps(run, indent=1))
    scheduled = start > 0 and any(every and start % every == 0 for every in (s.log_every, s.eval_every))
    lines = [record for record in read_metrics(out_dir) if record["step"] < start + scheduled]
    (out_dir / "metrics.new").write_text("".join(json.dumps(record) + "\n" for record in lines))
    (out_dir / "metrics.new").replace(out_dir / "metrics.jsonl")
    report, run_id = tracker(s, out_dir, start, run_id)
    sheet = out_dir / "samples" / f"{start:08d}.png"
    if start and s.log == "tensorboard":                     # this step's are hidden, too, but stay
        record = lines[-1] if lines and lines[-1]["step"] == start else {}
        report(start, record, Image.open(sheet) if sheet.is_file() else None)
    return lock, report, run_id


def read_prompts(file):
    """The prompts of --preview_prompts, one a line."""
    with hdm.naming(f"--preview_prompts={file}", "no readable file of one prompt a line"):
        lines = [line.strip() for line in hdm.read_text(file).split("\n")]
        prompts = [line for line in lines if line and not line.startswith("#")]
        for line in prompts:
            if prompt_line(line, Picture()).prompt != line:
                raise hdm.UserError(f"--preview_prompts={file}: {line!r}: a line holds no settings here, "
                                    f"all have --sample_steps and --sample_cfg")
    if not prompts:
        raise hdm.UserError(f"--preview_prompts={file}: no prompt in it")
    return prompts


# ---- The model, the loop --------------------------------------------------------------------------------

def build_model(s, given, vae, ctx_dim, device):
    """-> XUT in float32 from --resume, --init_from or the preset; given: the settings that were named."""
    torch.manual_seed(s.seed)                                # for the weights' init, and for nothing after it
    preset = dataclasses.asdict(hdm.PRESETS[s.preset])
    explicit = {name: given[name] for name in given if name in preset}
    encoders = dict(in_channels=vae.latent_channels if vae else 3, ctx_dim=ctx_dim)
    source = s.resume or s.init_from
    if source:
        model, _, old = hdm.load_model(source, device, ema=not s.resume, with_vae=False)
        model = copy.deepcopy(model)                         # mapped weights lie unaligned: sums round anew
        print(f"weights: {source}" + f", step {old['step']:,}, {old['images']:,} images" * bool(old["step"]))
    else:                                                    # the encoders' two numbers win over the preset's
        model = hdm.XUT(hdm.XUTConfig(**preset | encoders | explicit)).to(device)
    if s.init_from and not s.resume and not model.config.aspect_cond and given.get("aspect_cond", True):
        print(f"{source} has no aspect input: it starts at zero (--aspect_cond=false leaves it out)")
        weights, model = model.state_dict(), hdm.XUT(dataclasses.replace(model.config, aspect_cond=True))
        model.to(device).load_state_dict(weights, strict=False)
    for name, value in ((preset if "preset" in given else {}) | explicit | encoders).items():
        if getattr(model.config, name) != value:
            raise hdm.UserError(f"{name}: {source or 'the config'} says {getattr(model.config, name)}, the "
                                f"{'encoders say' if name in encoders else 'command says'} {value}")
    hdm.check_size(s.image_size, s.image_size, model.config, vae)
    hdm.Block.checkpointing = s.checkpointing
    return model.train()


def tell_troubles(s, heard, told, pictures, waited):
    """Warns once each of pictures that cannot be read, of one that has changed and of slow data -> how many
    cannot be read. heard: "trouble" of this process's Samples, emptied; told: the warnings so far, by kind;
    waited: the share of the time."""
    new = {}
    for texts, changed in sum(gather(heard), []):
        lines = filter(None, "\n".join(texts).split("\n"))
        new |= {line: f"{line}; the next in order takes its place" for line in lines}
        new |= {"changed": f"{name} or its caption is not as it was indexed: run prepare.py again"
                for name in changed if name}
    if waited > 0.1:
        new["slow"] = (f"{waited:.0%} of the time is spent waiting for data; what may help: more --workers "
                       f"(now {s.workers}; {os.cpu_count()} cores), a faster disk, --latents")
    for kind in new:
        if kind not in told:
            print(f"warning: {new[kind]}", flush=True)
    told.update(new)
    heard.clear()
    unreadable = told.keys() - {"changed", "slow"}
    if len(unreadable) > math.ceil(s.max_unreadable * pictures):
        raise hdm.UserError(f"{len(unreadable)} of {pictures:,} pictures cannot be read, more than "
                            f"--max_unreadable={s.max_unreadable}, such as {min(unreadable)}")
    return len(unreadable)


def deal(index, epochs, s, first, last, rank, ranks):
    """The stream's items from first to last that one process takes, in its order.

    Each global batch is put in order of its captions' lengths, so that a micro-step's are alike and little is
    padded, and dealt in turns: all processes see the same order, and a step has the same pictures whatever
    their number.
    """
    for base in range(first, last, s.global_batch):
        items = range(base, base + s.global_batch)
        if s.text_lengths > 1 and s.global_batch > s.batch_size:
            items = sorted(items, key=lambda i: len(index[epochs[i][2]].caption))
        for start in range(rank * s.batch_size, s.global_batch, ranks * s.batch_size):
            yield from items[start:start + s.batch_size]


def compile_blocks(model, s, autocast, device, side):
    """Compiles XUT's blocks for every shape that training will meet, before the first step."""
    torch.compiler.set_stance("default")
    lengths = padded_lengths(s)
    mixed = [] if s.mask_padding else [(T, True) for T in lengths[1:]]                # shorter ones beside T
    print(f"compile: XUT's blocks, for texts of {', '.join(map(str, lengths))} tokens", flush=True)
    blocks = [module for module in model.modules() if isinstance(module, hdm.Block)]
    torch._dynamo.config.recompile_limit = 100               # with 8 it would do without from the ninth on
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False                # block by block, exchange overlaps anyway
    torch._functorch.config.activation_memory_budget = s.memory_budget
    try:
        for block in blocks:                                 # all alike: compiled once, used by all
            block.compute = torch.compile(block.compute, dynamic=False)
        for T, masked in [(T, s.mask_padding) for T in lengths] + mixed:
            inputs = hdm.blank_inputs(model.config, s.batch_size, side, T, s.tread_rate, masked, device)
            with autocast:
                hdm.flow_loss(model, **inputs).backward()
        torch.compiler.set_stance("fail_on_recompile")       # a shape that was forgotten is an error
    except Exception as error:
        if "out of memory" in str(error):
            raise
        why = getattr(error, "inner_exception", error)       # the backend's own
        print(f"compile: failed, running eagerly ({hdm.first_line(why)})")
        for block in blocks:
            del block.compute
    model.zero_grad(set_to_none=True)


def catch_signals(worker=None):
    """From now on Ctrl-C and SIGTERM are noted in the list that comes back, a second one ends the process.

    Also for loader processes (worker): else the signal of a whole group ends them before their step.
    """
    noted = []
    def note(number, frame):
        noted.append(time.monotonic())
        if noted[-1] - noted[0] > 1:                         # torchrun repeats what the terminal sent to all
            os._exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return noted


def keep_freed_memory():
    """Where there is glibc: to get it anew from the system costs a tenth of a step on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-4, 0)                     # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)           # M_TRIM_THRESHOLD


def train(s, given, rank, ranks):
    device = hdm.pick_device(s.device)
    kind = device.split(":")[0]                              # what autocast and the scaler want to know
    dtype = hdm.pick_dtype(s.dtype, device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)                        # events and memory are then this one's
    if kind == "cpu":
        torch.set_flush_denormal(True)                       # numbers below 1e-38 can cost tenfold
        keep_freed_memory()
    out_dir, existing = Path(s.out_dir), hdm.list_checkpoints(s.out_dir)
    if s.resume is True and not existing:
        raise hdm.UserError(f"--resume: no checkpoint in {out_dir}; leave it out to start a run there")
    if s.resume:                                             # a run: its newest checkpoint
        s.resume = str((hdm.list_checkpoints(out_dir if s.resume is True else s.resume) or [s.resume])[-1])
    if existing and not s.resume:
        raise hdm.UserError(f"--out_dir={out_dir} holds {existing[-1].name}: --resume, or another --out_dir")
    more_prompts = read_prompts(s.preview_prompts) if s.preview_prompts else []
    index, epochs, held_out, identity = open_data(s)
    state = load_state(s, identity, epochs, ranks) if s.resume else {}
    start, seen, position = (state.get(name, 0) for name in ("step", "images", "position"))
    if s.resume and existing and int(existing[-1].name[5:]) > start:
        raise hdm.UserError(f"--out_dir={out_dir} holds the newer {existing[-1].name}; name another out_dir")

    # The frozen encoders, the model, its average, the optimiser
    if rank > 0:                                             # rank 0 goes first: one download, then the cache
        gather(None)
    te = hdm.TextEncoder(s.text_encoder, s.text_length, device, dtype)
    vae = hdm.load_vae(s.vae, device, dtype) if s.vae else None
    model = build_model(s, given, vae, te.dim, device)
    if rank == 0:
        gather(None)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if s.ema else model
    optimizer = torch.optim.AdamW(hdm.parameter_groups(model), fused=True)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    if s.resume:
        optimizer.load_state_dict(state.pop("optimizer"))
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())                # empty: was not fp16
        if s.ema:
            ema.load_state_dict(hdm.read_tensors(hdm.find_weights(s.resume, ema=True))[0])
    for group in optimizer.param_groups:                     # a resumed run's, too, are the command's
        group.update(betas=(s.beta1, s.beta2), weight_decay=s.weight_decay)

    # The data, the plan
    cache = Latents(s, index, vae) if s.latents else None
    samples = Samples(index, epochs, cache, s, model.config, vae.factor if vae else 1, training=True)
    held = Samples(index, held_out, cache, s, model.config, samples.factor, training=False)
    say_what_is_cut(index, te, s)
    shown = held_out[:8] or [epochs[i][2] for i in range(8)]                          # in previews
    prompts = [hdm.draw_caption(index[number].caption, None, s) for number in shown] + more_prompts
    preview_seeds = [*range(len(shown)), *range(len(more_prompts))]
    micro_steps = s.global_batch // s.batch_size // ranks
    warmup, end = open_schedule(s, state)
    total = start + (end - seen) // s.global_batch
    last = min(total, s.max_steps) if s.max_steps else total
    if start >= last:
        raise hdm.UserError(f"--resume={s.resume}: at step {start} of {last}, so there is nothing to do")
    inner = Path(s.vae, "vae")                               # of a larger folder
    names = s.text_encoder, str(inner) if s.vae and inner.is_dir() else s.vae
    text_path, vae_path = (os.path.abspath(name) if os.path.exists(name) else name for name in names)
    settings = dict(config=model.config, text_encoder=text_path, text_length=s.text_length, vae=vae_path,
                    image_size=s.image_size, steps=s.sample_steps, cfg=s.sample_cfg,
                    cfg_low=s.sample_cfg_low, t_shift=s.t_shift, tag_separator=s.tag_separator,
                    spaces=s.spaces)
    hdm.make_folder(out_dir / "samples", "--out_dir")
    lock = report = run_id = None
    if rank == 0:
        lock, report, run_id = open_log(out_dir, s, model.config, start, state.get("wandb"))
    parameters = sum(p.numel() for p in model.parameters())
    gb = 4e-9 * parameters * (4 if s.ema else 3)             # a checkpoint: weights, moments, average
    kept = s.keep_ckpts + 1 if s.keep_ckpts else total // (s.save_every or total)
    kept += s.images // (s.milestone_every or s.images + 1)
    print(f"{parameters:,} parameters, {ranks} x {device}, {dtype}; {epochs.pictures:,} pictures, "
          f"{len(held_out):,} held out (validation {s.validation:.3g})\n"
          f"{s.images:,} images, {s.images / epochs.length:.2f} epochs; steps {start:,} to {last:,} of "
          f"{total:,}, {warmup / s.global_batch:,.0f} of warm-up; "
          f"a step: {ranks} processes x {micro_steps} x {s.batch_size}\n"
          f"checkpoints of {gb:.3f} GB, at most {kept}: {gb * kept:.2f} GB; "
          f"free: {shutil.disk_usage(out_dir).free / 1e9:.2f} GB", flush=True)
    stream = deal(index, epochs, s, position, position + (last - start) * s.global_batch, rank, ranks)
    held_batches = DataLoader(held, s.batch_size, sampler=range(rank, len(held_out), ranks))
    noted, deadline = catch_signals(), time.monotonic() + (s.max_hours * 3600 or math.inf)
    batches = iter(DataLoader(samples, s.batch_size, sampler=stream, num_workers=s.workers,
                              worker_init_fn=catch_signals, pin_memory=kind == "cuda"))
    network = model
    if ranks > 1:
        network = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    autocast = torch.autocast(kind, dtype, enabled=dtype != torch.float32)
    if s.compile:
        compile_blocks(model, s, autocast, device, s.image_size // samples.factor)

    # Since the last line of metrics: sums of losses and their number by tenths of t; seconds
    window, laps = state.get("window", torch.zeros(2, 10)).to(device), Laps(kind, state.get("seconds"))
    bad = state.get("bad", torch.zeros(2, dtype=torch.int64)).to(device)              # skipped: all, in a row
    lr, norm, T, stop, began = lr_at(seen, s, warmup, end), None, 0.0, False, time.monotonic()
    heard, told = [], {}                                     # troubles with the data
    def save():
        state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, images=seen,
                     position=position, next_epoch=epochs.next_epoch(position), pictures=epochs.pictures,
                     identity=identity, window=window, bad=bad, seconds=dict(laps.read()),
                     warmup_images=warmup, wandb=run_id,
                     settings=vars(s) | dict(ranks=ranks))
        milestone = s.milestone_every and seen % s.milestone_every < s.save_every * s.global_batch
        return rank > 0 or save_checkpoint(out_dir, settings, model, ema, state, s.keep_ckpts, milestone, gb)

    for step in tqdm(range(start, last + 1), disable=rank > 0 or not sys.stderr.isatty()):
        # What is due after `step` steps: held-out loss, previews, a line of metrics, a checkpoint
        def due(every):                                      # a resumed run has done its first step's already
            return every > 0 and (step % every == 0 or step == total) and (step > start or step == 0)
        val_loss = None
        settings.update(step=step, images=seen)
        model.eval()
        eagerly = torch.compiler.set_stance("force_eager") if s.compile else contextlib.nullcontext()
        with torch.no_grad(), autocast, eagerly:             # of any shape
            if held_out and due(s.eval_every):               # with fixed noise and t: runs compare by it
                val_loss = 0.0
                for batch in held_batches:
                    inputs = loss_inputs(batch, vae, te, s, device)
                    val_loss += hdm.flow_loss(ema, **inputs, reduction="none").sum().item()
                    heard.append(batch["trouble"])
                val_loss = sum(gather(val_loss)) / len(held_out)
            if due(s.sample_every):                          # the same prompts and seeds each time
                images = generate(ema, vae, te, prompts, preview_seeds, settings, s.batch_size)
                if rank == 0:
                    with if_the_disk_allows("a sheet of previews"):
                        sheet = image_grid(images, 4, scale=max(1, 128 // s.image_size))
                        sheet.save(out_dir / "samples" / f"{step:08d}.png")
                        report(step, sheet=sheet)
        model.train()
        if due(s.log_every) or val_loss is not None or step == last > start:
            sums, (skipped, in_a_row) = window.tolist(), bad.tolist()                 # of losses, of images
            if in_a_row >= 10:
                first = position - in_a_row * s.global_batch
                names = [index[epochs[i][2]].name for i in range(first, first + s.global_batch)]
                (out_dir / "bad_images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
                raise hdm.UserError(f"no finite loss or gradient since step {step - in_a_row}, of the images "
                                    f"{', '.join(names[:20])} (all: bad_images.txt); lower --lr, --resume")
            count, split = sum(sums[1]), laps.read()
            seconds = sum(split.values())
            waited = split["data"] / seconds if step - start > s.log_every else 0         # but at the start
            unreadable = tell_troubles(s, heard, told, epochs.pictures, waited)
            record = dict(
                step=step, images=seen, epoch=position / epochs.length, lr=lr, val_loss=val_loss,
                skipped=skipped, data_s=split["data"],
                loss=sum(sums[0]) / count if count else None,
                grad_norm=norm.item() if norm is not None and norm.isfinite() else None,
                images_per_s=count / seconds if seconds else None, unreadable=unreadable,
                loss_by_t=[a / b if b else None for a, b in zip(*sums)], split_s=split, text_tokens=T,
                memory_gb=torch.cuda.max_memory_allocated(device if kind == "cuda" else None) / 1e9)  # or 0
            words = [f"step {step}/{last}"] + [f"{name} {record[name]:.4g}" for name in (
                "loss", "val_loss", "images_per_s", "skipped") if record[name]]
            left = (time.monotonic() - began) / max(1, step - start) * (last - step) / 60
            with if_the_disk_allows("a line of metrics"):
                tqdm.write(" | ".join(words + [f"{left:.1f} min left"] * (step > start)))
                sys.stdout.flush()
                if rank == 0:
                    with open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    report(step, record)
        if step % s.log_every == 0:
            window, laps = torch.zeros_like(window), Laps(kind, {})
        if due(s.save_every) and start < step < last:
            save()
        if step == last:
            break

        # One optimiser step
        laps(None)
        lr, T = lr_at(seen, s, warmup, end), 0.0
        for group in optimizer.param_groups:
            group["lr"] = lr / group["fan_in"]
        stats = torch.zeros_like(window)
        for micro in range(1, micro_steps + 1):
            if stop := any(gather(bool(noted) or time.monotonic() > deadline)):       # all, or none
                break
            batch = next(batches)
            laps("data")
            heard.append(batch["trouble"])
            network.require_backward_grad_sync = micro == micro_steps                 # DDP's: once a step
            with hdm.SHARED_CPU.work(device):
                inputs = loss_inputs(batch, vae, te, s, device, laps)
                with autocast:
                    losses = hdm.flow_loss(network, **inputs, reduction="none")       # (B,)
                laps("forward")
                scaler.scale(losses.mean() / micro_steps).backward()
                laps("backward")
            T += inputs["ctx"].shape[1] / micro_steps
            tenth = (10 * inputs["t"]).long().clamp(max=9)[:, None] == torch.arange(10, device=device)
            stats += torch.stack([losses.detach() @ tenth.float(), tenth.sum(0)])
        if stop:                                             # the step begins anew when the run goes on
            break
        if ranks > 1:
            torch.distributed.all_reduce(stats)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        finite = stats.isfinite().all() & norm.isfinite()
        optimizer.found_inf = 1 - finite.float()             # the fused AdamW skips the step: no host waits
        if kind != "mps" or finite:                          # whether MPS heeds found_inf was not tried
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        window += torch.where(finite, stats, 0)
        bad = torch.stack([bad[0] + ~finite, (bad[1] + 1) * ~finite])
        if s.ema:
            decay = min(s.ema, (1 + step) / (10 + step))     # short at first: the init is soon forgotten
            torch._foreach_lerp_(list(ema.parameters()), [p.data for p in model.parameters()], 1 - decay)
        seen, position = seen + s.global_batch, position + s.global_batch
        laps("optimiser")

    if s.bench:
        return
    if not (out_dir / f"ckpt_{step:08d}").is_dir() and not save():
        raise hdm.UserError(f"--out_dir={out_dir}: step {step} is not saved; make room, then --resume")
    gather(None)                                             # the others wait for rank 0's files
    again = ["torchrun", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else ["python"]
    print(f"stopped at step {step}; to go on: {shlex.join([*again, *sys.argv, '--resume'])}" if stop else
          f"done: python sample.py --ckpt={out_dir} --prompt {shlex.quote(prompts[0])}")


# ---- What it costs: planned, and measured ----------------------------------------------------------------

def at_hand(name):
    """Whether an encoder can be had without a download: a path, or in the hub's cache."""
    import huggingface_hub
    return os.path.exists(name) or not hdm.looks_local(name) and isinstance(
        huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def costs_of(s, given, T, dtype=torch.bfloat16):
    """-> hdm.image_costs of the run with T text tokens; the numbers of parameters of XUT, VAE, text encoder.
    Encoders that are not at hand are taken for the published ones."""
    import transformers
    if away := [name for name in (s.vae, s.text_encoder) if name and not at_hand(name)]:
        print(f"not at hand, counted as the published one: {', '.join(away)}")
    with hdm.naming(s.text_encoder, "no text encoder"):
        text = (transformers.AutoConfig.from_pretrained(s.text_encoder) if at_hand(s.text_encoder)
                else transformers.Qwen3Config(**hdm.QWEN3))
    vae = hdm.load_vae(s.vae, "meta") if at_hand(s.vae) else None
    with torch.device("meta"):
        vae = vae or (hdm.VAE() if s.vae else None)
        text = hdm.text_part(hdm.text_class(text).from_config(text)).float()
        model = build_model(s, given, vae, text.config.hidden_size, "meta")
    side = s.image_size // (vae.factor if vae else 1)
    numbers = [sum(p.numel() for p in module.parameters()) if module else 0 for module in (model, vae, text)]
    encoder = None if s.latents else vae
    return hdm.image_costs(model.config, side, T, s.tread_rate, encoder, text, dtype), numbers


def plan(s, given):
    """Prints what the run costs on other machines, counted, and a guess of how much of their rate it gets."""
    if s.epochs:
        open_data(s)                                         # counts the images of an epoch
    s.init_from = s.resume = ""                              # what the weights are costs nothing
    dtype = torch.float32 if s.dtype == "float32" else torch.bfloat16
    costs, (parameters, *encoders) = costs_of(s, given, s.text_length, dtype)
    parts = {"XUT forward": costs["xut"], "and backward": costs["step"] - costs["xut"],
             "forward again": costs["xut"] * s.checkpointing, "VAE": costs["vae"],
             "text encoder": costs["text"]}
    print(f"GFLOP of an image of {s.image_size} px with {s.text_length} text tokens: "
          + ", ".join(f"{name} {flops / 1e9:.1f}" for name, flops in parts.items()))
    limit = s.gpus * s.tflops * 1e12 / sum(parts.values())
    for what, share in (("the limit", 1.0), (f"a guess, --utilisation={s.utilisation}", s.utilisation)):
        hours = s.images / limit / share / 3600
        print(f"{what}: {s.images:,} images on {s.gpus} x {s.tflops} TFLOP/s: {limit * share:.1f} images/s, "
              f"{hours:.1f} h, {s.gpus * hours:.1f} GPU-hours, "
              f"{s.dollars_per_gpu_hour * s.gpus * hours:,.0f} dollars")
    exchanged = 2 * (s.gpus - 1) / s.gpus * 4e-9 * parameters                         # ring, float32
    fixed = 4 * parameters * (5 if s.ema else 4) + dtype.itemsize * sum(encoders) + costs["shared"]
    fixed, each = 1e-9 * fixed, 1e-9 * costs["checkpointed" if s.checkpointing else "bytes"]
    fits = ", ".join(f"{gb} GB {max(0, int((gb - 1 - fixed) / each))}" for gb in (8, 12, 16, 24, 32))
    print(f"each GPU sends {exchanged:.2f} GB of gradients a step of {s.global_batch} images\n"
          f"memory: {fixed:.2f} GB of weights, gradients, AdamW, EMA and encoders, {each:.3f} GB an image of "
          f"a micro-step (counted, eager): {fixed + s.batch_size * each:.1f} GB in all\n"
          f"batch_size at most, with 1 GB to spare: {fits}")


def make_up(s, folder):
    """Pictures and captions, random encoders of the published shapes for those not at hand, and, for a run on
    latents, a cache of zeros -> the settings that name them."""
    rng, words = np.random.default_rng(0), "red large open small happy old round quiet long bright".split()
    made = dict(data=str(folder / "data"))
    (folder / "data").mkdir()
    for i in range(64):
        size = rng.permutation([s.image_size, s.image_size * rng.integers(2, 5) // 2]).tolist()
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        image.resize(size, Image.BICUBIC).save(folder / "data" / f"{i}.jpg")
        tokens = round(s.caption_tokens * rng.uniform(0.5, 1.5))
        (folder / "data" / f"{i}.txt").write_text(" ".join(rng.choice(words, tokens)))
    if not at_hand(s.text_encoder):
        made["text_encoder"] = str(folder / "text_encoder")
        hdm.make_text_encoder([*words, " ".join(2 * words)], made["text_encoder"], **hdm.QWEN3)
    if s.vae and not at_hand(s.vae):
        made["vae"] = str(folder / "vae.safetensors")
        save_file(hdm.VAE().state_dict(), made["vae"])
    print(f"bench: made up, encoders with random weights: {made}")
    if s.latents:
        vae = hdm.load_vae(made.get("vae", s.vae))
        file = shard(latents_folder(made["data"], open_index(made["data"]), vae, s.image_size), 0)
        file.parent.mkdir()
        shape = 2 * vae.latent_channels, s.image_size // vae.factor, s.image_size // vae.factor
        save_file({str(i): torch.zeros(shape, dtype=torch.float16) for i in range(64)}, file)
    hdm.open_modes(folder)
    return made


def bench(s, given, rank, ranks):
    """Trains on made-up data; prints where the time went, and writes it to OUT_DIR/bench.json."""
    device = hdm.pick_device(s.device)
    dtype = hdm.pick_dtype(s.dtype, device)
    hdm.make_folder(s.out_dir, "--out_dir")
    micro_steps = min(s.bench, s.global_batch // s.batch_size // ranks)
    steps, global_batch = s.bench // micro_steps, micro_steps * s.batch_size * ranks
    warm = 1 + steps // 5
    runs = {"as configured": {}}
    if s.baseline:
        runs["baseline"] = dict(compile=False, text_lengths=1, checkpointing=True, vae_chunk=4)
    name = torch.cuda.get_device_name(device) if "cuda" in device else device
    tflops = hdm.matmul_tflops(device, dtype)
    report = dict(device=name, dtype=str(dtype), processes=ranks, torch=torch.__version__,
                  matmul_tflops=tflops, command=shlex.join(sys.argv))
    with tempfile.TemporaryDirectory(dir=s.out_dir, prefix="bench-") as folder:
        folder = Path(gather(folder)[0])                     # the first process's, for all
        made_up = gather(make_up(s, folder) if rank == 0 else None)[0]
        fixed = dict(validation=0.0, init_from="", resume=False, log_every=1, eval_every=0, sample_every=0,
                     save_every=0, max_steps=0, max_hours=0.0, log="", preview_prompts="",
                     global_batch=global_batch, epochs=0.0, images=(warm + steps) * global_batch)
        for name, changes in runs.items():
            run = dataclasses.replace(s, **made_up, **fixed, **changes, out_dir=str(folder / name))
            gc.collect()                                     # compiled blocks refer to themselves
            if "cuda" in device:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            train(run, given, rank, ranks)
            gather(None)
            lines = read_metrics(run.out_dir)[1 + warm:]     # 1: before any step
            gather(None)                                     # all have read it, before it goes
            if len(lines) < steps:
                raise hdm.UserError(f"--bench={s.bench}: stopped before it was done")
            T = sum(line["text_tokens"] for line in lines) / steps
            costs, _ = costs_of(run, given, round(T), dtype)
            split = {part: sum(line["split_s"][part] for line in lines) for part in lines[0]["split_s"]}
            rate = steps * global_batch / sum(split.values())
            limit = rate / ranks / tflops / 1e12
            report[name] = dict(
                settings=changes, images_per_s=rate, text_tokens=T, xut_mfu=limit * costs["step"],
                all_flops=limit * (costs["step"] + costs["vae"] + costs["text"]),
                ms_per_image={part: 1000 * ranks * seconds / steps / global_batch
                              for part, seconds in split.items()},
                memory_gb=lines[-1]["memory_gb"])
    if s.baseline:
        report["ratio"] = report["as configured"]["images_per_s"] / report["baseline"]["images_per_s"]
    text = json.dumps(report, indent=1)
    print(text)
    if rank == 0:
        Path(s.out_dir, "bench.json").write_text(text, encoding="utf-8")


def main(argv):
    if argv[:1] == ["--plot"]:
        return plot(argv[1:])
    rank, ranks = hdm.start_ranks()
    s, given = read_settings(argv, ranks)
    if s.plan:
        return plan(s, given)
    try:
        bench(s, given, rank, ranks) if s.bench else train(s, given, rank, ranks)
    except (RuntimeError, OSError) as error:
        trace = "".join(traceback.format_exception(error))
        if re.search(r"DataLoader worker \(pid|shared memory object|</?torch_|SemLock|No space.*shm/", trace):
            sys.unraisablehook = lambda _: None              # torch's half-made loader would add a traceback
            raise hdm.UserError(f"--workers={s.workers}: the loader processes lack shared memory or died "
                                f"({trace.strip().splitlines()[-1]}); --workers=0 needs none, in a container "
                                f"--shm-size=8g gives more") from error
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise hdm.UserError(f"out of memory: --batch_size={max(1, s.batch_size // 2)} in place of "
                            f"{s.batch_size} (the global batch stays), or --checkpointing") from error


if __name__ == "__main__":
    hdm.run(main)
