"""Draw pictures from a prompt.

    python sample.py --ckpt=out/demo --prompt "a large red circle on a navy background" --num_images=4
    python sample.py --prompts=prompts.txt          # the released model; one prompt a line

Writes OUT/00000-SEED.png and so on, each in its own size, in the order of the prompts, and, if there are more
than one, OUT/grid.png. Image i of a prompt has the seed SEED + i and depends on nothing else in the batch.
In this file, in order: the settings; the prompts; generate, which train.py and prepare.py use as well; main.
"""
import contextlib
import json
import math
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import hdm


@dataclass
class Sampling:
    ckpt: str = hdm.RELEASED       # train.py's OUT_DIR, one checkpoint, a published file or a hub id
    prompt: list[str] = field(default_factory=list)  # may be given several times
    prompts: str = ""              # file with one prompt a line
    negative_prompt: str = ""      # what guidance moves away from
    num_images: int = 1            # pictures for each prompt
    seed: int = 0                  # of the first picture of each prompt, the next one's is one more
    steps: int | None = None       # Euler steps; None: the checkpoint's own (published: 24)
    cfg: float | None = None       # guidance, 1 is none; None: the checkpoint's own (published: 3.0)
    width: int | None = None       # pixels; None: the checkpoint's training size
    height: int | None = None      # likewise
    batch_size: int = 4            # pictures at a time: memory, not result
    out: str = "out/samples"       # folder for the pictures
    ema: bool = True               # the averaged weights, where the checkpoint has them
    text_encoder: str = ""         # another place of the text encoder; "": where the checkpoint says
    device: str = "auto"           # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"            # float32, bfloat16, float16; auto: 16 bit on CUDA, else float32


def read_prompts(s):
    prompts = list(s.prompt)
    if s.prompts:
        if not Path(s.prompts).is_file():
            raise hdm.UserError(f"--prompts={s.prompts}: no such file (one prompt a line)")
        prompts += filter(str.strip, Path(s.prompts).read_text(encoding="utf-8").splitlines())
    if not prompts:
        raise hdm.UserError('no prompt: give --prompt "a red circle", once or more, or --prompts=FILE')
    return prompts


def to_uint8(images):
    """(B, 3, height, width) in [-1, 1], anything beyond is clipped -> (B, height, width, 3) uint8 numpy."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images, columns, scale=1, gap=2):
    """Pictures (height, width, 3) uint8 of any sizes -> one PIL image, row by row, each enlarged."""
    height = max(image.shape[0] for image in images) * scale + gap
    width = max(image.shape[1] for image in images) * scale + gap
    sheet = Image.new("RGB", (columns * width + gap, -(-len(images) // columns) * height + gap), "white")
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
        sheet.paste(picture, (gap + i % columns * width, gap + i // columns * height))
    return sheet


def first_free_number(out):
    """One more than the highest number of a picture in the folder, so that none is overwritten."""
    numbers = [int(match.group(1)) for path in out.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    return max(numbers, default=-1) + 1


@torch.no_grad()
def generate(model, vae, te, prompts, seeds, settings, *, negative="", steps=None, cfg=None, height=None,
             width=None, batch_size=32):
    """-> (n, height, width, 3) uint8 pictures, one for each prompt with its seed; None: as the settings say.

    A picture's noise is drawn on the CPU from its own seed: the same picture in any batch, on any device.
    """
    height = settings["image_size"] if height is None else height
    width = settings["image_size"] if width is None else width
    steps = settings["steps"] if steps is None else steps
    cfg = settings["cfg"] if cfg is None else cfg
    hdm.check_size(height, width, model.config, vae)
    factor = 1 if vae is None else vae.factor
    device = model.in_patch.proj.weight.device
    shape = (model.config.in_channels, height // factor, width // factor)
    uncond, uncond_mask = te([negative])
    pictures = []
    for i in range(0, len(prompts), batch_size):
        ctx, mask = te(prompts[i:i + batch_size])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i:i + batch_size]]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        B = len(noise)
        x0 = hdm.sample(model, ctx, uncond.expand(B, -1, -1), noise=noise.to(device), steps=steps, cfg=cfg,
                    aspect=torch.full((B,), math.log(width / height), device=device), ctx_mask=mask,
                    uncond_mask=uncond_mask.expand(B, -1), t_shift=settings["t_shift"])
        pictures.append(to_uint8(x0 if vae is None else vae.decode(x0)))
    return np.concatenate(pictures)


def gather(thing):
    """What all processes of torchrun bring, in their order; each waits here for the others."""
    things = [thing]
    if torch.distributed.is_initialized():
        things *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(things, thing)
    return things


def generate_dealt(model, vae, te, prompts, seeds, settings, **how):
    """generate, with the prompts dealt over the processes: the list of all pictures, on each of them."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mine = slice(torch.distributed.get_rank() if ranks > 1 else 0, None, ranks)
    images = generate(model, vae, te, prompts[mine], seeds[mine], settings, **how) if prompts[mine] else []
    parts = gather(images)
    return [parts[i % ranks][i // ranks] for i in range(len(prompts))]


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


def read_metrics(run):
    """The records of a run's metrics.jsonl; a line that was left half-written is none."""
    file, records = Path(run, "metrics.jsonl"), []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
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


def tracker(name, folder, settings):
    """-> a function of ({name: number}, step=) that tells wandb or tensorboard, or, name "", nobody."""
    if name == "wandb":
        import wandb
        return wandb.init(project="hdm", name=str(folder), config=settings).log
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder)
        return lambda values, step: [board.add_scalar(name, values[name], step) for name in values]
    return lambda values, step: None


def main(argv):
    _, values = hdm.parse_args(argv, [Sampling], doc=__doc__)
    s = Sampling(**values)
    for name, least in dict(num_images=1, batch_size=1, steps=1, seed=0).items():
        if getattr(s, name) is not None and getattr(s, name) < least:
            raise hdm.UserError(f"--{name}={getattr(s, name)}: at least {least}")
    prompts = [prompt for prompt in read_prompts(s) for _ in range(s.num_images)]
    seeds = [s.seed + i % s.num_images for i in range(len(prompts))]
    device = hdm.pick_device(s.device)
    dtype = hdm.pick_dtype(s.dtype, device)
    out = Path(s.out)
    hdm.make_folder(out, "--out")

    model, vae, settings = hdm.load_model(s.ckpt, device, dtype, ema=s.ema)
    if vae is None and model.config.in_channels != 3:
        raise hdm.UserError(f"--ckpt={s.ckpt}: has no VAE for its {model.config.in_channels}-channel latents")
    if s.text_encoder:
        settings["text_encoder"] = s.text_encoder
    chosen = dict(steps=s.steps, cfg=s.cfg, width=s.width, height=s.height, negative=s.negative_prompt)
    height, width = (settings["image_size"] if side is None else side for side in (s.height, s.width))
    hdm.check_size(height, width, model.config, vae)         # before the text encoder takes its time
    te = hdm.load_text_encoder(settings, device, dtype)

    number, images = first_free_number(out), []
    for i in range(0, len(prompts), s.batch_size):
        part = slice(i, i + s.batch_size)
        pictures = generate(model, vae, te, prompts[part], seeds[part], settings, **chosen)
        for image, seed in zip(pictures, seeds[part]):
            Image.fromarray(image).save(out / f"{number + len(images):05d}-{seed}.png")
            images.append(image)
        print(f"{len(images)}/{len(prompts)} pictures in {out}", flush=True)
    if len(images) > 1:                                      # a row for each prompt, small pictures enlarged
        columns = s.num_images if s.num_images > 1 else min(len(images), 8)
        image_grid(images, columns, scale=max(1, 128 // width)).save(out / "grid.png")


if __name__ == "__main__":
    hdm.run(main)
