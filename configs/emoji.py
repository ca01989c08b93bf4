# Emoji of foods and animals in nine styles, pixels at 16 px, then 32 px: do things and styles compose? 17
# minutes on a core. data/te_minilm is a folder of all-MiniLM-L6-v2.
#   python train.py configs/emoji.py --image_size=16 --images=24000 --out_dir=out/emoji16
#   python train.py configs/emoji.py --init_from=out/emoji16
# First: python prepare.py data/emoji64.tar --out=data/emoji --require_tag="animal|bird|insect|food|fruit|\
#            vegetable|sweet|dessert|drink|restaurant|plant|flower"
out_dir = "out/emoji"
data = "data/emoji"
vae = ""                       # pixels
text_encoder = "data/te_minilm"
image_size = 32
text_length = 12               # tokens: thing and style nearly always fit, of the tags what is left over
mask_padding = True            # the empty caption is as long in training as in sampling
cache_text = True              # each caption is encoded once, with its tags in order

# Pairs of a thing and a style that are never trained on: for each style those things whose code point, the
# file's name, ends in a digit of its own. fluent-3d and fluent-emoji-flat are one drawing, so they share one.
holdout = (r"(twemoji/.*0|noto/.*1|noto-v1/.*2|fluent.*3|emojione/.*4|emojione-v1/.*5|fxemoji/.*6"
           r"|openmoji/.*7)\.webp")

dim = 128
heads = 2
head_dim = 64
mlp_dim = 384
depth = 2
enc_blocks = 1
dec_blocks = 1
pre_blocks = 1
post_blocks = 1
patch_size = 4
residual = "raw"
prediction = "data"            # clean areas and edges: README, "Paper and weights"

images = 40_000                # more is not better, of 1,704 images
batch_size = 16
global_batch = 16
optimizer = "muon"
lr = 0.5
warmup = 200
tread_rate = 0.0
t_shift = 4.0
ema = 0.999
sample_cfg_low = 0.3

compile = False                # noqa: A001
workers = 0
log_every = 100
eval_every = 1000
sample_every = 1000
save_every = 500
milestone_every = 8000
