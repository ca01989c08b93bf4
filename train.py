"""Train XUT on captioned images, on one device or on many.

    python train.py configs/demo.py --lr=0.3 --out_dir=out/b   # settings of a file and of the command line
    torchrun --nproc_per_node=4 -- train.py configs/256.py     # on four GPUs, with the same global batch
    python train.py configs/demo.py --resume                   # go on, bitwise, from the newest checkpoint
    python train.py configs/demo.py --init_from=out/demo --out_dir=out/c    # a new run from old weights
    python train.py --plot out/demo out/b                      # the curves of runs, in plot.png
    python train.py configs/256.py --plan --gpus=4             # hours, dollars, memory, before it begins
    python train.py configs/256.py --bench=50 --baseline       # where the time goes here, on made-up data

In order: settings; checkpoints; the log; the model; open_run, train (the loop), finish. Then extras: curves,
what a run costs.
All random choices (order, tags, crop, VAE sample, t, noise, kept tokens, dropouts) are functions of (seed,
epoch, sample), drawn on the CPU: the number of workers or GPUs changes nothing, resuming needs no generator.
"""
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import hdm
import prepare
import sample

# ---- Settings: flat, together with the fields of hdm.XUTConfig -------------------------------------------

@dataclasses.dataclass
class Run:
    out_dir: str = "out/run"           # checkpoints, metrics.jsonl, run.json and samples/ go here
    init_from: str = ""                # weights to start from: a run, a checkpoint, a published file, hub id
    resume: bool | str = False         # bare: go on from the newest checkpoint of out_dir; or a path
    seed: hdm.Whole = 0                # of everything random
    device: str = "auto"               # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"                # float32, or autocast to bfloat16 or float16; auto: 16 bit on CUDA
    compile: bool = True               # torch.compile of XUT's blocks, where a compiler is found
    memory_budget: hdm.Part = 1.0      # compiled: share of activations kept, others are made again
    workers: hdm.Whole = 4             # loader processes; 0: the main process loads
    max_steps: hdm.Whole = 0           # stop early at this step, the schedule unchanged; 0: at the end
    max_hours: hdm.NotNegative = 0.0   # stop early, as by Ctrl-C, after this time; 0: never
    log_every: hdm.Count = 20          # steps between two lines of metrics
    eval_every: hdm.Whole = 1000       # steps between two held-out losses; 0: never
    sample_every: hdm.Whole = 1000     # steps between two grids of previews; 0: never
    save_every: hdm.Whole = 1000       # steps between two checkpoints; 0: one at the end
    keep_ckpts: hdm.Whole = 3          # how many of the newest checkpoints stay; 0: all
    milestone_every: hdm.Whole = 0     # images; the first checkpoint after each multiple stays; 0: none
    log: str = ""                      # metrics and previews go to wandb or tensorboard as well, if installed
    preview_prompts: str = ""          # file with a prompt a line, # first: a comment; after the captions


@dataclasses.dataclass
class Data:
    data: str = "data/train"           # what prepare.py wrote, or a source of captioned images as it takes it
    vae: str = hdm.EQ_VAE              # folder or hub id; "": train on pixels
    text_encoder: str = hdm.TEXT_ENCODER  # folder or hub id of a causal LM
    validation: hdm.Share | None = None  # share of images held out, by a hash of the name; at most 512 are
                                       # used; None: 0.02, of few images what holds out one
    new_data: bool = False             # with --resume: other images than before, from a fresh epoch on
    latents: bool = False              # read prepare.py's cache of VAE latents in place of the images
    max_unreadable: hdm.Share = 0.05   # share of the images; when more of them cannot be read, the run ends


@dataclasses.dataclass
class Optim:
    preset: str = "base"               # small, base or large: an XUTConfig, which the settings below change
    images: hdm.Count = 152_500_000    # the stage's length in images seen (published: 20 x 7.624M) ...
    epochs: hdm.NotNegative = 0.0      # ... or in passes over the data; 0: not given
    batch_size: hdm.Count = 32         # images in one micro-step of one process
    global_batch: hdm.Count = 2048     # images in one optimizer step, a multiple of batch_size x processes
    checkpointing: bool = False        # compute blocks again in backward: a third slower, less memory
    lr: hdm.Positive = 0.5             # peak, before each tensor's division by its fan-in
    warmup: hdm.Whole = 1000           # steps of linear warm-up to the peak
    schedule: str = "cosine"           # then: cosine, to 1 % of the peak at the stage's end; constant
    optimizer: str = "adamw"           # a class of hdm.py in lower case
    beta1: hdm.Share = 0.9             # AdamW
    beta2: hdm.Share = 0.98            # AdamW
    weight_decay: hdm.NotNegative = 0.02  # AdamW's, times the tensor's own lr
    clip: hdm.NotNegative = 3.0        # largest global gradient norm; 0: any
    ema: hdm.Share = 0.9999            # decay of the averaged weights, a step; 0: no average
    sample_steps: Annotated[int, 1, 1000] = 24  # Euler steps of previews, and sample.py's default
    sample_cfg: Annotated[float, 0, 100] = 3.0  # guidance, likewise
    sample_cfg_low: hdm.Share = 0.0    # ... at times t from here on alone: below, it sharpens mistakes


@dataclasses.dataclass
class Bench:
    bench: hdm.Whole = 0               # in place of training: measure so many steps, on made-up data
    baseline: bool = False             # ... and again with the settings of a plain eager trainer: the ratio
    caption_tokens: hdm.Count = 128    # ... the captions' mean length; they are uniform from 1/2 to 3/2 of it
    plan: bool = False                 # in place of training: say what it will cost and whether it fits
    gpus: hdm.Count = 4                # ... on so many of these
    tflops: hdm.Positive = 209.5       # ... dense, 16 bit, with float32 sums, of each (RTX 5090: 209.5)
    utilisation: hdm.Part = 0.25       # ... the share of it reached, a guess: --bench measures it
    dollars_per_gpu_hour: hdm.NotNegative = 0.35# ... likewise a guess


@dataclasses.dataclass
class Settings(Bench, Optim, hdm.Example, Data, Run):
    pass                           # all of them, flat


CLASSES = Run, Data, hdm.Example, Optim, Bench, hdm.XUTConfig
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
    hdm.check_bounds(s)
    if s.global_batch % (s.batch_size * ranks):
        near = max(1, round(s.global_batch / s.batch_size / ranks)) * s.batch_size * ranks
        raise hdm.UserError(f"--global_batch={s.global_batch}: no multiple of batch_size x processes = "
                            f"{s.batch_size} x {ranks}; {near} is")
    if s.latents and not s.vae:
        raise hdm.UserError("--latents: a run in pixels, --vae=, has none")
    if not s.tag_separator.strip():
        raise hdm.UserError("--tag_separator=: $$, or a comma, is needed")
    hdm.check_name(f"--preset={s.preset}", s.preset, hdm.PRESETS, "preset")
    hdm.check_name(f"--optimizer={s.optimizer}", s.optimizer, hdm.optimizers(), "optimizer")
    hdm.check_name(f"--schedule={s.schedule}", s.schedule, ("cosine", "constant"), "schedule")
    hdm.check_name(f"--log={s.log}", s.log, ("", "wandb", "tensorboard"), "place")
    before = Path(config_file).with_name(Path(s.init_from).name + ".py")    # configs/256.py of out/256
    fresh = s.init_from and not (s.resume or s.bench or s.plan)
    if fresh and not os.path.exists(s.init_from) and before.is_file():
        raise hdm.UserError(f"--init_from={s.init_from}: none; train.py {before} makes it, or name another")
    hdm.warn_idle(flags, [s], IDLE)
    return s, given


# ---- Checkpoints (folders with model.safetensors, ema.safetensors, train.pt, small encoders) and log -----

@contextlib.contextmanager
def if_the_disk_allows(what):
    """A full disk ends no run: a warning says what was not written, and training goes on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        print(f"warning: not written: {what} ({hdm.first_line(error)})", flush=True)


def save_checkpoint(out_dir, settings, model, ema, state, keep, milestone, gb):
    """Written under another name and renamed when complete: a folder named ckpt_* is always complete."""
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
    """train.pt of --resume, its place in the stream moved to a fresh epoch where the images are others."""
    with hdm.naming(f"--resume={s.resume}", "no whole checkpoint of a run; --init_from takes weights alone"):
        state = torch.load(Path(s.resume, "train.pt"), map_location="cpu", weights_only=True)
        old = vars(Settings()) | state["settings"]           # with what older checkpoints do not know
    if old["optimizer"] != s.optimizer:
        raise hdm.UserError(f"--optimizer={s.optimizer}: the state in {s.resume} is of {old['optimizer']}; "
                            f"name that one, or begin a new run with --init_from={s.resume}")
    if state["identity"] != identity:
        what = (f"--data={s.data}: other images or weights ({epochs.images:,}) than {s.resume} saw "
                f"({state['pictures']:,})")
        same_place = (old["data"], old["validation"]) == (s.data, s.validation)
        if same_place and epochs.images <= state["pictures"] and not s.new_data:
            raise hdm.UserError(f"{what}: put those back, or go on with these by --new_data")
        print(f"{what}: a new epoch begins")
        state["position"] = epochs.start(state["next_epoch"])
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in (vars(s) | dict(ranks=ranks)).items()
               if value != old.get(name) and name not in ("resume", "new_data", "max_steps", "max_hours")]
    print(f"resume: {s.resume}; changed by this command: {', '.join(changed) or 'nothing'}")
    return state


# ---- The log: metrics.jsonl, run.json, trackers, warnings -----------------------------------------------

def read_metrics(run):
    """The records of a run's metrics.jsonl; a line that was left half-written is none."""
    file, records = Path(run, "metrics.jsonl"), []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def tracker(s, folder, start, run_id):
    """-> report(step, record, sheet): a line of metrics and an image of previews, to wandb, tensorboard or,
    with s.log "", nowhere; wandb's id of the run, in which a resumed one goes on."""
    def numbers(record):
        return {name: value for name, value in record.items() if isinstance(value, float)}
    def report(step, record, sheet=None):
        pass
    if s.log == "wandb":
        import wandb
        with hdm.naming("--log=wandb", "no run can be begun there"):
            run = wandb.init(project="hdm", name=str(folder), config=vars(s), id=run_id, resume="allow")
        run_id = run.id
        def report(step, record, sheet=None):
            previews = {} if sheet is None else {"previews": wandb.Image(sheet)}
            run.log(numbers(record) | previews, step=step)
    if s.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder, purge_step=start)      # what stood there from this step on is hidden
        def report(step, record, sheet=None):
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
        prompts = sample.prompt_lines(hdm.read_text(file))
        for line in prompts:
            if sample.prompt_line(line, sample.ImageSettings()).prompt != line:
                raise hdm.UserError(f"--preview_prompts={file}: {line!r}: a line holds no settings here, "
                                    f"all have --sample_steps and --sample_cfg")
    if not prompts:
        raise hdm.UserError(f"--preview_prompts={file}: no prompt in it")
    return prompts


class Stopwatch:
    """Seconds by what they went to; on CUDA by events, for which nothing waits until they are read."""

    def __init__(self, kind, seconds=()):
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


def report_problems(s, problems, reported, images, waited):
    """Warns once of each image that cannot be read, of one that has changed and of slow data -> how many
    cannot be read.

    problems: "trouble" of this rank's batches; reported: the warnings so far, {kind: line}, which is updated;
    images: how many there are; waited: the share of the time that steps waited for data.
    """
    new = {}
    for texts, changed in sum(hdm.gather(problems), []):
        for line in "\n".join(texts).split("\n"):
            if line:
                new[line] = f"{line}; the next in order takes its place"
        for name in filter(None, changed):
            new["changed"] = f"{name} or its caption is not as it was indexed: run prepare.py again"
    if waited > 0.1:
        new["slow"] = (f"{waited:.0%} of the time is spent waiting for data; what may help: more --workers "
                       f"(now {s.workers}; {os.cpu_count()} cores), a faster disk, --latents")
    for kind, line in new.items():
        if kind not in reported:
            print(f"warning: {line}", flush=True)
    reported.update(new)
    unreadable = reported.keys() - {"changed", "slow"}
    if len(unreadable) > math.ceil(s.max_unreadable * images):
        raise hdm.UserError(f"{len(unreadable)} of {images:,} images cannot be read, more than "
                            f"--max_unreadable={s.max_unreadable}, such as {min(unreadable)}")
    return len(unreadable)


# ---- The model, the order of a rank's images, signals ----------------------------------------------------

def build_model(s, given, vae, ctx_dim, device):
    """-> XUT in float32 from --resume, --init_from or the preset; given: the settings that were named."""
    torch.manual_seed(s.seed)                                # for the weights' init, and for nothing after it
    preset = dataclasses.asdict(hdm.PRESETS[s.preset])
    explicit = {name: given[name] for name in given if name in preset}
    encoders = dict(in_channels=vae.latent_channels if vae else 3, ctx_dim=ctx_dim)
    source = s.resume or s.init_from
    if source:
        model, _, old = sample.load_model(source, device, ema=not s.resume, with_vae=False)
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
    model.checkpoint_blocks(s.checkpointing)
    return model.train()


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
    was = f"{hdm.lr_at(seen, old, old_warmup, old_end):.4g}"
    now = f"{hdm.lr_at(seen, s, warmup, end):.4g}"
    if was != now or s.images != old.images:
        print(f"lr at this point, {seen:,} images: {was} -> {now}")
    if warmup > end and not s.bench:
        print(f"warning: --warmup={s.warmup}, {warmup:,} images: the run ends before its peak, at {end:,}")
    return warmup, end


def order_of_rank(index, epochs, s, first, last, rank, ranks):
    """The stream's items from first to last that one rank takes, in its order.

    Each global batch is sorted by the lengths of its captions, so that those of a micro-batch are alike and
    little is padded. The ranks take its micro-batches in turns: a step has the same images whatever their
    number.
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
    lengths = hdm.padded_lengths(s)
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


# ---- open_run, train, finish -----------------------------------------------------------------------------

def choose_start(s):
    """Makes s.resume the path of a checkpoint, or "", and refuses an out_dir that holds another run's."""
    out_dir, existing = Path(s.out_dir), hdm.list_checkpoints(s.out_dir)
    if s.resume is True and not existing:
        raise hdm.UserError(f"--resume: no checkpoint in {out_dir}; leave it out to start a run there")
    if s.resume:                                             # of a run: its newest checkpoint
        run = out_dir if s.resume is True else s.resume
        s.resume = str((hdm.list_checkpoints(run) or [run])[-1])
    elif existing:
        raise hdm.UserError(f"--out_dir={out_dir} holds {existing[-1].name}: --resume, or another --out_dir")


def open_device(s):
    """-> device, its kind for autocast and the scaler, the dtype of autocast."""
    device = hdm.pick_device(s.device)
    kind = device.split(":")[0]
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)                        # events and memory are then this one's
    if kind == "cpu":
        torch.set_flush_denormal(True)                       # numbers below 1e-38 can cost tenfold
        keep_freed_memory()
    return device, kind, hdm.pick_dtype(s.dtype, device)


def checkpoint_header(s, config):
    """What sample.py needs to know of a run, as sample.load_model gives it, but for step and images."""
    inner = Path(s.vae, "vae")                               # of a larger folder
    vae = str(inner) if s.vae and inner.is_dir() else s.vae
    text_path, vae_path = (os.path.abspath(name) if os.path.exists(name) else name
                           for name in (s.text_encoder, vae))
    return dict(config=config, text_encoder=text_path, text_length=s.text_length, vae=vae_path,
                image_size=s.image_size, steps=s.sample_steps, cfg=s.sample_cfg, cfg_low=s.sample_cfg_low,
                t_shift=s.t_shift, tag_separator=s.tag_separator, spaces=s.spaces)


def print_plan(run):
    """What will happen, before step 0."""
    s, gb = run.s, run.optimizer.checkpoint_gb()
    kept = s.keep_ckpts + 1 if s.keep_ckpts else run.total // (s.save_every or run.total)
    kept += s.images // (s.milestone_every or s.images + 1)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{parameters:,} parameters, {run.ranks} x {run.device}, {run.dtype}; {run.epochs.images:,} "
          f"images, {len(run.held_out):,} held out (validation {s.validation:.3g})\n"
          f"{s.images:,} images seen, {s.images / run.epochs.length:.2f} epochs; steps {run.start:,} to "
          f"{run.last:,} of {run.total:,}, {run.warmup / s.global_batch:,.0f} of warm-up; a step: "
          f"{run.ranks} ranks x {run.micro_steps} x {s.batch_size}\n"
          f"checkpoints of {gb:.3f} GB, at most {kept}: {gb * kept:.2f} GB; "
          f"free: {shutil.disk_usage(run.out_dir).free / 1e9:.2f} GB", flush=True)


def open_run(s, given, rank, ranks):
    """-> run, with all that the loop reads and changes. given: the settings that were named."""
    run = SimpleNamespace(s=s, rank=rank, ranks=ranks, out_dir=Path(s.out_dir))
    run.device, run.kind, run.dtype = open_device(s)
    choose_start(s)
    own_prompts = read_prompts(s.preview_prompts) if s.preview_prompts else []
    run.index, run.epochs, run.held_out, run.identity = prepare.open_data(s)
    state = load_state(s, run.identity, run.epochs, ranks) if s.resume else {}
    run.start, run.seen, run.position = (state.get(name, 0) for name in ("step", "images", "position"))
    existing = hdm.list_checkpoints(s.out_dir)
    if existing and int(existing[-1].name[5:]) > run.start:
        raise hdm.UserError(f"--out_dir={s.out_dir} holds the newer {existing[-1].name}; name another "
                            f"out_dir")

    # The frozen encoders, the model, its optimizer and average
    if rank > 0:                                             # rank 0 goes first: one download, then the cache
        hdm.gather(None)
    run.te = hdm.TextEncoder(s.text_encoder, s.text_length, run.device, run.dtype)
    run.vae = hdm.load_vae(s.vae, run.device, run.dtype) if s.vae else None
    run.model = build_model(s, given, run.vae, run.te.dim, run.device)
    if rank == 0:
        hdm.gather(None)
    run.optimizer = hdm.optimizers()[s.optimizer](run.model, s, run.kind, run.dtype)
    if s.resume:
        run.optimizer.load_state_dict(state)
        if s.ema:
            weights = hdm.read_tensors(sample.find_weights(s.resume, ema=True))[0]
            run.optimizer.average.load_state_dict(weights)

    # Batches of training and of the held-out images; prompts of the previews
    factor = run.vae.factor if run.vae else None
    cache = prepare.Latents(s, run.index, run.vae) if s.latents else None
    samples = prepare.Samples(run.index, run.epochs, cache, s, run.model.config, factor, s.seed)
    held = prepare.Samples(run.index, run.held_out, cache, s, run.model.config, factor)
    prepare.say_what_is_cut(run.index, run.te, s)
    shown = run.held_out[:8] or [run.epochs[i][2] for i in range(8)]
    captions = [hdm.draw_caption(run.index[number].caption, None, s) for number in shown]
    run.prompts = captions + own_prompts
    run.preview_seeds = [*range(len(captions)), *range(len(own_prompts))]
    run.micro_steps = s.global_batch // s.batch_size // ranks
    run.warmup, run.end = open_schedule(s, state)
    run.total = run.start + (run.end - run.seen) // s.global_batch
    run.last = min(run.total, s.max_steps) if s.max_steps else run.total
    if run.start >= run.last:
        raise hdm.UserError(f"--resume={s.resume}: at step {run.start} of {run.last}, so there is nothing to "
                            f"do")

    # The folder and the log
    run.header = checkpoint_header(s, run.model.config)
    hdm.make_folder(run.out_dir / "samples", "--out_dir")
    run.lock = run.report = run.wandb = None
    if rank == 0:
        run.lock, run.report, run.wandb = open_log(run.out_dir, s, run.model.config, run.start,
                                                   state.get("wandb"))
    print_plan(run)

    # Loader processes, signals, other ranks, compilation
    stop = run.position + (run.last - run.start) * s.global_batch
    order = order_of_rank(run.index, run.epochs, s, run.position, stop, rank, ranks)
    run.held_batches = DataLoader(held, s.batch_size, sampler=range(rank, len(run.held_out), ranks))
    run.signals, run.deadline = catch_signals(), time.monotonic() + (s.max_hours * 3600 or math.inf)
    run.batches = iter(DataLoader(samples, s.batch_size, sampler=order, num_workers=s.workers,
                                  worker_init_fn=catch_signals, pin_memory=run.kind == "cuda"))
    run.network = run.model
    if ranks > 1:
        run.network = torch.nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    run.autocast = torch.autocast(run.kind, run.dtype, enabled=run.dtype != torch.float32)
    if s.compile:
        compile_blocks(run.model, s, run.autocast, run.device, s.image_size // (factor or 1))

    # Since the last line of metrics: sums of losses and their number by tenths of t (2, 10); seconds
    run.window = state.get("window", torch.zeros(2, 10)).to(run.device)
    run.watch = Stopwatch(run.kind, state.get("seconds", ()))
    run.lr, run.norm, run.text_tokens = hdm.lr_at(run.seen, s, run.warmup, run.end), None, 0.0
    run.began, run.problems, run.reported = time.monotonic(), [], {}
    run.saved = run.seen                                     # images seen by the last checkpoint
    return run


def is_due(run, every):
    """Whether what is done each `every` steps, and at the end, is due. A resumed run has done its first's."""
    if every == 0 or run.step == run.start > 0:
        return False
    return run.step % every == 0 or run.step == run.total


@contextlib.contextmanager
def evaluation(run):
    """In the block the model is as in sampling: no gradients, and eager, as the shapes are of any kind."""
    run.model.eval()
    eager = torch.compiler.set_stance("force_eager") if run.s.compile else contextlib.nullcontext()
    with torch.no_grad(), run.autocast, eager:
        yield
    run.model.train()


def evaluate(run):
    """-> the held-out loss of the averaged weights, with times and noise that no setting moves."""
    total = 0.0
    with evaluation(run):
        for batch in run.held_batches:
            inputs = hdm.loss_inputs(batch, run.vae, run.te, run.s, run.device)
            total += hdm.flow_loss(run.optimizer.average, **inputs, reduction="none").sum().item()
            run.problems.append(batch["trouble"])
    return sum(hdm.gather(total)) / len(run.held_out)


def save_previews(run):
    """One sheet of the same prompts and seeds each time, by the averaged weights."""
    header = run.header | dict(step=run.step, images=run.seen)
    with evaluation(run):
        images = sample.generate(run.optimizer.average, run.vae, run.te, run.prompts, run.preview_seeds,
                                 header, run.s.batch_size)
    if run.rank == 0:
        with if_the_disk_allows("a sheet of previews"):
            sheet = hdm.image_grid(images, 4, scale=max(1, 128 // run.s.image_size))
            sheet.save(run.out_dir / "samples" / f"{run.step:08d}.png")
            run.report(run.step, {}, sheet)


def refuse_bad_steps(run, skipped):
    """Ends the run, and names its images, where steps in a row were skipped."""
    first = run.position - skipped * run.s.global_batch
    names = [run.index[run.epochs[i][2]].name for i in range(first, first + run.s.global_batch)]
    (run.out_dir / "bad_images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    raise hdm.UserError(f"no finite loss or gradient since step {run.step - skipped}, of the images "
                        f"{', '.join(names[:20])} (all: bad_images.txt); lower --lr, --resume")


def log(run, val_loss):
    """Writes a line of metrics, of the steps since the last one whose number is a multiple of log_every."""
    s, step = run.s, run.step
    (losses, counts), (skipped, in_a_row) = run.window.tolist(), run.optimizer.skipped.tolist()
    if in_a_row >= 10:
        refuse_bad_steps(run, in_a_row)
    count, split = sum(counts), run.watch.read()
    seconds = sum(split.values())
    waited = split["data"] / seconds if step - run.start > s.log_every else 0.0       # but at the start
    unreadable = report_problems(s, run.problems, run.reported, run.epochs.images, waited)
    run.problems.clear()
    norm = run.norm.item() if run.norm is not None and run.norm.isfinite() else None
    record = dict(
        step=step, images=run.seen, epoch=run.position / run.epochs.length, lr=run.lr, val_loss=val_loss,
        skipped=skipped, data_s=split["data"], loss=sum(losses) / count if count else None, grad_norm=norm,
        images_per_s=count / seconds if seconds else None, unreadable=unreadable,
        loss_by_t=[a / b if b else None for a, b in zip(losses, counts)], split_s=split,
        text_tokens=run.text_tokens,
        memory_gb=torch.cuda.max_memory_allocated(run.device if run.kind == "cuda" else None) / 1e9)  # or 0
    words = [f"step {step}/{run.last}"]
    words += [f"{name} {record[name]:.4g}" for name in ("loss", "val_loss", "images_per_s", "skipped")
              if record[name]]
    if step > run.start:
        left = (time.monotonic() - run.began) / (step - run.start) * (run.last - step) / 60
        words.append(f"{left:.1f} min left")
    tqdm.write(" | ".join(words))
    sys.stdout.flush()
    if run.rank == 0:
        with if_the_disk_allows("a line of metrics"):
            with open(run.out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            run.report(step, record)


def save(run):
    """-> whether the checkpoint is there; on other ranks than the first: True."""
    if run.rank > 0:
        return True
    s = run.s
    state = run.optimizer.state_dict() | dict(
        step=run.step, images=run.seen, position=run.position, next_epoch=run.epochs.next_epoch(run.position),
        pictures=run.epochs.images, identity=run.identity, window=run.window,
        seconds=dict(run.watch.read()), warmup_images=run.warmup, wandb=run.wandb,
        settings=vars(s) | dict(ranks=run.ranks))
    every = s.milestone_every
    milestone = every > 0 and run.seen // every > run.saved // every                  # the first one after it
    header = run.header | dict(step=run.step, images=run.seen)
    done = save_checkpoint(run.out_dir, header, run.model, run.optimizer.average, state, s.keep_ckpts,
                           milestone, run.optimizer.checkpoint_gb())
    run.saved = run.seen if done else run.saved
    return done


# step 0        evaluate, previews, log          | lr, micro-steps, clip, step, average
# step 1, 2 ..  what is due after so many steps  | lr, micro-steps, clip, step, average
# last step     what is due, and the end         |
# resumed       nothing: it was done before      | lr, micro-steps, clip, step, average

def train(s, given, rank, ranks):
    run = open_run(s, given, rank, ranks)
    stopped = False
    for step in tqdm(range(run.start, run.last + 1), disable=rank > 0 or not sys.stderr.isatty()):
        # What is due after `step` steps
        run.step = step
        val_loss = evaluate(run) if run.held_out and is_due(run, s.eval_every) else None
        if is_due(run, s.sample_every):
            save_previews(run)
        if is_due(run, s.log_every) or val_loss is not None or step == run.last > run.start:
            log(run, val_loss)
        if step % s.log_every == 0:
            run.window, run.watch = torch.zeros_like(run.window), Stopwatch(run.kind)
        if is_due(run, s.save_every) and run.start < step < run.last:
            save(run)
        if step == run.last:
            break

        # Micro-steps: their gradients are summed up
        run.watch(None)
        run.lr, run.text_tokens = hdm.lr_at(run.seen, s, run.warmup, run.end), 0.0
        stats = torch.zeros_like(run.window)                 # sums of losses, their number: by tenths of t
        for micro in range(1, run.micro_steps + 1):
            stopped = any(hdm.gather(bool(run.signals) or time.monotonic() > run.deadline))   # all, or none
            if stopped:
                break
            batch = next(run.batches)
            run.watch("data")
            run.problems.append(batch["trouble"])
            run.network.require_backward_grad_sync = micro == run.micro_steps         # DDP's: once a step
            with hdm.SHARED_CPU.work(run.device):
                inputs = hdm.loss_inputs(batch, run.vae, run.te, s, run.device, run.watch)
                with run.autocast:
                    losses = hdm.flow_loss(run.network, **inputs, reduction="none")   # (B,)
                run.watch("forward")
                run.optimizer.backward(losses.mean() / run.micro_steps)
                run.watch("backward")
            run.text_tokens += inputs["ctx"].shape[1] / run.micro_steps
            tenth = (10 * inputs["t"]).long().clamp(max=9)                            # (B,)
            tenth = (tenth[:, None] == torch.arange(10, device=run.device)).float()   # (B, 10)
            stats += torch.stack([losses.detach() @ tenth, tenth.sum(0)])
        if stopped:                                          # the step begins anew when the run goes on
            break

        # Clip, step, average
        if ranks > 1:
            torch.distributed.all_reduce(stats)
        run.norm, done = run.optimizer.step(run.lr, step, stats.isfinite().all())
        run.window += torch.where(done, stats, 0)
        run.seen, run.position = run.seen + s.global_batch, run.position + s.global_batch
        run.watch("optimizer")
    if not s.bench:
        finish(run, stopped)


def finish(run, stopped):
    """The last checkpoint, and the command that comes next."""
    if not (run.out_dir / f"ckpt_{run.step:08d}").is_dir() and not save(run):
        raise hdm.UserError(f"--out_dir={run.out_dir}: step {run.step} is not saved; make room, then "
                            f"--resume")
    hdm.gather(None)                                         # the others wait for rank 0's files
    again = ["torchrun", f"--nproc_per_node={run.ranks}", "--"] if run.ranks > 1 else ["python"]
    if stopped:
        print(f"stopped at step {run.step}; to go on: {shlex.join([*again, *sys.argv, '--resume'])}")
    else:
        print(f"done: python sample.py --ckpt={run.out_dir} --prompt {shlex.quote(run.prompts[0])}")


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


# ==== Extras ==============================================================================================

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


# ---- What it costs: counted on tensors without memory, whatever a fork makes of XUT; and measured --------

QWEN3 = dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,      # 0.6B
             num_attention_heads=16, num_key_value_heads=8, head_dim=128)


def count_flops(f):
    """FLOPs of the matrix products and convolutions in f(), by torch's counter; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def saved_bytes(f):
    """Bytes that autograd keeps of f() for its backward pass, shared ones once, parameters not."""
    kept = {}
    def keep(x):                                             # held: an address is not to be used again
        return kept.setdefault(x.untyped_storage()._cdata, x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        f()
    return sum(x.untyped_storage().nbytes() for x in kept.values() if not isinstance(x, torch.nn.Parameter))


def image_costs(config, side, T, tread_rate=0.0, vae=None, text=None, dtype=torch.bfloat16):
    """What a training image with a latent of side x side cells and T text tokens costs, as a dict.

    FLOPs: xut, forward; step, XUT forward and backward; vae, its encoder; text, the text encoder (modules on
    "meta", or None). Bytes that XUT keeps for its backward pass, eager, under autocast to dtype: bytes; or
    checkpointed, where blocks are: the input of each, and all of one; and shared, weights in 16 bit.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    with torch.device("meta"):
        model, inputs = hdm.XUT(config), hdm.blank_inputs(config, 1, side, T, tread_rate, device="meta")
        images = torch.zeros(2, 3, *[side * vae.factor] * 2) if vae else None  # two: one alone has strips
        states = dict(inputs_embeds=torch.zeros(1, T, config.ctx_dim), attention_mask=torch.zeros(1, 1, T, T))
    costs = dict(step=count_flops(lambda: hdm.flow_loss(model, **inputs).backward()))
    with torch.no_grad():
        costs["xut"] = count_flops(lambda: hdm.flow_loss(model, **inputs))
        costs["vae"] = count_flops(lambda: vae.encoder(images)) // 2 if vae else 0
        costs["text"] = count_flops(lambda: text(**states)) if text else 0
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model = hdm.XUT(config)
        inputs_of = functools.partial(hdm.blank_inputs, config, side=side, T=T, tread_rate=tread_rate)
        one = saved_bytes(lambda: hdm.flow_loss(model, **inputs_of(1)))
        two = saved_bytes(lambda: hdm.flow_loss(model, **inputs_of(2)))
    image = two - one                                        # what each further image adds
    shared = one - image                                     # what does not depend on their number
    tokens = inputs["pos"].shape[1]
    through = tokens if inputs["keep"] is None else inputs["keep"].shape[1]           # the U
    inside = config.depth * (config.enc_blocks + config.dec_blocks)
    outside = config.pre_blocks + config.post_blocks
    states = outside * (T + tokens) + inside * (T + through)
    checkpointed = states * config.dim * dtype.itemsize + image / (inside + outside)
    return costs | dict(bytes=image, checkpointed=checkpointed, shared=shared)


def matmul_tflops(device, dtype):
    """The device's own rate of large matrix products, in TFLOP/s: the best of five tries."""
    n, best = 8192 if "cuda" in str(device) else 2048, math.inf
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    for _ in range(6):                                       # the first one warms up
        clock = time.perf_counter()
        (a @ b)[0, 0].item()                                 # waits for it
        best = min(best, time.perf_counter() - clock)
    return 2e-12 * n ** 3 / best


def at_hand(name):
    """Whether an encoder can be had without a download: a path, or in the hub's cache."""
    import huggingface_hub
    return os.path.exists(name) or not hdm.looks_local(name) and isinstance(
        huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def costs_of(s, given, T, dtype=torch.bfloat16):
    """-> image_costs of the run with T text tokens; the numbers of parameters of XUT, VAE, text encoder.
    Encoders that are not at hand are taken for the published ones."""
    import transformers
    if away := [name for name in (s.vae, s.text_encoder) if name and not at_hand(name)]:
        print(f"not at hand, counted as the published one: {', '.join(away)}")
    with hdm.naming(s.text_encoder, "no text encoder"):
        text = (transformers.AutoConfig.from_pretrained(s.text_encoder) if at_hand(s.text_encoder)
                else transformers.Qwen3Config(**QWEN3))
    vae = hdm.load_vae(s.vae, "meta") if at_hand(s.vae) else None
    with torch.device("meta"):
        vae = vae or (hdm.VAE() if s.vae else None)
        text = hdm.text_part(hdm.text_class(text).from_config(text)).float()
        model = build_model(s, given, vae, text.config.hidden_size, "meta")
    side = s.image_size // (vae.factor if vae else 1)
    numbers = [sum(p.numel() for p in module.parameters()) if module else 0 for module in (model, vae, text)]
    encoder = None if s.latents else vae
    return image_costs(model.config, side, T, s.tread_rate, encoder, text, dtype), numbers


def plan(s, given):
    """Prints what the run costs on other machines, counted, and a guess of how much of their rate it gets."""
    if s.epochs:
        prepare.open_data(s)                                 # counts the images of an epoch
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
    each_weight = 4 * (3 if s.ema else 2) + hdm.optimizers()[s.optimizer].state_bytes
    fixed = each_weight * parameters + dtype.itemsize * sum(encoders) + costs["shared"]
    fixed, each = 1e-9 * fixed, 1e-9 * costs["checkpointed" if s.checkpointing else "bytes"]
    fits = ", ".join(f"{gb} GB {max(0, int((gb - 1 - fixed) / each))}" for gb in (8, 12, 16, 24, 32))
    print(f"each GPU sends {exchanged:.2f} GB of gradients a step of {s.global_batch} images\n"
          f"memory: {fixed:.2f} GB of weights, gradients, optimizer, EMA, encoders, {each:.3f} GB an image "
          f"of a micro-step (counted, eager): {fixed + s.batch_size * each:.1f} GB in all\n"
          f"batch_size at most, with 1 GB to spare: {fits}")


def make_up(s, folder):
    """Images and captions, random encoders of the published shapes for those not at hand, and, for a run on
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
        prepare.make_text_encoder([*words, " ".join(2 * words)], made["text_encoder"], **QWEN3)
    if s.vae and not at_hand(s.vae):
        made["vae"] = str(folder / "vae.safetensors")
        save_file(hdm.VAE().state_dict(), made["vae"])
    print(f"bench: made up, encoders with random weights: {made}")
    if s.latents:
        vae = hdm.load_vae(made.get("vae", s.vae))
        index = prepare.open_index(made["data"])
        file = prepare.shard(prepare.latents_folder(made["data"], index, vae, s.image_size), 0)
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
    tflops = matmul_tflops(device, dtype)
    report = dict(device=name, dtype=str(dtype), processes=ranks, torch=torch.__version__,
                  matmul_tflops=tflops, command=shlex.join(sys.argv))
    with tempfile.TemporaryDirectory(dir=s.out_dir, prefix="bench-") as folder:
        folder = Path(hdm.gather(folder)[0])                 # the first process's, for all
        made_up = hdm.gather(make_up(s, folder) if rank == 0 else None)[0]
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
            hdm.gather(None)
            lines = read_metrics(run.out_dir)[1 + warm:]     # 1: before any step
            hdm.gather(None)                                     # all have read it, before it goes
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


if __name__ == "__main__":
    hdm.run(main)
