"""Draw pictures from a prompt.

    python sample.py --ckpt=out/demo --prompt "a large red circle on a navy background" --num_images=4
    python sample.py --prompts=prompts.txt --width=1024 --height=1024      # the released model, one prompt a line

Writes OUT/00000-SEED.png and so on, each in its own size, in the order of the prompts, and with more than one picture
OUT/grid.png. Image i of a prompt has the seed SEED + i; a picture depends on its own seed, never on the batch.
In this file, in order: the settings; the prompts; main.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

import hdm


@dataclass
class Sampling:
    ckpt: str = hdm.RELEASED       # train.py's OUT_DIR, one checkpoint, a published .safetensors file or a hub id
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
    dtype: str = "auto"            # float32, bfloat16, float16; auto: float32 on a CPU, else 16 bit


def read_prompts(s):
    prompts = list(s.prompt)
    if s.prompts:
        if not Path(s.prompts).is_file():
            raise hdm.UserError(f"--prompts={s.prompts}: no such file (one prompt a line)")
        prompts += Path(s.prompts).read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise hdm.UserError('no prompt: give --prompt "a red circle", once or more, or --prompts=FILE')
    return prompts


def first_free_number(out):
    """One more than the highest number of a picture in the folder, so that none is overwritten."""
    numbers = [int(match.group(1)) for path in out.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    return max(numbers, default=-1) + 1


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

    model, vae, settings = hdm.load_model(s.ckpt, device, dtype, ema=s.ema)
    if s.text_encoder:
        settings["text_encoder"] = s.text_encoder
    chosen = dict(steps=s.steps, cfg=s.cfg, width=s.width, height=s.height, negative=s.negative_prompt)
    height, width = (settings["image_size"] if side is None else side for side in (s.height, s.width))
    hdm.check_size(height, width, model.config, vae)         # before the text encoder takes its time
    te = hdm.load_text_encoder(settings, device, dtype)

    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    number, images = first_free_number(out), []
    for i in range(0, len(prompts), s.batch_size):
        part = slice(i, i + s.batch_size)
        for image, seed in zip(hdm.generate(model, vae, te, prompts[part], seeds[part], settings, **chosen), seeds[part]):
            Image.fromarray(image).save(out / f"{number + len(images):05d}-{seed}.png")
            images.append(image)
        print(f"{len(images)}/{len(prompts)} pictures in {out}", flush=True)
    if len(images) > 1:                                      # a row for each prompt; small pictures are enlarged
        columns = s.num_images if s.num_images > 1 else min(len(images), 8)
        hdm.image_grid(images, columns, scale=max(1, 128 // width)).save(out / "grid.png")


if __name__ == "__main__":
    hdm.run(main)
