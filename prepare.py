"""Data for train.py: the demo set, a small text encoder, a folder's list; the demo's judge; curves of runs.

    python prepare.py demo                                   # data/demo, data/demo_unseen.txt, data/demo_te
    python prepare.py text_encoder FOLDER --out=data/my_te   # a tokenizer and a tiny LM for FOLDER's captions
    python prepare.py judge --ckpt=out/demo --grid=grid.png  # how many unseen captions are drawn right

In order: the settings; what the demo shows; its data set; the text encoder; a folder of captioned images; the
judge; a run's curves; the command line.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import hdm
from sample import generate, image_grid


@dataclass
class DemoSettings:
    out: str = "data/demo"  # folder of pictures and captions; OUT_unseen.txt and OUT_te are written beside it
    count: int = 12000      # pictures; 12,000 take about 10 s on one core and 95 MB in blocks of 4 KB
    seed: int = 0           # picture i depends on (seed, i) alone; also of the text encoder's weights


@dataclass
class TextEncoderSettings:
    out: str = "data/text_encoder"  # folder for the tokenizer and the model
    vocab: int = 4096               # most tokens; at least 257: the 256 bytes and the pad
    seed: int = 0                   # of the model's fixed random weights


@dataclass
class JudgeSettings:
    ckpt: str = "out/demo"                # train.py's OUT_DIR or one checkpoint
    seeds: int = 8                        # pictures per caption, drawn from seeds 0, 1, ...
    unseen: str = "data/demo_unseen.txt"  # captions to draw, one a line
    grid: str = ""                        # a PNG of all pictures: a row per caption, a column per seed


# ---- what the demo shows ----------------------------------------------------------------------------------
CANVASES = {(32, 32): 0.8, (32, 48): 0.1, (48, 32): 0.1}  # (height, width) in pixels: share of the pictures
RADIUS = {"small": 0.30, "large": 0.42}  # in short sides
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (245,) * 3, "black": (20,) * 3}
# In radii from the centre: the reach up, down and to either side; whether (y, x), y downwards, is inside.
SHAPES = {
    "circle": (1, 1, 1, lambda y, x: x**2 + y**2 <= 1),
    "square": (0.86, 0.86, 0.86, lambda y, x: np.fmax(abs(x), abs(y)) <= 0.86),
    "triangle": (1, 0.8, 1, lambda y, x: (y <= 0.8) & (1.8 * abs(x) <= y + 1)),
    "diamond": (1, 1, 0.75, lambda y, x: abs(x) / 0.75 + abs(y) <= 1),
    "cross": (1, 1, 1, lambda y, x: (np.fmax(abs(x), abs(y)) <= 1) & (np.fmin(abs(x), abs(y)) <= 0.33)),
    "ring": (1, 1, 1, lambda y, x: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.62**2))}
BACKGROUNDS = {"gray": (128, 128, 128), "navy": (25, 30, 80), "pink": (250, 190, 205), "teal": (20, 120, 120)}
ATTRIBUTES = {"size": RADIUS, "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
CAPTION = "a {} {} {} on a {} background"
COMBINATIONS = list(itertools.product(*ATTRIBUTES.values()))  # 384 of (size, colour, shape, background)
# The test of composing: 32 combinations stay out of training, though each of their words is in it.
UNSEEN = [words for words, (size, colour, shape, background) in zip(COMBINATIONS, np.ndindex(2, 8, 6, 4))
          if (size + colour + 2 * shape + 3 * background) % 12 == 0]


def centre_range(size, shape, height, width):
    """((lowest, highest) cy, (lowest, highest) cx), in pixels, that keep the whole shape on the canvas."""
    r = RADIUS[size] * min(height, width)
    up, down, side, _ = SHAPES[shape]
    return (up * r, height - down * r), (side * r, width - side * r)


def random_centre(rng, size, shape, height, width):
    """Uniform in the middle half of its range on each axis: anywhere is too hard for minutes of training."""
    ranges = centre_range(size, shape, height, width)
    return [low + (high - low) * rng.uniform(0.25, 0.75) for low, high in ranges]


def coverage(size, shape, height, width, cy, cx):
    """(height, width) share of each pixel inside the shape: drawn at four times the size, then averaged."""
    r = RADIUS[size] * min(height, width)
    y = ((np.arange(4 * height) + 0.5) / 4 - cy) / r
    x = ((np.arange(4 * width) + 0.5) / 4 - cx) / r
    return SHAPES[shape][3](y[:, None], x[None]).reshape(height, 4, width, 4).mean((1, 3))


def draw(size, colour, shape, background, height, width, cy, cx):
    """(height, width, 3) uint8: the shape with its centre at (cy, cx), in pixels from the top left corner."""
    ground = np.array(BACKGROUNDS[background])
    share = coverage(size, shape, height, width, cy, cx)[..., None]
    return np.rint(ground + share * (COLOURS[colour] - ground)).astype(np.uint8)


# ---- the demo data set ------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole_folder(out):
    """Yields a folder to write in, which takes the name `out` when the block is through: a half-written one
    never has that name. What stands there is replaced only if it is as we left it, never a stranger's."""
    out = Path(os.path.abspath(out))
    mark = out / ".prepare"  # how many files we wrote
    ours = mark.is_file() and mark.read_text() == str(len(os.listdir(out)) - 1)
    if out.exists() and not ours and not (out.is_dir() and not os.listdir(out)):
        raise hdm.UserError(f"--out: {out} is not as prepare.py wrote it: move it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".tmp") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        (new / ".prepare").write_text(str(len(os.listdir(new))))
        if out.exists():
            out.rename(Path(scratch, "old"))
        new.rename(out)


def make_demo(settings):
    if settings.count < 1 or settings.seed < 0:
        raise hdm.UserError(f"--count={settings.count} --seed={settings.seed}: count starts at 1, seed at 0")
    out = os.path.abspath(settings.out)
    seen = [words for words in COMBINATIONS if words not in UNSEEN]
    # Each run of 352 pictures shows each combination once, in one shuffled order.
    order = np.random.default_rng(settings.seed).permutation(len(seen))
    with whole_folder(out) as pictures, whole_folder(out + "_te") as encoder:
        # From all 352 captions, not from those drawn: a demo of 20 pictures, too, has one token per word.
        make_text_encoder([CAPTION.format(*words) for words in seen], encoder, seed=settings.seed)
        for i in range(settings.count):
            rng = np.random.default_rng((settings.seed, i))
            words = seen[order[i % len(seen)]]
            height, width = rng.choice(list(CANVASES), p=list(CANVASES.values()))
            cy, cx = random_centre(rng, words[0], words[2], height, width)
            Image.fromarray(draw(*words, height, width, cy, cx)).save(pictures / f"{i:05d}.png")
            (pictures / f"{i:05d}.txt").write_text(CAPTION.format(*words) + "\n")
        partial = encoder.with_name("unseen.txt")
        partial.write_text("".join(CAPTION.format(*words) + "\n" for words in UNSEEN))
        partial.replace(out + "_unseen.txt")
    print(f"{settings.count} pictures in {settings.out}; beside it _unseen.txt and _te, the text encoder")


# ---- the text encoder -------------------------------------------------------------------------------------
def make_text_encoder(captions, out, vocab_size=4096, dim=128, seed=0):
    """Saves to the folder `out` a byte-level BPE tokenizer trained on `captions` and a tiny random Qwen3, as
    AutoTokenizer and AutoModel load them: the path of a real encoder without its download or its knowledge (a
    word that stands in no caption means nothing)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # here: slow to import
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model, logging
    logging.disable_progress_bar()  # it would write "Writing model shards" over our own lines
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are tokens, so that any text can be encoded, emoji too, whatever the captions held.
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right",
                            clean_up_tokenization_spaces=False).save_pretrained(out)
    config = Qwen3Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=dim, intermediate_size=2 * dim,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=dim // 4,
                         pad_token_id=0, bos_token_id=None, eos_token_id=None)
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
    model.save_pretrained(out)


def text_encoder(folder, settings):
    if settings.vocab < 257:
        raise hdm.UserError(f"--vocab={settings.vocab}: at least 257")
    files = sorted(Path(folder).rglob("*.txt"))
    if not files:
        raise hdm.UserError(f"{folder}: no such folder, or no .txt captions in it")
    captions = [hdm.parse_caption(file.read_text(encoding="utf-8", errors="replace")) for file in files]
    with whole_folder(settings.out) as out:
        make_text_encoder(captions, out, vocab_size=settings.vocab, seed=settings.seed)
    print(f"a text encoder for the words of {len(captions)} captions in {settings.out}")


# ---- a folder of captioned images --------------------------------------------------------------------------
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def name_hash(name):
    """A number in [0, 1) that is the sample's own: added data never move a picture across the split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64


def list_samples(data, validation):
    """-> the names (paths below data) of the images to train on, sorted, and of those held out."""
    if not os.path.isdir(data):
        raise hdm.UserError(f"--data={data}: no such folder (python prepare.py demo makes data/demo)")
    images, names = 0, []
    for folder, _, files in os.walk(data):  # plain strings: millions of Path objects would take gigabytes
        texts = {file[:-4] for file in files if file.endswith(".txt")}
        found = [file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
        images += len(found)
        inner = "" if folder == str(data) else Path(folder).relative_to(data).as_posix() + "/"
        names += [inner + file for file in found if os.path.splitext(file)[0] in texts]
    hashed = sorted((name_hash(name), name) for name in names)
    train = sorted(name for place, name in hashed if place >= validation)
    held = [name for place, name in hashed if place < validation][:512]
    if names and validation and not held:
        raise hdm.UserError(f"--validation={validation}: holds out none of {len(names)} pictures; least is "
                            f"{math.ceil(1000 * hashed[0][0]) / 1000}; 0: no held-out loss")
    if not train:
        raise hdm.UserError(f"--data={data}: {images} images ({' '.join(IMAGE_SUFFIXES)}), {len(names)} "
                            f"with a same-named .txt, none left to train on by --validation={validation}")
    if len(names) < images:
        print(f"data: {images - len(names)} of {images} images are left out: no .txt of their own")
    return train, held


def read_caption(image, rng=None):
    """The caption beside an image, with rng (a random.Random) shuffled and thinned out."""
    text = Path(image).with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
    return hdm.parse_caption(text, rng)


def read_sample(path, rng=None):
    """-> an RGB picture and its caption; a UserError that names the file, where it cannot be read."""
    with hdm.naming(path, "not a whole picture with a caption"):
        return hdm.load_image(path), read_caption(path, rng)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """In which order an epoch shows its n pictures: (n,) int64 numpy."""
    return np.random.default_rng([seed, epoch]).permutation(n)


# ---- the judge --------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4)
def templates(height, width):
    """Each size and shape at each place that keeps it whole, 64 of them to a short side (half a pixel at 32):
    n (size, shape, cy, cx), their (n, height * width) coverages, (n,) the squared lengths of those."""
    step = min(height, width) / 64
    places = [(size, shape, cy, cx) for size, shape in itertools.product(RADIUS, SHAPES) for cy, cx in
              itertools.product(*(np.arange(*r, step) for r in centre_range(size, shape, height, width)))]
    masks = [coverage(size, shape, height, width, cy, cx).ravel() for size, shape, cy, cx in places]
    return places, np.array(masks, np.float32), np.square(masks).sum(1)


def nearest(colour, palette):
    return min(palette, key=lambda name: sum((colour - palette[name]) ** 2))


def judge(image):
    """What a (height, width, 3) uint8 picture shows, from its pixels alone. Medians, and least squares on the
    soft coverage: a ragged edge or a stray pixel costs no verdict. An empty picture still gets a guess."""
    pixels = image.astype(np.float32)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    # Edge pixels are mixtures, so nearer to the ground than those inside. The smallest inside, a small
    # diamond's, has about 110 pixels; the farthest 5 % of a 32 x 48 canvas are 77.
    distance = np.linalg.norm(pixels - ground, axis=-1)
    ink = np.median(pixels[distance >= 0.8 * np.quantile(distance, 0.95)], axis=0)
    axis = ink - ground
    share = np.clip((pixels - ground) @ axis / max(axis @ axis, 1), 0, 1).ravel()  # 0: ground, 1: inside
    places, masks, lengths = templates(*distance.shape)
    size, shape, _, _ = places[np.argmin(lengths - 2 * (masks @ share))]  # |mask - share|^2 less a constant
    return dict(size=size, colour=nearest(ink, COLOURS), shape=shape, background=nearest(ground, BACKGROUNDS))


def judge_checkpoint(settings):
    if settings.seeds < 1:
        raise hdm.UserError(f"--seeds={settings.seeds}: at least 1")
    meaning = {CAPTION.format(*words): dict(zip(ATTRIBUTES, words)) for words in COMBINATIONS}
    file = Path(settings.unseen)
    captions = file.read_text(errors="replace").splitlines() if file.is_file() else []
    if not captions or not set(captions) <= set(meaning):
        raise hdm.UserError(f"--unseen={file}: no file of demo captions; python prepare.py demo writes it")
    model, vae, defaults = hdm.load_model(settings.ckpt)
    prompts = [line for line in captions for _ in range(settings.seeds)]
    seeds = list(range(settings.seeds)) * len(captions)
    images = generate(model, vae, hdm.load_text_encoder(defaults), prompts, seeds, defaults)
    right = np.array([[seen[name] == meaning[line][name] for name in ATTRIBUTES]
                      for line, seen in zip(prompts, map(judge, images))])
    right = np.column_stack([right, right.all(1)]).sum(0)
    print(f"{settings.ckpt}: {len(captions)} captions x {settings.seeds} seeds")
    print(f"{'':<12}{'right':>6}{'of':>6}{'%':>7}{'chance %':>10}")
    rows = ATTRIBUTES | {"all four": COMBINATIONS}
    for (name, choices), n in zip(rows.items(), right):
        print(f"{name:<12}{n:>6}{len(images):>6}{100 * n / len(images):>7.1f}{100 / len(choices):>10.1f}")
    if settings.grid:
        Path(settings.grid).parent.mkdir(parents=True, exist_ok=True)
        image_grid(images, settings.seeds, scale=2).save(settings.grid, "PNG")


# ---- a run's curves -------------------------------------------------------------------------------------
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


COMMANDS = {"demo": (make_demo, DemoSettings, ()), "judge": (judge_checkpoint, JudgeSettings, ()),
            "text_encoder": (text_encoder, TextEncoderSettings, ("FOLDER",))}


def main(argv):
    name = argv[0] if argv else ""
    if name in ("--help", "-h"):
        print(__doc__)
        return
    hdm.check_name(f"prepare.py {name}", name, COMMANDS, "command")
    command, settings, positionals = COMMANDS[name]
    words, values = hdm.parse_args(argv[1:], [settings], positionals, doc=__doc__)
    command(*words, settings(**values))


if __name__ == "__main__":
    hdm.run(main)
