"""Train XUT on a folder of images with same-named .txt captions.

    python train.py configs/demo.py                            # settings from a file
    python train.py configs/demo.py --lr=0.3 --out_dir=out/b   # and from the command line
    python train.py configs/demo.py --resume                   # go on, bitwise, from the newest checkpoint
    python train.py configs/demo.py --init_from=out/demo --out_dir=out/c    # a new run from old weights

In order: settings; data; schedule, checkpoints, log; the model; main, a flat loop.

All random choices (order, tags, crop, VAE sample, t, noise, kept tokens, dropouts) are functions of (seed,
epoch, sample), drawn on the CPU: the number of workers changes nothing, resuming needs no generator's state.
"""
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import hdm
from sample import generate, image_grid


# ---- Settings: flat, together with the fields of hdm.XUTConfig -------------------------------------------

@dataclasses.dataclass
class Run:
    out_dir: str = "out/run"       # checkpoints, metrics.jsonl, run.json and samples/ go here
    init_from: str = ""            # weights to start from: a run, a checkpoint, a published file, a hub id
    resume: bool | str = False     # bare: go on from the newest checkpoint of out_dir; or a checkpoint's path
    seed: int = 0                  # of everything random
    device: str = "auto"           # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"            # float32, or autocast to bfloat16 or float16; auto: 16 bit on CUDA
    compile: bool = True           # torch.compile, where a compiler is found
    workers: int = 4               # loader processes; 0: the main process loads
    max_steps: int = 0             # stop early at this step, the schedule unchanged; 0: at the stage's end
    log_every: int = 20            # steps between two lines of metrics
    eval_every: int = 1000         # steps between two held-out losses; 0: never
    sample_every: int = 1000       # steps between two grids of previews; 0: never
    save_every: int = 1000         # steps between two checkpoints; 0: one at the end
    keep_ckpts: int = 3            # how many of the newest checkpoints stay; 0: all


@dataclasses.dataclass
class Data:
    data: str = "data/train"       # folder, of any depth, of images with same-named .txt captions
    vae: str = "KBlueLeaf/EQ-SDXL-VAE"     # folder or hub id; "": train on pixels
    text_encoder: str = hdm.TEXT_ENCODER   # folder or hub id of a causal LM
    image_size: int = 256          # side of the square crop in pixels: an image's short side is scaled to it
    text_length: int = 256         # tokens that captions are cut and padded to
    mask_padding: bool = False     # False: pads are ordinary tokens, as published; True: nothing sees them
    caption_dropout: float = 0.1   # share of captions replaced by an empty one, for guidance
    validation: float = 0.02       # share of the pictures held out, by a hash of their name


@dataclasses.dataclass
class Optim:
    preset: str = "base"           # small, base or large: an XUTConfig, which the settings below change
    images: int = 152_500_000      # the stage's length in images seen (published at 256 px: 20 x 7.624M)
    batch_size: int = 32           # images in one micro-step of one process
    global_batch: int = 2048       # images in one optimiser step, a multiple of batch_size
    lr: float = 0.5                # peak, before each tensor's division by its fan-in
    warmup: int = 1000             # steps of linear warm-up; then a cosine to 1 % of the peak
    beta1: float = 0.9             # AdamW
    beta2: float = 0.98            # AdamW
    weight_decay: float = 0.02     # AdamW's, times the tensor's own lr
    clip: float = 3.0              # largest global gradient norm
    tread_rate: float = 0.5        # share of image tokens that go around the U, in [0, 1)
    t_shift: float = 1.0           # > 1 moves training and sampling times toward noise; 1: published
    ema: float = 0.9999            # decay of the averaged weights, a step; 0: no average
    sample_steps: int = 24         # Euler steps of previews, and sample.py's default for the checkpoint
    sample_cfg: float = 3.0        # guidance, likewise


CLASSES = Run, Data, Optim, hdm.XUTConfig
POSITIVE = ("images", "batch_size", "global_batch", "image_size", "text_length", "log_every", "sample_steps",
            "lr", "clip", "t_shift")
SHARES = ("caption_dropout", "validation", "tread_rate", "ema", "beta1", "beta2")     # in [0, 1)


def read_settings(argv):
    """-> the settings of Run, Data and Optim as one flat namespace, and the {name: value} that were given."""
    (config_file,), flags = hdm.parse_args(argv, CLASSES, ["CONFIG"], __doc__)
    given = hdm.read_config(config_file, CLASSES) | flags
    values = {field.name: field.default for cls in CLASSES[:3] for field in dataclasses.fields(cls)}
    s = SimpleNamespace(**values | {name: given[name] for name in given if name in values})
    for name, value in vars(s).items():
        wrong = isinstance(value, (int, float)) and (value < 0 or value == 0 and name in POSITIVE)
        if wrong or name in SHARES and value >= 1:
            limit = "in [0, 1)" if name in SHARES else "above 0" if name in POSITIVE else "0 or more"
            raise hdm.UserError(f"--{name}={value}: must be {limit}")
    if s.global_batch % s.batch_size:
        near = max(1, round(s.global_batch / s.batch_size)) * s.batch_size
        raise hdm.UserError(f"--global_batch={s.global_batch}: no multiple of batch_size; {near} is")
    hdm.check_name(f"--preset={s.preset}", s.preset, hdm.PRESETS, "preset")
    return s, given


# ---- Data ------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def name_hash(name):
    """A number in [0, 1) that is the sample's own: added data never move a picture across the split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64


def list_samples(data, validation):
    """-> {name (path below data): image path} to train on, and those held out."""
    if not os.path.isdir(data):
        raise hdm.UserError(f"--data={data}: no such folder (python prepare.py demo makes data/demo)")
    images = [path for path in sorted(Path(data).rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = {path.relative_to(data).as_posix(): path for path in images if path.with_suffix(".txt").is_file()}
    train = {name: path for name, path in paths.items() if name_hash(name) >= validation}
    held = sorted(paths.keys() - train.keys(), key=name_hash)[:512]                   # the rest stays unseen
    if not train:
        raise hdm.UserError(f"--data={data}: {len(images)} images ({' '.join(IMAGE_SUFFIXES)}), {len(paths)} "
                            f"with a same-named .txt, none left to train on by --validation={validation}")
    if len(paths) < len(images):
        print(f"data: {len(images) - len(paths)} of {len(images)} images are left out: no .txt of their own")
    return train, {name: paths[name] for name in held}


class Samples(Dataset):
    """Item i of the endless training stream, or of the held-out set: what the loss of one image needs.

    Training: epoch i // n in an order of its own, a random square crop. Held out: centre crop, all tags,
    fixed t and noise, no dropout, no TREAD.
    """

    def __init__(self, paths, s, config, factor, training):
        self.names, self.paths = list(paths), list(paths.values())
        self.s, self.config, self.factor, self.training, self.epoch = s, config, factor, training, None

    def __len__(self):
        return len(self.names)

    def caption(self, index, rng=None):
        return hdm.parse_caption(self.paths[index].with_suffix(".txt").read_text(encoding="utf-8"), rng)

    def __getitem__(self, i):
        s, config, training, size = self.s, self.config, self.training, self.s.image_size
        epoch, index = divmod(i, len(self.names))
        if training and epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([s.seed, epoch]).permutation(len(self.names))
        index = int(self.order[index]) if training else index
        rng = random.Random(f"{s.seed} {epoch} {self.names[index]}" if training else self.names[index])
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        dropped = training and rng.random() < s.caption_dropout
        caption = "" if dropped else self.caption(index, rng if training else None)
        # Shifted square crop: the short side becomes X, the cut starts at any pixel of the long side.
        image = hdm.load_image(self.paths[index])
        width, height = (side * size // min(image.size) for side in image.size)
        image = image.resize((width, height), Image.BICUBIC)                          # antialiased
        spare = width - size, height - size                                           # one of them is 0
        left, top = (rng.randint(0, most) if training else most // 2 for most in spare)
        pixels = np.array(image.crop((left, top, left + size, top + size)))           # (X, X, 3) uint8
        shape = config.in_channels, size // self.factor, size // self.factor          # (C, h, w)
        patch = config.patch_size * self.factor              # a token's side in pixels
        item = dict(pixels=torch.from_numpy(pixels).permute(2, 0, 1), caption=caption,
                    pos=hdm.crop_positions(height, width, top, left, size, patch, config.pos),
                    aspect=math.log(width / height), t=hdm.draw_time(1, s.t_shift, generator)[0],
                    noise=torch.randn(shape, generator=generator))
        if s.vae:                                            # for a draw from its posterior
            item["vae_noise"] = torch.randn(shape, generator=generator)
        if training and s.tread_rate > 0:
            item["keep"] = hdm.pick_tokens(1, len(item["pos"]), s.tread_rate, generator)[0]
        return item


def loss_inputs(batch, vae, te, s, device):
    """A collated batch -> the arguments of hdm.flow_loss, through the frozen encoders."""
    x0 = batch["pixels"].to(device).float() / 127.5 - 1                               # (B, 3, X, X)
    if vae is not None:
        x0 = vae.encode(x0, sample=True, noise=batch["vae_noise"])                    # (B, C, h, w)
    ctx, mask = te(batch["caption"], pad_to=s.text_length)
    inputs = {name: batch[name].to(device) for name in ("pos", "t", "noise", "keep") if name in batch}
    return dict(inputs, x0=x0, ctx=ctx, ctx_mask=mask if s.mask_padding else None,
                aspect=batch["aspect"].float().to(device))


def lr_at(step, s, total):
    """The lr of step 0 .. total - 1 before the division: linear warm-up, then a cosine to 1 % of the peak."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    part = (step - s.warmup) / max(1, total - s.warmup)
    return s.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


# ---- Checkpoints: folders with model.safetensors, ema.safetensors, train.pt and small frozen encoders ----

def save_checkpoint(out_dir, settings, model, ema, state, keep):
    """Written under another name and renamed when complete: a folder named ckpt_* is always whole."""
    final = out_dir / f"ckpt_{settings['step']:08d}"
    partial = out_dir / f"partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)               # of a run that was killed while saving
    partial.mkdir()
    hdm.save_model(partial / "model.safetensors", model.state_dict(), settings)
    if ema is not None:
        hdm.save_model(partial / "ema.safetensors", ema.state_dict(), settings)
    torch.save(state, partial / "train.pt")
    for part in ("text_encoder", "vae"):                     # small ones go where the run's folder goes
        files = list(Path(settings[part]).glob("*")) if os.path.isdir(settings[part]) else []
        if files and sum(file.stat().st_size for file in files) < 100e6:
            shutil.copytree(settings[part], partial / part)
    partial.rename(final)
    for old in hdm.list_checkpoints(out_dir)[:-keep] if keep else []:
        shutil.rmtree(old)


def open_log(out_dir, s, config, start):
    """run.json and metrics.jsonl, less the lines that a resumed run writes again or, uncut, never had."""
    commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')    # or why it is none
    record = dict(command=sys.argv, settings=vars(s), config=dataclasses.asdict(config), git_commit=commit,
                  versions=dict(python=sys.version, torch=torch.__version__, numpy=np.__version__))
    (out_dir / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    metrics = out_dir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(True) if metrics.exists() else []
    scheduled = start > 0 and any(every and start % every == 0 for every in (s.log_every, s.eval_every))
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < start + scheduled))
    return metrics


def build_model(s, given, vae, te, device):
    """-> XUT in float32 from --resume, --init_from or the preset, and the step to start at."""
    preset = dataclasses.asdict(hdm.PRESETS[s.preset])
    explicit = {name: given[name] for name in given if name in preset}
    encoders = dict(in_channels=vae.latent_channels if vae else 3, ctx_dim=te.dim)
    source = s.resume or s.init_from
    if source:
        model, _, settings = hdm.load_model(source, device, ema=not s.resume)
    else:                                                    # the encoders' two numbers win over the preset's
        model = hdm.XUT(hdm.XUTConfig(**preset | encoders | explicit)).to(device)
    for name, value in ((preset if "preset" in given else {}) | explicit | encoders).items():
        if getattr(model.config, name) != value:
            raise hdm.UserError(f"{name}: {source or 'the config'} says {getattr(model.config, name)}, the "
                                f"{'encoders say' if name in encoders else 'command says'} {value}")
    hdm.check_size(s.image_size, s.image_size, model.config, vae)
    return model.train(), settings["step"] if s.resume else 0


def main(argv):
    torch.set_flush_denormal(True)                           # on a CPU numbers below 1e-38 can cost tenfold
    s, given = read_settings(argv)
    device = hdm.pick_device(s.device)
    kind = device.split(":")[0]                              # what autocast and the scaler want to know
    dtype = hdm.pick_dtype(s.dtype, device)
    out_dir, existing = Path(s.out_dir), hdm.list_checkpoints(s.out_dir)
    if s.resume is True and not existing:
        raise hdm.UserError(f"--resume: no checkpoint in {out_dir}; leave it out to start a run there")
    if existing and not s.resume:
        raise hdm.UserError(f"--out_dir={out_dir} holds {existing[-1].name}: --resume, or another --out_dir")
    if s.resume:                                             # a run: its newest checkpoint
        s.resume = str((hdm.list_checkpoints(out_dir if s.resume is True else s.resume) or [s.resume])[-1])
    train_paths, held_paths = list_samples(s.data, s.validation)

    # The frozen encoders, the model, its average, the optimiser
    te = hdm.TextEncoder(s.text_encoder, s.text_length, device, dtype)
    vae = hdm.load_vae(s.vae, device, dtype) if s.vae else None
    torch.manual_seed(s.seed)                                # for the weights' init, and for nothing after it
    model, start = build_model(s, given, vae, te, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if s.ema else None
    optimizer = torch.optim.AdamW(hdm.parameter_groups(model), fused=kind != "mps")
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    norm, loss_sum, loss_steps, seconds = None, torch.zeros((), device=device), 0, 0.0
    if s.resume:
        state = torch.load(Path(s.resume) / "train.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())                # empty: was not fp16
        loss_sum, loss_steps, seconds = state["loss_sum"], state["loss_steps"], state["seconds"]
        if ema is not None:
            ema.load_state_dict(hdm.read_safetensors(hdm.find_weights(s.resume, ema=True))[0])
    for group in optimizer.param_groups:                     # a resumed run's, too, are the command's
        group.update(betas=(s.beta1, s.beta2), weight_decay=s.weight_decay)

    # The plan
    samples = Samples(train_paths, s, model.config, vae.factor if vae else 1, training=True)
    held = Samples(held_paths, s, model.config, samples.factor, training=False)
    prompts = [(held or samples).caption(i) for i in range(min(8, len(held or samples)))]
    micro_steps, total = s.global_batch // s.batch_size, math.ceil(s.images / s.global_batch)
    last = min(total, s.max_steps) if s.max_steps else total
    if start >= last:
        raise hdm.UserError(f"--resume={s.resume}: at step {start} of {last}, so there is nothing to do")
    if s.resume and existing and int(existing[-1].name[5:]) > start:
        raise hdm.UserError(f"--out_dir={out_dir} holds the newer {existing[-1].name}; name another out_dir")
    settings = dict(config=model.config, text_encoder=s.text_encoder, text_length=s.text_length, vae=s.vae,
                    image_size=s.image_size, steps=s.sample_steps, cfg=s.sample_cfg, t_shift=s.t_shift)
    for name in ("text_encoder", "vae"):                     # a folder by its full path, a hub id as it is
        settings[name] = os.path.abspath(settings[name]) if os.path.isdir(settings[name]) else settings[name]
    hdm.make_folder(out_dir / "samples", "--out_dir")
    metrics = open_log(out_dir, s, model.config, start)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype}; {len(samples):,} "
          f"pictures and {len(held):,} held out; {total:,} steps of {micro_steps} x {s.batch_size} images, "
          f"{s.images / len(samples):.2f} epochs; now steps {start:,} to {last:,}", flush=True)
    stream = range(start * s.global_batch, last * s.global_batch)
    batches = iter(DataLoader(samples, s.batch_size, sampler=stream, num_workers=s.workers))
    network = model
    if s.compile:
        found = next(filter(shutil.which, (os.environ.get("CXX", "g++"), "gcc", "clang++", "cl")), None)
        print(f"compile: by {found}" if found else "compile: no compiler found, running eagerly")
        torch._dynamo.config.suppress_errors = True          # what fails to compile is told, and run eagerly
        network = torch.compile(model) if found else model

    for step in range(start, last + 1):
        # What is due after `step` steps: held-out loss, previews, a line of metrics, a checkpoint
        def due(every):                                      # a resumed run has done its first step's already
            return every > 0 and (step % every == 0 or step == total) and (step > start or step == 0)
        shown, val_loss = model if ema is None else ema, None
        settings.update(step=step, images=step * s.global_batch)
        model.eval()
        if held_paths and due(s.eval_every):                 # with fixed noise and t: runs compare by it
            with torch.no_grad():
                losses = [hdm.flow_loss(shown, **loss_inputs(batch, vae, te, s, device), reduction="none")
                          for batch in DataLoader(held, s.batch_size)]
            val_loss = torch.cat(losses).mean().item()
        if due(s.sample_every):                              # the same prompts and seeds each time
            images = generate(shown, vae, te, prompts, range(len(prompts)), settings)
            sheet = image_grid(images, 4, scale=max(1, 128 // s.image_size))
            sheet.save(out_dir / "samples" / f"{step:08d}.png")
        model.train()
        if due(s.log_every) or val_loss is not None or step == last > start:
            speed = loss_steps * s.global_batch / seconds if loss_steps else None
            record = dict(step=step, images=settings["images"], lr=lr_at(step, s, total), val_loss=val_loss,
                          loss=loss_sum.item() / loss_steps if loss_steps else None, images_per_s=speed,
                          grad_norm=None if norm is None else norm.item())
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            words = [f"step {step}/{last}"] + [f"{name} {record[name]:.4g}" for name in (
                "loss", "val_loss", "images_per_s") if record[name] is not None]
            words += [f"{(last - step) * s.global_batch / speed / 60:.1f} min left"] if speed else []
            print(" | ".join(words), flush=True)
        if step % s.log_every == 0:
            loss_sum, loss_steps, seconds = torch.zeros_like(loss_sum), 0, 0.0
        if step > start and (due(s.save_every) or step == last):
            state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), loss_sum=loss_sum,
                         loss_steps=loss_steps, seconds=seconds)
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
            decay = min(s.ema, (1 + step) / (10 + step))     # short at first: the init is soon forgotten
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        seconds += time.perf_counter() - clock
    print(f"done: python sample.py --ckpt={out_dir} --prompt \"{prompts[0]}\"")


if __name__ == "__main__":
    hdm.run(main)
