"""Train XUT on a folder of images with same-named .txt captions.

    python train.py configs/demo.py                       # settings from a file,
    python train.py configs/demo.py --lr=0.3 --out_dir=out/b   # some of them from the command line
    python train.py configs/demo.py --resume              # go on, bitwise, from the newest checkpoint of out_dir
    python train.py configs/demo.py --init_from=out/demo --out_dir=out/c   # a new run from old weights

In order: settings; data; what a step reads; optimiser; checkpoints; held-out loss and previews; main, a flat loop.

Every random choice of training (order, tags, crop, VAE sample, t, noise, kept tokens, dropouts) is a function of
(seed, epoch, name of the sample) and is drawn on the CPU: a run does not depend on the number of loader workers, and
resuming needs no state of any generator.
"""
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate

import hdm


# ---------------------------------------------------------------------------------------------------------------
# Settings: flat, together with the fields of hdm.XUTConfig

@dataclass
class Run:
    out_dir: str = "out/run"       # checkpoints, metrics.jsonl, run.json and samples/ go here
    init_from: str = ""            # weights to start from: a run, a checkpoint, a published file, a hub id
    resume: bool | str = False     # go on with a run: bare, the newest checkpoint of out_dir; or a checkpoint's path
    seed: int = 0                  # of everything random
    device: str = "auto"           # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"            # of autocast: float32, bfloat16, float16; auto: float32 on a CPU, else 16 bit.
                                   # Master weights are always float32
    compile: bool = True           # torch.compile where a compiler is found
    workers: int = 4               # loader processes; 0: the main process loads
    max_steps: int = 0             # stop early after so many steps, the schedule unchanged; 0: at the stage's end
    log_every: int = 20            # steps between two lines of metrics
    eval_every: int = 1000         # steps between two held-out losses; 0: never
    sample_every: int = 1000       # steps between two grids of previews; 0: never
    save_every: int = 1000         # steps between two checkpoints; 0: only at the end
    keep_ckpts: int = 3            # newest checkpoints to keep; 0: all


@dataclass
class Data:
    data: str = "data/train"       # folder (any depth) of images with same-named .txt captions
    vae: str = "KBlueLeaf/EQ-SDXL-VAE"    # folder or hub id; "" trains on pixels
    text_encoder: str = hdm.TEXT_ENCODER  # folder or hub id of a causal LM
    image_size: int = 256          # side of the square crop in pixels; images are scaled to this short side
    text_length: int = 256         # tokens; captions are cut and padded to it
    mask_padding: bool = False     # False: pads are ordinary tokens, as published; True: nothing sees them
    caption_dropout: float = 0.1   # share of captions replaced by an empty one, for classifier-free guidance
    validation: float = 0.02       # share of the pictures held out, by a hash of their name


@dataclass
class Optim:
    preset: str = "base"           # small, base or large: the XUTConfig that the fields below it change
    images: int = 152_500_000      # the stage's length: images seen (256 px: 7.624M images, 20 epochs)
    batch_size: int = 32           # images in one micro-step of one process
    global_batch: int = 2048       # images in one optimiser step, a multiple of batch_size
    lr: float = 0.5                # peak, before each tensor's division by its fan-in
    warmup: int = 1000             # steps of linear warm-up; then a cosine to 1 % of the peak
    beta1: float = 0.9             # AdamW
    beta2: float = 0.98            # AdamW
    weight_decay: float = 0.02     # AdamW, times the tensor's own lr
    clip: float = 3.0              # largest global gradient norm
    tread_rate: float = 0.5        # share of image tokens that skips the U, in [0, 1)
    t_shift: float = 1.0           # > 1 moves training and sampling times toward noise; 1: published
    ema: float = 0.9999            # decay of the averaged weights, a step; 0: no average
    sample_steps: int = 24         # Euler steps of previews, and sample.py's default for the checkpoint
    sample_cfg: float = 3.0        # guidance of previews, likewise
    preview_prompts: str = ""      # file with one prompt a line; "": the captions of the first held-out pictures


CLASSES = [Run, Data, Optim, hdm.XUTConfig]


# ---------------------------------------------------------------------------------------------------------------
# Data

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
HELD_OUT_MOST = 512                # pictures of the held-out loss: enough for its third digit, seconds to compute
PREVIEWS = 8                       # pictures in a grid of previews


def name_hash(name):
    """A stable number in [0, 1) for a sample's name: adding data never moves a picture across the split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64


def list_samples(data, validation):
    """-> names (path below data, without suffix) to training and to held-out image paths."""
    root = Path(data)
    if not root.is_dir():
        raise hdm.UserError(f"--data={data}: no such folder (python prepare.py demo makes data/demo)")
    images = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = {path.relative_to(root).with_suffix("").as_posix(): path for path in images
             if path.with_suffix(".txt").is_file()}
    if not paths:
        raise hdm.UserError(f"--data={data}: {len(images)} images ({', '.join(sorted(IMAGE_SUFFIXES))}), none with a "
                            f"same-named .txt caption beside it")
    if len(paths) < len(images):
        print(f"data: {len(images) - len(paths)} images without a .txt of their own are left out")
    order = sorted(paths, key=name_hash)
    held = [name for name in order if name_hash(name) < validation]
    train = sorted(name for name in order if name_hash(name) >= validation)
    if not train:
        raise hdm.UserError(f"--validation={validation} leaves none of {len(paths)} pictures to train on; lower it")
    return {name: paths[name] for name in train}, {name: paths[name] for name in held[:HELD_OUT_MOST]}


def load_image(path):
    """An upright RGB picture; what is transparent becomes white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class Samples(Dataset):
    """Item i of the endless training stream, or of the held-out set: what one image needs for its loss.

    Training: epoch i // n, a fresh order each epoch, a random square crop. Held out: centre crop, all tags, fixed t
    and noise, no dropout and no TREAD, whatever the epoch.
    """

    def __init__(self, paths, s, config, factor, training):
        self.names, self.paths = list(paths), list(paths.values())
        self.s, self.config, self.factor, self.training = s, config, factor, training
        self.order = (None, None)                            # the last epoch's permutation: asked for in order

    def __len__(self):
        return len(self.names)

    def caption(self, index, rng=None):
        return hdm.parse_caption(self.paths[index].with_suffix(".txt").read_text(encoding="utf-8").strip(), rng)

    def __getitem__(self, i):
        s, training = self.s, self.training
        epoch, index = divmod(i, len(self.names))
        if training:
            if self.order[0] != epoch:
                self.order = epoch, np.random.default_rng([s.seed, epoch]).permutation(len(self.names))
            index = int(self.order[1][index])
        rng = random.Random(f"{s.seed} {epoch} {self.names[index]}" if training else self.names[index])
        generator = torch.Generator().manual_seed(rng.getrandbits(63))

        caption = self.caption(index, rng if training else None)
        if training and rng.random() < s.caption_dropout:
            caption = ""
        # Shifted square crop: the short side becomes X, and any pixel of the long side may be the cut's start.
        image, size = load_image(self.paths[index]), s.image_size
        short = min(image.size)
        width, height = (side * size // short for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.BICUBIC)
        left, top = ((rng.randint(0, side - size) if training else (side - size) // 2) for side in (width, height))
        pixels = np.array(image.crop((left, top, left + size, top + size)))           # (X, X, 3) uint8

        config, cells = self.config, size // self.factor
        item = dict(
            caption=caption, pixels=torch.from_numpy(pixels).permute(2, 0, 1), aspect=math.log(width / height),
            pos=hdm.crop_positions(height, width, top, left, size, config.patch_size * self.factor, config.pos),
            t=hdm.draw_time(1, s.t_shift, generator)[0],
            noise=torch.randn(config.in_channels, cells, cells, generator=generator))
        if self.factor > 1:                                  # the posterior's own noise; pixels have none
            item["vae_noise"] = torch.randn(config.in_channels, cells, cells, generator=generator)
        if training and s.tread_rate > 0:
            item["keep"] = hdm.pick_tokens(1, len(item["pos"]), s.tread_rate, generator)[0]
        return item


def loss_inputs(batch, vae, te, s, device):
    """A collated batch -> the arguments of hdm.flow_loss: pixels and captions go through the frozen encoders."""
    x0 = batch["pixels"].to(device).float() / 127.5 - 1                               # (B, 3, X, X)
    if vae is not None:
        x0 = vae.encode(x0, sample=True, noise=batch["vae_noise"])                    # (B, C, h, w)
    ctx, mask = te(batch["caption"], pad_to=s.text_length)
    inputs = {name: batch[name].to(device) for name in ("pos", "t", "noise", "keep") if name in batch}
    return dict(inputs, x0=x0, ctx=ctx, ctx_mask=mask if s.mask_padding else None,
                aspect=batch["aspect"].float().to(device))


# ---------------------------------------------------------------------------------------------------------------
# Optimiser: each tensor's lr is lr / fan_in, a rule in the manner of muP (arXiv 2203.03466)

def fan_in(parameter):
    return parameter.shape[0] if parameter.dim() == 1 else math.prod(parameter.shape[1:])


def parameter_groups(model):
    """One AdamW group for each distinct fan-in, not for each tensor: seven for the base model.

    Two consequences of the published rule that look like mistakes and are kept: the aspect input's first weight has
    fan-in 1, so it takes the whole lr; norms and biases are divided by their length as well.
    """
    groups = {}
    for parameter in model.parameters():
        groups.setdefault(fan_in(parameter), []).append(parameter)
    return [dict(params=parameters, lr=0.0, fan_in=fan) for fan, parameters in groups.items()]


def lr_at(step, s, total):
    """The lr of step 0 .. total - 1, before the division: linear warm-up, then a cosine to 1 % of the peak."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    part = (step - s.warmup) / max(1, total - s.warmup)
    return s.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


def compile_or_not(model, inputs, kind, dtype):
    """A compiled model, tried on one batch; where that cannot be had, the model itself and a line that says so."""
    if kind == "cuda":
        found = importlib.util.find_spec("triton") is not None
    else:
        found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl"))
    if not found:
        print("compile: no compiler found, running eagerly")
        return model
    compiled = torch.compile(model)
    try:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            hdm.flow_loss(compiled, **inputs).backward()
    except Exception as error:                               # anything in a user's tool chain; eager needs none of it
        print(f"compile: failed ({hdm.first_line(error)}), running eagerly")
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder with model.safetensors, ema.safetensors, train.pt and small frozen encoders

SMALL = 100e6                      # bytes: a text encoder or VAE below this is copied into every checkpoint


def copy_if_small(source, target):
    """So that a run's folder can move to another machine; a hub id or a large model is only recorded."""
    if os.path.isdir(source) and sum(path.stat().st_size for path in Path(source).iterdir()) < SMALL:
        shutil.copytree(source, target)


def save_checkpoint(out_dir, settings, model, ema, state, keep):
    """Written under a temporary name and renamed when complete: a folder named ckpt_* is always whole."""
    final = out_dir / f"ckpt_{settings['step']:08d}"
    partial = out_dir / f"partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)               # left over from a run that was killed while saving
    partial.mkdir(parents=True)
    hdm.save_model(partial / "model.safetensors", model.state_dict(), settings)
    if ema is not None:
        hdm.save_model(partial / "ema.safetensors", ema.state_dict(), settings)
    torch.save(state, partial / "train.pt")
    for part in ("text_encoder", "vae"):
        copy_if_small(settings[part], partial / part)
    partial.rename(final)
    for old in hdm.list_checkpoints(out_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
    print(f"saved {final}")


def recorded(source):
    """How a checkpoint names an encoder that it does not hold: a hub id as it is, a folder by its full path."""
    return os.path.abspath(source) if os.path.isdir(source) else source


def report(path, record, last, global_batch):
    """One line of metrics.jsonl, and the same for people."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    words = [f"step {record['step']:,}/{last:,}"]
    words += [f"{name.replace('_', ' ')} {record[name]:.4f}" for name in ("loss", "val_loss") if record[name] is not None]
    if record["images_per_s"]:
        left = round((last - record["step"]) * global_batch / record["images_per_s"])
        words += [f"{record['images_per_s']:.1f} images/s", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
    print(" | ".join(words), flush=True)


def write_run_json(path, settings, config):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip() if shutil.which("git") else ""
    record = dict(command=sys.argv, settings=settings, config=dataclasses.asdict(config), git_commit=commit,
                  versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def trim_metrics(path, step):
    """Drop the lines that a resumed run will write again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Held-out loss and previews

@torch.no_grad()
def held_out_loss(model, samples, vae, te, s, device):
    """Mean loss over the held-out pictures, each at its own fixed noise and t: two runs can be compared by it."""
    losses = [hdm.flow_loss(model, **loss_inputs(batch, vae, te, s, device), reduction="none")
              for batch in DataLoader(samples, batch_size=s.batch_size)]
    return torch.cat(losses).mean().item()


def draw_previews(path, model, vae, te, prompts, settings):
    """The same prompts and seeds at every call, so that the grids of a run show its progress."""
    images = hdm.generate(model, vae, te, prompts, range(len(prompts)), settings, batch_size=PREVIEWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    hdm.image_grid(images, 4, scale=max(1, 128 // settings["image_size"])).save(path)


# ---------------------------------------------------------------------------------------------------------------
# Main

def read_settings(argv):
    """-> all settings of train.py as one flat namespace, and the {name: value} of those that were given."""
    (config_file,), flags = hdm.parse_args(argv, CLASSES, ["CONFIG"], __doc__)
    values = hdm.read_config(config_file, CLASSES) | flags
    s = SimpleNamespace()
    for cls in (Run, Data, Optim):
        vars(s).update(vars(hdm.pick_settings(cls, values)))
    if s.global_batch < s.batch_size or s.global_batch % s.batch_size:
        near = max(1, round(s.global_batch / s.batch_size)) * s.batch_size
        raise hdm.UserError(f"--global_batch={s.global_batch} is not a multiple of batch_size={s.batch_size}; the "
                            f"nearest that is: --global_batch={near}")
    if s.preset not in hdm.PRESETS:
        raise hdm.UserError(f"--preset={s.preset}: one of {', '.join(hdm.PRESETS)}")
    limits = dict(images=(1, None), batch_size=(1, None), image_size=(1, None), text_length=(1, None), lr=(0, None),
                  log_every=(1, None), caption_dropout=(0, 1), validation=(0, 1), ema=(0, 1), tread_rate=(0, 1))
    for name, (least, below) in limits.items():
        if getattr(s, name) < least or below is not None and getattr(s, name) >= below:
            raise hdm.UserError(f"--{name}={getattr(s, name)}: at least {least}" +
                                (f" and below {below}" if below is not None else ""))
    return s, values


def build_model(s, values, vae, te, device):
    """-> XUT in float32, from --resume, --init_from or the preset, and the first step of this run."""
    given = {field.name: values[field.name] for field in dataclasses.fields(hdm.XUTConfig) if field.name in values}
    encoders = dict(in_channels=vae.latent_channels if vae else 3, ctx_dim=te.dim)
    start, source = 0, s.resume or s.init_from
    if source:
        model, _, settings = hdm.load_model(source, device, ema=not s.resume)
        start = settings["step"] if s.resume else 0
    else:                                                    # the encoders' two numbers win over the preset's
        source = "the preset"
        model = hdm.XUT(dataclasses.replace(hdm.PRESETS[s.preset], **encoders | given)).to(device)
    for name, value in (given | encoders).items():
        if getattr(model.config, name) != value:
            why = "the encoders give" if name in encoders else "the command says"
            raise hdm.UserError(f"{name}: {source} has {getattr(model.config, name)}, {why} {value}; they must agree")
    hdm.check_size(s.image_size, s.image_size, model.config, vae)
    return model.train(), start


def preview_prompts(s, samples):
    if not s.preview_prompts:
        return [samples.caption(i) for i in range(min(PREVIEWS, len(samples)))]
    if not os.path.isfile(s.preview_prompts):
        raise hdm.UserError(f"--preview_prompts={s.preview_prompts}: no such file (one prompt a line)")
    return Path(s.preview_prompts).read_text(encoding="utf-8").splitlines()[:PREVIEWS]


def main(argv):
    s, values = read_settings(argv)
    device = hdm.pick_device(s.device)
    dtype = hdm.pick_dtype(s.dtype, device)
    kind = device.split(":")[0]                              # what autocast and the scaler want to know
    out_dir = Path(s.out_dir)
    existing = hdm.list_checkpoints(out_dir)
    if s.resume is True:
        if not existing:
            raise hdm.UserError(f"--resume: no checkpoint in {out_dir}; leave --resume out to start a run there")
        s.resume = str(existing[-1])
    elif existing and not s.resume:
        raise hdm.UserError(f"--out_dir={out_dir} already holds {existing[-1].name}; go on with that run by --resume, "
                            f"or choose another --out_dir")
    train_paths, held_paths = list_samples(s.data, s.validation)

    # The frozen encoders, the model, its average and the optimiser
    te = hdm.TextEncoder(s.text_encoder, s.text_length, device)
    vae = hdm.load_vae(s.vae, device, hdm.vae_dtype(dtype, device)) if s.vae else None
    torch.manual_seed(s.seed)                                # for the weights' init, and for nothing after it
    model, start = build_model(s, values, vae, te, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if s.ema else None
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(s.beta1, s.beta2), weight_decay=s.weight_decay)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    loss_sum, loss_steps = torch.zeros((), device=device), 0                          # since the last line of metrics
    if s.resume:
        state = torch.load(Path(s.resume) / "train.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        loss_sum, loss_steps = state["loss_sum"], state["loss_steps"]
        if ema is not None:
            ema.load_state_dict(hdm.load_model(s.resume, device)[0].state_dict())

    # The plan
    factor = vae.factor if vae is not None else 1
    samples = Samples(train_paths, s, model.config, factor, training=True)
    held = Samples(held_paths, s, model.config, factor, training=False)
    prompts = preview_prompts(s, held if held_paths else samples)
    micro_steps = s.global_batch // s.batch_size
    total = math.ceil(s.images / s.global_batch)
    last = min(total, s.max_steps) if s.max_steps else total
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters in {len(optimizer.param_groups)} lr "
          f"groups, {device}, {str(dtype).removeprefix('torch.')}")
    print(f"data: {len(samples):,} pictures to train on, {len(held):,} held out")
    print(f"plan: {total:,} steps of {s.global_batch} images ({micro_steps} x {s.batch_size}), "
          f"{s.images / len(samples):.2f} epochs; now steps {start:,} to {last:,}", flush=True)
    settings = dict(config=model.config, text_encoder=recorded(s.text_encoder), text_length=s.text_length,
                    vae=recorded(s.vae), image_size=s.image_size, steps=s.sample_steps, cfg=s.sample_cfg,
                    t_shift=s.t_shift)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_run_json(out_dir / "run.json", vars(s), model.config)
    trim_metrics(out_dir / "metrics.jsonl", start)

    stream = range(start * s.global_batch, last * s.global_batch)
    batches = iter(DataLoader(samples, s.batch_size, sampler=stream, num_workers=s.workers))
    network = model
    if s.compile and start < last:
        first = default_collate([samples[i] for i in stream[:s.batch_size]])
        network = compile_or_not(model, loss_inputs(first, vae, te, s, device), kind, dtype)
    seconds, begun, norm = 0.0, start, None                  # of training since the last line of metrics

    for step in range(start, last + 1):
        # What is due after `step` steps: held-out loss, previews, a line of metrics, a checkpoint
        settings.update(step=step, images=step * s.global_batch)
        shown, val_loss = model if ema is None else ema, None
        fresh = step > start or start == 0                   # a resumed run has these already

        def due(every):
            return fresh and every > 0 and (step % every == 0 or step == last)
        model.eval()
        if held_paths and due(s.eval_every):
            val_loss = held_out_loss(shown, held, vae, te, s, device)
        if due(s.sample_every):
            draw_previews(out_dir / "samples" / f"{step:08d}.png", shown, vae, te, prompts, settings)
        model.train()
        if due(s.log_every) or val_loss is not None:
            speed = (step - begun) * s.global_batch / seconds if seconds else None
            record = dict(step=step, images=step * s.global_batch, loss=loss_sum.item() / loss_steps if loss_steps else None,
                          lr=lr_at(min(step, total - 1), s, total), grad_norm=None if norm is None else norm.item(),
                          images_per_s=speed, val_loss=val_loss)
            report(out_dir / "metrics.jsonl", record, last, s.global_batch)
            loss_sum, loss_steps, seconds, begun = torch.zeros_like(loss_sum), 0, 0.0, step
        if fresh and step > 0 and (step == last or s.save_every and step % s.save_every == 0):
            state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), loss_sum=loss_sum,
                         loss_steps=loss_steps)
            save_checkpoint(out_dir, settings, model, ema, state, s.keep_ckpts)
        if step == last:
            break

        # One optimiser step
        clock = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, s, total) / group["fan_in"]
        for _ in range(micro_steps):
            inputs = loss_inputs(next(batches), vae, te, s, device)
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                loss = hdm.flow_loss(network, **inputs) / micro_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        loss_steps += 1
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            decay = min(s.ema, (1 + step) / (10 + step))     # early steps: a shorter average, the init forgotten
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        seconds += time.perf_counter() - clock
    print(f"done; python sample.py --ckpt={out_dir} --prompt \"{prompts[0]}\"")


if __name__ == "__main__":
    hdm.run(main)
