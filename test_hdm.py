"""Tests of hdm.py, train.py, sample.py and prepare.py: `pytest -q`, two minutes on two cores, no network, no GPU.

Each test states a law that holds whatever the numbers, not an example. In order: the model against the golden
numbers of the published one; positions and TREAD; flow and sampling; padding; VAE; text; files in and out; settings;
bad input; training; torch.compile; prepare.py.

assets/golden.npz holds outputs of the authors' model on made-up weights (its `meta` says with which settings), and
the names and shapes of the published files as json bytes. `fill` below makes the same weights.
"""
import json
import math
import os
import tempfile
import zlib
from pathlib import Path

# No test may reach a network, and none may find the released model in this machine's own cache.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.gettempdir() + "/hdm-tests-have-no-cache")

import numpy as np
import pytest
import torch

import hdm
import prepare

torch.set_num_threads(1)           # the models here are so small that a second thread costs more than it gives
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def close(a, b, tolerance=1e-4):
    """Equal to within a share of b's largest value."""
    b = torch.as_tensor(b)
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


# ---------------------------------------------------------------------------------------------------------------
# The model against the golden numbers

with np.load(HERE / "assets" / "golden.npz") as file:
    GOLDEN = {name: json.loads(value.tobytes()) if value.dtype == np.uint8 else torch.from_numpy(value)
              for name, value in file.items()}


def made_up(key, shape):
    """A weight of the golden models: a function of its name and shape."""
    r = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape)
    if key.endswith("rope.freqs"):
        r = np.linspace(np.log(np.pi), np.log(5 * np.pi), shape[1])[None, :, None] + 0.05 * r
    elif key.endswith(".weight") and ("norm" in key or key.startswith("shared_adaln") and key.endswith(".0.weight")):
        r = 1 + 0.1 * r
    elif len(shape) == 1:
        r = 0.1 * r
    else:
        r = r / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(r.astype(np.float32))


def fill(model):
    """The model with made-up weights: unlike PyTorch's init, none is zero, so every path shows in the output."""
    for key, value in model.state_dict().items():
        if key != "time_emb.freqs":
            value.copy_(made_up(key, value.shape))
    return model.eval()


def golden_model(case):
    """The XUT of a golden case, and the arguments of its forward pass that are not None."""
    meta = GOLDEN["meta"][case]
    names = dict(dim_head="head_dim", pre="pre_blocks", post="post_blocks", input_dim="in_channels")
    widths = {names.get(name, name): value for name, value in meta["cfg"].items()}
    config = hdm.XUTConfig(**widths, skips="mirror" if meta.get("mirror") else "last",
                           residual="raw" if meta.get("raw") else "normed")
    arguments = {name: GOLDEN[f"{case}.{name}"] for name in ("x", "t", "ctx", "aspect", "pos", "keep")
                 if f"{case}.{name}" in GOLDEN}
    return fill(hdm.XUT(config)), arguments


@pytest.mark.parametrize("case", ["square", "wide", "tread", "camera", "mirror", "raw"])
def test_xut_is_the_published_model(case):
    model, arguments = golden_model(case)
    with torch.no_grad():
        assert close(model(**arguments), GOLDEN[case + ".out"])


def test_loss_and_every_gradient_norm_are_the_published_ones():
    model, arguments = golden_model("train")
    x0 = arguments.pop("x")
    loss = hdm.flow_loss(model, x0, noise=GOLDEN["train.noise"], **arguments)
    loss.backward()
    assert close(loss, GOLDEN["train.loss"])
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    assert set(norms) == set(GOLDEN["train.grad_keys"])
    for name, norm in zip(GOLDEN["train.grad_keys"], GOLDEN["train.grad_norms"]):
        assert norms[name].item() == pytest.approx(norm.item(), rel=1e-4, abs=1e-6), name


def test_time_embedding_and_rope_are_the_published_ones():
    model, _ = golden_model("square")
    with torch.no_grad():
        assert close(model.time_emb(torch.tensor([0.0, 0.25, 1.0])), GOLDEN["parts.time_emb"])
        rope = model.prev_tread_trns.blocks[0].attn.rope
        rope.freqs.copy_(GOLDEN["parts.rope_freqs"])
        assert close(hdm.rotate(GOLDEN["parts.rope_q"], *rope(GOLDEN["parts.rope_pos"])), GOLDEN["parts.rope_out"])


def test_positions_and_crops_are_the_published_ones():
    assert close(hdm.grid_positions(6, 10), GOLDEN["parts.pos_6x10"], 1e-6)
    assert close(hdm.grid_positions(8, 8), GOLDEN["parts.pos_8x8"], 1e-6)
    assert close(hdm.crop_positions(16, 24, 0, 5, 16, 1), GOLDEN["parts.crop_h16_w24_at_x5"], 1e-6)
    assert close(hdm.crop_positions(20, 12, 3, 0, 12, 1), GOLDEN["parts.crop_h20_w12_at_y3"], 1e-6)


@pytest.mark.parametrize("one_pass", [True, False])
def test_guided_euler_is_the_published_one(one_pass):
    model, _ = golden_model("euler")
    x0 = hdm.sample(model, GOLDEN["euler.cond"], GOLDEN["euler.uncond"], noise=GOLDEN["euler.noise"], steps=4,
                    cfg=3.0, aspect=torch.zeros(2), one_pass=one_pass)
    assert close(x0, GOLDEN["euler.out"])


@pytest.mark.parametrize("preset, count", [("small", 237_290_128), ("base", 343_176_208), ("large", 555_628_816)])
def test_presets_have_the_published_names_shapes_and_size(preset, count):
    with torch.device("meta"):
        model = hdm.XUT(hdm.PRESETS[preset])
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == GOLDEN["keys_xut_" + preset]
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("case", ["tiny", "mid128"])
def test_vae_is_the_published_architecture(case):
    meta = GOLDEN["meta"]["vae." + case]
    vae = fill(hdm.VAE(meta["block_out_channels"]))
    mean, logvar = vae.moments(GOLDEN[f"vae.{case}.x"])
    assert close(mean, GOLDEN[f"vae.{case}.mean"])
    assert close(logvar, GOLDEN[f"vae.{case}.logvar"])
    assert close(vae.encode(GOLDEN[f"vae.{case}.x"]), GOLDEN[f"vae.{case}.mean"])  # by default latents stay as they are
    assert close(vae.decode(GOLDEN[f"vae.{case}.z"]), GOLDEN[f"vae.{case}.image"])


def test_full_vae_has_the_published_names_shapes_and_size():
    with torch.device("meta"):
        vae = hdm.VAE()
    assert {name: list(value.shape) for name, value in vae.state_dict().items()} == GOLDEN["keys_vae_sdxl"]
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863


# ---------------------------------------------------------------------------------------------------------------
# Positions and TREAD

CONVENTIONS = ["long_side", "unit_area"]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("rows, cols", [(6, 10), (10, 6), (7, 7)])
def test_aligned_crop_has_the_positions_of_the_grid(rows, cols, convention):
    grid = hdm.grid_positions(rows, cols, convention).view(rows, cols, 2)
    patch, n = 16, 4
    for row in range(rows - n + 1):
        for col in range(cols - n + 1):
            crop = hdm.crop_positions(rows * patch, cols * patch, row * patch, col * patch, n * patch, patch, convention)
            torch.testing.assert_close(crop.view(n, n, 2), grid[row:row + n, col:col + n], atol=1e-6, rtol=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_unaligned_crop_is_moved_by_exactly_its_offset(convention):
    height, width, size, patch = 40, 56, 24, 8
    origin = hdm.crop_positions(height, width, 0, 0, size, patch, convention)
    span = hdm.grid_positions(height, width, convention)     # of single pixels: the last less the first is n - 1 of n
    pixel = (span[-1] - span[0]) / (torch.tensor([height, width]) - 1)
    for top, left in [(0, 1), (3, 0), (5, 31), (16, 32)]:
        crop = hdm.crop_positions(height, width, top, left, size, patch, convention)
        torch.testing.assert_close(crop - origin, (pixel * torch.tensor([top, left])).expand_as(crop), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows, cols", [(5, 5), (4, 9), (12, 3)])
def test_conventions(rows, cols):
    """Both centre the image at zero with square cells; they differ in what they keep: the long side or the area."""
    reach = {}
    for convention in CONVENTIONS:
        grid = hdm.grid_positions(rows, cols, convention).view(rows, cols, 2)
        torch.testing.assert_close(grid, -grid.flip(0, 1), atol=1e-6, rtol=0)
        cell = grid[1, 1] - grid[0, 0]
        assert cell[0].item() == pytest.approx(cell[1].item(), abs=1e-6)
        reach[convention] = cell * torch.tensor([rows, cols]) / 2                     # half of the image's height, width
    assert reach["long_side"].max().item() == pytest.approx(1, abs=1e-6)
    assert reach["unit_area"].prod().item() == pytest.approx(1, abs=1e-6)
    if rows == cols:
        torch.testing.assert_close(reach["long_side"], reach["unit_area"])


def test_take_then_put_back_is_the_identity():
    x = torch.randn(3, 10, 4)
    keep = hdm.pick_tokens(3, 10, 0.3)
    assert torch.equal(hdm.put_back_tokens(x, keep, hdm.take_tokens(x, keep)), x)
    zeroed = hdm.put_back_tokens(x, keep, torch.zeros(3, 7, 4))
    kept = torch.zeros(3, 10, dtype=torch.bool).scatter(1, keep, True)
    assert (zeroed[kept] == 0).all()
    assert torch.equal(zeroed[~kept], x[~kept])


@pytest.mark.parametrize("n, rate", [(16, 0), (16, 0.5), (17, 0.5), (10, 0.29), (64, 0.99)])
def test_picked_tokens_are_sorted_unique_and_n_minus_floor(n, rate):
    keep = hdm.pick_tokens(50, n, rate)
    assert keep.shape == (50, n - math.floor(n * rate)) and keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all()
    assert keep.min() >= 0 and keep.max() < n


def test_picked_tokens_are_uniform_and_a_function_of_the_generator():
    keep = hdm.pick_tokens(8000, 8, 0.5, torch.Generator().manual_seed(1))
    counts = torch.zeros(8, 8)
    kept = torch.zeros(8000, 8).scatter(1, keep, 1)
    counts = kept.T @ kept / 8000                            # shares of pairs (i, j) that are kept together
    expected = torch.full((8, 8), 0.5 * 3 / 7)
    expected.fill_diagonal_(0.5)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)                   # five standard errors
    assert torch.equal(keep, hdm.pick_tokens(8000, 8, 0.5, torch.Generator().manual_seed(1)))
    assert not torch.equal(keep, hdm.pick_tokens(8000, 8, 0.5, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("rate", [1, 1.5, -0.1])
def test_tread_rate_outside_its_range_is_refused(rate):
    with pytest.raises(hdm.UserError, match=str(rate)):
        hdm.pick_tokens(1, 8, rate)


def tiny_xut(**changes):
    """A small XUT with made-up weights."""
    widths = dict(dim=32, ctx_dim=32, heads=2, head_dim=16, mlp_dim=48, depth=2, enc_blocks=1, dec_blocks=2,
                  pre_blocks=1, post_blocks=1, patch_size=2, in_channels=3)
    return fill(hdm.XUT(hdm.XUTConfig(**widths | changes)))


@torch.no_grad()
def test_keeping_all_tokens_is_no_tread():
    model = tiny_xut()
    x, t, ctx = torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 5, 32)
    assert close(model(x, t, ctx, keep=torch.arange(24).expand(2, -1)), model(x, t, ctx), 1e-6)


@torch.no_grad()
def test_dropped_tokens_go_around_the_whole_backbone():
    """Without blocks before and after the U, a dropped token sees nothing but itself and is seen by nothing."""
    model = tiny_xut(pre_blocks=0, post_blocks=0)
    x, ctx = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 32)
    keep = hdm.pick_tokens(2, 16, 0.5)
    kept = torch.zeros(2, 16).scatter(1, keep, 1).view(2, 1, 4, 4)
    kept = kept.repeat_interleave(2, -1).repeat_interleave(2, -2)                     # (2, 1, 8, 8), pixels
    out = model(x, torch.rand(2), ctx, keep=keep)
    other = model(x + kept * torch.randn_like(x), torch.rand(2), torch.randn_like(ctx), keep=keep)
    assert torch.equal(out * (1 - kept), other * (1 - kept))
    assert not close(out * kept, other * kept)
    t = torch.rand(2)
    same = [model(x + dirt * (1 - kept), t, ctx, keep=keep) * kept for dirt in (0, 1)]
    assert torch.equal(*same)


@torch.no_grad()
def test_kept_tokens_keep_their_positions():
    """Without blocks around the U, routing a set of tokens is running the model on them alone, where they were."""
    model = tiny_xut(pre_blocks=0, post_blocks=0, patch_size=1)
    x, t, ctx = torch.randn(1, 3, 4, 4), torch.rand(1), torch.randn(1, 5, 32)
    keep = hdm.pick_tokens(1, 16, 0.5)
    routed = model(x, t, ctx, keep=keep).flatten(2)[:, :, keep[0]]
    alone = model(x.flatten(2)[:, :, keep[0]].view(1, 3, 2, 4), t, ctx, aspect=torch.zeros(1),
                  pos=hdm.grid_positions(4, 4)[keep[0]])
    assert close(routed, alone.flatten(2), 1e-5)


@torch.no_grad()
def test_position_and_aspect_default_to_those_of_the_input():
    x, t, ctx = torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 5, 32)
    for convention in CONVENTIONS:
        model = tiny_xut(pos=convention)
        pos = hdm.grid_positions(4, 6, convention)
        aspect = torch.full((2,), math.log(12 / 8))
        out = model(x, t, ctx)
        assert torch.equal(out, model(x, t, ctx, aspect=aspect, pos=pos))
        assert torch.equal(out, model(x, t, ctx, pos=pos.expand(2, -1, -1)))
        assert not close(out, model(x, t, ctx, aspect=-aspect))
        assert not close(out, model(x, t, ctx, pos=pos + 0.1))


@torch.no_grad()
def test_text_has_no_place():
    """Text tokens sit at (0, 0), unturned: their order reaches XUT only through the language model's states."""
    model = tiny_xut()
    x, t, ctx = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 32)
    assert close(model(x, t, ctx[:, torch.randperm(5)]), model(x, t, ctx), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 3, 5], [1, 2, 9]])])
def test_masked_text_is_seen_by_nothing(keep):
    model = tiny_xut()
    x, t, ctx = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 7, 32)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    out = model(x, t, ctx, keep=keep, ctx_mask=mask)
    garbage = torch.where(mask[..., None], ctx, 100 * torch.randn_like(ctx))
    assert torch.equal(out, model(x, t, garbage, keep=keep, ctx_mask=mask))
    own_keep = None if keep is None else keep[:1]
    assert close(out[:1], model(x[:1], t[:1], ctx[:1, :4], keep=own_keep), 1e-5)
    assert not close(out[:1], model(x, t, ctx, keep=keep)[:1])  # unmasked, pads are ordinary tokens
    everything = torch.ones(2, 7, dtype=torch.bool)
    assert close(model(x, t, ctx, keep=keep, ctx_mask=everything), model(x, t, ctx, keep=keep), 1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Flow and sampling

class Velocity:
    """A stand-in for XUT: the velocity is a function of x, t and ctx; calls are recorded."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, x, t, ctx, **others):
        self.calls.append((x, t, ctx))
        return self.function(x, t, ctx)


def test_loss_is_zero_for_the_true_velocity_and_interpolates_between_data_and_noise():
    x0, noise = torch.randn(2, 3, 4, 6, 6).unbind()
    model = Velocity(lambda x, t, ctx: noise - x0)
    assert hdm.flow_loss(model, x0, None, noise=noise) == 0
    (_, t, _), = model.calls
    assert t.shape == (3,) and ((t > 0) & (t < 1)).all()
    hdm.flow_loss(model, x0, None, noise=noise, t=torch.tensor([0.0, 0.5, 1.0]))
    x = model.calls[-1][0]
    torch.testing.assert_close(x, torch.stack([x0[0], (x0[1] + noise[1]) / 2, noise[2]]))


def test_loss_of_each_image_averages_to_the_loss():
    model = tiny_xut()
    x0, ctx, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 32), torch.randn(3, 3, 8, 8), torch.rand(3)
    each = hdm.flow_loss(model, x0, ctx, t=t, noise=noise, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), hdm.flow_loss(model, x0, ctx, t=t, noise=noise))
    alone = hdm.flow_loss(model, x0[1:2], ctx[1:2], t=t[1:2], noise=noise[1:2])
    torch.testing.assert_close(each[1], alone)


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_training_times_are_a_shifted_logit_normal(shift):
    """A shift multiplies the odds t / (1 - t), so logit(t) ~ N(ln shift, 1)."""
    t = hdm.draw_time(20_000, shift, torch.Generator().manual_seed(0))
    assert t.logit().mean().item() == pytest.approx(math.log(shift), abs=0.04)
    assert t.logit().std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(t, hdm.draw_time(20_000, shift, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("steps, t_shift, cfg", [(1, 1.0, 1), (1, 1.0, 3.0), (5, 1.0, 3.0), (5, 4.0, 1)])
def test_with_the_true_velocity_euler_is_exact(steps, t_shift, cfg):
    x0, noise = torch.randn(2, 3, 4, 6, 6).unbind()
    model = Velocity(lambda x, t, ctx: (noise - x0).repeat(len(x) // 3, 1, 1, 1))
    ctx = torch.zeros(3, 2, 8)
    drawn = hdm.sample(model, ctx, ctx, noise=noise, steps=steps, cfg=cfg, t_shift=t_shift)
    torch.testing.assert_close(drawn, x0, atol=1e-5, rtol=0)
    times = torch.stack([t[0] for _, t, _ in model.calls])
    even = 1 - torch.arange(steps) / steps
    torch.testing.assert_close(times, t_shift * even / (1 + (t_shift - 1) * even))


@pytest.mark.parametrize("one_pass", [True, False])
def test_guidance_goes_from_the_negative_through_the_prompt(one_pass):
    model = Velocity(lambda x, t, ctx: ctx.mean(dim=(1, 2))[:, None, None, None].expand_as(x))
    ctx, uncond, noise = torch.full((2, 3, 8), 5.0), torch.full((2, 3, 8), 1.0), torch.randn(2, 4, 6, 6)
    for cfg in (0.0, 1.0, 3.0):
        drawn = hdm.sample(model, ctx, uncond, noise=noise, steps=2, cfg=cfg, one_pass=one_pass)
        torch.testing.assert_close(noise - drawn, torch.full_like(noise, 1 + cfg * (5 - 1)))


def test_guidance_of_one_is_a_single_pass_without_the_negative():
    model = Velocity(lambda x, t, ctx: torch.zeros_like(x))
    hdm.sample(model, torch.zeros(2, 3, 8), noise=torch.randn(2, 4, 6, 6), steps=4, cfg=1)
    assert [len(x) for x, _, _ in model.calls] == [2, 2, 2, 2]


def test_each_image_may_have_its_own_positions():
    model = tiny_xut()
    ctx, uncond, noise = torch.randn(2, 5, 32), torch.randn(2, 2, 32), torch.randn(2, 3, 8, 8)
    pos = torch.stack([hdm.grid_positions(4, 4), hdm.grid_positions(4, 4) / 2])
    aspect = torch.tensor([0.0, 0.4])
    drawn = hdm.sample(model, ctx, uncond, noise=noise, steps=2, pos=pos, aspect=aspect)
    for i in range(2):
        one = slice(i, i + 1)
        alone = hdm.sample(model, ctx[one], uncond[one], noise=noise[one], steps=2, pos=pos[i], aspect=aspect[one])
        assert close(drawn[one], alone)
