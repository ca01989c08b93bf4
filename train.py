"""Train XUT on captioned images, or a VAE, on one device or on many.

    python train.py configs/demo.py --lr=0.3 --out_dir=out/b   # settings of a file and of the command line
    torchrun --nproc_per_node=4 -- train.py configs/256.py     # on four GPUs, with the same global batch
    python train.py configs/demo.py --resume                   # go on, bitwise, from the newest checkpoint
    python train.py configs/demo.py --init_from=out/demo --out_dir=out/c    # a new run from old weights
    python train.py configs/finetune.py --adapter=lora --rank=16 --out_dir=out/lora    # small changes of them
    python train.py configs/eqvae.py --vae=PLACE               # train a VAE on, to be equivariant (EQ-VAE)
    python train.py --plot out/demo out/b                      # the curves of runs, in plot.png
    python train.py configs/256.py --plan --gpus=4             # hours, dollars, memory, before it begins
    python train.py configs/256.py --bench=50 --baseline       # where the time goes here, on made-up data

In order: settings; checkpoints; the log; the model; the open run and what opens it; what is trained; what the
loop calls; train (the loop), finish. Then extras: curves, what a run costs, the bench.
All random choices (order, tags, crop, VAE sample, t, noise, kept tokens, dropouts) are functions of the seed,
the epoch and the image's name, drawn on the CPU: the number of workers or GPUs changes nothing, and resuming
needs no generator.
"""
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import gc
import inspect
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
from collections.abc import Iterator
from pathlib import Path
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
class RunSettings:
    out_dir: str = "out/run"           # checkpoints, metrics.jsonl, run.json and samples/ go here
    train: str = "xut"                 # what is trained: xut, or vae, the one that --vae names
    preset: str = "base"               # small, base or large: an XUTConfig, which its own settings change
    init_from: str = ""                # weights to start from: a run, a checkpoint, a published file, hub id
    resume: bool | str = False         # bare: go on from the newest checkpoint of out_dir; or a path
    seed: hdm.Whole = 0                # of everything random
    device: str = "auto"               # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"                # float32 (on CUDA products by TF32), or autocast to bfloat16 or
                                       # float16; auto: 16 bit on CUDA
    compile: bool = True               # torch.compile of XUT's blocks, and on CUDA of the frozen encoders,
                                       # where a compiler is found
    memory_budget: hdm.PositiveFraction = 1.0  # compiled: share of activations kept, others are made again
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
    sample_steps: Annotated[int, 1, 1000] = 24  # Euler steps of previews, and sample.py's default
    sample_cfg: Annotated[float, 0, 100] = 3.0  # guidance, likewise
    sample_cfg_low: hdm.Fraction = 0.0    # ... at t >= this alone: at lower ones it sharpens mistakes


@dataclasses.dataclass
class InputSettings:
    data: str = "data/train"           # what prepare.py wrote, or a source of captioned images as it takes it
    vae: str = hdm.EQ_VAE              # folder or hub id; "": train on pixels
    text_encoder: str = hdm.TEXT_ENCODER  # folder or hub id of a language model
    validation: hdm.Fraction | None = None  # share of images held out, by a hash of the name; at most 512 are
                                       # used; None: 0.02, of few images what holds out one
    holdout: str = ""                  # regex: images whose name or caption it matches are held out, too;
                                       # with it validation is 0 unless given
    new_data: bool = False             # with --resume: other images than before, from a fresh epoch on
    latents: bool = False              # read prepare.py's cache of VAE latents in place of the images
    max_unreadable: hdm.Fraction = 0.05  # share of the images; when more cannot be read, the run ends


@dataclasses.dataclass
class OptimizerSettings:
    images: hdm.Count = 152_500_000    # the stage's length in images seen (published: 20 x 7.624M) ...
    epochs: hdm.NotNegative = 0.0      # ... or in passes over the data; 0: not given
    batch_size: hdm.Count = 32         # images in one micro-step of one process
    global_batch: hdm.Count = 2048     # images in one optimizer step, a multiple of batch_size x processes
    checkpointing: bool = False        # compute blocks again in backward: a third slower, less memory
    lr: hdm.Positive = 0.5             # peak, before each tensor's division by its fan-in
    lr_by_fan_in: bool = True          # false: each tensor takes lr itself, which is then about 1/dim of it
    warmup: hdm.Whole = 1000           # steps of linear warm-up to the peak
    schedule: str = "cosine"           # then: cosine, to 1 % of the peak at the stage's end; constant
    optimizer: str = "adamw"           # adamw, muon, adamw8bit: a class of hdm.py in lower case
    beta1: hdm.Fraction = 0.9             # AdamW
    beta2: hdm.Fraction = 0.98            # AdamW
    weight_decay: hdm.NotNegative = 0.02  # times the tensor's own lr
    clip: hdm.NotNegative = 3.0        # largest global gradient norm; 0: any
    ema: hdm.Fraction = 0.9999            # decay of the averaged weights, a step; 0: no average


@dataclasses.dataclass
class CostSettings:
    bench: hdm.Whole = 0               # in place of training: measure so many steps, on made-up data
    baseline: bool = False             # ... and again with the settings of a plain eager trainer: the ratio
    caption_tokens: hdm.Count = 128    # ... the captions' mean length; they are uniform from 1/2 to 3/2 of it
    plan: bool = False                 # in place of training: say what it will cost and whether it fits
    gpus: hdm.Count = 4                # ... on so many of these
    tflops: hdm.Positive = 209.5       # ... dense, 16 bit, with float32 sums, of each (RTX 5090: 209.5)
    utilization: hdm.PositiveFraction = 0.25       # ... the share of it reached, a guess: --bench measures it
    dollars_per_gpu_hour: hdm.NotNegative = 0.35  # ... likewise a guess


@dataclasses.dataclass
class Settings(CostSettings, hdm.VAESettings, OptimizerSettings, hdm.AdapterSettings, hdm.ExampleSettings,
               InputSettings, RunSettings):
    pass                           # all of them, flat


CLASSES = (RunSettings, InputSettings, hdm.ExampleSettings, hdm.AdapterSettings, OptimizerSettings,
           hdm.VAESettings, CostSettings, hdm.XUTConfig)


def never_evaluates(s):
    return s.eval_every > 0 and s.validation == 0 and not s.holdout


IDLE = [  # settings, when they have no effect, and why
    ("gpus tflops utilization dollars_per_gpu_hour", hdm.without("plan"), "without --plan"),
    ("baseline caption_tokens", hdm.without("bench"), "without --bench"),
    ("new_data", hdm.without("resume"), "without --resume"),
    ("memory_budget", hdm.without("compile"), "with --compile=false"),
    ("rank", lambda s: s.adapter != "lora", "without --adapter=lora"),
    ("factor", lambda s: s.adapter != "lokr", "without --adapter=lokr"),
    ("train_norms", hdm.without("adapter"), "without --adapter"),
    ("tag_dropout group_dropout", lambda s: s.cache_text, "with --cache_text"),
    ("vae_chunk", lambda s: s.latents or not s.vae, "with --latents or without a --vae"),
    ("preview_prompts", hdm.without("sample_every"), "with --sample_every=0"),
    ("eval_every", never_evaluates, "with --validation=0"),
    ("milestone_every", hdm.without("save_every"), "with --save_every=0"),
    ("vae_widths vae_channels equivariance kl lpips", lambda s: s.train == "xut", "without --train=vae"),
    ("vae_channels", hdm.without("vae_widths"), "without --vae_widths"),
    ("vae", lambda s: s.train == "vae" and s.vae_widths, "with --vae_widths"),
    (" ".join(hdm.setting_types([hdm.XUTConfig])), lambda s: s.train == "vae", "with --train=vae"),
    ("preset compile memory_budget checkpointing lr_by_fan_in text_encoder text_length text_lengths "
     "mask_padding cache_text caption_dropout tag_dropout group_dropout tread_rate t_shift vae_chunk "
     "preview_prompts sample_steps sample_cfg sample_cfg_low",
     lambda s: s.train == "vae", "with --train=vae")]


def settings_of(values):
    """{name: value} of a command or of an older checkpoint -> Settings. Other names are left out."""
    return Settings(**{name: value for name, value in values.items() if hasattr(Settings, name)})


def read_settings(argv, ranks=1):
    """-> the Settings, and the {name: value} that were given, also of XUTConfig."""
    (config_file,), flags = hdm.parse_args(argv, CLASSES, ["CONFIG"], __doc__)
    config = hdm.read_config(config_file, CLASSES)
    for values in (config, flags):
        if values.get("images") and values.get("epochs"):
            raise hdm.UserError(f"images={values['images']}, epochs={values['epochs']}: give one of the two")
    if flags.get("images"):
        config.pop("epochs", None)
    given = config | flags                                   # flags win over the file
    if given.get("epochs"):
        given.pop("images", None)                            # open_data counts them
    s = settings_of(given)
    check_settings(s, ranks)
    stage_before = Path(config_file).with_name(Path(s.init_from).name + ".py")    # configs/256.py of out/256
    starts_from_weights = s.init_from and not (s.resume or s.bench or s.plan)
    if starts_from_weights and not os.path.exists(s.init_from) and stage_before.is_file():
        raise hdm.UserError(f"--init_from={s.init_from}: there is none; train.py {stage_before} makes it, or "
                            f"name another")
    hdm.warn_idle(flags, [s], IDLE)
    return s, given


def check_settings(s, ranks):
    """Refuses values that are out of bounds, unknown, or do not go together."""
    hdm.check_bounds(s)
    if s.global_batch % (s.batch_size * ranks):
        near = max(1, round(s.global_batch / s.batch_size / ranks)) * s.batch_size * ranks
        raise hdm.UserError(f"--global_batch={s.global_batch}: no multiple of batch_size x processes = "
                            f"{s.batch_size} x {ranks}; {near} is")
    if s.latents and not s.vae:
        raise hdm.UserError("--latents: a run in pixels, --vae=, has none")
    if not s.tag_separator.strip():
        raise hdm.UserError("--tag_separator=: $$, or a comma, is needed")
    for name in ("latents", "init_from", "adapter", "plan", "bench"):
        if s.train == "vae" and getattr(s, name):
            raise hdm.UserError(f"--{name}: not with --train=vae, which trains --vae on images")
    hdm.check_name(f"--train={s.train}", s.train, TASKS, "model to train")
    if s.train == "vae":
        s.compile = False                                    # that is for XUT's blocks
        if s.optimizer == "muon":
            raise hdm.UserError("--optimizer=muon: is for XUT's blocks; a VAE has none, and takes adamw")
    if s.lr > 0.01 and (s.train == "vae" or not s.lr_by_fan_in):
        print(f"warning: --lr={s.lr}: each tensor takes all of it here; 1e-4 fine-tunes a VAE, 0.004 trains "
              f"the demo")
    hdm.check_name(f"--preset={s.preset}", s.preset, hdm.PRESETS, "preset")
    hdm.check_name(f"--optimizer={s.optimizer}", s.optimizer, hdm.optimizers(), "optimizer")
    hdm.check_name(f"--adapter={s.adapter}", s.adapter, ("", "lora", "lokr"), "adapter")
    if s.adapter and not (s.init_from or s.resume or s.bench or s.plan):
        raise hdm.UserError(f"--adapter={s.adapter}: changes a trained model, which --init_from names")
    hdm.check_name(f"--schedule={s.schedule}", s.schedule, ("cosine", "constant"), "schedule")
    hdm.check_name(f"--log={s.log}", s.log, TRACKERS, "tracker")


# ---- Checkpoints: folders with model.safetensors, ema.safetensors, train.pt, small encoders --------------

@contextlib.contextmanager
def if_the_disk_allows(what):
    """For rank 0. A full disk ends no run: a warning says what was not done, and training goes on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:      # RuntimeError: torch.save's
        if hdm.is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        hdm.warn(f"{what} ({hdm.first_line(error)})")


def copy_small_encoders(header, folder):
    """Encoders below 100 MB go where the checkpoint goes; header: checkpoint_header's."""
    for name in ("text_encoder", "vae"):
        if not os.path.isdir(header[name]):                  # a hub id, a file, or ""
            continue
        source = Path(header[name])
        if sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) >= 100e6:
            continue
        shutil.copytree(source, folder / name)
        tokenizer = source.with_name("tokenizer")
        if name == "text_encoder" and tokenizer.is_dir():
            shutil.copytree(tokenizer, folder / "tokenizer")


def flush_to_disk(folder):
    """A power cut then leaves no name without its content."""
    if os.name == "nt":                                      # Windows flushes no folders
        return
    for path in (*folder.rglob("*"), folder):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:                             # some network shares refuse to flush
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise


def delete_old_checkpoints(out_dir, keep):
    """All but milestones and the newest `keep` others; keep 0: none. One that cannot be deleted, as another
    program reads it, is warned of."""
    others = [path for path in hdm.list_checkpoints(out_dir) if not (path / "milestone").exists()]
    if keep > 0:
        for path in others[:-keep]:
            with if_the_disk_allows(f"{path} is not deleted"):
                shutil.rmtree(path.rename(path.with_name(f"partial_{path.name}")))


def save_checkpoint(run, state):
    """Written under another name and renamed when complete: a folder named ckpt_* is always complete.
    state: the content of train.pt. -> whether it was written."""
    s, optimizer = run.s, run.optimizer
    header = run.header | dict(step=run.step, images=run.seen)
    final = run.out_dir / f"ckpt_{run.step:08d}"
    temporary = run.out_dir / "partial_ckpt"
    free = shutil.disk_usage(run.out_dir).free / 1e9
    with if_the_disk_allows(f"not written: {final}, which takes {optimizer.checkpoint_gb():.2f} GB where "
                            f"{free:.2f} are free; older ones stay"):
        temporary.mkdir()
        run.task.save(run, temporary, header)
        torch.save(state, temporary / "train.pt")
        if s.milestone_every > 0 and run.seen // s.milestone_every > run.saved // s.milestone_every:
            (temporary / "milestone").touch()                # the first after a multiple: it is never deleted
        hdm.open_modes(temporary)                            # of copies, too
        flush_to_disk(temporary)
        temporary.rename(final)
    shutil.rmtree(temporary, ignore_errors=True)             # there is none, unless the disk was full
    if final.is_dir():
        delete_old_checkpoints(run.out_dir, s.keep_ckpts)
    return final.is_dir()


# Settings that may differ on a resume without a word; and those that may not, as the state is of them.
NOT_COMPARED = "resume", "init_from", "new_data", "max_steps", "max_hours"
STATE_IS_OF = {"xut": ("train", "optimizer", "adapter"), "vae": ("train", "optimizer", "vae_widths")}
ADAPTER_IS_OF = "rank", "factor", "train_norms"


def load_state(s, identity, stream, ranks):
    """train.pt of --resume; where the images are others, its position is moved to a fresh epoch.

    identity, stream: of the images of this command, as from prepare.open_data.
    """
    with hdm.naming(f"--resume={s.resume}", "no complete checkpoint; --init_from takes weights alone"):
        state = torch.load(Path(s.resume, "train.pt"), map_location="cpu", weights_only=True)
        old = vars(Settings()) | state["settings"]           # older checkpoints lack newer settings
    for name in STATE_IS_OF[s.train] + (ADAPTER_IS_OF if s.adapter else ()):
        now = getattr(s, name)
        if old[name] != now:
            raise hdm.UserError(f"--{name}={now}: the state in {s.resume} is of {old[name] or 'none'}; name "
                                f"that one, or begin a new run with --init_from={s.resume}")
    if state["identity"] != identity:                        # of names, weights and the held-out share
        holdout = f", --holdout={s.holdout}" if s.holdout or old["holdout"] else ""
        what = (f"--data={s.data}, --validation={s.validation:.3g}{holdout}: other training images or "
                f"weights ({stream.images:,}) than {s.resume} saw ({state['pictures']:,})")
        if not s.new_data:
            raise hdm.UserError(f"{what}: put those back, or go on with these by --new_data")
        print(f"{what}: a new epoch begins")
        state["position"] = stream.start(state["next_epoch"])
    changed = []
    for name, value in (vars(s) | dict(ranks=ranks)).items():
        if value != old.get(name) and name not in NOT_COMPARED:
            changed.append(f"{name} {old.get(name)} -> {value}")
    print(f"resume: {s.resume}; changed by this command: {', '.join(changed) or 'nothing'}")
    return state


# ---- The log: metrics.jsonl, run.json, trackers, warnings -----------------------------------------------

def read_metrics(out_dir):
    """The records of a run's metrics.jsonl; a half-written line is skipped."""
    file = Path(out_dir, "metrics.jsonl")
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


class Tracker:
    """Where metrics and previews go beside out_dir: nowhere, with --log=.

    folder: out_dir; start: the step at which the run begins or goes on; run_id: wandb's, of a resumed run.
    """

    def __init__(self, s, folder, start, run_id):
        self.run_id = run_id                                 # what a checkpoint keeps

    def report(self, step, record, sheet=None):
        """A line of metrics, {name: value}, and an image of previews."""


class Wandb(Tracker):
    def __init__(self, s, folder, start, run_id):
        import wandb
        self.image = wandb.Image
        with hdm.naming("--log=wandb", "no run can be begun there"):
            self.run = wandb.init(project="hdm", name=str(folder), config=vars(s), id=run_id, resume="allow")
        self.run.define_metric("*", step_metric="step")      # its own count refuses steps that are done again
        self.run_id = self.run.id

    def report(self, step, record, sheet=None):
        values = floats_of(record)
        if sheet is not None:
            values["previews"] = self.image(sheet)
        self.run.log(values | dict(step=step))


class TensorBoard(Tracker):
    def __init__(self, s, folder, start, run_id):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder, purge_step=start)         # hides what stood there from `start` on
        self.run_id = run_id

    def report(self, step, record, sheet=None):
        for name, value in floats_of(record).items():
            self.writer.add_scalar(name, value, step)
        if sheet is not None:
            self.writer.add_image("previews", np.asarray(sheet), step, dataformats="HWC")
        self.writer.flush()


TRACKERS = {"": Tracker, "wandb": Wandb, "tensorboard": TensorBoard}


def floats_of(record):
    return {name: value for name, value in record.items() if isinstance(value, float)}


def lock_folder(out_dir):
    """-> a lock, free when this process ends, however it ends. Two runs do not share a folder."""
    lock = FileLock(out_dir / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise hdm.UserError(f"--out_dir={out_dir}: another run is at work there (if none is, remove "
                            f"{out_dir / 'lock'})") from error
    except (NotImplementedError, OSError) as error:          # of some network file systems
        hdm.warn(f"{out_dir} cannot be locked ({hdm.first_line(error)}): start no second run there")
    return lock


def trim_metrics(out_dir, s, start):
    """metrics.jsonl keeps the lines before step `start`, and that step's where it is not written again. ->
    their records."""
    end = start
    if start > 0 and (start % s.log_every == 0 or s.eval_every > 0 and start % s.eval_every == 0):
        end = start + 1                                      # as in tasks_due
    records = [record for record in read_metrics(out_dir) if record["step"] < end]
    with open(out_dir / "metrics.new", "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    (out_dir / "metrics.new").replace(out_dir / "metrics.jsonl")
    return records


def open_log(out_dir, s, config, start, run_id):
    """Makes the folder this run's: lock, run.json, metrics.jsonl. -> the lock, the Tracker."""
    lock = lock_folder(out_dir)
    for partial in out_dir.glob("partial_ckpt*"):            # of a run that was killed meanwhile
        shutil.rmtree(partial, ignore_errors=True)
    commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')    # or why it is none
    about = dict(command=sys.argv, settings=vars(s), config=dataclasses.asdict(config), git_commit=commit,
                 versions=dict(python=sys.version, torch=torch.__version__, numpy=np.__version__))
    name = f"run_{start:08d}.json" if start > 0 else "run.json"
    (out_dir / name).write_text(json.dumps(about, indent=1))
    records = trim_metrics(out_dir, s, start)
    tracker = TRACKERS[s.log](s, out_dir, start, run_id)
    if s.log == "tensorboard" and start > 0:                 # it hides this step's, which stay
        sheet = out_dir / "samples" / f"{start:08d}.png"
        record = records[-1] if records and records[-1]["step"] == start else {}
        tracker.report(start, record, Image.open(sheet) if sheet.is_file() else None)
    return lock, tracker


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
        self.cuda = kind == "cuda"
        self.marks = []                                      # since the last read: (name, event or seconds)
        self.seconds = Counter(seconds)

    def __call__(self, name):
        """The time since the last call went to `name`; None: to nothing that is counted."""
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))

    def read(self):
        """-> {name: seconds} since the beginning."""
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (name, after) in zip(self.marks, self.marks[1:]):
            if name is not None:
                self.seconds[name] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self.marks = []
        return self.seconds


def warn_once(run, kind, line):
    """A warning that all ranks have: rank 0 prints it, one of each kind."""
    if kind not in run.warned and run.rank == 0:
        hdm.warn(line)
    run.warned.add(kind)


def report_problems(run, waited):
    """Warns once of each unreadable image, of one that has changed and of slow data.

    waited: the share of the time that steps waited for data. -> how many images of all ranks are unreadable.
    """
    s = run.s
    for texts, changed in sum(hdm.gather(run.problems), []):
        for line in "\n".join(texts).split("\n"):            # a line for each that was tried in vain
            if line:
                run.unreadable.add(line)
                warn_once(run, line, f"{line}; skipped, the next image takes its place")
        for name in changed:
            if name:
                warn_once(run, "changed",
                          f"{name} or its caption is not as it was indexed: run prepare.py again")
    run.problems.clear()
    if waited > 0.1:
        warn_once(run, "slow",
                  f"{waited:.0%} of the time is spent waiting for data; what may help: more --workers "
                  f"(now {s.workers}; {os.cpu_count()} cores), a faster disk, --latents")
    count, images = len(run.unreadable), run.stream.images
    if count > math.ceil(s.max_unreadable * images):
        save_last(run)                                       # an outage of a disk looks like this, too
        raise hdm.UserError(f"{count} of {images:,} images cannot be read, more than --max_unreadable="
                            f"{s.max_unreadable}, such as {min(run.unreadable)}; mend them and --resume")
    return count


# ---- The model, the order of a rank's images, signals ----------------------------------------------------

def load_weights(s, given, device):
    """-> the XUT of --resume or --init_from. An older one without the aspect input gets it, at zero."""
    source = s.resume or s.init_from
    of_adapters = s.adapter and s.resume                     # their parts come after their base
    model, _, header = sample.load_model(source, device, ema=not s.resume, with_vae=False,
                                         merge=not of_adapters, base=s.init_from)
    model = copy.deepcopy(model)                 # mapped weights lie unaligned: sums would round differently
    line = f"weights: {source}"
    if header["step"]:
        line += f", step {header['step']:,}, {header['images']:,} images"
    print(line)
    if s.resume or s.adapter or model.config.aspect_cond or not given.get("aspect_cond", True):
        return model
    print(f"{source} has no aspect input: it starts at zero (--aspect_cond=false leaves it out)")
    wider = hdm.XUT(dataclasses.replace(model.config, aspect_cond=True)).to(device)
    wider.load_state_dict(model.state_dict(), strict=False)
    return wider


def build_model(s, given, vae, ctx_dim, device, dtype):
    """-> XUT in float32 from --resume, --init_from or the preset; given: the settings that were named. With
    an adapter only that is in float32, and the rest in dtype."""
    torch.manual_seed(s.seed)                                # for the weights' init, and for nothing after it
    preset = dataclasses.asdict(hdm.PRESETS[s.preset])
    explicit = {name: given[name] for name in given if name in preset}
    encoders = dict(in_channels=vae.latent_channels if vae else 3, ctx_dim=ctx_dim)   # win over the preset
    source = s.resume or s.init_from
    if source:
        model = load_weights(s, given, device)
    else:
        model = hdm.XUT(hdm.XUTConfig(**preset | encoders | explicit)).to(device)
    named = preset if "preset" in given else {}
    for name, value in (named | explicit | encoders).items():
        found = getattr(model.config, name)
        if found != value:
            by = "encoders say" if name in encoders else "command says"
            raise hdm.UserError(f"{name}: {source or 'the config'} says {found}, the {by} {value}")
    hdm.check_size(s.image_size, s.image_size, model.config, vae)
    model.checkpoint_blocks(s.checkpointing)
    if s.adapter:
        hdm.add_adapters(model, s, dtype)
        if s.resume:
            hdm.load_checkpoint_tensors(model, hdm.read_tensors(sample.find_weights(s.resume, ema=False))[0])
    return model.train()


def base_of(s):
    """What the headers of an adapter run say of the model that it changes: its place, SHA-256 of its file."""
    if not s.adapter or s.bench:
        return {}
    if s.resume:
        file = sample.find_weights(s.resume, ema=False)
        header = sample.header_settings(hdm.read_tensors(file)[1], file)
        return dict(base=sample.place_of_base(header, s.init_from), base_hash=header["base_hash"])
    file = sample.find_weights(s.init_from, ema=True)
    if file.parent.name.startswith("ckpt_") and not (file.parent / "milestone").exists():
        hdm.warn(f"{file.parent}: the adapter needs it for good; a run that goes on there deletes old "
                 f"checkpoints (--keep_ckpts)")
    place = os.path.abspath(file) if hdm.looks_local(s.init_from) else s.init_from
    return dict(base=place, base_hash=sample.model_hash(file))


def schedule_end(s, seen):
    """The images seen at the end of a run that has seen `seen` of s.images: steps are never cut."""
    return seen + math.ceil((s.images - seen) / s.global_batch) * s.global_batch


def open_schedule(s, state):
    """-> lr_at's warmup and end, in images. A resumed run with another global batch keeps its warm-up in
    images, and so its lr; where a command moves the lr, or changes the length, it says from what to what."""
    old = settings_of(state.get("settings", vars(s)))
    old_warmup = state.get("warmup_images", old.warmup * old.global_batch)
    warmup = old_warmup if s.warmup == old.warmup else s.warmup * s.global_batch
    seen = state.get("images", 0)
    end = schedule_end(s, seen)
    before = f"{hdm.lr_at(seen, old, old_warmup, schedule_end(old, seen)):.4g}"
    now = f"{hdm.lr_at(seen, s, warmup, end):.4g}"
    if before != now or s.images != old.images:
        print(f"lr at this point, {seen:,} images: {before} -> {now}")
    return warmup, end


def order_of_rank(examples, first, last, rank, ranks):
    """The items of training's prepare.Examples from first to last that one rank takes, in its order.

    Each global batch is sorted by the lengths of its captions, so that those of a micro-batch are alike:
    little is padded, and most need no mask. The ranks take its micro-batches in turns: a step has the same
    images whatever their number.
    """
    s = examples.s
    for base in range(first, last, s.global_batch):
        items = range(base, base + s.global_batch)
        if s.text_lengths > 1 and s.global_batch > s.batch_size:
            items = sorted(items, key=examples.caption_length)
        for start in range(rank * s.batch_size, s.global_batch, ranks * s.batch_size):
            yield from items[start:start + s.batch_size]


def report_eager(what, error):
    why = getattr(error, "inner_exception", error)           # the backend's own
    print(f"compile: {what} failed, running eagerly ({hdm.first_line(why)})")


def compile_encoder(what, modules, encode, shapes):
    """Compiles the forward passes of a frozen encoder's modules, by a call of encode for each of the shapes,
    its arguments. Where one fails, all run eagerly; so does what comes in other shapes (XUTTask.inputs)."""
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit = 100               # a text has up to eight shapes
    print(f"compile: {what}", flush=True)
    try:
        for module in modules:                               # fullgraph: in one piece, or not at all
            module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True)
        for shape in shapes:
            encode(*shape)
    except Exception as error:
        report_eager(what, error)
        for module in modules:
            vars(module).pop("forward", None)


def compile_vae(vae, s, device):
    """Compiles the VAE's encoder for training's micro-batches.

    CUDA's GroupNorm knows no channels_last: it copies each activation to planes, and the convolution after it
    copies it back. A compiled norm reads and writes any layout, together with the SiLU. Not for an image
    alone: where that is large it is computed in strips, for little memory.
    """
    chunk = min(hdm.vae_chunk(s), s.batch_size)
    images = torch.zeros(chunk, 3, s.image_size, s.image_size, device=device)
    sizes = {chunk, s.batch_size % chunk} - {0, 1}           # the last chunk may be smaller
    compile_encoder("the VAE's encoder", [vae.encoder], vae.moments, [[images[:n]] for n in sizes])


def compile_text_encoder(te, s):
    """Compiles the text encoder's layers, all alike, for the lengths of training's texts, with pads, which
    are masked, and without."""
    lists = [module for module in te.model.modules() if isinstance(module, torch.nn.ModuleList)]
    shapes = []
    for T in hdm.padded_lengths(s):
        for tokens in {1, T}:
            shapes.append(([[te.pad_id] * tokens] * s.batch_size, T))
    compile_encoder("the text encoder's layers", max(lists, key=len, default=[]), te.encode, shapes)


def compile_blocks(model, s, autocast, device, side):
    """Compiles XUT's blocks for every shape that training will meet, before the first step.

    side: of a latent, or of an image of pixels, in cells. Where it fails, the model runs eagerly.
    """
    torch.compiler.set_stance("default")
    lengths = hdm.padded_lengths(s)
    shapes = [(T, s.mask_padding) for T in lengths]          # text tokens, whether pads are masked
    if not s.mask_padding:
        shapes += [(T, True) for T in lengths[1:]]           # shorter texts beside one of T tokens
    print(f"compile: XUT's blocks, for texts of {', '.join(map(str, lengths))} tokens", flush=True)
    blocks = [module for module in model.modules() if isinstance(module, hdm.Block)]
    torch._dynamo.config.recompile_limit = 100               # with 8 it would do without from the ninth on
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    limit = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = 100                       # the config is this thread's, not backward's
    torch._dynamo.config.optimize_ddp = False                # block by block, exchange overlaps anyway
    torch._functorch.config.activation_memory_budget = s.memory_budget
    try:
        for block in blocks:                                 # all alike: compiled once, used by all
            block.compute = torch.compile(block.compute, dynamic=False, **limit)
        for T, masked in shapes:
            inputs = hdm.blank_inputs(model.config, s.batch_size, side, T, s.tread_rate, masked, device)
            with autocast:
                hdm.flow_loss(model, **inputs).backward()
        torch.compiler.set_stance("fail_on_recompile")       # a shape that was forgotten is an error
        hdm.SHARED_CPU.fixed = True
    except Exception as error:
        if "out of memory" in str(error):
            raise
        report_eager("XUT's blocks", error)
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
        if len(noted) == 1 and worker is None and os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping: saves at the next micro-step; a second signal leaves at once\n")
        if noted[-1] - noted[0] > 1:                         # torchrun repeats what the terminal sent to all
            os._exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return noted


def keep_freed_memory():
    """Where there is glibc: to get it again from the system costs a tenth of a step on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-4, 0)                     # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)           # M_TRIM_THRESHOLD


# ---- The open run, and what opens it ---------------------------------------------------------------------

@dataclasses.dataclass(init=False)
class OpenRun:
    """All that the loop reads and changes. open_run fills it in."""
    s: Settings                    # resume is a checkpoint's path; validation and images are numbers
    rank: int                      # which of the processes this is, from 0
    ranks: int                     # how many there are, each with its own device
    device: str                    # cpu, mps, cuda, cuda:1
    kind: str                      # the same without a number, for autocast and timing
    dtype: torch.dtype             # of autocast; float32: there is none

    # The images
    index: prepare.Index           # all of them: index[number] is a record
    stream: prepare.Stream         # training's order: stream[i] is (epoch, copy, number) of its item i
    held_out: list[int]            # numbers of the held-out records
    identity: str                  # a hash of all these: a resumed run with another one has other images

    # The position: how far training is
    start: int                     # optimizer steps that were done before this process
    step: int                      # ... that are done now
    seen: int                      # training images that are seen now, over all resumed parts
    position: int                  # item of the stream that comes next
    saved: int                     # images that the last checkpoint had seen
    warmup: int                    # images of linear warm-up
    end: int                       # images at which the schedule ends
    total: int                     # steps at which the schedule ends
    last: int                      # step at which this process ends: total, or --max_steps
    micro_steps: int               # of one rank in a step, each of batch_size images

    # The networks
    te: hdm.TextEncoder | None     # frozen; None: the VAE is trained
    vae: hdm.VAE | None            # frozen, or it is the model; None: XUT reads pixels
    task: "XUTTask | VAETask"      # what the loop does with the model
    latents: str                   # a hash of the frozen VAE: with another one a resumed run is refused
    config: hdm.XUTConfig          # by which training examples are made
    model: hdm.XUT | hdm.VAE       # float32
    network: torch.nn.Module       # model, under DDP where there are several ranks, ...
    group: object                  # ... the process group in which they sum up
    optimizer: hdm.OptimizerStep   # it holds the averaged weights, too: optimizer.average
    autocast: torch.autocast       # around forward passes

    # What comes in
    batches: Iterator[dict]        # micro-batches of this rank: training examples, collated
    training: prepare.Examples     # training examples, in the stream's order
    held_batches: DataLoader       # this rank's part of the held-out set, as often as it is asked for
    prompts: list[str]             # of the previews: captions, then those of --preview_prompts
    preview_seeds: list[int]       # one for each
    signals: list[float]           # when this process was asked to stop (time.monotonic)
    deadline: float                # when it stops by itself, by --max_hours (time.monotonic)

    # What goes out
    out_dir: Path
    header: dict                   # of checkpoints, all that sample.py needs, but step and images
    lock: FileLock | None          # of out_dir, as long as this process lives; None: not on rank 0
    tracker: Tracker               # of rank 0; the others' is silent

    # For the next line of metrics
    window: torch.Tensor           # (2, bins): sums of losses, and their number, by tenths of t or views
    window_start: int              # the step at which it began, a multiple of log_every
    watch: Stopwatch               # seconds in this window
    lr: float                      # of the last step, before the division by fan-in
    norm: torch.Tensor | None      # (), gradient norm of the last step before clipping; None: no step yet
    text_tokens: float             # mean padded length of the last step's texts
    began: float                   # when the loop began (time.monotonic)
    problems: list[tuple]          # of this rank's batches since the last line: Examples' "trouble", collated
    unreadable: set[str]           # a line for each unreadable image so far
    warned: set[str]               # kinds of warnings so far


def choose_start(s):
    """Makes s.resume the path of a checkpoint, or False, and of a run in s.init_from its newest checkpoint.
    Refuses an out_dir that holds another run's.

    -> the steps of the newest checkpoint in out_dir; 0: there is none.
    """
    existing = hdm.list_checkpoints(s.out_dir)
    if existing and not s.resume:
        raise hdm.UserError(f"--out_dir={s.out_dir} holds {existing[-1].name}: --resume or another --out_dir")
    of_source = hdm.list_checkpoints(s.init_from) if s.init_from else []
    if of_source:                                            # now: that run may go on, and save others
        s.init_from = str(of_source[-1])
    if s.resume is True:
        if not existing:
            raise hdm.UserError(f"--resume: no checkpoint in {s.out_dir}; leave it out to start a run there")
        s.resume = str(existing[-1])
    elif s.resume:                                           # the path of a run or of a checkpoint
        of_run = hdm.list_checkpoints(s.resume)
        if of_run:
            s.resume = str(of_run[-1])
    return int(existing[-1].name.removeprefix("ckpt_")) if existing else 0


def open_device(s):
    """-> device, its kind for autocast and the scaler, the dtype of autocast."""
    device = hdm.pick_device(s.device)
    kind = device.split(":")[0]
    if kind == "cpu":
        torch.set_flush_denormal(True)                       # numbers below 1e-38 can cost tenfold
        keep_freed_memory()
    if kind == "cuda":
        torch.backends.cudnn.benchmark = True                # the VAE meets few shapes
        torch.backends.cuda.enable_cudnn_sdp(False)          # with a mask its gradients can be NaN (#196678)
        torch.set_float32_matmul_precision("high")           # TF32, where --dtype=float32
    return device, kind, hdm.pick_dtype(s.dtype, device)


@contextlib.contextmanager
def rank_0_first(rank):
    """Around what may download: the other ranks do it afterwards, and find it in the cache."""
    if rank > 0:
        hdm.gather(None)
    yield
    if rank == 0:
        hdm.gather(None)


def load_networks(run, given, state):
    """Loads the frozen encoders and the model; the optimizer and the average as in state, train.pt's."""
    s = run.s
    with rank_0_first(run.rank):
        run.task.load(run, given)
    if state.get("latents", run.latents) != run.latents:
        raise hdm.UserError(f"--vae={s.vae}: its latents are not those of {s.resume}, whose VAE was "
                            f"{state['settings']['vae']}: name that one, unchanged, or begin a new run with "
                            f"--init_from={s.resume}")
    run.optimizer = hdm.optimizers()[s.optimizer](run.model, s, run.kind, run.dtype)
    if s.resume:
        run.optimizer.load_state_dict(state)
        if s.ema:
            file = Path(s.resume, run.task.average_file)
            if not file.is_file():                           # it had no average
                file = Path(s.resume, "model.safetensors")
            weights = hdm.read_tensors(file)[0]
            hdm.load_checkpoint_tensors(run.optimizer.average, weights)


def open_examples(run):
    """-> the training stream and the held-out set, as datasets of training examples."""
    s = run.s
    factor = run.vae.factor if run.vae else None
    cache = prepare.Latents(s, run.index, run.vae) if s.latents else None
    training = prepare.Examples(run.index, run.stream, cache, s, run.config, factor, s.seed)
    held_out = prepare.Examples(run.index, run.held_out, cache, s, run.config, factor)
    return training, held_out


def choose_previews(run, own_prompts):
    """Eight held-out captions, or the first of training, then own_prompts, those of --preview_prompts."""
    numbers = run.held_out[:8] or [run.stream[i][2] for i in range(8)]
    captions = [hdm.draw_caption(run.index[number].caption, None, run.s) for number in numbers]
    run.prompts = captions + own_prompts
    run.preview_seeds = [*range(len(captions)), *range(len(own_prompts))]


def count_steps(run, state):
    """Sets how long the warm-up, the schedule and this process are."""
    s = run.s
    run.micro_steps = s.global_batch // s.batch_size // run.ranks
    run.warmup, run.end = open_schedule(s, state)
    run.total = run.start + (run.end - run.seen) // s.global_batch
    run.last = min(run.total, s.max_steps) if s.max_steps else run.total
    if run.start >= run.last:
        raise hdm.UserError(f"--resume={s.resume}: nothing to do, it is at step {run.start} of {run.last}")


def checkpoint_header(s, config):
    """What sample.py needs to know of a run, as sample.load_model gives it, but for step and images."""
    paths = dict(text_encoder=s.text_encoder, vae=s.vae)
    if s.vae and Path(s.vae, "vae").is_dir():                # a folder of a whole pipeline
        paths["vae"] = str(Path(s.vae, "vae"))
    for name, path in paths.items():
        if os.path.exists(path):                             # else a hub id, or ""
            paths[name] = os.path.abspath(path)
    return dict(config=config, text_encoder=paths["text_encoder"], text_length=s.text_length,
                vae=paths["vae"], image_size=s.image_size, steps=s.sample_steps, cfg=s.sample_cfg,
                cfg_low=s.sample_cfg_low, t_shift=s.t_shift, tag_separator=s.tag_separator, spaces=s.spaces,
                validation=s.validation, holdout=s.holdout)      # prepare.py judge samples what was held out


def checkpoints_at_most(s, total):
    """How many checkpoints of a run of `total` steps are on the disk at the same time."""
    kept = 1                                                 # at the end
    if s.keep_ckpts > 0:
        kept = s.keep_ckpts + 1
    elif s.save_every > 0:
        kept = total // s.save_every
    if s.milestone_every > 0:
        kept += s.images // s.milestone_every
    return kept


def print_plan(run):
    """What will happen, before step 0."""
    s, gb = run.s, run.optimizer.checkpoint_gb()
    kept = checkpoints_at_most(s, run.total)
    if s.adapter:
        print(f"{s.adapter}: {hdm.count_learned(run.model):,} of the parameters learn")
    print(f"{hdm.count_parameters(run.model):,} parameters, {run.ranks} x {run.device}, {run.dtype}; "
          f"{run.stream.images:,} images, {len(run.held_out):,} held out (validation {s.validation:.3g})\n"
          f"{s.images:,} images seen, {s.images / run.stream.length:.2f} epochs; steps {run.start:,} to "
          f"{run.last:,} of {run.total:,}, {run.warmup / s.global_batch:,.0f} of warm-up; a step: "
          f"{run.ranks} ranks x {run.micro_steps} x {s.batch_size}\n"
          f"checkpoints of {gb:.3f} GB, at most {kept}: {gb * kept:.2f} GB; "
          f"free: {shutil.disk_usage(run.out_dir).free / 1e9:.2f} GB", flush=True)
    if run.warmup > run.end and run.rank == 0 and not s.bench:
        hdm.warn(f"--warmup={s.warmup}, {run.warmup:,} images: the run ends before its peak, at {run.end:,}")


def compile_networks(run):
    """Before the first step: compile_blocks comes last, as it allows no shape after it."""
    s = run.s
    if run.kind == "cuda":                                   # a CPU's encoders gain little
        if not s.cache_text:
            compile_text_encoder(run.te, s)
        if run.vae and not s.latents:
            compile_vae(run.vae, s, run.device)
    side = s.image_size // (run.vae.factor if run.vae else 1)
    compile_blocks(run.model, s, run.autocast, run.device, side)


def open_run(s, given, rank, ranks):
    """-> the OpenRun, ready for its next step. given: {name: value} of the settings that were named."""
    run = OpenRun()
    run.deadline = time.monotonic() + 3600 * s.max_hours if s.max_hours > 0 else math.inf
    run.s, run.rank, run.ranks = s, rank, ranks
    run.task = TASKS[s.train]
    run.out_dir = Path(s.out_dir)
    run.device, run.kind, run.dtype = open_device(s)
    newest = choose_start(s)
    own_prompts = read_prompts(s.preview_prompts) if s.preview_prompts else []
    run.index, run.stream, run.held_out, run.identity = prepare.open_data(s)
    state = load_state(s, run.identity, run.stream, ranks) if s.resume else {}        # train.pt
    run.start = run.step = state.get("step", 0)
    run.seen = run.saved = state.get("images", 0)
    run.position = state.get("position", 0)
    if newest > run.start:
        raise hdm.UserError(f"--out_dir={s.out_dir} holds the newer ckpt_{newest:08d}; name another out_dir")
    load_networks(run, given, state)
    run.training, held_out = open_examples(run)
    choose_previews(run, own_prompts)
    count_steps(run, state)

    # From here on the folder is this run's
    run.header = checkpoint_header(s, run.config) | base_of(s)
    hdm.make_folder(run.out_dir / "samples", "--out_dir")
    run.lock = None
    run.tracker = Tracker(s, run.out_dir, run.start, None)
    if rank == 0:
        is_branch = s.resume and Path(s.resume).resolve().parent != run.out_dir.resolve()
        run_id = None if is_branch else state.get("wandb")
        run.lock, run.tracker = open_log(run.out_dir, s, run.config, run.start, run_id)
    print_plan(run)

    # Batches, other ranks, compilation
    run.signals = catch_signals()
    stop = run.position + (run.last - run.start) * s.global_batch
    order = order_of_rank(run.training, run.position, stop, rank, ranks)
    run.held_batches = DataLoader(held_out, s.batch_size, sampler=range(rank, len(run.held_out), ranks))
    run.batches = iter(DataLoader(run.training, s.batch_size, sampler=order, num_workers=s.workers,
                                  worker_init_fn=catch_signals, pin_memory=run.kind == "cuda"))
    run.network = run.model
    if ranks > 1:
        # All ranks reach a sum together: a GPU or a network that hangs there is an error, not a lost day.
        run.group = torch.distributed.new_group(timeout=datetime.timedelta(minutes=30))
        run.network = torch.nn.parallel.DistributedDataParallel(
            run.model, process_group=run.group, gradient_as_bucket_view=True)
    run.autocast = torch.autocast(run.kind, run.dtype, enabled=run.dtype != torch.float32)
    if s.compile:
        compile_networks(run)

    # For the next line of metrics: a resumed run goes on with the sums of its checkpoint
    run.window = state.get("window", torch.zeros(2, run.task.bins)).to(run.device)
    run.window_start = run.start - run.start % s.log_every
    run.watch = Stopwatch(run.kind, state.get("seconds", ()))
    run.lr = hdm.lr_at(run.seen, s, run.warmup, run.end)
    run.norm = None
    run.text_tokens = 0.0
    run.problems = []
    run.unreadable = set()
    run.warned = set()
    run.began = time.monotonic()
    return run


# ---- What is trained: all that the loop does in another way for XUT than for a VAE -----------------------

def stance(s, name):
    """torch.compiler.set_stance as a context, where anything is compiled."""
    return torch.compiler.set_stance(name) if s.compile else contextlib.nullcontext()


class XUTTask:
    """With --train=xut."""
    bins = 10                      # tenths of t: losses are summed up by them ...
    loss_by = "loss_by_t"          # ... for this line of metrics
    average_file = "ema.safetensors"

    def load(self, run, given):
        """Sets the networks of the OpenRun, and config, by which its training examples are made."""
        s = run.s
        run.te = hdm.TextEncoder(s.text_encoder, s.text_length, run.device, run.dtype)
        run.vae = hdm.load_vae(s.vae, run.device, run.dtype) if s.vae else None
        if s.cache_text:                                     # before XUT, which then gets the memory
            captions = (run.index[i].caption for i in range(len(run.index)))
            run.te.remember({"", *(hdm.draw_caption(caption, None, s) for caption in captions)}, s)
        run.model = build_model(s, given, run.vae, run.te.dim, run.device, run.dtype)
        run.config = run.model.config
        run.latents = prepare.hash_of_vae(run.vae).hexdigest() if run.vae else ""
        prepare.report_cut_captions(run.index, run.te, s)

    def inputs(self, run, batch):
        """A batch of training examples -> what losses takes."""
        with stance(run.s, "eager_on_recompile"):            # a shape that was forgotten costs time alone
            return hdm.loss_inputs(batch, run.vae, run.te, run.s, run.device, run.watch)

    def losses(self, run, inputs):
        """-> the losses (B,), their bins (B,), and how many tokens the texts are padded to."""
        losses = hdm.flow_loss(run.network, **inputs, reduction="none")
        return losses, (10 * inputs["t"]).long().clamp(max=9), inputs["ctx"].shape[1]

    def sums(self, run, batch):
        """A held-out batch -> {name: sum over its images}, by the averaged weights, with times and noise that
        no setting moves."""
        inputs = hdm.loss_inputs(batch, run.vae, run.te, run.s, run.device)
        losses = hdm.flow_loss(run.optimizer.average, **inputs, reduction="none")
        return dict(val_loss=losses.sum().item())

    def measures(self, sums, n):
        """sums of n images -> {name: number} for metrics."""
        return dict(val_loss=sums["val_loss"] / n)

    def previews(self, run):
        """-> images, (height, width, 3) uint8, and the number of their sheet's columns."""
        header = run.header | dict(step=run.step, images=run.seen)
        return sample.generate(run.optimizer.average, run.vae, run.te, run.prompts, run.preview_seeds, header,
                               run.s.batch_size), 4

    def save(self, run, folder, header):
        """Writes the weights and, where there is one, their average into a checkpoint's folder."""
        hdm.save_model(folder / "model.safetensors", hdm.checkpoint_tensors(run.model), header)
        if run.s.ema:
            average = hdm.checkpoint_tensors(run.optimizer.average)
            hdm.save_model(folder / self.average_file, average, header)
        copy_small_encoders(header, folder)

    def next_command(self, run):
        """What comes after the run."""
        return f"python sample.py --ckpt={run.out_dir} --prompt {shlex.quote(run.prompts[0])}"


class VAETask:
    """With --train=vae; each method as XUTTask's."""
    bins = len(hdm.VIEWS)
    loss_by = "loss_by_view"
    average_file = "vae/diffusion_pytorch_model.safetensors"

    def load(self, run, given):
        s = run.s
        if run.dtype == torch.float16:                       # the SDXL VAE overflows in it
            print("--train=vae: float32 in place of float16, in which VAEs overflow")
            run.dtype = torch.float32
        torch.manual_seed(s.seed)
        if s.resume:
            config = hdm.vae_config(Path(s.resume, "vae", "config.json"))
            file = Path(s.resume, "model.safetensors")
            vae = hdm.vae_from_tensors(hdm.read_tensors(file)[0], file, run.device, torch.float32, **config)
        elif s.vae_widths:
            vae = hdm.new_vae(s).to(run.device, memory_format=torch.channels_last)
        elif s.vae:
            vae = hdm.load_vae(s.vae, run.device)
        else:
            raise hdm.UserError("--vae=: name one to train, or --vae_widths of a new one")
        if s.image_size % vae.factor:
            raise hdm.UserError(f"--image_size={s.image_size}: no multiple of {vae.factor}, a cell's pixels")
        if s.image_size < 2 * vae.factor:
            raise hdm.UserError(f"--image_size={s.image_size}: at least {2 * vae.factor}, two cells")
        if s.lpips > 0:                                      # what is missing is missing now
            hdm.load_lpips(torch.device(run.device))
        run.te = None
        run.latents = ""                                     # they change
        run.vae = run.model = copy.deepcopy(vae).requires_grad_(True).train()      # mapped weights: as above
        run.config = hdm.XUTConfig(in_channels=vae.latent_channels, patch_size=s.image_size // vae.factor)

    def inputs(self, run, batch):
        return hdm.vae_inputs(batch, run.model.factor, run.s, run.device)

    def losses(self, run, inputs):
        losses = hdm.vae_loss(run.network, **inputs, s=run.s)
        return losses, torch.full_like(losses, inputs["view"], dtype=torch.int64), 0

    def sums(self, run, batch):
        return hdm.vae_sums(run.optimizer.average, hdm.images_of(batch, run.device))

    def measures(self, sums, n):
        return hdm.vae_measures(sums, n)

    def previews(self, run):
        """Images; below them their reconstructions, and those of their latents in half the size, turned."""
        vae = run.optimizer.average
        dataset = run.held_batches.dataset if run.held_out else run.training
        examples = [dataset[i] for i in range(min(8, len(run.held_out) or 8))]
        pixels = torch.stack([example["pixels"] for example in examples])
        images = hdm.images_of(dict(pixels=pixels), run.device)
        z, _ = vae.moments(images)
        rows = images, vae.reconstruct(z), vae.reconstruct(hdm.change_view(z, 0.5, 1))
        return [image for row in rows for image in sample.to_uint8(row)], len(examples)

    def save(self, run, folder, header):
        vae = run.optimizer.average
        first = range(min(STATISTICS, run.stream.images))
        batches = DataLoader(run.training, run.s.batch_size, sampler=first)
        with without_gradients(run):
            hdm.normalize_latents(vae, batches, run.device)
        weights = {name: value.cpu().contiguous() for name, value in run.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        hdm.save_vae(vae, folder / "vae")

    def next_command(self, run):
        vae = run.out_dir / f"ckpt_{run.step:08d}"
        return f"python prepare.py {run.s.data} --latents --image_size={run.s.image_size} --vae={vae}"


STATISTICS = 2048              # training images, by which the latents of a VAE's checkpoint are normalized
TASKS = {"xut": XUTTask(), "vae": VAETask()}


# ---- What is due after a step, the loop, its end ---------------------------------------------------------

def tasks_due(run):
    """-> which of evaluate, preview, log and save are due after run.step steps."""
    s, step = run.s, run.step
    due = set()
    if step == run.start > 0:                                # a resumed run has done its first step's
        return due

    def is_due(every):                                       # steps; 0: never
        return every > 0 and (step % every == 0 or step == run.total)

    if is_due(s.eval_every) and run.held_out:
        due.add("evaluate")
    if is_due(s.sample_every):
        due.add("preview")
    if is_due(s.log_every) or step == run.last or "evaluate" in due:
        due.add("log")
    if is_due(s.save_every) and 0 < step < run.last:         # the last checkpoint is finish's
        due.add("save")
    return due


@contextlib.contextmanager
def without_gradients(run):
    """In the block the model is as in sampling: no gradients, and eager, as the shapes are of any kind."""
    run.model.eval()
    with torch.no_grad(), run.autocast, stance(run.s, "force_eager"):
        yield
    run.model.train()


def evaluate(run):
    """-> val_loss, and a VAE's measures, of the averaged weights on the held-out images: {name: number}."""
    sums, totals = {}, {}
    with without_gradients(run):
        for batch in run.held_batches:
            add_to(sums, run.task.sums(run, batch))
            run.problems.append(batch["trouble"])
    for one in hdm.gather(sums):
        add_to(totals, one)
    return run.task.measures(totals, len(run.held_out))


def add_to(totals, values):
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def save_previews(run):
    """One sheet of the same prompts and seeds, or images, each time, by the averaged weights."""
    with without_gradients(run):
        images, columns = run.task.previews(run)
    if run.rank == 0:
        with if_the_disk_allows("not written: a sheet of previews"):
            sheet = hdm.image_grid(images, columns, scale=max(1, 128 // run.s.image_size))
            sheet.save(run.out_dir / "samples" / f"{run.step:08d}.png")
            run.tracker.report(run.step, {}, sheet)


def refuse_bad_steps(run, skipped):
    """Ends the run, and names its images, where steps in a row were skipped."""
    first = run.position - skipped * run.s.global_batch
    names = [run.index[run.stream[i][2]].name for i in range(first, first + run.s.global_batch)]
    (run.out_dir / "bad_images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    raise hdm.UserError(f"no finite loss or gradient since step {run.step - skipped}, of the images "
                        f"{', '.join(names[:20])} (all: bad_images.txt); lower --lr, --resume")


def ratio(total, count):
    """total / count; None where nothing was counted."""
    return total / count if count else None


def metrics_of(run, held_out):
    """-> {name: value}, of the steps since the last one whose number is a multiple of log_every; held_out:
    evaluate's."""
    losses, counts = run.window.tolist()
    split = run.watch.read()
    seconds = sum(split.values())
    images = (run.step - run.window_start) * run.s.global_batch      # those of skipped steps, too
    waited = split["data"] / seconds if run.step - run.start > run.s.log_every else 0.0   # not at the start
    norm = run.norm.item() if run.norm is not None and run.norm.isfinite() else None
    memory = torch.cuda.max_memory_allocated(run.device) / 1e9 if run.kind == "cuda" else 0.0
    return dict(
        step=run.step, images=run.seen, epoch=run.position / run.stream.length, lr=run.lr, **held_out,
        skipped=run.optimizer.skipped[0].item(), data_s=split["data"], loss=ratio(sum(losses), sum(counts)),
        grad_norm=norm, images_per_s=ratio(images, seconds), unreadable=report_problems(run, waited),
        split_s=split, text_tokens=run.text_tokens, memory_gb=memory,
        **{run.task.loss_by: [ratio(*sums) for sums in zip(losses, counts)]})


def log(run, held_out):
    """Prints a line of metrics and writes it to metrics.jsonl; ends the run after ten bad steps in a row."""
    in_a_row = run.optimizer.skipped[1].item()
    if in_a_row >= 10:
        refuse_bad_steps(run, in_a_row)
    record = metrics_of(run, held_out)
    words = [f"step {run.step}/{run.last}"]
    for name in ("loss", *held_out, "images_per_s", "skipped"):
        if record[name]:
            words.append(f"{name} {record[name]:.4g}")
    if run.step > run.start:
        seconds_a_step = (time.monotonic() - run.began) / (run.step - run.start)
        words.append(f"{seconds_a_step * (run.last - run.step) / 60:.1f} min left")
    tqdm.write(" | ".join(words))
    sys.stdout.flush()
    if run.rank == 0:
        with if_the_disk_allows("not written: a line of metrics"):
            with open(run.out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            run.tracker.report(run.step, record)


def save(run):
    """-> whether the checkpoint is there; on other ranks than the first: True."""
    if run.rank > 0:
        return True
    state = run.optimizer.state_dict() | dict(
        step=run.step, images=run.seen, position=run.position, next_epoch=run.stream.next_epoch(run.position),
        pictures=run.stream.images, identity=run.identity, latents=run.latents, window=run.window,
        seconds=dict(run.watch.read()), warmup_images=run.warmup, wandb=run.tracker.run_id,
        settings=vars(run.s) | dict(ranks=run.ranks))
    is_complete = save_checkpoint(run, state)
    if is_complete:
        run.saved = run.seen
    return is_complete


# step 0        evaluate, preview, log           | lr, micro-steps, clip, step, average
# step 1, 2 ..  what is due after so many steps  | lr, micro-steps, clip, step, average
# last step     what is due, and a log line      | none; finish saves
# resumed at n  nothing: it was done before      | lr, micro-steps, clip, step, average

def train(s, given, rank, ranks):
    run = open_run(s, given, rank, ranks)
    stopped, failure = False, ""
    for step in tqdm(range(run.start, run.last + 1), disable=rank > 0 or not sys.stderr.isatty()):
        # What is due after `step` steps
        run.step = step
        due = tasks_due(run)
        held_out = dict(val_loss=None)
        if "evaluate" in due:
            held_out = evaluate(run)
        if "preview" in due:
            save_previews(run)
        if "log" in due:
            log(run, held_out)
        if step % s.log_every == 0:
            run.window, run.window_start = torch.zeros_like(run.window), step
            run.watch = Stopwatch(run.kind)
        if "save" in due:
            save(run)
        if step == run.last:
            break

        # Micro-steps: their gradients are summed up
        run.watch(None)
        run.lr = hdm.lr_at(run.seen, s, run.warmup, run.end)
        run.text_tokens = 0.0
        stats = torch.zeros_like(run.window)                 # sums of losses, and their number: by bins
        for micro in range(1, run.micro_steps + 1):
            batch, failure = next_batch(run)
            asked = bool(run.signals) or time.monotonic() > run.deadline
            asks, failures = zip(*hdm.gather((asked, failure)))                       # all stop, or none
            failure = next(filter(None, failures), "")
            stopped = any(asks) or failure != ""
            if stopped:
                break
            run.watch("data")
            run.problems.append(batch["trouble"])
            run.network.require_backward_grad_sync = micro == run.micro_steps         # DDP's: once a step
            with hdm.SHARED_CPU.work(run.device):
                inputs = run.task.inputs(run, batch)
                with run.autocast:
                    losses, bins, tokens = run.task.losses(run, inputs)            # (B,), (B,), a number
                run.watch("forward")
                run.optimizer.backward(losses.mean() / run.micro_steps)
                run.watch("backward")
            run.text_tokens += tokens / run.micro_steps
            one_hot = torch.nn.functional.one_hot(bins, run.task.bins).float()     # (B, bins)
            stats += torch.stack([losses.detach() @ one_hot, one_hot.sum(0)])
        if stopped:                                          # the step begins again when the run goes on
            break

        # Clip, step, average
        if ranks > 1:
            torch.distributed.all_reduce(stats, group=run.group)
        run.norm, done = run.optimizer.step(run.lr, step, stats.isfinite().all())
        run.window += torch.where(done, stats, 0)
        run.seen += s.global_batch
        run.position += s.global_batch
        run.watch("optimizer")
    return 0 if s.bench else finish(run, stopped, failure)


def next_batch(run):
    """-> this rank's next batch, ""; or None, and why it cannot be read, such as that the disk is away."""
    try:
        return next(run.batches), ""
    except hdm.UserError as error:                           # of a loader process: at a traceback's end
        return None, str(error).rpartition("UserError: ")[2].strip()


STOPPED = 3                    # exit code of a run that stopped before its end: a shell's && does not go on


def save_last(run):
    """The checkpoint with which a run ends, however it ends."""
    if not (run.out_dir / f"ckpt_{run.step:08d}").is_dir() and not save(run):
        raise hdm.UserError(f"--out_dir={run.out_dir}: step {run.step} is not saved: make room, --resume")
    hdm.gather(None)                                         # the others wait for rank 0's files


def finish(run, stopped, failure):
    """The last checkpoint, and the command that comes next. -> the exit code. failure: why the run ends with
    an error, or ""."""
    save_last(run)
    if failure:
        raise hdm.UserError(f"{failure}; step {run.step} is saved: mend it and --resume")
    if not stopped:
        print(f"done: {run.task.next_command(run)}")
        return 0
    program = ["torchrun", f"--nproc_per_node={run.ranks}", "--"] if run.ranks > 1 else ["python"]
    command = shlex.join([*program, *sys.argv, "--resume"])
    if int(os.environ.get("LOCAL_WORLD_SIZE", run.ranks)) != run.ranks:
        command = "on each machine the same torchrun command with --resume"
    print(f"stopped at step {run.step}; to go on: {command}")
    return STOPPED


def explain(error, s):
    """Raises a UserError that says what to do, where the error is of loader processes or of memory."""
    trace = "".join(traceback.format_exception(error))
    if re.search(r"DataLoader worker \(pid|shared memory object|</?torch_|SemLock|No space.*shm/", trace):
        sys.unraisablehook = lambda _: None                  # torch's half-made loader would add a traceback
        raise hdm.UserError(f"--workers={s.workers}: the loader processes lack shared memory or died "
                            f"({trace.strip().splitlines()[-1]}); --workers=0 needs none, in a container "
                            f"--shm-size=8g gives more") from error
    if not hdm.is_out_of_memory(error):
        return
    mends = []
    if "in clean_latents" in trace:
        where, chunk = " in the VAE", hdm.vae_chunk(s)
        if chunk > 1:
            mends.append(f"--vae_chunk={chunk // 2} for {chunk}")
        mends.append("a cache of latents (prepare.py --latents)")
    else:
        where = ""
        if s.batch_size > 1:
            mends.append(f"--batch_size={s.batch_size // 2} in place of {s.batch_size} (the global batch "
                         f"stays)")
        if not s.checkpointing:
            mends.append("--checkpointing")
        mends.append("a smaller --image_size, or an adapter (--adapter=lora)")
    raise hdm.UserError(f"out of memory{where}: {', or '.join(mends)}") from error


def main(argv):
    if argv[:1] == ["--plot"]:
        return plot(argv[1:])
    rank, ranks = hdm.start_ranks()
    s, given = read_settings(argv, ranks)
    if s.plan:
        return plan(s, given)
    try:
        if s.bench:
            return bench(s, given, rank, ranks)
        return train(s, given, rank, ranks)
    except (RuntimeError, OSError) as error:
        explain(error, s)
        raise


# ==== Extras ==============================================================================================

def plot(runs):
    """The curves of some runs over the images that they saw -> plot.png in the current folder."""
    lines = {run: read_metrics(run) for run in runs}
    empty = [run for run in runs if not lines[run]]
    if empty or not runs:
        raise hdm.UserError(f"--plot {' '.join(empty) or 'RUN'}: a folder with metrics.jsonl is needed")
    from matplotlib.figure import Figure
    figure = Figure((20, 4), layout="constrained")
    for name, axis in zip(("loss", "val_loss", "grad_norm", "images_per_s"), figure.subplots(1, 4)):
        for run in runs:
            known = [line for line in lines[run] if line.get(name) is not None]
            axis.plot([line["images"] for line in known], [line[name] for line in known], label=run)
        axis.set(title=name, xlabel="images", yscale="log" if "loss" in name else "linear")
        axis.legend()
    figure.savefig("plot.png")
    print(f"plot.png: {', '.join(runs)}")


# ---- What it costs: counted on tensors without memory, whatever a fork makes of XUT; and measured --------

QWEN3 = dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,      # 0.6B
             num_attention_heads=16, num_key_value_heads=8, head_dim=128)


def count_flops(f, *arguments, **named):
    """FLOPs of the matrix products and convolutions in f(*arguments, **named), by torch's counter; a
    multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        f(*arguments, **named)
    return counter.get_total_flops()


def saved_bytes(f, *arguments, **named):
    """Bytes that autograd keeps of f(*arguments, **named) for backward: shared ones once, parameters not."""
    kept = {}                                                # {address: tensor}; held, none is used again
    def keep(x):
        return kept.setdefault(x.untyped_storage()._cdata, x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        f(*arguments, **named)
    activations = [x for x in kept.values() if not isinstance(x, torch.nn.Parameter)]
    return sum(x.untyped_storage().nbytes() for x in activations)


def image_flops(config, side, T, tread_rate, vae, text):
    """FLOPs of one training image, as a dict; arguments as of image_costs. With an adapter they are the same
    but for its own products: of a LoRA of rank 16 in the base model 0.2 %."""
    with torch.device("meta"):
        model = hdm.XUT(config)
        inputs = hdm.blank_inputs(config, 1, side, T, tread_rate, device="meta")
    flops = dict(step=count_flops(lambda: hdm.flow_loss(model, **inputs).backward()), vae=0, text=0)
    with torch.no_grad(), torch.device("meta"):
        flops["xut"] = count_flops(hdm.flow_loss, model, **inputs)
        if vae:
            images = torch.zeros(2, 3, side * vae.factor, side * vae.factor)
            flops["vae"] = count_flops(vae.encoder, images) // 2      # two: one alone is computed in strips
        if text:
            states, mask = torch.zeros(1, T, config.ctx_dim), torch.zeros(1, 1, T, T)
            flops["text"] = count_flops(text, inputs_embeds=states, attention_mask=mask)
    return flops


class CUDANorm(torch.autograd.Function):
    """A stand-in that keeps RMSNorm's bytes and computes nothing. CUDA's kernel keeps its input and one
    number for each token; a CPU's keeps two copies in float32, which would be a fifth more in all."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x[..., 0].float())
        return torch.empty_like(x)


class CUDAKernels(torch.overrides.TorchFunctionMode):
    """In the block tensors of a CPU keep for backward what those of CUDA would. Of all that XUT is made of
    the norms alone differ: of the others, CUDA's autocast changes exp and the time's norm alone, to float32.
    """

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is torch.nn.functional.rms_norm:
            return CUDANorm.apply(args[0], kwargs["weight"])
        return f(*args, **(kwargs or {}))


def activation_bytes(config, side, T, tread_rate, dtype, adapter):
    """-> image, shared: XUT keeps shared + n x image bytes of n images for its backward pass, on CUDA.

    Measured for n = 1 and n = 2, on tensors without memory. Shared are the weights in 16 bit, or their sums
    with what adapters change.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with FakeTensorMode(), CUDAKernels(), autocast:
        model = hdm.XUT(config)
        if adapter is not None and adapter.adapter:
            hdm.add_adapters(model, adapter, dtype)
        one = saved_bytes(hdm.flow_loss, model, **hdm.blank_inputs(config, 1, side, T, tread_rate))
        two = saved_bytes(hdm.flow_loss, model, **hdm.blank_inputs(config, 2, side, T, tread_rate))
    image = two - one
    return image, one - image


def image_bytes(config, side, T, tread_rate=0.0, dtype=torch.bfloat16, adapter=None):
    """What XUT keeps for its backward pass, as a dict; arguments as of image_costs."""
    image, shared = activation_bytes(config, side, T, tread_rate, dtype, adapter)
    N = (side // config.patch_size) ** 2                     # image tokens
    R = N - math.floor(N * tread_rate)                       # ... that go through the U
    inside = config.depth * (config.enc_blocks + config.dec_blocks)                   # blocks in the U
    outside = config.pre_blocks + config.post_blocks
    tokens = outside * (T + N) + inside * (T + R)            # in the inputs of all blocks
    checkpointed = tokens * config.dim * dtype.itemsize + image / (inside + outside)
    return dict(bytes=image, checkpointed=checkpointed, shared=shared)


def image_costs(config, side, T, tread_rate=0.0, vae=None, text=None, dtype=torch.bfloat16, adapter=None):
    """What a training image with a latent of side x side cells and T text tokens costs, as a dict.

    FLOPs: xut, forward; step, XUT forward and backward; vae, its encoder; text, the text encoder (modules on
    "meta", or None). Bytes that XUT keeps for its backward pass, eager, under autocast to dtype: bytes, of an
    image; checkpointed, of an image with --checkpointing, which keeps the input of each block and all of one;
    shared, whatever the number of images. adapter: AdapterSettings; None: all weights learn.
    """
    flops = image_flops(config, side, T, tread_rate, vae, text)
    return flops | image_bytes(config, side, T, tread_rate, dtype, adapter)


def matmul_tflops(device, dtype):
    """The device's own rate of large matrix products, in TFLOP/s: the best of five tries."""
    n = 8192 if "cuda" in device else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):                                       # the first one warms up
        clock = time.perf_counter()
        (a @ b)[0, 0].item()                                 # waits for it
        seconds.append(time.perf_counter() - clock)
    return 2e-12 * n ** 3 / min(seconds)


def at_hand(name):
    """Whether an encoder can be had without a download: a path, or in the hub's cache."""
    import huggingface_hub
    if os.path.exists(name):
        return True
    if hdm.looks_local(name):
        return False
    return isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def shape_of_vae(s):
    """The VAE on "meta"; the published one where it is not at hand; None: pixels."""
    if not s.vae:
        return None
    if at_hand(s.vae):
        return hdm.load_vae(s.vae, "meta")
    with torch.device("meta"):
        return hdm.VAE()


def shape_of_text_encoder(s):
    """The text encoder on "meta"; the published one where it is not at hand."""
    import transformers
    config = transformers.Qwen3Config(**QWEN3)
    if at_hand(s.text_encoder):
        with hdm.naming(s.text_encoder, "no text encoder"):
            config = transformers.AutoConfig.from_pretrained(s.text_encoder)
    with torch.device("meta"):
        return hdm.text_part(hdm.text_class(config).from_config(config)).float()


def costs_of(s, given, T, dtype=torch.bfloat16, with_flops=True):
    """-> image_costs of the run with T text tokens, or its bytes alone; how many parameters learn, and how
    many are frozen, in XUT, VAE and text encoder. Encoders not at hand are taken for the published ones."""
    vae, text = shape_of_vae(s), shape_of_text_encoder(s)
    with torch.device("meta"):
        model = build_model(s, given, vae, text.config.hidden_size, "meta", dtype)
    te = None if s.cache_text else text                      # cached states need none, nor its memory
    everything = sum(hdm.count_parameters(module) for module in (model, vae, te) if module)
    learned = hdm.count_learned(model)
    side = s.image_size // (vae.factor if vae else 1)
    encoder = None if s.latents else vae                     # cached latents need none
    costs = image_bytes(model.config, side, T, s.tread_rate, dtype, adapter=s)
    if with_flops:
        costs |= image_flops(model.config, side, T, s.tread_rate, encoder, te)
    return costs, learned, everything - learned


def plan(s, given):
    """Prints what the run costs on other machines, counted, and a guess of how much of their rate it gets."""
    if s.epochs:
        prepare.open_data(s)                                 # counts the images of an epoch
    s.init_from = ""                                         # what the weights are costs nothing
    s.resume = False
    away = [name for name in (s.vae, s.text_encoder) if name and not at_hand(name)]
    if away:
        print(f"not at hand, counted as the published one: {', '.join(away)}")
    dtype = torch.float32 if s.dtype == "float32" else torch.bfloat16
    memory = {}
    for kind in ("", "lora", "lokr"):
        other = dataclasses.replace(s, adapter=kind)
        costs, learned, frozen = costs_of(other, given, s.text_length, dtype, with_flops=kind == s.adapter)
        memory[kind] = memory_of(other, costs, learned, frozen, dtype)
        if kind == s.adapter:
            print_hours(s, costs)
            sent = 2 * (s.gpus - 1) / s.gpus * 4e-9 * learned                         # by a ring, in float32
            print(f"each GPU sends {sent:.2f} GB of gradients a step of {s.global_batch} images")
    print_memory(s, memory)


def print_hours(s, costs):
    """costs: image_costs'."""
    flops = {"XUT forward": costs["xut"], "and backward": costs["step"] - costs["xut"],
             "forward again": costs["xut"] if s.checkpointing else 0, "VAE": costs["vae"],
             "text encoder": costs["text"]}
    words = [f"{name} {number / 1e9:.1f}" for name, number in flops.items()]
    print(f"GFLOP of an image of {s.image_size} px with {s.text_length} text tokens: {', '.join(words)}")
    limit = s.gpus * s.tflops * 1e12 / sum(flops.values())   # images/s
    for what, share in (("the limit", 1.0), (f"a guess, --utilization={s.utilization}", s.utilization)):
        hours = s.images / limit / share / 3600
        print(f"{what}: {s.images:,} images on {s.gpus} x {s.tflops} TFLOP/s: {limit * share:.1f} images/s, "
              f"{hours:.1f} h, {s.gpus * hours:.1f} GPU-hours, "
              f"{s.dollars_per_gpu_hour * s.gpus * hours:,.0f} dollars")


def memory_of(s, costs, learned, frozen, dtype):
    """-> GB whatever the batch, GB of an image; arguments as of costs_of."""
    copies = 3 if s.ema else 2                               # in float32: weights, gradients, average
    each_weight = 4 * copies + hdm.optimizers()[s.optimizer].state_bytes
    fixed = 1e-9 * (each_weight * learned + dtype.itemsize * frozen + costs["shared"])
    return fixed, 1e-9 * costs["checkpointed" if s.checkpointing else "bytes"]


def print_memory(s, memory):
    """memory: {adapter: memory_of with it}."""
    fixed, image = memory[s.adapter]
    print(f"memory: {fixed:.2f} GB of weights, gradients, optimizer, EMA, encoders, {image:.3f} GB an image "
          f"of a micro-step (counted, eager): {fixed + s.batch_size * image:.1f} GB in all\n"
          f"batch_size at most, with 1 GB to spare:")
    for kind, (fixed, image) in memory.items():
        fits = [f"{gb} GB {max(0, int((gb - 1 - fixed) / image))}" for gb in (8, 12, 16, 24, 32)]
        print(f"  {kind or 'all weights':<12}{', '.join(fits)}")


# ---- The bench: a run on made-up data --------------------------------------------------------------------

MADE_UP = 64                   # images
WORDS = "red large open small happy old round quiet long bright".split()


def make_images(folder, s):
    """Images of noise with a short side of image_size, and captions of random words."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(MADE_UP):
        longer = s.image_size * rng.integers(2, 5) // 2
        size = rng.permutation([s.image_size, longer]).tolist()
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        image.resize(size, Image.BICUBIC).save(folder / f"{i}.jpg")
        tokens = round(s.caption_tokens * rng.uniform(0.5, 1.5))
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, tokens)))


def make_latents(data, vae, s):
    """The cache of latents for make_images' images, all zero."""
    index = prepare.open_index(data)
    file = prepare.shard(prepare.latents_folder(data, index, vae, s.image_size), 0)
    file.parent.mkdir()
    shape = 2 * vae.latent_channels, s.image_size // vae.factor, s.image_size // vae.factor
    save_file({str(i): torch.zeros(shape, dtype=torch.float16) for i in range(MADE_UP)}, file)


def make_up(s, folder):
    """Images and captions, random encoders of the published shapes for those not at hand, and, for a run on
    latents, a cache of zeros -> {name: path} of the settings that name them."""
    made = dict(data=str(folder / "data"))
    make_images(folder / "data", s)
    if not at_hand(s.text_encoder):
        made["text_encoder"] = str(folder / "text_encoder")
        prepare.make_text_encoder([*WORDS, " ".join(2 * WORDS)], made["text_encoder"], **QWEN3)
    if s.vae and not at_hand(s.vae):
        made["vae"] = str(folder / "vae.safetensors")
        save_file(hdm.VAE().state_dict(), made["vae"])
    print(f"bench: made up, encoders with random weights: {made}")
    if s.latents:
        make_latents(made["data"], hdm.load_vae(made.get("vae", s.vae)), s)
    hdm.open_modes(folder)
    return made


@contextlib.contextmanager
def temporary_folder(parent, rank):
    """One folder for all ranks, which is removed when all have left the block."""
    with contextlib.ExitStack() as stack:
        folder = None
        if rank == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix="bench-"))
        yield Path(hdm.gather(folder)[0])
        hdm.gather(None)


def measure(s, given, rank, ranks, warm, tflops, dtype):
    """Trains by s -> what bench.json says of it. The first `warm` steps are not counted; tflops: of one
    device, by matmul_tflops."""
    train(s, given, rank, ranks)
    hdm.gather(None)                                         # rank 0 has written its metrics
    lines = read_metrics(s.out_dir)[1 + warm:]               # 1: before any step
    steps = s.images // s.global_batch - warm
    if len(lines) < steps:
        raise hdm.UserError(f"--bench={s.bench}: stopped before it was done")
    tokens = sum(line["text_tokens"] for line in lines) / steps
    split = Counter()                                        # seconds by what they went to
    for line in lines:
        split.update(line["split_s"])
    images = steps * s.global_batch
    rate = images / sum(split.values())
    costs, _, _ = costs_of(s, given, round(tokens), dtype)
    share = rate / ranks / tflops / 1e12                     # of a device's rate, for each FLOP of an image
    milliseconds = {name: 1000 * ranks * seconds / images for name, seconds in split.items()}
    return dict(images_per_s=rate, text_tokens=tokens, xut_mfu=share * costs["step"],
                all_flops=share * (costs["step"] + costs["vae"] + costs["text"]), ms_per_image=milliseconds,
                memory_gb=lines[-1]["memory_gb"])


def bench(s, given, rank, ranks):
    """Trains on made-up data; prints where the time went, and writes it to OUT_DIR/bench.json."""
    device = hdm.pick_device(s.device)
    dtype = hdm.pick_dtype(s.dtype, device)
    hdm.make_folder(s.out_dir, "--out_dir")
    micro_steps = min(s.bench, s.global_batch // s.batch_size // ranks)
    steps = s.bench // micro_steps
    warm = 1 + steps // 5
    global_batch = micro_steps * s.batch_size * ranks
    tflops = matmul_tflops(device, dtype)
    report = dict(device=device, dtype=str(dtype), processes=ranks, torch=torch.__version__,
                  matmul_tflops=tflops, command=shlex.join(sys.argv))
    if "cuda" in device:
        report["device"] = torch.cuda.get_device_name(device)
    fixed = dict(validation=0.0, init_from="", resume=False, log_every=1, eval_every=0, sample_every=0,
                 save_every=0, max_steps=0, max_hours=0.0, log="", preview_prompts="",
                 global_batch=global_batch, epochs=0.0, images=(warm + steps) * global_batch)
    changes = {"as configured": {}}
    if s.baseline:
        changes["baseline"] = dict(compile=False, text_lengths=1, checkpointing=True, vae_chunk=4)
    with temporary_folder(s.out_dir, rank) as folder:
        made_up = hdm.gather(make_up(s, folder) if rank == 0 else None)[0]
        for name, changed in changes.items():
            settings = dataclasses.replace(s, **made_up, **fixed, **changed, out_dir=str(folder / name))
            gc.collect()                                     # compiled blocks refer to themselves
            if "cuda" in device:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            measured = measure(settings, given, rank, ranks, warm, tflops, dtype)
            report[name] = dict(settings=changed, **measured)
    if s.baseline:
        report["ratio"] = report["as configured"]["images_per_s"] / report["baseline"]["images_per_s"]
    text = json.dumps(report, indent=1)
    print(text)
    if rank == 0:
        Path(s.out_dir, "bench.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    hdm.run_main(main)
